"""Pod status: phases, container states and conditions, as the API reference defines them."""

from typing import Any

import pytest

from vmnet.lab.kubelet import status
from vmnet.lab.kubelet.sandbox import ContainerState
from vmnet.lab.kubelet.status import Observed, Waiting

NOW = 1_000_000.0
HOST = ("172.30.0.11", "fd00:30::11")


def pod(policy: str = "Always", names: tuple[str, ...] = ("c",), **spec: Any) -> dict[str, Any]:
    containers = [{"name": name, "image": "registry.k8s.io/pause:3.9"} for name in names]
    return {"metadata": {"uid": "u", "name": "p"}, "spec": {"restartPolicy": policy, "containers": containers, **spec}}


def run(exit_status: int | None = None) -> ContainerState:
    return ContainerState(7, NOW - 10, exit_status, None if exit_status is None else NOW - 5)


def condition(found: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(item for item in found["conditions"] if item["type"] == kind)


@pytest.mark.parametrize(
    ("policy", "exits", "ending", "expected"),
    [
        ("Always", [None], False, "Running"),
        ("Always", [0], False, "Running"),
        ("Always", [1], False, "Running"),
        ("OnFailure", [0], False, "Succeeded"),
        ("OnFailure", [1], False, "Running"),
        ("OnFailure", [0, None], False, "Running"),
        ("Never", [0], False, "Succeeded"),
        ("Never", [0, 1], False, "Failed"),
        ("Never", [1, None], False, "Running"),
        ("Always", [0], True, "Succeeded"),
        ("Always", [137], True, "Failed"),
        ("Always", [-9], True, "Failed"),
    ],
)
def test_phases(policy: str, exits: list[int | None], ending: bool, expected: str) -> None:
    names = tuple(f"c{i}" for i in range(len(exits)))
    runs = {name: [run(value)] for name, value in zip(names, exits, strict=True)}
    assert status.phase(pod(policy, names), Observed(runs=runs, ending=ending)) == expected


def test_a_pod_is_pending_until_every_container_has_run_once() -> None:
    assert status.phase(pod(names=("a", "b")), Observed(runs={"a": [run()]})) == "Pending"


@pytest.mark.parametrize(
    ("policy", "exit_status", "expected"),
    [("Always", None, "Pending"), ("Always", 1, "Pending"), ("Never", 1, "Failed"), ("Never", 0, "Running")],
)
def test_init_containers_hold_the_phase_back(policy: str, exit_status: int | None, expected: str) -> None:
    body = pod(policy, initContainers=[{"name": "i", "image": "x"}])
    observed = Observed(runs={"i": [run(exit_status)], "c": [run()]})
    assert status.phase(body, observed) == expected


def test_a_running_pod() -> None:
    observed = Observed(
        addresses=("10.244.1.2",), sandbox=True, runs={"c": [run()]}, ready={"c": True}, started={"c": True}
    )
    found = status.pod_status(pod(), observed, HOST, NOW)
    assert found["phase"] == "Running"
    assert found["podIPs"] == [{"ip": "10.244.1.2"}]
    assert found["hostIPs"] == [{"ip": address} for address in HOST]
    (container,) = found["containerStatuses"]
    assert container["state"] == {"running": {"startedAt": status.timestamp(NOW - 10)}}
    assert container["ready"]
    assert container["started"]
    _, _, digest = container["imageID"].partition("@sha256:")
    assert len(digest) == 64
    assert {item["type"] for item in found["conditions"]} == set(status.OWN_CONDITIONS)
    assert all(item["status"] == "True" for item in found["conditions"])


def test_before_the_sandbox_containers_are_being_created() -> None:
    found = status.pod_status(pod(), Observed(), HOST, NOW)
    assert found["phase"] == "Pending"
    assert found["containerStatuses"][0]["state"] == {"waiting": {"reason": "ContainerCreating"}}
    assert condition(found, "PodReadyToStartContainers")["status"] == "False"
    assert "podIP" not in found


def test_a_container_that_waits_for_its_restart_shows_how_it_ended() -> None:
    waiting = {"c": Waiting("CrashLoopBackOff", "back-off 2s")}
    observed = Observed(sandbox=True, runs={"c": [run(2), run(-9)]}, restarts={"c": 1}, waiting=waiting)
    (container,) = status.pod_status(pod(), observed, HOST, NOW)["containerStatuses"]
    assert container["state"] == {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 2s"}}
    assert container["lastState"]["terminated"]["exitCode"] == 137
    assert container["restartCount"] == 1
    assert not container["ready"]


def test_an_ended_container_is_neither_ready_nor_started() -> None:
    observed = Observed(sandbox=True, runs={"c": [run(0)]}, ready={"c": True}, started={"c": True})
    found = status.pod_status(pod("Never"), observed, HOST, NOW)
    (container,) = found["containerStatuses"]
    assert (container["ready"], container["started"]) == (False, False)
    assert container["state"]["terminated"]["reason"] == "Completed"
    assert condition(found, "Ready")["reason"] == "PodCompleted"


def test_readiness_gates_close_the_pod_but_not_its_containers() -> None:
    body = pod(readinessGates=[{"conditionType": "example.com/gate"}])
    observed = Observed(sandbox=True, runs={"c": [run()]}, ready={"c": True}, started={"c": True})
    found = status.pod_status(body, observed, HOST, NOW)
    assert condition(found, "ContainersReady")["status"] == "True"
    assert condition(found, "Ready")["reason"] == "ReadinessGatesNotReady"
    body["status"] = {"conditions": [{"type": "example.com/gate", "status": "True"}]}
    found = status.pod_status(body, observed, HOST, NOW)
    assert condition(found, "Ready")["status"] == "True"
    # Somebody else's condition is not written.
    assert "example.com/gate" not in {item["type"] for item in found["conditions"]}


def test_conditions_keep_the_time_of_their_last_change() -> None:
    body = pod()
    observed = Observed(sandbox=True, runs={"c": [run()]}, ready={"c": True}, started={"c": True})
    body["status"] = status.pod_status(body, observed, HOST, NOW)
    later = status.pod_status(body, observed, HOST, NOW + 60)
    assert later == body["status"]
    unready = status.pod_status(body, Observed(sandbox=True, runs={"c": [run()]}), HOST, NOW + 60)
    assert condition(unready, "Ready")["lastTransitionTime"] == status.timestamp(NOW + 60)
    assert condition(unready, "Initialized")["lastTransitionTime"] == status.timestamp(NOW)


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ([{}], "BestEffort"),
        ([{"requests": {"cpu": "1"}}], "Burstable"),
        ([{"limits": {"cpu": "1", "memory": "1Gi"}}], "Guaranteed"),
        ([{"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}}], "Burstable"),
        ([{"limits": {"cpu": "1", "memory": "1Gi"}}, {}], "Burstable"),
    ],
)
def test_qos(resources: list[dict[str, Any]], expected: str) -> None:
    assert status.qos_class({"containers": [{"resources": item} for item in resources]}) == expected
