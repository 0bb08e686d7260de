"""Names of Services, of their endpoints and of Pods."""

from typing import Any

import pytest

from vmnet.kube.api import Object
from vmnet.lab.cluster_dns.records import Names, Record, names

DOMAIN = "cluster.local"


def service(name: str, **spec: Any) -> Object:
    return {"metadata": {"namespace": "ns", "name": name}, "spec": spec}


def endpoint_slice(service: str, *endpoints: Object) -> Object:
    return {
        "metadata": {"namespace": "ns", "name": f"{service}-x", "labels": {"kubernetes.io/service-name": service}},
        "endpoints": list(endpoints),
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


@pytest.fixture
def found() -> Names:
    services = [
        service(
            "web",
            clusterIPs=["10.96.0.7", "fd00:10:96::7"],
            ports=[{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}],
        ),
        service("db", clusterIP="None", clusterIPs=["None"], ports=[{"name": "http", "port": 80}]),
        service("out", type="ExternalName", externalName="www.outside.test"),
    ]
    slices = [
        endpoint_slice(
            "db",
            {"addresses": ["10.244.1.2"], "hostname": "db-0", "conditions": {"ready": True}},
            {"addresses": ["fd00:1::2"]},
            {"addresses": ["10.244.1.3"], "hostname": "db-1", "conditions": {"ready": False}},
        ),
        # What another controller made for another network is not of this one.
        {**endpoint_slice("web", {"addresses": ["103.103.0.5"]}), "metadata": {"namespace": "ns", "name": "copy"}},
    ]
    return names(services, slices, DOMAIN)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("web.ns.svc", "A", ["10.96.0.7"]),
        ("WEB.ns.SVC", "A", ["10.96.0.7"]),
        ("web.ns.svc", "AAAA", ["fd00:10:96::7"]),
        ("web.ns.svc", "TXT", []),
        ("_http._tcp.web.ns.svc", "SRV", ["0 100 80 web.ns.svc.cluster.local."]),
        ("_dns._udp.web.ns.svc", "SRV", ["0 100 53 web.ns.svc.cluster.local."]),
        ("db.ns.svc", "A", ["10.244.1.2"]),
        ("db.ns.svc", "AAAA", ["fd00:1::2"]),
        ("db-0.db.ns.svc", "A", ["10.244.1.2"]),
        ("fd00-1--2.db.ns.svc", "AAAA", ["fd00:1::2"]),
        ("db-1.db.ns.svc", "A", None),
        (
            "_http._tcp.db.ns.svc",
            "SRV",
            ["0 100 8080 db-0.db.ns.svc.cluster.local.", "0 100 8080 fd00-1--2.db.ns.svc.cluster.local."],
        ),
        ("out.ns.svc", "A", ["www.outside.test."]),
        ("nobody.ns.svc", "A", None),
        ("ns.svc", "A", []),
        ("svc", "A", []),
        ("10-244-1-9.ns.pod", "A", ["10.244.1.9"]),
        ("fd00-1--9.ns.pod", "AAAA", ["fd00:1::9"]),
        ("10-244-1-9.ns.pod", "AAAA", []),
        ("what.ns.pod", "A", None),
    ],
)
def test_names(found: Names, name: str, kind: str, expected: list[str] | None) -> None:
    records = found.find(f"{name}.cluster.local.", kind)
    assert (records if records is None else [record.data for record in records]) == expected


def test_pointers(found: Names) -> None:
    assert found.find("7.0.96.10.in-addr.arpa.", "PTR") == [Record("PTR", "web.ns.svc.cluster.local.")]
    assert found.find("2.1.244.10.in-addr.arpa.", "PTR") == [Record("PTR", "db-0.db.ns.svc.cluster.local.")]


def test_the_rest_of_the_world_is_somebody_elses(found: Names) -> None:
    assert found.owns("cluster.local.")
    assert found.owns("nobody.ns.svc.Cluster.Local.")
    assert found.owns("7.0.96.10.in-addr.arpa.")
    assert not found.owns("8.0.96.10.in-addr.arpa.")
    assert not found.owns("www.outside.test.")
    assert not found.owns("mycluster.local.")
