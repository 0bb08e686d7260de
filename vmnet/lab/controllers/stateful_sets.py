"""StatefulSets: pods with numbers, made in order, removed in reverse order.

No ControllerRevision is written and no volume claim is made: revisions are hashes of the template, in the status.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from vmnet.kube.api import PODS, AlreadyExists, Conflict, Kube, NotFound, Object
from vmnet.kube.events import Recorder
from vmnet.lab.controllers.cluster import STATEFUL_SETS, Informers, is_ready, is_terminating, owner
from vmnet.lab.controllers.placement import is_finished
from vmnet.lab.controllers.replica_sets import available_in
from vmnet.lab.controllers.templates import REVISION_LABEL, pod_from, template_hash

_INDEX_LABEL: Final = "apps.kubernetes.io/pod-index"
_NAME_LABEL: Final = "statefulset.kubernetes.io/pod-name"


def ordinal(pod: Object) -> int:
    """The number at the end of a pod's name; -1 where there is none."""
    tail = pod["metadata"]["name"].rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def _revision(pod: Object) -> str:
    return str((pod["metadata"].get("labels") or {}).get(REVISION_LABEL, ""))


class StatefulSets:
    """Reconciles StatefulSets by key."""

    def __init__(
        self,
        kube: Kube,
        informers: Informers,
        events: Recorder,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._kube = kube
        self._informers = informers
        self._events = events
        self._now = now

    async def reconcile(self, key: str) -> float | None:
        """One step; the pods' own changes bring the next."""
        found = self._informers[STATEFUL_SETS].get(key)
        if found is None:
            return None
        listed = await self._kube.list(PODS, found["metadata"]["namespace"])
        pods = {ordinal(pod): pod for pod in listed.items if self._is_own(found, pod)}
        wanted = f"{found['metadata']['name']}-{template_hash(found['spec']['template'])}"
        if not is_terminating(found):
            pods = await self._step(found, pods, wanted)
        return await self._tell(found, pods, wanted)

    def _is_own(self, found: Object, pod: Object) -> bool:
        reference = owner(pod, STATEFUL_SETS.kind)
        return reference is not None and reference["uid"] == found["metadata"]["uid"] and ordinal(pod) >= 0

    def _settled(self, found: Object, pod: Object) -> bool:
        seconds = found["spec"].get("minReadySeconds", 0)
        return not is_terminating(pod) and available_in(pod, seconds, self._now()) == 0

    async def _step(self, found: Object, pods: dict[int, Object], revision: str) -> dict[int, Object]:
        spec = found["spec"]
        first = (spec.get("ordinals") or {}).get("start", 0)
        numbers = range(first, first + spec.get("replicas", 1))
        parallel = spec.get("podManagementPolicy") == "Parallel"
        for number in numbers:
            pod = pods.get(number)
            if pod is not None and is_finished(pod) and not is_terminating(pod):
                await self._delete(found, pod)  # a finished pod is replaced under the same name
                pod = pods[number] = {**pod, "metadata": {**pod["metadata"], "deletionTimestamp": "now"}}
            if pod is None:
                made = await self._create(found, number, revision)
                if made is not None:
                    pods = {**pods, number: made}
                if not parallel:
                    return pods
            elif not parallel and not self._settled(found, pod):
                return pods
        surplus = sorted((number for number in pods if number not in numbers), reverse=True)
        for number in surplus:
            if not is_terminating(pods[number]):
                await self._delete(found, pods[number])
            if not parallel:
                return pods
        await self._update(found, pods, numbers, revision)
        return pods

    async def _update(self, found: Object, pods: dict[int, Object], numbers: range, revision: str) -> None:
        """Replace one pod of an older revision, from the last to the first, once all after it are settled."""
        strategy = found["spec"].get("updateStrategy") or {}
        if strategy.get("type") == "OnDelete":
            return
        partition = (strategy.get("rollingUpdate") or {}).get("partition", 0)
        for number in reversed(numbers):
            pod = pods.get(number)
            if number < partition or pod is None:
                return
            if _revision(pod) != revision and not is_terminating(pod):
                await self._delete(found, pod)
                return
            if not self._settled(found, pod):
                return

    async def _create(self, found: Object, number: int, revision: str) -> Object | None:
        name = f"{found['metadata']['name']}-{number}"
        pod = pod_from(found["spec"]["template"], found, STATEFUL_SETS)
        pod["metadata"]["name"] = name
        pod["metadata"]["labels"].update({REVISION_LABEL: revision, _NAME_LABEL: name, _INDEX_LABEL: str(number)})
        pod["spec"]["hostname"] = name
        if found["spec"].get("serviceName"):
            pod["spec"]["subdomain"] = found["spec"]["serviceName"]
        title = found["metadata"]["name"]
        try:
            made = await self._kube.create(PODS, pod)
        except AlreadyExists:
            text = f"create Pod {name} in StatefulSet {title} failed: a pod of that name exists"
            await self._events.event(found, "FailedCreate", text, "Warning")
            return None
        text = f"Create Pod {name} in StatefulSet {title} successful"
        await self._events.event(found, "SuccessfulCreate", text)
        return made

    async def _delete(self, found: Object, pod: Object) -> None:
        metadata = pod["metadata"]
        try:
            await self._kube.delete(PODS, metadata["name"], metadata["namespace"], uid=metadata["uid"])
        except (NotFound, Conflict):
            return
        text = f"Delete Pod {metadata['name']} in StatefulSet {found['metadata']['name']} successful"
        await self._events.event(found, "SuccessfulDelete", text)

    async def _tell(self, found: Object, pods: dict[int, Object], revision: str) -> float | None:
        before = found.get("status") or {}
        wanted = found["spec"].get("replicas", 1)
        alive: Sequence[Object] = [pod for pod in pods.values() if not is_finished(pod)]
        current = before.get("currentRevision") or revision
        waits = [available_in(pod, found["spec"].get("minReadySeconds", 0), self._now()) for pod in alive]
        updated = sum(1 for pod in alive if _revision(pod) == revision and not is_terminating(pod))
        ready = sum(1 for pod in alive if is_ready(pod))
        if updated == wanted == len(alive) == ready:
            current = revision  # the roll-out is complete
        same = sum(1 for pod in alive if _revision(pod) == current and not is_terminating(pod))
        counts = {"readyReplicas": ready, "currentReplicas": same, "updatedReplicas": updated}
        status: Object = {
            "observedGeneration": found["metadata"].get("generation", 1),
            "replicas": len(alive),
            **{name: value for name, value in counts.items() if value},
            "availableReplicas": sum(1 for wait in waits if wait == 0),
            "currentRevision": current,
            "updateRevision": revision,
            "collisionCount": before.get("collisionCount", 0),
        }
        if status != before:
            metadata = found["metadata"]
            await self._kube.patch(
                STATEFUL_SETS,
                metadata["name"],
                {"metadata": {"uid": metadata["uid"]}, "status": {**dict.fromkeys(before, None), **status}},
                metadata["namespace"],
                subresource="status",
            )
        return min((wait for wait in waits if wait), default=None)
