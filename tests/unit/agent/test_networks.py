"""Networks of one node on a kernel in memory."""

import asyncio
import json
from typing import Any, cast

import pytest

from vmnet.agent.cluster import Cluster, Stores
from vmnet.agent.networks import Networks
from vmnet.kernel.api import Gone
from vmnet.kernel.fake import FakeKernel
from vmnet.kube.api import (
    ENDPOINT_SLICES,
    NADS,
    NAMESPACES,
    NODES,
    PODS,
    POLICIES,
    SERVICES,
    VMIS,
    Handler,
    KubeError,
    Object,
    object_key,
)
from vmnet.model import addresses, names
from vmnet.model.endpoint import Endpoint, NodeNetwork, PortState
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role
from vmnet.plan import ops
from vmnet.plan.network import PodInterface
from vmnet.plan.table import Elements, Table

KINDS = (PODS, NODES, NAMESPACES, NADS, VMIS, SERVICES, ENDPOINT_SLICES, POLICIES)
NETWORK = Network("blue_net", NetworkId(7), role=Role.PRIMARY, subnets=(addresses.network("192.168.0.0/16"),))
NAD = "blue/net"


class Store:
    """An informer whose store the test writes."""

    def __init__(self) -> None:
        self.synced = asyncio.Event()
        self.failure: KubeError | None = None
        self.held: dict[str, Object] = {}
        self.handlers: list[Handler] = []

    def add_handler(self, handler: Handler) -> None:
        self.handlers.append(handler)

    def get(self, key: str) -> Object | None:
        return self.held.get(key)

    def items(self) -> list[Object]:
        return list(self.held.values())

    def put(self, item: Object) -> None:
        before = self.held.get(object_key(item))
        self.held[object_key(item)] = item
        for handler in self.handlers:
            handler(before, item)


class Members:
    """A table that holds the addresses of this node's ports: what a policy does, in one set."""

    def network_tables(self, desired: NodeNetwork) -> tuple[Table, ...]:
        members = frozenset(str(port.endpoint.addresses[0].ip) for port in desired.ports)
        return (Table("inet", "vmnet-members", {"members": Elements("type ipv4_addr;", members)}),)

    def node_tables(self, rendered: object) -> tuple[Table, ...]:
        return ()

    def demands(self, network: str) -> bool:
        return False


class Counting(FakeKernel):
    """Counts looks, and fails once when told to."""

    looks = 0
    failure: Exception | None = None

    async def observe_network(self, namespace: names.NamespaceName) -> Any:
        self.looks += 1
        return await super().observe_network(namespace)

    async def apply(self, ops: Any) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        await super().apply(ops)


class World:
    """Node n1 of two."""

    def __init__(self) -> None:
        self.kernel, self.stores = Counting(), {kind: Store() for kind in KINDS}
        cluster = Cluster(
            Stores(*(cast(Any, self.stores[kind]) for kind in KINDS)),
            on_network=lambda name: None,
            on_machine=lambda machine: None,
        )
        self.cluster, self.joined = cluster, list[str]()
        self.networks = Networks(
            self.kernel, cluster, "n1", (), lambda endpoint: None, (Members(),), on_attached=self.joined.append
        )
        for number in (1, 2):
            address = [{"type": "InternalIP", "address": f"172.30.0.1{number}"}]
            self.stores[NODES].put({"metadata": {"name": f"n{number}"}, "status": {"addresses": address}})
        annotations = {names.NETWORK_ID_ANNOTATION: str(NETWORK.id)}
        nad = {"namespace": "blue", "name": "net", "annotations": annotations}
        self.stores[NADS].put({"metadata": nad, "spec": {"config": NETWORK.to_nad_config(NAD)}})

    def pod(self, host: int, node: str = "n1") -> Endpoint:
        address = f"192.168.0.{host}"
        mac = addresses.mac_for(addresses.address(address))
        allocated = {NAD: {"ip_addresses": [f"{address}/16"], "mac_address": mac}}
        metadata = {
            "namespace": "blue",
            "name": f"p{host}",
            "uid": f"uid-{host}",
            "annotations": {names.POD_NETWORKS_ANNOTATION: json.dumps(allocated)},
        }
        self.stores[PODS].put({"metadata": metadata, "spec": {"nodeName": node}, "status": {"phase": "Running"}})
        found = self.cluster.endpoint(f"blue/p{host}")
        assert found is not None
        return found

    async def attach(self, endpoint: Endpoint) -> int:
        netns = f"/run/netns/{endpoint.pod.name}"
        self.kernel.make_pod(netns)
        return await self.networks.attach(NETWORK, endpoint, PortState.ACTIVE, PodInterface(netns, endpoint.pod.name))

    def tables(self) -> dict[str, str]:
        return dict(self.kernel.networks[NETWORK.namespace].tables)


@pytest.fixture
def world() -> World:
    return World()


async def test_the_second_pod_of_a_network_needs_no_look_at_the_kernel(world: World) -> None:
    mtu = await world.attach(world.pod(5))
    looks = world.kernel.looks
    assert looks
    second = world.pod(6)
    assert await world.attach(second) == mtu
    assert world.kernel.looks == looks
    assert world.joined == [NETWORK.name], "it is looked at soon"
    state = world.kernel.networks[NETWORK.namespace]
    assert second.port in state.links
    assert state.neighbours[second.addresses[0].ip] == second.mac
    assert await world.networks.check(second, "/run/netns/p6") is None
    # What the long way would have made differs in nothing but the bridge's entry of the new port.
    world.kernel.applied.clear()
    await world.networks.render(NETWORK.name)
    assert {op for op in world.kernel.applied if not isinstance(op, ops.LoadFirewall)} == {
        ops.SetFdb(NETWORK.namespace, endpoint.port, endpoint.mac) for endpoint in (world.pod(5), second)
    }


async def test_its_tables_are_there_before_a_pod_s_port_comes_up(world: World) -> None:
    await world.attach(world.pod(5))
    before = world.tables()
    world.kernel.applied.clear()
    await world.attach(world.pod(6))
    assert world.tables() != before
    kinds = [type(op) for op in world.kernel.applied]
    loads = [
        i for i, op in enumerate(world.kernel.applied) if isinstance(op, ops.LoadFirewall) and "members" in op.script
    ]
    assert max(loads) < kinds.index(ops.AttachToBridge)


@pytest.mark.parametrize("failure", [Gone("the namespace is gone"), None])
async def test_a_network_that_is_not_as_it_was_left_is_made_again(world: World, failure: Exception | None) -> None:
    await world.attach(world.pod(5))
    if failure is None:
        del world.kernel.networks[NETWORK.namespace]
    world.kernel.failure = failure
    sixth = world.pod(6)
    await world.attach(sixth)
    state = world.kernel.networks[NETWORK.namespace]
    assert sixth.port in state.links
    assert names.BRIDGE in state.links
    assert world.tables().keys() == {"inet vmnet-members"}
