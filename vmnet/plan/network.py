"""One network on one node: from desired and observed state to operations."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv6Interface, ip_interface
from types import MappingProxyType
from typing import Final

from vmnet.model import names
from vmnet.model.addresses import IPAddress, IPInterface, IPNetwork
from vmnet.model.endpoint import Endpoint, LocalPort, Node, NodeNetwork, PortState, RemoteEndpoint
from vmnet.model.names import InterfaceName, MacAddress, NamespaceName, NetworkId
from vmnet.model.network import GATEWAY_LINK_LOCAL, Network, Role
from vmnet.plan import edge, firewall, ops
from vmnet.plan.ops import Op
from vmnet.plan.state import LinkState, NetworkState
from vmnet.plan.table import Marks, Table
from vmnet.plan.table import removal as table_removal

# New namespaces inherit surprises: every sysctl that matters is set (docs/architecture.md, "Datapath").
SYSCTLS: Final = (
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/bridge/bridge-nf-call-iptables", "0"),
    ("net/bridge/bridge-nf-call-ip6tables", "0"),
    ("net/bridge/bridge-nf-call-arptables", "0"),
)
CONNTRACK_SYSCTLS: Final = (
    # Of a connection that stays with another node's router this one sees only a half, in windows it cannot know.
    ("net/netfilter/nf_conntrack_tcp_be_liberal", "1"),
    # That half looks unanswered: five minutes of silence would otherwise be its end. Seconds.
    ("net/netfilter/nf_conntrack_tcp_timeout_unacknowledged", "86400"),
)
"""They are there once the namespace has a rule that needs conntrack."""

SWITCHED_SYSCTLS: Final = tuple(
    (key, "0" if key in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding") else value) for key, value in SYSCTLS
)
"""Of a network without a router: its namespace holds a switch and nothing else."""


@dataclass(frozen=True, slots=True)
class PodInterface:
    """The pod's side of ADD: its namespace's path, its container, and eth0's addresses with their gateways.

    ``default_addresses`` are given with the primary interface, which takes eth0's default route away.
    """

    netns: str
    container: str
    default_addresses: tuple[tuple[IPInterface, IPAddress | None], ...] = ()


BRIDGED_SYSCTLS: Final = (
    ("net/bridge/bridge-nf-call-iptables", "1"),
    ("net/bridge/bridge-nf-call-ip6tables", "1"),
)
"""Switched on with the first table that must see bridged frames; off again only with the namespace, for translated
connections would break."""

_REMOVALS: Final[Mapping[type[Op], str]] = {
    ops.DeleteLink: "link",
    ops.RemoveAddress: "address",
    ops.RemoveRoute: "route",
    ops.RemoveNeighbour: "neighbour",
    ops.RemoveFdb: "fdb",
    ops.RemoveTunnel: "fdb",
    ops.RemoveFlood: "fdb",
}

Held = Mapping[str, Table]
"""Tables that this process knows the kernel to hold, by identity."""


def plan(
    desired: NodeNetwork, observed: NetworkState | None, tables: Sequence[Table] = (), held: Held = MappingProxyType({})
) -> tuple[Op, ...]:
    """Operations that make the node show ``desired`` and ``tables``; empty when it does.

    The network's links, ports that are missing from the tables, neighbours and FDB. FDB entries of machines that move
    belong to the guests' own frames until the caller says otherwise (``reassert``). Ports come by ``attach``.
    """
    namespace = desired.network.namespace
    state = observed or NetworkState(namespace)
    found: list[Op] = []
    if observed is None:
        found.append(ops.CreateNamespace(namespace))
    if names.BRIDGE not in state.links:
        # The bridge comes after them, so it stands for them: an agent may have died in between.
        found.append(ops.SetSysctls(namespace, SYSCTLS if desired.network.routed else SWITCHED_SYSCTLS))
    found += _links(desired, state)
    if "port_in" not in state.chains:
        found.append(ops.LoadFirewall(namespace, firewall.network_script(desired)))
        found.append(ops.SetSysctls(namespace, CONNTRACK_SYSCTLS))
    found += load_tables(namespace, state.tables, tables, held)
    found += _activate(desired, state)
    wanted = {port.endpoint.port for port in desired.ports}
    for link in state.ports():
        if link.name not in wanted:
            found += detach(namespace, link.name, state)
    found += _ports(desired, state)
    found += _neighbours(desired, state)
    found += _fdb(desired, state)
    found += _floods(desired, state)
    found += _routers(desired, state)
    found += _routes(desired, state)
    found += edge.routes(desired, state)
    return tuple(found)


def displaced(desired: NodeNetwork, observed: NetworkState | None) -> tuple[Op, ...]:
    """Operations that take away tunnels of another UDP port, which cannot be changed, and the table that hangs on them.

    Nothing where the port is right. Look again before ``plan``: it makes all of it anew.
    """
    links = observed.links.values() if observed is not None else ()
    stale = [link.name for link in links if link.kind == "vxlan" and link.port != desired.vxlan_port]
    if not stale:
        return ()
    namespace = desired.network.namespace
    return (
        *(ops.DeleteLink(namespace, name) for name in stale),
        ops.LoadFirewall(namespace, firewall.NETWORK_REMOVAL),
    )


def load_tables(
    namespace: NamespaceName | None, observed: Mapping[str, Marks], tables: Sequence[Table], held: Held
) -> Iterable[Op]:
    """Bring tables in step: nothing where the digest says so, the difference where the kernel's content is known."""
    for table in tables:
        marks = observed.get(table.identity, ())
        if marks[-1:] == (table.digest,):
            continue
        known, there = _known(table, marks, held), table.identity in observed
        if table.bridged and namespace is not None and not (known and known.bridged):
            yield ops.SetSysctls(namespace, BRIDGED_SYSCTLS)
        anew = table.whole() if there else table.fresh()
        yield ops.LoadFirewall(namespace, anew if known is None else table.change(known, marks))
    wanted = {table.identity for table in tables}
    for identity in sorted(observed.keys() - wanted):
        yield ops.LoadFirewall(namespace, table_removal(identity))


def marks_then(observed: Mapping[str, Marks], tables: Iterable[Table], held: Held) -> dict[str, Marks]:
    """What each table carries once the operations of ``load_tables`` are done."""
    found = {}
    for table in tables:
        marks = observed.get(table.identity, ())
        known = table if marks[-1:] == (table.digest,) else _known(table, marks, held)
        found[table.identity] = table.marks(known, marks)
    return found


def removed(found: Iterable[Op]) -> Counter[str]:
    """What operations take away, by kind: how many entries of a table of the kernel's, links, tables, set elements."""
    counts = Counter[str]()
    for op in found:
        if isinstance(op, ops.LoadFirewall):
            lines = op.script.splitlines()
            counts["element"] += sum(line.count(", ") + 1 for line in lines if line.startswith("delete element"))
            counts["table"] += lines[-1].startswith("delete table")
        elif (kind := _REMOVALS.get(type(op))) is not None:
            counts[kind] += 1
    return +counts


def _known(table: Table, marks: Marks, held: Held) -> Table | None:
    """What the kernel holds in a table's place; None unless this process knows it."""
    known = held.get(table.identity)
    return known if known is not None and marks[-1:] == (known.digest,) else None


def attach(
    desired: NodeNetwork,
    port: LocalPort,
    pod: PodInterface,
    observed: NetworkState,
    tables: Iterable[Op] = (),
) -> tuple[Op, ...]:
    """Operations that give a pod its interface on a rendered network; the port comes up last.

    ``tables``: what ``load_tables`` found for it; loaded with the port's own rules, in one transaction.
    """
    endpoint, namespace = port.endpoint, desired.network.namespace
    found: list[Op] = []
    existing = observed.links.get(endpoint.port)
    if existing is not None:
        # A repeated ADD of the same pod: the old veth ended in a namespace that may be gone.
        found += detach(namespace, endpoint.port, observed)
    found += [
        ops.CreatePort(
            namespace,
            endpoint.port,
            names.BRIDGE,
            pod.netns,
            endpoint.interface,
            endpoint.mac,
            desired.mtu,
            port_alias(pod.container, endpoint.interface),
        ),
        *tables,
        ops.LoadFirewall(namespace, firewall.port_script(port)),
        *_not_moved(namespace, port, observed),
        # A pod may be a backend of its own Service: translated, its frame goes back by the port it came from.
        ops.AttachToBridge(namespace, endpoint.port, names.BRIDGE, hairpin=desired.network.joined),
        ops.ConfigurePod(
            pod.netns,
            endpoint.interface,
            names.DEFAULT_INTERFACE,
            endpoint.addresses,
            tuple(
                GATEWAY_LINK_LOCAL if gateway.version == 6 else gateway
                for gateway in _default_gateways(desired.network)
                if any(item.version == gateway.version for item in endpoint.addresses)
            ),
            pod.default_addresses,
            desired.network.pod_routes,
        ),
    ]
    return tuple(found)


def introduce(namespace: NamespaceName, endpoint: Endpoint) -> tuple[Op, ...]:
    """The network's neighbours for an endpoint: the node must never ask for it from the anycast address."""
    return tuple(ops.SetNeighbour(namespace, names.BRIDGE, address, endpoint.mac) for address in endpoint.all_addresses)


def port_alias(container: str, interface: str) -> str:
    """The mark on a port: whose it is. Neither part can hold a slash."""
    return f"{container}/{interface}"


def owner_of(link: LinkState) -> tuple[str, str]:
    """Container and interface that a port belongs to."""
    container, _, interface = link.alias.partition("/")
    return container, interface


def _default_gateways(network: Network) -> tuple[IPAddress, ...]:
    """Where a pod's default routes go: only its primary network holds them."""
    return network.gateways if network.role is Role.PRIMARY else ()


def detach(namespace: NamespaceName, port: InterfaceName, observed: NetworkState) -> tuple[Op, ...]:
    """Operations that remove a port with everything that names it."""
    elements = {
        name: [_element(element) for element in found if element[0] == port]
        for name, found in observed.sets.items()
        if name != "moved"
    }
    elements["local"] = [element[1] for element in observed.sets.get("bind", ()) if element[0] == port]
    return (
        ops.DeleteLink(namespace, port),
        ops.LoadFirewall(namespace, firewall.remove_port_script(port, elements)),
    )


def remove(network_id: NetworkId) -> tuple[Op, ...]:
    """Operations that take a network off the node."""
    namespace = names.network_namespace(network_id)
    return (
        ops.DeleteLink(None, names.join_interface(network_id)),
        # The kernel clears a namespace away in its own time, and not while a socket is open in it; until then the VTEPs
        # would keep their VNIs from the network's next namespace.
        ops.DeleteLink(namespace, names.VXLAN_L2),
        ops.DeleteLink(namespace, names.VXLAN_L3),
        ops.DeleteNamespace(namespace),
    )


def reach(desired: NodeNetwork, homes: Collection[Node]) -> tuple[Op, ...]:
    """The way to nodes where connections that come here have their home; fine where it is there already."""
    namespace = desired.network.namespace
    found: list[Op] = []
    for node in homes:
        found.append(ops.SetTunnel(namespace, names.VXLAN_L3, node.router_mac, node.address))
        found += (ops.SetNeighbour(namespace, names.VXLAN_L3, item.ip, node.router_mac) for item in node.transit)
    return (*found, *edge.routes(replace(desired, homes=(), former=tuple(homes)), NetworkState(namespace)))


def repoint_local(namespace: NamespaceName, endpoint: Endpoint) -> tuple[Op, ...]:
    """Write down that the machine is behind its local port."""
    return (ops.SetFdb(namespace, endpoint.port, endpoint.mac),)


def repoint_remote(namespace: NamespaceName, remote: RemoteEndpoint) -> tuple[Op, ...]:
    """Write down that the machine is behind another node's VTEP."""
    return (ops.SetFdb(namespace, names.VXLAN_L2, remote.endpoint.mac, remote.vtep),)


def _not_moved(namespace: NamespaceName, port: LocalPort, observed: NetworkState) -> tuple[Op, ...]:
    """A machine that starts here has not moved away, whatever its last migration left in the set."""
    if port.state is PortState.ACTIVE and port.endpoint.mac in observed.moved:
        return (ops.LoadFirewall(namespace, firewall.not_moved_script(port.endpoint.mac)),)
    return ()


def _links(desired: NodeNetwork, state: NetworkState) -> Iterable[Op]:
    namespace, network = desired.network.namespace, desired.network
    if names.BRIDGE not in state.links:
        yield ops.CreateBridge(namespace, names.BRIDGE, network.gateway_mac, desired.mtu)
    if desired.bridge is not None and names.VXLAN_L2 not in state.links:
        mine, bridge_mtu = names.localnet_interface(network.id), desired.bridge_mtu or desired.mtu
        yield ops.CreateLocalnet(namespace, mine, names.VXLAN_L2, desired.bridge, bridge_mtu, network.vlan)
    elif network.stretched and network.overlaid and names.VXLAN_L2 not in state.links:
        local, port = desired.node.address, desired.vxlan_port
        yield ops.CreateVxlan(namespace, names.VXLAN_L2, network.l2_vni, local, desired.mtu, port=port)
    if _has_transit(desired) and names.VXLAN_L3 not in state.links:
        local, mac, port = desired.node.address, desired.node.router_mac, desired.vxlan_port
        yield ops.CreateVxlan(
            namespace, names.VXLAN_L3, network.l3_vni, local, desired.mtu, mac, learning=False, port=port
        )
    if network.joined and names.UPLINK not in state.links:
        yield ops.CreateJoin(namespace, names.join_interface(network.id), names.UPLINK, desired.mtu)
    if network.routed:
        yield from _gateway_addresses(desired, state)
    if network.joined:
        yield from _join_addresses(desired, state)


def _gateway_addresses(desired: NodeNetwork, state: NetworkState) -> Iterable[Op]:
    namespace, network = desired.network.namespace, desired.network
    bridge = state.links.get(names.BRIDGE)
    have = bridge.addresses if bridge else frozenset()
    gateways = [
        _with_prefix(gateway, subnet.prefixlen)
        for subnet, gateway in zip(network.segments, network.gateways, strict=True)
    ]
    if not network.stretched:
        for address in sorted(have - set(gateways), key=str):
            if not address.ip.is_link_local:
                yield ops.RemoveAddress(namespace, names.BRIDGE, address)
    for address in gateways:
        if address not in have:
            yield ops.AddAddress(namespace, names.BRIDGE, address)
    router = IPv6Interface(f"{GATEWAY_LINK_LOCAL}/64")
    if router not in have:
        yield ops.AddAddress(namespace, names.BRIDGE, router)


def _join_addresses(desired: NodeNetwork, state: NetworkState) -> Iterable[Op]:
    namespace, node_end = desired.network.namespace, names.join_interface(desired.network.id)
    uplink = state.links.get(names.UPLINK)
    joined = uplink.addresses if uplink else frozenset()
    for inside, outside in (
        (desired.join.network_ipv4, desired.join.node_ipv4),
        (desired.join.network_ipv6, desired.join.node_ipv6),
    ):
        if inside not in joined:
            if inside.version == 6:
                # Without one the node cannot ask for its neighbour on behalf of what it forwards (RFC 4861, 7.2.2).
                yield ops.AddAddress(None, node_end, IPv6Interface("fe80::1/64"))
            # The inner address is the one that is looked at, so it is written last.
            yield ops.AddAddress(None, node_end, outside)
            yield ops.AddAddress(namespace, names.UPLINK, inside)


def _activate(desired: NodeNetwork, state: NetworkState) -> Iterable[Op]:
    """Bring devices up, after the tables that check what they carry."""
    namespace = desired.network.namespace
    if not _up(state, names.BRIDGE):
        yield ops.SetUp(namespace, names.BRIDGE)
    vxlan = state.links.get(names.VXLAN_L2)
    if desired.network.stretched and (vxlan is None or not vxlan.up or vxlan.master != names.BRIDGE):
        yield ops.AttachToBridge(namespace, names.VXLAN_L2, names.BRIDGE, neigh_suppress=desired.network.overlaid)
    if _has_transit(desired) and not _up(state, names.VXLAN_L3):
        yield ops.SetUp(namespace, names.VXLAN_L3)
    if not desired.network.joined:
        return
    if not _up(state, names.UPLINK):
        yield ops.SetUp(None, names.join_interface(desired.network.id))
        yield ops.SetUp(namespace, names.UPLINK)
    for version, gateway in ((4, desired.join.node_ipv4.ip), (6, desired.join.node_ipv6.ip)):
        if version not in state.default_routes:
            yield ops.AddDefaultRoute(namespace, names.UPLINK, gateway)


def _ports(desired: NodeNetwork, state: NetworkState) -> Iterable[Op]:
    """Ports that exist but lost their chains (a crash between two writes of ADD), or their bridge."""
    for port in desired.ports:
        name, link = port.endpoint.port, state.links.get(port.endpoint.port)
        if link is None:
            continue
        if not set(firewall.chains_of(name)) <= state.chains:
            yield ops.LoadFirewall(desired.network.namespace, firewall.port_script(port))
        if not link.up or link.master != names.BRIDGE:
            yield ops.AttachToBridge(desired.network.namespace, name, names.BRIDGE, hairpin=desired.network.joined)


def _neighbours(desired: NodeNetwork, state: NetworkState) -> Iterable[Op]:
    wanted = {
        address: endpoint.mac
        for endpoint in (
            *(remote.endpoint for remote in _neighbouring(desired)),
            *(port.endpoint for port in desired.ports),
        )
        for address in endpoint.all_addresses
    }
    for address, mac in wanted.items():
        if state.neighbours.get(address) != mac:
            yield ops.SetNeighbour(desired.network.namespace, names.BRIDGE, address, mac)
    for address in state.neighbours:
        if address not in wanted:
            yield ops.RemoveNeighbour(desired.network.namespace, names.BRIDGE, address)


def _fdb(desired: NodeNetwork, state: NetworkState) -> Iterable[Op]:
    namespace = desired.network.namespace
    local = {port.endpoint.mac for port in desired.ports}
    known: dict[MacAddress, set[object]] = {}
    for entry in state.fdb:
        if entry.asserted:
            known.setdefault(entry.mac, set()).add(entry.vtep)
    present = {entry.mac for entry in state.fdb if entry.vtep is not None}
    wanted = set(local)
    for port in desired.ports:
        name, mac = port.endpoint.port, port.endpoint.mac
        opened = name not in state.standby or name in state.open
        asserted = any(entry.asserted and entry.interface == name and entry.mac == mac for entry in state.fdb)
        if name in state.links and opened and mac not in state.moved and not asserted:
            yield ops.SetFdb(namespace, name, mac)
    for remote in _neighbouring(desired):
        mac = remote.endpoint.mac
        wanted.add(mac)
        if mac in present and (mac in local or not remote.settled):
            continue  # a migrating machine: its own frame moves the entry, and the API may be behind
        if remote.vtep not in known.get(mac, ()):
            yield ops.SetFdb(namespace, names.VXLAN_L2, mac, remote.vtep)
    for entry in state.fdb:
        if entry.vtep is not None and entry.mac not in wanted and entry.asserted:
            yield ops.RemoveFdb(namespace, names.VXLAN_L2, entry.mac, entry.vtep)


def _floods(desired: NodeNetwork, state: NetworkState) -> Iterable[Op]:
    if not desired.network.stretched:
        return
    namespace = desired.network.namespace
    for vtep in desired.peers:
        if vtep not in state.floods:
            yield ops.AddFlood(namespace, names.VXLAN_L2, vtep)
    for vtep in state.floods:
        if vtep not in desired.peers:
            yield ops.RemoveFlood(namespace, names.VXLAN_L2, vtep)


def _neighbouring(desired: NodeNetwork) -> tuple[RemoteEndpoint, ...]:
    """Endpoints of other nodes that are on this node's segment."""
    return desired.remotes if desired.network.stretched else ()


def _has_transit(desired: NodeNetwork) -> bool:
    """Whether the network's router of this node meets the other ones: once the node has its number."""
    return desired.network.routed and bool(desired.node.transit)


def _former_transit(desired: NodeNetwork, state: NetworkState) -> frozenset[IPInterface]:
    """Transit addresses of a number that this node had. Routes and neighbours go with them."""
    link = state.links.get(names.VXLAN_L3)
    return link.addresses - set(desired.node.transit) if link else frozenset()


def _routers(desired: NodeNetwork, state: NetworkState) -> Iterable[Op]:
    """``rt0``: the transit addresses of this router, and the way to the others. Nothing is asked or learned there."""
    if not _has_transit(desired):
        return
    namespace = desired.network.namespace
    link = state.links.get(names.VXLAN_L3)
    have = link.addresses if link else frozenset()
    stale = _former_transit(desired, state)
    # First, for the kernel takes the other addresses of the subnet along with its first, and the neighbours with both.
    for address in sorted(stale, key=str):
        yield ops.RemoveAddress(namespace, names.VXLAN_L3, address)
    for address in desired.node.transit:
        if address not in have or stale:
            yield ops.AddAddress(namespace, names.VXLAN_L3, address)
    neighbours = {item.ip: router.router_mac for router in desired.routers for item in router.transit}
    tunnels = {router.router_mac: router.address for router in desired.routers if router.transit}
    for mac, vtep in tunnels.items():
        if state.tunnels.get(mac) != vtep:
            yield ops.SetTunnel(namespace, names.VXLAN_L3, mac, vtep)
    for next_hop, mac in neighbours.items():
        if state.routers.get(next_hop) != mac or stale:
            yield ops.SetNeighbour(namespace, names.VXLAN_L3, next_hop, mac)
    for next_hop in state.routers:
        if next_hop not in neighbours:
            yield ops.RemoveNeighbour(namespace, names.VXLAN_L3, next_hop)
    for mac, vtep in state.tunnels.items():
        if mac not in tunnels:
            yield ops.RemoveTunnel(namespace, names.VXLAN_L3, mac, vtep)


def _routes(desired: NodeNetwork, state: NetworkState) -> Iterable[Op]:
    """Each node's part of a Layer3 network by way of its router. What is nobody's part does not leave the network."""
    network = desired.network
    wanted: dict[IPNetwork, IPAddress | None] = {}
    if not network.stretched:
        wanted = {subnet: None for subnet in network.subnets if subnet not in network.segments}
    if _has_transit(desired):
        for router in desired.routers:
            hops = {item.version: item.ip for item in router.transit}
            parts = dict(router.subnets).get(network.name, ()) if not network.stretched else ()
            wanted |= {part: hops[part.version] for part in parts if hops and part not in network.segments}
    for destination, gateway in state.routes.items():
        if destination not in wanted:
            yield ops.RemoveRoute(network.namespace, names.VXLAN_L3, destination, gateway)
    for destination, gateway in wanted.items():
        lost = gateway is not None and _former_transit(desired, state)
        if destination not in state.routes or state.routes[destination] != gateway or lost:
            yield ops.SetRoute(network.namespace, names.VXLAN_L3, destination, gateway)


def _up(state: NetworkState, name: InterfaceName) -> bool:
    link: LinkState | None = state.links.get(name)
    return link is not None and link.up


def _element(parts: tuple[str, ...]) -> str:
    return " . ".join([f'"{parts[0]}"', *parts[1:]])


def _with_prefix(address: IPAddress, length: int) -> IPInterface:
    return ip_interface(f"{address}/{length}")
