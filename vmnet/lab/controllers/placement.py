"""Where a pod may run, and why it may not. Pure: the scheduler's rules over one picture of the cluster.

Checked are what ``spec.nodeSelector``, required node and pod (anti-)affinity, taints and requests demand; preferred
terms and then the smaller number of pods decide between the nodes that are left. Topology spread is not looked at.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from vmnet.kube.api import Object
from vmnet.kube.conditions import find_condition
from vmnet.lab.controllers.matching import selects, selects_node, tolerates

HOSTNAME: Final = "kubernetes.io/hostname"
_UNSCHEDULABLE: Final = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
_BINARY: Final = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_DECIMAL: Final = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}


def quantity(text: str | int) -> Decimal:
    """A resource quantity as a number. Raises ValueError."""
    value = str(text)
    try:
        if value[-2:] in _BINARY:
            return Decimal(value[:-2]) * Decimal(2) ** _BINARY[value[-2:]]
        if value[-1:] in _DECIMAL:
            return Decimal(value[:-1]).scaleb(_DECIMAL[value[-1]])
        return Decimal(value)
    except ArithmeticError as error:
        raise ValueError(f"{text!r} is no quantity") from error


def requests(pod: Object) -> dict[str, Decimal]:
    """What a pod asks of a node, by resource: the sum of its containers or the largest init container."""
    spec = pod["spec"]
    total: dict[str, Decimal] = {}
    for container in spec.get("containers") or ():
        for name, value in ((container.get("resources") or {}).get("requests") or {}).items():
            total[name] = total.get(name, Decimal(0)) + quantity(value)
    for container in spec.get("initContainers") or ():
        for name, value in ((container.get("resources") or {}).get("requests") or {}).items():
            if container.get("restartPolicy") == "Always":
                total[name] = total.get(name, Decimal(0)) + quantity(value)
            else:
                total[name] = max(total.get(name, Decimal(0)), quantity(value))
    for name, value in (spec.get("overhead") or {}).items():
        total[name] = total.get(name, Decimal(0)) + quantity(value)
    total["pods"] = Decimal(1)
    return total


def is_finished(pod: Object) -> bool:
    """Whether it needs its node no more."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class Picture:
    """The cluster as placement sees it. ``pods`` are those with a node, by node name."""

    nodes: Sequence[Object]
    pods: Mapping[str, Sequence[Object]]
    namespaces: Mapping[str, Mapping[str, str]]
    """Labels of every namespace."""


class Refusal(Exception):
    """No node fits; the message counts why, as kube-scheduler words it."""


def _affinity(pod: Object, kind: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (pod["spec"].get("affinity") or {}).get(kind) or {}
    return found


def _required(pod: Object, kind: str) -> Sequence[Mapping[str, Any]]:
    return _affinity(pod, kind).get("requiredDuringSchedulingIgnoredDuringExecution") or ()


def _preferred(pod: Object, kind: str) -> Sequence[Mapping[str, Any]]:
    return _affinity(pod, kind).get("preferredDuringSchedulingIgnoredDuringExecution") or ()


def _domain(node: Object, key: str) -> str | None:
    labels = node["metadata"].get("labels") or {}
    found: str | None = labels.get(key)
    return node["metadata"]["name"] if found is None and key == HOSTNAME else found


class _Chooser:
    def __init__(self, pod: Object, picture: Picture) -> None:
        self._pod = pod
        self._picture = picture
        self._requests = requests(pod)

    def _means(self, term: Mapping[str, Any], owner: Object, other: Object) -> bool:
        """Whether ``other`` is one of the pods that a term of ``owner`` speaks of."""
        names = term.get("namespaces") or ()
        selector = term.get("namespaceSelector")
        where = other["metadata"].get("namespace", "")
        if selector is None and not names:
            inside = where == owner["metadata"].get("namespace", "")
        else:
            inside = where in names or (
                selector is not None and selects(selector, self._picture.namespaces.get(where) or {})
            )
        return inside and selects(term.get("labelSelector"), other["metadata"].get("labels"))

    def _together(self, term: Mapping[str, Any], node: Object) -> Iterable[Object]:
        """Pods in the same topology domain as ``node``."""
        key = term["topologyKey"]
        domain = _domain(node, key)
        if domain is None:
            return
        for other in self._picture.nodes:
            if _domain(other, key) == domain:
                yield from self._picture.pods.get(other["metadata"]["name"], ())

    def objection(self, node: Object) -> str:
        """Why the pod may not run on ``node``; empty when it may."""
        spec = node.get("spec") or {}
        tolerations = self._pod["spec"].get("tolerations") or ()
        if spec.get("unschedulable") and not any(tolerates(item, _UNSCHEDULABLE) for item in tolerations):
            return "node(s) were unschedulable"
        ready = find_condition((node.get("status") or {}).get("conditions"), "Ready")
        if ready is not None and ready["status"] != "True":
            return "node(s) were not ready"
        for taint in spec.get("taints") or ():
            hard = taint.get("effect") in ("NoSchedule", "NoExecute")
            if hard and not any(tolerates(item, taint) for item in tolerations):
                return "node(s) had untolerated taint(s)"
        labels = node["metadata"].get("labels") or {}
        wanted = self._pod["spec"].get("nodeSelector") or {}
        required = _affinity(self._pod, "nodeAffinity").get("requiredDuringSchedulingIgnoredDuringExecution")
        if any(labels.get(key) != value for key, value in wanted.items()) or (
            required and not any(selects_node(term, node) for term in required.get("nodeSelectorTerms") or ())
        ):
            return "node(s) didn't match Pod's node affinity/selector"
        return self._insufficient(node) or self._pods_object(node)

    def _insufficient(self, node: Object) -> str:
        allocatable = (node.get("status") or {}).get("allocatable") or {}
        used: dict[str, Decimal] = {}
        for other in self._picture.pods.get(node["metadata"]["name"], ()):
            if not is_finished(other):
                for name, value in requests(other).items():
                    used[name] = used.get(name, Decimal(0)) + value
        for name, value in self._requests.items():
            limit = allocatable.get(name)
            if limit is None and name in ("pods", "cpu", "memory", "ephemeral-storage"):
                continue  # a node that does not say what it has
            if value and used.get(name, 0) + value > quantity(limit or 0):
                return "Too many pods" if name == "pods" else f"Insufficient {name}"
        return ""

    def _pods_object(self, node: Object) -> str:
        for term in _required(self._pod, "podAffinity"):
            if not any(self._means(term, self._pod, other) for other in self._together(term, node)):
                alone = not any(
                    self._means(term, self._pod, other) for pods in self._picture.pods.values() for other in pods
                )
                # The first pod of a group that wants to be near itself may go anywhere.
                if not (alone and self._means(term, self._pod, self._pod) and _domain(node, term["topologyKey"])):
                    return "node(s) didn't match pod affinity rules"
        for term in _required(self._pod, "podAntiAffinity"):
            if any(
                self._means(term, self._pod, other) for other in self._together(term, node) if not is_finished(other)
            ):
                return "node(s) didn't match pod anti-affinity rules"
        for there in self._picture.nodes:
            for other in self._picture.pods.get(there["metadata"]["name"], ()):
                for term in () if is_finished(other) else _required(other, "podAntiAffinity"):
                    domain = _domain(there, term["topologyKey"])
                    same = domain is not None and domain == _domain(node, term["topologyKey"])
                    if same and self._means(term, other, self._pod):
                        return "node(s) didn't satisfy existing pods anti-affinity rules"
        return ""

    def score(self, node: Object) -> tuple[int, int, str]:
        """Sort key; the smallest is the best."""
        liked = sum(
            item["weight"] for item in _preferred(self._pod, "nodeAffinity") if selects_node(item["preference"], node)
        )
        for kind, sign in (("podAffinity", 1), ("podAntiAffinity", -1)):
            for item in _preferred(self._pod, kind):
                term = item["podAffinityTerm"]
                count = sum(1 for other in self._together(term, node) if self._means(term, self._pod, other))
                liked += sign * item["weight"] * count
        name = node["metadata"]["name"]
        busy = sum(1 for other in self._picture.pods.get(name, ()) if not is_finished(other))
        return -liked, busy, name


def choose(pod: Object, picture: Picture) -> str:
    """The name of the best node. Raises Refusal."""
    chooser = _Chooser(pod, picture)
    reasons: Counter[str] = Counter()
    fitting = []
    for node in picture.nodes:
        objection = chooser.objection(node)
        if objection:
            reasons[objection] += 1
        else:
            fitting.append(node)
    if fitting:
        return str(min(fitting, key=chooser.score)["metadata"]["name"])
    count = len(picture.nodes)
    why = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items())) or "no nodes"
    raise Refusal(f"0/{count} nodes are available: {why}.")
