"""Pod status from what kubelet sees. Pure.

Field meanings: Kubernetes API reference, PodStatus and ContainerStatus; the phase rules are those of "Pod lifecycle".
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from vmnet.kube.api import Object
from vmnet.lab.kubelet import images
from vmnet.lab.kubelet.sandbox import ContainerState

OWN_CONDITIONS: Final = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
"""The condition types that kubelet writes; every other is somebody else's."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a container does not run."""

    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Observed:
    """What kubelet knows of one pod. Keys of the mappings are container names."""

    addresses: tuple[str, ...] = ()
    sandbox: bool = False
    """The sandbox is up and its network made."""
    runs: Mapping[str, Sequence[ContainerState]] = field(default_factory=dict)
    """All runs of each container, oldest first."""
    restarts: Mapping[str, int] = field(default_factory=dict)
    waiting: Mapping[str, Waiting] = field(default_factory=dict)
    ready: Mapping[str, bool] = field(default_factory=dict)
    started: Mapping[str, bool] = field(default_factory=dict)
    ending: bool = False
    """The pod is being deleted: nothing is restarted any more."""


def timestamp(seconds: float) -> str:
    """RFC 3339 in whole seconds, as Kubernetes writes times."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def exit_code(status: int) -> int:
    """Container exit code: 128 + n for signal n."""
    return 128 - status if status < 0 else status


def restarts_after(policy: str, status: int) -> bool:
    """Whether ``restartPolicy`` restarts a container that ended with ``status``."""
    return policy == "Always" or (policy == "OnFailure" and status != 0)


def phase(pod: Object, observed: Observed) -> str:
    """Pending, Running, Succeeded or Failed."""
    policy = "Never" if observed.ending else pod["spec"].get("restartPolicy", "Always")
    last = {name: runs[-1] for name, runs in observed.runs.items() if runs}
    for container in pod["spec"].get("initContainers") or []:
        run = last.get(container["name"])
        if run is None or run.exit is None:
            return "Pending"
        if run.exit != 0:
            return "Failed" if not restarts_after(policy, run.exit) else "Pending"
    states = [last.get(container["name"]) for container in pod["spec"]["containers"]]
    if any(state is None for state in states):
        return "Failed" if observed.ending else "Pending"
    exits = [state.exit for state in states if state is not None]
    if any(status is None or restarts_after(policy, status) for status in exits):
        return "Running"
    return "Succeeded" if all(status == 0 for status in exits) else "Failed"


def pod_status(pod: Object, observed: Observed, node_addresses: Sequence[str], now: float) -> Object:
    """``status`` with the fields that kubelet owns; conditions keep the time of their last change."""
    spec, before = pod["spec"], pod.get("status") or {}
    current = phase(pod, observed)
    finished = current in ("Succeeded", "Failed")
    containers = [container_status(item, observed, pod) for item in spec["containers"]]
    inits = [container_status(item, observed, pod, init=True) for item in spec.get("initContainers") or []]
    status: Object = {
        "phase": current,
        "hostIP": node_addresses[0],
        "hostIPs": [{"ip": address} for address in node_addresses],
        "startTime": before.get("startTime") or timestamp(now),
        "containerStatuses": containers,
        "conditions": _conditions(pod, observed, containers, inits, finished, now),
        "qosClass": before.get("qosClass") or qos_class(spec),
    }
    if inits:
        status["initContainerStatuses"] = inits
    if observed.addresses:
        status["podIP"] = observed.addresses[0]
        status["podIPs"] = [{"ip": address} for address in observed.addresses]
    return status


def container_status(container: Object, observed: Observed, pod: Object, *, init: bool = False) -> Object:
    """One entry of ``containerStatuses``."""
    name = container["name"]
    runs = observed.runs.get(name) or ()
    run = runs[-1] if runs else None
    status: Object = {
        "name": name,
        "image": container.get("image", ""),
        "imageID": images.image_id(container.get("image", "")) if run else "",
        "restartCount": observed.restarts.get(name, 0),
        "state": {},
        "lastState": {},
        "ready": observed.ready.get(name, False) and run is not None and run.exit is None,
        "started": observed.started.get(name, False) and run is not None and run.exit is None,
    }
    identifier = f"lab://{pod['metadata']['uid']}/{name}/{observed.restarts.get(name, 0)}"
    if run is not None:
        status["containerID"] = identifier
    waiting = observed.waiting.get(name)
    if run is not None and run.exit is None:
        status["state"] = {"running": {"startedAt": timestamp(run.started)}}
    elif run is not None and waiting is None:
        status["state"] = {"terminated": _terminated(run, identifier)}
        # An init container is ready once it has done its work.
        status["ready"] = init and run.exit == 0
    else:
        waiting = waiting or Waiting("PodInitializing" if observed.sandbox else "ContainerCreating")
        status["state"] = {
            "waiting": {"reason": waiting.reason} | ({"message": waiting.message} if waiting.message else {})
        }
    older = [item for item in runs if item.exit is not None and (item is not run or waiting is not None)]
    if older:
        status["lastState"] = {"terminated": _terminated(older[-1], identifier)}
    return status


def _terminated(run: ContainerState, identifier: str) -> Object:
    code = exit_code(run.exit or 0)
    return {
        "exitCode": code,
        "reason": "Completed" if code == 0 else "Error",
        "startedAt": timestamp(run.started),
        "finishedAt": timestamp(run.finished or run.started),
        "containerID": identifier,
    }


def _conditions(
    pod: Object,
    observed: Observed,
    containers: Sequence[Object],
    inits: Sequence[Object],
    finished: bool,
    now: float,
) -> list[Object]:
    existing = {item.get("type"): item for item in (pod.get("status") or {}).get("conditions") or []}
    unready = [item["name"] for item in containers if not item["ready"]]
    waiting_inits = [item["name"] for item in inits if not item["ready"]]
    if finished:
        containers_ready = ("False", "PodCompleted", "")
    elif unready:
        containers_ready = ("False", "ContainersNotReady", f"containers with unready status: [{' '.join(unready)}]")
    else:
        containers_ready = ("True", "", "")
    ready = containers_ready
    if ready[0] == "True":
        closed = _closed_gates(pod, existing)
        if closed:
            ready = ("False", "ReadinessGatesNotReady", closed)
    initialized = ("True", "", "")
    if waiting_inits:
        names = " ".join(waiting_inits)
        initialized = ("False", "ContainersNotInitialized", f"containers with incomplete status: [{names}]")
    elif finished:
        initialized = ("True", "PodCompleted", "")
    wanted = {
        "PodReadyToStartContainers": ("True" if observed.sandbox else "False", "", ""),
        "Initialized": initialized,
        "Ready": ready,
        "ContainersReady": containers_ready,
        "PodScheduled": ("True", "", ""),
    }
    return [_condition(kind, *value, existing.get(kind), now) for kind, value in wanted.items()]


def _closed_gates(pod: Object, existing: Mapping[str, Mapping[str, Any]]) -> str:
    gates: Iterable[str] = [gate["conditionType"] for gate in pod["spec"].get("readinessGates") or []]
    missing = [gate for gate in gates if (existing.get(gate) or {}).get("status") != "True"]
    return "; ".join(
        f"the status of pod readiness gate {gate!r} is not True, but "
        f"{(existing.get(gate) or {}).get('status', 'absent')}"
        for gate in missing
    )


def _condition(
    kind: str, status: str, reason: str, message: str, before: Mapping[str, Any] | None, now: float
) -> Object:
    unchanged = before is not None and before.get("status") == status and before.get("lastTransitionTime")
    body: Object = {
        "type": kind,
        "status": status,
        "lastTransitionTime": before["lastTransitionTime"] if before and unchanged else timestamp(now),
        "lastProbeTime": None,
        # Explicit nulls: a strategic merge would otherwise keep the reason of an earlier state.
        "reason": reason or None,
        "message": message or None,
    }
    return body


def qos_class(spec: Object) -> str:
    """Guaranteed, Burstable or BestEffort, by requests and limits of all containers."""
    resources = [item.get("resources") or {} for item in (*spec["containers"], *(spec.get("initContainers") or []))]
    if not any(item.get("requests") or item.get("limits") for item in resources):
        return "BestEffort"
    for item in resources:
        limits, requests = item.get("limits") or {}, item.get("requests") or {}
        if {"cpu", "memory"} - set(limits) or any(
            requests.get(key, limits[key]) != limits[key] for key in ("cpu", "memory")
        ):
            return "Burstable"
    return "Guaranteed"
