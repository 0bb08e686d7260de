"""The router advertisement of a lease."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_interface

from vmnet.model.names import MacAddress
from vmnet.wire import ndp, router
from vmnet.wire.lease import Lease, LeaseIPv6
from vmnet.wire.ndp import Prefix, Route, RouterAdvertisement

LEASE = Lease(
    mac=MacAddress("0a:58:c0:a8:00:05"),
    gateway_mac=MacAddress("0a:58:c0:a8:00:01"),
    duid=b"",
    mtu=1400,
    hostname="blue",
    domain="blue-ns.vm.cluster.local",
    search=("blue-ns.vm.cluster.local", "cluster.local"),
    ipv6=LeaseIPv6(ip_interface("fd00:7::5/64"), IPv6Address("fd00:7::1")),
)


def test_it_points_to_dhcp_and_tells_the_rest() -> None:
    packet = router.advertisement(LEASE)
    assert packet is not None
    assert (packet.source_mac, packet.destination_mac) == (LEASE.gateway_mac, LEASE.mac)
    assert (packet.source, packet.destination) == (IPv6Address("fe80::1"), ndp.ALL_NODES)
    message = packet.message
    assert isinstance(message, RouterAdvertisement)
    assert (message.managed, message.other, message.mtu, message.source_link) == (True, True, 1400, LEASE.gateway_mac)
    assert message.prefixes == (
        Prefix(IPv6Network("fd00:7::/64"), on_link=True, autonomous=False, valid=2592000, preferred=604800),
    )
    assert (message.dns, message.search) == ((IPv6Address("fd00:7::1"),), LEASE.search)
    assert message.dns_lifetime == message.lifetime
    assert 3600 < message.lifetime <= 9000, "outlives an agent that is away for an hour; RFC 4861 allows no more"
    assert ndp.decode(ndp.encode(packet)) == packet


def test_a_router_can_take_itself_back() -> None:
    packet = router.advertisement(LEASE, lifetime=0)
    assert packet is not None
    assert isinstance(packet.message, RouterAdvertisement)
    assert packet.message.lifetime == 0


def test_without_ipv6_there_is_nothing_to_say() -> None:
    assert router.advertisement(replace(LEASE, ipv6=None)) is None


def test_a_router_of_a_secondary_network_leads_to_its_subnets_alone() -> None:
    address = LeaseIPv6(ip_interface("fd20:0:0:4::5/64"), None)
    routes = (
        (IPv4Network("203.203.0.0/16"), IPv4Address("203.203.4.1")),
        (IPv6Network("fd20::/48"), IPv6Address("fd20:0:0:4::1")),
    )
    packet = router.advertisement(replace(LEASE, ipv6=address, router=False, routes=routes))
    assert packet is not None
    message = packet.message
    assert isinstance(message, RouterAdvertisement)
    assert (message.lifetime, message.managed, message.dns, message.search) == (0, True, (), ())
    assert [prefix.network for prefix in message.prefixes] == [IPv6Network("fd20:0:0:4::/64")]
    assert message.routes == (Route(IPv6Network("fd20::/48"), 9000),)


def test_where_no_router_is_guests_hear_that_their_subnet_is_on_the_segment() -> None:
    assert LEASE.ipv6 is not None
    switched = replace(LEASE, router=False, ipv6=replace(LEASE.ipv6, gateway=None))
    packet = router.advertisement(switched)
    assert packet is not None
    message = packet.message
    assert isinstance(message, RouterAdvertisement)
    assert (message.lifetime, message.routes, message.dns, message.search) == (0, (), (), ())
    assert message.prefixes == (
        Prefix(IPv6Network("fd00:7::/64"), on_link=True, autonomous=False, valid=2592000, preferred=604800),
    )
    physical = replace(switched, on_link=False)
    assert router.advertisement(physical) is None, "a physical network's routers say it, if it is so"
