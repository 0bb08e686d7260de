"""virt-controller's VirtualMachineInstanceMigrations: target pod, hand-over to virt-handler, outcome."""

import copy
import time
from datetime import UTC, datetime
from typing import Any, Final

from vmnet.kube.api import NAMESPACES, PODS, VMIMS, VMIS, Invalid, Kube, NotFound, Object, PatchType
from vmnet.kube.codec import decode_time
from vmnet.kube.events import Recorder
from vmnet.lab.virt import kinds, manifests
from vmnet.lab.virt.instances import current_pod, pods_selector
from vmnet.model import names
from vmnet.runtime.queue import KeyedQueue

BEFORE_HAND_OVER: Final = ("", "Pending", "Scheduling", "Scheduled")
KEPT: Final = 5
"""Finished jobs of one instance that are kept."""
UNSCHEDULABLE_SECONDS: Final = 300.0
PENDING_SECONDS: Final = 900.0
SOURCE_SECONDS: Final = 3.0
"""How long the source may take to report a migration whose target is down."""
ABORT_CONDITION: Final = "migrationAbortRequested"


def target_of(job: Object, pods: list[Object]) -> Object | None:
    """The job's own pod: the one that carries its uid."""
    uid = job["metadata"]["uid"]
    return next((pod for pod in pods if kinds.labels(pod).get(names.MIGRATION_JOB_LABEL) == uid), None)


def own_state(job: Object, vmi: Object) -> dict[str, Any]:
    """The instance's migrationState if it is about this job."""
    state = kinds.migration_state(vmi)
    return dict(state) if state.get("migrationUid") == job["metadata"]["uid"] else {}


def next_phase(job: Object, vmi: Object, target: Object | None) -> str:
    """The phase that follows from what is there, one step at a time, as the real one goes."""
    phase = kinds.phase(job)
    state = own_state(job, vmi)
    if state.get("completed"):
        return "Failed" if state.get("failed") else "Succeeded"
    if phase == "Pending" and target is not None:
        return "Scheduling"
    if phase == "Scheduling" and target is not None and kinds.pod_running(target):
        return "Scheduled"
    if phase == "Scheduled" and state:
        return "PreparingTarget"
    if phase == "PreparingTarget" and state.get("targetNodeAddress"):
        return "TargetReady"
    if phase == "TargetReady" and state.get("startTimestamp"):
        return "Running"
    return phase


def age_seconds(item: Object) -> float:
    """Seconds since its creation."""
    return (datetime.now(UTC) - decode_time(item["metadata"]["creationTimestamp"])).total_seconds()


class Migrations:
    """Reconciles one VirtualMachineInstanceMigration by its key."""

    def __init__(self, kube: Kube, recorder: Recorder) -> None:
        self._kube = kube
        self._recorder = recorder
        self._down_since: dict[str, float] = {}
        self.queue = KeyedQueue()

    async def reconcile(self, key: str) -> float | None:
        """Raises KubeError; safe to repeat."""
        namespace, _, name = key.partition("/")
        try:
            job = await self._kube.get(VMIMS, name, namespace)
        except NotFound:
            return None
        job = await self._mark(job)
        vmi = await self._instance(job)
        pods: list[Object] = []
        if vmi is not None:
            selector = pods_selector(vmi["metadata"]["uid"])
            pods = list((await self._kube.list(PODS, namespace, labels=selector)).items)
        if kinds.phase(job) in kinds.FINAL:
            await self._finish(job, vmi)
            return None
        if vmi is None or kinds.phase(vmi) in kinds.FINAL or kinds.deleting(vmi):
            await self._fail(job, vmi, "the virtual machine instance is gone or ended")
            return None
        target = target_of(job, pods)
        if kinds.deleting(job) and await self._abort(job, vmi, target):
            return None
        if not kinds.phase(job):
            if await self._other_active(job):
                await self._fail(job, vmi, "another migration of this instance is in progress")
                return None
            await self._set_pending(job, vmi, pods)
            return 0.0
        return await self._advance(job, vmi, pods, target)

    async def _advance(self, job: Object, vmi: Object, pods: list[Object], target: Object | None) -> float | None:
        phase = kinds.phase(job)
        if phase == "Pending" and target is None:
            return await self._create_target(job, vmi)
        state = own_state(job, vmi)
        if not state.get("completed") and phase != "Pending" and (target is None or not kinds.pod_alive(target)):
            return await self._target_down(job, vmi, state)
        if phase == "Scheduled" and target is not None and not state:
            await self._hand_over(job, vmi, pods, target)
            return 0.0
        if phase == "Running" and target is not None and state.get("targetNodeDomainReadyTimestamp"):
            await self._announce_ready(target, str(state["targetNodeDomainReadyTimestamp"]))
        following = next_phase(job, vmi, target)
        if following != phase:
            if following == "Failed":
                await self._fail(job, vmi, "source node reported migration failed")
                return None
            if following == "Succeeded" and target is not None and "targetNodeDomainReadyTimestamp" in state:
                await self._announce_ready(target, str(state["targetNodeDomainReadyTimestamp"]))
            await self._set_phase(job, following)
            if following == "Succeeded":
                await self._recorder.event(job, "SuccessfulMigration", "Source node reported migration succeeded")
            return 0.0
        return await self._still_scheduling(job, vmi, target) if phase == "Scheduling" else None

    async def _still_scheduling(self, job: Object, vmi: Object, target: Object | None) -> float | None:
        """Give up on a target that finds no node, or does not get going."""
        if target is None:
            return None
        scheduled = kinds.condition(target, "PodScheduled")
        unschedulable = scheduled is not None and scheduled.get("reason") == "Unschedulable"
        limit = UNSCHEDULABLE_SECONDS if unschedulable else PENDING_SECONDS
        left = limit - age_seconds(target)
        if left > 0:
            return left
        await self._delete_pod(target)
        await self._fail(job, vmi, f"the target pod could not be started within {limit:g} s")
        return None

    # Steps

    async def _mark(self, job: Object) -> Object:
        known, finalizers = kinds.annotations(job), job["metadata"].get("finalizers") or []
        wanted = copy.deepcopy(job)
        if kinds.phase(job) not in kinds.FINAL and not kinds.deleting(job):
            if kinds.VMIM_FINALIZER not in finalizers:
                wanted["metadata"]["finalizers"] = [*finalizers, kinds.VMIM_FINALIZER]
            label = {kinds.VMI_NAME_LABEL: job["spec"].get("vmiName", "")[:63]}
            wanted["metadata"]["labels"] = kinds.labels(job) | label
        wanted["metadata"]["annotations"] = known | kinds.OBSERVED_ANNOTATIONS
        return job if wanted == job else await self._kube.replace(VMIMS, wanted)

    async def _instance(self, job: Object) -> Object | None:
        try:
            return await self._kube.get(VMIS, job["spec"].get("vmiName", ""), job["metadata"]["namespace"])
        except NotFound:
            return None

    async def _other_active(self, job: Object) -> bool:
        return any(item["metadata"]["uid"] != job["metadata"]["uid"] for item in await active_jobs(self._kube, job))

    async def _set_pending(self, job: Object, vmi: Object, pods: list[Object]) -> None:
        wanted = copy.deepcopy(job)
        source = current_pod(vmi, pods)
        kinds.set_phase(wanted, "Pending")
        if source is not None:
            wanted["status"]["migrationState"] = {"sourcePod": source["metadata"]["name"]}
        await self._kube.replace(VMIMS, wanted, subresource="status")

    async def _create_target(self, job: Object, vmi: Object) -> float | None:
        if not kinds.is_true(vmi, "LiveMigratable") or kinds.phase(vmi) != "Running":
            # It may come: the instance's next write brings the key back.
            return 5.0
        if kinds.NONROOT_ANNOTATION not in kinds.annotations(vmi):
            path = "/metadata/annotations/" + kinds.NONROOT_ANNOTATION.replace("/", "~1")
            vmi = await self._patch_instance(vmi, [{"op": "add", "path": path, "value": "true"}])
        pod = await self._kube.create(PODS, manifests.target_pod(vmi, job), job["metadata"]["namespace"])
        message = f"Created migration target pod {pod['metadata']['name']}"
        await self._recorder.event(job, "SuccessfulCreate", message)
        await self._set_phase(job, "Scheduling")
        return None

    async def _hand_over(self, job: Object, vmi: Object, pods: list[Object], target: Object) -> None:
        """One patch that tells both virt-handlers what to do."""
        source = current_pod(vmi, pods)
        if source is None:
            await self._fail(job, vmi, "the source pod is gone")
            return
        policy = await self._policy(vmi)
        node = target["spec"]["nodeName"]
        state: Object = {
            "migrationConfiguration": manifests.configuration(policy),
            "migrationUid": job["metadata"]["uid"],
            "sourceNode": vmi["status"]["nodeName"],
            "sourcePod": source["metadata"]["name"],
            "targetMemoryOverhead": manifests.overhead(),
            "targetNode": node,
            "targetPod": target["metadata"]["name"],
        }
        if policy is not None:
            state["migrationPolicyName"] = policy["metadata"]["name"]
        old = (vmi.get("status") or {}).get("migrationState")
        known = kinds.labels(vmi)
        operations: list[Object] = [
            {"op": "test", "path": "/status/migrationState", "value": old},
            {"op": "add" if old is None else "replace", "path": "/status/migrationState", "value": state},
            {"op": "test", "path": "/metadata/labels", "value": known},
            {"op": "replace", "path": "/metadata/labels", "value": known | {kinds.TARGET_NODE_LABEL: node}},
        ]
        try:
            await self._patch_instance(vmi, operations)
        except Invalid:
            return  # a test failed; the next round reads again
        message = "Migration target pod is ready for preparation by virt-handler."
        await self._recorder.event(job, "SuccessfulHandOver", message)

    async def _policy(self, vmi: Object) -> Object | None:
        try:
            policies = list((await self._kube.list(kinds.MIGRATION_POLICIES)).items)
        except NotFound:
            return None
        if not policies:
            return None
        namespace = await self._kube.get(NAMESPACES, vmi["metadata"]["namespace"])
        return manifests.matching_policy(policies, vmi, namespace)

    async def _announce_ready(self, target: Object, stamp: str) -> None:
        """The annotation that tells the network that the guest runs in the target pod."""
        if names.TARGET_READY_ANNOTATION in kinds.annotations(target):
            return
        path = "/metadata/annotations/" + names.TARGET_READY_ANNOTATION.replace("/", "~1")
        metadata = target["metadata"]
        await self._kube.patch(
            PODS,
            metadata["name"],
            [{"op": "add", "path": path, "value": kinds.go_time(stamp)}],
            metadata["namespace"],
            type=PatchType.JSON,
        )

    # Ends

    async def _target_down(self, job: Object, vmi: Object, state: dict[str, Any]) -> float | None:
        uid = job["metadata"]["uid"]
        if state.get("startTimestamp"):
            # The source's virt-handler sees its connection break and knows more: its word comes first.
            left = self._down_since.setdefault(uid, time.monotonic()) + SOURCE_SECONDS - time.monotonic()
            if left > 0:
                return left
        self._down_since.pop(uid, None)
        if state:
            stamp = kinds.now()
            operations: list[Object] = [
                {"op": "test", "path": "/status/migrationState/migrationUid", "value": job["metadata"]["uid"]},
                {"op": "add", "path": "/status/migrationState/failed", "value": True},
                {"op": "add", "path": "/status/migrationState/completed", "value": True},
                {"op": "add", "path": "/status/migrationState/endTimestamp", "value": stamp},
            ]
            if "startTimestamp" not in state:
                operations.append({"op": "add", "path": "/status/migrationState/startTimestamp", "value": stamp})
            operations.append(
                {"op": "add", "path": "/status/migrationState/failureReason", "value": "Target pod is down"}
            )
            vmi = await self._patch_instance(vmi, operations)
            message = f"VirtualMachineInstance migration uid {uid} failed. reason: Target pod is down"
            await self._recorder.event(vmi, "FailedMigration", message, "Warning")
        await self._fail(job, vmi, "Migration failed because target pod shutdown during migration")
        return None

    async def _abort(self, job: Object, vmi: Object, target: Object | None) -> bool:
        """The job was deleted. Returns whether that settles it; otherwise it ends as virt-handler says."""
        state = own_state(job, vmi)
        if kinds.phase(job) in BEFORE_HAND_OVER and not state:
            if target is not None:
                await self._delete_pod(target)
                pod = f"{target['metadata']['namespace']}/{target['metadata']['name']}"
                message = f"migration canceled and pod {pod} is deleted"
                await self._recorder.event(job, "SuccessfulDelete", message)
            await self._fail(job, None, "Migration failed due to being canceled", aborted=True)
            return True
        if not state.get("abortRequested") and not state.get("completed"):
            old = (vmi.get("status") or {}).get("migrationState")
            operations: list[Object] = [
                {"op": "test", "path": "/status/migrationState", "value": old},
                {"op": "replace", "path": "/status/migrationState", "value": {**state, "abortRequested": True}},
            ]
            try:
                await self._patch_instance(vmi, operations)
            except Invalid:
                self.queue.add_after(_key(job), 0.02)
                return True
            wanted = copy.deepcopy(job)
            _request_abort(wanted)
            await self._kube.replace(VMIMS, wanted, subresource="status")
            message = "Migration is ready to be canceled by virt-handler."
            await self._recorder.event(job, "SuccessfulAbortMigration", message)
            return True
        return False

    async def _set_phase(self, job: Object, phase: str) -> Object:
        wanted = copy.deepcopy(job)
        kinds.set_phase(wanted, phase)
        return await self._kube.replace(VMIMS, wanted, subresource="status")

    async def _fail(self, job: Object, vmi: Object | None, message: str, *, aborted: bool = False) -> None:
        wanted = copy.deepcopy(job)
        if aborted:
            _request_abort(wanted)
        kinds.set_phase(wanted, "Failed")
        job = await self._kube.replace(VMIMS, wanted, subresource="status")
        await self._recorder.event(job, "FailedMigration", message, "Warning")
        await self._finish(job, vmi)

    async def _finish(self, job: Object, vmi: Object | None) -> None:
        """Keep what the instance says of it, let it go, and drop the oldest of its kind."""
        if vmi is not None and own_state(job, vmi):
            wanted = copy.deepcopy(job)
            wanted["status"]["migrationState"] = own_state(job, vmi)
            if wanted != job:
                job = await self._kube.replace(VMIMS, wanted, subresource="status")
        finalizers = job["metadata"].get("finalizers") or []
        if kinds.VMIM_FINALIZER in finalizers:
            wanted = copy.deepcopy(job)
            wanted["metadata"]["finalizers"] = [item for item in finalizers if item != kinds.VMIM_FINALIZER]
            try:
                await self._kube.replace(VMIMS, wanted)
            except NotFound:
                return
            await self._collect(job)

    async def _collect(self, job: Object) -> None:
        namespace = job["metadata"]["namespace"]
        selector = f"{kinds.VMI_NAME_LABEL}={job['spec'].get('vmiName', '')}"
        listed = await self._kube.list(VMIMS, namespace, labels=selector)
        done = [item for item in listed.items if kinds.phase(item) in kinds.FINAL and not kinds.deleting(item)]
        done.sort(key=lambda item: item["metadata"].get("creationTimestamp", ""), reverse=True)
        for old in done[KEPT:]:
            pods = await self._kube.list(
                PODS, namespace, labels=f"{names.MIGRATION_JOB_LABEL}={old['metadata']['uid']}"
            )
            for pod in pods.items:
                if not kinds.pod_alive(pod):
                    await self._delete_pod(pod)
            try:
                await self._kube.delete(VMIMS, old["metadata"]["name"], namespace)
            except NotFound:
                continue

    async def _delete_pod(self, pod: Object) -> None:
        metadata = pod["metadata"]
        try:
            await self._kube.delete(PODS, metadata["name"], metadata["namespace"], uid=metadata["uid"])
        except NotFound:
            return

    async def _patch_instance(self, vmi: Object, operations: list[Object]) -> Object:
        metadata = vmi["metadata"]
        return await self._kube.patch(VMIS, metadata["name"], operations, metadata["namespace"], type=PatchType.JSON)


async def active_jobs(kube: Kube, job: Object) -> list[Object]:
    """Jobs of the same instance that have not ended. ``job`` needs a namespace and ``spec.vmiName`` only."""
    listed = await kube.list(VMIMS, job["metadata"]["namespace"])
    return [
        item
        for item in listed.items
        if item["spec"].get("vmiName") == job["spec"].get("vmiName") and kinds.phase(item) not in kinds.FINAL
    ]


def _request_abort(job: Object) -> None:
    status = job.setdefault("status", {})
    condition = {"type": ABORT_CONDITION, "status": "True", "lastProbeTime": None, "lastTransitionTime": kinds.now()}
    status["conditions"] = kinds.with_condition(status.get("conditions") or [], condition)


def _key(item: Object) -> str:
    return f"{item['metadata']['namespace']}/{item['metadata']['name']}"
