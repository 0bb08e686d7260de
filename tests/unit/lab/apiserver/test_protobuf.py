"""Protobuf bodies: those that kubectl 1.32 sent, beside the JSON of kubectl 1.31 for the same command."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from vmnet.lab.apiserver import protobuf

BODIES = json.loads(
    gzip.decompress((Path(__file__).parents[3] / "data/kubernetes/schema/protobuf.json.gz").read_bytes())
)["bodies"]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body["at"])
def test_recorded_bodies(body: dict[str, Any]) -> None:
    found = protobuf.decode(base64.b64decode(body["protobuf"]))
    assert found["kind"]
    named = [item for item in body["json"] if item["metadata"].get("name") == found["metadata"].get("name")]
    if named:
        assert found in [_without_nulls(item) for item in named]


def test_most_recorded_bodies_have_a_counterpart() -> None:
    assert sum(1 for body in BODIES if body["json"]) >= 15


# A small encoder, for messages that were not recorded.


def _varint(value: int) -> bytes:
    value %= 2**64
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _body(version: str, kind: str, raw: bytes) -> bytes:
    return b"k8s\0" + _field(1, _field(1, version) + _field(2, kind)) + _field(2, raw)


def test_delete_options() -> None:
    raw = _field(1, 0) + _field(2, _field(1, "u")) + _field(4, "Background") + _field(5, "All")
    assert protobuf.decode(_body("v1", "DeleteOptions", raw)) == {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "gracePeriodSeconds": 0,
        "preconditions": {"uid": "u"},
        "propagationPolicy": "Background",
        "dryRun": ["All"],
    }
    assert protobuf.decode(_body("policy/v1", "DeleteOptions", b""))["kind"] == "DeleteOptions"


def test_a_lease_with_microseconds_and_zeroes() -> None:
    spec = _field(1, "me") + _field(2, 15) + _field(4, _field(1, 1767323045) + _field(2, 123456000)) + _field(5, 0)
    found = protobuf.decode(_body("coordination.k8s.io/v1", "Lease", _field(1, _field(1, "l")) + _field(2, spec)))
    assert found["spec"] == {
        "holderIdentity": "me",
        "leaseDurationSeconds": 15,
        "renewTime": "2026-01-02T03:04:05.123456Z",
        "leaseTransitions": 0,
    }


def test_maps_quantities_ports_and_inlined_messages() -> None:
    port = _field(3, 80) + _field(4, _field(1, 1) + _field(3, "http")) + _field(1, "web")
    selector = _field(1, "app") + _field(2, "x")
    service = _field(2, _field(1, port) + _field(2, selector))
    found = protobuf.decode(_body("v1", "Service", service))["spec"]
    assert found["ports"] == [{"port": 80, "targetPort": "http", "name": "web"}]
    assert found["selector"] == {"app": "x"}
    requests = _field(2, _field(1, "cpu") + _field(2, _field(1, "100m")))
    probe = _field(1, _field(2, _field(2, _field(1, 0) + _field(2, 8080)))) + _field(2, -1)
    container = _field(1, "c") + _field(8, requests) + _field(10, probe)
    pod = protobuf.decode(_body("v1", "Pod", _field(2, _field(2, container))))
    made = pod["spec"]["containers"][0]
    assert made["resources"] == {"requests": {"cpu": "100m"}}
    assert made["livenessProbe"] == {"httpGet": {"port": 8080}, "initialDelaySeconds": -1}


def test_fields_that_are_not_known_are_left_out() -> None:
    raw = _field(1, _field(1, "a")) + _field(900, "new") + _varint(901 << 3 | 1) + bytes(8)
    assert protobuf.decode(_body("v1", "ConfigMap", raw))["metadata"] == {"name": "a"}


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"k8s\0\xff",
        _body("v1", "ConfigMap", b"\x0a\x7f"),
        _body("v1", "ConfigMap", b"\x0b"),
        _body("v1", "ConfigMap", _field(1, 5)),
        _body("v1", "ConfigMap", _field(1, _field(1, b"\xff"))),
        b"k8s\0" + _field(1, _field(1, "v1") + _field(2, "ConfigMap")) + _field(3, "gzip"),
    ],
)
def test_malformed(content: bytes) -> None:
    with pytest.raises(ValueError):
        protobuf.decode(content)


def test_unknown_kind() -> None:
    with pytest.raises(KeyError):
        protobuf.decode(_body("x/v1", "Thing", b""))
