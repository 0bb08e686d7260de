"""Neighbour discovery for IPv6 (RFC 4861) with DNS in router advertisements (RFC 8106)."""

import struct
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from typing import Final

from vmnet.model.addresses import mac_bytes
from vmnet.model.names import MacAddress
from vmnet.wire import domains, ethernet
from vmnet.wire.datagram import decode_ipv6, ipv6_header, pseudo_header
from vmnet.wire.ethernet import EtherType, checksum
from vmnet.wire.malformed import Malformed

ALL_NODES: Final = IPv6Address("ff02::1")  # RFC 4291 section 2.7.1
ALL_ROUTERS: Final = IPv6Address("ff02::2")  # RFC 4291 section 2.7.1
UNSPECIFIED: Final = IPv6Address(0)
ICMPV6: Final = 58
HOP_LIMIT: Final = 255  # RFC 4861 sections 6.1 and 7.1: proof that no router forwarded it
INFINITE: Final = 0xFFFFFFFF  # RFC 4861 section 4.6.2

ROUTER_SOLICITATION: Final = 133  # RFC 4861 section 4.1
ROUTER_ADVERTISEMENT: Final = 134  # section 4.2
NEIGHBOR_SOLICITATION: Final = 135  # section 4.3
NEIGHBOR_ADVERTISEMENT: Final = 136  # section 4.4

_SOURCE_LINK: Final = 1  # RFC 4861 section 4.6.1
_TARGET_LINK: Final = 2  # section 4.6.1
_PREFIX: Final = 3  # section 4.6.2
_MTU: Final = 5  # section 4.6.4
_ROUTE: Final = 24  # RFC 4191 section 2.3
_RDNSS: Final = 25  # RFC 8106 section 5.1
_DNSSL: Final = 31  # RFC 8106 section 5.2

_MANAGED: Final = 0x80  # RFC 4861 section 4.2
_OTHER: Final = 0x40
_ON_LINK: Final = 0x80  # RFC 4861 section 4.6.2
_AUTONOMOUS: Final = 0x40
_ROUTER: Final = 0x80000000  # RFC 4861 section 4.4
_SOLICITED: Final = 0x40000000
_OVERRIDE: Final = 0x20000000

_ADVERTISEMENT: Final = struct.Struct("!BBHII")
_PREFIX_BODY: Final = struct.Struct("!BBIII16s")
_ROUTE_BODY: Final = struct.Struct("!BBI")


@dataclass(frozen=True, slots=True)
class RouterSolicitation:
    """A host asks for routers."""

    source_link: MacAddress | None = None


@dataclass(frozen=True, slots=True)
class Prefix:
    """Prefix information; lifetimes in seconds (RFC 4861 section 4.6.2)."""

    network: IPv6Network
    on_link: bool = True
    autonomous: bool = False
    valid: int = INFINITE
    preferred: int = INFINITE


@dataclass(frozen=True, slots=True)
class Route:
    """What is reached by the router, of medium preference; ``lifetime`` in seconds (RFC 4191 section 2.3)."""

    network: IPv6Network
    lifetime: int


@dataclass(frozen=True, slots=True)
class RouterAdvertisement:
    """What a router offers. ``lifetime`` in seconds: 0 says that it is no default router (any more).

    ``dns_lifetime`` holds for ``dns`` and ``search`` alike.
    """

    lifetime: int
    managed: bool = False
    other: bool = False
    hop_limit: int = 64
    reachable_ms: int = 0
    retransmit_ms: int = 0
    source_link: MacAddress | None = None
    mtu: int | None = None
    prefixes: tuple[Prefix, ...] = ()
    dns: tuple[IPv6Address, ...] = ()
    search: tuple[str, ...] = ()
    dns_lifetime: int = 0
    routes: tuple[Route, ...] = ()


@dataclass(frozen=True, slots=True)
class NeighborSolicitation:
    """Who has ``target``?"""

    target: IPv6Address
    source_link: MacAddress | None = None


@dataclass(frozen=True, slots=True)
class NeighborAdvertisement:
    """``target`` is at ``target_link``."""

    target: IPv6Address
    target_link: MacAddress | None = None
    router: bool = False
    solicited: bool = False
    override: bool = False


Message = RouterSolicitation | RouterAdvertisement | NeighborSolicitation | NeighborAdvertisement


@dataclass(frozen=True, slots=True)
class Packet:
    """A message and where it comes from and goes to."""

    source_mac: MacAddress
    destination_mac: MacAddress
    source: IPv6Address
    destination: IPv6Address
    message: Message


def unsolicited_advertisement(mac: MacAddress, address: IPv6Address) -> Packet:
    """``address`` is at ``mac`` now, told to all nodes; caches are to take it over (RFC 4861 section 7.2.6)."""
    message = NeighborAdvertisement(address, target_link=mac, override=True)
    return Packet(mac, ethernet.multicast_mac(ALL_NODES), address, ALL_NODES, message)


def encode(packet: Packet) -> bytes:
    """A whole frame with its checksum. Raises ValueError for search names that DNS cannot carry."""
    kind, body = _encode_message(packet.message)
    plain = struct.pack("!BBH", kind, 0, 0) + body
    value = checksum(pseudo_header(packet.source, packet.destination, ICMPV6, len(plain)) + plain)
    icmp = plain[:2] + value.to_bytes(2, "big") + plain[4:]
    header = ipv6_header(packet.source, packet.destination, ICMPV6, len(icmp), HOP_LIMIT)
    return ethernet.encode(packet.destination_mac, packet.source_mac, EtherType.IPV6, header + icmp)


def decode(frame: bytes) -> Packet:
    """The message in a frame, checked as RFC 4861 sections 6.1 and 7.1 ask. Raises Malformed.

    The checksum is not verified: a locally made packet may show an unfinished one at AF_PACKET (offload).
    """
    outer = ethernet.decode(frame)
    if outer.ethertype != EtherType.IPV6:
        raise Malformed(f"EtherType {outer.ethertype:#06x} is not IPv6")
    source, destination, protocol, hop_limit, icmp = decode_ipv6(outer.payload)
    if protocol != ICMPV6:
        raise Malformed(f"IPv6 next header {protocol} is not ICMPv6")
    if hop_limit != HOP_LIMIT:
        raise Malformed(f"hop limit {hop_limit}: the message crossed a router")
    if len(icmp) < 8:
        raise Malformed(f"ICMPv6 message of {len(icmp)} octets")
    if icmp[1]:
        raise Malformed(f"ICMPv6 code {icmp[1]}")
    message = _decode_message(icmp[0], icmp[4:])
    if source == UNSPECIFIED and getattr(message, "source_link", None) is not None:
        raise Malformed("source link-layer address of a sender without an address")
    if isinstance(message, RouterAdvertisement) and not source.is_link_local:
        raise Malformed("router advertisement whose source is not link-local")
    return Packet(outer.source, outer.destination, source, destination, message)


def _encode_message(message: Message) -> tuple[int, bytes]:
    match message:
        case RouterSolicitation():
            return ROUTER_SOLICITATION, bytes(4) + _link(_SOURCE_LINK, message.source_link)
        case NeighborSolicitation():
            body = bytes(4) + message.target.packed + _link(_SOURCE_LINK, message.source_link)
            return NEIGHBOR_SOLICITATION, body
        case NeighborAdvertisement():
            flags = _ROUTER * message.router | _SOLICITED * message.solicited | _OVERRIDE * message.override
            body = flags.to_bytes(4, "big") + message.target.packed + _link(_TARGET_LINK, message.target_link)
            return NEIGHBOR_ADVERTISEMENT, body
        case RouterAdvertisement():
            return ROUTER_ADVERTISEMENT, _encode_advertisement(message)


def _encode_advertisement(message: RouterAdvertisement) -> bytes:
    flags = _MANAGED * message.managed | _OTHER * message.other
    body = _ADVERTISEMENT.pack(message.hop_limit, flags, message.lifetime, message.reachable_ms, message.retransmit_ms)
    body += _link(_SOURCE_LINK, message.source_link)
    if message.mtu is not None:
        body += _option(_MTU, struct.pack("!HI", 0, message.mtu))
    for prefix in message.prefixes:
        bits = _ON_LINK * prefix.on_link | _AUTONOMOUS * prefix.autonomous
        length, start = prefix.network.prefixlen, prefix.network.network_address.packed
        body += _option(_PREFIX, _PREFIX_BODY.pack(length, bits, prefix.valid, prefix.preferred, 0, start))
    for route in message.routes:
        head = _ROUTE_BODY.pack(route.network.prefixlen, 0, route.lifetime)
        body += _option(_ROUTE, head + route.network.network_address.packed)
    if message.dns:
        servers = b"".join(server.packed for server in message.dns)
        body += _option(_RDNSS, struct.pack("!HI", 0, message.dns_lifetime) + servers)
    if message.search:
        names = domains.encode_names(message.search)
        body += _option(_DNSSL, struct.pack("!HI", 0, message.dns_lifetime) + names)
    return body


def _option(kind: int, data: bytes) -> bytes:
    """One option, padded to a multiple of 8 octets (RFC 4861 section 4.6)."""
    units = (2 + len(data) + 7) // 8
    return (bytes([kind, units]) + data).ljust(units * 8, b"\0")


def _link(kind: int, mac: MacAddress | None) -> bytes:
    return b"" if mac is None else _option(kind, mac_bytes(mac))


def _decode_message(kind: int, body: bytes) -> Message:
    """``body`` begins behind the checksum and has at least 4 octets."""
    if kind == ROUTER_SOLICITATION:
        return RouterSolicitation(_decode_link(_decode_options(body[4:]), _SOURCE_LINK))
    if kind == ROUTER_ADVERTISEMENT:
        return _decode_advertisement(body)
    if kind not in (NEIGHBOR_SOLICITATION, NEIGHBOR_ADVERTISEMENT):
        raise Malformed(f"ICMPv6 type {kind} is no neighbour discovery message")
    if len(body) < 20:
        raise Malformed(f"neighbour message of {len(body)} octets")
    target = IPv6Address(body[4:20])
    if target.is_multicast:
        raise Malformed("neighbour message about a multicast address")
    options = _decode_options(body[20:])
    if kind == NEIGHBOR_SOLICITATION:
        return NeighborSolicitation(target, _decode_link(options, _SOURCE_LINK))
    flags = int.from_bytes(body[:4], "big")
    link = _decode_link(options, _TARGET_LINK)
    return NeighborAdvertisement(target, link, bool(flags & _ROUTER), bool(flags & _SOLICITED), bool(flags & _OVERRIDE))


def _decode_advertisement(body: bytes) -> RouterAdvertisement:
    if len(body) < _ADVERTISEMENT.size:
        raise Malformed(f"router advertisement of {len(body)} octets")
    hop_limit, flags, lifetime, reachable, retransmit = _ADVERTISEMENT.unpack_from(body)
    options = _decode_options(body[_ADVERTISEMENT.size :])
    mtu: int | None = None
    prefixes: list[Prefix] = []
    routes: list[Route] = []
    dns: list[IPv6Address] = []
    search: list[str] = []
    dns_lifetime = 0
    for kind, data in options:
        if kind == _MTU:
            if len(data) != 6:
                raise Malformed("MTU option of the wrong size")
            mtu = int.from_bytes(data[2:], "big")
        elif kind == _PREFIX:
            prefixes.append(_decode_prefix(data))
        elif kind == _ROUTE:
            routes.append(_decode_route(data))
        elif kind == _RDNSS:
            if len(data) < 22 or (len(data) - 6) % 16:
                raise Malformed("RDNSS option of the wrong size")
            dns_lifetime = int.from_bytes(data[2:6], "big")
            dns += [IPv6Address(data[offset : offset + 16]) for offset in range(6, len(data), 16)]
        elif kind == _DNSSL:
            if len(data) < 14:
                raise Malformed("DNSSL option of the wrong size")
            dns_lifetime = int.from_bytes(data[2:6], "big")
            search += domains.decode_names(data[6:], padded=True)
    return RouterAdvertisement(
        lifetime=lifetime,
        managed=bool(flags & _MANAGED),
        other=bool(flags & _OTHER),
        hop_limit=hop_limit,
        reachable_ms=reachable,
        retransmit_ms=retransmit,
        source_link=_decode_link(options, _SOURCE_LINK),
        mtu=mtu,
        prefixes=tuple(prefixes),
        dns=tuple(dns),
        search=tuple(search),
        dns_lifetime=dns_lifetime,
        routes=tuple(routes),
    )


def _decode_prefix(data: bytes) -> Prefix:
    if len(data) != _PREFIX_BODY.size:
        raise Malformed("prefix option of the wrong size")
    length, bits, valid, preferred, _, start = _PREFIX_BODY.unpack(data)
    if length > 128:
        raise Malformed(f"prefix length {length}")
    network = IPv6Network((start, length), strict=False)
    return Prefix(network, bool(bits & _ON_LINK), bool(bits & _AUTONOMOUS), valid, preferred)


def _decode_route(data: bytes) -> Route:
    """The prefix may be cut to the octets that its length needs, in steps of eight."""
    if len(data) not in (6, 14, 22):
        raise Malformed("route option of the wrong size")
    length, _, lifetime = _ROUTE_BODY.unpack_from(data)
    if length > (len(data) - 6) * 8:
        raise Malformed(f"route to a prefix of {length} bits in {len(data) - 6} octets")
    return Route(IPv6Network((data[6:].ljust(16, b"\0"), length), strict=False), lifetime)


def _decode_options(data: bytes) -> tuple[tuple[int, bytes], ...]:
    options: list[tuple[int, bytes]] = []
    offset = 0
    while offset < len(data):
        if offset + 2 > len(data):
            raise Malformed("ND option ends early")
        size = data[offset + 1] * 8
        if size == 0 or offset + size > len(data):
            raise Malformed(f"ND option of {size} octets with {len(data) - offset} left")
        options.append((data[offset], data[offset + 2 : offset + size]))
        offset += size
    return tuple(options)


def _decode_link(options: tuple[tuple[int, bytes], ...], kind: int) -> MacAddress | None:
    data = next((value for code, value in options if code == kind), None)
    if data is None:
        return None
    if len(data) != 6:
        raise Malformed("link-layer address is not Ethernet's")
    return ethernet.mac(data)
