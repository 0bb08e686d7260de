"""The lab's addresses and the lines that make its links."""

import pytest

from vmnet.lab import topology
from vmnet.lab.errors import LabError


def test_the_addresses_are_those_of_the_figure() -> None:
    first, _, third = topology.nodes(3)
    assert (str(first.ipv4), str(first.ipv6)) == ("172.30.0.11", "fd00:30::11")
    assert (str(third.ipv4), str(third.ipv6)) == ("172.30.0.13", "fd00:30::13")
    assert (str(topology.OUTSIDE_HOST.ipv4), str(topology.OUTSIDE_HOST.ipv6)) == ("172.30.0.100", "fd00:30::100")
    assert topology.pod_subnets(third) == ("10.244.3.0/24", "fd00:10:244:3::/64")
    assert str(topology.CLUSTER_DNS) == "10.96.0.10"


def test_all_hosts_differ_and_their_names_fit() -> None:
    hosts = [*topology.nodes(topology.MAX_NODES), topology.OUTSIDE_HOST]
    for field in ("name", "ipv4", "ipv6", "mac", "veth"):
        assert len({getattr(host, field) for host in hosts}) == len(hosts)
    assert all(len(host.veth) <= 15 for host in hosts)


@pytest.mark.parametrize("count", [0, -1, topology.MAX_NODES + 1])
def test_an_impossible_number_of_nodes_is_refused(count: int) -> None:
    with pytest.raises(LabError):
        topology.nodes(count)


def test_outside_has_no_route_into_the_cluster() -> None:
    assert not [line for line in topology.host_batch(topology.OUTSIDE_HOST) if line.startswith("route")]


def test_a_node_reaches_the_pods_of_the_others_only() -> None:
    hosts = topology.nodes(3)
    routes = [line for line in topology.host_batch(hosts[0], hosts) if "10.244" in line or "10:244" in line]
    assert routes == [
        "route add 10.244.2.0/24 via 172.30.0.12",
        "route add fd00:10:244:2::/64 via fd00:30::12",
        "route add 10.244.3.0/24 via 172.30.0.13",
        "route add fd00:10:244:3::/64 via fd00:30::13",
    ]


def test_the_last_node_has_an_ipv6_subnet_within_the_default_network() -> None:
    last = topology.nodes(topology.MAX_NODES)[-1]
    assert topology.pod_subnet_ipv6(last).subnet_of(topology.DEFAULT_POD_NETWORK_IPV6)


def test_pods_have_an_address_of_each_family() -> None:
    (bridge,) = topology.network_configuration(topology.node(2))["plugins"]
    assert bridge["ipam"]["ranges"] == [[{"subnet": "10.244.2.0/24"}], [{"subnet": "fd00:10:244:2::/64"}]]
