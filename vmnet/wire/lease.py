"""What a guest is told about its place in the network, by DHCPv4, DHCPv6 and router advertisement alike."""

import string
import uuid
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import Final

from vmnet.model.addresses import IPAddress, IPNetwork
from vmnet.model.endpoint import Endpoint
from vmnet.model.names import MacAddress
from vmnet.model.network import Network, Role
from vmnet.wire.domains import MAX_LABEL

LEASE_SECONDS: Final = 24 * 3600
"""A guest renews after half of it, so an agent may be away for hours; the address itself never expires."""
RENEW_SECONDS: Final = LEASE_SECONDS // 2  # RFC 2131 section 4.4.5, T1
REBIND_SECONDS: Final = LEASE_SECONDS * 7 // 8  # RFC 2131 section 4.4.5, T2

# Server identity must be the same on every node and after every restart, so it is computed, not stored.
_DUID_NAMESPACE: Final = uuid.UUID("a3f4f6a2-5a0c-5f5e-9d0e-6b1f7f6d3c11")
_LETTERS: Final = frozenset(string.ascii_lowercase + string.digits)
SERVER_IDENTIFIER: Final = IPv4Address("169.254.1.1")
"""The DHCP server's name where no gateway of ours is on the segment (RFC 3927: no other host's). Renewals, which are
unicast to it, fall back to broadcast (RFC 2131 section 4.4.5)."""
_MAX_MTU: Final = 0xFFFF  # RFC 2132 section 5.1: 16 bits
_DUID_UUID: Final = b"\x00\x04"  # RFC 6355 section 4


@dataclass(frozen=True, slots=True)
class LeaseIPv4:
    """``address`` carries the subnet's prefix length; ``gateway`` is the DHCP server, and router and DNS server as well
    where the lease says ``router``."""

    address: IPv4Interface
    gateway: IPv4Address


@dataclass(frozen=True, slots=True)
class LeaseIPv6:
    """``address`` carries the subnet's prefix length; the gateway is the DNS server, None where the lease has no
    ``router``."""

    address: IPv6Interface
    gateway: IPv6Address | None


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
    router: bool = True
    """Whether the machine's default routes and its names are this network's: not on a secondary one."""
    routes: tuple[tuple[IPNetwork, IPAddress], ...] = ()
    """What else is reached by the network, each with its next hop; of use without ``router``."""
    on_link: bool = True
    """Whether it is ours to say that the IPv6 subnet is on the segment: on a physical network its own routers do."""


def lease_of(network: Network, endpoint: Endpoint, mtu: int, cluster_domain: str) -> Lease:
    """The lease of one endpoint; ``mtu`` in octets, as the segment carries it."""
    namespace = endpoint.machine.namespace if endpoint.machine else endpoint.pod.namespace
    domain = cluster_domain.strip(".")
    router = network.role is Role.PRIMARY
    ipv4, gateway_ipv4 = endpoint.ipv4, network.gateway_for(4) if network.routed else SERVER_IDENTIFIER
    ipv6, gateway_ipv6 = endpoint.ipv6, network.gateway_for(6) if router else None
    return Lease(
        mac=endpoint.mac,
        gateway_mac=network.gateway_mac,
        duid=server_duid(network),
        mtu=min(mtu, _MAX_MTU),
        hostname=hostname_of(endpoint),
        domain=f"{namespace}.vm.{domain}",
        search=(f"{namespace}.vm.{domain}", f"vm.{domain}", f"{namespace}.svc.{domain}", f"svc.{domain}", domain),
        ipv4=LeaseIPv4(ipv4, gateway_ipv4) if ipv4 and isinstance(gateway_ipv4, IPv4Address) else None,
        ipv6=LeaseIPv6(ipv6, gateway_ipv6 if isinstance(gateway_ipv6, IPv6Address) else None) if ipv6 else None,
        router=router,
        routes=network.pod_routes,
        on_link=network.overlaid,
    )


def hostname_of(endpoint: Endpoint) -> str:
    """Host name of a guest: what its spec asks for, else the machine's name as far as one label carries it."""
    name = endpoint.hostname or (endpoint.machine.name if endpoint.machine else endpoint.pod.name)
    label = "".join(letter for letter in name.split(".")[0].lower() if letter == "-" or letter in _LETTERS)
    return label[:MAX_LABEL].strip("-")


def server_duid(network: Network) -> bytes:
    """DUID-UUID (RFC 6355) of a network's DHCPv6 server, equal on every node."""
    return _DUID_UUID + uuid.uuid5(_DUID_NAMESPACE, network.name).bytes
