"""What every kernel must do. The fake runs it in the test's own process, the real one in a program (``__main__``)."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

from vmnet.kernel.api import Gone, Kernel
from vmnet.kernel.linux import LinuxKernel
from vmnet.model import names
from vmnet.model.addresses import IPNetwork, mac_for
from vmnet.model.connection import (
    ASSURED,
    ESTABLISHED,
    SEEN_REPLY,
    TCP,
    UDP,
    Connection,
    Flow,
    Outcome,
    TcpState,
)
from vmnet.model.endpoint import (
    Endpoint,
    Home,
    LocalPort,
    MachineReference,
    Node,
    NodeNetwork,
    PodReference,
    PortState,
    RemoteEndpoint,
)
from vmnet.model.names import InterfaceName, NamespaceName, NetworkId
from vmnet.model.network import Network, Role, Topology
from vmnet.plan import edge, firewall, ops
from vmnet.plan import network as planner
from vmnet.plan import node as node_planner
from vmnet.plan.network import PodInterface
from vmnet.plan.state import NetworkState
from vmnet.plan.table import Chain, Elements, Marks, Table

NETWORK = Network(name="n", id=NetworkId(7), subnets=(ip_network("192.168.0.0/16"), ip_network("fd20::/64")))
HERE, THERE = Node("n1", ip_address("127.0.0.1"), 1), Node("n2", ip_address("172.30.0.12"), 2)
FURTHER = Node("n3", ip_address("172.30.0.13"), 3)
POD = "/run/netns/pod"


def endpoint(host: int, node: str) -> Endpoint:
    addresses = (ip_interface(f"192.168.0.{host}/16"), ip_interface(f"fd20::{host}/64"))
    machine = MachineReference("ns", f"vm{host}")
    reference = PodReference("ns", f"p{host}", f"uid-{host}-{node}")
    return Endpoint(reference, "n", node, mac_for(addresses[0].ip), addresses, machine=machine)


BACKENDS = Table(
    "inet",
    "vmnet-test",
    {
        "services": Elements("type ipv4_addr . inet_service : verdict;", {"10.96.0.7 . 80": "goto one"}),
        "peers": Elements("type ipv4_addr; flags interval;", frozenset({"10.0.0.0/8", "192.168.7.0/24"})),
        "sticky": Elements("type ipv4_addr; flags dynamic,timeout; timeout 30s; size 100;", None),
    },
    {
        "one": Chain(("meta l4proto tcp dnat ip to 192.168.0.11:8080",)),
        "before": Chain(
            ("ip saddr @peers counter", "ip daddr . tcp dport vmap @services"),
            "type nat hook prerouting priority dstnat;",
        ),
    },
    bridged=True,
)


def _next() -> Table:
    """The same with one service changed, one added, a chain that goes and one that comes."""
    services = Elements(BACKENDS.sets["services"].header, {"10.96.0.7 . 80": "goto two", "10.96.0.8 . 80": "goto two"})
    peers = Elements(BACKENDS.sets["peers"].header, frozenset({"10.0.0.0/8", "172.16.0.0/12"}))
    two = Chain(("meta l4proto tcp dnat ip to 192.168.0.12:8080",))
    rest = {"sticky": BACKENDS.sets["sticky"], "others": Elements("type ipv6_addr;", frozenset({"fd20::7"}))}
    return replace(
        BACKENDS,
        sets={"services": services, "peers": peers, **rest},
        chains={"two": two, "before": replace(BACKENDS.chains["before"], rules=BACKENDS.chains["before"].rules[1:])},
    )


async def _tables(make: Callable[[], Kernel], place: NamespaceName | None) -> None:
    """Made, changed, adopted, replaced by who does not know what is there, and removed."""
    kernel = make()

    async def marks() -> dict[str, Marks]:
        state = await kernel.observe_network(place) if place is not None else await kernel.observe_node()
        assert state is not None
        return dict(state.tables)

    async def bring(tables: tuple[Table, ...], held: tuple[Table, ...]) -> int:
        known = {table.identity: table for table in held}
        before = await marks()
        found = tuple(planner.load_tables(place, before, tables, known))
        await kernel.apply(found)
        assert await marks() == planner.marks_then(before, tables, known)
        return len(found)

    later = _next()
    assert await bring((BACKENDS,), ())
    assert await bring((BACKENDS,), ()) == 0
    assert await bring((later,), (BACKENDS,)) == 1
    assert await bring((BACKENDS,), (later,)) == 1
    assert await bring((later,), ())
    # What only adds leaves the former digest where it is; one that comes back is the last again.
    more = replace(later, sets={**later.sets, "more": Elements("type ipv4_addr;", frozenset({"10.0.0.9"}))})
    most = replace(more, sets={**more.sets, "more": Elements("type ipv4_addr;", frozenset({"10.0.0.9", "10.0.0.10"}))})
    assert await bring((more,), (later,)) == 1
    assert await bring((most,), (more,)) == 1
    assert (await marks())[later.identity] == (later.digest, more.digest, most.digest)
    assert await bring((most,), ()) == 0
    assert await bring((more,), (most,)) == 1
    assert (await marks())[later.identity] == (more.digest,)
    assert await bring((later,), (more,)) == 1
    other_type = replace(later, sets={**later.sets, "others": Elements("type ipv4_addr;", frozenset({"10.0.0.1"}))})
    assert await bring((other_type,), (later,)) == 1
    assert await bring((), (other_type,)) == 1
    assert await bring((), ()) == 0


async def _routers(kernel: Kernel, desired: NodeNetwork) -> None:
    """Routers come, change place and number, and go; so do this node's own number and routes by way of them."""
    namespace = desired.network.namespace

    async def bring(wanted: NodeNetwork) -> NetworkState:
        await kernel.apply(planner.plan(wanted, await kernel.observe_network(namespace)))
        found = await kernel.observe_network(namespace)
        assert found is not None
        assert planner.plan(wanted, found) == ()
        assert found.tunnels == {router.router_mac: router.address for router in wanted.routers}
        assert found.routers == {item.ip: router.router_mac for router in wanted.routers for item in router.transit}
        assert found.links[names.VXLAN_L3].addresses == set(wanted.node.transit)
        return found

    elsewhere = replace(THERE, address=FURTHER.address, number=9)
    for node, routers in ((HERE, (THERE, FURTHER)), (HERE, (elsewhere,)), (replace(HERE, number=7), ()), (HERE, ())):
        await bring(replace(desired, node=node, routers=routers))
    await bring(desired)
    state = await kernel.observe_network(namespace)
    assert state is not None
    refused = ops.SetRoute(namespace, names.VXLAN_L3, ip_network("10.1.0.0/16"), None)
    await kernel.apply((refused,))
    await kernel.apply((refused,))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert state.routes == {refused.destination: None}
    for _ in range(2):
        await kernel.apply((ops.RemoveRoute(namespace, names.VXLAN_L3, refused.destination, None),))
    parts = (ip_network("10.1.2.0/24"), ip_network("10.1.3.4/32"), ip_network("fd20:0:0:7::/64"))
    routes = {part: THERE.transit[0 if part.version == 4 else 1].ip for part in parts}
    await kernel.apply([ops.SetRoute(namespace, names.VXLAN_L3, part, hop) for part, hop in routes.items()])
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert state.routes == routes
    for part, hop in list(routes.items()):
        routes[part] = ip_address(int(hop) + 40) if part.version == 4 else hop
    await kernel.apply([ops.SetRoute(namespace, names.VXLAN_L3, part, hop) for part, hop in routes.items()])
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert state.routes == routes
    for _ in range(2):
        await kernel.apply([ops.RemoveRoute(namespace, names.VXLAN_L3, part, hop) for part, hop in routes.items()])
        state = await kernel.observe_network(namespace)
        assert state is not None
        assert state.routes == {}
        assert state.default_routes == {4, 6}
    await bring(desired)


async def _connections(kernel: Kernel, namespace: NamespaceName) -> None:
    """What is written can be read, gives way to what translates, and is forgotten."""
    own = ip_address("192.168.0.11")
    asked = Flow(TCP, own, 1000, ip_address("10.96.0.7"), 80)
    answered = Flow(TCP, ip_address("192.168.0.12"), 8080, own, 1000)
    served = Connection(asked, answered, SEEN_REPLY | ASSURED, 100, tcp=TcpState(ESTABLISHED))
    plain = Connection(answered.reversed(), answered, SEEN_REPLY | ASSURED, 100, tcp=TcpState(ESTABLISHED))
    away = Flow(UDP, own, 1000, ip_address("172.30.0.100"), 53)
    marked = Connection(away, away.reversed(), SEEN_REPLY | ASSURED, 100, mark=edge.mark(3))

    async def known() -> set[tuple[Flow, Flow, int]]:
        return {(item.original, item.reply, item.mark) for item in await kernel.connections_of(namespace, [own])}

    assert await kernel.put_connections(namespace, [plain, marked]) == (Outcome.PLACED, Outcome.PLACED)
    assert await kernel.put_connections(namespace, [served, served]) == (Outcome.PLACED, Outcome.PLACED)
    assert await known() == {(asked, answered, 0), (away, away.reversed(), edge.mark(3))}
    assert await kernel.put_connections(namespace, [plain]) == (Outcome.KNOWN,)
    assert await kernel.connections_of(namespace, [ip_address("192.168.0.13")]) == ()
    await kernel.forget_marked(namespace, edge.mark(3))
    assert await known() == {(asked, answered, 0)}
    assert await kernel.forget_connections(namespace, [answered, away]) == 1
    assert await known() == set()


async def _layer3(kernel: Kernel) -> None:
    """A segment on each node and routes between them; the routers' numbers and parts change."""
    network = Network(
        name="routed",
        id=NetworkId(9),
        topology=Topology.LAYER3,
        subnets=(ip_network("103.103.0.0/16"), ip_network("fd20:1::/48")),
        host_prefixes=(24, 64),
    )

    def parts(number: int) -> tuple[IPNetwork, ...]:
        return ip_network(f"103.103.{number}.0/24"), ip_network(f"fd20:1:0:{number}::/64")

    def having(node: Node, number: int) -> Node:
        return replace(node, subnets=(("routed", parts(number)),))

    join = node_planner.allocate_join(await kernel.observe_node(), network.id)
    desired = NodeNetwork(network=network.at(parts(1)), node=HERE, mtu=1450, join=join)
    states = (
        desired,
        replace(desired, routers=(having(THERE, 2), having(FURTHER, 3))),
        replace(desired, routers=(having(THERE, 4),)),
        replace(desired, node=replace(HERE, number=8), routers=(having(THERE, 4),)),
        replace(desired, network=network.at(parts(7)), routers=(having(THERE, 4), having(FURTHER, 1))),
        replace(desired, network=network),
    )
    for wanted in states:
        await kernel.apply(planner.plan(wanted, await kernel.observe_network(network.namespace)))
        state = await kernel.observe_network(network.namespace)
        assert planner.plan(wanted, state) == ()
        assert state is not None
        assert names.VXLAN_L2 not in state.links
        assert state.routes == dict.fromkeys(network.subnets) | {
            part: hop.ip
            for router in wanted.routers
            for (_, held) in router.subnets
            for part in held
            for hop in router.transit
            if hop.version == part.version
        }
    await kernel.apply(planner.remove(network.id))
    assert await kernel.observe_network(network.namespace) is None


async def _switched(kernel: Kernel, make_pod: Callable[[str], None]) -> None:
    """A secondary network has no router; one without IPAM binds MACs alone; a Localnet one is in the node's bridge."""
    flat = Network(name="flat", id=NetworkId(21), role=Role.SECONDARY, subnets=NETWORK.subnets)
    bare = Network(name="bare", id=NetworkId(22), role=Role.SECONDARY)
    local = Network(name="local", id=NetworkId(23), topology=Topology.LOCALNET, role=Role.SECONDARY, physical="lan")
    bridge = InterfaceName("lan0")
    own = (await kernel.observe_node()).bridges[bridge]
    assert not own.filters_vlans
    for network in (flat, bare, local):
        plain = NodeNetwork(
            network=network,
            node=HERE,
            mtu=1450,
            join=node_planner.allocate_join(await kernel.observe_node(), network.id),
        )
        if network.overlaid:
            remote = RemoteEndpoint(endpoint(32, "n2"), THERE.address)
            desired = replace(plain, remotes=(remote,), peers=(THERE.address,))
        else:
            desired = replace(plain, bridge=bridge, bridge_mtu=own.mtu)
        await kernel.apply(planner.plan(desired, None))
        state = await kernel.observe_network(network.namespace)
        assert state is not None
        assert planner.plan(desired, state) == ()
        assert names.UPLINK not in state.links
        assert state.links[names.VXLAN_L2].kind == ("vxlan" if network.overlaid else "veth")
        assert not state.links[names.BRIDGE].addresses
        assert names.join_interface(network.id) not in (await kernel.observe_node()).joins
        addresses = endpoint(31, "n1").addresses if network.subnets else ()
        net1 = InterfaceName("net1")
        port = LocalPort(replace(endpoint(31, "n1"), addresses=addresses, interface=net1, machine=None))
        pod = f"{POD}-{network.name}"
        make_pod(pod)
        desired = replace(desired, ports=(port,))
        await kernel.apply(planner.attach(desired, port, PodInterface(pod, "container"), state))
        await kernel.apply(planner.plan(desired, await kernel.observe_network(network.namespace)))
        state = await kernel.observe_network(network.namespace)
        assert state is not None
        assert planner.plan(desired, state) == ()
        assert planner.owner_of(state.links[port.endpoint.port]) == ("container", "net1")
        found = await kernel.observe_pod(pod, net1)
        assert found is not None
        assert set(addresses) <= found.addresses
        await kernel.apply(planner.remove(network.id))
        assert network.namespace not in (await kernel.observe_node()).namespaces
    assert (await kernel.observe_node()).bridges[bridge] == own, "its ports took nothing from it"


async def suite(make: Callable[[], Kernel], make_pod: Callable[[str], None]) -> None:
    """Render, attach, adopt, move, detach and remove; every second look has nothing to do."""
    kernel = make()
    namespace = NETWORK.namespace
    assert await kernel.observe_network(namespace) is None
    try:
        await kernel.packet_socket(namespace, names.BRIDGE)
        raise AssertionError("a socket in a namespace that is not there")
    except Gone:
        pass

    # The node, once.
    await kernel.apply(node_planner.plan(await kernel.observe_node()))
    assert node_planner.plan(await kernel.observe_node()) == ()

    # Who may speak for which networks.
    for vteps, networks in (((THERE.address,), {NETWORK.id}), ((), {NETWORK.id, NetworkId(8)}), ((), set())):
        await kernel.apply(node_planner.plan(await kernel.observe_node(), vteps=vteps, networks=networks))
        state_of_node = await kernel.observe_node()
        assert node_planner.plan(state_of_node, vteps=vteps, networks=networks) == ()
        assert state_of_node.sets["vteps4"] == {str(address) for address in vteps}

    # A network with a remote endpoint.
    desired = NodeNetwork(
        network=NETWORK,
        node=HERE,
        mtu=1450,
        join=node_planner.allocate_join(await kernel.observe_node(), NETWORK.id),
        remotes=(RemoteEndpoint(endpoint(12, "n2"), THERE.address),),
        peers=(THERE.address,),
        routers=(THERE,),
    )
    await kernel.apply(planner.plan(desired, None))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert planner.plan(desired, state) == ()
    assert namespace in (await kernel.observe_node()).namespaces
    assert node_planner.allocate_join(await kernel.observe_node(), NETWORK.id) == desired.join

    # The routers of the other nodes.
    assert state.links[names.VXLAN_L3].mac == HERE.router_mac
    assert state.links[names.VXLAN_L3].master is None
    assert set(HERE.transit) <= state.links[names.VXLAN_L3].addresses
    await _routers(kernel, desired)
    assert await kernel.connections(namespace) == frozenset()
    assert await kernel.datagrams(namespace) == frozenset()

    # A machine whose connections stay with another node; twice, as after a writer that died in the middle.
    homes = replace(desired, homes=(Home(ip_address("192.168.0.11"), THERE),))
    (route,) = planner.plan(homes, await kernel.observe_network(namespace))
    for _ in range(2):
        await kernel.apply((route,))
        state = await kernel.observe_network(namespace)
        assert state is not None
        assert state.homes == {edge.mark(THERE.number or 0)}
        assert planner.plan(homes, state) == ()
    assert planner.plan(desired, state) == (), "connections may still carry its mark"
    await _connections(kernel, namespace)

    await _layer3(kernel)
    await _switched(kernel, make_pod)

    # Tables of their own, in the network's namespace and in the node's.
    for place in (namespace, None):
        await _tables(make, place)

    # A standby port.
    port = LocalPort(endpoint(11, "n1"), PortState.STANDBY)
    name = port.endpoint.port
    make_pod(POD)
    desired = replace(desired, ports=(port,))
    await kernel.apply(planner.attach(desired, port, PodInterface(POD, "container"), state))
    await kernel.apply(planner.plan(desired, await kernel.observe_network(namespace)))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert state.links[name].master == names.BRIDGE
    assert state.links[name].up
    assert planner.owner_of(state.links[name]) == ("container", names.PRIMARY_INTERFACE)
    assert set(firewall.chains_of(name)) <= state.chains
    assert name in state.standby
    assert name not in state.open
    inside = await kernel.observe_pod(POD, names.PRIMARY_INTERFACE)
    assert inside is not None
    assert inside.mac == port.endpoint.mac
    assert inside.mtu == 1450
    assert set(port.endpoint.addresses) <= inside.addresses
    assert await kernel.observe_pod(POD, InterfaceName("none")) is None
    assert await kernel.observe_pod("/run/netns/none", names.PRIMARY_INTERFACE) is None

    # Somebody else takes over what is there.
    adopted = await make().observe_network(namespace)
    assert planner.plan(desired, adopted) == ()

    # The second key, and a machine that leaves.
    opened = ops.LoadFirewall(namespace, firewall.open_script(name))
    await kernel.apply((opened, *planner.repoint_local(namespace, port.endpoint)))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert name in state.open
    assert {entry.interface for entry in state.fdb if entry.mac == port.endpoint.mac} == {name}
    away = RemoteEndpoint(replace(port.endpoint, node="n2"), THERE.address)
    moved = ops.LoadFirewall(namespace, firewall.moved_script(port.endpoint.mac))
    await kernel.apply((moved, *planner.repoint_remote(namespace, away)))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert state.moved == {port.endpoint.mac}
    assert {entry.vtep for entry in state.fdb if entry.mac == port.endpoint.mac} == {THERE.address}
    back = ops.LoadFirewall(namespace, firewall.not_moved_script(port.endpoint.mac))
    await kernel.apply((back, *planner.repoint_local(namespace, port.endpoint)))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert state.moved == frozenset()
    assert planner.plan(desired, state) == ()

    # Tunnels of another UDP port; a second look finds them right, and a third one the first port again.
    for number in (8472, names.VXLAN_PORT):
        elsewhere = replace(desired, vxlan_port=number)
        assert planner.displaced(elsewhere, None) == ()
        await kernel.apply(planner.displaced(elsewhere, state))
        await kernel.apply(planner.plan(elsewhere, await kernel.observe_network(namespace)))
        state = await kernel.observe_network(namespace)
        assert state is not None
        assert {state.links[tunnel].port for tunnel in (names.VXLAN_L2, names.VXLAN_L3)} == {number}
        assert planner.displaced(elsewhere, state) == planner.plan(elsewhere, state) == ()
        assert set(firewall.chains_of(name)) <= state.chains
        assert name in state.standby
        await kernel.apply(node_planner.plan(await kernel.observe_node(), vxlan_port=number))
        assert node_planner.plan(await kernel.observe_node(), vxlan_port=number) == ()

    # Sockets belong to the namespace.
    opened_socket = await kernel.packet_socket(namespace, names.BRIDGE, udp_ports=(67, 547))
    opened_socket.close()

    # Nothing stays.
    desired = replace(desired, ports=())
    await kernel.apply(planner.plan(desired, state))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert name not in state.links
    assert name not in state.standby | state.open
    assert not set(firewall.chains_of(name)) & state.chains
    await kernel.apply(planner.remove(NETWORK.id))
    assert await kernel.observe_network(namespace) is None
    node = await kernel.observe_node()
    assert namespace not in node.namespaces
    assert not node.joins
    await kernel.close()


# Where this runs in a container, the node's mount namespace.
MOUNTS = Path(sys.argv[1]) if __name__ == "__main__" and sys.argv[1:] else None


def _make_pod(path: str) -> None:
    name = path.rpartition("/")[2]
    enter = ["nsenter", f"--mount={MOUNTS}"] if MOUNTS else []
    subprocess.run([*enter, "ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)


if __name__ == "__main__":
    asyncio.run(suite(lambda: LinuxKernel(MOUNTS), _make_pod))
