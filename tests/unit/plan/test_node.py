from ipaddress import ip_interface, ip_network

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
    assert node.plan(NodeState(prepared=True)) == ()
    assert any(isinstance(op, ops.LoadFirewall) for op in node.plan(NodeState()))


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
