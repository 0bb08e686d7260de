import json
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role, Topology, divided, from_nad

HAPPY = Network(
    name="cluster_udn_happy-tenant",
    id=NetworkId(7),
    subnets=(ip_network("192.168.0.0/16"), ip_network("fd00:1234::/64")),
    persistent=True,
)


def nad(config: str, number: str = "7") -> dict[str, object]:
    return {"metadata": {"annotations": {"k8s.ovn.org/network-id": number}}, "spec": {"config": config}}


def test_gateway_is_first_and_management_second_usable_address() -> None:
    assert [str(gateway) for gateway in HAPPY.gateways] == ["192.168.0.1", "fd00:1234::1"]
    assert [str(address) for address in HAPPY.management_addresses] == ["192.168.0.2", "fd00:1234::2"]
    assert HAPPY.gateway_mac == "0a:58:c0:a8:00:01"


def test_requested_gateway_moves_management_to_the_first_free_address() -> None:
    network = Network(
        name="n", id=NetworkId(1), subnets=(ip_network("10.0.0.0/24"),), default_gateways=(ip_address("10.0.0.1"),)
    )
    assert network.management_addresses == (ip_address("10.0.0.2"),)
    network = Network(
        name="n", id=NetworkId(1), subnets=(ip_network("10.0.0.0/24"),), default_gateways=(ip_address("10.0.0.9"),)
    )
    assert network.gateways == (ip_address("10.0.0.9"),)
    assert network.management_addresses == (ip_address("10.0.0.1"),)


def test_infrastructure_subnets_hold_gateway_and_management() -> None:
    network = Network(
        name="n",
        id=NetworkId(1),
        subnets=(ip_network("10.0.0.0/16"),),
        infrastructure_subnets=(ip_network("10.0.5.0/30"),),
    )
    assert network.gateways == (ip_address("10.0.5.0"),)
    assert network.management_addresses == (ip_address("10.0.5.1"),)


def test_a_network_survives_its_nad() -> None:
    config = HAPPY.to_nad_config("red-namespace/happy-tenant")
    assert from_nad(nad(config)) == HAPPY
    assert json.loads(config)["netAttachDefName"] == "red-namespace/happy-tenant"


def test_a_foreign_nad_is_not_ours() -> None:
    assert from_nad(nad('{"type": "macvlan"}')) is None


@pytest.mark.parametrize("number", ["", "0", "-1", "x", str(1 << 23)])
def test_a_bad_network_number_is_named(number: str) -> None:
    with pytest.raises(ValueError, match="k8s.ovn.org/network-id"):
        from_nad(nad(HAPPY.to_nad_config("a/b"), number))


def test_mtu_never_exceeds_what_the_underlay_carries() -> None:
    assert HAPPY.effective_mtu(1500, 4) == 1450
    assert HAPPY.effective_mtu(1500, 6) == 1430
    small = Network(name="n", id=NetworkId(1), topology=Topology.LAYER2, role=Role.SECONDARY, mtu=1300)
    assert small.effective_mtu(1500, 4) == 1300
    assert small.effective_mtu(1200, 4) == 1150


def test_a_layer3_network_is_written_with_the_length_of_its_parts() -> None:
    config = (
        '{"type": "vmnet", "name": "blue_blue-network", "topology": "layer3", "role": "primary",'
        ' "subnets": "103.103.0.0/16/24,fd20::/48,203.203.0.0/20/26"}'
    )
    network = from_nad(nad(config))
    assert network is not None
    assert [(str(subnet), host) for subnet, host in zip(network.subnets, network.host_prefixes, strict=True)] == [
        ("103.103.0.0/16", 24),
        ("fd20::/48", 64),
        ("203.203.0.0/20", 26),
    ]
    written = network.to_nad_config("blue/blue-network")
    assert json.loads(written)["subnets"] == "103.103.0.0/16/24,fd20::/48/64,203.203.0.0/20/26"
    assert from_nad(nad(written)) == network


@pytest.mark.parametrize(
    "text", ["103.103.0.0/25", "103.103.0.0/16/8", "103.103.0.0/16/30", "fd20::/64/127", "10.0.0.0/16/x", "10.0.0.1/16"]
)
def test_parts_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        divided(text)


def test_each_node_sees_its_own_part_of_a_layer3_network() -> None:
    subnets = (ip_network("103.103.0.0/16"), ip_network("fd20::/48"))
    network = Network("blue", NetworkId(3), Topology.LAYER3, subnets=subnets, host_prefixes=(24, 64))
    assert network.gateways == ()
    here = network.around((ip_interface("103.103.7.9/24"), ip_interface("fd20:0:0:7::9/64")))
    assert [str(gateway) for gateway in here.gateways] == ["103.103.7.1", "fd20:0:0:7::1"]
    assert [str(address) for address in here.management_addresses] == ["103.103.7.2", "fd20:0:0:7::2"]
    assert here.subnets == subnets
    assert str(here.subnet_for(4)) == "103.103.7.0/24"
    assert here.gateway_mac == network.gateway_mac
    assert here.at(()) == network
    assert HAPPY.at(here.parts) == HAPPY


def test_who_needs_a_way_from_router_to_router() -> None:
    assert HAPPY.routed
    assert not replace(HAPPY, role=Role.SECONDARY).routed
    assert replace(HAPPY, role=Role.SECONDARY, topology=Topology.LAYER3).routed


SWITCHED = replace(HAPPY, role=Role.SECONDARY, name="red_storage")


def test_a_secondary_segment_has_no_gateway_of_ours() -> None:
    assert (SWITCHED.gateways, SWITCHED.management_addresses, SWITCHED.gateway_for(4)) == ((), (), None)
    assert not SWITCHED.routed
    assert SWITCHED.gateway_mac != HAPPY.gateway_mac
    assert SWITCHED.gateway_mac != replace(SWITCHED, name="blue_storage").gateway_mac
    asked = replace(SWITCHED, default_gateways=(ip_address("192.168.9.9"),))
    assert asked.gateways == (ip_address("192.168.9.9"),), "somebody else's, but known"


def test_a_localnet_network_survives_its_nad() -> None:
    network = Network(
        "cluster_udn_lan",
        NetworkId(7),
        Topology.LOCALNET,
        Role.SECONDARY,
        subnets=(ip_network("10.103.0.0/24"),),
        infrastructure_subnets=(ip_network("10.103.0.0/28"),),
        physical="physnet",
        vlan=100,
    )
    config = network.to_nad_config("red/lan")
    assert from_nad(nad(config)) == network
    body = json.loads(config)
    assert (body["physicalNetworkName"], body["vlanID"], body["excludeSubnets"]) == ("physnet", 100, "10.103.0.0/28")
    assert "infrastructureSubnets" not in body
    assert network.effective_mtu(1500, 4) == 1500, "nothing is wrapped around its frames"
