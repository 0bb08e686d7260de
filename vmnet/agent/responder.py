"""The DNS responders of a node: one for each of its networks, all in the agent's event loop.

Their sockets, for answering and for forwarding, are opened inside the network's namespace by the kernel seam.
"""

import asyncio
import logging
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from vmnet.kernel.api import Kernel, KernelError
from vmnet.metrics import DNS_REQUESTS, MALFORMED
from vmnet.model.addresses import IPAddress
from vmnet.model.endpoint import Endpoint
from vmnet.model.names import NamespaceName, NetworkId
from vmnet.model.network import Network
from vmnet_dns.forward import Forwarder, Upstream
from vmnet_dns.server import Observe, Server
from vmnet_dns.zone import Record, View, address_records, pointer_records

log = logging.getLogger(__name__)

DNS_PORT: Final = 53
CLUSTER_SERVICES: Final = ("kubernetes.default.svc", "kube-dns.kube-system.svc")
"""Names of the default network's services that every network may use, below the cluster domain."""


@dataclass(slots=True)
class _Running:
    server: Server
    network: Network
    view: View


class Responders:
    """Responders by network id. ``update`` is idempotent: an answer's sockets stay open while names come and go."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        upstreams: Sequence[IPAddress],
        domain: str = "cluster.local",
        services: Sequence[str] = CLUSTER_SERVICES,
        port: int = DNS_PORT,
    ) -> None:
        """``upstreams``: recursive servers, reached from the network's namespace through its join veth."""
        self._kernel = kernel
        self._upstreams = tuple(Upstream(address) for address in upstreams)
        self._domain = domain
        self._services = tuple(services)
        self._port = port
        self._running: dict[NetworkId, _Running] = {}
        self._locks: dict[NetworkId, asyncio.Lock] = {}

    def serving(self, network_id: NetworkId) -> bool:
        """Whether that network's responder has its sockets."""
        return network_id in self._running

    async def update(self, network: Network, endpoints: Iterable[Endpoint], records: Iterable[Record] = ()) -> None:
        """Serve exactly the names of these endpoints (every one of the network, local or not), and ``records``.

        The namespace and its gateway addresses must be there. Raises KernelError when a socket cannot be opened.
        """
        wanted = [*endpoint_records(endpoints, self._domain), *records]
        async with self._locks.setdefault(network.id, asyncio.Lock()):
            running = self._running.get(network.id)
            if running is not None and _served_alike(running.network, network):
                running.view = running.view.updated(wanted)
                running.server.update(running.view)
                return
            if running is not None:
                del self._running[network.id]
                await running.server.close()
            view = View.make(
                network.name,
                domain=self._domain,
                subnets=network.subnets,
                servers=network.gateways,
                forwarded=[f"{name}.{self._domain}" for name in self._services],
                records=wanted,
            )
            server = await self._open(network, view)
            self._running[network.id] = _Running(server, network, view)

    async def remove(self, network_id: NetworkId) -> None:
        """Stop answering for a network; before its namespace is deleted, or the sockets keep it alive."""
        async with self._locks.setdefault(network_id, asyncio.Lock()):
            running = self._running.pop(network_id, None)
            if running is not None:
                await running.server.close()
        if network_id not in self._running:
            self._locks.pop(network_id, None)

    async def close(self) -> None:
        """Stop all."""
        for network_id in list(self._running):
            await self.remove(network_id)

    async def _open(self, network: Network, view: View) -> Server:
        """A server with all its sockets, or none of them."""
        forwarder = Forwarder(self._upstreams, self._opener(network.namespace)) if self._upstreams else None
        server = Server(view, forwarder, observe=_observer(network.name))
        try:
            for gateway in network.gateways:
                server.serve_udp(await self._kernel.udp_socket(network.namespace, gateway, self._port))
                await server.serve_tcp(await self._kernel.tcp_listener(network.namespace, gateway, self._port))
        except BaseException:
            await server.close()
            raise
        log.info("network %s: answering DNS on %s", network.name, ", ".join(map(str, network.gateways)))
        return server

    def _opener(self, namespace: NamespaceName) -> "_Opener":
        return _Opener(self._kernel, namespace)


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


def endpoint_records(endpoints: Iterable[Endpoint], domain: str) -> list[Record]:
    """Names of endpoints (design, section 6).

    A machine: ``<vm>.<ns>.vm.<domain>`` and ``<interface>.<vm>.<ns>.vm.<domain>``, and PTR to the first. Every pod:
    ``<ip-dashed>.<ns>.pod.<domain>``, and PTR to it where no machine is. During a migration both pods of a machine say
    the same, which makes one record.
    """
    found: dict[Record, None] = {}
    pointed: set[IPAddress] = set()
    for endpoint in sorted(endpoints, key=lambda item: (item.machine is None, item.pod)):
        addresses = [item.ip for item in endpoint.addresses]
        names: list[str] = []
        if endpoint.machine is not None:
            machine = f"{endpoint.machine.name}.{endpoint.machine.namespace}.vm.{domain}"
            names += [machine, f"{endpoint.interface}.{machine}"]
        try:
            records = [record for name in names for record in address_records(name, addresses)]
            for address in addresses:
                dashed = f"{str(address).replace('.', '-').replace(':', '-')}.{endpoint.pod.namespace}.pod.{domain}"
                if dashed.startswith("-"):
                    dashed = f"0{dashed}"
                records += address_records(dashed, [address])
                if address not in pointed or endpoint.machine is not None:
                    records += pointer_records(names[0] if names else dashed, [address])
                    pointed.add(address)
        except ValueError as error:
            log.warning("%s/%s has no name in DNS: %s", endpoint.pod.namespace, endpoint.pod.name, error)
            continue
        found.update(dict.fromkeys(records))
    return list(found)


def _served_alike(one: Network, other: Network) -> bool:
    """Whether a change between the two leaves sockets and zones as they are."""
    return (one.namespace, one.name, one.subnets, one.gateways) == (
        other.namespace,
        other.name,
        other.subnets,
        other.gateways,
    )


def _observer(network: str) -> Observe:
    def observe(kind: str, rcode: str, outcome: str) -> None:
        if outcome == "malformed":
            MALFORMED.labels(network, "dns").inc()
        DNS_REQUESTS.labels(network, kind, rcode, outcome).inc()

    return observe
