"""Which node a pod gets, and what is said when it gets none."""

from decimal import Decimal
from typing import Any

import pytest

from vmnet.kube.api import Object
from vmnet.lab.controllers.matching import selects, tolerates
from vmnet.lab.controllers.placement import Picture, Refusal, choose, quantity, requests


def _node(name: str, labels: dict[str, str] | None = None, **spec: Any) -> Object:
    allocatable = spec.pop("allocatable", {"cpu": "2", "memory": "1Gi", "pods": "3"})
    ready = spec.pop("ready", "True")
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
        "spec": spec,
        "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": ready}]},
    }


def _pod(name: str = "p", labels: dict[str, str] | None = None, namespace: str = "a", **spec: Any) -> Object:
    cpu = spec.pop("cpu", None)
    container = {"name": "c", "resources": {"requests": {"cpu": cpu}}} if cpu else {"name": "c"}
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": labels or {}},
        "spec": {"containers": [container], **spec},
    }


def _place(pod: Object, nodes: list[Object], pods: dict[str, list[Object]] | None = None) -> str:
    return choose(pod, Picture(nodes, pods or {}, {"a": {"team": "x"}, "b": {"team": "y"}}))


def _required(kind: str, **term: Any) -> Object:
    term.setdefault("topologyKey", "kubernetes.io/hostname")
    return {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def test_fewest_pods_then_name() -> None:
    nodes = [_node("n1"), _node("n2"), _node("n3")]
    assert _place(_pod(), nodes) == "n1"
    assert _place(_pod(), nodes, {"n1": [_pod("x")], "n3": [_pod("y")]}) == "n2"


def test_finished_pods_take_no_room() -> None:
    done = {**_pod("x", cpu="2"), "status": {"phase": "Succeeded"}}
    assert _place(_pod(cpu="2"), [_node("n1")], {"n1": [done]}) == "n1"


def test_preferred_terms_come_before_the_number_of_pods() -> None:
    preference = {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["fast"]}]}
    affinity = {
        "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 5, "preference": preference}]}
    }
    nodes = [_node("n1"), _node("n2", {"disk": "fast"})]
    assert _place(_pod(affinity=affinity), nodes, {"n2": [_pod("x")]}) == "n2"


@pytest.mark.parametrize(
    ("pod", "node", "why"),
    [
        (_pod(), _node("n1", unschedulable=True), "node(s) were unschedulable"),
        (_pod(), _node("n1", ready="Unknown"), "node(s) were not ready"),
        (_pod(), _node("n1", taints=[{"key": "k", "effect": "NoSchedule"}]), "node(s) had untolerated taint(s)"),
        (
            _pod(nodeSelector={"zone": "b"}),
            _node("n1", {"zone": "a"}),
            "node(s) didn't match Pod's node affinity/selector",
        ),
        (_pod(cpu="2100m"), _node("n1"), "Insufficient cpu"),
        (
            _pod(containers=[{"name": "c", "resources": {"requests": {"devices.kubevirt.io/kvm": "1"}}}]),
            _node("n1"),
            "Insufficient devices.kubevirt.io/kvm",
        ),
        (_pod(), _node("n1", allocatable={"pods": "0"}), "Too many pods"),
        (
            _pod(affinity=_required("podAffinity", labelSelector={"matchLabels": {"app": "db"}})),
            _node("n1"),
            "node(s) didn't match pod affinity rules",
        ),
    ],
)
def test_refusals(pod: Object, node: Object, why: str) -> None:
    with pytest.raises(Refusal) as refusal:
        _place(pod, [node])
    assert str(refusal.value) == f"0/1 nodes are available: 1 {why}."


def test_what_a_term_allows() -> None:
    tainted = _node("n1", unschedulable=True, taints=[{"key": "k", "value": "v", "effect": "NoExecute"}])
    tolerations = [
        {"key": "node.kubernetes.io/unschedulable", "operator": "Exists"},
        {"key": "k", "value": "v"},
    ]
    assert _place(_pod(tolerations=tolerations), [tainted]) == "n1"
    terms = [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n2"]}]}]
    wanted = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
    assert _place(_pod(affinity=wanted), [_node("n1"), _node("n2")]) == "n2"


def test_anti_affinity_works_both_ways() -> None:
    apart = _required("podAntiAffinity", labelSelector={"matchLabels": {"app": "web"}})
    shy, plain = _pod("x", {"app": "web"}, affinity=apart), _pod("y", {"app": "web"})
    nodes = [_node("n1"), _node("n2")]
    assert _place(shy, nodes, {"n1": [plain]}) == "n2"
    assert _place(plain, nodes, {"n1": [shy], "n2": [_pod("z"), _pod("zz")]}) == "n2"
    with pytest.raises(Refusal, match="1 node\\(s\\) didn't satisfy existing pods anti-affinity rules"):
        _place(plain, [nodes[0]], {"n1": [shy]})


def test_terms_speak_of_the_pods_own_namespace_unless_they_name_others() -> None:
    selector = {"matchLabels": {"app": "web"}}
    there = {"n1": [_pod("x", {"app": "web"}, namespace="b")]}
    own = _pod(affinity=_required("podAntiAffinity", labelSelector=selector))
    assert _place(own, [_node("n1")], there) == "n1"
    elsewhere = {"matchLabels": {"team": "y"}}
    other = _pod(affinity=_required("podAntiAffinity", labelSelector=selector, namespaceSelector=elsewhere))
    with pytest.raises(Refusal):
        _place(other, [_node("n1")], there)


def test_affinity_by_zone_and_the_first_of_a_group() -> None:
    near = _required("podAffinity", labelSelector={"matchLabels": {"app": "web"}}, topologyKey="zone")
    nodes = [_node("n1", {"zone": "a"}), _node("n2", {"zone": "b"}), _node("n3", {"zone": "b"})]
    pod = _pod("p", {"app": "web"}, affinity=near)
    assert _place(pod, nodes) == "n1"
    assert _place(pod, nodes, {"n2": [_pod("x", {"app": "web"})]}) == "n3"


@pytest.mark.parametrize(
    ("text", "number"), [("100m", "0.1"), ("1Gi", "1073741824"), (3, "3"), ("2k", "2000"), ("1e3", "1000")]
)
def test_quantities(text: str | int, number: str) -> None:
    assert quantity(text) == Decimal(number)


def test_no_quantity() -> None:
    with pytest.raises(ValueError, match="no quantity"):
        quantity("much")


def test_requests_are_the_larger_of_init_and_run() -> None:
    spec = {
        "containers": [{"resources": {"requests": {"cpu": "1"}}}, {"resources": {"requests": {"cpu": "500m"}}}],
        "initContainers": [{"resources": {"requests": {"cpu": "3"}}}],
    }
    assert requests({"spec": spec})["cpu"] == 3


def test_selectors() -> None:
    assert not selects(None, {})
    assert selects({}, {"a": "b"})
    expressions = [{"key": "a", "operator": "NotIn", "values": ["c"]}, {"key": "z", "operator": "DoesNotExist"}]
    assert selects({"matchExpressions": expressions}, {"a": "b"})
    assert not selects({"matchExpressions": expressions}, {"a": "c"})
    assert tolerates({"operator": "Exists"}, {"key": "any", "effect": "NoSchedule"})
    assert not tolerates({"key": "k", "value": "w"}, {"key": "k", "value": "v", "effect": "NoSchedule"})
