"""The manifests: complete, pointing at each other, and no broader than the code."""

from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[3] / "deploy"
VERBS = {"get", "list", "watch", "create", "update", "patch", "delete", "approve", "sign"}


def documents(folder: Path = DEPLOY) -> list[dict[str, Any]]:
    found = []
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    for name in kustomization["resources"]:
        path = folder / name
        found += documents(path) if path.is_dir() else [item for item in yaml.safe_load_all(path.read_text()) if item]
    return found


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [item for item in documents() if item["kind"] == kind]


def test_every_manifest_is_installed() -> None:
    listed = {(item["kind"], item["metadata"]["name"]) for item in documents()}
    on_disk = {
        (item["kind"], item["metadata"]["name"])
        for path in DEPLOY.rglob("*.yaml")
        if path.name != "kustomization.yaml"
        for item in yaml.safe_load_all(path.read_text())
    }
    assert listed == on_disk


HOOKS = {"MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"}


def test_a_dead_webhook_stops_no_pod_that_is_no_machine_s() -> None:
    hooks = {item["kind"]: item["webhooks"] for item in documents() if item["kind"] in HOOKS}
    assert hooks.keys() == HOOKS
    for (hook,) in hooks.values():
        assert hook["objectSelector"] == {"matchLabels": {"kubevirt.io": "virt-launcher"}}
        assert {"key": "k8s.ovn.org/primary-user-defined-network", "operator": "Exists"} in (
            hook["namespaceSelector"]["matchExpressions"]
        )
        assert [rule["resources"] for rule in hook["rules"]] == [["pods"]]
        service = of_kind("Service")[0]["metadata"]
        named = hook["clientConfig"]["service"]
        assert (named["namespace"], named["name"]) == (service["namespace"], service["name"])
    # A pod without the reference works; a forged one must not slip through.
    assert hooks["MutatingWebhookConfiguration"][0]["failurePolicy"] == "Ignore"
    assert hooks["ValidatingWebhookConfiguration"][0]["failurePolicy"] == "Fail"


def test_everything_lives_in_the_systems_namespace() -> None:
    assert of_kind("Namespace")[0]["metadata"]["name"] == "vmnet-system"
    cluster = {"Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", *HOOKS}
    for item in documents():
        if item["kind"] not in cluster:
            assert item["metadata"]["namespace"] == "vmnet-system", item["metadata"]["name"]


def test_bindings_and_workloads_name_what_exists() -> None:
    present = {(item["kind"], item["metadata"]["name"]) for item in documents()}
    for kind in ("ClusterRoleBinding", "RoleBinding"):
        for item in of_kind(kind):
            assert (item["roleRef"]["kind"], item["roleRef"]["name"]) in present
            assert all((subject["kind"], subject["name"]) in present for subject in item["subjects"])
    for item in of_kind("Deployment") + of_kind("DaemonSet"):
        template = item["spec"]["template"]
        assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in present
        assert item["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize("kind", ["ClusterRole", "Role"])
def test_no_role_has_a_wildcard(kind: str) -> None:
    for item in of_kind(kind):
        for rule in item["rules"]:
            assert "*" not in rule["resources"] + rule["apiGroups"] + rule["verbs"]
            assert set(rule["verbs"]) <= VERBS


def test_the_controller_runs_twice_and_restricted() -> None:
    (item,) = of_kind("Deployment")
    assert item["spec"]["replicas"] == 2
    pod = item["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    context = pod["containers"][0]["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
