from ipaddress import ip_network

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vmnet.ipam.errors import AddressConflict, Exhausted, OutOfRange
from vmnet.ipam.part_pool import PartPool


def pool(*ranges: tuple[str, int]) -> PartPool:
    found = PartPool()
    for subnet, prefix in ranges:
        found.extend(ip_network(subnet), prefix)
    return found


def test_parts_rise_and_stay_with_their_nodes() -> None:
    made = pool(("103.103.0.0/16", 24))
    assert [str(made.allocate(node)) for node in ("n1", "n2", "n1")] == [
        "103.103.0.0/24",
        "103.103.1.0/24",
        "103.103.0.0/24",
    ]


def test_a_further_range_comes_into_use_when_the_first_is_used_up() -> None:
    made = pool(("10.0.0.0/30", 31), ("fd20::/127", 128))
    assert made.total == 4
    assert [str(made.allocate(f"n{number}")) for number in range(4)] == [
        "10.0.0.0/31",
        "10.0.0.2/31",
        "fd20::/128",
        "fd20::1/128",
    ]
    with pytest.raises(Exhausted, match=r"no part of 10\.0\.0\.0/30, fd20::/127 is left for node n9"):
        made.allocate("n9")
    made.extend(ip_network("10.9.0.0/24"), 24)
    assert str(made.allocate("n9")) == "10.9.0.0/24"


def test_a_part_that_was_given_back_is_given_late() -> None:
    made = pool(("10.0.0.0/22", 24))
    made.allocate("n1")
    assert made.release("n1")
    assert not made.release("n1")
    assert [str(made.allocate(f"n{number}")) for number in (2, 3, 4, 5)] == [
        "10.0.1.0/24",
        "10.0.2.0/24",
        "10.0.3.0/24",
        "10.0.0.0/24",
    ]


def test_only_parts_are_adopted_and_by_one_node_alone() -> None:
    made = pool(("10.0.0.0/16", 24))
    made.adopt("n1", ip_network("10.0.7.0/24"))
    made.adopt("n1", ip_network("10.0.7.0/24"))
    with pytest.raises(AddressConflict, match="node n1"):
        made.adopt("n2", ip_network("10.0.7.0/24"))
    with pytest.raises(OutOfRange, match="has 10.0.7.0/24 already"):
        made.adopt("n1", ip_network("10.0.8.0/24"))
    for text in ("10.0.7.0/25", "10.1.0.0/24", "fd20::/64", "10.0.0.0/16"):
        with pytest.raises(OutOfRange, match="is no part"):
            made.adopt("n3", ip_network(text))
    assert str(made.allocate("n2")) == "10.0.8.0/24"


def test_how_many_workloads_there_is_room_for() -> None:
    assert pool(("10.0.0.0/16", 24)).capacity == 256 * 252
    assert pool(("fd20::/126", 126)).capacity == 1


NODES = st.sampled_from([f"n{number}" for number in range(8)])
PARTS = st.integers(0, 3).map(lambda number: ip_network(f"10.0.{number}.0/24"))
STEPS = st.one_of(
    st.tuples(st.just("allocate"), NODES, st.none()),
    st.tuples(st.just("release"), NODES, st.none()),
    st.tuples(st.just("adopt"), NODES, PARTS),
)


@given(st.lists(STEPS))
def test_no_part_has_two_nodes_and_none_is_refused_while_one_is_free(steps: list[tuple[str, str, object]]) -> None:
    made = pool(("10.0.0.0/22", 24))
    held: dict[str, object] = {}
    for what, node, part in steps:
        if what == "release":
            assert made.release(node) == (held.pop(node, None) is not None)
        elif what == "adopt":
            free = part not in held.values() and node not in held
            try:
                made.adopt(node, part)  # type: ignore[arg-type]
            except (AddressConflict, OutOfRange):
                assert not free
            else:
                assert free or held[node] == part
                held[node] = part
        elif node in held or len(held) < 4:
            given_part = made.allocate(node)
            assert held.setdefault(node, given_part) == given_part
        else:
            with pytest.raises(Exhausted):
                made.allocate(node)
        assert len(set(held.values())) == len(held)
        assert all(made.get(other) == mine for other, mine in held.items())
