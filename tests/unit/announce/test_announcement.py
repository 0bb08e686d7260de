"""Which frames announce a machine, and by which interface they leave."""

from collections import Counter
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_interface

from vmnet.announce.announcement import Kind, announcements
from vmnet.model import addresses, names
from vmnet.model.names import MacAddress
from vmnet.wire import arp, ndp
from vmnet.wire.arp import Operation
from vmnet.wire.lease import Lease, LeaseIPv4, LeaseIPv6
from vmnet.wire.ndp import NeighborAdvertisement, RouterAdvertisement

MAC = MacAddress("0a:58:c0:a8:00:05")
GATEWAY_MAC = MacAddress("0a:58:c0:a8:00:01")
ADDRESS, GATEWAY = IPv4Address("192.168.0.5"), IPv4Address("192.168.0.1")
ADDRESS6 = IPv6Address("fd00:7::5")
LEASE = Lease(
    mac=MAC,
    gateway_mac=GATEWAY_MAC,
    duid=b"",
    mtu=1400,
    hostname="blue",
    domain="blue-ns.vm.cluster.local",
    search=("blue-ns.vm.cluster.local", "cluster.local"),
    ipv4=LeaseIPv4(ip_interface("192.168.0.5/16"), GATEWAY),
    ipv6=LeaseIPv6(ip_interface("fd00:7::5/64"), IPv6Address("fd00:7::1")),
)


def test_both_families_to_the_fabric_the_bridge_and_the_guest() -> None:
    found = Counter((item.kind, item.interface) for item in announcements(LEASE))
    assert found == {
        (Kind.RARP, names.VXLAN_L2): 1,
        (Kind.GRATUITOUS_ARP, names.VXLAN_L2): 2,
        (Kind.GRATUITOUS_ARP, names.BRIDGE): 2,
        (Kind.NEIGHBOR_ADVERTISEMENT, names.VXLAN_L2): 2,
        (Kind.NEIGHBOR_ADVERTISEMENT, names.BRIDGE): 2,
        (Kind.GATEWAY_ARP, names.BRIDGE): 1,
        (Kind.ROUTER_FAREWELL, names.BRIDGE): 1,
        (Kind.ROUTER_ADVERTISEMENT, names.BRIDGE): 1,
    }


def test_the_frame_that_moves_traffic_goes_first() -> None:
    assert announcements(LEASE)[0].kind == Kind.RARP


def test_peers_hear_the_machine_itself() -> None:
    operations = set()
    advertised = set()
    for item in announcements(LEASE):
        if item.kind in (Kind.GRATUITOUS_ARP, Kind.RARP):
            packet = arp.decode(item.frame)
            assert (packet.source, packet.sender_mac, packet.destination) == (MAC, MAC, "ff:ff:ff:ff:ff:ff")
            assert packet.gratuitous == (item.kind == Kind.GRATUITOUS_ARP)
            operations.add(packet.operation)
        elif item.kind == Kind.NEIGHBOR_ADVERTISEMENT:
            advertisement = ndp.decode(item.frame)
            assert (advertisement.source_mac, advertisement.destination) == (MAC, ndp.ALL_NODES)
            assert isinstance(advertisement.message, NeighborAdvertisement)
            assert (advertisement.message.override, advertisement.message.solicited) == (True, False)
            assert advertisement.message.target_link == MAC
            advertised.add(advertisement.message.target)
    assert operations == {Operation.REQUEST, Operation.REPLY, Operation.REVERSE_REQUEST}
    assert advertised == {ADDRESS6, addresses.link_local(MAC)}


def test_the_guest_hears_its_gateway_alone_and_not_every_round() -> None:
    [gateway] = [item for item in announcements(LEASE) if item.kind == Kind.GATEWAY_ARP]
    packet = arp.decode(gateway.frame)
    assert (packet.sender, packet.sender_mac, packet.source) == (GATEWAY, GATEWAY_MAC, GATEWAY_MAC)
    assert (packet.target, packet.destination) == (ADDRESS, MAC)
    [router] = [item for item in announcements(LEASE) if item.kind == Kind.ROUTER_ADVERTISEMENT]
    advertisement = ndp.decode(router.frame)
    assert (advertisement.source, advertisement.destination_mac) == (IPv6Address("fe80::1"), MAC)
    assert isinstance(advertisement.message, RouterAdvertisement)
    assert not router.repeated
    assert {item.kind for item in announcements(LEASE) if not item.repeated} == {
        Kind.ROUTER_ADVERTISEMENT,
        Kind.ROUTER_FAREWELL,
    }


def test_a_predecessor_s_router_is_taken_back_before_ours_speaks() -> None:
    found = [item for item in announcements(LEASE) if item.kind in (Kind.ROUTER_FAREWELL, Kind.ROUTER_ADVERTISEMENT)]
    former, ours = (ndp.decode(item.frame) for item in found)
    assert (former.source, former.source_mac) == (IPv6Address("fe80::858:c0ff:fea8:1"), GATEWAY_MAC)
    assert former.destination_mac == MAC
    assert isinstance(former.message, RouterAdvertisement)
    assert isinstance(ours.message, RouterAdvertisement)
    assert (former.message.lifetime, former.message.prefixes, former.message.dns) == (0, (), ())
    assert ours.message.lifetime > 0
    assert (former.message.managed, former.message.other) == (ours.message.managed, ours.message.other)


def test_a_family_that_is_not_there_is_not_announced() -> None:
    only4 = {item.kind for item in announcements(replace(LEASE, ipv6=None))}
    assert only4 == {Kind.RARP, Kind.GRATUITOUS_ARP, Kind.GATEWAY_ARP}
    only6 = {item.kind for item in announcements(replace(LEASE, ipv4=None))}
    assert only6 == {Kind.RARP, Kind.NEIGHBOR_ADVERTISEMENT, Kind.ROUTER_ADVERTISEMENT, Kind.ROUTER_FAREWELL}


def test_a_machine_on_a_segment_without_a_router_hears_of_none() -> None:
    assert LEASE.ipv6 is not None
    secondary = replace(LEASE, router=False, ipv6=replace(LEASE.ipv6, gateway=None))
    kinds = {item.kind for item in announcements(secondary)}
    assert kinds.isdisjoint({Kind.GATEWAY_ARP, Kind.ROUTER_ADVERTISEMENT, Kind.ROUTER_FAREWELL})
    assert Kind.NEIGHBOR_ADVERTISEMENT in kinds
