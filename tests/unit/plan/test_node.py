from ipaddress import ip_address, ip_interface, ip_network

import pytest

from vmnet.model import names
from vmnet.model.names import NetworkId
from vmnet.plan import node, ops
from vmnet.plan.node import JoinsExhausted
from vmnet.plan.state import JoinState, NodeState

ONE, TWO = NetworkId(1), NetworkId(2)


def having(number: int, address: str) -> NodeState:
    name = names.join_interface(NetworkId(number))
    return NodeState(joins={name: JoinState(name, ip_interface(address), None)})


def test_a_prepared_node_is_left_alone() -> None:
    assert node.plan(NodeState(prepared=True, sets={"tunnels": frozenset({"4789"})})) == ()
    assert any(isinstance(op, ops.LoadFirewall) for op in node.plan(NodeState()))


OTHERS = (ip_address("172.30.0.12"), ip_address("fd00:30::13"))


def loaded(found: tuple[ops.Op, ...]) -> str:
    (script,) = [op.script for op in found if isinstance(op, ops.LoadFirewall)]
    return script


def test_only_other_nodes_speak_for_the_networks_of_this_one() -> None:
    script = loaded(node.plan(NodeState(), vteps=OTHERS, networks={ONE}))
    for line in ("vteps4 { 172.30.0.12 }", "vteps6 { fd00:30::13 }", "vnis { 1, 8388609 }"):
        assert f"add element inet vmnet {line}" in script
    # A tenant's datagrams leave with this node's own address, so they are stopped before they leave.
    assert "udp dport @tunnels ip daddr @vteps4 drop" in script
    assert "add element inet vmnet tunnels { 4789 }" in script


def test_the_sets_follow_the_nodes_and_networks() -> None:
    sets = {
        "vteps4": frozenset({"172.30.0.12"}),
        "vteps6": frozenset({"fd00:30::13"}),
        "tunnels": frozenset({"4789"}),
        "vnis": frozenset({"1", "8388609"}),
    }
    state = NodeState(prepared=True, sets=sets)
    assert node.plan(state, vteps=OTHERS, networks={ONE}) == ()
    assert loaded(node.plan(state, vteps=OTHERS[1:], networks={ONE, TWO})) == (
        "delete element inet vmnet vteps4 { 172.30.0.12 }\nadd element inet vmnet vnis { 2, 8388610 }\n"
    )
    assert loaded(node.plan(state, vteps=OTHERS, networks={ONE}, vxlan_port=8472)) == (
        "delete element inet vmnet tunnels { 4789 }\nadd element inet vmnet tunnels { 8472 }\n"
    )


def test_subnets_of_the_default_network_are_as_nft_lists_them() -> None:
    subnets = [ip_network(text) for text in ("10.244.1.0/24", "10.244.1.128/25", "10.9.9.9/32", "fd00:10:244:1::/64")]
    services = [ip_address("10.96.0.1"), ip_address("fd00:10:96::1")]
    script = loaded(node.plan(NodeState(), pods=subnets, services=services))
    for line in ("pods4 { 10.244.1.0/24, 10.9.9.9 }", "pods6 { fd00:10:244:1::/64 }", "services6 { fd00:10:96::1 }"):
        assert f"add element inet vmnet {line}" in script


def test_a_table_that_is_half_there_is_replaced_with_all_its_elements() -> None:
    half = NodeState(prepared=False, sets={"vteps4": frozenset({"172.30.0.12"})})
    assert "add element inet vmnet vteps4 { 172.30.0.12 }" in loaded(node.plan(half, vteps=OTHERS))


def test_both_ends_lie_in_one_small_network() -> None:
    join = node.allocate_join(NodeState(), ONE)
    assert join.node_ipv4.network == join.network_ipv4.network
    assert join.node_ipv6.network == join.network_ipv6.network
    assert str(join.network_ipv4) == "100.65.0.6/30"


def test_an_existing_join_is_adopted() -> None:
    assert node.allocate_join(having(1, "100.65.0.41/30"), ONE).index == 10


def test_numbers_that_are_used_or_promised_are_passed_over() -> None:
    assert node.allocate_join(having(1, "100.65.0.5/30"), TWO, promised=frozenset({2})).index == 3


def test_a_full_join_subnet_says_so() -> None:
    with pytest.raises(JoinsExhausted, match="100.65.0.0/29"):
        node.allocate_join(having(1, "100.65.0.5/30"), TWO, ipv4=ip_network("100.65.0.0/29"))
