"""Addresses: parsing, MAC derivation, EUI-64."""

import hashlib
import ipaddress
import re
import socket
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Final

import netaddr

from vmnet.model.names import MacAddress

IPAddress = IPv4Address | IPv6Address
IPInterface = IPv4Interface | IPv6Interface
IPNetwork = IPv4Network | IPv6Network

_NORMAL_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")

TRANSIT_IPV4: Final = IPv4Network("100.88.0.0/16")
TRANSIT_IPV6: Final = IPv6Network("fd97::/64")
"""Where the routers of a network's nodes meet; the same addresses in every network."""


def parse_mac(text: str) -> MacAddress:
    """Normalize any common notation. Raises ValueError."""
    if _NORMAL_MAC.fullmatch(text):
        # Whatever this program has written: a controller that starts reads thousands.
        return MacAddress(text)
    try:
        mac = netaddr.EUI(text, version=48)
    except (netaddr.AddrFormatError, ValueError) as error:
        raise ValueError(f"{text!r} is not a MAC address") from error
    mac.dialect = netaddr.mac_unix_expanded
    return MacAddress(str(mac))


def mac_bytes(mac: MacAddress) -> bytes:
    """The six octets."""
    return bytes.fromhex(mac.replace(":", ""))


def mac_for(address: IPAddress) -> MacAddress:
    """``0a:58:`` + the IPv4 octets; for IPv6 + the first 4 bytes of SHA-256 of the address text (contract)."""
    tail = address.packed if isinstance(address, IPv4Address) else hashlib.sha256(str(address).encode()).digest()[:4]
    return MacAddress("0a:58:" + tail.hex(":"))


def link_local(mac: MacAddress) -> IPv6Address:
    """EUI-64 link-local address of a MAC (RFC 4291 appendix A)."""
    octets = bytearray(mac_bytes(mac))
    octets[0] ^= 0x02
    return IPv6Address(b"\xfe\x80" + bytes(6) + bytes(octets[:3]) + b"\xff\xfe" + bytes(octets[3:]))


def transit(number: int) -> tuple[IPv4Interface, IPv6Interface]:
    """Transit addresses of the node with this number. Raises ValueError when there is no room for it."""
    if not 0 < number < TRANSIT_IPV4.num_addresses - 1:
        raise ValueError(f"node number {number} is not in 1 … {TRANSIT_IPV4.num_addresses - 2}")
    return (
        IPv4Interface((int(TRANSIT_IPV4.network_address) + number, TRANSIT_IPV4.prefixlen)),
        IPv6Interface((int(TRANSIT_IPV6.network_address) + number, TRANSIT_IPV6.prefixlen)),
    )


def address(text: str) -> IPAddress:
    """Parse one address. Raises ValueError."""
    six = ":" in text
    try:
        packed = socket.inet_pton(socket.AF_INET6 if six else socket.AF_INET, text)
    except (OSError, ValueError):
        return ipaddress.ip_address(text)  # with a scope, or its complaint
    return IPv6Address(packed) if six else IPv4Address(packed)


def interface(text: str) -> IPInterface:
    """Parse ``address/prefix``. Raises ValueError."""
    host, slash, length = text.partition("/")
    if slash and length.isdecimal() and len(length) <= 3:
        # What this program has written, in a third of the time: a controller that starts reads thousands.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            number = int.from_bytes(socket.inet_pton(family, host), "big")
        except (OSError, ValueError) as error:
            raise ValueError(f"{text!r} is not an address") from error
        made = IPv6Interface if family == socket.AF_INET6 else IPv4Interface
        return made((number, int(length)))
    return ipaddress.ip_interface(text)


def network(text: str) -> IPNetwork:
    """Parse a CIDR whose host bits are zero. Raises ValueError."""
    return ipaddress.ip_network(text)
