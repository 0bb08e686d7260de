"""ARP (RFC 826) and reverse ARP (RFC 903) over Ethernet and IPv4."""

import struct
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address
from typing import Final

from vmnet.model.addresses import mac_bytes
from vmnet.model.names import MacAddress
from vmnet.wire import ethernet
from vmnet.wire.ethernet import BROADCAST, EtherType
from vmnet.wire.malformed import Malformed

_BODY: Final = struct.Struct("!HHBBH6s4s6s4s")
_ETHERNET: Final = 1  # RFC 826, hardware type
_UNKNOWN_MAC: Final = MacAddress("00:00:00:00:00:00")
_UNSPECIFIED: Final = IPv4Address(0)


class Operation(IntEnum):
    """RFC 826, RFC 903."""

    REQUEST = 1
    REPLY = 2
    REVERSE_REQUEST = 3
    REVERSE_REPLY = 4


@dataclass(frozen=True, slots=True)
class Arp:
    """One ARP or RARP packet. ``source`` and ``destination`` are the frame's, which need not match the body."""

    operation: Operation
    sender_mac: MacAddress
    sender: IPv4Address
    target_mac: MacAddress
    target: IPv4Address
    source: MacAddress
    destination: MacAddress = BROADCAST

    @property
    def gratuitous(self) -> bool:
        """An announcement: the sender asks or answers for its own address (RFC 5227 section 3)."""
        plain = self.operation in (Operation.REQUEST, Operation.REPLY)
        return plain and self.sender == self.target != _UNSPECIFIED


def gratuitous_request(mac: MacAddress, address: IPv4Address) -> Arp:
    """ARP announcement: a broadcast request for one's own address (RFC 5227 section 2.3)."""
    return Arp(Operation.REQUEST, mac, address, _UNKNOWN_MAC, address, mac)


def gratuitous_reply(mac: MacAddress, address: IPv4Address) -> Arp:
    """The same as a broadcast reply, for stacks that only believe replies (RFC 5944 section 4.6)."""
    return Arp(Operation.REPLY, mac, address, mac, address, mac)


def reply(mac: MacAddress, address: IPv4Address, to_mac: MacAddress, to: IPv4Address) -> Arp:
    """``address`` is at ``mac``, told to one host alone."""
    return Arp(Operation.REPLY, mac, address, to_mac, to, mac, to_mac)


def reverse_announcement(mac: MacAddress) -> Arp:
    """The RARP request that QEMU broadcasts when a guest resumes: it names no address, it moves FDB entries only."""
    return Arp(Operation.REVERSE_REQUEST, mac, _UNSPECIFIED, mac, _UNSPECIFIED, mac)


def encode(packet: Arp) -> bytes:
    """A whole frame."""
    reverse = packet.operation in (Operation.REVERSE_REQUEST, Operation.REVERSE_REPLY)
    body = _BODY.pack(
        _ETHERNET,
        EtherType.IPV4,
        6,
        4,
        packet.operation,
        mac_bytes(packet.sender_mac),
        packet.sender.packed,
        mac_bytes(packet.target_mac),
        packet.target.packed,
    )
    return ethernet.encode(packet.destination, packet.source, EtherType.RARP if reverse else EtherType.ARP, body)


def decode(frame: bytes) -> Arp:
    """The packet in an ARP or RARP frame. Raises Malformed."""
    outer = ethernet.decode(frame)
    if outer.ethertype not in (EtherType.ARP, EtherType.RARP):
        raise Malformed(f"EtherType {outer.ethertype:#06x} is not ARP")
    if len(outer.payload) < _BODY.size:
        raise Malformed(f"ARP packet of {len(outer.payload)} octets")
    hardware, protocol, hardware_size, protocol_size, code, sender_mac, sender, target_mac, target = _BODY.unpack_from(
        outer.payload
    )
    if (hardware, protocol, hardware_size, protocol_size) != (_ETHERNET, EtherType.IPV4, 6, 4):
        raise Malformed("ARP packet is not for IPv4 over Ethernet")
    try:
        operation = Operation(code)
    except ValueError:
        raise Malformed(f"ARP operation {code}") from None
    return Arp(
        operation,
        ethernet.mac(sender_mac),
        IPv4Address(sender),
        ethernet.mac(target_mac),
        IPv4Address(target),
        outer.source,
        outer.destination,
    )
