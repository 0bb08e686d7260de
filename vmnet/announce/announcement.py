"""The frames that tell everyone where a machine is now, built before it moves."""

from dataclasses import dataclass
from enum import StrEnum

from vmnet.model import addresses, names
from vmnet.model.names import InterfaceName
from vmnet.wire import arp, ndp, router
from vmnet.wire.lease import Lease


class Kind(StrEnum):
    """Values of the metric's ``kind`` label."""

    GRATUITOUS_ARP = "garp"
    NEIGHBOR_ADVERTISEMENT = "na"
    ROUTER_ADVERTISEMENT = "ra"
    ROUTER_FAREWELL = "ra_farewell"
    RARP = "rarp"
    GATEWAY_ARP = "gateway_arp"


@dataclass(frozen=True, slots=True)
class Announcement:
    """One frame and the interface of the network namespace it leaves by.

    One that is not repeated leaves with the first and the last round only (RFC 4861 section 10 keeps router
    advertisements 3 s apart).
    """

    kind: Kind
    interface: InterfaceName
    frame: bytes
    repeated: bool = True


def announcements(lease: Lease) -> tuple[Announcement, ...]:
    """Everything one round sends, what moves traffic first. Raises ValueError for search names that DNS cannot carry.

    Peers on other nodes hear it from ``vx0`` itself, because the bridge keeps gratuitous ARP and unsolicited NAs from a
    port with ``neigh_suppress``; peers on this node from ``br0``. The reverse ARP moves FDB entries only, which are
    right on this node already. Frames for the guest are addressed to its own MAC.
    """
    link_local = addresses.link_local(lease.mac)
    found = [Announcement(Kind.RARP, names.VXLAN_L2, arp.encode(arp.reverse_announcement(lease.mac)))]
    for interface in (names.VXLAN_L2, names.BRIDGE):
        if lease.ipv4 is not None:
            address = lease.ipv4.address.ip
            found += [
                Announcement(Kind.GRATUITOUS_ARP, interface, arp.encode(packet))
                for packet in (arp.gratuitous_request(lease.mac, address), arp.gratuitous_reply(lease.mac, address))
            ]
        if lease.ipv6 is not None:
            found += [
                Announcement(
                    Kind.NEIGHBOR_ADVERTISEMENT,
                    interface,
                    ndp.encode(ndp.unsolicited_advertisement(lease.mac, address6)),
                )
                for address6 in (lease.ipv6.address.ip, link_local)
            ]
    return (*found, *_for_guest(lease))


def _for_guest(lease: Lease) -> tuple[Announcement, ...]:
    found: list[Announcement] = []
    if lease.ipv4 is not None and lease.router:
        gateway = arp.reply(lease.gateway_mac, lease.ipv4.gateway, lease.mac, lease.ipv4.address.ip)
        found.append(Announcement(Kind.GATEWAY_ARP, names.BRIDGE, arp.encode(gateway)))
    farewell = router.farewell(lease)
    if farewell is not None:
        found.append(Announcement(Kind.ROUTER_FAREWELL, names.BRIDGE, ndp.encode(farewell), repeated=False))
    # Where no router is, the guest knows since its start all that an advertisement says, and a move changes none of it.
    advertisement = router.advertisement(lease) if lease.router or lease.routes else None
    if advertisement is not None:
        found.append(Announcement(Kind.ROUTER_ADVERTISEMENT, names.BRIDGE, ndp.encode(advertisement), repeated=False))
    return tuple(found)
