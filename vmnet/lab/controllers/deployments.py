"""Deployments: one ReplicaSet per pod template, scaled over from the old ones to the new one."""

import copy
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from vmnet.kube.api import Kube, NotFound, Object, object_key
from vmnet.kube.codec import encode_time
from vmnet.kube.conditions import find_condition
from vmnet.kube.events import Recorder
from vmnet.lab.controllers.cluster import (
    DEPLOYMENTS,
    REPLICA_SETS,
    Informers,
    is_terminating,
    owner,
    owner_reference,
)
from vmnet.lab.controllers.templates import HASH_LABEL, scaled, template_hash

REVISION: Final = "deployment.kubernetes.io/revision"
_DESIRED: Final = "deployment.kubernetes.io/desired-replicas"
_MAXIMUM: Final = "deployment.kubernetes.io/max-replicas"


def _replicas(item: Object) -> int:
    return int(item["spec"].get("replicas", 1))


def _count(items: Sequence[Object], name: str) -> int:
    return sum((item.get("status") or {}).get(name, 0) for item in items)


def _revision(item: Object) -> int:
    return int((item["metadata"].get("annotations") or {}).get(REVISION, 0))


class Deployments:
    """Reconciles Deployments by key."""

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
        """One step of the roll-out; the ReplicaSets' own changes bring the next."""
        found = self._informers[DEPLOYMENTS].get(key)
        if found is None or is_terminating(found):
            return None
        namespace = found["metadata"]["namespace"]
        listed = await self._kube.list(REPLICA_SETS, namespace)
        sets = [item for item in listed.items if self._is_own(found, item)]
        name = f"{found['metadata']['name']}-{template_hash(found['spec']['template'])}"
        new = next((item for item in sets if item["metadata"]["name"] == name), None)
        old = [item for item in sets if item["metadata"]["name"] != name]
        paused = bool(found["spec"].get("paused"))
        created = new is None and not paused
        if created:
            new = await self._create(found, name, sets)
        if new is not None:
            new = await self._number(found, new, old)
        if not paused and new is not None:
            new, old = await self._roll(found, new, old)
            await self._forget(found, old)
        return await self._tell(found, new, old, created=created)

    def _is_own(self, found: Object, item: Object) -> bool:
        reference = owner(item, DEPLOYMENTS.kind)
        return reference is not None and reference["uid"] == found["metadata"]["uid"]

    def _limits(self, found: Object) -> tuple[int, int]:
        """How many pods there may be at most, and how many must be available at least."""
        wanted = _replicas(found)
        strategy = found["spec"].get("strategy") or {}
        if strategy.get("type") == "Recreate":
            return wanted, 0
        rolling = strategy.get("rollingUpdate") or {}
        surge = scaled(rolling.get("maxSurge", "25%"), wanted, up=True)
        missing = scaled(rolling.get("maxUnavailable", "25%"), wanted, up=False)
        return wanted + surge, wanted - (missing or (0 if surge else 1))

    async def _create(self, found: Object, name: str, sets: Sequence[Object]) -> Object:
        template = copy.deepcopy(found["spec"]["template"])
        hashed = {HASH_LABEL: name.rsplit("-", 1)[1]}
        metadata = template.setdefault("metadata", {})
        metadata["labels"] = {**(metadata.get("labels") or {}), **hashed}
        selector = copy.deepcopy(found["spec"]["selector"])
        selector["matchLabels"] = {**(selector.get("matchLabels") or {}), **hashed}
        most, _ = self._limits(found)
        recreate = (found["spec"].get("strategy") or {}).get("type") == "Recreate"
        running = sum(_replicas(item) for item in sets)
        size = 0 if recreate and running else min(_replicas(found), max(0, most - running))
        body = {
            "apiVersion": REPLICA_SETS.api_version,
            "kind": REPLICA_SETS.kind,
            "metadata": {
                "name": name,
                "namespace": found["metadata"]["namespace"],
                "labels": metadata["labels"],
                "annotations": {
                    REVISION: str(max(map(_revision, sets), default=0) + 1),
                    _DESIRED: str(_replicas(found)),
                    _MAXIMUM: str(most),
                },
                "ownerReferences": [owner_reference(found, DEPLOYMENTS)],
            },
            "spec": {
                "replicas": size,
                "selector": selector,
                "template": template,
                **{key: found["spec"][key] for key in ("minReadySeconds",) if key in found["spec"]},
            },
        }
        made = await self._kube.create(REPLICA_SETS, body)
        if size:
            await self._told(found, made, 0, size)
        return made

    async def _told(self, found: Object, item: Object, before: int, after: int) -> None:
        direction = "up" if after > before else "down"
        text = f"Scaled {direction} replica set {item['metadata']['name']} from {before} to {after}"
        await self._events.event(found, "ScalingReplicaSet", text)

    async def _number(self, found: Object, new: Object, old: Sequence[Object]) -> Object:
        """Keep revisions: one that is rolled back to becomes the newest."""
        last = max(map(_revision, old), default=0)
        if _revision(new) <= last:
            body: dict[str, Any] = {"metadata": {"annotations": {REVISION: str(last + 1)}}}
            metadata = new["metadata"]
            new = await self._kube.patch(REPLICA_SETS, metadata["name"], body, metadata["namespace"])
        if _revision(found) != _revision(new):
            metadata = found["metadata"]
            body = {"metadata": {"annotations": {REVISION: str(_revision(new))}}}
            await self._kube.patch(DEPLOYMENTS, metadata["name"], body, metadata["namespace"])
        return new

    async def _scale(self, found: Object, item: Object, size: int) -> Object:
        before = _replicas(item)
        if before == size:
            return item
        metadata = item["metadata"]
        body = {
            "metadata": {
                "resourceVersion": metadata["resourceVersion"],
                "annotations": {_DESIRED: str(_replicas(found))},
            },
            "spec": {"replicas": size},
        }
        changed = await self._kube.patch(REPLICA_SETS, metadata["name"], body, metadata["namespace"])
        await self._told(found, item, before, size)
        return changed

    async def _roll(self, found: Object, new: Object, old: list[Object]) -> tuple[Object, list[Object]]:
        wanted = _replicas(found)
        most, least = self._limits(found)
        recreate = (found["spec"].get("strategy") or {}).get("type") == "Recreate"
        if recreate and any(_replicas(item) or _count([item], "replicas") for item in old):
            return new, [await self._scale(found, item, 0) for item in old]
        if recreate:
            return await self._scale(found, new, wanted), old
        total = _replicas(new) + sum(_replicas(item) for item in old)
        if _replicas(new) > wanted:
            new = await self._scale(found, new, wanted)
        elif _replicas(new) < wanted and total < most:
            new = await self._scale(found, new, min(wanted, _replicas(new) + most - total))
        # Old pods that are not available serve nobody: they go first.
        unready_new = max(0, _replicas(new) - _count([new], "availableReplicas"))
        total = _replicas(new) + sum(_replicas(item) for item in old)
        spare = total - least - unready_new
        left = []
        for item in sorted(old, key=object_key):
            size = _replicas(item)
            broken = max(0, size - _count([item], "availableReplicas"))
            gone = min(size, max(0, min(spare, broken)))
            spare -= gone
            left.append((item, size - gone))
        available = _count([new, *old], "availableReplicas") - least
        resized = []
        for item, size in left:
            gone = min(size, max(0, min(spare, available)))
            spare, available = spare - gone, available - gone
            resized.append(await self._scale(found, item, size - gone))
        return new, resized

    async def _forget(self, found: Object, old: Sequence[Object]) -> None:
        """Delete ReplicaSets beyond the history's limit."""
        limit = found["spec"].get("revisionHistoryLimit", 10)
        idle = [item for item in old if not _replicas(item) and not _count([item], "replicas")]
        for item in sorted(idle, key=_revision)[: max(0, len(idle) - limit)]:
            metadata = item["metadata"]
            try:
                await self._kube.delete(REPLICA_SETS, metadata["name"], metadata["namespace"], uid=metadata["uid"])
            except NotFound:
                continue

    async def _tell(self, found: Object, new: Object | None, old: Sequence[Object], *, created: bool) -> float | None:
        sets = [*old, *([new] if new is not None else [])]
        wanted, now = _replicas(found), self._now()
        counts = {
            "replicas": _count(sets, "replicas"),
            "updatedReplicas": _count([new], "replicas") if new is not None else 0,
            "readyReplicas": _count(sets, "readyReplicas"),
            "availableReplicas": _count(sets, "availableReplicas"),
        }
        missing = max(0, wanted - counts["availableReplicas"])
        before = found.get("status") or {}
        conditions = self._conditions(found, new, counts, created=created, now=now)
        status: Object = {
            "observedGeneration": found["metadata"].get("generation", 1),
            **{name: value for name, value in counts.items() if value},
            **({"unavailableReplicas": missing} if missing else {}),
            "terminatingReplicas": _count(sets, "terminatingReplicas"),
            "conditions": conditions,
        }
        if status != before:
            await self._kube.patch(
                DEPLOYMENTS,
                found["metadata"]["name"],
                {
                    "metadata": {"uid": found["metadata"]["uid"]},
                    "status": {**dict.fromkeys(before, None), **status},
                },
                found["metadata"]["namespace"],
                subresource="status",
            )
        progressing = find_condition(conditions, "Progressing")
        complete = progressing is None or progressing["reason"] == "NewReplicaSetAvailable"
        return None if complete else float(found["spec"].get("progressDeadlineSeconds", 600))

    def _conditions(
        self, found: Object, new: Object | None, counts: dict[str, int], *, created: bool, now: datetime
    ) -> list[Object]:
        wanted = _replicas(found)
        _, least = self._limits(found)
        known = (found.get("status") or {}).get("conditions") or []
        enough = counts["availableReplicas"] >= least
        made = [
            _condition(
                known,
                "Available",
                "True" if enough else "False",
                "MinimumReplicasAvailable" if enough else "MinimumReplicasUnavailable",
                f"Deployment {'has' if enough else 'does not have'} minimum availability.",
                now,
            )
        ]
        if new is None:
            return made
        name = new["metadata"]["name"]
        complete = (
            counts["updatedReplicas"] == wanted
            and counts["replicas"] == wanted
            and counts["availableReplicas"] >= wanted
        )
        before = find_condition(known, "Progressing")
        status, reason, message = "True", "ReplicaSetUpdated", f'ReplicaSet "{name}" is progressing.'
        if complete:
            reason, message = "NewReplicaSetAvailable", f'ReplicaSet "{name}" has successfully progressed.'
        elif created:
            reason, message = "NewReplicaSetCreated", f'Created new replica set "{name}"'
        elif before is not None and self._is_stuck(found, before, counts, now):
            status, reason = "False", "ProgressDeadlineExceeded"
            message = f'ReplicaSet "{name}" has timed out progressing.'
        moved = any(counts[key] != (found.get("status") or {}).get(key, 0) for key in counts)
        return [*made, _condition(known, "Progressing", status, reason, message, now, renew=moved)]

    def _is_stuck(self, found: Object, before: Object, counts: dict[str, int], now: datetime) -> bool:
        status = found.get("status") or {}
        if any(counts[key] != status.get(key, 0) for key in counts):
            return False
        if status.get("observedGeneration") != found["metadata"].get("generation"):
            return False
        deadline = timedelta(seconds=found["spec"].get("progressDeadlineSeconds", 600))
        return now - datetime.fromisoformat(before["lastUpdateTime"]) >= deadline


def _condition(
    known: Sequence[Object],
    kind: str,
    status: str,
    reason: str,
    message: str,
    now: datetime,
    *,
    renew: bool = False,
) -> Object:
    """A DeploymentCondition: unlike other conditions it also has the time of its last update."""
    before = find_condition(known, kind)
    stamp = encode_time(now)
    made = {"type": kind, "status": status, "lastUpdateTime": stamp, "lastTransitionTime": stamp}
    if before is not None and before["status"] == status:
        made["lastTransitionTime"] = before["lastTransitionTime"]
        if before["reason"] == reason and not renew:
            made["lastUpdateTime"] = before["lastUpdateTime"]
    return {**made, "reason": reason, "message": message}
