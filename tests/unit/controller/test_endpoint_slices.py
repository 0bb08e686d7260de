"""Mirrors of EndpointSlices, by the whole controller on an API in memory."""

import json
from typing import Any

import pytest

from vmnet.controller.cluster import Attachment
from vmnet.controller.endpoint_slices import mirrored
from vmnet.kube.api import ENDPOINT_SLICES, PODS, Object
from vmnet.model import addresses, names
from vmnet.model.names import NetworkId
from vmnet.model.network import Network

ATTACHMENT = Attachment(
    "red/tenant",
    "red",
    Network("red_tenant", NetworkId(3), subnets=(addresses.network("10.20.0.0/24"), addresses.network("fd20::/64"))),
    deleting=False,
)


def slice_of(*pods: str, family: str = "IPv4", name: str = "web-abcde", **more: Any) -> Object:
    endpoints = [
        {
            "addresses": [f"10.244.1.{number}"],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": "n1",
            "targetRef": {"kind": "Pod", "namespace": "red", "name": pod},
        }
        for number, pod in enumerate(pods, 5)
    ]
    return {
        "metadata": {
            "name": name,
            "namespace": "red",
            "uid": f"uid-{name}",
            "labels": {
                "kubernetes.io/service-name": "web",
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "app": "web",
            },
        },
        "addressType": family,
        "endpoints": endpoints,
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        **more,
    }


def pod(name: str, *texts: str, host_network: bool = False) -> Object:
    entry = {"ip_addresses": list(texts), "mac_address": "0a:58:0a:14:00:05"}
    annotations = {names.POD_NETWORKS_ANNOTATION: json.dumps({"red/tenant": entry})} if texts else {}
    return {
        "metadata": {"name": name, "namespace": "red", "annotations": annotations},
        "spec": {"hostNetwork": host_network},
    }


def shown(source: Object, *pods: Object) -> list[tuple[str, bool]]:
    known = {f"red/{item['metadata']['name']}": item for item in pods}
    found = mirrored(source, ATTACHMENT, known)["endpoints"]
    return [(item["addresses"][0], item["conditions"]["ready"]) for item in found]


def test_the_mirror_has_the_network_s_addresses_and_no_label_that_kube_proxy_follows() -> None:
    found = mirrored(slice_of("a"), ATTACHMENT, {"red/a": pod("a", "10.20.0.5/24", "fd20::5/64")})
    assert found["metadata"]["labels"] == {
        "app": "web",
        "endpointslice.kubernetes.io/managed-by": "endpointslice-mirror-controller.k8s.ovn.org",
        "k8s.ovn.org/service-name": "web",
    }
    assert found["metadata"]["annotations"] == {
        "k8s.ovn.org/source-endpointslice": "web-abcde",
        "k8s.ovn.org/endpointslice-network": "red_tenant",
    }
    (owner,) = found["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("EndpointSlice", "uid-web-abcde")
    (endpoint,) = found["endpoints"]
    assert endpoint["addresses"] == ["10.20.0.5"]
    assert endpoint["nodeName"] == "n1"
    assert found["ports"] == [{"name": "http", "port": 8080, "protocol": "TCP"}]


def test_each_family_has_its_own_addresses() -> None:
    both = pod("a", "10.20.0.5/24", "fd20::5/64")
    assert shown(slice_of("a", family="IPv6"), both) == [("fd20::5", True)]
    assert shown(slice_of("a", family="IPv6"), pod("a", "10.20.0.5/24")) == []
    assert shown(slice_of("a", family="FQDN"), both) == []


def test_who_is_not_on_the_network_is_left_out() -> None:
    source = slice_of("a", "host", "gone", "waiting")
    found = shown(source, pod("a", "10.20.0.5/24"), pod("host", "10.20.0.6/24", host_network=True), pod("waiting"))
    assert found == [("10.20.0.5", True)]


def test_both_pods_of_a_migrating_machine_are_one_endpoint() -> None:
    source = slice_of("target", "source")
    source["endpoints"][0]["conditions"]["ready"] = False
    assert shown(source, pod("target", "10.20.0.5/24"), pod("source", "10.20.0.5/24")) == [("10.20.0.5", True)]


def test_addresses_written_by_hand_count_when_they_are_in_the_network() -> None:
    source = slice_of()
    source["endpoints"] = [
        {"addresses": [text], "conditions": {"ready": True}} for text in ("10.20.0.77", "192.0.2.1", "x")
    ]
    assert shown(source) == [("10.20.0.77", True)]


def mirrors(world: Any) -> list[Object]:
    return [
        item
        for item in world.kube._of(ENDPOINT_SLICES).values()
        if names.MIRRORED_SERVICE_LABEL in item["metadata"]["labels"]
    ]


async def test_the_mirror_follows_its_source(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    world.pod("red", "a")
    world.pod("red", "b")
    world.kube.seed(ENDPOINT_SLICES, slice_of("a"))

    def addresses_shown() -> list[str]:
        return [
            address for item in mirrors(world) for endpoint in item["endpoints"] for address in endpoint["addresses"]
        ]

    async with world.controller() as controller:
        await world.until(lambda: len(addresses_shown()) == 1)
        source = world.kube.peek(ENDPOINT_SLICES, "web-abcde", "red")
        world.kube.seed(ENDPOINT_SLICES, {**source, "endpoints": slice_of("a", "b")["endpoints"]})
        await world.until(lambda: len(addresses_shown()) == 2)
        # Whoever changes or deletes a mirror sees it return.
        (mirror,) = mirrors(world)
        world.kube.seed(ENDPOINT_SLICES, {**mirror, "endpoints": []})
        await world.until(lambda: len(addresses_shown()) == 2)
        await world.kube.delete(ENDPOINT_SLICES, mirror["metadata"]["name"], "red")
        await world.until(lambda: len(addresses_shown()) == 2)
        await world.kube.delete(PODS, "b", "red")
        await world.until(lambda: len(addresses_shown()) == 1)
        await world.kube.delete(ENDPOINT_SLICES, "web-abcde", "red")
        await world.until(lambda: not mirrors(world))
        await world.settled(controller)


@pytest.mark.parametrize("labelled", [True, False])
async def test_slices_of_other_namespaces_and_of_nobody_have_no_mirror(world: Any, labelled: bool) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    world.namespace("plain", labelled=False)
    source = slice_of("a")
    if labelled:
        source["metadata"]["namespace"] = "plain"
    else:
        source["metadata"]["labels"] = {}
    world.kube.seed(ENDPOINT_SLICES, source)
    async with world.controller() as controller:
        await world.settled(controller)
    assert not mirrors(world)


def _edited(mirror: Object, **metadata: Any) -> Object:
    return {**mirror, "metadata": {**mirror["metadata"], **metadata}}


@pytest.mark.parametrize(
    "edit",
    [
        # kube-proxy would follow it.
        lambda labels, notes: ({**labels, "kubernetes.io/service-name": "web"}, notes, True),
        # It would look like a slice to be mirrored.
        lambda labels, notes: (
            {**labels, "endpointslice.kubernetes.io/managed-by": "me", "kubernetes.io/service-name": "web"},
            notes,
            True,
        ),
        lambda labels, notes: ({**labels, "more": "x"}, notes, True),
        lambda labels, notes: (labels, {}, True),
        lambda labels, notes: (labels, {**notes, "k8s.ovn.org/source-endpointslice": "other"}, False),
        lambda labels, notes: ({}, {}, False),
    ],
)
async def test_a_mirror_that_somebody_edits_is_what_it_was(world: Any, edit: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    world.pod("red", "a")
    world.kube.seed(ENDPOINT_SLICES, slice_of("a"))

    def right() -> bool:
        found = world.kube._of(ENDPOINT_SLICES).values()
        return len(found) == 2 and [_shape(item) for item in mirrors(world)] == [_shape(made)]

    async with world.controller() as controller:
        await world.until(lambda: mirrors(world) and mirrors(world)[0]["endpoints"])
        (made,) = mirrors(world)
        metadata = made["metadata"]
        labels, notes, owned = edit(metadata["labels"], metadata["annotations"])
        owners = metadata["ownerReferences"] if owned else []
        world.kube.seed(ENDPOINT_SLICES, _edited(made, labels=labels, annotations=notes, ownerReferences=owners))
        await world.until(right)
        await world.settled(controller)
        assert right()
        # A label that the source loses, its mirror loses.
        source = world.kube.peek(ENDPOINT_SLICES, "web-abcde", "red")
        kept = {key: value for key, value in source["metadata"]["labels"].items() if key != "app"}
        world.kube.seed(ENDPOINT_SLICES, _edited(source, labels=kept))
        await world.until(lambda: mirrors(world) and "app" not in mirrors(world)[0]["metadata"]["labels"])


def _shape(item: Object) -> Any:
    metadata = item["metadata"]
    return (
        [metadata[part] for part in ("name", "labels", "annotations", "ownerReferences")],
        item["endpoints"],
        item["ports"],
    )
