"""ReplicaSets: as many pods as ``spec.replicas`` says."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from vmnet.kube.api import PODS, Conflict, Kube, NotFound, Object
from vmnet.kube.events import Recorder
from vmnet.lab.controllers.cluster import REPLICA_SETS, Informers, is_ready, is_terminating, owner
from vmnet.lab.controllers.matching import selects
from vmnet.lab.controllers.placement import is_finished
from vmnet.lab.controllers.templates import pod_from

_BURST: Final = 50


def available_in(pod: Object, seconds: int, now: datetime) -> float | None:
    """Seconds until a pod has been ready for ``seconds``: 0 when it has, None while it is not ready."""
    if not is_ready(pod):
        return None
    for condition in pod["status"]["conditions"]:
        if condition["type"] == "Ready" and condition.get("lastTransitionTime") and seconds:
            since = (now - datetime.fromisoformat(condition["lastTransitionTime"])).total_seconds()
            return max(0.0, seconds - since)
    return 0.0


def _dispensable(pod: Object) -> tuple[bool, bool, str]:
    """Sort key: what to delete first — pods without a node, then unready ones, then the youngest."""
    created = pod["metadata"].get("creationTimestamp", "")
    return bool(pod["spec"].get("nodeName")), is_ready(pod), "".join(chr(0x10FFFF - ord(letter)) for letter in created)


class ReplicaSets:
    """Reconciles ReplicaSets by key."""

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
        """Create or delete pods, then tell the status."""
        found = self._informers[REPLICA_SETS].get(key)
        if found is None:
            return None
        # Read from the API: the watch may not have brought the pods made a moment ago, and they would be made twice.
        listed = await self._kube.list(PODS, found["metadata"]["namespace"])
        pods = [pod for pod in listed.items if self._is_own(found, pod)]
        active = [pod for pod in pods if not is_terminating(pod) and not is_finished(pod)]
        if not is_terminating(found):
            active = await self._scale(found, active)
        return await self._tell(found, active, sum(1 for pod in pods if is_terminating(pod)))

    def _is_own(self, found: Object, pod: Object) -> bool:
        reference = owner(pod, REPLICA_SETS.kind)
        return reference is not None and reference["uid"] == found["metadata"]["uid"]

    async def _scale(self, found: Object, pods: list[Object]) -> list[Object]:
        wanted = found["spec"].get("replicas", 1)
        missing = wanted - len(pods)
        for _ in range(min(missing, _BURST)):
            made = await self._kube.create(PODS, pod_from(found["spec"]["template"], found, REPLICA_SETS))
            pods = [*pods, made]
            await self._events.event(found, "SuccessfulCreate", f"Created pod: {made['metadata']['name']}")
        if missing >= 0:
            return pods
        pods = sorted(pods, key=_dispensable)
        for pod in pods[:-wanted] if wanted else pods:
            metadata = pod["metadata"]
            try:
                await self._kube.delete(PODS, metadata["name"], metadata["namespace"], uid=metadata["uid"])
            except (NotFound, Conflict):
                continue
            await self._events.event(found, "SuccessfulDelete", f"Deleted pod: {metadata['name']}")
        return pods[-wanted:] if wanted else []

    async def _tell(self, found: Object, pods: Sequence[Object], terminating: int) -> float | None:
        minimum = found["spec"].get("minReadySeconds", 0)
        waits = [available_in(pod, minimum, self._now()) for pod in pods]
        labels = (found["spec"]["template"].get("metadata") or {}).get("labels") or {}
        status: Object = {"replicas": len(pods)}
        counts = {
            "fullyLabeledReplicas": sum(
                1 for pod in pods if selects({"matchLabels": labels}, pod["metadata"].get("labels"))
            ),
            "readyReplicas": sum(1 for pod in pods if is_ready(pod)),
            "availableReplicas": sum(1 for wait in waits if wait == 0),
            "terminatingReplicas": terminating,
        }
        status.update({name: value for name, value in counts.items() if value or name == "terminatingReplicas"})
        status["observedGeneration"] = found["metadata"].get("generation", 1)
        if status != {name: item for name, item in (found.get("status") or {}).items() if name != "conditions"}:
            await self._kube.replace(REPLICA_SETS, {**found, "status": status}, subresource="status")
        return min((wait for wait in waits if wait), default=None)
