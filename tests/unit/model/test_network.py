import json
from ipaddress import ip_address, ip_network

import pytest

from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role, Topology, from_nad

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
