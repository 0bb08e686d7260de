"""Nothing secret gets into an archive; what an engineer needs does."""

import base64
import json
from typing import Any

import pytest

from vmnet.inspect.redaction import REDACTED, redact_object, redact_text

SECRET = "hunter2-Zx81"
KEY = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIAbc" + SECRET + "\n-----END EC PRIVATE KEY-----\n"
TOKEN = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJodW50ZXIyLVp4ODEifQ.c2lnbmF0dXJlLWh1bnRlcjI"
ENCODED = base64.b64encode(SECRET.encode()).decode()


def pod(**container: Any) -> dict[str, Any]:
    """A Pod with one container."""
    return {"kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", **container}]}}


@pytest.mark.parametrize(
    "item",
    [
        {"kind": "Secret", "metadata": {"name": "s"}, "data": {"tls.key": ENCODED}, "stringData": {"x": SECRET}},
        {
            "kind": "Secret",
            "metadata": {
                "annotations": {
                    "kubectl.kubernetes.io/last-applied-configuration": json.dumps({"data": {"x": ENCODED}})
                }
            },
        },
        pod(env=[{"name": "DB_PASSWORD", "value": SECRET}]),
        pod(env=[{"name": "apiToken", "value": SECRET}]),
        pod(env=[{"name": "STANDALONE_VMI", "value": json.dumps({"a": SECRET})}]),
        pod(args=[f"--password={SECRET}"]),
        pod(command=["sh", "-c", f"TOKEN={SECRET} run"]),
        {"kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"config.yaml": f"a: 1\npassword: {SECRET}\n"}},
        {"kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"kubeconfig": f"  client-key-data: {ENCODED}\n"}},
        {"kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"key.pem": KEY}},
        {
            "kind": "VirtualMachineInstance",
            "metadata": {"name": "v"},
            "spec": {
                "volumes": [
                    {"name": "ci", "cloudInitNoCloud": {"userData": f"#cloud-config\npassword: {SECRET}"}},
                    {"name": "cd", "cloudInitConfigDrive": {"userDataBase64": ENCODED, "networkData": SECRET}},
                ]
            },
        },
        {"kind": "Event", "metadata": {"name": "e"}, "message": f"could not use https://me:{SECRET}@registry/x"},
    ],
)
def test_no_object_keeps_a_secret(item: dict[str, Any]) -> None:
    text = json.dumps(redact_object(item))
    assert SECRET not in text
    assert ENCODED not in text
    assert REDACTED in text


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        KEY.partition("-----END")[0],
        f"Authorization: Bearer {TOKEN}",
        f"the token is {TOKEN}.",
        f"token: {SECRET}",
        f'{{"password": "{SECRET}"}}',
        json.dumps(json.dumps({"password": SECRET})),
        f"started with --api-key={SECRET} in 3 s",
        f"MYSQL_ROOT_PASSWORD='{SECRET}'",
        f"postgres://user:{SECRET}@db:5432/x",
        f"userData: {SECRET}",
    ],
)
def test_no_text_keeps_a_secret(text: str) -> None:
    found = redact_text(text)
    assert SECRET not in found
    assert TOKEN not in found
    assert REDACTED in found


def test_json_stays_json() -> None:
    found = json.loads(redact_text(json.dumps({"a": {"password": SECRET}, "b": json.dumps({"token": SECRET})})))
    assert found["a"] == {"password": REDACTED}
    assert json.loads(found["b"]) == {"token": REDACTED}


def test_what_an_engineer_needs_stays() -> None:
    item = {
        "kind": "Pod",
        "metadata": {
            "name": "p",
            "managedFields": [{"manager": "kubectl"}],
            "annotations": {"k8s.ovn.org/pod-networks": '{"a/b":{"mac_address":"0a:58:c0:a8:00:05"}}'},
        },
        "spec": {
            "serviceAccountName": "vmnet-agent",
            "automountServiceAccountToken": True,
            "tolerations": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}],
            "volumes": [{"name": "v", "secret": {"secretName": "vmnet-webhook"}}],
            "containers": [{"name": "c", "env": [{"name": "NODE_NAME", "value": "n1"}]}],
        },
    }
    found = redact_object(item)
    assert "managedFields" not in found["metadata"]
    item["metadata"].pop("managedFields")  # type: ignore[attr-defined]
    assert found == item


@pytest.mark.parametrize(
    "line",
    [
        "2026-11-24 02:53:43,418 INFO vmnet.controller: certificate for the agent of node n3",
        "secret vmnet-system/vmnet-webhook is made anew",
        'vmnet_network_healthy{network="blue_happy",node="n1"} 1.0',
        "net.ipv4.conf.all.rp_filter:0",
        "no more tokens for 10.0.0.1: 17 queries were refused",
    ],
)
def test_ordinary_lines_stay_as_they_are(line: str) -> None:
    assert redact_text(line) == line


def test_a_secret_is_known_by_its_keys_alone() -> None:
    found = redact_object({"kind": "Secret", "type": "Opaque", "metadata": {"name": "s"}, "data": {"a": ENCODED}})
    assert found == {"kind": "Secret", "type": "Opaque", "metadata": {"name": "s"}, "data": {"a": REDACTED}}
