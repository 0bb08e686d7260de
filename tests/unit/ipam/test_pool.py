import time
from ipaddress import ip_address, ip_network

import pytest

from vmnet.ipam.errors import AddressConflict, ConflictKind, Exhausted, OutOfRange
from vmnet.ipam.pool import Pool, Ranges


def pool(subnet: str, *, infrastructure: tuple[str, ...] = (), reserved: tuple[str, ...] = ()) -> Pool:
    parsed = [ip_network(item) if "/" in item else ip_address(item) for item in infrastructure]
    return Pool(ip_network(subnet), infrastructure=parsed, reserved=[ip_network(item) for item in reserved])


def test_overlapping_and_touching_ranges_are_merged() -> None:
    ranges = Ranges([(5, 9), (1, 4), (20, 20), (8, 12)])
    assert [ranges.end_of(value) for value in (0, 1, 12, 13, 20, 21)] == [None, 12, 12, None, 20, None]
    assert ranges.size() == 13


def test_addresses_rise_and_skip_what_is_kept() -> None:
    made = pool("10.0.0.0/28", infrastructure=("10.0.0.1", "10.0.0.2", "10.0.0.8/30"), reserved=("10.0.0.4/31",))
    given = [str(made.allocate("a")) for _ in range(6)]
    with pytest.raises(Exhausted, match=r"10\.0\.0\.0/28"):
        made.allocate("a")
    assert given == ["10.0.0.3", "10.0.0.6", "10.0.0.7", "10.0.0.12", "10.0.0.13", "10.0.0.14"]
    assert made.capacity == len(given) + 2  # the reserved ones can be had by name


def test_a_released_address_rests_until_no_other_is_left() -> None:
    made = pool("10.0.0.0/29")
    first, second = made.allocate("a"), made.allocate("b")
    made.release(second)
    made.release(first)
    rest = [made.allocate("c") for _ in range(made.capacity)]
    assert rest[-2:] == [second, first]  # the one that rested longest comes first


def test_only_a_request_by_name_gets_a_reserved_address() -> None:
    made = pool("10.0.0.0/29", reserved=("10.0.0.4/30",))
    made.reserve(ip_address("10.0.0.5"), "a")
    made.release(ip_address("10.0.0.5"))
    assert [str(made.allocate("b")) for _ in range(3)] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    with pytest.raises(Exhausted):
        made.allocate("b")


@pytest.mark.parametrize("address", ["10.0.0.0", "10.0.0.7", "10.0.0.1", "10.0.1.1"])
def test_network_broadcast_infrastructure_and_strangers_are_out_of_range(address: str) -> None:
    with pytest.raises(OutOfRange, match=address):
        pool("10.0.0.0/29", infrastructure=("10.0.0.1",)).reserve(ip_address(address), "a")


def test_the_conflict_names_the_holder() -> None:
    made = pool("10.0.0.0/29")
    made.reserve(ip_address("10.0.0.3"), "a")
    made.reserve(ip_address("10.0.0.3"), "a")
    with pytest.raises(AddressConflict, match=r"10\.0\.0\.3 is in use by a") as caught:
        made.reserve(ip_address("10.0.0.3"), "b")
    assert (caught.value.kind, caught.value.owner) == (ConflictKind.IP, "a")


def test_ipv6_has_no_broadcast_address_and_an_enormous_capacity() -> None:
    made = pool("fd00::/64", infrastructure=("fd00::1", "fd00::2"))
    assert str(made.allocate("a")) == "fd00::3"
    assert made.capacity == 2**64 - 3
    made.reserve(ip_address("fd00::ffff:ffff:ffff:ffff"), "b")


def test_a_full_sixteen_bit_pool_still_answers_at_once() -> None:
    made = pool("192.168.0.0/16", infrastructure=("192.168.0.1", "192.168.0.2"))
    held = [made.allocate("a") for _ in range(made.capacity)]
    started = time.perf_counter()
    for address in held[:5000]:
        made.release(address)
        assert made.allocate("b") == address
    # Any search through the pool would take minutes; the bound only has to tell the two apart.
    assert time.perf_counter() - started < 5
