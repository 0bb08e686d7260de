"""Gives pods their nodes, one pod at a time."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from vmnet.kube.api import NAMESPACES, NODES, PODS, Conflict, Kube, NotFound, Object, PatchType, Resource, object_key
from vmnet.kube.conditions import find_condition, set_condition
from vmnet.kube.events import Recorder
from vmnet.lab.controllers.cluster import Informers, is_terminating
from vmnet.lab.controllers.placement import Picture, Refusal, choose, is_finished

log = logging.getLogger(__name__)

NAME: Final = "default-scheduler"
_RETRY_SECONDS: Final = 30.0


class Scheduler:
    """Reconciles pods by key. ``unplaced`` are the keys that found no node: look again when the cluster changes."""

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
        self._bound: dict[str, str] = {}
        """uid → node of pods whose binding the watch has not brought yet: their room is taken all the same."""
        self.unplaced: set[str] = set()

    async def reconcile(self, key: str) -> float | None:
        """Bind the pod, or say why not. Returns the seconds until the next look."""
        pod = self._informers[PODS].get(key)
        self.unplaced.discard(key)
        if pod is None or is_terminating(pod) or is_finished(pod):
            return None
        spec, metadata = pod["spec"], pod["metadata"]
        if spec.get("nodeName") or metadata["uid"] in self._bound:
            return None
        if spec.get("schedulerName", NAME) != NAME or spec.get("schedulingGates"):
            return None
        try:
            node = choose(pod, self._picture())
        except Refusal as refusal:
            self.unplaced.add(key)
            await self._refuse(pod, str(refusal))
            return _RETRY_SECONDS
        await self._bind(pod, node)
        return None

    def _picture(self) -> Picture:
        pods: dict[str, list[Object]] = {}
        seen = set()
        for pod in self._informers[PODS].items():
            uid = pod["metadata"]["uid"]
            seen.add(uid)
            node = pod["spec"].get("nodeName")
            if node:
                self._bound.pop(uid, None)
            else:
                node = self._bound.get(uid)
            if node:
                pods.setdefault(node, []).append(pod)
        self._bound = {uid: node for uid, node in self._bound.items() if uid in seen}
        namespaces = {
            item["metadata"]["name"]: item["metadata"].get("labels") or {}
            for item in self._informers[NAMESPACES].items()
        }
        nodes = [item for item in self._informers[NODES].items() if not is_terminating(item)]
        return Picture(sorted(nodes, key=object_key), pods, namespaces)

    async def _bind(self, pod: Object, node: str) -> None:
        metadata = pod["metadata"]
        name, namespace = metadata["name"], metadata["namespace"]
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name, "namespace": namespace, "uid": metadata["uid"]},
            "target": {"kind": "Node", "name": node},
        }
        try:
            await self._kube.create(Resource("", "v1", f"pods/{name}/binding", "Binding"), binding, namespace)
        except (NotFound, Conflict) as error:
            log.info("%s/%s: %s", namespace, name, error)
            return
        self._bound[metadata["uid"]] = node
        log.info("%s/%s assigned to %s", namespace, name, node)
        await self._events.event(pod, "Scheduled", f"Successfully assigned {namespace}/{name} to {node}")

    async def _refuse(self, pod: Object, message: str) -> None:
        metadata = pod["metadata"]
        before = (pod.get("status") or {}).get("conditions")
        known = find_condition(before, "PodScheduled")
        if known is not None and known.get("message") == message:
            return
        conditions, changed = set_condition(before, "PodScheduled", False, "Unschedulable", message, now=self._now())
        if changed:
            await self._kube.patch(
                PODS,
                metadata["name"],
                {"metadata": {"uid": metadata["uid"]}, "status": {"conditions": conditions}},
                metadata["namespace"],
                type=PatchType.STRATEGIC,
                subresource="status",
            )
        await self._events.event(pod, "FailedScheduling", message, "Warning")
