"""The manifests: complete, pointing at each other, current, and no broader than the code."""

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from vmnet.cmd.main import parser
from vmnet.cmd.sources import read_text, settle, settled
from vmnet.lab import manifests
from vmnet.lab.apiserver.pod_security import RESTRICTED, violations
from vmnet.model import names

DEPLOY = manifests.DEPLOY
SYSTEM = "vmnet-system"
VERBS = {"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection", "approve", "sign"}
HOOKS = {"MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"}
POLICIES = {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
CLUSTER = {"Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", *HOOKS, *POLICIES}
NOT_MANIFESTS = {"kustomization.yaml", "install.yaml", "ports.yaml"}


@functools.cache
def rendered(folder: Path = DEPLOY) -> list[dict[str, Any]]:
    return manifests.documents(manifests.rendered(folder))


def of_kind(kind: str, folder: Path = DEPLOY) -> list[dict[str, Any]]:
    return [item for item in rendered(folder) if item["kind"] == kind]


def named(kind: str, name: str, folder: Path = DEPLOY) -> dict[str, Any]:
    (found,) = [item for item in of_kind(kind, folder) if item["metadata"]["name"] == name]
    return found


def identity(item: dict[str, Any]) -> tuple[str, str]:
    return item["kind"], item["metadata"]["name"]


def test_every_manifest_is_installed() -> None:
    on_disk = {
        identity(item)
        for path in DEPLOY.rglob("*.yaml")
        if path.name not in NOT_MANIFESTS and "overlays" not in path.parts
        for item in yaml.safe_load_all(path.read_text())
    }
    assert {identity(item) for item in rendered()} == on_disk


def test_the_single_file_is_current() -> None:
    # Compared as objects: another release of kubectl may order or wrap text differently.
    found = {identity(item): item for item in manifests.documents(manifests.INSTALL.read_text())}
    assert found == {identity(item): item for item in rendered()}, "run: make manifests"


def test_definitions_come_first() -> None:
    kinds = [item["kind"] for item in manifests.documents(manifests.INSTALL.read_text())]
    others = [place for place, kind in enumerate(kinds) if kind not in ("Namespace", "CustomResourceDefinition")]
    assert set(kinds[: others[0]]) == {"Namespace", "CustomResourceDefinition"}
    assert not {"Namespace", "CustomResourceDefinition"} & set(kinds[others[0] :])


@pytest.mark.parametrize("overlay", ["kind", "with-multus"])
def test_an_overlay_has_all_of_the_base(overlay: str) -> None:
    found = rendered(DEPLOY / "overlays" / overlay)
    assert {identity(item) for item in found} == {identity(item) for item in rendered()}
    assert found != rendered()


def test_the_image_is_said_in_one_place() -> None:
    (image,) = yaml.safe_load((DEPLOY / "base" / "kustomization.yaml").read_text())["images"]
    wanted = f"{image['newName']}:{image['newTag']}"
    workloads = [item for item in rendered() if item["kind"] in ("Deployment", "DaemonSet")]
    used = {container["image"] for item in workloads for container in item["spec"]["template"]["spec"]["containers"]}
    assert used == {wanted}
    # Nobody else says a version.
    assert [path for path in DEPLOY.rglob("*.yaml") if "image: vmnet:" in path.read_text()] == [manifests.INSTALL]


def test_a_dead_webhook_stops_no_pod_that_is_no_machine_s() -> None:
    hooks = {item["kind"]: item["webhooks"] for item in rendered() if item["kind"] in HOOKS}
    assert hooks.keys() == HOOKS
    for (hook,) in hooks.values():
        assert hook["objectSelector"] == {"matchLabels": {"kubevirt.io": "virt-launcher"}}
        assert {"key": names.PRIMARY_NETWORK_LABEL, "operator": "Exists"} in (
            hook["namespaceSelector"]["matchExpressions"]
        )
        assert [rule["resources"] for rule in hook["rules"]] == [["pods"]]
        place = hook["clientConfig"]["service"]
        service = named("Service", place["name"])
        assert place["namespace"] == service["metadata"]["namespace"]
        assert place["port"] in [port["port"] for port in service["spec"]["ports"]]
    # A pod without the reference works; a forged one must not slip through.
    assert hooks["MutatingWebhookConfiguration"][0]["failurePolicy"] == "Ignore"
    assert hooks["ValidatingWebhookConfiguration"][0]["failurePolicy"] == "Fail"


def test_everything_lives_in_the_systems_namespace() -> None:
    assert of_kind("Namespace")[0]["metadata"]["name"] == SYSTEM
    for item in rendered():
        assert item["metadata"]["labels"]["app.kubernetes.io/part-of"] == "vmnet", identity(item)
        if item["kind"] not in CLUSTER:
            assert item["metadata"]["namespace"] == SYSTEM, identity(item)


def test_bindings_services_and_workloads_name_what_exists() -> None:
    present = {identity(item) for item in rendered()}
    for item in of_kind("ClusterRoleBinding") + of_kind("RoleBinding"):
        assert (item["roleRef"]["kind"], item["roleRef"]["name"]) in present
        assert all((subject["kind"], subject["name"]) in present for subject in item["subjects"])
    for item in of_kind("ValidatingAdmissionPolicyBinding"):
        assert ("ValidatingAdmissionPolicy", item["spec"]["policyName"]) in present
        assert item["spec"]["validationActions"] == ["Deny"]
    pods = []
    for item in of_kind("Deployment") + of_kind("DaemonSet"):
        template = item["spec"]["template"]
        pods.append(template)
        assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in present
        assert item["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        for volume in template["spec"]["volumes"]:
            assert "configMap" not in volume or ("ConfigMap", volume["configMap"]["name"]) in present
        for constraint in template["spec"].get("topologySpreadConstraints") or ():
            assert constraint["labelSelector"]["matchLabels"] == item["spec"]["selector"]["matchLabels"]
    for item in of_kind("Service"):
        selected = [pod for pod in pods if item["spec"]["selector"].items() <= pod["metadata"]["labels"].items()]
        ports = {port["name"] for pod in selected for port in pod["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in item["spec"]["ports"]} <= ports
    for item in of_kind("PodDisruptionBudget"):
        assert (
            item["spec"]["selector"]["matchLabels"]
            == named("Deployment", item["metadata"]["name"])["spec"]["selector"]["matchLabels"]
        )


@pytest.mark.parametrize("kind", ["ClusterRole", "Role"])
def test_no_role_has_a_wildcard(kind: str) -> None:
    for item in of_kind(kind):
        for rule in item["rules"]:
            assert "*" not in rule["resources"] + rule["apiGroups"] + rule["verbs"]
            assert set(rule["verbs"]) <= VERBS


@pytest.mark.parametrize("folder", [".", "overlays/kind", "overlays/with-multus"])
@pytest.mark.parametrize(("kind", "name"), [("Deployment", "vmnet-controller"), ("DaemonSet", "vmnet-agent")])
def test_the_programs_take_these_arguments(kind: str, name: str, folder: str) -> None:
    pod = named(kind, name, DEPLOY / folder)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = {"NODE_NAME": "n1", "NODE_ADDRESS": "192.0.2.1", "POD_NAME": "c", "POD_NAMESPACE": SYSTEM}

    def expanded(word: str) -> str:
        for variable, value in values.items():
            word = word.replace(f"$({variable})", value)
        assert "$(" not in word
        return word

    environment = {item["name"]: expanded(item.get("value", f"$({item['name']})")) for item in container["env"]}
    environment.pop("VMNET_CONFIG", None)  # its file is the ConfigMap's, which another test reads
    arguments = [expanded(word) for word in container["args"]]
    command, _ = parser(arguments[0])
    found = settle(command.parse_args(arguments), environment).configuration
    ports = {item["name"]: item["containerPort"] for item in container["ports"]}
    if arguments[0] == "agent":
        assert found.agent.node_name == "n1"
        assert found.agent.metrics_address.port == ports["metrics"]
    else:
        assert found.controller.namespace == SYSTEM
        assert found.controller.metrics_address.port == ports["metrics"]
        assert found.controller.webhook_address is not None
        assert found.controller.webhook_address.port == ports["webhook"]


def test_the_configuration_is_sound() -> None:
    text = named("ConfigMap", "vmnet-config")["data"]["config.yaml"]
    values, problems = read_text(text.encode(), "config.yaml")
    assert not problems
    settled(values)


def test_the_controller_runs_twice_and_restricted() -> None:
    item = named("Deployment", "vmnet-controller")
    assert item["spec"]["replicas"] == 2
    assert {part["topologyKey"] for part in item["spec"]["template"]["spec"]["topologySpreadConstraints"]} == {
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    }
    assert named("PodDisruptionBudget", "vmnet-controller")["spec"]["maxUnavailable"] == 1
    assert violations(item["spec"]["template"], RESTRICTED) == []
    assert item["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def test_one_agent_at_a_time_is_replaced_and_each_node_has_one() -> None:
    spec = named("DaemonSet", "vmnet-agent")["spec"]
    assert spec["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0},
    }
    pod = spec["template"]["spec"]
    assert pod["hostNetwork"] is True
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["priorityClassName"] == "system-node-critical"
    context = pod["containers"][0]["securityContext"]
    assert context["readOnlyRootFilesystem"] is True


def test_an_agent_is_not_privileged_and_keeps_few_capabilities() -> None:
    pod = named("DaemonSet", "vmnet-agent")["spec"]["template"]["spec"]
    context = pod["containers"][0]["securityContext"]
    assert not context.get("privileged")
    assert context["capabilities"] == {
        "drop": ["ALL"],
        "add": ["NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW", "SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE"],
    }
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert "--no-new-privs" in pod["containers"][0]["command"]
    # What is mounted on the node is seen; nothing is mounted from inside.
    mounts = pod["containers"][0]["volumeMounts"]
    assert {mount["mountPropagation"] for mount in mounts if "mountPropagation" in mount} == {"HostToContainer"}
    assert "/run/netns" in [mount["mountPath"] for mount in mounts if "mountPropagation" in mount]


def test_every_port_is_written_once(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    path = tmp_path / "deploy" / "base" / "ports.yaml"
    ports = {name: int(text) for name, text in yaml.safe_load(path.read_text())["data"].items()}
    text = path.read_text()
    for number in ports.values():
        text = text.replace(f'"{number}"', f'"{number + 20000}"')
    path.write_text(text)
    found = manifests.rendered(tmp_path / "deploy")
    for name, number in ports.items():
        assert f"{number + 20000}" in found, name
        assert not re.search(rf"\b{number}\b", found), name
    assert "vmnet-ports" not in found


def test_no_other_pods_reach_ours_but_where_they_may() -> None:
    policies = {item["metadata"]["name"]: item["spec"] for item in of_kind("NetworkPolicy")}
    assert policies["nothing-by-default"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ports = {item["name"] for item in named("Deployment", "vmnet-controller")["spec"]["template"]["spec"]["containers"][0]["ports"]}  # fmt: skip  # noqa: E501
    opened = [port["port"] for rule in policies["vmnet-controller"]["ingress"] for port in rule["ports"]]
    assert set(opened) == ports
