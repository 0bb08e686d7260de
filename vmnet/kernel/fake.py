"""A kernel in memory, for tests: what operations do to observed state, without a namespace being made."""

import re
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import Final

from vmnet.kernel.api import Gone, Kernel, KernelError, LastFrame
from vmnet.model import names
from vmnet.model.addresses import IPAddress, IPInterface
from vmnet.model.connection import Connection, Flow, Outcome
from vmnet.model.names import InterfaceName, MacAddress, NamespaceName
from vmnet.plan import firewall, lock, ops
from vmnet.plan.ops import Op
from vmnet.plan.state import (
    Cgroup,
    Datagrams,
    DefaultInterface,
    FdbEntry,
    JoinState,
    LinkState,
    NetworkState,
    NodeState,
    PodState,
)
from vmnet.plan.table import TABLE_PREFIX

_ELEMENT: Final = re.compile(r"^(add|delete) element (?:netdev|inet) vmnet (\w+) \{ (.+) \}$")
_ADD_CHAIN: Final = re.compile(r"^add chain netdev vmnet (\w+) ")
_DELETE_CHAIN: Final = re.compile(r"^delete chain netdev vmnet (\w+)$")
_TABLE_CHAIN: Final = re.compile(r"^\s+chain (\w+) \{$")
_OWN_TABLE: Final = re.compile(r"^(add|create) table (\w+ vmnet-[\w-]+)$")
_REMOVE_TABLE: Final = re.compile(r"^delete table (\w+ vmnet-[\w-]+)$")
_DIGEST: Final = re.compile(r"^(add|delete) chain (\w+ vmnet-[\w-]+) state_([0-9a-f]{12})$")
_TABLE_SET: Final = re.compile(r"^\s+set (\w+) \{")


class FakeLastFrame(LastFrame):
    """Sees what it is told to."""

    def __init__(self, seen: Mapping[MacAddress, float], mac: MacAddress) -> None:
        self._seen, self._mac = seen, mac

    def seen(self) -> float | None:
        """As told."""
        return self._seen.get(self._mac)

    def close(self) -> None:
        """Nothing to give up."""


class FakeKernel(Kernel):
    """One node. ``make_pod`` gives it pod namespaces; ``peers`` holds the far ends of the sockets it handed out."""

    def __init__(self) -> None:
        self.node = NodeState()
        self.networks: dict[NamespaceName, NetworkState] = {}
        self.pods: dict[str, dict[InterfaceName, PodState]] = {}
        self.applied: list[Op] = []
        self.established: frozenset[IPAddress] = frozenset()
        self.translated: dict[NamespaceName | None, set[Datagrams]] = {}
        self.conntrack: dict[NamespaceName, dict[Flow, Connection]] = {}
        self.defaults: dict[str, DefaultInterface] = {}
        """Pods' eth0, by namespace path."""
        self.kubelet_group: Cgroup | None = None
        self.peers: list[tuple[NamespaceName, socket.socket]] = []
        self.frames_seen: dict[MacAddress, float] = {}
        """When each source was last seen, wherever that was."""

    def make_pod(self, netns: str) -> None:
        """A pod namespace, as a container runtime makes it."""
        self.pods[netns] = {}

    async def observe_node(self) -> NodeState:
        """The node's own namespace."""
        return replace(self.node, namespaces=frozenset(self.networks))

    async def observe_network(self, namespace: NamespaceName) -> NetworkState | None:
        """One network."""
        return self.networks.get(namespace)

    async def observe_pod(self, netns: str, interface: InterfaceName) -> PodState | None:
        """One pod interface."""
        return self.pods.get(netns, {}).get(interface)

    async def default_interface(self, netns: str) -> DefaultInterface | None:
        """What the test put there."""
        return self.defaults.get(netns)

    async def find_default_interface(self, address: IPAddress) -> DefaultInterface | None:
        """Among what the test put there."""
        return next((found for found in self.defaults.values() if address in found.addresses), None)

    async def kubelet(self, path: str | None) -> Cgroup | None:
        """What the test put there, by whatever path."""
        return self.kubelet_group

    async def apply(self, ops: Sequence[Op]) -> None:
        """In order."""
        for op in ops:
            self._apply(op)
            self.applied.append(op)

    async def connections(self, namespace: NamespaceName) -> frozenset[IPAddress]:
        """What the test put there."""
        self._network(namespace)
        return self.established

    async def datagrams(self, namespace: NamespaceName | None) -> frozenset[Datagrams]:
        """What the test put there."""
        if namespace is not None:
            self._network(namespace)
        return frozenset(self.translated.get(namespace, ()))

    async def forget_datagrams(self, namespace: NamespaceName | None, entries: Collection[Datagrams]) -> int:
        """Out of what the test put there."""
        if namespace is not None:
            self._network(namespace)
        held = self.translated.get(namespace, set())
        found = held & set(entries)
        held -= found
        return len(found)

    async def connections_of(self, namespace: NamespaceName, addresses: Sequence[IPAddress]) -> tuple[Connection, ...]:
        """Of what was put."""
        self._network(namespace)
        found = self.conntrack.get(namespace, {}).values()
        return tuple(item for item in found if {item.original.source, item.reply.source} & set(addresses))

    async def put_connections(self, namespace: NamespaceName, entries: Sequence[Connection]) -> tuple[Outcome, ...]:
        """Like the kernel: what is there already stays, unless the new entry translates."""
        self._network(namespace)
        held = self.conntrack.setdefault(namespace, {})
        outcomes = []
        for entry in entries:
            there = [item for item in held.values() if {item.original, item.reply} & {entry.original, entry.reply}]
            if there and not entry.translated and (there[0].original, there[0].reply) != (entry.original, entry.reply):
                outcomes.append(Outcome.KNOWN)
                continue
            for item in there:
                del held[item.original]
            held[entry.original] = entry
            outcomes.append(Outcome.PLACED)
        return tuple(outcomes)

    async def forget_connections(self, namespace: NamespaceName, flows: Sequence[Flow]) -> int:
        """Of what was put."""
        held = self.conntrack.get(namespace, {})
        gone = [key for key, item in held.items() if {item.original, item.reply} & set(flows)]
        for key in gone:
            del held[key]
        return len(gone)

    async def forget_marked(self, namespace: NamespaceName, mark: int) -> None:
        """Of what was put."""
        held = self.conntrack.get(namespace, {})
        self.conntrack[namespace] = {key: item for key, item in held.items() if item.mark != mark}

    async def packet_socket(
        self,
        namespace: NamespaceName,
        interface: InterfaceName,
        *,
        protocols: Sequence[int] = (),
        udp_ports: Sequence[int] = (),
    ) -> socket.socket:
        """One end of a pair of datagram sockets."""
        if interface not in self._network(namespace).links:
            raise Gone(f"{interface} of {namespace} is gone")
        return self._pair(namespace)

    async def last_frame(self, namespace: NamespaceName, interface: InterfaceName, mac: MacAddress) -> LastFrame:
        """Sees what ``frames_seen`` says."""
        self._network(namespace)
        return FakeLastFrame(self.frames_seen, mac)

    async def udp_socket(
        self, namespace: NamespaceName, address: IPv4Address | IPv6Address, port: int
    ) -> socket.socket:
        """One end of a pair of datagram sockets."""
        return self._pair(namespace)

    async def tcp_listener(
        self, namespace: NamespaceName, address: IPv4Address | IPv6Address, port: int
    ) -> socket.socket:
        """A listener on the loopback of the machine, on a free port."""
        self._network(namespace)
        found = socket.create_server(("127.0.0.1", 0))
        found.setblocking(False)
        return found

    async def tcp_socket(self, namespace: NamespaceName, family: int) -> socket.socket:
        """An unconnected socket of the machine."""
        self._network(namespace)
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setblocking(False)
        return found

    async def close(self) -> None:
        """Close the far ends."""
        for _, peer in self.peers:
            peer.close()

    def _pair(self, namespace: NamespaceName) -> socket.socket:
        self._network(namespace)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        theirs.setblocking(False)
        self.peers.append((namespace, theirs))
        return ours

    def _network(self, namespace: NamespaceName) -> NetworkState:
        found = self.networks.get(namespace)
        if found is None:
            raise Gone(f"network namespace {namespace} is gone")
        return found

    def _apply(self, op: Op) -> None:
        match op:
            case ops.CreateNamespace(namespace):
                self.networks[namespace] = NetworkState(namespace)
            case ops.DeleteNamespace(namespace):
                self.networks.pop(namespace, None)
            case ops.SetSysctls():
                return
            case ops.LoadFirewall(None, script):
                self._load_node(script)
            case ops.DeleteLink(namespace, _) if namespace is not None and namespace not in self.networks:
                return  # what is to be gone is gone
            case ops.LoadFirewall(namespace, script) if namespace is not None:
                self._load(self._network(namespace), script)
            case ops.ConfigurePod():
                self._configure_pod(op)
            case ops.SetUp(None, _) | ops.DeleteLink(None, _) | ops.AddAddress(None, _, _):
                self._apply_to_node(op)
            case _:
                self._apply_to_network(op)

    def _apply_to_node(self, op: ops.SetUp | ops.DeleteLink | ops.AddAddress) -> None:
        joins = dict(self.node.joins)
        if isinstance(op, ops.DeleteLink):
            joins.pop(op.interface, None)
        elif isinstance(op, ops.AddAddress):
            before = joins[op.interface]
            if isinstance(op.address, IPv4Interface):
                joins[op.interface] = replace(before, ipv4=op.address)
            elif isinstance(op.address, IPv6Interface):
                joins[op.interface] = replace(before, ipv6=op.address)
        self.node = replace(self.node, joins=joins)

    def _apply_to_network(self, op: Op) -> None:
        namespace = getattr(op, "namespace")  # noqa: B009
        state = self._network(namespace)
        links, neighbours, fdb, floods = dict(state.links), dict(state.neighbours), set(state.fdb), set(state.floods)
        routers, tunnels, over_rt0 = dict(state.routers), dict(state.tunnels), dict(state.routes)
        routes, homes = set(state.default_routes), set(state.homes)
        match op:
            case ops.CreateBridge(_, name, mac, mtu):
                links[name] = LinkState(name, mac, mtu, up=False, kind="bridge")
            case ops.CreateVxlan(_, name, _, _, mtu, mac, _, port):
                links[name] = LinkState(name, mac or MacAddress(""), mtu, up=False, kind="vxlan", port=port)
            case ops.CreateLocalnet(_, _, network_end, bridge, mtu, _):
                if bridge not in self.node.bridges:
                    raise Gone(f"device {bridge} is gone", op=op)
                links[network_end] = LinkState(network_end, MacAddress(""), mtu, up=False, kind="veth")
            case ops.CreateJoin(_, node_end, network_end, mtu):
                links[network_end] = LinkState(network_end, MacAddress(""), mtu, up=False, kind="veth")
                joins = {**self.node.joins, node_end: JoinState(node_end, None, None)}
                self.node = replace(self.node, joins=joins)
            case ops.CreatePort(_, port, _, netns, interface, mac, mtu, alias):
                if netns not in self.pods:
                    raise Gone(f"{netns} is gone", op=op)
                links[port] = LinkState(port, MacAddress(""), mtu, up=False, kind="veth", alias=alias)
                self.pods[netns][interface] = PodState(interface, mac, mtu, frozenset())
            case ops.AttachToBridge(_, interface, bridge, _, _):
                links[interface] = replace(self._link(links, interface), master=bridge, up=True)
            case ops.SetUp(_, interface):
                links[interface] = replace(self._link(links, interface), up=True)
            case ops.DeleteLink(_, interface):
                links.pop(interface, None)
                fdb = {entry for entry in fdb if entry.interface != interface}
                if interface == names.VXLAN_L2:
                    floods = set()
                if interface == names.VXLAN_L3:
                    routers, tunnels = {}, {}
                    over_rt0 = {destination: via for destination, via in over_rt0.items() if via is None}
            case ops.AddAddress(_, interface, address):
                link = self._link(links, interface)
                links[interface] = replace(link, addresses=link.addresses | {address})
            case ops.RemoveAddress(_, interface, address):
                if interface in links:
                    link = links[interface]
                    links[interface] = replace(link, addresses=link.addresses - {address})
            case ops.AddDefaultRoute(_, _, gateway):
                routes.add(gateway.version)
            case ops.SetRoute(_, interface, destination, via):
                if via is not None:
                    self._link(links, interface)
                over_rt0[destination] = via
            case ops.RemoveRoute(_, _, destination, via):
                if destination in over_rt0 and over_rt0[destination] == via:
                    del over_rt0[destination]
            case ops.SetHomeRoute(_, interface, mark, _):
                self._link(links, interface)
                homes.add(mark)
            case ops.SetNeighbour(_, interface, address, mac):
                self._link(links, interface)
                (routers if interface == names.VXLAN_L3 else neighbours)[address] = mac
            case ops.RemoveNeighbour(_, interface, address):
                (routers if interface == names.VXLAN_L3 else neighbours).pop(address, None)
            case ops.SetTunnel(_, interface, mac, vtep):
                self._link(links, interface)
                tunnels[mac] = vtep
            case ops.RemoveTunnel(_, _, mac, vtep):
                if tunnels.get(mac) == vtep:
                    del tunnels[mac]
            case ops.SetFdb(_, interface, mac, vtep):
                self._link(links, interface)
                fdb = {entry for entry in fdb if entry.mac != mac}
                fdb.add(FdbEntry(mac, interface, vtep, asserted=True))
            case ops.RemoveFdb(_, _, mac, vtep):
                fdb = {entry for entry in fdb if (entry.mac, entry.vtep) != (mac, vtep)}
            case ops.AddFlood(_, _, vtep):
                floods.add(vtep)
            case ops.RemoveFlood(_, _, vtep):
                floods.discard(vtep)
        self.networks[namespace] = replace(
            state,
            links=links,
            neighbours=neighbours,
            routers=routers,
            tunnels=tunnels,
            routes=over_rt0,
            fdb=frozenset(fdb),
            floods=frozenset(floods),
            homes=frozenset(homes),
            default_routes=frozenset(routes),
        )

    def _link(self, links: dict[InterfaceName, LinkState], name: InterfaceName) -> LinkState:
        if name not in links:
            raise Gone(f"device {name} is gone")
        return links[name]

    def _configure_pod(self, op: ops.ConfigurePod) -> None:
        interfaces = self.pods.get(op.netns)
        if interfaces is None or op.interface not in interfaces:
            raise Gone(f"{op.interface} in {op.netns} is gone", op=op)
        held: frozenset[IPInterface] = interfaces[op.interface].addresses | set(op.addresses)
        interfaces[op.interface] = replace(interfaces[op.interface], addresses=held)

    def _load_node(self, script: str) -> None:
        """The node's own table; a script that makes it begins with its removal."""
        table = NetworkState(NamespaceName(""), tables=self.node.tables)
        if f" {TABLE_PREFIX}" in script:
            loaded = _loaded(table, script)
            self.node = replace(self.node, tables=loaded.tables, locked=_locked(self.node.locked, script))
            return
        if not self.node.prepared and f"delete table {firewall.NODE_TABLE}" not in script:
            raise KernelError("the node has no table")
        if self.node.prepared and f"delete table {firewall.NODE_TABLE}" not in script:
            held = {name: frozenset((element,) for element in found) for name, found in self.node.sets.items()}
            table = replace(table, sets=held)
        loaded = _loaded(table, script)
        sets = {name: frozenset(element[0] for element in found) for name, found in loaded.sets.items()}
        self.node = replace(self.node, prepared=True, sets=sets)

    def _load(self, state: NetworkState, script: str) -> None:
        self.networks[state.namespace] = _loaded(state, script)


def _locked(held: Mapping[InterfaceName, InterfaceName], script: str) -> dict[InterfaceName, InterfaceName]:
    """Veths that the table of locks is on after a script."""
    found = dict(held)
    for line in script.splitlines():
        verb, kind, *rest = line.split()
        if " ".join(rest[:2]) != lock.VETH_TABLE:
            continue
        if (verb, kind) == ("delete", "table"):
            found.clear()
        elif kind == "chain" and verb == "add":
            found |= lock.devices(rest[2:3])
        elif kind == "chain" and verb == "delete":
            found = {port: device for port, device in found.items() if port not in lock.devices(rest[2:3])}
    return found


def _loaded(state: NetworkState, script: str) -> NetworkState:
    """A table's sets and chains after a script."""
    sets, chains, tables = dict(state.sets), set(state.chains), dict(state.tables)
    for line in script.splitlines():
        if match := _OWN_TABLE.match(line):
            verb, identity = match.groups()
            if verb == "create" and identity in tables:
                raise KernelError(f"table {identity}: File exists")
            tables.setdefault(identity, ())
        elif match := _DIGEST.match(line):
            verb, identity, digest = match.groups()
            marks = tables.get(identity, ())
            if verb == "delete":
                tables[identity] = tuple(mark for mark in marks if mark != digest)
            elif digest not in marks:
                tables[identity] = (*marks, digest)
        elif line == f"delete table {firewall.TABLE}":
            sets, chains = {}, set()
        elif match := _REMOVE_TABLE.match(line):
            tables.pop(match.group(1), None)
        elif match := _ELEMENT.match(line):
            verb, name, text = match.groups()
            elements = {tuple(part.strip().strip('"') for part in item.split(" . ")) for item in text.split(", ")}
            held = set(sets.get(name, frozenset()))
            sets[name] = frozenset(held | elements if verb == "add" else held - elements)
        elif match := _ADD_CHAIN.match(line):
            chains.add(match.group(1))
        elif match := _DELETE_CHAIN.match(line):
            chains.discard(match.group(1))
        elif match := _TABLE_SET.match(line):
            sets.setdefault(match.group(1), frozenset())
        elif (match := _TABLE_CHAIN.match(line)) and match.group(1) not in ("output", "postrouting"):
            chains.add(match.group(1))
    return replace(state, sets=sets, chains=frozenset(chains), tables=tables)
