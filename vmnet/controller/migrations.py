"""Live migrations, read from what KubeVirt records: phase, live pod, and the record of a finished one."""

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from vmnet import metrics
from vmnet.controller import objects
from vmnet.controller.cluster import Attachment, Cluster
from vmnet.kube.api import (
    CUDNS,
    NADS,
    UDNS,
    VMIMS,
    VMIS,
    Conflict,
    Invalid,
    Kube,
    NotFound,
    Object,
    PatchType,
    object_key,
)
from vmnet.kube.events import Recorder
from vmnet.model import names
from vmnet.model.endpoint import MachineReference
from vmnet.model.migration import Carried, CutOver, Key, LastFrame, MigrationPhase, Way

log = logging.getLogger(__name__)

CUT_OVER_GRACE_SECONDS: Final = 5.0
"""How long after a migration's end the record waits for the agent's account of it."""
_REMEMBERED: Final = 4096


def migration_state(vmi: Object | None) -> Mapping[str, Any]:
    """``status.migrationState`` of a VMI: the last hand-off and what came of it; empty when there was none."""
    state = ((vmi or {}).get("status") or {}).get("migrationState")
    return state if isinstance(state, dict) else {}


def node_of(pod: Object) -> str:
    """Where a pod is bound. Never its nodeName *label*: on a target it names the source until switch-over."""
    return str((pod.get("spec") or {}).get("nodeName") or "")


def live_pod(pods: Iterable[Object], vmi: Object | None) -> Object | None:
    """The pod that the machine's addresses belong to: the source's until the migration has succeeded."""
    living = sorted(filter(objects.alive, pods), key=lambda pod: str(pod["metadata"].get("creationTimestamp") or ""))
    if len(living) <= 1:
        return living[0] if living else None
    state = migration_state(vmi)
    where = ((vmi or {}).get("status") or {}).get("nodeName")
    if state.get("failed"):
        source = next((pod for pod in living if pod["metadata"]["name"] == state.get("sourcePod")), None)
        if source is not None:
            return source
    if where:
        return next((pod for pod in living if node_of(pod) == where), living[0])
    return living[0]


@dataclass(frozen=True, slots=True)
class Migration:
    """One migration as the objects show it."""

    uid: str
    phase: MigrationPhase
    source_pod: str = ""
    target_pod: str = ""
    source_node: str = ""
    target_node: str = ""
    mode: str = ""
    started: str = ""
    ended: str = ""
    reason: str = ""
    aborted: bool = False


def derive(vmi: Object, vmims: Iterable[Object], pods: Iterable[Object]) -> Migration | None:
    """The migration that a VMI is in or has been through last; None when there is none that the network could see.

    Before the hand-off only the target pod shows it; the VMI still tells of the migration before. One that was
    cancelled before the hand-off leaves no trace.
    """
    state = migration_state(vmi)
    by_uid = {str(item["metadata"].get("uid")): item for item in vmims}
    uid = str(state.get("migrationUid") or "")
    launchers = list(pods)
    for item in by_uid.values():
        number = str(item["metadata"].get("uid"))
        if number == uid or (item.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
            continue
        target = next(
            (
                pod
                for pod in launchers
                if objects.labels(pod).get(names.MIGRATION_JOB_LABEL) == number
                and objects.alive(pod)
                and not objects.deleting(pod)
            ),
            None,
        )
        if target is not None:
            source = live_pod([pod for pod in launchers if pod is not target], vmi)
            return Migration(
                uid=number,
                phase=MigrationPhase.STAGING,
                source_pod=str(source["metadata"]["name"]) if source is not None else "",
                target_pod=str(target["metadata"]["name"]),
                source_node=node_of(source) if source is not None else "",
                target_node=node_of(target),
            )
    if not uid:
        return None
    if state.get("failed"):
        phase = MigrationPhase.FAILED
    elif state.get("completed"):
        phase = MigrationPhase.SUCCEEDED
    elif ((by_uid.get(uid) or {}).get("status") or {}).get("phase") == "Failed":
        phase = MigrationPhase.FAILED
    else:
        phase = MigrationPhase.RUNNING if state.get("startTimestamp") else MigrationPhase.STAGING
    return Migration(
        uid=uid,
        phase=phase,
        source_pod=str(state.get("sourcePod") or ""),
        target_pod=str(state.get("targetPod") or ""),
        source_node=str(state.get("sourceNode") or ""),
        target_node=str(state.get("targetNode") or ""),
        mode=str(state.get("mode") or ""),
        started=str(state.get("startTimestamp") or ""),
        ended=str(state.get("endTimestamp") or ""),
        reason=str(state.get("failureReason") or ""),
        aborted=bool(state.get("abortRequested")),
    )


class MigrationReconciler:
    """Keyed by ``<namespace>/<name>`` of a VMI: records what became of its last migration, once."""

    def __init__(
        self,
        kube: Kube,
        cluster: Cluster,
        events: Recorder,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._kube = kube
        self._cluster = cluster
        self._events = events
        self._now = now
        self._counted: OrderedDict[str, None] = OrderedDict()
        self._gone: dict[str, datetime] = {}

    async def reconcile(self, key: str) -> float | None:
        """Record a finished migration: annotation first, so that a restart does not count it twice."""
        vmi = self._cluster.get(VMIS, key)
        if vmi is None:
            return self._forget(key)
        self._gone.pop(key, None)
        pods = self._cluster.launchers(vmi)
        vmims = (item for item in self._cluster.items(VMIMS) if _concerns(item, vmi))
        migration = derive(vmi, vmims, pods)
        if migration is None or migration.phase not in (MigrationPhase.SUCCEEDED, MigrationPhase.FAILED):
            return None
        attachment = self._cluster.primary(objects.namespace_of(vmi))
        source = next((pod for pod in pods if pod["metadata"]["name"] == migration.source_pod), None)
        target = next((pod for pod in pods if pod["metadata"]["name"] == migration.target_pod), None)
        if attachment is None:
            return None
        allocation = next((found for pod in (target, source) if pod and (found := _allocated(pod, attachment))), None)
        if allocation is None:
            # Not a machine of ours: it was never on the network.
            return None
        present = recorded(vmi)
        wanted = record(migration, attachment.network.name, allocation, cut_over(target) if target else None)
        if present == wanted:
            return None
        first = present.get("uid") != migration.uid
        if first and wanted.get("cutOver") is None and migration.phase is MigrationPhase.SUCCEEDED:
            # The agent's word may come a moment after KubeVirt's.
            left = _remaining(migration, self._now())
            if left > 0:
                return left
        if not first and wanted.get("cutOver") is None:
            # The pod that knew is gone; the record keeps what it said.
            return None
        await self._write(vmi, wanted)
        if first and migration.uid not in self._counted:
            self._counted[migration.uid] = None
            if len(self._counted) > _REMEMBERED:
                self._counted.popitem(last=False)
            await self._tell(vmi, migration, attachment, wanted)
        return None

    def _forget(self, key: str) -> float | None:
        """A machine has gone; its series follow."""
        left = metrics.FORGET_SECONDS - (self._now() - self._gone.setdefault(key, self._now())).total_seconds()
        if left > 0:
            return left
        del self._gone[key]
        metrics.forget_machine(*key.split("/", 1))
        return None

    def _network(self, attachment: Attachment) -> Object | None:
        """The object that the tenant, or the administrator, has written for the network."""
        nad = self._cluster.get(NADS, attachment.key)
        reference = objects.owner_reference(nad) if nad is not None else None
        if nad is None or reference is None:
            return None
        if reference.get("kind") == UDNS.kind:
            return self._cluster.get(UDNS, f"{objects.namespace_of(nad)}/{reference['name']}")
        return self._cluster.get(CUDNS, str(reference["name"]))

    async def _write(self, vmi: Object, wanted: dict[str, Any]) -> None:
        metadata = vmi["metadata"]
        text = json.dumps(wanted, sort_keys=True)
        patch: list[dict[str, Any]] = [
            {"op": "test", "path": "/metadata/resourceVersion", "value": metadata["resourceVersion"]}
        ]
        if metadata.get("annotations"):
            path = "/metadata/annotations/" + names.MIGRATION_RECORD_ANNOTATION.replace("~", "~0").replace("/", "~1")
            patch.append({"op": "add", "path": path, "value": text})
        else:
            value = {names.MIGRATION_RECORD_ANNOTATION: text}
            patch.append({"op": "add", "path": "/metadata/annotations", "value": value})
        try:
            await self._kube.patch(VMIS, metadata["name"], patch, metadata["namespace"], type=PatchType.JSON)
        except NotFound:
            log.debug("VMI %s went before its migration was written on it", object_key(vmi))
        except Invalid as error:
            # A failed test is 422 at a real API server: the VMI has changed, and another look follows.
            raise Conflict(str(error)) from error

    async def _tell(self, vmi: Object, migration: Migration, attachment: Attachment, wanted: dict[str, Any]) -> None:
        """Count it; events on the machine, and on its network for whoever cares for that."""
        metadata, network, name = vmi["metadata"], self._network(attachment), object_key(vmi)
        succeeded = migration.phase is MigrationPhase.SUCCEEDED
        metrics.MIGRATIONS.labels(
            metadata["namespace"],
            metadata["name"],
            migration.target_node,
            attachment.network.name,
            migration.phase.value,
        ).inc()
        held = ", ".join(wanted["addresses"])
        if succeeded:
            message = f"moved from {migration.source_node} to {migration.target_node} with {held}{_figures(wanted)}"
            await self._events.event(vmi, "NetworkMigrated", message)
            if network is not None:
                await self._events.event(network, "MachineMigrated", f"{name} {message}")
        else:
            why = f" ({migration.reason})" if migration.reason else ""
            message = f"stays on {migration.source_node} with {held}: migration to {migration.target_node} failed{why}"
            step = (
                f"vmnet migration show {vmi['metadata']['name']} -n {vmi['metadata']['namespace']}; then migrate again"
            )
            await self._events.event(vmi, "NetworkMigrationFailed", message, "Warning", next_step=step)
            if network is not None:
                await self._events.event(
                    network, "MachineMigrationFailed", f"{name} {message}", "Warning", next_step=step
                )


def record(migration: Migration, network: str, allocation: objects.Allocated, seen: CutOver | None) -> dict[str, Any]:
    """What is written down about a finished migration."""
    succeeded = migration.phase is MigrationPhase.SUCCEEDED
    delivery = pause = blackout = None
    if succeeded and seen is not None:
        delivery = _between(seen.opened_at, seen.first_frame_at)
        if seen.last_frame is not None:
            pause = _between(seen.last_frame.at, seen.frame_at)
            blackout = _between(seen.last_frame.at, seen.first_frame_at)
    return {
        "uid": migration.uid,
        "outcome": migration.phase.value,
        "aborted": migration.aborted,
        "reason": migration.reason,
        "mode": migration.mode,
        "network": network,
        "from": {"node": migration.source_node, "pod": migration.source_pod},
        "to": {"node": migration.target_node, "pod": migration.target_pod},
        "addresses": [str(item.ip) for item in allocation.addresses],
        "mac": allocation.mac,
        "started": migration.started,
        "ended": migration.ended,
        "pauseSeconds": pause,
        "blackoutSeconds": blackout,
        "deliverySeconds": delivery,
        "cutOver": None
        if seen is None
        else {
            "key": seen.key.value,
            "openedAt": seen.opened_at,
            "frameAt": seen.frame_at,
            "annotationAt": seen.annotation_at,
            "firstFrameAt": seen.first_frame_at,
            "lastFrameAt": None if seen.last_frame is None else seen.last_frame.at,
            "lastFrameError": None if seen.last_frame is None else seen.last_frame.error,
            "announcements": seen.announcements,
            "connections": {
                "way": seen.carried.way.value,
                "carried": seen.carried.connections,
                "handOverSeconds": seen.carried.seconds,
            },
        },
    }


def _between(begin: float | None, end: float | None) -> float | None:
    """Seconds. Two nodes' clocks differ by what is known only nearly: what they make negative is nothing."""
    return None if begin is None or end is None else max(0.0, round(end - begin, 6))


def _figures(wanted: Mapping[str, Any]) -> str:
    """What an event says of how it went, as far as the target's agent has told it by then."""
    seen = wanted.get("cutOver")
    if seen is None:
        return ""
    times = {"pause": wanted["pauseSeconds"], "blackout": wanted["blackoutSeconds"]}
    if times["blackout"] is None:
        times["first frame after its port had opened"] = wanted["deliverySeconds"]
    told = [f"{what} {seconds * 1000:.1f} ms" for what, seconds in times.items() if seconds is not None]
    told += [f"opened by its {seen['key']}", f"{seen['announcements']} announcements"]
    return ", " + ", ".join(told) + _along(wanted)


def _along(wanted: Mapping[str, Any]) -> str:
    """What an event says of the connections that conntrack had to know; nothing where there were none to ask for."""
    found = (wanted.get("cutOver") or {}).get("connections") or {}
    if found.get("way") in (Way.STREAMED, Way.LATE):
        return f", {found['carried']} connections came along" + (" late" if found["way"] == Way.LATE else "")
    return ", connections were not told: the other agent was away" if found.get("way") == Way.UNANSWERED else ""


def recorded(vmi: Object) -> Mapping[str, Any]:
    """The record that a VMI carries; empty when there is none that can be read."""
    text = objects.annotations(vmi).get(names.MIGRATION_RECORD_ANNOTATION)
    try:
        found = json.loads(text) if text else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def cut_over(target: Object) -> CutOver | None:
    """What the target's agent wrote on its pod; None when it has not, or cannot be read."""
    text = objects.annotations(target).get(names.CUT_OVER_ANNOTATION)
    if not text:
        return None
    try:
        found = json.loads(text)
        machine = found["machine"]
        return CutOver(
            machine=MachineReference(machine["namespace"], machine["name"]),
            network=found["network"],
            node=found["node"],
            key=Key(found["key"]),
            opened_at=_number(found.get("opened_at")),
            frame_at=_number(found.get("frame_at")),
            annotation_at=_number(found.get("annotation_at")),
            first_frame_at=_number(found.get("first_frame_at")),
            announcements=int(found.get("announcements") or 0),
            last_frame=_last_frame(found.get("last_frame")),
            carried=_carried(found.get("carried")),
        )
    except (ValueError, KeyError, TypeError) as error:
        log.warning("annotation %s of pod %s: %s", names.CUT_OVER_ANNOTATION, object_key(target), error)
        return None


def _carried(found: Any) -> Carried:
    """An agent of an earlier version says nothing of it, one of a later version perhaps what nobody here knows."""
    if found is None or found["way"] not in set(Way):
        return Carried()
    return Carried(Way(found["way"]), int(found["connections"]), _number(found["seconds"]))


def _last_frame(found: Any) -> LastFrame | None:
    return None if found is None else LastFrame(float(found["at"]), float(found["error"]))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _allocated(pod: Object, attachment: Attachment) -> objects.Allocated | None:
    try:
        return objects.allocated(pod, attachment.key)
    except ValueError:
        return None


def _concerns(vmim: Object, vmi: Object) -> bool:
    return (
        objects.namespace_of(vmim) == objects.namespace_of(vmi)
        and (vmim.get("spec") or {}).get("vmiName") == vmi["metadata"]["name"]
    )


def _remaining(migration: Migration, now: datetime) -> float:
    """How much longer the agent's word is waited for, in seconds."""
    try:
        ended = datetime.fromisoformat(migration.ended)
    except ValueError:
        return 0.0
    return min(CUT_OVER_GRACE_SECONDS, CUT_OVER_GRACE_SECONDS - (now - ended).total_seconds())
