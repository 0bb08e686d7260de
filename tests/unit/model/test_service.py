from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from vmnet.model.service import AFFINITY_SECONDS, cluster_addresses, parse


def item(status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    ports = [{"name": "http", "port": 80, "nodePort": 30080}, {"name": "dns", "port": 53, "protocol": "UDP"}]
    return {
        "metadata": {"namespace": "red", "name": "web"},
        "spec": {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00:96::7"], "ports": ports, **spec},
        "status": status or {},
    }


def endpoints(*addresses: str, family: str = "IPv4", port: int = 8080, **conditions: bool) -> dict[str, Any]:
    return {
        "addressType": family,
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
        "endpoints": [{"addresses": [text], "conditions": conditions, "nodeName": "n1"} for text in addresses],
    }


def chosen(*slices: dict[str, Any], **spec: Any) -> list[str]:
    return [str(backend.address) for backend in parse(item(**spec), slices).ports[0].backends]


def test_ports_addresses_and_policies() -> None:
    ingress = {"loadBalancer": {"ingress": [{"ip": "172.30.0.200"}, {"hostname": "web.example"}]}}
    found = parse(
        item(
            ingress,
            externalIPs=["172.30.0.201"],
            sessionAffinity="ClientIP",
            internalTrafficPolicy="Local",
            externalTrafficPolicy="Local",
            loadBalancerSourceRanges=["172.30.0.0/24"],
        ),
        (),
    )
    assert found.addresses == (ip_address("10.96.0.7"), ip_address("fd00:96::7"))
    assert [(port.protocol, port.number, port.node_port) for port in found.ports] == [
        ("tcp", 80, 30080),
        ("udp", 53, None),
    ]
    assert found.external == (ip_address("172.30.0.200"), ip_address("172.30.0.201"))
    assert (found.affinity_seconds, found.internal_local, found.external_local) == (AFFINITY_SECONDS, True, True)
    assert found.balancers == (ip_address("172.30.0.200"),)
    assert found.sources == (ip_network("172.30.0.0/24"),)
    assert found.exposed


def test_a_headless_service_has_no_addresses() -> None:
    assert cluster_addresses(item(clusterIP="None", clusterIPs=["None"])) == ()
    assert cluster_addresses({"spec": {}}) == ()


def test_ready_endpoints_are_chosen_and_absent_conditions_mean_ready() -> None:
    assert chosen(endpoints("10.0.0.5", ready=True), endpoints("10.0.0.6", ready=False), endpoints("10.0.0.7")) == [
        "10.0.0.5",
        "10.0.0.7",
    ]


def test_those_that_end_but_serve_are_better_than_none_in_each_family() -> None:
    ending = endpoints("10.0.0.6", ready=False, serving=True, terminating=True)
    gone = endpoints("10.0.0.7", ready=False, serving=False, terminating=True)
    assert chosen(ending, gone) == ["10.0.0.6"]
    assert chosen(ending, endpoints("10.0.0.5", ready=True)) == ["10.0.0.5"]
    assert chosen(ending, endpoints("fd20::5", family="IPv6", ready=True)) == ["10.0.0.6", "fd20::5"]


def test_a_node_s_policy_local_prefers_who_is_ready_there_to_who_ends_there() -> None:
    ending = endpoints("10.0.0.6", ready=False, serving=True, terminating=True)
    elsewhere = endpoints("10.0.0.5", ready=True)
    elsewhere["endpoints"][0]["nodeName"] = "n2"
    port = parse(item(), (ending, elsewhere)).ports[0]
    assert [str(found.address) for found in port.backends] == ["10.0.0.5"]
    assert [str(found.address) for found in port.near("n1", 4)] == ["10.0.0.6"]
    assert [str(found.address) for found in port.near("n2", 4)] == ["10.0.0.5"]
    assert port.near("n3", 4) == ()
    assert port.near("n1", 6) == ()


def test_external_addresses_count_in_the_service_s_families_and_where_packets_keep_them() -> None:
    ingress = {"loadBalancer": {"ingress": [{"ip": "172.30.0.200"}, {"ip": "172.30.0.201", "ipMode": "Proxy"}]}}
    found = parse(item(ingress, clusterIPs=["10.96.0.7"], externalIPs=["fd00:30::9", "172.30.0.200"]), ())
    assert found.external == found.balancers == (ip_address("172.30.0.200"),)


def test_a_health_check_counts_the_ready_endpoints_of_each_node_once() -> None:
    both = [endpoints("10.0.0.5", "10.0.0.6"), endpoints("fd20::5", family="IPv6")]
    for one in (both[0]["endpoints"][0], both[1]["endpoints"][0]):
        one["targetRef"] = {"uid": "u5"}
    waiting = endpoints("10.0.0.7", ready=False, serving=True, terminating=True)
    local = {"externalTrafficPolicy": "Local", "healthCheckNodePort": 31000}
    found = parse(item(**local), (*both, waiting))
    assert (found.health_port, found.ready_on) == (31000, ("n1", "n1"))
    assert parse(item(healthCheckNodePort=31000), both).health_port is None


def test_not_ready_addresses_can_be_published() -> None:
    assert chosen(endpoints("10.0.0.6", ready=False), publishNotReadyAddresses=True) == ["10.0.0.6"]


def test_a_port_is_found_by_name_with_the_number_of_its_slice() -> None:
    found = parse(item(), (endpoints("10.0.0.5", port=8080), endpoints("10.0.0.6", port=9090)))
    assert [(str(b.address), b.port) for b in found.ports[0].backends] == [("10.0.0.5", 8080), ("10.0.0.6", 9090)]
    assert found.ports[1].backends == ()


@pytest.mark.parametrize("spec", [{"externalIPs": ["x"]}, {"loadBalancerSourceRanges": ["10.0.0.1/8"]}])
def test_what_cannot_be_read_is_said(spec: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="spec"):
        parse(item(**spec), ())


def test_who_dns_may_name_and_what_an_external_name_stands_for() -> None:
    ready, waiting = endpoints("10.0.0.5", ready=True), endpoints("10.0.0.6", ready=False)
    ready["endpoints"][0]["hostname"] = "web-0"
    assert [(str(m.address), m.hostname) for m in parse(item(), (ready, waiting)).members] == [("10.0.0.5", "web-0")]
    assert parse(
        item(type="ExternalName", externalName="www.example.org", clusterIPs=None, clusterIP=""), ()
    ).alias == ("www.example.org")


def test_a_service_of_both_families_names_the_members_of_both() -> None:
    slices = [endpoints("fd06::5", family="IPv6"), endpoints("103.103.0.5")]
    found = parse(item(clusterIPs=["10.96.0.5", "fd00:10:96::5"], ports=[{"port": 80}]), slices)
    assert [str(member.address) for member in found.members] == ["103.103.0.5", "fd06::5"]
