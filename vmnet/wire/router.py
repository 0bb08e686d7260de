"""What the anycast router advertises to one guest (RFC 4861 section 6.2)."""

from ipaddress import IPv6Address, IPv6Network
from typing import Final

from vmnet.model import addresses
from vmnet.model.network import GATEWAY_LINK_LOCAL
from vmnet.wire import ndp
from vmnet.wire.lease import Lease
from vmnet.wire.ndp import Packet, Prefix, Route, RouterAdvertisement

ROUTER_LIFETIME: Final = 9000
"""Seconds; the most RFC 4861 section 6.2.1 allows. A guest keeps its default route while an agent is away for hours."""
VALID_LIFETIME: Final = 30 * 24 * 3600  # RFC 4861 section 6.2.1, AdvValidLifetime
PREFERRED_LIFETIME: Final = 7 * 24 * 3600  # RFC 4861 section 6.2.1, AdvPreferredLifetime


def advertisement(
    lease: Lease, destination: IPv6Address = ndp.ALL_NODES, lifetime: int = ROUTER_LIFETIME
) -> Packet | None:
    """The advertisement for one guest, None when it has no IPv6 address or nothing of ours is to be said of it.

    Where there is no router it says that there is none, and what DHCPv6 cannot say: that the subnet is on the segment
    (RFC 5942 section 4). ``lifetime`` 0 takes the default route away. It goes to the guest's own MAC, also when the IP
    destination is all nodes (RFC 6085): search names differ between the namespaces that share a network. Addresses come
    from DHCPv6 (M flag); the prefix is on-link, never for autoconfiguration.
    """
    if lease.ipv6 is None:
        return None
    prefixes = (Prefix(lease.ipv6.address.network, valid=VALID_LIFETIME, preferred=PREFERRED_LIFETIME),)
    if lease.ipv6.gateway is None:
        routes = tuple(Route(subnet, ROUTER_LIFETIME) for subnet, _ in lease.routes if isinstance(subnet, IPv6Network))
        if not routes and not lease.on_link:
            return None
        # RFC 4191 section 2.3: a router to these prefixes that is no default router.
        some = RouterAdvertisement(
            0, managed=True, source_link=lease.gateway_mac, mtu=lease.mtu, prefixes=prefixes, routes=routes
        )
        return Packet(lease.gateway_mac, lease.mac, GATEWAY_LINK_LOCAL, destination, some)
    message = RouterAdvertisement(
        lifetime=lifetime,
        managed=True,
        other=True,
        source_link=lease.gateway_mac,
        mtu=lease.mtu,
        prefixes=prefixes,
        dns=(lease.ipv6.gateway,),
        search=lease.search,
        dns_lifetime=ROUTER_LIFETIME,
    )
    return Packet(lease.gateway_mac, lease.mac, GATEWAY_LINK_LOCAL, destination, message)


def farewell(lease: Lease) -> Packet | None:
    """Takes a default router away that a guest may still believe in; None where no router of ours speaks.

    Ours is ``fe80::1`` on every node and on no port may anybody else speak as a router, so a move leaves nothing stale.
    But a guest that a predecessor's network has started, and that came here by a migration, knows the router by the
    address that its MAC makes (RFC 4291 appendix A), and the MAC is ours, by the same convention. In that router's
    name, as RFC 4861 section 6.2.5 has it; who does not know it ignores this (section 6.3.4). Flags are those of
    the true advertisement, for a host takes them from whichever came last.
    """
    if lease.ipv6 is None or lease.ipv6.gateway is None:
        return None
    former = addresses.link_local(lease.gateway_mac)
    message = RouterAdvertisement(lifetime=0, managed=True, other=True, hop_limit=0)
    return Packet(lease.gateway_mac, lease.mac, former, ndp.ALL_NODES, message)
