"""Load balancer addresses on the fabric: which node answers for which (pure), and the answering.

As MetalLB in layer 2 mode: of the nodes that could serve a Service, the one that a hash of node and address chooses
answers ARP requests and neighbour solicitations for it, with its own MAC. No host has the address configured: the node
translates what arrives for it (kube-proxy, or vmnet before it). All nodes decide from the same objects by themselves.
"""

import asyncio
import contextlib
import hashlib
import logging
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from vmnet.kernel.packets import Instruction, attach_filter
from vmnet.kube.api import Object, object_key
from vmnet.kube.conditions import find_condition
from vmnet.lab.proxy.services import load_balancer_addresses, service_ports
from vmnet.model.names import MacAddress
from vmnet.wire import arp, ethernet, ndp
from vmnet.wire.malformed import Malformed

log = logging.getLogger(__name__)

Address = IPv4Address | IPv6Address

_ETH_P_ALL: Final = 0x0003
_ACCEPT: Final = 0xFFFFFFFF
_REQUESTS: Final[tuple[Instruction, ...]] = (
    (0x28, 0, 0, 12),  # EtherType
    (0x15, 5, 0, 0x0806),  # ARP: accept
    (0x15, 0, 5, 0x86DD),  # not IPv6: drop
    (0x30, 0, 0, 20),  # next header
    (0x15, 0, 3, ndp.ICMPV6),
    (0x30, 0, 0, 54),  # ICMPv6 type
    (0x15, 0, 1, ndp.NEIGHBOR_SOLICITATION),
    (0x06, 0, 0, _ACCEPT),
    (0x06, 0, 0, 0),
)


def announced(
    services: Iterable[Object], slices: Iterable[Object], nodes: Iterable[Object], me: str
) -> frozenset[Address]:
    """The addresses that node ``me`` answers for.

    With ``externalTrafficPolicy: Local`` it has a ready endpoint of the Service; with Cluster any node will do."""
    services, slices = list(services), list(slices)
    alive = sorted(object_key(node) for node in nodes if _is_ready(node))
    serving: dict[str, set[str]] = {}
    for port in service_ports(services, slices):
        serving.setdefault(port.service, set()).update(backend.node for backend in port.backends)
    found = set()
    for service in services:
        local = service["spec"].get("externalTrafficPolicy") == "Local"
        able = [node for node in alive if not local or node in serving.get(object_key(service), set())]
        for text in load_balancer_addresses(service):
            if able and min(able, key=lambda node: _weight(node, text)) == me:
                found.add(ip_address(text))
    return frozenset(found)


def _weight(node: str, address: str) -> bytes:
    return hashlib.sha256(f"{node}#{address}".encode()).digest()


def _is_ready(node: Object) -> bool:
    found = find_condition((node.get("status") or {}).get("conditions"), "Ready")
    return found is not None and found["status"] == "True"


@dataclass(frozen=True, slots=True)
class Interface:
    """Where the addresses are answered for."""

    name: str
    mac: MacAddress


def answer(frame: bytes, addresses: frozenset[Address], mac: MacAddress) -> bytes | None:
    """The reply to a request for one of ``addresses``; None for any other frame."""
    try:
        if frame[12:14] == b"\x08\x06":
            request = arp.decode(frame)
            if request.operation is not arp.Operation.REQUEST or request.target not in addresses:
                return None
            return arp.encode(arp.reply(mac, request.target, request.sender_mac, request.sender))
        packet = ndp.decode(frame)
    except Malformed:
        return None
    message = packet.message
    if not isinstance(message, ndp.NeighborSolicitation) or message.target not in addresses:
        return None
    reply = ndp.NeighborAdvertisement(message.target, target_link=mac, router=True, override=True)
    if packet.source == ndp.UNSPECIFIED:  # duplicate address detection (RFC 4861 section 7.2.4)
        everyone = ethernet.multicast_mac(ndp.ALL_NODES)
        return ndp.encode(ndp.Packet(mac, everyone, message.target, ndp.ALL_NODES, reply))
    told = ndp.NeighborAdvertisement(message.target, target_link=mac, router=True, solicited=True, override=True)
    return ndp.encode(ndp.Packet(mac, packet.source_mac, message.target, packet.source, told))


def announcement(address: Address, mac: MacAddress) -> bytes:
    """What tells everybody that the address is here now."""
    if isinstance(address, IPv4Address):
        return arp.encode(arp.gratuitous_request(mac, address))
    return ndp.encode(ndp.unsolicited_advertisement(mac, address))


class Announcer:
    """Answers on one interface for ``addresses``, which ``answer_for`` replaces. Belongs to one event loop."""

    def __init__(self, interface: Interface) -> None:
        self._interface = interface
        self._addresses: frozenset[Address] = frozenset()
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        attach_filter(opened, _REQUESTS)
        opened.bind((interface.name, _ETH_P_ALL))
        self._socket = opened

    def answer_for(self, addresses: frozenset[Address]) -> None:
        """From now on; those that are new are announced."""
        new, self._addresses = addresses - self._addresses, addresses
        for address in sorted(new, key=str):
            log.info("answering for %s on %s", address, self._interface.name)
            self._send(announcement(address, self._interface.mac))

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket, self._readable)
        try:
            await asyncio.Event().wait()
        finally:
            loop.remove_reader(self._socket)
            self._socket.close()

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, address = self._socket.recvfrom(2048)
                if address[2] == socket.PACKET_OUTGOING:
                    continue
                reply = answer(frame, self._addresses, self._interface.mac)
                if reply is not None:
                    self._send(reply)

    def _send(self, frame: bytes) -> None:
        try:
            self._socket.send(frame)
        except OSError as error:
            log.warning("%s: %s", self._interface.name, error)
