"""CustomResourceDefinitions, held to what a real API server refused."""

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from vmnet.lab.apiserver import crds
from vmnet.lab.apiserver.schema import Structural

ROOT = Path(__file__).parents[4]
RECORDED = json.loads(gzip.decompress((ROOT / "tests/data/kubernetes/schema/definitions.json.gz").read_bytes()))


def _completed(definition: dict[str, Any]) -> dict[str, Any]:
    """With the defaults that the server fills in before it validates."""
    made = copy.deepcopy(definition)
    names = (made.get("spec") or {}).get("names") or {}
    if names.get("kind"):
        names.setdefault("singular", names["kind"].lower())
        names.setdefault("listKind", f"{names['kind']}List")
    return made


@pytest.mark.parametrize(
    "case",
    [case for case in RECORDED["cases"] if "too expensive" not in case["what"]],
    ids=lambda case: f"{case['line']} {case['what'][:60]}",
)
def test_as_recorded(case: dict[str, Any]) -> None:
    """Not among them: a rule refused for what it may cost, which is not estimated."""
    found = [cause.as_json() for cause in crds.validate(_completed(case["object"]))]
    assert found == case["causes"]


def _changed(path: str, value: Any) -> dict[str, Any]:
    made = _completed(RECORDED["definition"])
    *parents, last = path.split("/")
    place: Any = made
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return made


SPEC = "spec/versions/0/schema/openAPIV3Schema/properties/spec/properties"


@pytest.mark.parametrize(
    ("path", "value", "field", "message"),
    [
        ("spec/group", "lab", "spec.group", "should be a domain with at least one dot"),
        ("spec/scope", "Both", "spec.scope", "supported values"),
        ("spec/versions/1/name", "v1", "spec.versions[1].name", "Duplicate value"),
        (f"{SPEC}/x", {"type": "text"}, "properties[x].type", "supported values"),
        (f"{SPEC}/x", {"type": "array"}, "properties[x].items", "must be specified"),
        (f"{SPEC}/x", {"type": "string", "pattern": "["}, "properties[x].pattern", "valid regular expression"),
        (
            f"{SPEC}/x",
            {"type": "object", "properties": {}, "additionalProperties": {"type": "string"}},
            "",
            "",
        ),
        (
            f"{SPEC}/x",
            {"type": "string", "x-kubernetes-validations": [{"rule": "self.unknown("}]},
            "properties[x].x-kubernetes-validations[0].rule",
            "compilation failed: ERROR: <input>:1:",
        ),
        (f"{SPEC}/x", {"type": "string", "x-kubernetes-list-type": "set"}, "properties[x].type", "must be array"),
        (f"{SPEC}/x", {"type": "string", "default": 5}, "properties[x].default", "must be of type string"),
        ("spec/versions/0/subresources/scale/specReplicasPath", "x", "scale.specReplicasPath", "simple json path"),
        ("spec/versions/0/subresources/scale/statusReplicasPath", ".spec.x", "statusReplicasPath", "under .status"),
    ],
)
def test_refused(path: str, value: Any, field: str, message: str) -> None:
    found = crds.validate(_changed(path, value))
    if not message:
        assert found == []
        return
    assert any(cause.field.endswith(field) and message in cause.message for cause in found), found


def test_names_do_not_change() -> None:
    old = _completed(RECORDED["definition"])
    old["status"] = {"conditions": [{"type": "Established", "status": "True"}]}
    new = copy.deepcopy(old)
    new["spec"]["scope"] = "Cluster"
    new["spec"]["names"]["kind"] = "Thing"
    found = {cause.field: cause.message for cause in crds.validate(new, old)}
    assert found["spec.scope"] == 'Invalid value: "Cluster": field is immutable'
    assert found["spec.names.kind"] == 'Invalid value: "Thing": field is immutable'
    assert crds.validate(old, old) == []


@pytest.mark.parametrize("path", sorted((ROOT / "deploy/crds").glob("k8s.*.yaml")), ids=lambda path: path.stem)
def test_the_projects_own_definitions(path: Path) -> None:
    definition = _completed(yaml.safe_load(path.read_text()))
    assert crds.validate(definition) == []
    for version in definition["spec"]["versions"]:
        Structural.from_crd(version)
