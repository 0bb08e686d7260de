"""Tables: what ``kubectl get`` prints. The server computes every cell, the client only pads them.

Columns and cells of built-in kinds follow kube-apiserver 1.36; custom resources take theirs from
``additionalPrinterColumns``.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from vmnet.lab.apiserver.json_paths import JsonPath, PathError
from vmnet.lab.apiserver.resources import ResourceInfo

Object = dict[str, Any]
Cells = list[Any]

NONE: Final = "<none>"
UNKNOWN: Final = "<unknown>"
UNSET: Final = "<unset>"


@dataclass(frozen=True, slots=True)
class Column:
    """One column. ``priority`` above 0: only with ``-o wide``."""

    name: str
    type: str = "string"
    format: str = ""
    description: str = ""
    priority: int = 0

    def as_json(self) -> Object:
        """As it stands in a Table."""
        return {
            "name": self.name,
            "type": self.type,
            "format": self.format,
            "description": self.description,
            "priority": self.priority,
        }


@dataclass(frozen=True, slots=True)
class Printer:
    """Columns of a kind, and the function from an object and the time to its cells."""

    columns: tuple[Column, ...]
    cells: Callable[[Object, datetime], Cells]


_NAME: Final = Column("Name", format="name", description="Name must be unique within a namespace.")
_AGE: Final = Column("Age", description="Time since the object was created.")


def _wide(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, priority=1) for name in names)


def _columns(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name) for name in names)


def _numbers(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, "integer") for name in names)


# Values


def human_duration(seconds: float) -> str:
    """A duration with one or two units, as ``3d4h``."""
    if seconds < -1:
        return "<invalid>"
    if seconds < 0:
        return "0s"
    whole = int(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 120:
        return f"{whole}s"
    if minutes < 10:
        return _two(minutes, "m", whole % 60, "s")
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return _two(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return _two(days, "d", hours % 24, "h")
    if days < 730:
        return f"{days}d"
    return _two(days // 365, "y", days % 365, "d") if days < 2920 else f"{days // 365}y"


def _two(large: int, large_unit: str, small: int, small_unit: str) -> str:
    return f"{large}{large_unit}{small}{small_unit}" if small else f"{large}{large_unit}"


def parse_time(text: str) -> datetime | None:
    """An RFC 3339 time; None where it is none."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def age(text: Any, now: datetime) -> str:
    """Time since a timestamp."""
    found = parse_time(text) if isinstance(text, str) and text else None
    return UNKNOWN if found is None else human_duration((now - found).total_seconds())


def _created(obj: Object, now: datetime) -> str:
    return age(obj["metadata"].get("creationTimestamp"), now)


def _name(obj: Object) -> str:
    return str(obj["metadata"].get("name", ""))


def _spec(obj: Object) -> Object:
    return obj.get("spec") or {}


def _status(obj: Object) -> Object:
    return obj.get("status") or {}


def _labels(labels: Mapping[str, Any] | None) -> str:
    return ",".join(f"{key}={labels[key]}" for key in sorted(labels)) if labels else NONE


def _selector(selector: Mapping[str, Any] | None) -> str:
    if not selector:
        return NONE
    parts = [f"{key}={value}" for key, value in (selector.get("matchLabels") or {}).items()]
    for item in selector.get("matchExpressions") or ():
        values = ",".join(sorted(item.get("values") or ()))
        match item["operator"]:
            case "In":
                parts.append(f"{item['key']} in ({values})")
            case "NotIn":
                parts.append(f"{item['key']} notin ({values})")
            case "Exists":
                parts.append(item["key"])
            case "DoesNotExist":
                parts.append(f"!{item['key']}")
    return ",".join(sorted(parts)) or NONE


def _containers(template: Mapping[str, Any] | None) -> tuple[str, str]:
    containers = ((template or {}).get("spec") or {}).get("containers") or ()
    return ",".join(item["name"] for item in containers), ",".join(item.get("image", "") for item in containers)


def _limited(items: Sequence[str], limit: int = 3) -> str:
    if not items:
        return ""
    more = f" + {len(items) - limit} more..." if len(items) > limit else ""
    return ",".join(items[:limit]) + more


# Pods


def _has_condition(pod: Object, kind: str) -> bool:
    return any(item["type"] == kind and item["status"] == "True" for item in _status(pod).get("conditions") or ())


def _signal(state: Mapping[str, Any]) -> str:
    return f"Signal:{state['signal']}" if state.get("signal") else f"ExitCode:{state.get('exitCode', 0)}"


def _initial_reason(pod: Object, counted: "_Counted") -> str:
    """Why a pod still initializes; empty when it does not."""
    spec = _spec(pod)
    declared = {item["name"]: item for item in spec.get("initContainers") or ()}
    for position, container in enumerate(_status(pod).get("initContainerStatuses") or ()):
        counted.restarts += container.get("restartCount", 0)
        state = container.get("state") or {}
        counted.note(container)
        sidecar = declared.get(container["name"], {}).get("restartPolicy") == "Always"
        if sidecar:
            counted.total += 1
            if container.get("started") and container.get("ready"):
                counted.ready += 1
        if "terminated" in state and state["terminated"].get("exitCode", 0) == 0:
            continue
        if sidecar and container.get("started"):
            continue
        if "terminated" in state:
            reason = state["terminated"].get("reason") or _signal(state["terminated"])
            return f"Init:{reason}"
        waiting = (state.get("waiting") or {}).get("reason")
        if waiting and waiting != "PodInitializing":
            return f"Init:{waiting}"
        return f"Init:{position}/{len(declared)}"
    return ""


@dataclass(slots=True)
class _Counted:
    ready: int = 0
    total: int = 0
    restarts: int = 0
    last: datetime | None = None

    def note(self, container: Mapping[str, Any]) -> None:
        """Remember the latest restart."""
        ended = ((container.get("lastState") or {}).get("terminated") or {}).get("finishedAt")
        found = parse_time(ended) if ended else None
        if found is not None and (self.last is None or found > self.last):
            self.last = found


def pod_status(pod: Object) -> tuple[str, str, int, datetime | None]:
    """A pod's aggregate status, readiness (``1/2``), restarts and the time of the latest restart."""
    status = _status(pod)
    counted = _Counted(total=len(_spec(pod).get("containers") or ()))
    reason = status.get("reason") or status.get("phase") or ""
    for item in status.get("conditions") or ():
        if item["type"] == "PodScheduled" and item.get("reason") == "SchedulingGated":
            reason = "SchedulingGated"
    initializing = _initial_reason(pod, counted)
    if initializing and not _has_condition(pod, "Initialized"):
        reason = initializing
    else:
        reason = _running_reason(pod, reason, counted)
    if "deletionTimestamp" in pod["metadata"]:
        if status.get("reason") == "NodeLost":
            reason = "Unknown"
        elif status.get("phase") not in ("Succeeded", "Failed"):
            reason = "Terminating"
    return reason, f"{counted.ready}/{counted.total}", counted.restarts, counted.last


def _running_reason(pod: Object, reason: str, counted: _Counted) -> str:
    running = False
    for container in reversed(_status(pod).get("containerStatuses") or ()):
        counted.restarts += container.get("restartCount", 0)
        counted.note(container)
        state = container.get("state") or {}
        waiting, ended = state.get("waiting") or {}, state.get("terminated")
        if waiting.get("reason"):
            reason = waiting["reason"]
        elif ended is not None:
            reason = ended.get("reason") or _signal(ended)
        elif container.get("ready") and "running" in state:
            running = True
            counted.ready += 1
    if reason == "Completed" and running:
        reason = "Running" if _has_condition(pod, "Ready") else "NotReady"
    return reason


def _pod(pod: Object, now: datetime) -> Cells:
    spec, status = _spec(pod), _status(pod)
    reason, ready, restarts, last = pod_status(pod)
    shown = str(restarts)
    if restarts and last is not None:
        shown += f" ({human_duration((now - last).total_seconds())} ago)"
    addresses = status.get("podIPs") or []
    gates = spec.get("readinessGates") or ()
    passed = sum(1 for gate in gates if _has_condition(pod, gate["conditionType"]))
    return [
        _name(pod),
        ready,
        reason,
        shown,
        _created(pod, now),
        (addresses[0]["ip"] if addresses else status.get("podIP")) or NONE,
        spec.get("nodeName") or NONE,
        status.get("nominatedNodeName") or NONE,
        f"{passed}/{len(gates)}" if gates else NONE,
    ]


_FINISHED: Final = {
    "Succeeded": "The pod has completed successfully.",
    "Failed": "The pod failed.",
}

# Other kinds


def _node(node: Object, now: datetime) -> Cells:
    labels, status = node["metadata"].get("labels") or {}, _status(node)
    ready = next((item for item in status.get("conditions") or () if item["type"] == "Ready"), None)
    words = ["Unknown" if ready is None else "Ready" if ready["status"] == "True" else "NotReady"]
    if _spec(node).get("unschedulable"):
        words.append("SchedulingDisabled")
    roles = {
        key.removeprefix("node-role.kubernetes.io/") for key in labels if key.startswith("node-role.kubernetes.io/")
    }
    roles |= {labels["kubernetes.io/role"]} if labels.get("kubernetes.io/role") else set()
    addresses: dict[str, str] = {}
    for item in status.get("addresses") or ():
        addresses.setdefault(item["type"], item["address"])
    system = status.get("nodeInfo") or {}
    kernel = system.get("kernelVersion") or UNKNOWN
    architecture = system.get("architecture")
    return [
        _name(node),
        ",".join(words),
        ",".join(sorted(role for role in roles if role)) or NONE,
        _created(node, now),
        system.get("kubeletVersion", ""),
        addresses.get("InternalIP", NONE),
        addresses.get("ExternalIP", NONE),
        system.get("osImage") or UNKNOWN,
        f"{kernel} ({architecture})" if architecture else kernel,
        system.get("containerRuntimeVersion") or UNKNOWN,
    ]


def _external_address(service: Object) -> str:
    spec = _spec(service)
    external = ",".join(spec.get("externalIPs") or ())
    match spec.get("type"):
        case "ExternalName":
            return str(spec.get("externalName", ""))
        case "LoadBalancer":
            ingress = (_status(service).get("loadBalancer") or {}).get("ingress") or ()
            found = ",".join(item.get("ip") or item.get("hostname") or "" for item in ingress)
            return ",".join(filter(None, (found, external))) or "<pending>"
    return external or NONE


def _service_ports(ports: Sequence[Mapping[str, Any]]) -> str:
    shown = []
    for item in ports:
        node_port = f":{item['nodePort']}" if item.get("nodePort") else ""
        shown.append(f"{item['port']}{node_port}/{item.get('protocol', 'TCP')}")
    return ",".join(shown) or NONE


def _service(service: Object, now: datetime) -> Cells:
    spec = _spec(service)
    addresses = spec.get("clusterIPs") or ([spec["clusterIP"]] if spec.get("clusterIP") else [])
    return [
        _name(service),
        spec.get("type", ""),
        addresses[0] if addresses else NONE,
        _external_address(service),
        _service_ports(spec.get("ports") or ()),
        _created(service, now),
        _labels(spec.get("selector")),
    ]


def _deployment(obj: Object, now: datetime) -> Cells:
    spec, status = _spec(obj), _status(obj)
    names, images = _containers(spec.get("template"))
    return [
        _name(obj),
        f"{status.get('readyReplicas', 0)}/{spec.get('replicas', 0)}",
        status.get("updatedReplicas", 0),
        status.get("availableReplicas", 0),
        _created(obj, now),
        names,
        images,
        _selector(spec.get("selector")),
    ]


def _replica_set(obj: Object, now: datetime) -> Cells:
    spec, status = _spec(obj), _status(obj)
    names, images = _containers(spec.get("template"))
    selector = spec.get("selector") or {}
    plain = "matchLabels" not in selector and "matchExpressions" not in selector
    return [
        _name(obj),
        spec.get("replicas", 0),
        status.get("replicas", 0),
        status.get("readyReplicas", 0),
        _created(obj, now),
        names,
        images,
        _labels(selector) if plain else _selector(selector),
    ]


def _stateful_set(obj: Object, now: datetime) -> Cells:
    spec, status = _spec(obj), _status(obj)
    ready = f"{status.get('readyReplicas', 0)}/{spec.get('replicas', 0)}"
    return [_name(obj), ready, _created(obj, now), *_containers(spec.get("template"))]


def _daemon_set(obj: Object, now: datetime) -> Cells:
    spec, status = _spec(obj), _status(obj)
    counts = ("desiredNumberScheduled", "currentNumberScheduled", "numberReady", "updatedNumberScheduled")
    node_selector = ((spec.get("template") or {}).get("spec") or {}).get("nodeSelector")
    return [
        _name(obj),
        *(status.get(name, 0) for name in counts),
        status.get("numberAvailable", 0),
        _labels(node_selector),
        _created(obj, now),
        *_containers(spec.get("template")),
        _selector(spec.get("selector")),
    ]


def _job(job: Object, now: datetime) -> Cells:
    spec, status = _spec(job), _status(job)
    conditions = {item["type"]: item["status"] == "True" for item in status.get("conditions") or ()}
    if conditions.get("Complete"):
        word = "Complete"
    elif conditions.get("Failed"):
        word = "Failed"
    elif "deletionTimestamp" in job["metadata"]:
        word = "Terminating"
    elif conditions.get("Suspended"):
        word = "Suspended"
    elif conditions.get("FailureTarget"):
        word = "FailureTarget"
    elif conditions.get("SuccessCriteriaMet"):
        word = "SuccessCriteriaMet"
    else:
        word = "Running"
    parallel = spec.get("parallelism", 0)
    completions = f"{status.get('succeeded', 0)}/"
    if spec.get("completions") is not None:
        completions += str(spec["completions"])
    else:
        completions += f"1 of {parallel}" if parallel > 1 else "1"
    started, ended = (parse_time(status.get(name) or "") for name in ("startTime", "completionTime"))
    duration = "" if started is None else human_duration(((ended or now) - started).total_seconds())
    return [
        _name(job),
        word,
        completions,
        duration,
        _created(job, now),
        *_containers(spec.get("template")),
        _selector(spec.get("selector")),
    ]


def _cron_job(job: Object, now: datetime) -> Cells:
    spec, status = _spec(job), _status(job)
    last = status.get("lastScheduleTime")
    template = ((spec.get("jobTemplate") or {}).get("spec") or {}).get("template")
    return [
        _name(job),
        spec.get("schedule", ""),
        spec.get("timeZone") or NONE,
        "True" if spec.get("suspend") else "False",
        len(status.get("active") or ()),
        age(last, now) if last else NONE,
        _created(job, now),
        *_containers(template),
        _selector(((spec.get("jobTemplate") or {}).get("spec") or {}).get("selector")),
    ]


def _event(event: Object, now: datetime) -> Cells:
    about = event.get("involvedObject") or event.get("regarding") or {}
    series = event.get("series") or {}
    first = event.get("firstTimestamp") or event.get("deprecatedFirstTimestamp") or event.get("eventTime")
    last = event.get("lastTimestamp") or event.get("deprecatedLastTimestamp") or first
    count = event.get("count") or event.get("deprecatedCount") or 0
    if series:
        last, count = series.get("lastObservedTime"), series.get("count", 0)
    elif not count:
        count = 1
    source = event.get("source") or event.get("deprecatedSource") or {}
    component = source.get("component") or event.get("reportingComponent") or event.get("reportingController") or ""
    host = source.get("host") or event.get("reportingInstance") or ""
    kind = about.get("kind", "").lower()
    return [
        age(last, now),
        event.get("type", ""),
        event.get("reason", ""),
        f"{kind}/{about['name']}" if about.get("name") else kind,
        about.get("fieldPath", ""),
        f"{component}, {host}" if host else component,
        (event.get("message") or event.get("note") or "").strip(),
        age(first, now),
        count,
        _name(event),
    ]


def _slice(obj: Object, now: datetime) -> Cells:
    ports = [str(item["port"]) if item.get("port") else "*" for item in obj.get("ports") or ()]
    addresses = [address for item in obj.get("endpoints") or () for address in item.get("addresses") or ()]
    return [
        _name(obj),
        obj.get("addressType", ""),
        _limited(ports) or UNSET,
        _limited(addresses) or UNSET,
        _created(obj, now),
    ]


def _endpoints(obj: Object, now: datetime) -> Cells:
    found = []
    for subset in obj.get("subsets") or ():
        addresses = [item["ip"] for item in subset.get("addresses") or ()]
        ports = subset.get("ports") or ()
        if not ports:
            found.extend(addresses)
        for port in ports:
            found.extend(f"[{item}]:{port['port']}" if ":" in item else f"{item}:{port['port']}" for item in addresses)
    return [_name(obj), _limited(found) or NONE, _created(obj, now)]


def _volume_claim(obj: Object, now: datetime) -> Cells:
    spec, status = _spec(obj), _status(obj)
    bound = bool(spec.get("volumeName"))
    modes = {"ReadWriteOnce": "RWO", "ReadOnlyMany": "ROX", "ReadWriteMany": "RWX", "ReadWriteOncePod": "RWOP"}
    phase = "Terminating" if "deletionTimestamp" in obj["metadata"] else status.get("phase", "")
    return [
        _name(obj),
        phase,
        spec.get("volumeName", ""),
        (status.get("capacity") or {}).get("storage", "") if bound else "",
        ",".join(modes.get(item, item) for item in status.get("accessModes") or ()) if bound else "",
        spec.get("storageClassName") or "",
        spec.get("volumeAttributesClassName") or UNSET,
        _created(obj, now),
        spec.get("volumeMode") or UNSET,
    ]


def _disruption_budget(obj: Object, now: datetime) -> Cells:
    spec = _spec(obj)
    return [
        _name(obj),
        str(spec.get("minAvailable", "N/A")),
        str(spec.get("maxUnavailable", "N/A")),
        _status(obj).get("disruptionsAllowed", 0),
        _created(obj, now),
    ]


def _subjects(obj: Object) -> Cells:
    subjects = obj.get("subjects") or ()
    users = [item["name"] for item in subjects if item["kind"] == "User"]
    groups = [item["name"] for item in subjects if item["kind"] == "Group"]
    accounts = [f"{item.get('namespace', '')}/{item['name']}" for item in subjects if item["kind"] == "ServiceAccount"]
    return [", ".join(users), ", ".join(groups), ", ".join(accounts)]


def _binding(obj: Object, now: datetime) -> Cells:
    role = obj.get("roleRef") or {}
    return [_name(obj), f"{role.get('kind', '')}/{role.get('name', '')}", _created(obj, now), *_subjects(obj)]


def _role(obj: Object, _: datetime) -> Cells:
    return [_name(obj), obj["metadata"].get("creationTimestamp")]


def _plain(*values: Callable[[Object], Any]) -> Callable[[Object, datetime], Cells]:
    """Cells of a kind with a name, values that do not depend on the time, and an age."""
    return lambda obj, now: [_name(obj), *(value(obj) for value in values), _created(obj, now)]


def _webhooks(obj: Object) -> int:
    return len(obj.get("webhooks") or ())


def _parent(obj: Object) -> str:
    parent = _spec(obj).get("parentRef") or {}
    parts = [parent.get(name) for name in ("resource", "namespace", "name")]
    group = parent.get("group")
    return "/".join(part for part in (f"{parts[0]}.{group}" if group else parts[0], *parts[1:]) if part)


_POD_COLUMNS: Final = (
    _NAME,
    *_columns("Ready", "Status", "Restarts"),
    _AGE,
    *_wide("IP", "Node", "Nominated Node", "Readiness Gates"),
)
_WORKLOAD: Final = _wide("Containers", "Images", "Selector")
_ROLE: Final = Printer((_NAME, Column("Created At", "date")), _role)
_BINDING: Final = Printer((_NAME, *_columns("Role"), _AGE, *_wide("Users", "Groups", "ServiceAccounts")), _binding)
_EVENT: Final = Printer(
    (
        *_columns("Last Seen", "Type", "Reason", "Object"),
        *_wide("Subobject", "Source"),
        Column("Message"),
        *_wide("First Seen", "Count"),
        Column("Name", format="name", priority=1),
    ),
    _event,
)
_REPLICAS: Final = Printer((_NAME, *_numbers("Desired", "Current", "Ready"), _AGE, *_WORKLOAD), _replica_set)
_WEBHOOKS: Final = Printer((_NAME, *_numbers("Webhooks"), _AGE), _plain(_webhooks))

_PRINTERS: Final[dict[tuple[str, str], Printer]] = {
    ("", "pods"): Printer(_POD_COLUMNS, _pod),
    ("", "replicationcontrollers"): _REPLICAS,
    ("", "services"): Printer(
        (_NAME, *_columns("Type", "Cluster-IP", "External-IP", "Port(s)"), _AGE, *_wide("Selector")), _service
    ),
    ("", "nodes"): Printer(
        (
            _NAME,
            *_columns("Status", "Roles"),
            _AGE,
            *_columns("Version"),
            *_wide("Internal-IP", "External-IP", "OS-Image", "Kernel-Version", "Container-Runtime"),
        ),
        _node,
    ),
    ("", "namespaces"): Printer((_NAME, *_columns("Status"), _AGE), _plain(lambda obj: _status(obj).get("phase", ""))),
    ("", "configmaps"): Printer(
        (_NAME, *_columns("Data"), _AGE),
        _plain(lambda obj: len(obj.get("data") or ()) + len(obj.get("binaryData") or ())),
    ),
    ("", "secrets"): Printer(
        (_NAME, Column("Type"), Column("Data"), _AGE),
        _plain(lambda obj: obj.get("type", ""), lambda obj: len(obj.get("data") or ())),
    ),
    ("", "serviceaccounts"): Printer((_NAME, _AGE), _plain()),
    ("", "endpoints"): Printer((_NAME, *_columns("Endpoints"), _AGE), _endpoints),
    ("", "events"): _EVENT,
    ("events.k8s.io", "events"): _EVENT,
    ("", "persistentvolumeclaims"): Printer(
        (
            _NAME,
            *_columns("Status", "Volume", "Capacity", "Access Modes", "StorageClass", "VolumeAttributesClass"),
            _AGE,
            *_wide("VolumeMode"),
        ),
        _volume_claim,
    ),
    ("apps", "deployments"): Printer(
        (_NAME, *_columns("Ready", "Up-to-date", "Available"), _AGE, *_WORKLOAD), _deployment
    ),
    ("apps", "replicasets"): _REPLICAS,
    ("apps", "statefulsets"): Printer((_NAME, *_columns("Ready"), _AGE, *_wide("Containers", "Images")), _stateful_set),
    ("apps", "daemonsets"): Printer(
        (
            _NAME,
            *_numbers("Desired", "Current", "Ready", "Up-to-date", "Available"),
            *_columns("Node Selector"),
            _AGE,
            *_WORKLOAD,
        ),
        _daemon_set,
    ),
    ("apps", "controllerrevisions"): Printer(
        (_NAME, *_columns("Controller", "Revision"), _AGE),
        _plain(
            lambda obj: next(
                (
                    f"{owner['kind'].lower()}.{owner['apiVersion'].split('/')[0]}/{owner['name']}"
                    for owner in obj["metadata"].get("ownerReferences") or ()
                    if owner.get("controller")
                ),
                NONE,
            ),
            lambda obj: obj.get("revision", 0),
        ),
    ),
    ("batch", "jobs"): Printer((_NAME, *_columns("Status", "Completions", "Duration"), _AGE, *_WORKLOAD), _job),
    ("batch", "cronjobs"): Printer(
        (
            _NAME,
            *_columns("Schedule", "Timezone"),
            Column("Suspend", "boolean"),
            *_numbers("Active"),
            *_columns("Last Schedule"),
            _AGE,
            *_WORKLOAD,
        ),
        _cron_job,
    ),
    ("autoscaling", "horizontalpodautoscalers"): Printer(
        (_NAME, *_columns("Reference", "Targets", "MinPods", "MaxPods", "Replicas"), _AGE),
        _plain(
            lambda obj: "{kind}/{name}".format_map(_spec(obj).get("scaleTargetRef") or {"kind": "", "name": ""}),
            lambda _: NONE,
            lambda obj: str(_spec(obj).get("minReplicas", UNSET)),
            lambda obj: _spec(obj).get("maxReplicas", 0),
            lambda obj: _status(obj).get("currentReplicas", 0),
        ),
    ),
    ("discovery.k8s.io", "endpointslices"): Printer(
        (_NAME, *_columns("AddressType", "Ports", "Endpoints"), _AGE), _slice
    ),
    ("coordination.k8s.io", "leases"): Printer(
        (_NAME, *_columns("Holder"), _AGE), _plain(lambda obj: _spec(obj).get("holderIdentity") or "")
    ),
    ("networking.k8s.io", "networkpolicies"): Printer(
        (_NAME, *_columns("Pod-Selector"), _AGE), _plain(lambda obj: _selector(_spec(obj).get("podSelector")))
    ),
    ("networking.k8s.io", "ipaddresses"): Printer(
        (_NAME, *_columns("ParentRef")), lambda obj, _: [_name(obj), _parent(obj)]
    ),
    ("networking.k8s.io", "servicecidrs"): Printer(
        (_NAME, *_columns("CIDRs"), _AGE), _plain(lambda obj: ",".join(_spec(obj).get("cidrs") or ()))
    ),
    ("policy", "poddisruptionbudgets"): Printer(
        (_NAME, *_columns("Min Available", "Max Unavailable"), *_numbers("Allowed Disruptions"), _AGE),
        _disruption_budget,
    ),
    ("rbac.authorization.k8s.io", "roles"): _ROLE,
    ("rbac.authorization.k8s.io", "clusterroles"): _ROLE,
    ("rbac.authorization.k8s.io", "rolebindings"): _BINDING,
    ("rbac.authorization.k8s.io", "clusterrolebindings"): _BINDING,
    ("apiextensions.k8s.io", "customresourcedefinitions"): _ROLE,
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations"): _WEBHOOKS,
    ("admissionregistration.k8s.io", "validatingwebhookconfigurations"): _WEBHOOKS,
}
_DEFAULT: Final = Printer((_NAME, Column("Created At", "date")), _role)

# Custom resources


@functools.lru_cache(maxsize=1024)
def _path(text: str) -> JsonPath | None:
    try:
        return JsonPath(text)
    except PathError:
        return None


def _printed(value: Any) -> str:
    """As kubectl's templates print a value: strings bare, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _custom_cell(kind: str, path: JsonPath | None, obj: Object, now: datetime) -> Any:
    found = path.find(obj) if path is not None else []
    if not found or found[0] is None:
        return None
    value = found[0]
    match kind:
        case "integer":
            return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
        case "number":
            return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
        case "boolean":
            return value if isinstance(value, bool) else None
        case "date":
            known = parse_time(value) if isinstance(value, str) else None
            return "<invalid>" if known is None else human_duration((now - known).total_seconds())
    return _printed(value)


def _custom(definition: Mapping[str, Any]) -> Printer:
    written = definition.get("additionalPrinterColumns") or (
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    )
    columns = tuple(
        Column(
            item["name"],
            item["type"],
            item.get("format", ""),
            item.get("description", ""),
            int(item.get("priority", 0)),
        )
        for item in written
    )
    paths = [(item["type"], _path(item["jsonPath"])) for item in written]
    return Printer(
        (_NAME, *columns),
        lambda obj, now: [_name(obj), *(_custom_cell(kind, path, obj, now) for kind, path in paths)],
    )


# Tables


def _partial(obj: Object) -> Object:
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}


def _row(printer: Printer, info: ResourceInfo, obj: Object, include: str, now: datetime) -> Object:
    row: Object = {"cells": printer.cells(obj, now)}
    if not info.group and info.plural == "pods":
        phase = _status(obj).get("phase")
        if phase in _FINISHED:
            message = _FINISHED[phase]
            row["conditions"] = [{"type": "Completed", "status": "True", "reason": phase, "message": message}]
    if include == "Object":
        row["object"] = obj
    elif include == "None":
        row["object"] = None
    else:
        row["object"] = _partial(obj)
    return row


def table(
    info: ResourceInfo,
    definition: Mapping[str, Any] | None,
    objects: Sequence[Object],
    metadata: Object,
    include_object: str = "Metadata",
    with_columns: bool = True,
    *,
    now: datetime | None = None,
) -> Object:
    """A meta.k8s.io/v1 Table. ``definition`` is a custom resource's entry of ``spec.versions``; ``include_object``
    is ``None``, ``Metadata`` or ``Object``; later events of a watch go without columns."""
    printer = _custom(definition) if definition is not None else _PRINTERS.get((info.group, info.plural), _DEFAULT)
    at = now or datetime.now(UTC)
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata,
        "columnDefinitions": [column.as_json() for column in printer.columns] if with_columns else None,
        "rows": [_row(printer, info, obj, include_object, at) for obj in objects],
    }
