"""The DNS responders of a node: one for each of its networks, all in the agent's event loop.

Their sockets, for answering and for forwarding, are opened inside the network's namespace by the kernel seam.
"""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from vmnet.agent import service_records
from vmnet.kernel.api import Kernel, KernelError
from vmnet.metrics import DNS_TALLIES
from vmnet.model.addresses import IPNetwork
from vmnet.model.endpoint import Endpoint, MachineReference
from vmnet.model.names import NamespaceName, NetworkId
from vmnet.model.network import Network
from vmnet.model.service import Service
from vmnet_dns.forward import Forwarder, Routes
from vmnet_dns.server import Explanation, Server
from vmnet_dns.tally import Tally
from vmnet_dns.zone import TTL, Record, View, Zone, address_records, denied_zones, pointer_records, text_record

log = logging.getLogger(__name__)

DNS_PORT: Final = 53
SPECIFICATION: Final = "1.1.0"
"""Version of the Kubernetes DNS specification whose names of Services are served (its section 2.2)."""


@dataclass(frozen=True, slots=True)
class Names:
    """What a network's DNS is made of: endpoints (every one, local or not) and Services."""

    endpoints: Iterable[Endpoint] = ()
    services: Iterable[Service] = ()


@dataclass(slots=True)
class _Source:
    """An endpoint or a Service, and its records. Both are values: another one means that something has changed."""

    value: Endpoint | Service
    nameless: bool
    """A machine whose interface has no name yet."""
    records: Sequence[Record]


@dataclass(slots=True)
class _Running:
    server: Server
    network: Network
    sources: dict[Hashable, _Source] = field(default_factory=dict)
    told: Counter[Record] = field(default_factory=Counter)
    """By how many sources: both pods of a migrating machine say the same."""


@dataclass(frozen=True, slots=True)
class _Change:
    """Records that sources have told no longer, and those that they tell now."""

    gone: Counter[Record] = field(default_factory=Counter)
    new: Counter[Record] = field(default_factory=Counter)


def _settle(running: _Running, change: _Change) -> None:
    touched = change.gone.keys() | change.new.keys()
    running.told.update(change.new)
    running.told.subtract(change.gone)
    removed = [record for record in touched if running.told[record] <= 0]
    for record in removed:
        del running.told[record]
    running.server.view.change((record for record in touched if record in running.told), removed)


def _unnamed(machine: MachineReference) -> str | None:
    del machine
    return None


class Responders:
    """Responders by network id. ``serve`` is idempotent: an answer's sockets stay open while names come and go."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        upstreams: Callable[[], Routes],
        interface: Callable[[MachineReference], str | None] = _unnamed,
        domain: str = "cluster.local",
        port: int = DNS_PORT,
        ttl: int = TTL,
        log_queries: bool = False,
    ) -> None:
        """``upstreams``: recursive servers, reached from the network's namespace through its join veth.

        ``interface``: the name that a machine's own specification gives to its interface on the pod's network. ``ttl``:
        seconds, of machines' and pods' names.
        """
        self._kernel = kernel
        self._upstreams = upstreams
        self._routes = upstreams()
        self._interface = interface
        self._domain = domain
        self._port = port
        self._log_queries = log_queries
        self._ttl = ttl
        self._running: dict[NetworkId, _Running] = {}
        self._locks: dict[NetworkId, asyncio.Lock] = {}
        self._subnets: frozenset[IPNetwork] = frozenset()
        self._denied: dict[bytes, Zone] = {}
        """Shared by all views: of every network's subnets, so that no network asks the world of another's."""

    def serving(self, network_id: NetworkId) -> bool:
        """Whether that network's responder has its sockets."""
        return network_id in self._running

    def serves(self, network: Network) -> bool:
        """Whether ``serve`` would leave the network's sockets and zones as they are."""
        running = self._running.get(network.id)
        return running is not None and _served_alike(running.network, network)

    async def serve(self, network: Network, names: Names) -> None:
        """Serve exactly these names.

        The namespace and its gateway addresses must be there. Raises KernelError when a socket cannot be opened.
        """
        async with self._locks.setdefault(network.id, asyncio.Lock()):
            running = self._running.get(network.id)
            if running is None or not _served_alike(running.network, network):
                if running is not None:
                    del self._running[network.id]
                    await running.server.close()
                view = View.make(
                    network.name,
                    domain=self._domain,
                    subnets=network.subnets,
                    servers=network.gateways,
                    denied=self._denied,
                    records=[text_record(f"dns-version.{self._domain}", SPECIFICATION)],
                )
                running = _Running(await self._open(network, view), network)
                self._running[network.id] = running
            self._change(running, names)

    def follow(self, network: str, names: Callable[[], Names]) -> bool:
        """Bring the names of a network that is served up to date, at once; False when it is not served.

        This asks nothing of the kernel: a name is right long before the datapath is.
        """
        self._ask_upstreams()
        for running in self._running.values():
            if running.network.name == network:
                self._change(running, names())
                return True
        return False

    def touch(self, network: str, endpoints: Mapping[str, Endpoint | None]) -> bool:
        """The same where only these endpoints, by their pods' uids, have changed (None: gone); others cost nothing."""
        self._ask_upstreams()
        for running in self._running.values():
            if running.network.name == network:
                change = _Change()
                for key, endpoint in endpoints.items():
                    if endpoint is not None:
                        self._look_at(running, key, endpoint, change)
                    elif key in running.sources:
                        change.gone.update(running.sources.pop(key).records)
                _settle(running, change)
                return True
        return False

    def deny(self, subnets: frozenset[IPNetwork]) -> None:
        """The subnets of all networks: of their addresses' names the world is not asked."""
        if subnets != self._subnets:
            self._subnets = subnets
            self._denied.clear()
            self._denied.update(denied_zones(subnets))

    async def explain(self, network: str, query: bytes) -> Explanation | None:
        """What a network is answered and why; None when it is not served here. Raises ValueError for a bad query."""
        for running in self._running.values():
            if running.network.name == network:
                return await running.server.explain(query)
        return None

    def networks(self) -> list[str]:
        """Names of the networks that are served."""
        return sorted(running.network.name for running in self._running.values())

    async def remove(self, network_id: NetworkId) -> None:
        """Stop answering for a network; before its namespace is deleted, or the sockets keep it alive."""
        async with self._locks.setdefault(network_id, asyncio.Lock()):
            running = self._running.pop(network_id, None)
            if running is not None:
                await running.server.close()
                DNS_TALLIES.pop(running.network.name, None)
        if network_id not in self._running:
            self._locks.pop(network_id, None)

    async def close(self) -> None:
        """Stop all."""
        for network_id in list(self._running):
            await self.remove(network_id)

    def _change(self, running: _Running, names: Names) -> None:
        """Only what differs from the last time is looked at closely."""
        change = _Change()
        present = list(_keyed(names))
        for key, value in present:
            known = running.sources.get(key)
            if known is None or known.value is not value or known.nameless:
                self._look_at(running, key, value, change)
        for key in running.sources.keys() - {key for key, _ in present}:
            change.gone.update(running.sources.pop(key).records)
        _settle(running, change)

    def _look_at(self, running: _Running, key: Hashable, value: Endpoint | Service, change: _Change) -> None:
        """A machine's interface keeps its name; where there is none yet, the machine itself was not seen yet."""
        known = running.sources.get(key)
        machine = value.machine if isinstance(value, Endpoint) else None
        interface = self._interface(machine) if machine is not None else None
        if known is not None and known.value is value and interface is None:
            return
        if isinstance(value, Endpoint):
            records = endpoint_records(value, self._domain, interface, self._ttl)
        else:
            records = service_records.records(value, self._domain)
        change.gone.update(known.records if known is not None else ())
        change.new.update(records)
        running.sources[key] = _Source(value, machine is not None and interface is None, records)

    def _ask_upstreams(self) -> None:
        routes = self._upstreams()
        if routes != self._routes:
            self._routes = routes
            for running in self._running.values():
                running.server.forward(routes)

    async def _open(self, network: Network, view: View) -> Server:
        """A server with all its sockets, or none of them."""
        forwarder = Forwarder(self._routes, _Opener(self._kernel, network.namespace))
        tally = DNS_TALLIES.setdefault(network.name, Tally())
        server = Server(view, forwarder, tally=tally, log_queries=self._log_queries)
        try:
            for gateway in network.gateways:
                server.serve_udp(await self._kernel.udp_socket(network.namespace, gateway, self._port))
                await server.serve_tcp(await self._kernel.tcp_listener(network.namespace, gateway, self._port))
        except BaseException:
            await server.close()
            raise
        log.info("network %s: answering DNS on %s", network.name, ", ".join(map(str, network.gateways)))
        return server


def _keyed(names: Names) -> Iterable[tuple[Hashable, Endpoint | Service]]:
    for endpoint in names.endpoints:
        yield endpoint.pod.uid, endpoint
    for service in names.services:
        yield (service.namespace, service.name), service


@dataclass(frozen=True, slots=True)
class _Opener:
    """Opens sockets to the upstreams inside one network's namespace."""

    kernel: Kernel
    namespace: NamespaceName

    async def __call__(self, family: int, stream: bool) -> socket.socket:
        try:
            if stream:
                return await self.kernel.tcp_socket(self.namespace, family)
            unspecified = IPv4Address(0) if family == socket.AF_INET else IPv6Address(0)
            return await self.kernel.udp_socket(self.namespace, unspecified, 0)
        except KernelError as error:
            # The forwarder knows sockets, not kernels: to it this upstream cannot be reached.
            raise OSError(error.errno, str(error)) from error


def endpoint_records(endpoint: Endpoint, domain: str, interface: str | None = None, ttl: int = TTL) -> list[Record]:
    """Names of an endpoint (design, section 6).

    A machine: ``<vm>.<ns>.vm.<domain>``, ``<interface>.<vm>.<ns>.vm.<domain>`` where the interface's name is known, and
    PTR to the first. Every pod: ``<ip-dashed>.<ns>.pod.<domain>``, and PTR to it where it is no machine.
    """
    addresses = [item.ip for item in endpoint.addresses]
    names: list[str] = []
    if endpoint.machine is not None:
        machine = f"{endpoint.machine.name}.{endpoint.machine.namespace}.vm.{domain}"
        names += [machine, *([f"{interface}.{machine}"] if interface else [])]
    try:
        records = [record for name in names for record in address_records(name, addresses, ttl)]
        for address in addresses:
            dashed = f"{str(address).replace('.', '-').replace(':', '-')}.{endpoint.pod.namespace}.pod.{domain}"
            if dashed.startswith("-"):
                dashed = f"0{dashed}"
            records += address_records(dashed, [address], ttl)
            records += pointer_records(names[0] if names else dashed, [address], ttl)
    except ValueError as error:
        log.warning("%s/%s has no name in DNS: %s", endpoint.pod.namespace, endpoint.pod.name, error)
        return []
    return list(dict.fromkeys(records))


def _served_alike(one: Network, other: Network) -> bool:
    """Whether a change between the two leaves sockets and zones as they are."""
    return (one.namespace, one.name, one.subnets, one.gateways) == (
        other.namespace,
        other.name,
        other.subnets,
        other.gateways,
    )
