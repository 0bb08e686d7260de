import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from vmnet import metrics
from vmnet.controller.migrations import Migration, cut_over, derive, live_pod, recorded
from vmnet.kube.api import PODS, VMIMS, VMIS, VMS, Object, Resource, Unavailable, object_key
from vmnet.model import names
from vmnet.model.migration import Key, MigrationPhase

RECORDING = Path(__file__).parents[2] / "data" / "kubevirt" / "migrations.jsonl"
RESOURCES = {resource.plural: resource for resource in (PODS, VMS, VMIS, VMIMS)}
OURS = (names.POD_NETWORKS_ANNOTATION, names.MIGRATION_RECORD_ANNOTATION, names.CUT_OVER_ANNOTATION)
NAMESPACE = "blue-namespace"
KEY = f"{NAMESPACE}/happy-tenant"
NETWORK = "cluster_udn_happy-tenant"

# What the VMI shows first is what became of the migration before.
PHASES = {
    "B-migration": ["staging", "running", "succeeded"],
    "B2-migration-fast": ["succeeded", "staging", "running", "succeeded"],
    "C1-failed-while-running": ["succeeded", "staging", "running", "failed"],
    "C2-target-pod-dies": ["failed", "staging", "failed"],
    "C3-cancel-while-running": ["failed", "staging", "running", "failed"],
    "C4-cancel-before-handoff": ["failed", "staging", "failed"],
    "C5-post-copy": ["failed", "staging", "running", "succeeded"],
    "C6-post-copy-fails": ["succeeded", "staging", "running", "failed", "none"],
    "C7-unschedulable": ["none", "staging", "none"],
}


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDING.read_text().splitlines()]


class Store:
    """The recorded objects as they are after each write."""

    def __init__(self) -> None:
        self.objects: dict[Resource, dict[str, Object]] = {resource: {} for resource in RESOURCES.values()}

    def apply(self, line: dict[str, Any]) -> None:
        found = self.objects[RESOURCES[line["resource"]]]
        if line["verb"] == "deleted":
            found.pop(object_key(line["object"]), None)
        else:
            found[object_key(line["object"])] = line["object"]

    def migration(self) -> Migration | None:
        vmi = next(iter(self.objects[VMIS].values()), None)
        if vmi is None:
            return None
        uid = vmi["metadata"]["uid"]
        pods = [
            pod for pod in self.objects[PODS].values() if pod["metadata"]["labels"].get(names.CREATED_BY_LABEL) == uid
        ]
        return derive(vmi, self.objects[VMIMS].values(), pods)


def scenarios() -> Iterator[tuple[str, list[Migration | None]]]:
    store = Store()
    for scenario, writes in groupby(lines(), key=lambda line: str(line["scenario"])):
        seen = []
        for line in writes:
            store.apply(line)
            seen.append(store.migration())
        yield scenario, seen


def test_the_phases_of_every_recorded_migration() -> None:
    found = {}
    for scenario, seen in scenarios():
        phases = [item.phase.value if item is not None else "none" for item in seen]
        found[scenario] = [phase for phase, _ in groupby(phases)]
    found["B-migration"] = [phase for phase in found["B-migration"] if phase != "none"]
    assert {scenario: found[scenario] for scenario in PHASES} == PHASES


def test_a_finished_migration_never_changes_its_outcome() -> None:
    outcomes: dict[str, set[MigrationPhase]] = {}
    finished = {MigrationPhase.SUCCEEDED, MigrationPhase.FAILED}
    for _, seen in scenarios():
        for item in seen:
            if item is not None and (item.phase in finished or item.uid in outcomes):
                outcomes.setdefault(item.uid, set()).add(item.phase)
    assert len(outcomes) == 7
    assert all(len(phases) == 1 for phases in outcomes.values())


def test_source_and_target_are_known_before_the_hand_off() -> None:
    seen = dict(scenarios())["B-migration"]
    staged = next(item for item in seen if item is not None)
    last = seen[-1]
    assert last is not None
    assert (staged.uid, staged.source_pod, staged.target_pod) == (last.uid, last.source_pod, last.target_pod)
    assert (last.source_node, last.target_node, last.mode) == ("ovn-worker", "ovn-worker2", "PreCopy")


async def replay(world: Any, writes: list[dict[str, Any]], controller: Any) -> None:
    for line in writes:
        resource, item = RESOURCES[line["resource"]], line["object"]
        name, namespace = item["metadata"]["name"], item["metadata"]["namespace"]
        before = world.kube.peek(resource, name, namespace)
        if line["verb"] == "deleted":
            if before is not None:
                world.kube.vanish(resource, name, namespace)
        else:
            if before is not None and before["metadata"]["uid"] != item["metadata"]["uid"]:
                world.kube.vanish(resource, name, namespace)
                before = None
            # The real writers read before they write: what vmnet has annotated stays.
            kept = {k: v for k, v in ((before or {}).get("metadata", {}).get("annotations") or {}).items() if k in OURS}
            if kept:
                item["metadata"]["annotations"] = {**(item["metadata"].get("annotations") or {}), **kept}
            world.kube.seed(resource, item)
        await world.settled(controller)


def counted() -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in metrics.MIGRATIONS.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total") and sample.labels["network"] == NETWORK:
                key = sample.labels["outcome"]
                found[key] = found.get(key, 0) + sample.value
    return found


async def test_the_whole_recording_with_the_whole_controller(world: Any) -> None:
    world.namespace(NAMESPACE)
    world.cudn("happy-tenant", NAMESPACE)
    metrics.MIGRATIONS.clear()
    history: list[tuple[str, list[str], str | None, str | None, dict[str, float]]] = []
    async with world.controller() as controller:
        await world.until(lambda: world.nad(NAMESPACE, "happy-tenant"))
        for scenario, writes in groupby(lines(), key=lambda line: str(line["scenario"])):
            await replay(world, list(writes), controller)
            claim = world.claim(NAMESPACE, "blue.happy")
            status = (claim or {}).get("status") or {}
            vmi = world.kube.peek(VMIS, "blue", NAMESPACE)
            record = recorded(vmi) if vmi else {}
            history.append(
                (
                    scenario.partition("-")[0],
                    status.get("ips") or [],
                    (status.get("ownerPod") or {}).get("name"),
                    record.get("outcome"),
                    counted(),
                )
            )
    ips = ["192.168.0.3/16", "fd00:10::3/64"]
    assert [(name, found) for name, found, *_ in history if name != "D5"] == [
        (name, ips) for name, *_ in history if name != "D5"
    ]
    assert history[-1][1] == []  # the claim went with its machine
    assert world.claim(NAMESPACE, "blue.happy") is None
    first, second, third = "virt-launcher-blue-kb2gk", "virt-launcher-blue-95nt7", "virt-launcher-blue-scwks"
    assert [(name, pod, outcome) for name, _, pod, outcome, _ in history if name[0] in "ABC"] == [
        ("A", first, None),
        ("B", second, "succeeded"),
        ("B2", third, "succeeded"),
        ("C1", third, "failed"),
        ("C2", third, "failed"),
        ("C3", third, "failed"),
        ("C4", third, "failed"),  # cancelled before the hand-off: the record is still C3's
        ("C5", "virt-launcher-blue-x8tz2", "succeeded"),
        ("C6", history[8][2], None),  # another VMI
        ("C7", history[8][2], None),
    ]
    assert history[8][2] not in (None, "virt-launcher-blue-x8tz2", "virt-launcher-blue-pf6lv")
    assert [tuple(total.get(key, 0) for key in ("succeeded", "failed")) for *_, total in history] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (2, 1),
        (2, 2),
        (2, 3),
        (2, 3),
        (3, 3),
        *[(3, 4)] * (len(history) - 8),
    ]
    # B and C5 went the same way: the second one raises the count of the first one's event.
    assert sum(event["count"] for event in world.events("NetworkMigrated")) == 3
    assert sum(event["count"] for event in world.events("NetworkMigrationFailed")) == 4


@pytest.fixture
def migrated(world: Any) -> Any:
    """A machine whose migration n1 → n2 has just succeeded."""
    world.namespace("blue")
    world.cudn("happy-tenant", "blue")
    vm = world.vm("blue", "blue")
    vmi = world.vmi(vm, node="n2")
    world.launcher(vmi, "source", node="n1")
    world.launcher(vmi, "target", node="n2")
    vmi["status"]["migrationState"] = {
        "migrationUid": "m1",
        "sourceNode": "n1",
        "sourcePod": "source",
        "targetNode": "n2",
        "targetPod": "target",
        "mode": "PreCopy",
        "completed": True,
        "endTimestamp": "2026-11-23T11:00:00Z",
    }
    world.kube.seed(VMIS, vmi)
    return world


SEEN = {
    "machine": {"namespace": "blue", "name": "blue"},
    "network": "cluster_udn_happy-tenant",
    "node": "n2",
    "key": "frame",
    "opened_at": 1795426800.25,
    "frame_at": 1795426800.25,
    "annotation_at": 1795426800.75,
    "first_frame_at": 1795426800.2503,
    "last_frame": {"at": 1795426800.2003, "error": 0.0005},
    "announcements": 9,
    "carried": {"way": "streamed", "connections": 12, "seconds": 0.004},
}


def see(world: Any) -> None:
    pod = world.kube.peek(PODS, "target", "blue")
    pod["metadata"]["annotations"][names.CUT_OVER_ANNOTATION] = json.dumps(SEEN)
    world.kube.seed(PODS, pod)


async def test_the_record_says_what_moved(migrated: Any) -> None:
    see(migrated)
    async with migrated.controller():
        event = await migrated.told("NetworkMigrated", "moved from n1 to n2 with 192.168.0.3, fd00:10::3")
        network = await migrated.told("MachineMigrated", "blue/blue moved from n1 to n2")
    assert event["involvedObject"]["kind"] == "VirtualMachineInstance"
    figures = "pause 49.7 ms, blackout 50.0 ms, opened by its frame, 9 announcements, 12 connections came along"
    assert event["message"] == f"moved from n1 to n2 with 192.168.0.3, fd00:10::3, {figures}"
    assert network["message"] == f"blue/blue {event['message']}"
    assert network["involvedObject"]["kind"] == "ClusterUserDefinedNetwork"
    assert network["involvedObject"]["name"] == "happy-tenant"
    found = recorded(migrated.kube.peek(VMIS, "blue", "blue"))
    assert found["from"] == {"node": "n1", "pod": "source"}
    assert found["to"] == {"node": "n2", "pod": "target"}
    assert found["blackoutSeconds"] == pytest.approx(0.05)
    assert found["pauseSeconds"] == pytest.approx(0.0497)
    assert found["deliverySeconds"] == pytest.approx(0.0003)
    assert (found["cutOver"]["frameAt"], found["cutOver"]["annotationAt"]) == (1795426800.25, 1795426800.75)
    assert found["cutOver"]["lastFrameAt"] == 1795426800.2003
    assert found["cutOver"]["lastFrameError"] == 0.0005
    assert (found["cutOver"]["key"], found["cutOver"]["announcements"]) == ("frame", 9)
    assert found["cutOver"]["connections"] == {"way": "streamed", "carried": 12, "handOverSeconds": 0.004}
    assert migrated.claim("blue", "blue.happy")["status"]["ownerPod"] == {"name": "target"}


async def test_a_late_account_of_the_agent_is_added_and_nothing_is_counted_twice(migrated: Any) -> None:
    metrics.MIGRATIONS.clear()
    async with migrated.controller() as controller:
        await migrated.told("NetworkMigrated", "moved from n1 to n2")
        assert recorded(migrated.kube.peek(VMIS, "blue", "blue"))["cutOver"] is None
        see(migrated)
        await migrated.until(lambda: recorded(migrated.kube.peek(VMIS, "blue", "blue"))["cutOver"])
        await migrated.settled(controller)
    async with migrated.controller() as controller:
        await migrated.settled(controller)
        migrated.kube.vanish(PODS, "target", "blue")
        await migrated.settled(controller)
    assert recorded(migrated.kube.peek(VMIS, "blue", "blue"))["blackoutSeconds"]
    assert counted() == {"succeeded": 1}
    assert len(migrated.events("NetworkMigrated")) == 1
    assert len(migrated.events("MachineMigrated")) == 1


async def test_a_record_that_could_not_be_written_is_written_later(migrated: Any) -> None:
    refusals = iter(range(2))
    migrated.kube.fail = lambda verb, resource, name: (
        Unavailable("down") if verb == "patch" and resource is VMIS and next(refusals, None) is not None else None
    )
    async with migrated.controller():
        await migrated.told("NetworkMigrated", "moved")
    assert recorded(migrated.kube.peek(VMIS, "blue", "blue"))["uid"] == "m1"


def test_an_account_that_cannot_be_read_is_passed_over() -> None:
    pod: Object = {"metadata": {"name": "p", "namespace": "n", "annotations": {names.CUT_OVER_ANNOTATION: "{"}}}
    assert cut_over(pod) is None
    pod["metadata"]["annotations"][names.CUT_OVER_ANNOTATION] = json.dumps({**SEEN, "key": "no such key"})
    assert cut_over(pod) is None
    pod["metadata"]["annotations"][names.CUT_OVER_ANNOTATION] = json.dumps(SEEN)
    found = cut_over(pod)
    assert found is not None
    assert found.key is Key.FRAME


def test_the_live_pod_of_a_machine_that_does_not_migrate_is_its_living_one() -> None:
    def pod(name: str, phase: str) -> Object:
        return {"metadata": {"name": name}, "status": {"phase": phase}}

    assert live_pod([pod("old", "Succeeded"), pod("new", "Running")], None) == pod("new", "Running")
    assert live_pod([pod("old", "Failed")], None) is None
