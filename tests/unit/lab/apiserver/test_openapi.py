"""OpenAPI documents: complete in themselves, and with what kubectl looks for."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from vmnet.lab.apiserver import openapi
from vmnet.lab.apiserver.resources import Registry, ResourceInfo

GADGETS = ResourceInfo("lab.example.test", "v1", "gadgets", "gadget", "Gadget", subresources=("status",))
VERSION = {
    "name": "v1",
    "schema": {
        "openAPIV3Schema": {
            "type": "object",
            "properties": {
                "spec": {
                    "type": "object",
                    "description": "What it should be.",
                    "x-kubernetes-validations": [{"rule": "true"}],
                    "properties": {"size": {"type": "integer"}},
                }
            },
        }
    },
}


def _document(registry: Registry, name: str) -> dict[str, Any]:
    found = openapi.document(registry, name)
    assert found is not None
    return json.loads(found[0])


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "$ref" and isinstance(item, str):
                yield item
            else:
                yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def _names() -> list[str]:
    return list(json.loads(openapi.index(Registry())[0])["paths"])


@pytest.mark.parametrize("name", _names())
def test_every_reference_resolves_and_every_kind_is_described(name: str) -> None:
    document = _document(Registry(), name)
    schemas = document["components"]["schemas"]
    for reference in _references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas
    described = {
        (item["group"], item["version"], item["kind"])
        for schema in schemas.values()
        for item in schema.get("x-kubernetes-group-version-kind", ())
    }
    group, version = ([*name.split("/"), ""])[1:3] if name.startswith("apis/") else ("", name.split("/")[1])
    for info in Registry().resources(group, version):
        assert (group, version, info.kind) in described


def test_writes_list_field_validation() -> None:
    paths = _document(Registry(), "apis/apps/v1")["paths"]
    item = paths["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"]
    assert item["x-kubernetes-group-version-kind"] == {"group": "apps", "version": "v1", "kind": "Deployment"}
    assert "fieldValidation" in [parameter["name"] for parameter in item["parameters"]]
    created = paths["/apis/apps/v1/namespaces/{namespace}/deployments"]["post"]
    assert "fieldValidation" in [parameter["name"] for parameter in created["parameters"]]


def test_merge_keys_are_kept() -> None:
    schemas = _document(Registry(), "api/v1")["components"]["schemas"]
    ports = schemas["io.k8s.api.core.v1.Container"]["properties"]["ports"]
    assert ports["x-kubernetes-patch-merge-key"] == "containerPort"
    assert ports["x-kubernetes-list-map-keys"] == ["containerPort", "protocol"]


def test_a_custom_resource() -> None:
    registry = Registry()
    registry.replace("lab.example.test", "gadgets", [(GADGETS, VERSION)])
    document = _document(registry, "apis/lab.example.test/v1")
    schema = document["components"]["schemas"]["test.example.lab.v1.Gadget"]
    assert schema["properties"]["spec"]["description"] == "What it should be."
    assert "x-kubernetes-validations" not in json.dumps(document)
    assert "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta" in document["components"]["schemas"]
    assert "/apis/lab.example.test/v1/namespaces/{namespace}/gadgets/{name}/status" in document["paths"]


def test_only_built_in_kinds_take_strategic_merge_patches() -> None:
    registry = Registry()
    registry.replace("lab.example.test", "gadgets", [(GADGETS, VERSION)])
    strategic = "application/strategic-merge-patch+json"
    paths = _document(registry, "apis/lab.example.test/v1")["paths"]
    for path in ("gadgets/{name}", "gadgets/{name}/status"):
        patch = paths[f"/apis/lab.example.test/v1/namespaces/{{namespace}}/{path}"]["patch"]
        assert strategic not in patch["requestBody"]["content"]
    paths = _document(registry, "apis/apps/v1")["paths"]
    patch = paths["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"]
    assert strategic in patch["requestBody"]["content"]


def test_the_hash_follows_the_schema() -> None:
    registry = Registry()

    def url() -> str:
        return json.loads(openapi.index(registry)[0])["paths"]["apis/lab.example.test/v1"]["serverRelativeURL"]

    registry.replace("lab.example.test", "gadgets", [(GADGETS, VERSION)])
    first = url()
    assert first.startswith("/openapi/v3/apis/lab.example.test/v1?hash=")
    assert url() == first
    tag = openapi.document(registry, "apis/lab.example.test/v1")[2]  # type: ignore[index]
    assert first.endswith(tag)
    registry.replace("lab.example.test", "gadgets", [(GADGETS, {"name": "v1"})])
    assert url() != first


@pytest.mark.parametrize("name", ["apis/nothing/v1", "apis/apps/v9", "api", "apis/apps", ""])
def test_what_is_not_served(name: str) -> None:
    assert openapi.document(Registry(), name) is None


def test_data_is_small() -> None:
    assert len(openapi._content()) < 1_000_000
