"""virt-controller's VirtualMachines: whether the machine's instance should be there, and what its status says."""

import copy
from typing import Any, Final

from vmnet.kube.api import VMIS, VMS, AlreadyExists, Kube, NotFound, Object, PatchType
from vmnet.kube.events import Recorder
from vmnet.lab.virt import kinds, manifests
from vmnet.runtime.queue import KeyedQueue

COPIED: Final = ("Ready", "LiveMigratable", "StorageLiveMigratable", "AgentConnected", "Paused")
"""Conditions of the instance that the machine shows too."""


def run_strategy(vm: Object) -> str:
    """``spec.runStrategy``, or what the older ``spec.running`` means."""
    spec = vm["spec"]
    return str(spec.get("runStrategy") or ("Always" if spec.get("running") else "Halted"))


def requests(vm: Object) -> list[dict[str, Any]]:
    """Pending start and stop requests of ``virtctl start``, ``stop`` and ``restart``."""
    return list((vm.get("status") or {}).get("stateChangeRequests") or [])


def should_start(vm: Object) -> bool:
    """Whether a machine without instance should get one."""
    strategy = run_strategy(vm)
    asked = [request["action"] for request in requests(vm)]
    if asked[:1] == ["Start"]:
        return True
    # A machine that halts when its guest shuts down has no instance only before its first start or after a restart.
    return strategy in ("Always", "RerunOnFailure")


def should_stop(vm: Object, vmi: Object) -> bool:
    """Whether the instance should go."""
    strategy = run_strategy(vm)
    asked = requests(vm)
    if strategy == "Halted" or kinds.deleting(vm):
        return True
    if asked and asked[0]["action"] == "Stop" and asked[0].get("uid") == vmi["metadata"]["uid"]:
        return True
    if strategy == "Always":
        return kinds.phase(vmi) in kinds.FINAL
    return strategy == "RerunOnFailure" and kinds.phase(vmi) == "Failed"


def printable_status(vm: Object, vmi: Object | None) -> str:
    """The word in ``kubectl get vm``."""
    if kinds.deleting(vm):
        return "Terminating"
    if vmi is None or kinds.phase(vmi) in kinds.FINAL:
        return "Stopped"
    if kinds.deleting(vmi):
        return "Stopping"
    scheduled = kinds.condition(vmi, "PodScheduled")
    if scheduled is not None and scheduled.get("reason") == "Unschedulable" and kinds.phase(vmi) == "Scheduling":
        return "ErrorUnschedulable"
    if kinds.phase(vmi) != "Running":
        return "Starting"
    if kinds.is_true(vmi, "Paused"):
        return "Paused"
    if kinds.migrating(vmi):
        return "Migrating"
    return "Running"


def status_of(vm: Object, vmi: Object | None) -> Object:
    """The machine's whole status."""
    status: Object = copy.deepcopy(vm.get("status") or {})
    conditions = [item for item in status.get("conditions") or [] if item.get("type") not in COPIED]
    if vmi is None:
        status.pop("created", None)
        ready = {"type": "Ready", "status": "False", "reason": "VMINotExists", "message": "VMI does not exist"}
        conditions.insert(0, _timed(ready, vm))
    else:
        status["created"] = True
        found = {item["type"]: item for item in (vmi.get("status") or {}).get("conditions") or []}
        missing = {
            "type": "Ready",
            "status": "False",
            "reason": "VMIConditionMissing",
            "message": "VMI is missing the Ready condition",
        }
        copied = [copy.deepcopy(found[kind]) for kind in COPIED if kind in found]
        conditions = ([] if "Ready" in found else [_timed(missing, vm)]) + copied + conditions
    status["conditions"] = conditions
    if vmi is not None and kinds.is_true(vmi, "Ready"):
        status["ready"] = True
    else:
        status.pop("ready", None)
    status["printableStatus"] = printable_status(vm, vmi)
    status["runStrategy"] = run_strategy(vm)
    generation = vm["metadata"].get("generation", 1)
    status["desiredGeneration"] = generation
    if vmi is not None:
        observed = kinds.annotations(vmi).get(kinds.GENERATION_ANNOTATION, "")
        status["observedGeneration"] = int(observed) if observed.isdigit() else generation
    left = _requests_left(vm, vmi)
    if left:
        status["stateChangeRequests"] = left
    else:
        status.pop("stateChangeRequests", None)
    return status


def _requests_left(vm: Object, vmi: Object | None) -> list[dict[str, Any]]:
    """Requests that are not done: a stop is done when its instance is gone, a start when there is one."""
    left = requests(vm)
    if left and left[0]["action"] == "Stop" and (vmi is None or left[0].get("uid") != vmi["metadata"]["uid"]):
        left = left[1:]
    if left and left[0]["action"] == "Start" and vmi is not None and not kinds.deleting(vmi):
        left = left[1:]
    return left


def _timed(wanted: Object, vm: Object) -> Object:
    """With the time of its last change: kept while it says the same."""
    old = kinds.condition(vm, wanted["type"])
    same = old is not None and all(old.get(key) == wanted[key] for key in ("status", "reason"))
    stamp = old.get("lastTransitionTime") if same and old is not None else None
    stamp = stamp or kinds.now()
    return {"lastProbeTime": stamp, "lastTransitionTime": stamp, **wanted}


class Machines:
    """Reconciles one VirtualMachine by its key."""

    def __init__(self, kube: Kube, recorder: Recorder) -> None:
        self._kube = kube
        self._recorder = recorder
        self.queue = KeyedQueue()

    async def reconcile(self, key: str) -> float | None:
        """Raises KubeError; safe to repeat."""
        namespace, _, name = key.partition("/")
        try:
            vm = await self._kube.get(VMS, name, namespace)
        except NotFound:
            return None
        vmi = await self._instance(vm)
        if kinds.deleting(vm):
            await self._delete(vm, vmi)
            return None
        if not (vm.get("status") or {}).get("printableStatus"):
            vm = await self._kube.replace(VMS, {**vm, "status": {"printableStatus": "Stopped"}}, subresource="status")
        vm = await self._mark(vm)
        if vmi is None and should_start(vm):
            vmi = await self._start(vm)
        elif vmi is not None and should_stop(vm, vmi) and not kinds.deleting(vmi):
            await self._keep_generation(vm, vmi)
            await self._kube.delete(VMIS, name, namespace, uid=vmi["metadata"]["uid"])
            vmi = await self._instance(vm)
        status = status_of(vm, vmi)
        if status != vm.get("status"):
            await self._kube.replace(VMS, {**vm, "status": status}, subresource="status")
        # A stop that has just been done may leave a start behind.
        return 0.05 if vmi is None and status.get("stateChangeRequests") else None

    async def _instance(self, vm: Object) -> Object | None:
        """Its own instance; one of that name that others made is left alone."""
        try:
            vmi = await self._kube.get(VMIS, vm["metadata"]["name"], vm["metadata"]["namespace"])
        except NotFound:
            return None
        reference = kinds.owner(vmi, "VirtualMachine")
        return vmi if reference is not None and reference["uid"] == vm["metadata"]["uid"] else None

    async def _mark(self, vm: Object) -> Object:
        """Annotations and finalizer of a machine this controller has seen."""
        metadata = vm["metadata"]
        known = kinds.annotations(vm)
        if any(known.get(key) != value for key, value in kinds.OBSERVED_ANNOTATIONS.items()):
            marked = {**vm, "metadata": {**metadata, "annotations": {**known, **kinds.OBSERVED_ANNOTATIONS}}}
            vm = await self._kube.replace(VMS, marked)
        finalizers = metadata.get("finalizers")
        if kinds.VM_FINALIZER not in (finalizers or []):
            operations = [
                {"op": "test", "path": "/metadata/finalizers", "value": finalizers},
                {
                    "op": "replace" if finalizers else "add",
                    "path": "/metadata/finalizers",
                    "value": [*(finalizers or []), kinds.VM_FINALIZER],
                },
            ]
            if not finalizers:
                operations = operations[1:]
            vm = await self._kube.patch(VMS, metadata["name"], operations, metadata["namespace"], type=PatchType.JSON)
        return vm

    async def _start(self, vm: Object) -> Object | None:
        try:
            vmi = await self._kube.create(VMIS, manifests.instance_of(vm), vm["metadata"]["namespace"])
        except AlreadyExists:
            await self._recorder.event(
                vm, "FailedCreate", "a VirtualMachineInstance of this name belongs to somebody else", "Warning"
            )
            return None
        name = vm["metadata"]["name"]
        message = f"Started the virtual machine by creating the new virtual machine instance {name}"
        await self._recorder.event(vm, "SuccessfulCreate", message)
        return vmi

    async def _keep_generation(self, vm: Object, vmi: Object) -> None:
        generation = str(vm["metadata"].get("generation", 1))
        known = kinds.annotations(vmi)
        if known.get(kinds.GENERATION_ANNOTATION) in (None, generation):
            return
        operations = [
            {"op": "test", "path": "/metadata/annotations", "value": known},
            {
                "op": "replace",
                "path": "/metadata/annotations",
                "value": {**known, kinds.GENERATION_ANNOTATION: generation},
            },
        ]
        metadata = vmi["metadata"]
        await self._kube.patch(VMIS, metadata["name"], operations, metadata["namespace"], type=PatchType.JSON)

    async def _delete(self, vm: Object, vmi: Object | None) -> None:
        metadata = vm["metadata"]
        if vmi is not None:
            if not kinds.deleting(vmi):
                await self._kube.delete(VMIS, metadata["name"], metadata["namespace"], uid=vmi["metadata"]["uid"])
            status = status_of(vm, vmi)
            if status != vm.get("status"):
                await self._kube.replace(VMS, {**vm, "status": status}, subresource="status")
            return
        finalizers = metadata.get("finalizers") or []
        if kinds.VM_FINALIZER in finalizers:
            left = [item for item in finalizers if item != kinds.VM_FINALIZER]
            operations = [
                {"op": "test", "path": "/metadata/finalizers", "value": finalizers},
                {"op": "replace", "path": "/metadata/finalizers", "value": left},
            ]
            await self._kube.patch(VMS, metadata["name"], operations, metadata["namespace"], type=PatchType.JSON)
