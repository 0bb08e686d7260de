"""What counts as a fault of a network: on the kernel in memory, as a plan leaves it."""

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest

from vmnet.kernel.fake import FakeKernel
from vmnet.model import names
from vmnet.model.endpoint import Endpoint, LocalPort, Node, NodeNetwork, PodReference, PortState
from vmnet.model.names import InterfaceName, MacAddress, NetworkId
from vmnet.model.network import Network, Role
from vmnet.plan import health
from vmnet.plan import network as network_plan
from vmnet.plan import node as node_plan
from vmnet.plan.health import Part
from vmnet.plan.network import PodInterface
from vmnet.plan.state import NetworkState, NodeState
from vmnet.plan.table import Table

POD = PodReference("ns", "a", "uid-a")
ENDPOINT = Endpoint(POD, "n", "n1", MacAddress("0a:58:c0:a8:00:05"), (ip_interface("192.168.0.5/16"),))
PORT = ENDPOINT.port
TABLE = Table("inet", "vmnet-x", {})


async def rendered(role: Role = Role.PRIMARY) -> tuple[NodeNetwork, NetworkState]:
    kernel = FakeKernel()
    kernel.pods["/run/netns/pod"] = {}
    subnets = (ip_network("192.168.0.0/16"), ip_network("fd20::/64"))
    desired = NodeNetwork(
        network=Network("n", NetworkId(7), role=role, subnets=subnets),
        node=Node("n1", ip_address("172.30.0.11"), 1),
        mtu=1450,
        join=node_plan.allocate_join(NodeState(), NetworkId(7)),
    )
    await kernel.apply(network_plan.plan(desired, None, (TABLE,)))
    state = await kernel.observe_network(desired.network.namespace)
    assert state is not None
    port = LocalPort(ENDPOINT, PortState.ACTIVE)
    await kernel.apply(network_plan.attach(desired, port, PodInterface("/run/netns/pod", "c"), state))
    state = await kernel.observe_network(desired.network.namespace)
    assert state is not None
    return replace(desired, ports=(port,)), state


def link(name: str, **changes: Any) -> Callable[[NetworkState], NetworkState]:
    def change(state: NetworkState) -> NetworkState:
        found = state.links[InterfaceName(name)]
        return replace(state, links={**state.links, found.name: replace(found, **changes)})

    return change


def without(name: str) -> Callable[[NetworkState], NetworkState]:
    return lambda state: replace(state, links={key: value for key, value in state.links.items() if key != name})


@pytest.mark.parametrize("role", list(Role))
async def test_what_a_plan_leaves_is_healthy(role: Role) -> None:
    desired, state = await rendered(role)
    assert health.faults(desired, state, {TABLE.identity: TABLE}, {PORT: POD}) == ()


@pytest.mark.parametrize(
    ("change", "part", "says"),
    [
        (without("br0"), Part.BRIDGE, "br0 is gone"),
        (link("br0", up=False), Part.BRIDGE, "br0 is down"),
        (link("br0", addresses=frozenset()), Part.GATEWAY, "br0 lacks gateway address 192.168.0.1"),
        (without("vx0"), Part.TUNNEL, "vx0 is gone"),
        (link("vx0", master=None), Part.TUNNEL, "vx0 is not on br0"),
        (link("rt0", up=False), Part.TUNNEL, "rt0 is down"),
        (link("rt0", addresses=frozenset()), Part.TUNNEL, "rt0 lacks address 100.88.0.1/16"),
        (without("up0"), Part.JOIN, "up0 is gone"),
        (link("up0", addresses=frozenset()), Part.JOIN, "up0 lacks address 100.65.0.6/30"),
        (lambda state: replace(state, default_routes=frozenset({4})), Part.JOIN, "no default route over up0"),
        (lambda state: replace(state, chains=frozenset()), Part.TABLES, "table netdev vmnet is gone"),
        (lambda state: replace(state, tables={}), Part.TABLES, "table inet vmnet-x is gone"),
        (
            lambda state: replace(state, tables={TABLE.identity: ("other",)}),
            Part.TABLES,
            "table inet vmnet-x is not as it was loaded",
        ),
        (link(PORT, master=None), Part.PORT, f"port {PORT} is not up on br0"),
        (
            lambda state: replace(state, chains=frozenset({"port_in"})),
            Part.PORT,
            f"port {PORT} is not bound to its addresses",
        ),
        (without(PORT), Part.POD, f"pod ns/a has lost its port {PORT}: delete the pod"),
    ],
)
async def test_what_is_not_there_is_named(
    change: Callable[[NetworkState], NetworkState], part: Part, says: str
) -> None:
    desired, state = await rendered()
    found = health.faults(desired, change(state), {TABLE.identity: TABLE}, {PORT: POD})
    assert health.Fault(part, says) in found


async def test_a_namespace_that_is_gone_is_one_fault() -> None:
    desired, _ = await rendered()
    (fault,) = health.faults(desired, None)
    assert fault.part is Part.NAMESPACE
    assert names.network_namespace(NetworkId(7)) in fault.says


def test_the_nodes_own_namespace() -> None:
    held = {TABLE.identity: TABLE}
    assert health.node_faults(NodeState(prepared=True, tables={TABLE.identity: (TABLE.digest,)}), held) == ()
    says = [fault.says for fault in health.node_faults(NodeState(), held)]
    assert says == ["the node's table inet vmnet is gone or incomplete", "the node's table inet vmnet-x is gone"]
