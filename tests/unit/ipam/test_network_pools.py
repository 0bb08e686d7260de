from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from vmnet.ipam.errors import AddressConflict, ConflictKind, Exhausted, OutOfRange, WrongFamily
from vmnet.ipam.network_pools import INFRASTRUCTURE, Allocation, NetworkPools
from vmnet.model import names
from vmnet.model.addresses import mac_for, parse_mac
from vmnet.model.names import NetworkId
from vmnet.model.network import Network

MAC = parse_mac("02:03:04:05:06:07")


def pools(*subnets: str, **more: Any) -> NetworkPools:
    return NetworkPools(Network("tenant", NetworkId(1), subnets=tuple(map(ip_network, subnets)), **more))


def test_the_first_workload_address_of_a_sixteen_bit_subnet_is_3() -> None:
    made = pools("192.168.0.0/16", "fd00:10::/64").allocate("a")
    assert list(map(str, made.addresses)) == ["192.168.0.3/16", "fd00:10::3/64"]
    assert made.mac == "0a:58:c0:a8:00:03"


def test_ipv4_comes_first_whatever_the_order_of_the_subnets() -> None:
    made = pools("fd00:10::/64", "192.168.0.0/16").allocate("a")
    assert [item.version for item in made.addresses] == [4, 6]


def test_an_owner_keeps_what_it_has() -> None:
    made = pools("192.168.0.0/16")
    assert made.allocate("a") == made.allocate("a")
    assert made.used(4) == 1


def test_the_mac_of_an_ipv6_network_follows_from_the_ipv6_address() -> None:
    made = pools("fd00:10::/64").allocate("a")
    assert made.mac == mac_for(ip_address("fd00:10::3"))


def test_infrastructure_subnets_move_the_first_workload_address() -> None:
    made = pools("192.168.0.0/16", infrastructure_subnets=(ip_network("192.168.128.0/24"),))
    assert str(made.allocate("a").addresses[0]) == "192.168.0.1/16"
    with pytest.raises(OutOfRange):
        made.reserve("b", [ip_address("192.168.128.77")])


def test_a_static_request_takes_addresses_and_mac() -> None:
    made = pools("192.168.0.0/16", "fd00:10::/64")
    found = made.reserve("a", [ip_address("fd00:10::50"), ip_address("192.168.0.50")], MAC)
    assert found == Allocation((ip_address("192.168.0.50"), ip_address("fd00:10::50")), (16, 64), MAC)
    assert found.addresses == (ip_interface("192.168.0.50/16"), ip_interface("fd00:10::50/64"))


@pytest.mark.parametrize(
    ("subnets", "wanted"),
    [
        (["192.168.0.0/16"], ["fd00:10::5"]),
        (["fd00:10::/64"], ["192.168.0.5"]),
        (["192.168.0.0/16", "fd00:10::/64"], ["192.168.0.5"]),
        (["192.168.0.0/16", "fd00:10::/64"], ["fd00:10::5"]),
        (["192.168.0.0/16"], ["192.168.0.5", "192.168.0.6"]),
        (["192.168.0.0/16"], []),
    ],
)
def test_addresses_of_the_wrong_families_are_refused(subnets: list[str], wanted: list[str]) -> None:
    with pytest.raises(WrongFamily):
        pools(*subnets).reserve("a", map(ip_address, wanted))


def test_what_is_written_down_is_honoured_although_a_family_is_missing() -> None:
    made = pools("192.168.0.0/16", "fd00:10::/64")
    made.reserve("a", [ip_interface("192.168.0.3/16")], partial=True)
    assert str(made.allocate("b").addresses[0]) == "192.168.0.4/16"


def test_a_refused_request_changes_nothing() -> None:
    made = pools("192.168.0.0/16", "fd00:10::/64")
    made.reserve("a", map(ip_address, ["192.168.0.9", "fd00:10::9"]))
    with pytest.raises(AddressConflict) as caught:
        made.reserve("b", map(ip_address, ["192.168.0.8", "fd00:10::9"]))
    assert (caught.value.kind, caught.value.owner) == (ConflictKind.IP, "a")
    assert (made.used(4), made.used(6), made.get("b")) == (1, 1, None)


def test_a_mac_has_one_owner() -> None:
    made = pools("192.168.0.0/16")
    made.allocate("a", MAC)
    with pytest.raises(AddressConflict) as caught:
        made.allocate("b", MAC)
    assert (caught.value.kind, caught.value.value, caught.value.owner) == (ConflictKind.MAC, MAC, "a")
    assert made.used(4) == 1


def test_nobody_gets_the_gateways_mac() -> None:
    made = pools("192.168.0.0/16")
    with pytest.raises(AddressConflict, match=INFRASTRUCTURE):
        made.allocate("a", made.network.gateway_mac)


def test_an_address_whose_mac_somebody_asked_for_is_passed_over_and_not_lost() -> None:
    made = pools("10.0.0.0/29")
    made.reserve("a", [ip_address("10.0.0.6")], mac_for(ip_address("10.0.0.3")))
    assert str(made.allocate("b").addresses[0].ip) == "10.0.0.4"
    made.release("a")
    assert [str(made.allocate(owner).addresses[0].ip) for owner in "cd"] == ["10.0.0.5", "10.0.0.3"]


def test_exhaustion_of_one_family_takes_nothing_of_the_other() -> None:
    made = pools("10.0.0.0/30", "fd00:10::/64")
    with pytest.raises(Exhausted):
        made.allocate("a")
    assert (made.used(4), made.used(6)) == (0, 0)


def test_a_release_makes_room() -> None:
    made = pools("10.0.0.0/29")
    for owner in "abcd":
        made.allocate(owner)
    with pytest.raises(Exhausted):
        made.allocate("e")
    assert made.release("b")
    assert not made.release("b")
    assert str(made.allocate("e").addresses[0].ip) == "10.0.0.4"


class Against(RuleBasedStateMachine):
    """The pools against a dictionary: no address, no MAC ever has two owners, and nothing is lost."""

    owners = Bundle("owners")

    def __init__(self) -> None:
        super().__init__()
        self.pools = pools("10.0.0.0/28", "fd00:10::/124", reserved_subnets=(ip_network("10.0.0.8/30"),))
        self.model: dict[str, Allocation] = {}
        self.count = 0
        self.resting: list[str] = []

    def held(self) -> set[str]:
        return {str(item.ip) for found in self.model.values() for item in found.addresses}

    def macs(self) -> set[str]:
        return {found.mac for found in self.model.values()} | {self.pools.network.gateway_mac}

    @rule(target=owners)
    def allocate(self) -> Any:
        self.count += 1
        owner = f"owner {self.count}"
        # 10.0.0.3 … .14 without the reserved .8 … .11.
        free = {f"10.0.0.{last}" for last in (3, 4, 5, 6, 7, 12, 13, 14)} - self.held()
        usable = {item for item in free if mac_for(ip_address(item)) not in self.macs()}
        try:
            found = self.pools.allocate(owner)
        except Exhausted:
            assert not usable or len([item for item in self.held() if ":" in item]) == 13
            return multiple()
        assert str(found.addresses[0].ip) in usable
        assert not {str(item.ip) for item in found.addresses} & self.held()
        assert found.mac not in self.macs()
        self.model[owner] = found
        return owner

    @rule(target=owners, last=st.integers(0, 15), mac=st.none() | st.integers(0, 15))
    def reserve(self, last: int, mac: int | None) -> Any:
        self.count += 1
        owner = f"owner {self.count}"
        wanted = [ip_address(f"10.0.0.{last}"), ip_address(f"fd00:10::{last:x}")]
        asked = mac_for(ip_address(f"10.0.0.{mac}")) if mac is not None else None
        expected = asked or mac_for(wanted[0])
        try:
            found = self.pools.reserve(owner, wanted, asked)
        except OutOfRange:
            assert last in (0, 1, 2, 15)
            return multiple()
        except AddressConflict:
            assert {str(item) for item in wanted} & self.held() or expected in self.macs()
            return multiple()
        assert not {str(item) for item in wanted} & self.held()
        assert expected not in self.macs()
        self.model[owner] = found
        return owner

    @rule(owner=consumes(owners))
    def release(self, owner: str) -> None:
        assert self.pools.release(owner)
        del self.model[owner]

    @invariant()
    def counts_agree(self) -> None:
        assert self.pools.used(4) == self.pools.used(6) == len(self.model)
        assert {owner: self.pools.get(owner) for owner in self.pools.owners()} == self.model


TestAgainstAModel = Against.TestCase
TestAgainstAModel.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def test_no_workload_gets_the_mac_of_a_router() -> None:
    made = pools("192.168.0.0/16")
    for attempt in (
        lambda: made.allocate("a", names.router_mac("n1")),
        lambda: made.reserve("a", [ip_address("192.168.0.50")], names.router_mac("n1")),
    ):
        with pytest.raises(AddressConflict, match="the nodes' routers"):
            attempt()
    assert made.used(4) == 0
