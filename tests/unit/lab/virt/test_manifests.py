"""What virt-controller creates, against what the real one was recorded to create."""

from typing import Any

import pytest

from vmnet.kube.api import Object
from vmnet.lab.virt import kinds, manifests
from vmnet.model import names

JOB: Object = {"metadata": {"name": "kubevirt-migrate-vm-89j42", "uid": "job-1"}, "spec": {"vmiName": "blue"}}


def instance(**spec: Any) -> Object:
    vm = {
        "metadata": {"name": "blue", "namespace": "blue-namespace", "uid": "vm-1", "generation": 1},
        "spec": {
            "template": {
                "metadata": {"labels": {"app": "blue"}, "annotations": {"kubevirt.io/pci-topology-version": "v3"}},
                "spec": {
                    "domain": {"resources": {"requests": {"memory": "128Mi"}}},
                    "networks": [{"name": "happy", "pod": {}}],
                    **spec,
                },
            }
        },
    }
    vmi = manifests.instance_of(vm)
    vmi["metadata"]["uid"] = "vmi-1"
    vmi["metadata"]["annotations"] |= kinds.OBSERVED_ANNOTATIONS
    return vmi


def test_instance() -> None:
    vmi = instance()
    metadata = vmi["metadata"]
    assert metadata["finalizers"] == [kinds.VM_FINALIZER, kinds.FOREGROUND_FINALIZER]
    assert metadata["ownerReferences"][0]["kind"] == "VirtualMachine"
    assert metadata["labels"] == {"app": "blue"}
    assert vmi["status"]["phase"] == "Pending"
    assert vmi["status"]["virtualMachineRevisionName"] == "revision-start-vm-vm-1-1"
    assert vmi["spec"]["domain"]["memory"] == {"guest": "128Mi"}
    assert vmi["spec"]["domain"]["firmware"] == instance()["spec"]["domain"]["firmware"]


def test_launcher_pod() -> None:
    pod = manifests.launcher_pod(instance(), "0")
    metadata = pod["metadata"]
    assert metadata["generateName"] == "virt-launcher-blue-"
    assert metadata["labels"] == {
        "app": "blue",
        "kubevirt.io": "virt-launcher",
        "kubevirt.io/created-by": "vmi-1",
        "vm.kubevirt.io/name": "blue",
        "vmi.kubevirt.io/id": "blue",
    }
    assert set(metadata["annotations"]) == {
        "descheduler.alpha.kubernetes.io/request-evict-only",
        "kubectl.kubernetes.io/default-container",
        "kubevirt.io/domain",
        "kubevirt.io/memory-overhead-bytes",
        "kubevirt.io/migrationTransportUnix",
        "kubevirt.io/pci-topology-version",
        "kubevirt.io/vm-generation",
        "post.hook.backup.velero.io/command",
        "post.hook.backup.velero.io/container",
        "pre.hook.backup.velero.io/command",
        "pre.hook.backup.velero.io/container",
        "pre.hook.backup.velero.io/timeout",
    }
    assert pod["spec"]["readinessGates"] == [{"conditionType": "kubevirt.io/virtual-machine-unpaused"}]
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["hostname"] == "blue"


def test_target_pod() -> None:
    vmi = instance(nodeSelector={"disk": "fast"})
    vmi["status"]["nodeName"] = "n1"
    vmi["metadata"]["labels"] |= {kinds.NODE_NAME_LABEL: "n1", kinds.TARGET_NODE_LABEL: "n3"}
    pod = manifests.target_pod(vmi, {**JOB, "spec": {"vmiName": "blue", "addedNodeSelector": {"zone": "b"}}})
    labels = pod["metadata"]["labels"]
    assert labels[names.MIGRATION_JOB_LABEL] == "job-1"
    assert labels[kinds.NODE_NAME_LABEL] == "n1"
    assert kinds.TARGET_NODE_LABEL not in labels
    assert pod["metadata"]["annotations"][kinds.JOB_NAME_ANNOTATION] == JOB["metadata"]["name"]
    terms = pod["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert terms == [
        {"labelSelector": {"matchLabels": {"kubevirt.io/created-by": "vmi-1"}}, "topologyKey": "kubernetes.io/hostname"}
    ]
    assert pod["spec"]["nodeSelector"] | {"disk": "fast", "zone": "b"} == pod["spec"]["nodeSelector"]
    assert "--incoming" in pod["spec"]["containers"][0]["args"]
    assert "--incoming" not in manifests.launcher_pod(vmi, "0")["spec"]["containers"][0]["args"]


@pytest.mark.parametrize(
    ("text", "expected"), [("128Mi", 2**27), ("2048M", 2_048_000_000), ("1Gi", 2**30), ("64000", 64000), ("0", 0)]
)
def test_octets(text: str, expected: int) -> None:
    assert manifests.octets(text) == expected


def policy(name: str, instances: dict[str, str], namespaces: dict[str, str], **spec: Any) -> Object:
    selectors = {"virtualMachineInstanceSelector": instances, "namespaceSelector": namespaces}
    return {"metadata": {"name": name}, "spec": {"selectors": selectors, **spec}}


def test_the_closest_policy_wins() -> None:
    vmi = {"metadata": {"labels": {"speed": "slow", "tier": "1"}}}
    namespace = {"metadata": {"labels": {"team": "red"}}}
    policies = [
        policy("all", {}, {}),
        policy("other", {"speed": "fast"}, {}),
        policy("one", {"speed": "slow"}, {}),
        policy("two", {"speed": "slow"}, {"team": "red"}, allowPostCopy=True),
    ]
    found = manifests.matching_policy(policies, vmi, namespace)
    assert found is not None
    assert found["metadata"]["name"] == "two"
    assert manifests.configuration(found)["allowPostCopy"] is True
    assert manifests.matching_policy(policies[:2], vmi, namespace) is None
    assert manifests.configuration(None) == manifests.DEFAULT_CONFIGURATION
