"""virt-controller's VirtualMachineInstances: the launcher pod, and what the instance's status says of it."""

import copy
import json
from typing import Any, Final

from vmnet.kube.api import PODS, VMIMS, VMIS, Invalid, Kube, NotFound, Object, PatchType
from vmnet.kube.events import Recorder
from vmnet.lab.virt import kinds, manifests, plumbing
from vmnet.model import names
from vmnet.runtime.queue import KeyedQueue

_NOT_RUNNING: Final = ("GuestNotRunning", "Guest VM is not reported as running")
_TERMINATING: Final = ("PodTerminating", "virt-launcher pod is terminating")


def pods_selector(uid: str) -> str:
    """Label selector of an instance's launcher pods."""
    return f"{names.CREATED_BY_LABEL}={uid}"


def current_pod(vmi: Object, pods: list[Object]) -> Object | None:
    """The launcher pod the guest is in: on ``status.nodeName``, the living before the dead, the newest of these.

    Before there is a node, the first one that is no migration's target.
    """
    node = (vmi.get("status") or {}).get("nodeName")
    if not node:
        first = [pod for pod in pods if kinds.JOB_NAME_ANNOTATION not in kinds.annotations(pod)]
        return next((pod for pod in first if kinds.pod_alive(pod)), first[0] if first else None)
    here = [pod for pod in pods if (pod["spec"].get("nodeName")) == node]
    here.sort(key=lambda pod: (kinds.pod_alive(pod), pod["metadata"].get("creationTimestamp", "")), reverse=True)
    return here[0] if here else None


def primary_interface(pod: Object) -> str:
    """The pod's default interface by network-status; ``eth0`` while nothing says otherwise."""
    text = kinds.annotations(pod).get(names.NETWORK_STATUS_ANNOTATION)
    try:
        entries = json.loads(text) if text else []
    except ValueError:
        entries = []
    return next((str(item["interface"]) for item in entries if item.get("default") and item.get("interface")), "eth0")


def primary_network(vmi: Object) -> str | None:
    """Name of the instance's network that is the pod's, in its own spec."""
    for network in vmi["spec"].get("networks") or []:
        if "pod" in network:
            return str(network["name"])
    return None


def ready_condition(vmi: Object, pod: Object | None) -> Object:
    """The instance's Ready, from its phase and its pod's Ready."""
    if pod is not None and kinds.deleting(pod):
        return _ready("False", *_TERMINATING)
    if kinds.phase(vmi) != "Running" or pod is None:
        return _ready("False", *_NOT_RUNNING)
    found = next(
        (item for item in (pod.get("status") or {}).get("conditions") or [] if item.get("type") == "Ready"), None
    )
    if found is None:
        return _ready("False", "PodConditionMissing", "virt-launcher pod is missing the Ready condition")
    wanted = {
        "type": "Ready",
        "status": found["status"],
        "lastProbeTime": None,
        "lastTransitionTime": found.get("lastTransitionTime"),
    }
    for key in ("reason", "message"):
        if found.get(key):
            wanted[key] = found[key]
    return wanted


def _ready(status: str, reason: str, message: str) -> Object:
    stamp = kinds.now()
    return {
        "type": "Ready",
        "status": status,
        "reason": reason,
        "message": message,
        "lastProbeTime": stamp,
        "lastTransitionTime": stamp,
    }


def same_condition(old: Any, new: Object) -> bool:
    """Equal but for the times, which move only with the rest."""
    return old is not None and all(old.get(key) == new.get(key) for key in ("status", "reason", "message"))


def active_pods(vmi: Object, pods: list[Object]) -> dict[str, str]:
    """``status.activePods``: node by pod uid, of every pod that exists, completed ones too."""
    return {pod["metadata"]["uid"]: str(pod["spec"].get("nodeName") or "") for pod in pods}


class Instances:
    """Reconciles one VirtualMachineInstance by its key."""

    def __init__(self, kube: Kube, recorder: Recorder) -> None:
        self._kube = kube
        self._recorder = recorder
        self.queue = KeyedQueue()

    async def reconcile(self, key: str) -> float | None:
        """Raises KubeError; safe to repeat."""
        namespace, _, name = key.partition("/")
        try:
            vmi = await self._kube.get(VMIS, name, namespace)
        except NotFound:
            await self._forget_migrations(namespace, name)
            return None
        listed = await self._kube.list(PODS, namespace, labels=pods_selector(vmi["metadata"]["uid"]))
        pods = list(listed.items)
        if kinds.deleting(vmi):
            await self._delete(vmi, pods)
            return None
        if kinds.phase(vmi) in kinds.FINAL:
            await self._ended(vmi, pods)
            return None
        if not kinds.phase(vmi) or kinds.FOREGROUND_FINALIZER not in (vmi["metadata"].get("finalizers") or []):
            # Made by a user, who has no admission webhook here.
            completed = copy.deepcopy(vmi)
            manifests.complete(completed)
            vmi = await self._kube.replace(VMIS, completed)
        known = kinds.annotations(vmi)
        if any(known.get(key) != value for key, value in kinds.OBSERVED_ANNOTATIONS.items()):
            marked = copy.deepcopy(vmi)
            marked["metadata"]["annotations"] = known | kinds.OBSERVED_ANNOTATIONS
            vmi = await self._kube.replace(VMIS, marked)
        if not pods and kinds.phase(vmi) == "Pending":
            pods = [await self._create_pod(vmi)]
        pod = current_pod(vmi, pods)
        if pod is not None:
            await self._unpaused_gate(vmi, pod)
        if kinds.phase(vmi) in ("Pending", "Scheduling"):
            await self._starting(vmi, pods, pod)
        else:
            await self._started(vmi, pods, pod)
        return None

    async def _create_pod(self, vmi: Object) -> Object:
        pod = await self._kube.create(
            PODS, manifests.launcher_pod(vmi, manifests.overhead()), vmi["metadata"]["namespace"]
        )
        message = f"Created virtual machine pod {pod['metadata']['name']}"
        await self._recorder.event(vmi, "SuccessfulCreate", message)
        return pod

    async def _unpaused_gate(self, vmi: Object, pod: Object) -> None:
        """The pod's readiness gate: a paused guest must leave the endpoints of its services."""
        if kinds.deleting(pod) or not kinds.pod_alive(pod):
            return
        paused = kinds.is_true(vmi, "Paused")
        wanted = (
            ("False", "Paused", "the virtual machine is paused")
            if paused
            else ("True", "NotPaused", "the virtual machine is not paused")
        )
        found = kinds.condition(pod, kinds.UNPAUSED_GATE)
        if found is not None and found.get("status") == wanted[0]:
            return
        stamp = kinds.now()
        condition = {
            "type": kinds.UNPAUSED_GATE,
            "status": wanted[0],
            "reason": wanted[1],
            "message": wanted[2],
            "lastProbeTime": stamp,
            "lastTransitionTime": stamp,
        }
        metadata = pod["metadata"]
        await self._kube.patch(
            PODS,
            metadata["name"],
            {"status": {"conditions": [condition]}},
            metadata["namespace"],
            type=PatchType.STRATEGIC,
            subresource="status",
        )

    async def _starting(self, vmi: Object, pods: list[Object], pod: Object | None) -> None:
        """Up to Scheduled, by PUT of the whole object."""
        wanted = copy.deepcopy(vmi)
        status = wanted.setdefault("status", {})
        status["activePods"] = active_pods(vmi, pods)
        if pod is None:
            kinds.set_phase(wanted, "Failed")
        elif kinds.phase(wanted) == "Pending":
            kinds.set_phase(wanted, "Scheduling")
            status["conditions"] = kinds.with_condition(status.get("conditions") or [], ready_condition(wanted, pod))
            status["launcherContainerImageVersion"] = kinds.LAUNCHER_IMAGE
            status.setdefault("memory", {})["memoryOverhead"] = manifests.overhead()
        elif not kinds.pod_alive(pod) or kinds.deleting(pod):
            kinds.set_phase(wanted, "Failed")
        elif kinds.pod_running(pod):
            self._scheduled(wanted, pod)
        if pod is not None:
            self._scheduling(wanted, pod)
            if (pod.get("status") or {}).get("qosClass") and pod["spec"].get("nodeName"):
                status["qosClass"] = pod["status"]["qosClass"]
        if wanted != vmi:
            vmi = await self._kube.replace(VMIS, wanted)
        if kinds.phase(vmi) == "Scheduled" and pod is not None:
            await self._label_pod(vmi, pod)

    @staticmethod
    def _scheduling(wanted: Object, pod: Object) -> None:
        """A pod that finds no node says so on the instance."""
        status = wanted["status"]
        conditions = [item for item in status.get("conditions") or [] if item.get("type") != "PodScheduled"]
        found = kinds.condition(pod, "PodScheduled")
        if found is not None and found.get("status") == "False":
            conditions.append({"lastProbeTime": None, **found})
        if conditions != status.get("conditions"):
            status["conditions"] = conditions

    @staticmethod
    def _scheduled(wanted: Object, pod: Object) -> None:
        status = wanted["status"]
        node = pod["spec"]["nodeName"]
        kinds.set_phase(wanted, "Scheduled")
        wanted["metadata"].setdefault("labels", {})[kinds.NODE_NAME_LABEL] = node
        status["nodeName"] = node
        status["migrationTransport"] = "Unix"
        found = []
        for network in wanted["spec"].get("networks") or []:
            if "pod" in network:
                found.append({"name": network["name"], "podInterfaceName": primary_interface(pod)})
            elif "multus" in network:
                found.append({"name": network["name"], "podInterfaceName": plumbing.hashed_name(network["name"])})
        if found:
            status["interfaces"] = found
        volumes = [{"name": item["name"], "target": ""} for item in wanted["spec"].get("volumes") or []]
        if volumes:
            status["volumeStatus"] = sorted(volumes, key=lambda item: item["name"])

    async def _started(self, vmi: Object, pods: list[Object], pod: Object | None) -> None:
        """From Scheduled on, by JSON patches: virt-handler writes the object too."""
        if pod is None and not any(kinds.pod_alive(item) for item in pods):
            failed = copy.deepcopy(vmi)
            kinds.set_phase(failed, "Failed")
            failed["status"]["reason"] = "LauncherPodGone"
            await self._kube.replace(VMIS, failed)
            return
        operations: list[Object] = []
        status = vmi.get("status") or {}
        if pod is not None:
            await self._label_pod(vmi, pod)
            ready = ready_condition(vmi, pod)
            if not same_condition(kinds.condition(vmi, "Ready"), ready):
                conditions = status.get("conditions") or []
                operations += _tested("/status/conditions", conditions, kinds.with_condition(conditions, ready))
            interfaces = self._interfaces(vmi, pod)
            if interfaces != (status.get("interfaces") or []):
                operations += _tested("/status/interfaces", status.get("interfaces"), interfaces)
            if "launcherContainerImageVersion" not in status:
                operations.append(
                    {"op": "add", "path": "/status/launcherContainerImageVersion", "value": kinds.LAUNCHER_IMAGE}
                )
        wanted = active_pods(vmi, pods)
        if wanted != (status.get("activePods") or {}):
            operations += _tested("/status/activePods", status.get("activePods"), wanted)
        if operations:
            await self._patch(vmi, operations)

    @staticmethod
    def _interfaces(vmi: Object, pod: Object) -> list[Object]:
        """With the name of the pod's interface put right, should network-status have come late."""
        interfaces = copy.deepcopy((vmi.get("status") or {}).get("interfaces") or [])
        network = primary_network(vmi)
        for item in interfaces:
            if item.get("name") == network and names.NETWORK_STATUS_ANNOTATION in kinds.annotations(pod):
                item["podInterfaceName"] = primary_interface(pod)
        return interfaces

    async def _label_pod(self, vmi: Object, pod: Object) -> None:
        node = (vmi.get("status") or {}).get("nodeName")
        known = kinds.labels(pod)
        if not node or known.get(kinds.NODE_NAME_LABEL) == node or not kinds.pod_alive(pod):
            return
        operations = _tested("/metadata/labels", known, known | {kinds.NODE_NAME_LABEL: node})
        metadata = pod["metadata"]
        await self._kube.patch(PODS, metadata["name"], operations, metadata["namespace"], type=PatchType.JSON)

    async def _patch(self, vmi: Object, operations: list[Object]) -> None:
        metadata = vmi["metadata"]
        try:
            await self._kube.patch(VMIS, metadata["name"], operations, metadata["namespace"], type=PatchType.JSON)
        except Invalid:
            # A test failed: somebody wrote meanwhile, and that write brings the key back.
            self.queue.add_after(f"{metadata['namespace']}/{metadata['name']}", 0.02)

    async def _delete(self, vmi: Object, pods: list[Object]) -> None:
        for pod in pods:
            if not kinds.deleting(pod):
                await self._delete_pod(pod)
        current = current_pod(vmi, pods)
        if kinds.phase(vmi) not in kinds.FINAL:
            seen_by_handler = bool((vmi.get("status") or {}).get("nodeName"))
            if not pods or (not seen_by_handler and not any(kinds.pod_alive(item) for item in pods)):
                ended = copy.deepcopy(vmi)
                kinds.set_phase(ended, "Succeeded" if not seen_by_handler else "Failed")
                await self._kube.replace(VMIS, ended)
                return
            ready = ready_condition(vmi, current)
            if current and not same_condition(kinds.condition(vmi, "Ready"), ready):
                conditions = (vmi.get("status") or {}).get("conditions") or []
                await self._patch(
                    vmi, _tested("/status/conditions", conditions, kinds.with_condition(conditions, ready))
                )
            return
        await self._ended(vmi, pods)
        if not pods:
            vmi = await self._kube.get(VMIS, vmi["metadata"]["name"], vmi["metadata"]["namespace"])
            gone = copy.deepcopy(vmi)
            finalizers = gone["metadata"].get("finalizers") or []
            gone["metadata"]["finalizers"] = [item for item in finalizers if item != kinds.FOREGROUND_FINALIZER]
            gone["status"].pop("activePods", None)
            gone["status"].pop("launcherContainerImageVersion", None)
            if gone != vmi:
                await self._kube.replace(VMIS, gone)

    async def _ended(self, vmi: Object, pods: list[Object]) -> None:
        """The guest has ended: this controller's own finalizer is no longer needed, nor are the pods."""
        finalizers = vmi["metadata"].get("finalizers") or []
        if kinds.VM_FINALIZER in finalizers:
            left = [item for item in finalizers if item != kinds.VM_FINALIZER]
            await self._patch(vmi, _tested("/metadata/finalizers", finalizers, left))
        for pod in pods:
            if kinds.pod_alive(pod) and not kinds.deleting(pod):
                await self._delete_pod(pod)

    async def _delete_pod(self, pod: Object) -> None:
        metadata = pod["metadata"]
        try:
            await self._kube.delete(PODS, metadata["name"], metadata["namespace"], uid=metadata["uid"])
        except NotFound:
            return

    async def _forget_migrations(self, namespace: str, name: str) -> None:
        """Jobs of an instance that is gone."""
        listed = await self._kube.list(VMIMS, namespace, labels=f"{kinds.VMI_NAME_LABEL}={name}")
        for job in listed.items:
            if not kinds.deleting(job):
                try:
                    await self._kube.delete(VMIMS, job["metadata"]["name"], namespace)
                except NotFound:
                    continue


def _tested(path: str, old: Any, new: Any) -> list[Object]:
    """A change that holds only while the old value does."""
    if old is None:
        return [{"op": "add", "path": path, "value": new}]
    return [{"op": "test", "path": path, "value": old}, {"op": "replace", "path": path, "value": new}]
