"""What the gateway tells the guests of this node: DHCPv4, DHCPv6 and router advertisements, one socket per network."""

import asyncio
import logging
import random
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final

from vmnet.agent import dhcp, router
from vmnet.announce import schedule
from vmnet.announce.schedule import Advertising, Draw
from vmnet.kernel.api import Kernel
from vmnet.model import names
from vmnet.model.endpoint import Endpoint
from vmnet.model.names import MacAddress, NetworkId
from vmnet.model.network import Network
from vmnet.wire import dhcp4, dhcp6, domains
from vmnet.wire.ethernet import EtherType
from vmnet.wire.lease import Lease, lease_of
from vmnet.wire.ndp import ICMPV6

_LOG: Final = logging.getLogger(__name__)
_BATCH = 32
_REST = 0.05
"""After a batch of this many frames a network rests for so many seconds: 640 messages a second are more than its guests
need at once, and a guest that floods delays nothing else on the node by more than one batch."""
_FRAME: Final = 65536
_NEXT_HEADER: Final = 14 + 6  # Ethernet header, then RFC 8200 section 3


@dataclass(slots=True)
class _Segment:
    """One network on this node."""

    network: Network
    packets: socket.socket
    refuge: socket.socket | None
    """Bound to the gateway's DHCP port and never read: without it the kernel would answer renewals, which are unicast
    to that port, with "port unreachable" beside our reply."""
    leases: dict[MacAddress, Lease] = field(default_factory=dict)
    advertising: Advertising | None = None
    rest: asyncio.TimerHandle | None = None

    def close(self) -> None:
        if self.rest is not None:
            self.rest.cancel()
        self.packets.close()
        if self.refuge is not None:
            self.refuge.close()


class GuestServices:
    """Serves the machines of this node. Pods have it all from CNI and would take an advertisement for a second gateway.

    Guests keep their configuration while an agent is away (``wire.lease``, ``wire.router``: lifetimes of hours), so
    closing says nothing to them.
    """

    def __init__(self, kernel: Kernel, cluster_domain: str, *, draw: Draw = random.uniform) -> None:
        """``cluster_domain``: as in ``cluster.local``. Raises ValueError when DNS cannot carry it."""
        domains.encode_name(cluster_domain)
        self._kernel = kernel
        self._cluster_domain = cluster_domain
        self._draw = draw
        self._segments: dict[NetworkId, _Segment] = {}
        self._opening = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None

    async def update(self, network: Network, mtu: int, endpoints: Iterable[Endpoint]) -> None:
        """Serve exactly these local endpoints of a network from now on; ``mtu`` in octets. Raises KernelError.

        Safe to repeat. Guests hear of a change by an advertisement; DHCP tells them when they renew.
        """
        leases = {
            endpoint.mac: lease_of(network, endpoint, mtu, self._cluster_domain)
            for endpoint in endpoints
            if endpoint.machine is not None
        }
        async with self._opening:
            segment = self._segments.get(network.id)
            if segment is not None and segment.network != network:
                self._drop(network.id)
                segment = None
            if segment is None:
                segment = await self._open(network)
        changed = any(segment.leases.get(mac) != lease for mac, lease in leases.items())
        segment.leases = leases
        if not any(router.advertise(lease) for lease in leases.values()):
            segment.advertising = None
        elif changed or segment.advertising is None:
            segment.advertising = schedule.advertising(asyncio.get_running_loop().time())
        self._arm()

    def remove(self, network_id: NetworkId) -> None:
        """Stop serving a network, if it is served. To be called before its namespace is deleted, which an open socket
        would keep alive."""
        self._drop(network_id)
        self._arm()

    def close(self) -> None:
        """Stop serving everything."""
        for network_id in tuple(self._segments):
            self._drop(network_id)
        self._arm()

    async def _open(self, network: Network) -> _Segment:
        packets = await self._kernel.packet_socket(
            network.namespace,
            names.BRIDGE,
            protocols=(EtherType.IPV4, EtherType.IPV6),
            udp_ports=(dhcp4.SERVER_PORT, dhcp6.SERVER_PORT),
        )
        refuge: socket.socket | None = None
        gateway = network.gateway_for(4) if network.routed else None
        try:
            if isinstance(gateway, IPv4Address):
                refuge = await self._kernel.udp_socket(network.namespace, gateway, dhcp4.SERVER_PORT)
                refuge.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # the kernel's minimum: a few packets
        except BaseException:
            packets.close()
            raise
        segment = _Segment(network, packets, refuge)
        self._segments[network.id] = segment
        self._listen(segment)
        return segment

    def _listen(self, segment: _Segment) -> None:
        segment.rest = None
        asyncio.get_running_loop().add_reader(segment.packets, self._receive, segment)

    def _drop(self, network_id: NetworkId) -> None:
        segment = self._segments.pop(network_id, None)
        if segment is not None:
            asyncio.get_running_loop().remove_reader(segment.packets)
            segment.close()

    def _receive(self, segment: _Segment) -> None:
        network = segment.network.name
        for _ in range(_BATCH):
            try:
                frame, address = segment.packets.recvfrom(_FRAME)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._lose(segment, error)
                return
            if address and address[2] == socket.PACKET_OUTGOING:
                continue
            solicitation = frame[12:14] == b"\x86\xdd" and frame[_NEXT_HEADER : _NEXT_HEADER + 1] == ICMPV6.to_bytes(
                1, "big"
            )
            reply = (router if solicitation else dhcp).answer(frame, segment.leases, network)
            if reply is not None and not self._send(segment, reply):
                return
        loop = asyncio.get_running_loop()
        loop.remove_reader(segment.packets)
        segment.rest = loop.call_later(_REST, self._listen, segment)

    def _send(self, segment: _Segment, frame: bytes) -> bool:
        """False when the segment is lost. A frame the queue has no room for is dropped: clients ask again."""
        try:
            segment.packets.send(frame)
        except (BlockingIOError, InterruptedError):
            _LOG.warning("network %s: no room to send to a guest", segment.network.name)
        except OSError as error:
            self._lose(segment, error)
            return False
        return True

    def _lose(self, segment: _Segment, error: OSError) -> None:
        """The bridge went away below the socket; the next update opens another one."""
        _LOG.warning("network %s: guests are not served until the next update: %s", segment.network.name, error)
        self._drop(segment.network.id)
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        times = [segment.advertising.next_at() for segment in self._segments.values() if segment.advertising]
        if times:
            self._timer = asyncio.get_running_loop().call_at(min(times), self._advertise)

    def _advertise(self) -> None:
        now = asyncio.get_running_loop().time()
        for segment in tuple(self._segments.values()):
            if segment.advertising is None or not segment.advertising.due(now):
                continue
            segment.advertising = segment.advertising.after(now, self._draw)
            for lease in segment.leases.values():
                frame = router.advertise(lease)
                if frame is not None and not self._send(segment, frame):
                    break
        self._arm()
