"""Renders on this node each network that a local endpoint needs: observe, plan, apply."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, TypeVar

from vmnet import metrics
from vmnet.agent.cluster import Cluster, Sighting
from vmnet.kernel.api import Gone, Kernel, KernelError
from vmnet.model import names
from vmnet.model.addresses import IPAddress, IPNetwork
from vmnet.model.endpoint import Endpoint, Home, Join, LocalPort, Node, NodeNetwork, PortState, RemoteEndpoint
from vmnet.model.names import VXLAN_PORT, InterfaceName, NamespaceName, NetworkId
from vmnet.model.network import Network, Role
from vmnet.plan import edge, firewall, health, ops
from vmnet.plan import network as network_plan
from vmnet.plan import node as node_plan
from vmnet.plan.health import Fault, Part
from vmnet.plan.network import PodInterface
from vmnet.plan.state import NetworkState, NodeState
from vmnet.plan.table import Marks, Table
from vmnet.runtime.aside import aside

log = logging.getLogger(__name__)


LARGE: Final = 200
"""Endpoints of a network that is compared beside the event loop: there it would take milliseconds."""
Result = TypeVar("Result")


class NetworkService(Protocol):
    """Something that runs inside a network's namespace while the network is on this node (DHCP and RA, DNS)."""

    async def follow(
        self, network: Network, mtu: int, local: Iterable[Endpoint], everywhere: Iterable[Endpoint]
    ) -> None:
        """Serve a network's endpoints: those of this node, and all of them. Raises KernelError."""
        ...

    async def leave(self, network_id: NetworkId) -> None:
        """The network leaves this node."""
        ...


class TableSource(Protocol):
    """Something that wants nftables tables of its own (services, policy, the lock on eth0). Reads stores; never waits.

    When its answers may have changed it says so by the callbacks it was made with.
    """

    def network_tables(self, desired: NodeNetwork) -> tuple[Table, ...]:
        """Tables of one network's namespace; they are in place before a port comes up."""
        ...

    def node_tables(self, rendered: Mapping[str, NodeNetwork]) -> tuple[Table, ...]:
        """Tables of the node's own namespace. ``rendered``: the primary networks that are on this node, by name."""
        ...

    def demands(self, network: str) -> bool:
        """Whether the network must be on this node even without a local endpoint (a NodePort)."""
        ...


class NotReady(Exception):
    """The API does not know yet what is needed (this node's address, the network). Retryable."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A port as the kernel's gate has it now. ``open``: it carries frames."""

    open: bool
    standby: bool
    waiting: bool
    """A standby port to whose guest's key the gate has not opened yet; one that a later move closed is not."""


class Networks:
    """All networks of this node; one network is worked on by one task at a time."""

    def __init__(
        self,
        kernel: Kernel,
        cluster: Cluster,
        node_name: str,
        services: tuple[NetworkService, ...],
        on_detached: Callable[[Endpoint], None],
        sources: tuple[TableSource, ...] = (),
        on_attached: Callable[[str], None] = lambda network: None,
        localnets: Mapping[str, str] | None = None,
        vxlan_port: int = VXLAN_PORT,
        on_observed: Callable[[NodeState], None] = lambda state: None,
        default_services: Callable[[], Collection[IPAddress]] = tuple,
        on_node_tables: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """``localnets``: physical network → the bridge of this node that carries it. ``on_node_tables``: awaited after
        the node's tables have been loaded; may raise KernelError."""
        self._on_node_tables = on_node_tables
        self.node_name = node_name
        self._localnets = dict(localnets or {})
        self._vxlan_port = vxlan_port
        self._kernel = kernel
        self._cluster = cluster
        self._services = services
        self._on_detached = on_detached
        self._locks: dict[str, asyncio.Lock] = {}
        self._numbering = asyncio.Lock()
        self._joins: dict[NetworkId, Join] = {}
        self._begun: dict[str, Network] = {}
        """Networks that are here or on their way: one whose first pod could not be attached leaves traces too."""
        self._rendered: dict[str, Network] = {}
        self._ports: dict[InterfaceName, Endpoint] = {}
        self._mtus: dict[NetworkId, int] = {}
        self._sources = sources
        self._on_attached = on_attached
        self._on_observed = on_observed
        self._default_services = default_services
        self._adopting = False
        self._desires: dict[str, NodeNetwork] = {}
        self._told_homes: dict[str, frozenset[int]] = {}
        """Marks of nodes that connections come here from, by network."""
        self._held: dict[NamespaceName | None, dict[str, Table]] = {}
        """Tables that the kernel holds because this process loaded them, or found their digest."""
        self._marks: dict[NamespaceName | None, dict[str, Marks]] = {}
        """The digests that those tables carry."""

    def rendered(self) -> tuple[Network, ...]:
        """Networks that are on this node now."""
        return tuple(self._rendered.values())

    def holds(self, network: Network, table: str) -> bool:
        """Whether a network's namespace has a table (``family name``) that this process has put or found there."""
        return table in self._held.get(network.namespace, {})

    def mtu(self, network: Network) -> int:
        """MTU of a rendered network on this node. Raises KeyError when it is not rendered."""
        return self._mtus[network.id]

    def this_node(self) -> Node:
        """This node as the fabric sees it. Raises NotReady."""
        node = self._cluster.node(self.node_name)
        if node is None:
            raise NotReady(f"node {self.node_name} has no InternalIP in the API yet")
        return node

    async def prepare_node(self) -> None:
        """Forwarding, address translation and tables of the node's own namespace; adopts what is there."""
        async with self._numbering:
            await self._prepare(await self._kernel.observe_node())

    async def _prepare(self, state: NodeState) -> None:
        """Bring the node's own table in step: which networks are here or on their way, and who may speak for them."""
        own = self._cluster.node(self.node_name)
        present = {NetworkId(int(namespace.removeprefix("vmnet-"))) for namespace in state.namespaces}
        vteps = {node.address for node in self._cluster.nodes() if own is None or node.address != own.address}
        self._on_observed(state)
        tables = () if self._adopting else self._node_tables()
        found = node_plan.plan(
            replace(state, tables={}) if self._adopting else state,
            vxlan_port=self._vxlan_port,
            vteps=vteps,
            networks=present | self._joins.keys(),
            pods={subnet for node in self._cluster.nodes() for subnet in node.pods},
            services=self._default_services(),
            tables=tables,
            held=self._held.get(None, {}),
        )
        if self._adopting:
            await self._kernel.apply(found)
            _count(found)
        else:
            await self._load(None, tables, found, state.tables)

    def _node_tables(self) -> tuple[Table, ...]:
        primary = {name: found for name, found in self._desires.items() if found.network.role is Role.PRIMARY}
        return tuple(table for source in self._sources for table in source.node_tables(primary))

    def known(self) -> frozenset[str]:
        """Names of the networks that are on this node, or whose pods are."""
        return frozenset(self._rendered) | {endpoint.network for endpoint in self._ports.values()}

    def attached(self, name: str) -> tuple[Endpoint, ...]:
        """Endpoints that have ports here, of one network."""
        return tuple(endpoint for endpoint in self._ports.values() if endpoint.network == name)

    def present(self, name: str) -> Network | None:
        """A network as it is on this node; None when it is not."""
        return self._rendered.get(name)

    async def examine(self, name: str) -> tuple[Fault, ...] | None:
        """What is wrong with a network here; None when it is not here. Raises KernelError.

        Nobody waits for the first look: what it finds is only believed when a second one, that nobody disturbs, does.
        """
        found = await self._examine(name)
        if not found:
            return found
        async with self._lock(name):
            return await self._examine(name)

    async def _examine(self, name: str) -> tuple[Fault, ...] | None:
        ports = {
            found.port: found.pod
            for found in self._cluster.endpoints_on(self.node_name, name)
            if found.port in self._ports
        }
        desired = self._desires.get(name)
        if desired is None or name not in self._rendered:
            pods = ", ".join(f"{pod.namespace}/{pod.name}" for pod in ports.values())
            return (
                (Fault(Part.NAMESPACE, f"it is gone from the node, but pods are here: delete {pods}"),)
                if pods
                else None
            )
        observed = await self._kernel.observe_network(desired.network.namespace)
        held = self._held.get(desired.network.namespace, {})
        return await _calculate(desired, health.faults, desired, observed, held, ports)

    async def examine_node(self) -> tuple[Fault, ...]:
        """What is wrong with the node's own namespace. Raises KernelError."""
        found = health.node_faults(await self._kernel.observe_node(), self._held.get(None, {}))
        if not found:
            return found
        async with self._numbering:
            return health.node_faults(await self._kernel.observe_node(), self._held.get(None, {}))

    async def bring_node_tables(self) -> None:
        """What a new port, its end, or a new network means for the node's tables; no look at the kernel where this
        process loaded them. Raises KernelError, NotReady."""
        if self._adopting:
            return
        async with self._numbering:
            held, tables = self._held.get(None), self._node_tables()
            if held is not None:
                marks = self._marks[None]
                found = tuple(network_plan.load_tables(None, marks, tables, held))
                if not found:
                    return
                try:
                    await self._load(None, tables, found, marks)
                except KernelError as error:
                    log.info("the node's tables are not as they were left, they are looked at again: %s", error)
                else:
                    return
            await self._prepare(await self._kernel.observe_node())

    async def _load(
        self,
        namespace: NamespaceName | None,
        tables: Iterable[Table],
        found: Iterable[ops.Op],
        observed: Mapping[str, Marks],
    ) -> None:
        """Apply a plan that brings tables in step, and remember what the kernel holds then."""
        first, found = namespace not in self._held, tuple(found)
        held = self._held.pop(namespace, {})  # after a failure only the digests that the kernel shows count
        await self._kernel.apply(found)
        if first:
            _count(found)
        self._marks[namespace] = network_plan.marks_then(observed, tables, held)
        self._held[namespace] = {table.identity: table for table in tables}
        if namespace is None and self._on_node_tables is not None:
            await self._on_node_tables()

    def _tables(self, desired: NodeNetwork) -> tuple[Table, ...]:
        if desired.network.role is not Role.PRIMARY:
            # Services, policies and translation are the primary networks'.
            return ()
        found = (table for source in self._sources for table in source.network_tables(desired))
        return (*edge.tables(desired), *found)

    async def _render(self, desired: NodeNetwork, observed: NetworkState | None) -> None:
        tables, namespace = self._tables(desired), desired.network.namespace
        if observed is None:
            self._held.pop(namespace, None)
        plan = await _calculate(desired, network_plan.plan, desired, observed, tables, self._held.get(namespace, {}))
        await self._load(namespace, tables, plan, observed.tables if observed is not None else {})
        self._desires[desired.network.name] = desired

    async def adopt(self) -> tuple[Endpoint, ...]:
        """Take over the networks that an earlier agent rendered, and remove those that nothing here needs.

        Returns the endpoints whose ports exist. Call it once the stores are in step.
        """
        # It knows its networks one after another; until it knows all, the node's tables stay as they were left.
        self._adopting = True
        try:
            await self.prepare_node()
            await self._adopt_networks()
        finally:
            self._adopting = False
        await self.prepare_node()
        return tuple(self._ports.values())

    async def _adopt_networks(self) -> None:
        state = await self._kernel.observe_node()
        known = {found.namespace: found for found in map(self._network, self._cluster.networks()) if found is not None}
        for namespace in sorted(state.namespaces):
            network = known.get(namespace)
            if network is None and await self._missed(namespace):
                log.warning("%s is kept: pods of this node use a NetworkAttachmentDefinition that is gone", namespace)
            elif network is None:
                log.info("removing %s: its network is gone", namespace)
                metrics.LEFT_OVERS.labels("network").inc()
                await self._kernel.apply(network_plan.remove(NetworkId(int(namespace.removeprefix("vmnet-")))))
            else:
                await self.render(network.name)

    async def _missed(self, namespace: NamespaceName) -> bool:
        """Whether a namespace of no known network may be that of pods here, whose NAD somebody has deleted by hand.

        The controller makes it again; then the network is known, and looked at.
        """
        if not self._cluster.misses_attachment(self.node_name):
            return False
        observed = await self._kernel.observe_network(namespace)
        return observed is not None and bool(observed.ports())

    async def render(self, name: str) -> None:
        """Bring this node in step with the API for one network. Raises KernelError, NotReady."""
        async with self._lock(name):
            network = self._network(name) or self._begun.get(name)
            if network is None:
                return
            observed = await self._kernel.observe_network(network.namespace)
            demanded = self._demanded(name)
            if observed is None and not demanded:
                if name in self._begun:
                    await self._leave(network)
                    await self.prepare_node()
                return
            created = observed is None
            observed = observed or NetworkState(network.namespace)
            desired = await self._desired(network, observed)
            if found := network_plan.displaced(desired, None if created else observed):
                log.warning("network %s: tunnels of another port than %d are made anew", name, self._vxlan_port)
                await self._kernel.apply(found)
                observed = await self._kernel.observe_network(network.namespace) or NetworkState(network.namespace)
            gone = [link.name for link in observed.ports() if link.name not in {p.endpoint.port for p in desired.ports}]
            if not desired.ports and not demanded and not await self._draining(network):
                await self._leave(network)
                await self._kernel.apply(network_plan.remove(network.id))
                await self.prepare_node()  # the node listens for its VNIs no longer
            else:
                await self._render(desired, None if created else observed)
                await self._orphaned(network, observed)
                await self._follow(desired)
            await self.bring_node_tables()
            for port in gone:
                metrics.LEFT_OVERS.labels("port").inc()
                self._forget(port)

    async def attach(self, network: Network, endpoint: Endpoint, state: PortState, pod: PodInterface) -> int:
        """Give a pod its interface; everything it needs on this node is there when this returns. Returns the MTU.

        Raises KernelError, NotReady.
        """
        async with self._lock(network.name):
            port = LocalPort(endpoint, state)
            if await self._attach_known(network, port, pod):
                return self._mtus[network.id]
            observed = await self._kernel.observe_network(network.namespace)
            if observed is None:
                observed = NetworkState(network.namespace)
                desired = await self._desired(network, observed, joining=port)
                await self._render(desired, None)
            else:
                desired = await self._desired(network, observed, joining=port)
                await self._render(desired, observed)
            await self.bring_node_tables()
            self._ports[endpoint.port] = endpoint
            try:
                await self._kernel.apply(network_plan.attach(desired, port, pod, observed))
                await self._follow(desired)
            except (KernelError, asyncio.CancelledError):
                # The runtime will ask again, or send DEL; a half-made port must not stay bound meanwhile.
                await asyncio.shield(self._undo(network, endpoint.port))
                raise
            return desired.mtu

    async def _attach_known(self, network: Network, port: LocalPort, pod: PodInterface) -> bool:
        """The short way, for a pod that is new to a network which this process has rendered: no look at the kernel.

        False when it is not that, or when the kernel turned out to be otherwise: then the long way is to be taken.
        What neither way does (the bridge's entry of the new port) the network's next look does, soon.
        """
        known, endpoint, namespace = self._desires.get(network.name), port.endpoint, network.namespace
        held = self._held.get(namespace)
        new = endpoint.port not in self._ports and port.state is PortState.ACTIVE and endpoint.machine is None
        if known is None or held is None or not new or self._rendered.get(network.name) != network:
            return False
        desired = replace(known, ports=(*known.ports, port))
        self._ports[endpoint.port] = endpoint
        tables, marks = self._tables(desired), self._marks[namespace]
        found = (
            *network_plan.introduce(namespace, endpoint),
            *network_plan.attach(
                desired,
                port,
                pod,
                NetworkState(namespace),
                network_plan.load_tables(namespace, marks, tables, held),
            ),
        )
        try:
            await self._load(namespace, tables, found, marks)
        except KernelError as error:
            log.info("network %s is not as it was left, it is looked at again: %s", network.name, error)
            await self._undo(network, endpoint.port)
            return False
        except asyncio.CancelledError:
            await asyncio.shield(self._undo(network, endpoint.port))
            raise
        self._desires[network.name] = desired
        self._on_attached(network.name)
        return True

    async def detach(self, container: str, interface: str | None = None) -> tuple[Endpoint, ...]:
        """Remove what a container had (None: every interface of it), by the marks on the links. Raises KernelError.

        Returns the endpoints that these were, as far as they are known.
        """
        found = []
        for namespace in sorted((await self._kernel.observe_node()).namespaces):
            observed = await self._kernel.observe_network(namespace)
            for link in observed.ports() if observed is not None else ():
                owner, name = network_plan.owner_of(link)
                if owner == container and interface in (None, name):
                    if link.name in self._ports:
                        found.append(self._ports[link.name])
                    await self._detach(namespace, link.name)
        return tuple(found)

    async def keep_only(self, valid: Callable[[str, str], bool], network: str | None = None) -> int:
        """Free the ports, of one network or of all, whose container and interface are not valid; returns how many.

        Raises KernelError.
        """
        freed = 0
        only = self._network(network) if network is not None else None
        for namespace in sorted((await self._kernel.observe_node()).namespaces):
            if network is not None and (only is None or only.namespace != namespace):
                continue
            observed = await self._kernel.observe_network(namespace)
            for link in observed.ports() if observed is not None else ():
                if not valid(*network_plan.owner_of(link)):
                    await self._detach(namespace, link.name)
                    metrics.LEFT_OVERS.labels("port").inc()
                    freed += 1
        return freed

    async def check(self, endpoint: Endpoint, netns: str) -> str | None:
        """What is wrong with a pod's interface, None when all is as ADD left it. Raises KernelError."""
        found = await self._kernel.observe_pod(netns, endpoint.interface)
        network = self._network(endpoint.network)
        observed = await self._kernel.observe_network(network.namespace) if network else None
        link = observed.links.get(endpoint.port) if observed else None
        if observed is None or link is None:
            return f"port {endpoint.port} is not there"
        if link.master != names.BRIDGE or not link.up:
            return f"port {endpoint.port} is not up on {names.BRIDGE}"
        if not set(firewall.chains_of(endpoint.port)) <= observed.chains:
            return f"port {endpoint.port} is not bound"
        # KubeVirt takes a VM's interface over, so a launcher pod keeps neither its name nor its addresses.
        if endpoint.machine is None and (found is None or not set(endpoint.addresses) <= found.addresses):
            return f"{endpoint.interface} lacks its addresses"
        return None

    # The gate

    async def gate(self, network: Network, endpoint: Endpoint) -> Gate | None:
        """How the kernel treats a port now; None when it is not there. Raises KernelError."""
        observed = await self._kernel.observe_network(network.namespace)
        if observed is None or endpoint.port not in observed.links:
            return None
        standby, waiting = endpoint.port in observed.standby, observed.waits(endpoint.port)
        return Gate(open=not waiting and endpoint.mac not in observed.moved, standby=standby, waiting=waiting)

    async def open(self, network: Network, endpoint: Endpoint) -> None:
        """Do what the guest's RARP does, for a guest that said nothing. Raises KernelError."""
        # The transaction that deletes comes last: a target's guest, which has not been here, need not wait for it.
        await self._kernel.apply(
            (
                ops.LoadFirewall(network.namespace, firewall.open_script(endpoint.port)),
                *network_plan.repoint_local(network.namespace, endpoint),
                ops.LoadFirewall(network.namespace, firewall.not_moved_script(endpoint.mac)),
            )
        )

    async def reassert(self, network: Network, endpoint: Endpoint) -> None:
        """Write down where the guest's frame has put the machine: learned entries age. Raises KernelError."""
        await self._kernel.apply(network_plan.repoint_local(network.namespace, endpoint))

    async def reach_homes(self, network: Network, marks: Iterable[int]) -> None:
        """See to it that connections with these marks find the way to their nodes. Raises KernelError, NotReady."""
        desired, wanted = self._desires.get(network.name), frozenset(marks)
        nodes = {*(home.node for home in desired.homes), *desired.former} if desired is not None else set()
        told = self._told_homes.get(network.name, frozenset())
        missing = wanted - told - {edge.mark(node.number) for node in nodes if node.number is not None}
        if not missing:
            return
        # Before anything waits: whoever looks at the network from now on wants it so.
        self._told_homes[network.name] = told | missing
        known = [
            node for node in self._cluster.nodes() if node.number is not None and edge.mark(node.number) in missing
        ]
        if desired is not None:
            await self._kernel.apply(network_plan.reach(desired, known))
        # What that does not do can wait, and a whole look takes longer than the guest may need to come.
        self._on_attached(network.name)

    async def close_moved(self, network: Network, endpoint: Endpoint) -> None:
        """The machine runs on another node: close its port here and send its frames there. Raises KernelError."""
        if not network.stretched:
            return  # a machine's address stays with its node, and so does the machine
        if not network.overlaid:
            # The guest's own frame tells the bridges where it is now.
            await self._kernel.apply([ops.LoadFirewall(network.namespace, firewall.moved_script(endpoint.mac))])
            return
        found: list[ops.Op] = [ops.LoadFirewall(network.namespace, firewall.moved_script(endpoint.mac))]
        for other in self._cluster.live_endpoints(network.name):
            node = self._cluster.node(other.node)
            if other.mac == endpoint.mac and other.node != self.node_name and node is not None:
                found += network_plan.repoint_remote(network.namespace, RemoteEndpoint(other, node.address))
        await self._kernel.apply(found)

    # Inside

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _draining(self, network: Network) -> bool:
        """Whether connections over the network's edge that were begun here live on with a machine that has moved away.

        They end, or conntrack forgets them when they have been silent for long; until then it is looked at again.
        """
        if not network.persistent or not network.joined or network.name not in self._cluster.networks():
            return False
        moved = {
            item.ip
            for found in self._cluster.live_endpoints(network.name)
            if found.machine is not None and found.node != self.node_name
            for item in found.addresses
        }
        return bool(moved) and not moved.isdisjoint(await self._kernel.connections(network.namespace))

    def _demanded(self, name: str) -> bool:
        network = self._network(name)
        if network is None or network.role is not Role.PRIMARY:
            return False
        return any(source.demands(name) for source in self._sources)

    def _network(self, name: str) -> Network | None:
        found = self._cluster.attachment_of(name)
        return found.network if found else None

    def _parts(self, network: Network, node: Node, joining: LocalPort | None) -> tuple[IPNetwork, ...]:
        """This node's part of a Layer3 network. The pod's allocation tells it, should the watch of Nodes be behind."""
        written = dict(node.subnets).get(network.name, ())
        if written or network.stretched:
            return written
        here = [joining.endpoint] if joining is not None else []
        here += self._cluster.endpoints_on(node.name, network.name)
        return tuple(dict.fromkeys(item.network for endpoint in here for item in endpoint.addresses))

    async def _desired(self, network: Network, observed: NetworkState, joining: LocalPort | None = None) -> NodeNetwork:
        """What the API wants here: ports that exist (or join now) and whose pods live, everyone else, their nodes."""
        node = self.this_node()
        everywhere = await self._cluster.survey(network.name)
        nodes = {other.name: other for other in self._cluster.nodes() if other.name != node.name}
        place = partial(_place, everywhere, nodes, self._cluster.up_to_date())
        remotes, hosts, left = place() if len(everywhere) < LARGE else await aside(place)
        peers = {other.address for other in hosts}
        network = network.at(self._parts(network, node, joining))
        present = {link.name for link in observed.ports()}
        self._recall_names(self._cluster.endpoints_on(node.name, network.name), observed)
        # A port that has lost its rules, and its guest's key with them, is closed unless the API says it is here.
        ports = [
            LocalPort(
                found,
                PortState.ACTIVE if self._cluster.is_live(found) or not network.stretched else PortState.STANDBY,
            )
            for found in self._cluster.endpoints_on(node.name, network.name)
            if found.port in present
        ]
        if joining is not None:
            ports = [port for port in ports if port.endpoint.port != joining.endpoint.port] + [joining]
        for port in ports:
            self._ports[port.endpoint.port] = port.endpoint
        # Where a machine has left connections behind, its frames and what belongs to them must go on to arrive.
        former = self._former(network, observed)
        left |= former
        hosts |= {other for other in left if other.name != node.name}
        peers |= {other.address for other in hosts}
        # A router that was once needed stays known for as long as its node is: connections may still carry its mark.
        hosts |= {
            other
            for other in self._cluster.nodes()
            if other.name != node.name and any(item.ip in observed.routers for item in other.transit)
        }
        if self._demanded(network.name):
            # What makes a network be here without an endpoint makes it be everywhere.
            hosts = {other for other in self._cluster.nodes() if other.name != node.name}
        elif not network.stretched:
            hosts |= {
                other
                for other in self._cluster.nodes()
                if other.name != node.name and network.name in dict(other.subnets)
            }
        routers = (other for other in hosts if network.routed and other.number is not None)
        async with self._numbering:
            state = await self._kernel.observe_node()
            promised = frozenset(join.index for number, join in self._joins.items() if number != network.id)
            join = self._joins.get(network.id) or node_plan.allocate_join(state, network.id, promised)
            self._joins[network.id], self._begun[network.name] = join, network
            await self._prepare(state)
        bridge = self._bridge(network, state) if ports else None
        return NodeNetwork(
            network=network,
            node=node,
            mtu=network.effective_mtu(bridge[1] if bridge else state.mtu, node.address.version),
            join=join,
            ports=tuple(ports),
            remotes=remotes if network.overlaid else (),
            peers=tuple(sorted(peers, key=str)) if network.overlaid else (),
            routers=tuple(sorted(routers, key=lambda other: other.name)),
            homes=tuple(
                Home(item.ip, source)
                for port in ports
                if network.joined and (source := self._cluster.came_from(port.endpoint)) is not None
                for item in port.endpoint.addresses
            ),
            former=tuple(sorted(former, key=lambda other: other.name)),
            bridge=bridge[0] if bridge else None,
            bridge_mtu=bridge[1] if bridge else 0,
            vxlan_port=self._vxlan_port,
        )

    async def _orphaned(self, network: Network, observed: NetworkState | None) -> None:
        """Forget connections whose home is a node that is no more: they cannot go on, and its number may come again.

        What their machines send then begins here: datagrams go on from another port, TCP is reset by who does not know
        it. A node that is there but does not answer keeps its connections: it may come back.
        """
        nodes = self._cluster.nodes()
        if observed is None or any(node.number is None for node in nodes):
            return
        for mark in observed.homes - {edge.mark(node.number) for node in nodes if node.number is not None}:
            await self._kernel.forget_marked(network.namespace, mark)

    def _former(self, network: Network, observed: NetworkState) -> set[Node]:
        """Nodes whose marks connections here may carry: by what other agents told, or by the rules that are there."""
        marks = self._told_homes.get(network.name, frozenset()) | observed.homes
        return {
            other
            for other in self._cluster.nodes()
            if other.number is not None and other.name != self.node_name and edge.mark(other.number) in marks
        }

    def _bridge(self, network: Network, state: NodeState) -> tuple[InterfaceName, int] | None:
        """The node's bridge that carries a Localnet network, and its MTU; None for others. Raises NotReady."""
        if network.overlaid:
            return None
        configured = self._localnets.get(network.physical)
        if configured is None:
            raise NotReady(
                f"physical network {network.physical} has no bridge on node {self.node_name}: "
                f"agent option --localnet {network.physical}=BRIDGE"
            )
        name = InterfaceName(configured)
        found = state.bridges.get(name)
        if found is None:
            raise NotReady(f"node {self.node_name} has no bridge {name} for physical network {network.physical}")
        if network.vlan is not None and not found.filters_vlans:
            raise NotReady(
                f"bridge {name} of node {self.node_name} does not filter VLANs and cannot carry VLAN {network.vlan}: "
                f"ip link set dev {name} type bridge vlan_filtering 1"
            )
        return name, found.mtu

    def _recall_names(self, endpoints: Iterable[Endpoint], observed: NetworkState) -> None:
        """Ports whose runtime gave the interface another name than the pod's annotation: the mark on the port tells."""
        present = {link.name: network_plan.owner_of(link)[1] for link in observed.ports()}
        for endpoint in endpoints:
            if endpoint.node != self.node_name or endpoint.port in present:
                continue
            for port, interface in present.items():
                if port == names.port_interface(endpoint.pod.uid, interface):
                    self._cluster.name_interface(endpoint, InterfaceName(interface))

    async def _follow(self, desired: NodeNetwork) -> None:
        self._rendered[desired.network.name] = desired.network
        self._mtus[desired.network.id] = desired.mtu
        local = tuple(port.endpoint for port in desired.ports)
        for service in self._services:
            members = self._cluster.members(desired.network.name)
            await service.follow(desired.network, desired.mtu, local, filter(self._cluster.is_live, members))

    async def _leave(self, network: Network) -> None:
        for service in self._services:
            await service.leave(network.id)
        self._told_homes.pop(network.name, None)
        self._begun.pop(network.name, None)
        self._rendered.pop(network.name, None)
        self._desires.pop(network.name, None)
        self._held.pop(network.namespace, None)
        self._joins.pop(network.id, None)

    async def _detach(self, namespace: NamespaceName, port: InterfaceName) -> None:
        observed = await self._kernel.observe_network(namespace)
        if observed is None:
            return
        try:
            await self._kernel.apply(network_plan.detach(namespace, port, observed))
        except Gone:
            log.debug("%s went away while port %s was removed", namespace, port)
        endpoint = self._ports.get(port)
        self._forget(port)
        if endpoint is not None:
            await self.render(endpoint.network)

    async def _undo(self, network: Network, port: InterfaceName) -> None:
        try:
            observed = await self._kernel.observe_network(network.namespace)
            if observed is not None:
                await self._kernel.apply(network_plan.detach(network.namespace, port, observed))
        except KernelError as error:
            log.warning("port %s of %s is left for the next look: %s", port, network.name, error)
        self._forget(port)

    def _forget(self, port: InterfaceName) -> None:
        endpoint = self._ports.pop(port, None)
        if endpoint is not None:
            self._on_detached(endpoint)


def _place(
    everywhere: Iterable[Sighting], nodes: Mapping[str, Node], up_to_date: bool
) -> tuple[tuple[RemoteEndpoint, ...], set[Node], set[Node]]:
    """Who is on the other nodes, which nodes these are, and where machines came from. ``nodes``: the others by name."""
    remotes, hosts, left = [], set(), {}
    for seen in everywhere:
        found, source = seen.endpoint, seen.came_from
        if source is not None:
            left[source.name] = source
        other = nodes.get(found.node)
        if other is None:
            continue
        hosts.add(found.node)
        if seen.is_live:
            certain = found.machine is None or (up_to_date and seen.settled)
            remotes.append(RemoteEndpoint(found, other.address, certain))
    return tuple(remotes), {nodes[name] for name in hosts}, set(left.values())


async def _calculate(desired: NodeNetwork, function: Callable[..., Result], *arguments: object) -> Result:
    """The result of a function of values, beside the event loop where it takes long."""
    if len(desired.remotes) + len(desired.ports) < LARGE:
        return function(*arguments)
    return await aside(function, *arguments)


def _count(found: Iterable[ops.Op]) -> None:
    """What a first look takes away an earlier agent has left, or somebody else."""
    for kind, number in network_plan.removed(found).items():
        metrics.LEFT_OVERS.labels(kind).inc(number)
