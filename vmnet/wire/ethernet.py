"""Ethernet II frames, and the Internet checksum that what they carry needs."""

from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv6Address
from typing import Final

from vmnet.model.addresses import mac_bytes
from vmnet.model.names import MacAddress
from vmnet.wire.malformed import Malformed

HEADER: Final = 14
MINIMUM: Final = 60
"""Shortest frame without its FCS (IEEE 802.3 clause 3.2.8); shorter ones are padded."""
BROADCAST: Final = MacAddress("ff:ff:ff:ff:ff:ff")


class EtherType(IntEnum):
    """IEEE EtherTypes this package knows."""

    IPV4 = 0x0800
    ARP = 0x0806
    RARP = 0x8035
    IPV6 = 0x86DD


@dataclass(frozen=True, slots=True)
class Ethernet:
    """One frame; ``payload`` may carry padding behind what its own header says."""

    destination: MacAddress
    source: MacAddress
    ethertype: int
    payload: bytes


def encode(destination: MacAddress, source: MacAddress, ethertype: EtherType, payload: bytes) -> bytes:
    """A whole frame, padded to the minimum."""
    frame = mac_bytes(destination) + mac_bytes(source) + ethertype.to_bytes(2, "big") + payload
    return frame.ljust(MINIMUM, b"\0")


def decode(frame: bytes) -> Ethernet:
    """Header and payload. Raises Malformed."""
    if len(frame) < HEADER:
        raise Malformed(f"frame of {len(frame)} octets")
    return Ethernet(mac(frame[:6]), mac(frame[6:12]), int.from_bytes(frame[12:14], "big"), frame[14:])


def mac(octets: bytes) -> MacAddress:
    """Six octets as text."""
    return MacAddress(octets.hex(":"))


def multicast_mac(address: IPv6Address) -> MacAddress:
    """Where an IPv6 multicast goes on Ethernet (RFC 2464 section 7)."""
    return mac(b"\x33\x33" + address.packed[12:])


def checksum(data: bytes) -> int:
    """Internet checksum (RFC 1071): complement of the ones' complement sum of 16-bit words."""
    if len(data) % 2:
        data += b"\0"
    # 2**16 is 1 modulo 0xFFFF, so the number the octets spell is congruent to the sum of its words.
    remainder = int.from_bytes(data, "big") % 0xFFFF
    return 0xFFFF - remainder if remainder else 0
