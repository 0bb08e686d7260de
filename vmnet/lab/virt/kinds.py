"""Names that KubeVirt's API and its control plane share, and small readers of its objects."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from vmnet.kube.api import Object, Resource
from vmnet.kube.codec import encode_time

MIGRATION_POLICIES: Final = Resource(
    "migrations.kubevirt.io", "v1alpha1", "migrationpolicies", "MigrationPolicy", namespaced=False
)
API_VERSION: Final = "kubevirt.io/v1"

VM_FINALIZER: Final = "kubevirt.io/virtualMachineControllerFinalize"
FOREGROUND_FINALIZER: Final = "kubevirt.io/foregroundDeleteVirtualMachine"
VMIM_FINALIZER: Final = "kubevirt.io/migrationJobFinalize"

NODE_NAME_LABEL: Final = "kubevirt.io/nodeName"
TARGET_NODE_LABEL: Final = "kubevirt.io/migrationTargetNodeName"
VMI_NAME_LABEL: Final = "kubevirt.io/vmi-name"
SCHEDULABLE_LABEL: Final = "kubevirt.io/schedulable"
VM_NAME_LABEL: Final = "vm.kubevirt.io/name"
VMI_ID_LABEL: Final = "vmi.kubevirt.io/id"

JOB_NAME_ANNOTATION: Final = "kubevirt.io/migrationJobName"
NONROOT_ANNOTATION: Final = "kubevirt.io/nonroot"
GENERATION_ANNOTATION: Final = "kubevirt.io/vm-generation"
OBSERVED_ANNOTATIONS: Final = {
    "kubevirt.io/latest-observed-api-version": "v1",
    "kubevirt.io/storage-observed-api-version": "v1",
}
PAUSE_ANNOTATION: Final = "lab.vmnet.io/qemu-pause-ms"
"""The lab's own: milliseconds from QEMU's STOP on the source to its RESUME on the target, in the newest migration."""
STOPPED_ANNOTATION: Final = "lab.vmnet.io/qemu-stopped-at"
"""The lab's own: when that STOP was, seconds since the epoch."""

UNPAUSED_GATE: Final = "kubevirt.io/virtual-machine-unpaused"
LAUNCHER_IMAGE: Final = "quay.io/kubevirt/virt-launcher:devel"
FINAL: Final = ("Succeeded", "Failed")


def now() -> str:
    """The time as the API writes it."""
    return encode_time(datetime.now(UTC))


def go_time(text: str) -> str:
    """An API time as Go prints it, as the ready-timestamp annotation has it: 2026-11-23 06:49:28 +0000 UTC."""
    return text.replace("T", " ").removesuffix("Z") + " +0000 UTC"


def phase(item: Object) -> str:
    """``status.phase``; empty before the first."""
    return str((item.get("status") or {}).get("phase") or "")


def labels(item: Object) -> dict[str, str]:
    """A copy of its labels."""
    return dict(item["metadata"].get("labels") or {})


def annotations(item: Object) -> dict[str, str]:
    """A copy of its annotations."""
    return dict(item["metadata"].get("annotations") or {})


def deleting(item: Object) -> bool:
    """Whether its deletion was asked for."""
    return "deletionTimestamp" in item["metadata"]


def migration_state(vmi: Object) -> Mapping[str, Any]:
    """``status.migrationState``; empty without one."""
    return (vmi.get("status") or {}).get("migrationState") or {}


def migrating(vmi: Object) -> bool:
    """Whether memory may be on its way: started and not ended."""
    state = migration_state(vmi)
    return "startTimestamp" in state and "endTimestamp" not in state


def set_phase(item: Object, value: str) -> None:
    """Set the phase and note its time."""
    status = item.setdefault("status", {})
    status["phase"] = value
    times = status.setdefault("phaseTransitionTimestamps", [])
    if all(entry.get("phase") != value for entry in times):
        times.append({"phase": value, "phaseTransitionTimestamp": now()})


def condition(item: Object, kind: str) -> Mapping[str, Any] | None:
    """A condition of its status."""
    found: Iterable[Mapping[str, Any]] = (item.get("status") or {}).get("conditions") or []
    return next((entry for entry in found if entry.get("type") == kind), None)


def is_true(item: Object, kind: str) -> bool:
    """Whether it has the condition with status True."""
    found = condition(item, kind)
    return found is not None and found.get("status") == "True"


def with_condition(conditions: Iterable[Object], wanted: Object) -> list[Object]:
    """The list with ``wanted`` at the place of the old condition of its type, else at the end."""
    result = [dict(entry) for entry in conditions]
    for index, entry in enumerate(result):
        if entry.get("type") == wanted["type"]:
            result[index] = wanted
            return result
    return [*result, wanted]


def owner(item: Object, kind: str) -> Object | None:
    """Its controlling owner, if of that kind."""
    for reference in item["metadata"].get("ownerReferences") or []:
        if reference.get("controller") and reference.get("kind") == kind:
            return dict(reference)
    return None


def owned_by(item: Object, kind: str) -> list[Object]:
    """Owner references for what ``item`` controls."""
    return [
        {
            "apiVersion": API_VERSION,
            "kind": kind,
            "name": item["metadata"]["name"],
            "uid": item["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def pod_running(pod: Object) -> bool:
    """Whether all its containers have started."""
    status = pod.get("status") or {}
    containers = status.get("containerStatuses") or []
    return phase(pod) == "Running" and bool(containers) and all(entry.get("ready") for entry in containers)


def pod_alive(pod: Object) -> bool:
    """Not ended. KubeVirt leaves completed launcher pods where they are: the phase tells living from dead."""
    return phase(pod) not in FINAL
