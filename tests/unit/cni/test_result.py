"""Results: a previous result of Debian's bridge plugin (recorded), extended as contract.md says."""

import copy
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest

from vmnet.cni import result
from vmnet.cni.result import ResultAddress, ResultInterface, ResultRoute

NETNS = "/run/netns/x"
# Printed by containernetworking-plugins 1.1.1 of Debian 12 for {"isDefaultGateway": true, "ipam": host-local}.
BRIDGE: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "interfaces": [
        {"name": "cni0", "mac": "32:63:03:e1:bd:17"},
        {"name": "veth31d376f3", "mac": "9e:3a:f2:8c:06:3d"},
        {"name": "eth0", "mac": "8a:12:27:63:77:2d", "sandbox": NETNS},
    ],
    "ips": [{"interface": 2, "address": "10.244.1.2/24", "gateway": "10.244.1.1"}],
    "routes": [{"dst": "0.0.0.0/0", "gw": "10.244.1.1"}, {"dst": "10.96.0.0/16"}],
    "dns": {"nameservers": ["10.96.0.10"]},
}
PRIMARY = ResultInterface(
    name="ovn-udn1",
    mac="0a:58:c0:a8:00:05",
    sandbox=NETNS,
    mtu=1450,
    addresses=(
        ResultAddress(ip_interface("192.168.0.5/16"), ip_address("192.168.0.1")),
        ResultAddress(ip_interface("fd00:1::5/64"), ip_address("fd00:1::1")),
    ),
    routes=(ResultRoute(ip_network("0.0.0.0/0"), ip_address("192.168.0.1")),),
)


def test_the_primary_network_takes_the_gateway_from_the_default_one() -> None:
    found = result.extend(BRIDGE, PRIMARY, "1.0.0")
    assert [item["name"] for item in found["interfaces"]] == ["cni0", "veth31d376f3", "eth0", "ovn-udn1"]
    assert found["ips"] == [
        {"address": "10.244.1.2/24", "interface": 2},
        {"address": "192.168.0.5/16", "interface": 3, "gateway": "192.168.0.1"},
        {"address": "fd00:1::5/64", "interface": 3, "gateway": "fd00:1::1"},
    ]
    assert found["routes"] == [{"dst": "10.96.0.0/16"}, {"dst": "0.0.0.0/0", "gw": "192.168.0.1"}]
    assert found["dns"] == BRIDGE["dns"]


def test_the_previous_result_is_not_changed() -> None:
    before = copy.deepcopy(BRIDGE)
    result.extend(BRIDGE, PRIMARY, "1.0.0")
    assert before == BRIDGE


def test_a_secondary_network_leaves_the_default_one_alone() -> None:
    secondary = ResultInterface(
        "net1", "0a:58:0a:00:00:05", NETNS, 1450, (ResultAddress(ip_interface("10.0.0.5/24")),), primary=False
    )
    found = result.extend(BRIDGE, secondary, "1.0.0")
    assert found["ips"][0]["gateway"] == "10.244.1.1"
    assert {"dst": "0.0.0.0/0", "gw": "10.244.1.1"} in found["routes"]


def test_a_repeated_add_gives_the_same_result() -> None:
    once = result.extend(BRIDGE, PRIMARY, "1.0.0")
    assert result.extend(once, PRIMARY, "1.0.0") == once


def test_indices_follow_their_interface_when_an_older_one_is_replaced() -> None:
    previous = {
        "interfaces": [{"name": "ovn-udn1", "sandbox": NETNS}, {"name": "eth0", "sandbox": NETNS}],
        "ips": [{"interface": 0, "address": "1.1.1.1/8"}, {"interface": 1, "address": "10.244.1.2/24"}],
    }
    found = result.extend(previous, PRIMARY, "1.0.0")
    assert [item["name"] for item in found["interfaces"]] == ["eth0", "ovn-udn1"]
    assert found["ips"][0] == {"address": "10.244.1.2/24", "interface": 0}
    assert "1.1.1.1/8" not in str(found)


def test_the_default_interface_comes_first_and_gets_addresses_without_one() -> None:
    previous = {
        "interfaces": [{"name": "net9", "sandbox": NETNS}, {"name": "eth0", "sandbox": NETNS}],
        "ips": [{"interface": 0, "address": "9.9.9.9/8"}, {"address": "10.244.1.2/24"}],
    }
    found = result.extend(previous, PRIMARY, "1.0.0")
    assert [(item["address"], item["interface"]) for item in found["ips"][:2]] == [
        ("10.244.1.2/24", 1),
        ("9.9.9.9/8", 0),
    ]


@pytest.mark.parametrize(
    ("version", "mtu", "family"), [("0.4.0", None, "4"), ("1.0.0", None, None), ("1.1.0", 1450, None)]
)
def test_fields_follow_the_version(version: str, mtu: int | None, family: str | None) -> None:
    found = result.extend(None, PRIMARY, version)
    assert found["cniVersion"] == version
    assert found["interfaces"][0].get("mtu") == mtu
    assert found["ips"][0].get("version") == family


def test_check_finds_the_interface_and_its_addresses() -> None:
    found = result.extend(BRIDGE, PRIMARY, "1.1.0")
    interface = result.find_interface(found, "ovn-udn1", NETNS)
    assert interface is not None
    assert interface["mac"] == PRIMARY.mac
    assert result.addresses_of(found, "ovn-udn1", NETNS) == ("192.168.0.5/16", "fd00:1::5/64")
    assert result.find_interface(found, "ovn-udn1", "/run/netns/other") is None
