"""Whether a machine's instance should be there, and what its status says."""

from typing import Any

import pytest

from vmnet.kube.api import Object
from vmnet.lab.virt import kinds, machines, manifests


def vm(strategy: str = "Always", requests: list[dict[str, Any]] | None = None, **metadata: Any) -> Object:
    return {
        "metadata": {"name": "blue", "namespace": "blue-namespace", "uid": "vm-1", "generation": 3, **metadata},
        "spec": {
            "runStrategy": strategy,
            "template": {"spec": {"domain": {"resources": {"requests": {"memory": "128Mi"}}}}},
        },
        "status": {"stateChangeRequests": requests} if requests else {},
    }


def vmi(phase: str = "Running", **status: Any) -> Object:
    item = manifests.instance_of(vm())
    item["metadata"]["uid"] = "vmi-1"
    item["status"] |= {"phase": phase, **status}
    return item


@pytest.mark.parametrize(
    ("strategy", "requests", "expected"),
    [
        ("Always", [], True),
        ("RerunOnFailure", [], True),
        ("Manual", [], False),
        ("Halted", [], False),
        ("Manual", [{"action": "Start"}], True),
        ("Manual", [{"action": "Stop", "uid": "vmi-1"}, {"action": "Start"}], False),
    ],
)
def test_should_start(strategy: str, requests: list[dict[str, Any]], expected: bool) -> None:
    assert machines.should_start(vm(strategy, requests)) is expected


@pytest.mark.parametrize(
    ("strategy", "phase", "requests", "expected"),
    [
        ("Always", "Running", [], False),
        ("Always", "Succeeded", [], True),
        ("Always", "Failed", [], True),
        ("RerunOnFailure", "Succeeded", [], False),
        ("RerunOnFailure", "Failed", [], True),
        ("Manual", "Failed", [], False),
        ("Halted", "Running", [], True),
        ("Manual", "Running", [{"action": "Stop", "uid": "vmi-1"}], True),
        ("Manual", "Running", [{"action": "Stop", "uid": "vmi-0"}], False),
    ],
)
def test_should_stop(strategy: str, phase: str, requests: list[dict[str, Any]], expected: bool) -> None:
    assert machines.should_stop(vm(strategy, requests), vmi(phase)) is expected


def test_older_running_field() -> None:
    old = vm()
    del old["spec"]["runStrategy"]
    assert machines.run_strategy(old) == "Halted"
    old["spec"]["running"] = True
    assert machines.run_strategy(old) == "Always"


def test_printable_status() -> None:
    assert machines.printable_status(vm(), None) == "Stopped"
    assert machines.printable_status(vm(deletionTimestamp="t"), vmi()) == "Terminating"
    assert machines.printable_status(vm(), vmi("Scheduling")) == "Starting"
    assert machines.printable_status(vm(), vmi()) == "Running"
    assert machines.printable_status(vm(), vmi("Succeeded")) == "Stopped"
    migrating = vmi(migrationState={"startTimestamp": "t"})
    assert machines.printable_status(vm(), migrating) == "Migrating"
    migrating["status"]["migrationState"]["endTimestamp"] = "t"
    assert machines.printable_status(vm(), migrating) == "Running"
    assert machines.printable_status(vm(), vmi(conditions=[{"type": "Paused", "status": "True"}])) == "Paused"
    lost = vmi("Scheduling", conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}])
    assert machines.printable_status(vm(), lost) == "ErrorUnschedulable"
    going = vmi()
    going["metadata"]["deletionTimestamp"] = "t"
    assert machines.printable_status(vm(), going) == "Stopping"


def test_status_is_stable() -> None:
    machine = vm()
    machine["status"] = machines.status_of(machine, None)
    assert machine["status"] == machines.status_of(machine, None)
    running = vmi(conditions=[{"type": "Ready", "status": "True"}])
    machine["status"] = machines.status_of(machine, running)
    assert machine["status"]["ready"] is True
    assert machine["status"]["created"] is True
    assert machine["status"]["observedGeneration"] == 3
    assert machine["status"] == machines.status_of(machine, running)


def test_restart_request_is_worked_off_in_order() -> None:
    asked = [{"action": "Stop", "uid": "vmi-1"}, {"action": "Start"}]
    machine = vm("Manual", asked)
    assert machines.status_of(machine, vmi())["stateChangeRequests"] == asked
    machine["status"] = machines.status_of(machine, None)
    assert machine["status"]["stateChangeRequests"] == asked[1:]
    assert "stateChangeRequests" not in machines.status_of(machine, vmi())


def test_go_time() -> None:
    assert kinds.go_time("2026-11-23T06:49:28Z") == "2026-11-23 06:49:28 +0000 UTC"
