"""Discovery documents, held to those of a real API server."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from vmnet.lab.apiserver import discovery
from vmnet.lab.apiserver.resources import Registry, ResourceInfo

RECORDED = json.loads(
    gzip.decompress((Path(__file__).parents[3] / "data/kubernetes/schema/discovery.json.gz").read_bytes())
)
GADGETS = ResourceInfo(
    "lab.example.test", "v1", "gadgets", "gadget", "Gadget", short_names=("gd",), subresources=("status", "scale")
)


def _document(registry: Registry, path: str, accept: str) -> discovery.Document:
    match path.strip("/").split("/"):
        case ["api"]:
            return discovery.core_document(registry, accept)
        case ["apis"]:
            return discovery.groups_document(registry, accept)
        case ["api", version]:
            return discovery.resource_list(registry, "", version, accept)
        case ["apis", group, version]:
            return discovery.resource_list(registry, group, version, accept)
    raise ValueError(path)


def _common(value: Any) -> Any:
    """Without what differs between servers: their own address."""
    if isinstance(value, dict):
        return {key: _common(item) for key, item in value.items() if key != "serverAddressByClientCIDRs"}
    return [_common(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "recorded",
    [item for item in RECORDED["documents"] if item["path"] != "/version"],
    ids=lambda item: item["path"] + (" aggregated" if item["aggregated"] else ""),
)
def test_as_recorded(recorded: dict[str, Any]) -> None:
    accept = RECORDED["accept"] if recorded["aggregated"] else "application/json"
    content, content_type, tag = _document(Registry(), recorded["path"], accept)
    ours, theirs = _common(json.loads(content)), _common(recorded["body"])
    assert content_type == recorded["content_type"]
    assert (tag is not None) == recorded["aggregated"]
    assert _without_hashes(ours) == _without_hashes(theirs)


def _without_hashes(value: Any) -> Any:
    """A hash is of the version that is stored; where a real server stores another one than it serves, it differs."""
    if isinstance(value, dict):
        return {key: _without_hashes(item) for key, item in value.items() if key != "storageVersionHash"}
    return [_without_hashes(item) for item in value] if isinstance(value, list) else value


def test_a_custom_resource() -> None:
    registry = Registry()
    _, _, before = discovery.groups_document(registry, RECORDED["accept"])
    registry.replace("lab.example.test", "gadgets", [(GADGETS, {"name": "v1"})])
    content, _, after = discovery.groups_document(registry, RECORDED["accept"])
    assert before != after
    group = json.loads(content)["items"][-1]
    (resource,) = group["versions"][0]["resources"]
    assert resource["responseKind"] == {"group": "lab.example.test", "version": "v1", "kind": "Gadget"}
    assert [item["responseKind"]["kind"] for item in resource["subresources"]] == ["Gadget", "Scale"]
    listed = json.loads(discovery.resource_list(registry, "lab.example.test", "v1")[0])
    assert listed["resources"][0]["storageVersionHash"] == "NJr7QdpV320="
    assert [item["name"] for item in listed["resources"]] == ["gadgets", "gadgets/status", "gadgets/scale"]
    versions = json.loads(discovery.group_versions(registry, "lab.example.test")[0])
    assert versions["preferredVersion"] == {"groupVersion": "lab.example.test/v1", "version": "v1"}


def test_only_the_aggregated_form_that_is_asked_for() -> None:
    _, content_type, _ = discovery.core_document(Registry(), "application/json")
    assert content_type == "application/json"
    old = "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList"
    content, content_type, _ = discovery.core_document(Registry(), old)
    assert content_type == old
    assert json.loads(content)["apiVersion"] == "apidiscovery.k8s.io/v2beta1"
