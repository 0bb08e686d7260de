"""What a container gets: variables, resolver, hosts."""

from pathlib import Path
from typing import Any

import pytest

from vmnet.lab.kubelet import environment
from vmnet.lab.kubelet.environment import PodFacts, Unresolvable

FACTS = PodFacts("n1", ("172.30.0.11", "fd00:30::11"), ("10.244.1.2", "fd00::2"))


def pod(**spec: Any) -> dict[str, Any]:
    metadata = {"name": "p", "namespace": "red", "uid": "u", "labels": {"a.b/c": "d"}, "annotations": {"x": "y"}}
    return {"metadata": metadata, "spec": {"containers": [], **spec}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("$(A)", "1"), ("x$(A)y$(B)", "x1y$(B)"), ("$$(A)", "$(A)"), ("$A", "$A"), ("$", "$"), ("$(", "$("), ("", "")],
)
def test_references_are_expanded(text: str, expected: str) -> None:
    assert environment.expand(text, {"A": "1"}) == expected


def test_variables_come_from_everywhere() -> None:
    container = {
        "envFrom": [
            {"configMapRef": {"name": "m"}, "prefix": "M_"},
            {"secretRef": {"name": "absent", "optional": True}},
        ],
        "env": [
            {"name": "A", "value": "1"},
            {"name": "B", "value": "$(A)$(PATH)"},
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "IPS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIPs"}}},
            {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a.b/c']"}}},
            {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
            {"name": "NONE", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "no", "optional": True}}},
        ],
    }
    sources: dict[str, dict[str, Any]] = {"configmaps/m": {"k": "v"}, "secrets/s": {"k": "secret"}}
    assert environment.variables(container, pod(), FACTS, {"PATH": "/bin"}, sources) == {
        "PATH": "/bin",
        "M_k": "v",
        "A": "1",
        "B": "1/bin",
        "NODE": "n1",
        "IPS": "10.244.1.2,fd00::2",
        "LABEL": "d",
        "KEY": "secret",
    }
    assert environment.referenced_sources({"spec": {"containers": [container]}}) == {
        "configmaps/m",
        "secrets/absent",
        "secrets/s",
    }


@pytest.mark.parametrize(
    "origin",
    [
        {"fieldRef": {"fieldPath": "spec.nothing"}},
        {"configMapKeyRef": {"name": "absent", "key": "k"}},
        {"secretKeyRef": {"name": "s", "key": "absent"}},
        {"resourceFieldRef": {"resource": "limits.cpu"}},
    ],
)
def test_what_cannot_be_resolved_is_named(origin: dict[str, Any]) -> None:
    container = {"env": [{"name": "A", "valueFrom": origin}]}
    with pytest.raises(Unresolvable):
        environment.variables(container, pod(), FACTS, {}, {"secrets/s": {}})


def test_the_resolver_follows_the_policy() -> None:
    def resolver(**spec: Any) -> list[str]:
        return environment.resolver(pod(**spec), ["10.96.0.10"], "cluster.local", "nameserver 1.1.1.1\n").splitlines()

    assert resolver() == [
        "search red.svc.cluster.local svc.cluster.local cluster.local",
        "nameserver 10.96.0.10",
        "options ndots:5",
    ]
    assert resolver(dnsPolicy="Default") == ["nameserver 1.1.1.1"]
    assert resolver(hostNetwork=True) == ["nameserver 1.1.1.1"]
    assert resolver(hostNetwork=True, dnsPolicy="ClusterFirstWithHostNet")[1] == "nameserver 10.96.0.10"
    config = {
        "nameservers": ["9.9.9.9"],
        "searches": ["x.y"],
        "options": [{"name": "ndots", "value": "1"}, {"name": "debug"}],
    }
    assert resolver(dnsPolicy="None", dnsConfig=config) == ["search x.y", "nameserver 9.9.9.9", "options ndots:1 debug"]
    assert resolver(dnsConfig=config)[0] == "search red.svc.cluster.local svc.cluster.local cluster.local x.y"


def test_hosts_name_the_pod(tmp_path: Path) -> None:
    body = pod(hostname="web", subdomain="sub", hostAliases=[{"ip": "1.2.3.4", "hostnames": ["a", "b"]}])
    environment.write_hosts(tmp_path / "hosts", body, ("10.244.1.2", "fd00::2"))
    lines = (tmp_path / "hosts").read_text().splitlines()
    assert "10.244.1.2\tweb.sub.red.svc.cluster.local\tweb" in lines
    assert "fd00::2\tweb.sub.red.svc.cluster.local\tweb" in lines
    assert "1.2.3.4\ta\tb" in lines


@pytest.mark.parametrize(("name", "expected"), [("a" * 70, "a" * 63), ("a" * 62 + ".b", "a" * 62)])
def test_host_names_fit(name: str, expected: str) -> None:
    body = pod()
    body["metadata"]["name"] = name
    assert environment.hostname(body) == expected
