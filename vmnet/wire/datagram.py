"""UDP datagrams with everything around them: Ethernet, IPv4 (RFC 791) or IPv6 (RFC 8200), UDP (RFC 768)."""

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from vmnet.model.addresses import IPAddress
from vmnet.model.names import MacAddress
from vmnet.wire import ethernet
from vmnet.wire.ethernet import EtherType, checksum
from vmnet.wire.malformed import Malformed

UDP: Final = 17
HOP_LIMIT: Final = 64
_UDP: Final = struct.Struct("!HHHH")
_IPV4: Final = struct.Struct("!BBHHHBBH4s4s")
_IPV6: Final = struct.Struct("!IHBB16s16s")
_DONT_FRAGMENT: Final = 0x4000  # RFC 791 section 3.1
_FRAGMENT: Final = 0x3FFF  # more-fragments bit and offset


@dataclass(frozen=True, slots=True)
class Datagram:
    """One UDP datagram; both addresses are of the same family."""

    source_mac: MacAddress
    destination_mac: MacAddress
    source: IPAddress
    destination: IPAddress
    source_port: int
    destination_port: int
    payload: bytes


def encode(datagram: Datagram) -> bytes:
    """A whole frame with full checksums. Raises ValueError when the addresses are of two families."""
    size = _UDP.size + len(datagram.payload)
    plain = _UDP.pack(datagram.source_port, datagram.destination_port, size, 0) + datagram.payload
    # A checksum of 0 means "none" in UDP: the other zero of ones' complement is sent (RFC 768, RFC 8200 section 8.1).
    value = checksum(pseudo_header(datagram.source, datagram.destination, UDP, size) + plain) or 0xFFFF
    segment = plain[:6] + value.to_bytes(2, "big") + plain[8:]
    if isinstance(datagram.source, IPv4Address):
        source, destination = datagram.source.packed, datagram.destination.packed
        blank = _IPV4.pack(0x45, 0, _IPV4.size + size, 0, _DONT_FRAGMENT, HOP_LIMIT, UDP, 0, source, destination)
        header = blank[:10] + checksum(blank).to_bytes(2, "big") + blank[12:]
        return ethernet.encode(datagram.destination_mac, datagram.source_mac, EtherType.IPV4, header + segment)
    header = ipv6_header(datagram.source, _ipv6(datagram.destination), UDP, size, HOP_LIMIT)
    return ethernet.encode(datagram.destination_mac, datagram.source_mac, EtherType.IPV6, header + segment)


def decode(frame: bytes) -> Datagram:
    """The UDP datagram in a frame. Raises Malformed.

    Checksums are not verified: those of locally made packets are still unfinished when AF_PACKET shows them (offload).
    """
    outer = ethernet.decode(frame)
    source: IPAddress
    destination: IPAddress
    if outer.ethertype == EtherType.IPV4:
        source, destination, segment = _decode_ipv4(outer.payload)
    elif outer.ethertype == EtherType.IPV6:
        source, destination, protocol, _, segment = decode_ipv6(outer.payload)
        if protocol != UDP:
            raise Malformed(f"IPv6 next header {protocol} is not UDP")
    else:
        raise Malformed(f"EtherType {outer.ethertype:#06x} is not IP")
    if len(segment) < _UDP.size:
        raise Malformed(f"UDP segment of {len(segment)} octets")
    source_port, destination_port, size, _ = _UDP.unpack_from(segment)
    if not _UDP.size <= size <= len(segment):
        raise Malformed(f"UDP length {size} in {len(segment)} octets")
    return Datagram(
        outer.source, outer.destination, source, destination, source_port, destination_port, segment[_UDP.size : size]
    )


def pseudo_header(source: IPAddress, destination: IPAddress, protocol: int, size: int) -> bytes:
    """What UDP and ICMPv6 checksums cover besides the packet (RFC 768, RFC 8200 section 8.1). Raises ValueError."""
    if source.version != destination.version:
        raise ValueError(f"{source} and {destination} are of two families")
    tail = struct.pack("!BBH", 0, protocol, size) if source.version == 4 else struct.pack("!II", size, protocol)
    return source.packed + destination.packed + tail


def ipv6_header(source: IPv6Address, destination: IPv6Address, protocol: int, size: int, hop_limit: int) -> bytes:
    """RFC 8200 section 3; ``size`` octets follow."""
    return _IPV6.pack(6 << 28, size, protocol, hop_limit, source.packed, destination.packed)


def decode_ipv6(packet: bytes) -> tuple[IPv6Address, IPv6Address, int, int, bytes]:
    """Source, destination, next header, hop limit and payload (without padding) of an IPv6 packet. Raises Malformed."""
    if len(packet) < _IPV6.size:
        raise Malformed(f"IPv6 packet of {len(packet)} octets")
    start, size, protocol, hop_limit, source, destination = _IPV6.unpack_from(packet)
    if start >> 28 != 6:
        raise Malformed(f"IP version {start >> 28} in an IPv6 packet")
    if _IPV6.size + size > len(packet):
        raise Malformed(f"IPv6 payload length {size} in a packet of {len(packet)} octets")
    payload = packet[_IPV6.size : _IPV6.size + size]
    return IPv6Address(source), IPv6Address(destination), protocol, hop_limit, payload


def _decode_ipv4(packet: bytes) -> tuple[IPv4Address, IPv4Address, bytes]:
    if len(packet) < _IPV4.size:
        raise Malformed(f"IPv4 packet of {len(packet)} octets")
    first, _, size, _, fragment, _, protocol, _, source, destination = _IPV4.unpack_from(packet)
    header = (first & 0x0F) * 4
    if first >> 4 != 4 or header < _IPV4.size:
        raise Malformed(f"IPv4 version and header length {first:#04x}")
    if not header <= size <= len(packet):
        raise Malformed(f"IPv4 total length {size} in {len(packet)} octets")
    if fragment & _FRAGMENT:
        raise Malformed("IPv4 fragment")
    if protocol != UDP:
        raise Malformed(f"IPv4 protocol {protocol} is not UDP")
    return IPv4Address(source), IPv4Address(destination), packet[header:size]


def _ipv6(address: IPAddress) -> IPv6Address:
    if not isinstance(address, IPv6Address):
        raise ValueError(f"{address} is not an IPv6 address")
    return address
