from dataclasses import replace
from ipaddress import ip_address, ip_network

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vmnet.ipam.errors import Exhausted, OutOfRange, WrongFamily
from vmnet.ipam.node_pools import NodePools
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Topology, divided


def network(*texts: str) -> Network:
    pairs = [divided(text) for text in texts]
    subnets, prefixes = tuple(subnet for subnet, _ in pairs), tuple(prefix for _, prefix in pairs)
    return Network("blue", NetworkId(1), Topology.LAYER3, subnets=subnets, host_prefixes=prefixes)


def test_a_node_gets_its_part_with_its_first_workload() -> None:
    made = NodePools(network("fd20::/48", "103.103.0.0/16/24"))
    assert made.at("n1") is None
    assert made.parts("n1") == ()
    first, second = made.place("n1").allocate("a"), made.place("n2").allocate("b")
    assert list(map(str, first.addresses)) == ["103.103.0.3/24", "fd20::3/64"]
    assert list(map(str, second.addresses)) == ["103.103.1.3/24", "fd20:0:0:1::3/64"]
    assert first.mac == "0a:58:67:67:00:03"
    assert list(map(str, made.parts("n2"))) == ["103.103.1.0/24", "fd20:0:0:1::/64"]
    assert made.get("b") == second
    assert (made.used(4), made.used(6)) == (2, 2)


def test_gateway_and_management_address_of_a_part_are_nobodys() -> None:
    pools = NodePools(network("103.103.0.0/16")).place("n1")
    for host in (0, 1, 2, 255):
        with pytest.raises(OutOfRange):
            pools.reserve("a", [ip_address(f"103.103.0.{host}")])
    with pytest.raises(OutOfRange, match=r"not in subnet 103\.103\.0\.0/24"):
        pools.reserve("a", [ip_address("103.103.1.5")])


def test_all_families_or_none() -> None:
    made = NodePools(network("10.0.0.0/24/24", "fd20::/48"))
    made.place("n1")
    with pytest.raises(Exhausted, match=r"10\.0\.0\.0/24 is left for node n2"):
        made.place("n2")
    made.extend(network("10.0.0.0/24/24", "fd20::/48", "10.7.0.0/24/24"))
    assert list(map(str, made.place("n2").network.parts)) == ["10.7.0.0/24", "fd20:0:0:1::/64"]


def test_a_family_that_is_added_comes_to_nodes_that_have_a_part() -> None:
    made = NodePools(network("10.0.0.0/16"))
    before = made.place("n1").allocate("a")
    made.extend(network("10.0.0.0/16", "fd20::/48"))
    assert made.families == (4, 6)
    assert made.get("a") == before
    assert list(map(str, made.place("n1").allocate("b").addresses)) == ["10.0.0.4/24", "fd20::3/64"]
    assert made.get("a") == before
    with pytest.raises(WrongFamily):
        NodePools(network("10.0.0.0/16")).adopt("n1", ip_network("fd20::/64"))


def test_an_older_state_of_the_network_takes_nothing_away() -> None:
    made = NodePools(network("10.0.0.0/16", "10.1.0.0/16"))
    made.extend(network("10.0.0.0/16"))
    assert list(map(str, made.network.subnets)) == ["10.0.0.0/16", "10.1.0.0/16"]
    assert made.capacity(4) == 512 * 252
    assert replace(made.network, subnets=()).host_prefixes == (24, 24)


def test_the_part_of_a_node_that_is_gone_waits_for_its_addresses() -> None:
    made = NodePools(network("10.0.0.0/23/24"))
    made.place("n1").allocate("a")
    made.place("n2")
    assert made.leave("n2")
    assert not made.leave("n1")
    assert not made.leave("n3")
    assert str(made.place("n3").network.parts[0]) == "10.0.1.0/24"
    with pytest.raises(Exhausted):
        made.place("n4")
    assert made.release("a")
    assert not made.release("a")
    assert str(made.place("n4").network.parts[0]) == "10.0.0.0/24"


def test_a_node_that_came_back_keeps_its_part() -> None:
    made = NodePools(network("10.0.0.0/16"))
    made.place("n1").allocate("a")
    made.leave("n1")
    made.stay("n1")
    made.release("a")
    assert list(map(str, made.parts("n1"))) == ["10.0.0.0/24"]


class Nodes(RuleBasedStateMachine):
    """Nodes come and go, and workloads on them."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = NodePools(network("10.0.0.0/28/29", "10.0.1.0/29/29", "fd20::/124/126"))
        self.held: dict[str, tuple[str, object]] = {}

    @rule(node=st.sampled_from("abcd"), owner=st.integers(0, 20).map(str))
    def allocate(self, node: str, owner: str) -> None:
        if owner in self.held:
            return
        try:
            found = self.pools.place(node).allocate(owner)
        except Exhausted:
            return
        assert [item.network for item in found.addresses] == list(self.pools.parts(node))
        self.held[owner] = (node, found)

    @rule(owner=st.integers(0, 20).map(str))
    def release(self, owner: str) -> None:
        assert self.pools.release(owner) == (self.held.pop(owner, None) is not None)

    @rule(node=st.sampled_from("abcd"))
    def leave(self, node: str) -> None:
        used = any(where == node for where, _ in self.held.values())
        had = bool(self.pools.parts(node))
        assert self.pools.leave(node) == (had and not used)

    @rule(node=st.sampled_from("abcd"))
    def stay(self, node: str) -> None:
        self.pools.stay(node)

    @invariant()
    def each_has_its_own(self) -> None:
        assert all(self.pools.get(owner) == found for owner, (_, found) in self.held.items())
        assert set(self.pools.owners()) == set(self.held)
        parts = [part for node in "abcd" for part in self.pools.parts(node)]
        assert len(set(parts)) == len(parts)
        assert self.pools.used(4) == self.pools.used(6) == len(self.held)


TestNodes = Nodes.TestCase
TestNodes.settings = settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
