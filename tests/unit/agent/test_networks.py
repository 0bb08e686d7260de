"""Networks of one node on a kernel in memory."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import pytest

from vmnet import metrics
from vmnet.agent.cluster import Cluster, Stores
from vmnet.agent.networks import Networks, NotReady
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
)
from vmnet.kube.fake import FakeInformer
from vmnet.model import addresses, names
from vmnet.model.connection import UDP, Connection, Flow
from vmnet.model.endpoint import Endpoint, NodeNetwork, PortState
from vmnet.model.names import InterfaceName, MacAddress, NetworkId
from vmnet.model.network import Network, Role, Topology
from vmnet.plan import ops
from vmnet.plan.network import PodInterface
from vmnet.plan.state import BridgeState
from vmnet.plan.table import Elements, Marks, Table

KINDS = (PODS, NODES, NAMESPACES, NADS, VMIS, SERVICES, ENDPOINT_SLICES, POLICIES)
NETWORK = Network("blue_net", NetworkId(7), role=Role.PRIMARY, subnets=(addresses.network("192.168.0.0/16"),))
NAD = "blue/net"


class Members:
    """A table that holds the addresses of this node's ports: what a policy does, in one set."""

    def network_tables(self, desired: NodeNetwork) -> tuple[Table, ...]:
        members = frozenset(str(port.endpoint.addresses[0].ip) for port in desired.ports)
        return (Table("inet", "vmnet-members", {"members": Elements("type ipv4_addr;", members)}),)

    def node_tables(self, rendered: object) -> tuple[Table, ...]:
        return ()

    demanded = False

    def demands(self, network: str) -> bool:
        return self.demanded


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
        self.asked: list[str] = []
        self.kernel, self.stores = Counting(), {kind: FakeInformer(kind) for kind in KINDS}
        cluster = Cluster(
            Stores(*(cast(Any, self.stores[kind]) for kind in KINDS)),
            on_network=lambda name: self.asked.append(name),
            on_machine=lambda machine: None,
        )
        self.cluster, self.joined = cluster, list[str]()
        self.members = Members()
        self.networks = Networks(
            self.kernel, cluster, "n1", (), lambda endpoint: None, (self.members,), on_attached=self.joined.append
        )
        for number in (1, 2):
            self.node(number)
        annotations = {names.NETWORK_ID_ANNOTATION: str(NETWORK.id)}
        nad = {"namespace": "blue", "name": "net", "annotations": annotations}
        self.stores[NADS].put({"metadata": nad, "spec": {"config": NETWORK.to_nad_config(NAD)}})

    def node(self, number: int, **annotations: str) -> None:
        address = [{"type": "InternalIP", "address": f"172.30.0.1{number}"}]
        metadata = {"name": f"n{number}", "annotations": annotations}
        self.stores[NODES].put({"metadata": metadata, "status": {"addresses": address}})

    def numbered(self, number: int, *parts: str) -> None:
        subnets = {names.NODE_SUBNETS_ANNOTATION: json.dumps({"blue_net": parts})} if parts else {}
        self.node(number, **{names.NODE_NUMBER_ANNOTATION: str(number)}, **subnets)

    def machine(self, host: int, node: str) -> Endpoint:
        """A virt-launcher pod."""
        return self.pod(host, node, {names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE})

    def pod(self, host: int, node: str = "n1", labels: dict[str, str] | None = None) -> Endpoint:
        address = f"192.168.0.{host}"
        mac = addresses.mac_for(addresses.address(address))
        allocated = {NAD: {"ip_addresses": [f"{address}/16"], "mac_address": mac}}
        metadata = {
            "namespace": "blue",
            "name": f"p{host}",
            "uid": f"uid-{host}",
            "labels": labels or {},
            "annotations": {names.POD_NETWORKS_ANNOTATION: json.dumps(allocated), names.DOMAIN_ANNOTATION: f"vm{host}"},
        }
        self.stores[PODS].put({"metadata": metadata, "spec": {"nodeName": node}, "status": {"phase": "Running"}})
        found = self.cluster.endpoint(f"blue/p{host}")
        assert found is not None
        return found

    async def attach(self, endpoint: Endpoint) -> int:
        netns = f"/run/netns/{endpoint.pod.name}"
        self.kernel.make_pod(netns)
        attachment = self.cluster.attachment_of(NETWORK.name)
        assert attachment is not None
        network = attachment.network.around(endpoint.addresses)
        return await self.networks.attach(network, endpoint, PortState.ACTIVE, PodInterface(netns, endpoint.pod.name))

    def tables(self) -> dict[str, Marks]:
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
    # Whoever deletes or changes rules waits until every processor has left the old ones, and the pod with it. The
    # port's own chains are flushed, but they are new.
    lines = "".join(op.script for op in world.kernel.applied if isinstance(op, ops.LoadFirewall)).splitlines()
    new = [f"flush {line.partition(' ')[2].partition(' {')[0]}" for line in lines if line.startswith("add chain")]
    assert [line for line in lines if not line.startswith("add ") and line not in new] == []


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


def vteps(world: World) -> set[str]:
    return {str(vtep) for vtep in world.kernel.networks[NETWORK.namespace].tunnels.values()}


async def test_the_routers_of_the_nodes_that_host_the_network_are_known(world: World) -> None:
    world.node(3)
    for number in (1, 2):
        world.numbered(number)
    await world.attach(world.pod(5))
    assert vteps(world) == set(), "no other node has an endpoint"
    world.pod(6, "n2")
    world.pod(7, "n3")
    await world.networks.render(NETWORK.name)
    assert vteps(world) == {"172.30.0.12"}, "n3 has no number yet"
    world.numbered(3)
    await world.networks.render(NETWORK.name)
    assert vteps(world) == {"172.30.0.12", "172.30.0.13"}
    assert world.kernel.networks[NETWORK.namespace].links[names.VXLAN_L3].addresses == set(addresses.transit(1))


async def test_a_network_that_is_wanted_everywhere_has_its_router_everywhere(world: World) -> None:
    for number in (1, 2, 3):
        world.numbered(number)
    world.members.demanded = True
    await world.networks.render(NETWORK.name)
    assert vteps(world) == {"172.30.0.12", "172.30.0.13"}


async def test_a_node_s_part_concerns_the_network_it_is_of_and_its_number_all(world: World) -> None:
    world.numbered(2)
    world.asked.clear()
    parts = {"blue_net": ["103.103.2.0/24"], "other": ["10.0.0.0/24"]}
    world.node(2, **{names.NODE_NUMBER_ANNOTATION: "2", names.NODE_SUBNETS_ANNOTATION: json.dumps(parts)})
    assert world.asked == ["blue_net"]
    more = {**parts, "other": ["10.0.0.0/24", "fd20::/64"]}
    world.node(2, **{names.NODE_NUMBER_ANNOTATION: "2", names.NODE_SUBNETS_ANNOTATION: json.dumps(more)})
    assert world.asked == ["blue_net"]
    world.node(2, **{names.NODE_NUMBER_ANNOTATION: "9", names.NODE_SUBNETS_ANNOTATION: json.dumps(more)})
    assert world.asked == ["blue_net", "blue_net"]


ROUTED = replace(NETWORK, topology=Topology.LAYER3, host_prefixes=(24,))


def routed(world: World) -> None:
    """The network is a Layer3 one."""
    nad = world.stores[NADS].held[NAD]
    world.stores[NADS].put({**nad, "spec": {"config": ROUTED.to_nad_config(NAD)}})


def routed_pod(world: World, node: int, host: int) -> Endpoint:
    item = json.loads(json.dumps(world.stores[PODS].held.get(f"blue/p{host}") or {}))
    if not item:
        world.pod(host, f"n{node}")
        item = json.loads(json.dumps(world.stores[PODS].held[f"blue/p{host}"]))
    address = f"192.168.{node}.{host}"
    entry = {"ip_addresses": [f"{address}/24"], "mac_address": addresses.mac_for(addresses.address(address))}
    item["metadata"]["annotations"][names.POD_NETWORKS_ANNOTATION] = json.dumps({NAD: entry})
    world.stores[PODS].put(item)
    found = world.cluster.endpoint(f"blue/p{host}")
    assert found is not None
    return found


@pytest.mark.parametrize("written", [True, False], ids=["part written", "part only on the pod"])
async def test_a_layer3_network_shows_this_node_s_part_and_routes_to_the_others(world: World, written: bool) -> None:
    routed(world)
    world.numbered(1, *(["192.168.1.0/24"] if written else []))
    world.numbered(2, "192.168.2.0/24")
    await world.attach(routed_pod(world, 1, 5))
    routed_pod(world, 2, 6)
    await world.networks.render(NETWORK.name)
    state = world.kernel.networks[NETWORK.namespace]
    assert addresses.interface("192.168.1.1/24") in state.links[names.BRIDGE].addresses
    assert names.VXLAN_L2 not in state.links
    assert state.routes == {
        addresses.network("192.168.0.0/16"): None,
        addresses.network("192.168.2.0/24"): addresses.address("100.88.0.2"),
    }
    assert set(state.neighbours) & {addresses.address("192.168.2.6")} == set()
    (shown,) = world.networks.rendered()
    assert shown.gateway_for(4) == addresses.address("192.168.1.1")
    # A second pod takes the short way as on any other network.
    looks = world.kernel.looks
    await world.attach(routed_pod(world, 1, 8))
    assert world.kernel.looks == looks
    world.kernel.applied.clear()
    await world.networks.render(NETWORK.name)
    world.kernel.applied.clear()
    await world.networks.render(NETWORK.name)
    assert world.kernel.applied == []


async def test_a_network_stays_while_connections_of_a_machine_that_moved_away_live_here(world: World) -> None:
    world.kernel.established = frozenset({addresses.address("192.168.0.5")})
    persistent = replace(NETWORK, persistent=True)
    held = world.stores[NADS].held["blue/net"]
    world.stores[NADS].put({**held, "spec": {"config": persistent.to_nad_config(NAD)}})
    await world.attach(world.pod(6))
    world.machine(5, "n2")
    world.stores[PODS].drop("blue/p6")
    await world.networks.render(NETWORK.name)
    state = world.kernel.networks[NETWORK.namespace]
    assert not state.ports()
    assert addresses.address("192.168.0.5") in state.neighbours, "what comes from the outside goes on to the machine"
    world.kernel.established = frozenset({addresses.address("192.168.0.99")})
    await world.networks.render(NETWORK.name)
    assert NETWORK.namespace not in world.kernel.networks


def entry(port: int, mark: int) -> Connection:
    away = Flow(UDP, addresses.address("192.168.0.5"), port, addresses.address("172.30.0.100"), 53)
    return Connection(away, away.reversed(), 6, 100, mark)


async def persistent(world: World) -> Network:
    """The network keeps addresses, and has a pod here."""
    for number in (1, 2, 3):
        world.numbered(number)
    found = replace(NETWORK, persistent=True)
    held = world.stores[NADS].held["blue/net"]
    world.stores[NADS].put({**held, "spec": {"config": found.to_nad_config(NAD)}})
    await world.attach(world.pod(6))
    return found


async def test_connections_find_the_way_to_a_home_that_another_agent_told_of(world: World) -> None:
    network = await persistent(world)
    mark = names.HOME_MARK | 3
    looks = world.kernel.looks
    for _ in range(2):
        await world.networks.reach_homes(network, [mark, names.HOME_MARK | 9])
        assert world.kernel.networks[network.namespace].homes == {mark}
        assert vteps(world) == {"172.30.0.13"}
    assert world.kernel.looks == looks, "a guest may come at any moment"
    assert world.joined == [network.name], "a look at all the rest follows, once"
    await world.networks.render(network.name)
    assert world.kernel.networks[network.namespace].floods == {addresses.address("172.30.0.13")}
    # An agent that starts learns it from the rules that are there.
    world.networks._told_homes.clear()
    await world.networks.render(network.name)
    assert vteps(world) == {"172.30.0.13"}


async def test_connections_end_with_the_node_that_was_their_home(world: World) -> None:
    network = await persistent(world)
    marks = [names.HOME_MARK | 2, names.HOME_MARK | 3]
    await world.networks.reach_homes(network, marks)
    await world.networks.render(network.name)
    entries = [entry(port, mark) for port, mark in enumerate((*marks, 0), 1)]
    await world.kernel.put_connections(network.namespace, entries)
    world.stores[NODES].drop("n3")
    world.node(2)
    await world.networks.render(network.name)
    assert set(world.kernel.conntrack[network.namespace].values()) == set(entries), "whose number is not known yet?"
    world.numbered(2)
    await world.networks.render(network.name)
    assert {item.mark for item in world.kernel.conntrack[network.namespace].values()} == {marks[0], 0}


class Exposed(Members):
    """A node's table that tells the networks which are here: what node ports do."""

    def node_tables(self, rendered: object) -> tuple[Table, ...]:
        assert isinstance(rendered, dict)
        return (Table("inet", "vmnet-exposed", {"names": Elements("type mark;", frozenset(rendered))}),)


def left_overs() -> Counter[str]:
    """What was found and taken away so far, by kind."""
    found = (sample for metric in metrics.LEFT_OVERS.collect() for sample in metric.samples)
    return Counter({item.labels["kind"]: int(item.value) for item in found if item.name.endswith("_total")})


async def test_entries_that_nobody_needs_any_more_are_counted_when_an_agent_comes_back(world: World) -> None:
    await world.attach(world.pod(5))
    state = world.kernel.networks[NETWORK.namespace]
    stray = addresses.address("192.168.9.9")
    mac = MacAddress("0a:58:c0:a8:09:09")
    world.kernel.networks[NETWORK.namespace] = replace(state, neighbours={**state.neighbours, stray: mac})
    counted = left_overs()
    await Networks(world.kernel, world.cluster, "n1", (), lambda endpoint: None).adopt()
    assert stray not in world.kernel.networks[NETWORK.namespace].neighbours
    assert left_overs()["neighbour"] == counted["neighbour"] + 1


async def test_an_agent_that_starts_leaves_the_node_s_tables_alone_until_it_knows_its_networks(world: World) -> None:
    source = (Exposed(),)
    first = Networks(world.kernel, world.cluster, "n1", (), lambda endpoint: None, source)
    world.networks = first
    await world.attach(world.pod(5))
    before = world.kernel.node.tables
    assert set(before) == {"inet vmnet-exposed"}
    world.kernel.applied.clear()
    counted = left_overs()
    second = Networks(world.kernel, world.cluster, "n1", (), lambda endpoint: None, source)
    await second.adopt()
    assert world.kernel.node.tables == before
    assert left_overs() == counted, "an agent that comes back finds nothing that is too much"
    assert not any(isinstance(op, ops.LoadFirewall) and op.namespace is None for op in world.kernel.applied)
    # One that comes when its only network is gone takes them away at the end.
    world.stores[PODS].drop("blue/p5")
    world.stores[NADS].drop(NAD)
    await Networks(world.kernel, world.cluster, "n1", (), lambda endpoint: None, source).adopt()
    assert world.kernel.node.tables != before
    assert left_overs()["network"] == counted["network"] + 1


# Networks without a router

FLAT = Network("red_flat", NetworkId(21), role=Role.SECONDARY, subnets=(addresses.network("10.30.0.0/24"),))
LAN = replace(FLAT, name="red_lan", id=NetworkId(22), topology=Topology.LOCALNET, physical="physnet")


class Strict:
    """A source of tables that no secondary network may be asked for."""

    def network_tables(self, desired: NodeNetwork) -> tuple[Table, ...]:
        raise AssertionError(f"asked for {desired.network.name}")

    def node_tables(self, rendered: Any) -> tuple[Table, ...]:
        return ()

    def demands(self, network: str) -> bool:
        raise AssertionError(f"asked for {network}")


async def joined(
    api: Any, kernel: FakeKernel, networks: Networks, network: Network, machine: str | None = None
) -> Endpoint:
    api.node("n1", "172.30.0.11")
    api.node("n2", "172.30.0.12")
    nad = network.name.replace("_", "/")
    api.nad(nad, network)
    asked = {nad.replace("/", "__"): "10.30.0.5/24"}
    api.pod("red/a", asks=nad, machine=machine, **asked)
    endpoint = api.cluster.endpoint("red/a", nad)
    assert endpoint is not None
    kernel.make_pod("/run/netns/a")
    await networks.attach(network, endpoint, PortState.ACTIVE, PodInterface("/run/netns/a", "c1"))
    return cast(Endpoint, endpoint)


async def test_a_secondary_network_has_no_tables_of_services_and_policies(api: Any) -> None:
    kernel = FakeKernel()
    networks = Networks(kernel, api.cluster, "n1", (), lambda endpoint: None, (Strict(),))
    await joined(api, kernel, networks, FLAT)
    await networks.render(FLAT.name)
    assert names.UPLINK not in kernel.networks[FLAT.namespace].links
    api.stores[PODS].drop("red/a")
    await networks.render(FLAT.name)
    assert FLAT.namespace not in kernel.networks


async def test_a_machine_that_came_to_a_secondary_network_has_no_home_elsewhere(api: Any) -> None:
    kernel = FakeKernel()
    networks = Networks(kernel, api.cluster, "n1", (), lambda endpoint: None)
    state = {"sourcePod": "gone", "sourceNode": "n2", "targetPod": "a", "targetNode": "n1", "completed": True}
    metadata = {"namespace": "red", "name": "vm"}
    api.stores[VMIS].put({"metadata": metadata, "status": {"nodeName": "n1", "migrationState": state}})
    await joined(api, kernel, networks, replace(FLAT, persistent=True), machine="vm")
    await networks.render(FLAT.name)
    assert not any(isinstance(op, ops.SetHomeRoute) for op in kernel.applied)


@pytest.mark.parametrize(
    ("localnets", "bridges", "vlan", "why"),
    [
        ({}, {"phys0": BridgeState(1500)}, None, "agent option --localnet physnet=BRIDGE"),
        ({"physnet": "phys0"}, {}, None, "no bridge phys0"),
        ({"physnet": "phys0"}, {"phys0": BridgeState(1500)}, 100, "does not filter VLANs and cannot carry VLAN 100"),
    ],
)
async def test_a_localnet_network_that_the_node_cannot_carry_is_refused(
    api: Any, localnets: dict[str, str], bridges: dict[str, BridgeState], vlan: int | None, why: str
) -> None:
    kernel = FakeKernel()
    kernel.node = replace(kernel.node, bridges={InterfaceName(name): found for name, found in bridges.items()})
    networks = Networks(kernel, api.cluster, "n1", (), lambda endpoint: None, localnets=localnets)
    with pytest.raises(NotReady, match=why):
        await joined(api, kernel, networks, replace(LAN, vlan=vlan))
    assert LAN.namespace not in kernel.networks
    # What was prepared for it on the node goes when it goes, though it never was here.
    assert str(LAN.id) in kernel.node.sets["vnis"]
    for kind in (PODS, NADS):
        for key in list(api.stores[kind].held):
            api.stores[kind].drop(key)
    await networks.render(LAN.name)
    assert not kernel.node.sets["vnis"]


async def test_a_localnet_network_is_in_the_node_s_bridge_and_goes_without_it(api: Any) -> None:
    kernel, bridge = FakeKernel(), InterfaceName("phys0")
    kernel.node = replace(kernel.node, bridges={bridge: BridgeState(9000, filters_vlans=True)})
    networks = Networks(kernel, api.cluster, "n1", (), lambda endpoint: None, localnets={"physnet": "phys0"})
    endpoint = await joined(api, kernel, networks, replace(LAN, vlan=100))
    (made,) = (op for op in kernel.applied if isinstance(op, ops.CreateLocalnet))
    assert (made.bridge, made.mtu, made.vlan) == (bridge, 9000, 100)
    assert networks.mtu(LAN) == 9000
    # A machine that moves on is the bridges' business: no VTEP is behind the veth.
    kernel.applied.clear()
    await networks.close_moved(LAN, endpoint)
    assert [type(op) for op in kernel.applied] == [ops.LoadFirewall]
    # The administrator took the mapping away: the last pod's network goes all the same.
    kernel.node = replace(kernel.node, bridges={})
    api.stores[PODS].drop("red/a")
    await networks.render(LAN.name)
    assert LAN.namespace not in kernel.networks
