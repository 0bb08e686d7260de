"""Leases: what an endpoint of a network is told."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_interface, ip_network

import pytest

from vmnet.model.endpoint import Endpoint, MachineReference, PodReference
from vmnet.model.names import MacAddress, NetworkId
from vmnet.model.network import Network, Role, Topology
from vmnet.wire.lease import (
    REBIND_SECONDS,
    RENEW_SECONDS,
    SERVER_IDENTIFIER,
    LeaseIPv4,
    LeaseIPv6,
    hostname_of,
    lease_of,
    server_duid,
)

NETWORK = Network("cluster_udn_happy", NetworkId(7), subnets=(ip_network("192.168.0.0/16"), ip_network("fd00:7::/64")))
ENDPOINT = Endpoint(
    PodReference("blue-ns", "virt-launcher-blue-abcde", "uid"),
    NETWORK.name,
    "n1",
    MacAddress("0a:58:c0:a8:00:05"),
    (ip_interface("192.168.0.5/16"), ip_interface("fd00:7::5/64")),
    machine=MachineReference("blue-ns", "blue"),
)


def test_both_families() -> None:
    lease = lease_of(NETWORK, ENDPOINT, 1400, "cluster.local")
    assert lease.ipv4 == LeaseIPv4(ip_interface("192.168.0.5/16"), IPv4Address("192.168.0.1"))
    assert lease.ipv6 == LeaseIPv6(ip_interface("fd00:7::5/64"), IPv6Address("fd00:7::1"))
    assert lease.gateway_mac == "0a:58:c0:a8:00:01"
    assert (lease.hostname, lease.domain) == ("blue", "blue-ns.vm.cluster.local")
    assert lease.search == (
        "blue-ns.vm.cluster.local",
        "vm.cluster.local",
        "blue-ns.svc.cluster.local",
        "svc.cluster.local",
        "cluster.local",
    )


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_the_lease_is_the_same_wherever_the_machine_is(node: str) -> None:
    moved = replace(ENDPOINT, node=node, pod=PodReference("blue-ns", f"virt-launcher-{node}", f"uid-{node}"))
    assert lease_of(NETWORK, moved, 1400, "cluster.local") == lease_of(NETWORK, ENDPOINT, 1400, "cluster.local")


def test_one_family_of_two() -> None:
    only4 = replace(ENDPOINT, addresses=ENDPOINT.addresses[:1])
    assert lease_of(NETWORK, only4, 1400, "cluster.local").ipv6 is None
    network = replace(NETWORK, subnets=NETWORK.subnets[1:])
    assert lease_of(network, ENDPOINT, 1400, "cluster.local").ipv4 is None


def test_the_gateway_of_a_layer3_network_is_that_of_the_node_s_part() -> None:
    ranges = (ip_network("192.168.0.0/16"), ip_network("fd00:7::/48"))
    whole = replace(NETWORK, topology=Topology.LAYER3, subnets=ranges, host_prefixes=(24, 64))
    there = replace(ENDPOINT, addresses=(ip_interface("192.168.4.5/24"), ip_interface("fd00:7:0:4::5/64")))
    lease = lease_of(whole.around(there.addresses), there, 1400, "cluster.local")
    assert lease.ipv4 == LeaseIPv4(ip_interface("192.168.4.5/24"), IPv4Address("192.168.4.1"))
    assert lease.ipv6 == LeaseIPv6(ip_interface("fd00:7:0:4::5/64"), IPv6Address("fd00:7:0:4::1"))
    assert lease.routes == ()
    secondary = replace(whole.around(there.addresses), role=Role.SECONDARY)
    assert lease_of(secondary, there, 1400, "cluster.local").routes == tuple(
        zip(ranges, (IPv4Address("192.168.4.1"), IPv6Address("fd00:7:0:4::1")), strict=True)
    )


@pytest.mark.parametrize(
    ("hostname", "machine", "expected"),
    [
        ("", "blue", "blue"),
        ("web", "blue", "web"),
        ("", "blue.with.dots", "blue"),
        ("", "a" * 62 + "-" + "b" * 40, "a" * 62),
        ("Ünder_Web", "blue", "nderweb"),
    ],
)
def test_host_names_fit_a_label(hostname: str, machine: str, expected: str) -> None:
    assert hostname_of(replace(ENDPOINT, hostname=hostname, machine=MachineReference("blue-ns", machine))) == expected


def test_the_server_identifier_belongs_to_the_network() -> None:
    assert server_duid(NETWORK) == server_duid(replace(NETWORK, id=NetworkId(8)))
    assert server_duid(NETWORK) != server_duid(replace(NETWORK, name="cluster_udn_other"))
    assert server_duid(NETWORK).hex() == "00043d4e081755425665af95ad851fdddd7c"


def test_an_agent_may_be_away_for_an_hour() -> None:
    assert RENEW_SECONDS >= 3600
    assert REBIND_SECONDS - RENEW_SECONDS >= 3600


def test_a_great_mtu_fits_its_option() -> None:
    assert lease_of(NETWORK, ENDPOINT, 65536, "cluster.local").mtu == 65535


def test_a_secondary_segment_offers_neither_router_nor_names() -> None:
    lease = lease_of(replace(NETWORK, role=Role.SECONDARY), ENDPOINT, 1400, "cluster.local")
    assert not lease.router
    assert lease.ipv4 == LeaseIPv4(ip_interface("192.168.0.5/16"), SERVER_IDENTIFIER)
    assert lease.ipv6 == LeaseIPv6(ip_interface("fd00:7::5/64"), None)
    bare = replace(ENDPOINT, addresses=())
    lease = lease_of(replace(NETWORK, role=Role.SECONDARY, subnets=()), bare, 1400, "cluster.local")
    assert (lease.ipv4, lease.ipv6) == (None, None)
