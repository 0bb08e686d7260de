"""What a guest is told about its place in the network, by DHCPv4, DHCPv6 and router advertisement alike."""

import string
import uuid
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import Final

from vmnet.model.endpoint import Endpoint
from vmnet.model.names import MacAddress
from vmnet.model.network import Network
from vmnet.wire.domains import MAX_LABEL

LEASE_SECONDS: Final = 24 * 3600
"""A guest renews after half of it, so an agent may be away for hours; the address itself never expires."""
RENEW_SECONDS: Final = LEASE_SECONDS // 2  # RFC 2131 section 4.4.5, T1
REBIND_SECONDS: Final = LEASE_SECONDS * 7 // 8  # RFC 2131 section 4.4.5, T2

# Server identity must be the same on every node and after every restart, so it is computed, not stored.
_DUID_NAMESPACE: Final = uuid.UUID("a3f4f6a2-5a0c-5f5e-9d0e-6b1f7f6d3c11")
_LETTERS: Final = frozenset(string.ascii_lowercase + string.digits)
_MAX_MTU: Final = 0xFFFF  # RFC 2132 section 5.1: 16 bits
_DUID_UUID: Final = b"\x00\x04"  # RFC 6355 section 4


@dataclass(frozen=True, slots=True)
class LeaseIPv4:
    """``address`` carries the subnet's prefix length; the gateway is router, DNS server and DHCP server."""

    address: IPv4Interface
    gateway: IPv4Address


@dataclass(frozen=True, slots=True)
class LeaseIPv6:
    """``address`` carries the subnet's prefix length; the gateway is the DNS server."""

    address: IPv6Interface
    gateway: IPv6Address


@dataclass(frozen=True, slots=True)
class Lease:
    """One endpoint's configuration, equal on every node. A family that the endpoint or the network lacks is None."""

    mac: MacAddress
    gateway_mac: MacAddress
    duid: bytes
    """The DHCPv6 server's identifier."""
    mtu: int
    hostname: str
    domain: str
    search: tuple[str, ...]
    ipv4: LeaseIPv4 | None = None
    ipv6: LeaseIPv6 | None = None


def lease_of(network: Network, endpoint: Endpoint, mtu: int, cluster_domain: str) -> Lease:
    """The lease of one endpoint; ``mtu`` in octets, as the segment carries it."""
    namespace = endpoint.machine.namespace if endpoint.machine else endpoint.pod.namespace
    domain = cluster_domain.strip(".")
    ipv4, gateway_ipv4 = endpoint.ipv4, network.gateway_for(4)
    ipv6, gateway_ipv6 = endpoint.ipv6, network.gateway_for(6)
    return Lease(
        mac=endpoint.mac,
        gateway_mac=network.gateway_mac,
        duid=server_duid(network),
        mtu=min(mtu, _MAX_MTU),
        hostname=hostname_of(endpoint),
        domain=f"{namespace}.vm.{domain}",
        search=(f"{namespace}.vm.{domain}", f"vm.{domain}", f"{namespace}.svc.{domain}", f"svc.{domain}", domain),
        ipv4=LeaseIPv4(ipv4, gateway_ipv4) if ipv4 and isinstance(gateway_ipv4, IPv4Address) else None,
        ipv6=LeaseIPv6(ipv6, gateway_ipv6) if ipv6 and isinstance(gateway_ipv6, IPv6Address) else None,
    )


def hostname_of(endpoint: Endpoint) -> str:
    """Host name of a guest: what its spec asks for, else the machine's name as far as one label carries it."""
    name = endpoint.hostname or (endpoint.machine.name if endpoint.machine else endpoint.pod.name)
    label = "".join(letter for letter in name.split(".")[0].lower() if letter == "-" or letter in _LETTERS)
    return label[:MAX_LABEL].strip("-")


def server_duid(network: Network) -> bytes:
    """DUID-UUID (RFC 6355) of a network's DHCPv6 server, equal on every node."""
    return _DUID_UUID + uuid.uuid5(_DUID_NAMESPACE, network.name).bytes
