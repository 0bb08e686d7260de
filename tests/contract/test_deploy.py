"""``deploy/`` on an API server: everything is admitted under strict validation, by unmodified kubectl."""

import json
from pathlib import Path

import pytest

from vmnet.lab import kubectl, manifests
from vmnet.lab.apiserver.testing import Kubectl, running_server


@pytest.mark.parametrize("folder", [".", "overlays/kind", "overlays/with-multus"])
async def test_kustomize_applies_twice(folder: str, tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        run = Kubectl(server, tmp_path, str(kubectl.find()))
        apply = ("apply", "-k", str(manifests.DEPLOY / folder), "--server-side", "--validate=strict", "-o", "json")
        first = json.loads(await run.check(*apply, timeout=90))["items"]
        second = json.loads(await run.check(*apply, timeout=90))["items"]
    # The second time changes nothing. (Definitions were given a status meanwhile.)
    kept = [
        [
            (item["metadata"]["name"], item["metadata"]["resourceVersion"])
            for item in items
            if item["kind"] != "CustomResourceDefinition"
        ]
        for items in (first, second)
    ]
    assert kept[0] == kept[1]
    wanted = manifests.documents(manifests.rendered(manifests.DEPLOY / folder))
    assert {item["metadata"]["name"] for item in first} == {item["metadata"]["name"] for item in wanted}


# The operator's kinds, as far as an API server must know them to take the overlay's objects.
OPERATOR = "\n---\n".join(
    f"""apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {{name: {kind.lower()}s.monitoring.coreos.com}}
spec:
  group: monitoring.coreos.com
  scope: Namespaced
  names: {{kind: {kind}, plural: {kind.lower()}s, singular: {kind.lower()}, listKind: {kind}List}}
  versions:
  - name: v1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        properties: {{spec: {{type: object, x-kubernetes-preserve-unknown-fields: true}}}}
"""
    for kind in ("ServiceMonitor", "PrometheusRule")
)


async def test_the_monitoring_overlay_applies_where_the_operators_kinds_are(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        run = Kubectl(server, tmp_path, str(kubectl.find()))
        await run.check("apply", "--server-side", "-f", "-", stdin=OPERATOR)
        await run.check("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
        folder = str(manifests.DEPLOY / "overlays" / "monitoring")
        await run.check("apply", "-k", folder, "--server-side", "--validate=strict", timeout=90)
        rules = json.loads(await run.check("get", "prometheusrules", "-n", "vmnet-system", "-o", "json"))["items"]
    assert [item["metadata"]["name"] for item in rules] == ["vmnet"]


async def test_the_single_file_applies(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        run = Kubectl(server, tmp_path, str(kubectl.find()))
        await run.check("apply", "--server-side", "--validate=strict", "-f", str(manifests.INSTALL), timeout=90)
        await run.check("apply", "--validate=strict", "-f", str(manifests.INSTALL), timeout=90)
        await run.check("delete", "--ignore-not-found", "--wait=false", "-f", str(manifests.INSTALL), timeout=90)
        left = await run.check("get", "clusterroles,validatingadmissionpolicies", "-o", "name")
    assert "vmnet" not in left


WRONG = """
apiVersion: {version}
kind: {kind}
metadata: {{name: wrong, namespace: default}}
{body}
"""


@pytest.mark.parametrize(
    ("version", "kind", "body", "says"),
    [
        ("rbac.authorization.k8s.io/v1", "Role", "rules: [{verb: [get]}]", 'unknown field "rules[0].verb"'),
        ("policy/v1", "PodDisruptionBudget", "spec: {maxUnavailble: 1}", 'unknown field "spec.maxUnavailble"'),
        ("scheduling.k8s.io/v1", "PriorityClass", "valu: 1", 'unknown field "valu"'),
        (
            "admissionregistration.k8s.io/v1",
            "ValidatingAdmissionPolicy",
            "spec: {validations: [{expresion: 'true'}]}",
            'unknown field "spec.validations[0].expresion"',
        ),
        (
            "admissionregistration.k8s.io/v1",
            "ValidatingAdmissionPolicyBinding",
            "spec: {policyName: x, validationActions: [Deny, Warn]}",
            "must not contain both Deny and Warn",
        ),
    ],
)
async def test_what_is_misspelt_is_refused(version: str, kind: str, body: str, says: str, tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        run = Kubectl(server, tmp_path, str(kubectl.find()))
        text = WRONG.format(version=version, kind=kind, body=body)
        found = await run("create", "--validate=strict", "-f", "-", stdin=text)
    assert found.exit != 0
    assert says in found.stderr
