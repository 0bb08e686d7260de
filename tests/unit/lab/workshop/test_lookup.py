"""Tokens of commands, looked up in an API in memory."""

import json
from typing import Any

import pytest

from vmnet.kube.api import NODES, PODS, SERVICES, Object, Resource
from vmnet.kube.fake import FakeKube
from vmnet.lab.workshop.lookup import Lookup, Unknown, replace


def pod(name: str, node: str, *addresses: str, **labels: str) -> Object:
    networks = {
        "default": {"ip_addresses": ["10.244.1.2/24"], "role": "infrastructure-locked"},
        "blue/blue-network": {"ip_addresses": list(addresses), "role": "primary"},
    }
    status = [{"interface": "eth0", "ips": ["10.244.1.2"]}, {"interface": "net1", "ips": ["10.101.0.3"]}]
    annotations = {
        "k8s.ovn.org/pod-networks": json.dumps(networks),
        "k8s.v1.cni.cncf.io/network-status": json.dumps(status),
    }
    return {
        "metadata": {"name": name, "namespace": "blue", "labels": labels, "annotations": annotations},
        "spec": {"nodeName": node},
        "status": {"podIP": "10.244.1.2", "hostIP": "172.30.0.11"},
    }


def node(name: str, *addresses: str) -> Object:
    found = [{"type": "InternalIP", "address": text} for text in addresses]
    return {"metadata": {"name": name}, "status": {"addresses": found}}


class Kube(FakeKube):
    """Objects as they are after their controllers have been there."""

    async def create(self, resource: Resource, body: Object, namespace: str | None = None) -> Object:
        made = await super().create(resource, body, namespace)
        if "status" not in body:
            return made
        name = body["metadata"]["name"]
        return await self.patch(resource, name, {"status": body["status"]}, namespace, subresource="status")


@pytest.fixture
async def kube() -> FakeKube:
    found = Kube()
    for name, address in (("n1", "172.30.0.11"), ("n2", "172.30.0.12")):
        await found.create(NODES, node(name, f"fd00:30::{address[-2:]}", address))
    await found.create(PODS, pod("blue-0", "n1", "103.103.1.5/24", "fd06::5/64", app="blue"), "blue")
    await found.create(PODS, pod("blue-1", "n1", "103.103.2.5/24", app="blue"), "blue")
    service: dict[str, Any] = {
        "metadata": {"name": "web", "namespace": "blue"},
        "spec": {
            "clusterIPs": ["10.96.0.7", "fd00:10:96::7"],
            "ports": [{"nodePort": 30080}],
            "healthCheckNodePort": 31000,
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "172.30.0.200"}, {"ip": "fd00:30::200"}]}},
    }
    await found.create(SERVICES, service, "blue")
    return found


@pytest.mark.parametrize(
    ("token", "value"),
    [
        ("<udn:blue/blue-0>", "103.103.1.5"),
        ("<udn6:blue/blue-0>", "fd06::5"),
        ("<eth0:blue/blue-0>", "10.244.1.2"),
        ("<net1:blue/blue-0>", "10.101.0.3"),
        ("<node:blue/blue-0>", "n1"),
        ("<hostip:blue/blue-0>", "172.30.0.11"),
        ("<freeip:blue/app=blue>", "172.30.0.12"),
        ("<cluster:blue/web>", "10.96.0.7"),
        ("<cluster6:blue/web>", "fd00:10:96::7"),
        ("<balancer:blue/web>", "172.30.0.200"),
        ("<balancer6:blue/web>", "fd00:30::200"),
        ("<port:blue/web>", "30080"),
    ],
)
async def test_tokens(kube: FakeKube, token: str, value: str) -> None:
    assert await Lookup(kube).values(f"before {token}, after") == {token: value}


async def test_all_addresses_of_a_label(kube: FakeKube) -> None:
    (value,) = (await Lookup(kube).values("<udns:blue/app=blue>")).values()
    assert sorted(value.split()) == ["103.103.1.5", "103.103.2.5"]


@pytest.mark.parametrize(
    "token",
    [
        "<udn:blue/nobody>",
        "<udn6:blue/blue-1>",
        "<net2:blue/blue-0>",
        "<cluster:blue/nothing>",
        "<freeip:blue/app>",
        "<what:blue/web>",
    ],
)
async def test_what_is_not_known_is_said(kube: FakeKube, token: str) -> None:
    await kube.create(PODS, pod("other", "n2", "103.103.3.5/24", app="other"), "blue")
    with pytest.raises(Unknown):
        await Lookup(kube).values(token)


async def test_texts_of_shells_and_templates_are_left_alone(kube: FakeKube) -> None:
    text = "sh -c 'cat < file > other' jsonpath={.a[*]} '{\"a\": 1}' <udn:blue/blue-0>"
    values = await Lookup(kube).values(text)
    assert replace(text, values) == text.replace("<udn:blue/blue-0>", "103.103.1.5")
