"""Service ports from Services and EndpointSlices."""

from typing import Any

import pytest

from vmnet.kube.api import Object
from vmnet.lab.proxy.services import Backend, load_balancer_addresses, service_ports


def service(name: str = "web", **spec: Any) -> Object:
    ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
    return {
        "metadata": {"namespace": "ns", "name": name},
        "spec": {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "ports": ports, **spec},
    }


def endpoint(address: str, node: str = "n1", **conditions: bool) -> Object:
    return {"addresses": [address], "nodeName": node, "conditions": conditions}


def endpoint_slice(
    *endpoints: Object, family: str = "IPv4", port: str = "http", labels: dict[str, str] | None = None
) -> Object:
    return {
        "metadata": {
            "namespace": "ns",
            "name": "web-x",
            "labels": labels if labels is not None else {"kubernetes.io/service-name": "web"},
        },
        "addressType": family,
        "ports": [{"name": port, "port": 8080, "protocol": "TCP"}],
        "endpoints": list(endpoints),
    }


def test_each_family_has_the_backends_of_its_own_slices() -> None:
    dual = service(clusterIPs=["10.96.0.7", "fd00:10:96::7"])
    slices = [endpoint_slice(endpoint("10.244.1.2")), endpoint_slice(endpoint("fd00:1::2"), family="IPv6")]
    four, six = service_ports([dual], slices)
    assert (four.version, four.cluster_address, four.backends) == (4, "10.96.0.7", (Backend("10.244.1.2", 8080, "n1"),))
    assert (six.version, six.cluster_address, six.backends) == (6, "fd00:10:96::7", (Backend("fd00:1::2", 8080, "n1"),))


def test_only_ready_endpoints_are_served_and_terminating_ones_where_there_is_no_other() -> None:
    ready = endpoint("10.244.1.2", ready=True)
    unready = endpoint("10.244.1.3", ready=False)
    leaving = endpoint("10.244.1.4", ready=False, serving=True, terminating=True)
    (port,) = service_ports([service()], [endpoint_slice(ready, unready, leaving)])
    assert [item.address for item in port.backends] == ["10.244.1.2"]
    (port,) = service_ports([service()], [endpoint_slice(unready, leaving)])
    assert [item.address for item in port.backends] == ["10.244.1.4"]


def test_an_endpoint_without_conditions_is_ready() -> None:
    (port,) = service_ports([service()], [endpoint_slice({"addresses": ["172.30.0.1"]})])
    assert port.backends == (Backend("172.30.0.1", 8080),)
    assert port.local("n1") == ()


@pytest.mark.parametrize(
    "labels",
    [
        # A copy of the slice for another network: kube-proxy must not see it.
        {"k8s.ovn.org/service-name": "web"},
        {"kubernetes.io/service-name": "web", "service.kubernetes.io/service-proxy-name": "other"},
        {"kubernetes.io/service-name": "another"},
        {},
    ],
)
def test_slices_that_are_not_for_this_proxy_are_left_alone(labels: dict[str, str]) -> None:
    (port,) = service_ports([service()], [endpoint_slice(endpoint("10.244.1.2"), labels=labels)])
    assert port.backends == ()


@pytest.mark.parametrize(
    "spec", [{"clusterIP": "None", "clusterIPs": ["None"]}, {"type": "ExternalName", "clusterIP": "", "clusterIPs": []}]
)
def test_a_service_without_an_address_needs_no_proxy(spec: dict[str, Any]) -> None:
    assert service_ports([service(**spec)], [endpoint_slice(endpoint("10.244.1.2"))]) == []


def test_ports_are_matched_by_name_and_protocol() -> None:
    ports = [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]
    found = service_ports([service(ports=ports)], [endpoint_slice(endpoint("10.244.1.2"))])
    assert [(item.port_name, item.protocol, len(item.backends)) for item in found] == [
        ("http", "tcp", 1),
        ("dns", "udp", 0),
    ]


def test_policies_node_ports_and_external_addresses_are_taken_over() -> None:
    item = service(
        externalTrafficPolicy="Local",
        internalTrafficPolicy="Local",
        ports=[{"name": "http", "port": 80, "nodePort": 30080}],
        externalIPs=["192.0.2.9", "2001:db8::9"],
    )
    ingress = [{"ip": "192.0.2.1", "ipMode": "VIP"}, {"ip": "192.0.2.2", "ipMode": "Proxy"}, {"hostname": "lb.test"}]
    item["status"] = {"loadBalancer": {"ingress": ingress}}
    assert load_balancer_addresses(item) == ["192.0.2.1"]
    (port,) = service_ports([item], [endpoint_slice(endpoint("10.244.1.2"), endpoint("10.244.2.2", "n2"))])
    assert (port.internal_local, port.external_local, port.node_port) == (True, True, 30080)
    assert port.external_addresses == ("192.0.2.1", "192.0.2.9")
    assert port.local("n2") == (Backend("10.244.2.2", 8080, "n2"),)
