"""Addresses: parsing, MAC derivation, EUI-64."""

import hashlib
import ipaddress
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

import netaddr

from vmnet.model.names import MacAddress

IPAddress = IPv4Address | IPv6Address
IPInterface = IPv4Interface | IPv6Interface
IPNetwork = IPv4Network | IPv6Network


def parse_mac(text: str) -> MacAddress:
    """Normalize any common notation. Raises ValueError."""
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
    return MacAddress("0a:58:" + ":".join(f"{byte:02x}" for byte in tail))


def link_local(mac: MacAddress) -> IPv6Address:
    """EUI-64 link-local address of a MAC (RFC 4291 appendix A)."""
    octets = bytearray(mac_bytes(mac))
    octets[0] ^= 0x02
    return IPv6Address(b"\xfe\x80" + bytes(6) + bytes(octets[:3]) + b"\xff\xfe" + bytes(octets[3:]))


def address(text: str) -> IPAddress:
    """Parse one address. Raises ValueError."""
    return ipaddress.ip_address(text)


def interface(text: str) -> IPInterface:
    """Parse ``address/prefix``. Raises ValueError."""
    return ipaddress.ip_interface(text)


def network(text: str) -> IPNetwork:
    """Parse a CIDR whose host bits are zero. Raises ValueError."""
    return ipaddress.ip_network(text)
