"""Cluster addresses and node ports."""

import ipaddress
from typing import Any

import pytest

from vmnet.lab.apiserver.service_addresses import NODE_PORTS, ServiceAddresses

DUAL = ("10.96.0.0/16", "fd00:10:96::/112")


def service(uid: str = "u", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"uid": uid},
        "spec": {"type": "ClusterIP", "selector": {"a": "b"}, "ports": [{"port": 80, "protocol": "TCP"}], **spec},
    }


def pool(*ranges: str) -> ServiceAddresses:
    return ServiceAddresses([ipaddress.ip_network(item) for item in ranges or DUAL[:1]])


def test_a_service_gets_an_address_and_its_families() -> None:
    addresses = pool()
    found = service()
    assert addresses.assign(found, None, dry_run=False) == []
    spec = found["spec"]
    assert ipaddress.ip_address(spec["clusterIP"]) in ipaddress.ip_network("10.96.0.0/16")
    assert spec["clusterIPs"] == [spec["clusterIP"]]
    assert (spec["ipFamilies"], spec["ipFamilyPolicy"]) == (["IPv4"], "SingleStack")


def test_a_dry_run_takes_nothing() -> None:
    addresses = pool("10.96.0.0/30")
    for _ in range(5):
        found = service()
        assert addresses.assign(found, None, dry_run=True) == []
        assert found["spec"]["clusterIP"] == "10.96.0.0"


def test_dual_stack_follows_the_policy() -> None:
    addresses = pool(*DUAL)
    single, prefer = service("a"), service("b", ipFamilyPolicy="PreferDualStack")
    assert addresses.assign(single, None, dry_run=False) == []
    assert addresses.assign(prefer, None, dry_run=False) == []
    assert len(single["spec"]["clusterIPs"]) == 1
    assert prefer["spec"]["ipFamilies"] == ["IPv4", "IPv6"]
    assert [ipaddress.ip_address(item).version for item in prefer["spec"]["clusterIPs"]] == [4, 6]


def test_addresses_are_unique_and_come_back() -> None:
    addresses = pool("10.96.0.0/29")
    made = [service(str(number)) for number in range(6)]
    for item in made:
        assert addresses.assign(item, None, dry_run=False) == []
    assert len({item["spec"]["clusterIP"] for item in made}) == 6
    (cause,) = addresses.assign(service("late"), None, dry_run=False)
    assert "range is full" in cause.message
    addresses.release(made[0])
    again = service("again")
    assert addresses.assign(again, None, dry_run=False) == []
    assert again["spec"]["clusterIP"] == made[0]["spec"]["clusterIP"]


@pytest.mark.parametrize(
    ("spec", "field", "text"),
    [
        ({"clusterIP": "x"}, "spec.clusterIPs[0]", "must be a valid IP address"),
        ({"clusterIP": "10.99.0.1"}, "spec.clusterIPs", "does not match the current range"),
        ({"ipFamilies": ["IPv6"]}, "spec.ipFamilies[0]", "not configured on this cluster"),
        ({"ipFamilies": ["IPv7"]}, "spec.ipFamilies[0]", 'supported values: "IPv4", "IPv6"'),
        ({"ipFamilyPolicy": "RequireDualStack"}, "spec.ipFamilyPolicy", "not configured for dual-stack"),
        ({"type": "NodePort", "ports": [{"port": 1, "nodePort": 80}]}, "spec.ports[0].nodePort", "valid range"),
    ],
)
def test_what_cannot_be_is_refused(spec: dict[str, Any], field: str, text: str) -> None:
    (cause,) = pool().assign(service(**spec), None, dry_run=False)
    assert cause.field == field
    assert text in cause.message


def test_an_address_never_changes_and_is_kept_when_left_out() -> None:
    addresses = pool()
    old = service(clusterIP="10.96.7.7")
    assert addresses.assign(old, None, dry_run=False) == []
    kept = service()
    assert addresses.assign(kept, old, dry_run=False) == []
    assert kept["spec"]["clusterIP"] == "10.96.7.7"
    (cause,) = addresses.assign(service(clusterIP="10.96.9.9"), old, dry_run=False)
    assert cause.message.endswith("may not change once set")


def test_headless_services_have_no_address() -> None:
    found = service(clusterIP="None")
    assert pool().assign(found, None, dry_run=False) == []
    assert found["spec"]["clusterIPs"] == ["None"]


def test_node_ports_are_given_shared_by_protocols_and_dropped_with_the_type() -> None:
    addresses = pool()
    found = service(type="NodePort")
    assert addresses.assign(found, None, dry_run=False) == []
    number = found["spec"]["ports"][0]["nodePort"]
    assert number in NODE_PORTS
    udp = service("udp", type="NodePort", ports=[{"port": 1, "protocol": "UDP", "nodePort": number}])
    assert addresses.assign(udp, None, dry_run=False) == []
    (cause,) = addresses.assign(
        service("tcp", type="NodePort", ports=[{"port": 1, "protocol": "TCP", "nodePort": number}]), None, dry_run=False
    )
    assert cause.message.endswith("provided port is already allocated")
    back = {**found, "spec": {**found["spec"], "type": "ClusterIP", "ports": [dict(found["spec"]["ports"][0])]}}
    assert addresses.assign(back, found, dry_run=False) == []
    assert "nodePort" not in back["spec"]["ports"][0]
