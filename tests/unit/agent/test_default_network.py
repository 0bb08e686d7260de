"""Which subnets the node keeps its networks away from."""

from ipaddress import ip_address, ip_network
from typing import Any

from vmnet.agent.default_network import DefaultNetwork, pod_subnets
from vmnet.kube.api import NODES, Object
from vmnet.model.endpoint import Node, NodeNetwork
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role
from vmnet.plan.node import allocate_join
from vmnet.plan.state import NodeState

RED = Network("cluster_udn_red", NetworkId(1), role=Role.PRIMARY, subnets=(ip_network("192.168.0.0/16"),))
HERE = Node("n1", ip_address("172.30.0.11"))
RENDERED = {RED.name: NodeNetwork(RED, HERE, 1450, allocate_join(NodeState(), RED.id), ())}


def node(name: str, *subnets: str, **status: Any) -> Object:
    return {"metadata": {"name": name}, "spec": {"podCIDRs": list(subnets)}, "status": status}


def test_the_subnets_of_all_nodes_while_a_network_is_here(api: Any) -> None:
    changed: list[bool] = []
    source = DefaultNetwork(api.informers, lambda: changed.append(True))
    assert source.node_tables(RENDERED) == ()
    api.stores[NODES].put(node("n1", "10.244.1.0/24", "fd00:10:244:1::/64"))
    api.stores[NODES].put(node("n2", "10.244.2.0/24"))
    assert len(changed) == 2
    (table,) = source.node_tables(RENDERED)
    assert table.sets["pods4"].texts() == {"10.244.1.0/24", "10.244.2.0/24"}
    assert table.sets["pods6"].texts() == {"fd00:10:244:1::/64"}
    assert source.node_tables({}) == ()
    assert source.network_tables(RENDERED[RED.name]) == ()
    assert not source.demands(RED.name)


def test_a_heartbeat_changes_nothing_and_a_node_that_goes_does(api: Any) -> None:
    changed: list[bool] = []
    source = DefaultNetwork(api.informers, lambda: changed.append(True))
    api.stores[NODES].put(node("n1", "10.244.1.0/24"))
    api.stores[NODES].put(node("n1", "10.244.1.0/24", conditions=[{"type": "Ready"}]))
    assert len(changed) == 1
    api.stores[NODES].drop("n1")
    assert len(changed) == 2
    assert source.node_tables(RENDERED) == ()


def test_the_older_field_is_read_where_the_newer_one_is_not_there() -> None:
    assert pod_subnets({"spec": {"podCIDR": "10.244.1.0/24"}}) == (ip_network("10.244.1.0/24"),)
    assert pod_subnets({"spec": {}}) == ()
    assert pod_subnets({}) == ()
