"""What is well and what is broken, why, and what to do next: from the facts alone. Pure.

A finding names one object, what is wrong with it, and the next step. What is broken makes ``vmnet status`` fail; a
warning does not.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from vmnet.agent import facts as pods
from vmnet.controller import specs
from vmnet.inspect.errors import NodeUnreadable
from vmnet.inspect.facts import WEBHOOKS, Facts, Report
from vmnet.kube.api import (
    CLAIMS,
    CUDNS,
    MUTATING_WEBHOOKS,
    NADS,
    NAMESPACES,
    NODES,
    PODS,
    UDNS,
    VALIDATING_WEBHOOKS,
    VMIMS,
    Object,
    object_key,
)
from vmnet.kube.codec import decode_time
from vmnet.kube.conditions import find_condition
from vmnet.model import names
from vmnet.model.network import from_nad

CERTIFICATE_LOW: Final = timedelta(days=20)
"""The controller renews a certificate of 90 days when 30 are left."""
LEASES_MISSED: Final = 3
"""So many lease times without a renewal, and nobody leads; one is lost to clocks that differ."""
ALLOCATION_PATIENCE: Final = timedelta(seconds=60)
"""For the controller to give a pod its addresses."""
TRIES: Final = 3
"""A piece of work that has failed so often in a row does not wait for something that is on its way."""
MIGRATION_OVER: Final = ("Succeeded", "Failed")


class Grade(StrEnum):
    """From good to bad."""

    OK = "ok"
    WARNING = "warning"
    UNKNOWN = "unknown"
    """It could not be looked at."""
    BROKEN = "broken"


_ORDER: Final = tuple(Grade)


def worst(grades: Iterable[Grade]) -> Grade:
    """The worst; OK of none."""
    return max(grades, key=_ORDER.index, default=Grade.OK)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    grade: Grade
    about: str
    """Kind and name: ``node n1``, ``network blue_happy``, ``claim blue/vm.net``."""
    says: str
    next_step: str


@dataclass(frozen=True, slots=True)
class Line:
    """One object of the report. ``says``: the facts in a few words; ``details``: the same for programs."""

    about: str
    grade: Grade
    says: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The whole report."""

    components: tuple[Line, ...]
    nodes: tuple[Line, ...]
    networks: tuple[Line, ...]
    migrations: tuple[Line, ...]
    claims: tuple[Line, ...]
    findings: tuple[Finding, ...]
    checked: datetime

    @property
    def grade(self) -> Grade:
        """Of everything."""
        return worst(finding.grade for finding in self.findings)

    def sections(self) -> Iterator[tuple[str, tuple[Line, ...]]]:
        """Names and lines, in the order in which they are read."""
        for name in ("components", "nodes", "networks", "migrations", "claims"):
            yield name, getattr(self, name)


class _Judge:
    """Gathers lines and findings."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.findings: list[Finding] = []

    def find(self, grade: Grade, about: str, says: str, next_step: str) -> None:
        """Note a finding, once."""
        finding = Finding(grade, about, says, next_step)
        if finding not in self.findings:
            self.findings.append(finding)

    def line(self, about: str, says: str, **details: Any) -> Line:
        """The line of an object, graded by what was found about it so far."""
        grade = worst(finding.grade for finding in self.findings if finding.about == about)
        return Line(about, grade, says, details)


def judge(facts: Facts) -> Verdict:
    """Everything that the facts say."""
    judged = _Judge(facts)
    for problem in facts.unreadable:
        judged.find(Grade.UNKNOWN, "cluster", problem, "which rights has this kubeconfig? kubectl auth can-i --list")
    components = tuple(_components(judged))
    # Nodes before networks: a network's line has the grade of what its nodes have found.
    nodes = tuple(_nodes(judged))
    return Verdict(
        components=components,
        nodes=nodes,
        networks=tuple(_networks(judged)),
        migrations=tuple(_migrations(judged)),
        claims=tuple(_claims(judged)),
        findings=tuple(sorted(judged.findings, key=lambda item: -_ORDER.index(item.grade))),
        checked=facts.now,
    )


# Components


def _components(judged: _Judge) -> Iterator[Line]:
    yield _definitions(judged)
    yield _controllers(judged)
    yield _webhook(judged)


def _definitions(judged: _Judge) -> Line:
    about, good = "definitions", []
    for name, definition in sorted(judged.facts.definitions.items()):
        if definition is None:
            judged.find(Grade.BROKEN, about, f"{name} is not installed", "kubectl apply -k deploy/crds")
            continue
        condition = find_condition((definition.get("status") or {}).get("conditions"), "Established")
        if condition is None or condition.get("status") != "True":
            why = (condition or {}).get("message") or "the API server has not taken it up"
            judged.find(Grade.BROKEN, about, f"{name} is not established: {why}", f"kubectl describe crd {name}")
            continue
        good.append(name)
    return judged.line(about, f"{len(good)} of {len(judged.facts.definitions)} established", established=good)


def _controllers(judged: _Judge) -> Line:
    about, facts = "controller", judged.facts
    namespace = facts.namespace
    ready, listed = [], []
    for pod in sorted(facts.controllers, key=object_key):
        name = pod["metadata"]["name"]
        if pod["metadata"].get("deletionTimestamp"):
            continue
        status = pod.get("status") or {}
        condition = find_condition(status.get("conditions"), "Ready") or {}
        restarts = sum(int(item.get("restartCount", 0)) for item in status.get("containerStatuses") or ())
        is_ready = condition.get("status") == "True"
        listed.append({"pod": name, "node": pods.node_of(pod), "ready": is_ready, "restarts": restarts})
        if is_ready:
            ready.append(name)
        else:
            why = condition.get("message") or f"it is {status.get('phase') or 'Pending'}"
            judged.find(
                Grade.BROKEN, about, f"pod {name} is not ready: {why}", f"kubectl logs -n {namespace} {name} --tail=50"
            )
    if not listed:
        judged.find(
            Grade.BROKEN,
            about,
            f"no controller runs in namespace {namespace}: no addresses are given, no network is made",
            f"kubectl describe deployment -n {namespace} vmnet-controller",
        )
    leader, why = _leader(facts)
    if leader is None and listed:
        step = f"kubectl get lease -n {namespace} vmnet-controller -o yaml; docs/runbooks/VmnetControllerNotLeading.md"
        judged.find(Grade.BROKEN, about, why, step)
    says = f"{leader or 'nobody'} leads; {len(ready)} of {len(listed)} ready"
    return judged.line(about, says, leader=leader, pods=listed)


def _leader(facts: Facts) -> tuple[str | None, str]:
    """Who leads, or None and why nobody does."""
    spec = (facts.lease or {}).get("spec") or {}
    holder = spec.get("holderIdentity")
    if not holder:
        return None, "no controller leads: nobody holds the lease"
    renewed = spec.get("renewTime")
    if renewed:
        silent = facts.now - decode_time(renewed)
        if silent > timedelta(seconds=LEASES_MISSED * int(spec.get("leaseDurationSeconds") or 15)):
            return None, f"no controller leads: {holder} has not renewed the lease for {silent.total_seconds():.0f} s"
    return str(holder), ""


def _webhook(judged: _Judge) -> Line:
    about, facts = "webhook", judged.facts
    for kind in (MUTATING_WEBHOOKS.kind, VALIDATING_WEBHOOKS.kind):
        found = facts.webhooks.get(kind)
        if found is None:
            says = f"{kind} {WEBHOOKS} does not exist: machines get their addresses without it, but later"
            judged.find(Grade.WARNING, about, says, "kubectl apply -k deploy/controller")
        elif not all((hook.get("clientConfig") or {}).get("caBundle") for hook in found.get("webhooks") or ()):
            says = f"{kind} {WEBHOOKS} has no caBundle yet: the API server cannot trust the controller"
            judged.find(Grade.BROKEN, about, says, f"kubectl logs -n {facts.namespace} deployment/vmnet-controller")
    if facts.certificate is None:
        return judged.line(about, "its certificate is not known", certificate=None)
    left = facts.certificate - facts.now
    if left < CERTIFICATE_LOW:
        says = "its certificate has expired" if left < timedelta() else f"its certificate ends in {left.days} days"
        step = f"does a controller lead? It renews it: kubectl logs -n {facts.namespace} deployment/vmnet-controller"
        judged.find(Grade.BROKEN if left < timedelta() else Grade.WARNING, about, says, step)
    date = f"{facts.certificate:%Y-%m-%d}"
    return judged.line(about, f"certificate until {date}", certificate=facts.certificate.isoformat())


# Nodes


def _nodes(judged: _Judge) -> Iterator[Line]:
    facts = judged.facts
    versions = {str(report.get("version")) for _, report in facts.read()}
    if len(versions) > 1:
        says = f"agents are of different versions: {', '.join(sorted(versions))}"
        step = f"kubectl rollout status -n {facts.namespace} daemonset/vmnet-agent"
        judged.find(Grade.WARNING, "agents", says, step)
    for item in sorted(facts.of(NODES), key=object_key):
        name = item["metadata"]["name"]
        yield _node(judged, name, item)


def _node(judged: _Judge, name: str, item: Object) -> Line:
    facts, about = judged.facts, f"node {name}"
    condition = find_condition((item.get("status") or {}).get("conditions"), "Ready")
    if condition is not None and condition.get("status") != "True":
        why = condition.get("message") or condition.get("reason") or "no reason is given"
        judged.find(Grade.BROKEN, about, f"the node is not ready: {why}", f"kubectl describe node {name}")
    if not (item["metadata"].get("annotations") or {}).get(names.NODE_NUMBER_ANNOTATION):
        says = "it has no number yet, so no traffic over the network's edge comes back to it"
        judged.find(Grade.BROKEN, about, says, "does a controller lead? It gives nodes their numbers")
    agent, report = facts.agents.get(name), facts.reports.get(name)
    pod = agent.name if agent is not None else ""
    where = f"-n {facts.namespace} {pod}"
    if isinstance(report, NodeUnreadable):
        runs = agent is not None and agent.running
        judged.find(Grade.UNKNOWN if runs else Grade.BROKEN, about, report.reason, report.next_step)
        return judged.line(about, f"agent {pod or 'none'}: not asked", agent=pod or None, report=None)
    if report is None:
        return judged.line(about, "not asked", agent=pod or None, report=None)
    if "error" in report:
        judged.find(Grade.UNKNOWN, about, f"its agent says: {report['error']}", f"kubectl logs {where}")
        return judged.line(about, f"agent {pod}: not asked", agent=pod, report=None)
    for reason in report["notReady"]:
        judged.find(Grade.BROKEN, about, f"the agent is not ready: {reason}", _not_ready_step(reason, where))
    for fault in report["faults"]:
        step = f"the agent mends it; if it stays: kubectl logs {where}, docs/runbooks/VmnetNetworkBroken.md"
        if not any(fault in reason for reason in report["notReady"]):
            judged.find(Grade.BROKEN, about, fault, step)
    chained = report.get("cniConfiguration")
    problem = (chained or {}).get("problem")
    if problem and problem not in report["notReady"]:
        judged.find(Grade.BROKEN, about, problem, _not_ready_step(problem, where))
    for watch in report["watches"]:
        if watch["failure"]:
            says = f"the agent is behind the API in {watch['kind']}: {watch['failure']}"
            judged.find(Grade.BROKEN, about, says, f"does the node reach the API server? kubectl logs {where}")
    for failing in report["failing"]:
        says = f"{failing['kind']} {failing['key']} failed {failing['times']} times: {failing['error']}"
        grade = Grade.BROKEN if failing["times"] >= TRIES else Grade.WARNING
        judged.find(grade, about, says, f"kubectl logs {where}; docs/runbooks/VmnetReconcileFailing.md")
    if agent is not None and not agent.ready and not report["notReady"]:
        says = f"pod {pod} is not ready, although the agent says it is: {agent.why}"
        judged.find(Grade.WARNING, about, says, f"kubectl describe pod {where}")
    for network in report["networks"]:
        for fault in network["faults"]:
            step = (
                f"the agent mends what it can; if it stays: kubectl logs {where}, docs/runbooks/VmnetNetworkBroken.md"
            )
            judged.find(Grade.BROKEN, f"network {network['name']}", f"on node {name}: {fault}", step)
    ports = sum(len(network.get("ports") or ()) for network in report["networks"])
    chain = (chained or {}).get("path")
    words = [f"agent {pod} {report['version']}", "ready" if agent is not None and agent.ready else "not ready"]
    words += [f"{agent.restarts} restarts"] if agent is not None and agent.restarts else []
    words += [f"last in {chain}"] if chain and not problem else []
    words += [f"{len(report['networks'])} networks", f"{ports} ports"]
    return judged.line(about, ", ".join(words), agent=pod, report=report)


def _not_ready_step(reason: str, where: str) -> str:
    if "CNI" in reason or "/cni/" in reason or "conflist" in reason:
        return f"docs/cni.md says what each default CNI needs; kubectl logs {where}"
    return f"kubectl logs {where}; docs/runbooks/VmnetNotReady.md"


# Networks


def _networks(judged: _Judge) -> Iterator[Line]:
    facts = judged.facts
    keys: dict[str, list[str]] = {}
    for nad in facts.of(NADS):
        try:
            network = from_nad(nad)
        except ValueError as error:
            if names.NAD_LABEL in (nad["metadata"].get("labels") or {}):
                about = f"NetworkAttachmentDefinition {object_key(nad)}"
                step = f"delete it, the controller makes it again: kubectl delete net-attach-def {_flags(nad)}"
                judged.find(Grade.BROKEN, about, f"it cannot be read: {error}", step)
            continue
        if network is not None:
            keys.setdefault(network.name, []).append(object_key(nad))
    for item in sorted((*facts.of(UDNS), *facts.of(CUDNS)), key=object_key):
        yield _network(judged, item, keys.get(specs.network_name(item), []))
    _waiting_pods(judged)


def _network(judged: _Judge, item: Object, keys: list[str]) -> Line:
    facts, name = judged.facts, specs.network_name(item)
    about = f"network {name}"
    plural = "clusteruserdefinednetwork" if specs.is_cluster(item) else "userdefinednetwork"
    step = f"kubectl describe {plural} {_flags(item)}"
    conditions = (item.get("status") or {}).get("conditions") or ()
    generation = item["metadata"].get("generation")
    if not conditions:
        judged.find(Grade.BROKEN, about, "no controller has looked at it yet", "does a controller lead? See above")
    for condition in conditions:
        kind = condition.get("type")
        if condition.get("observedGeneration", generation) != generation:
            says = f"{kind} speaks of an earlier version of it (generation {condition.get('observedGeneration')})"
            judged.find(Grade.BROKEN, about, says, "does a controller lead? It looks at the change then")
        if condition.get("status") != "True":
            judged.find(Grade.BROKEN, about, f"{kind} is {condition.get('status')}: {condition.get('message')}", step)
    number = (item["metadata"].get("annotations") or {}).get(names.NETWORK_ID_ANNOTATION)
    spec = specs.network_spec(item)
    topology = str(spec.get("topology", "?"))
    block = next((value for key, value in spec.items() if key == topology.lower()), None) or {}
    endpoints = [
        pod
        for pod in facts.of(PODS)
        if pods.alive(pod) and pods.node_of(pod) and any(key in pods.attached(pod) for key in keys)
    ]
    places = sorted({pods.node_of(pod) for pod in endpoints})
    states = [port["state"] for _, found in _here(facts, name) for port in found.get("ports") or ()]
    counts = {state: states.count(state) for state in ("open", "standby", "moved")}
    words = [f"id {number or 'none'}", topology, str(block.get("role", ""))]
    words += [f"{len(endpoints)} endpoints" + (f" on {', '.join(places)}" if places else "")]
    words += [f"ports {counts['open']} open, {counts['standby']} standby"]
    words += [f"{counts['moved']} left by their machines"] if counts["moved"] else []
    return judged.line(
        about,
        ", ".join(filter(None, words)),
        object=object_key(item),
        kind=CUDNS.kind if specs.is_cluster(item) else UDNS.kind,
        id=int(number) if number and number.isdecimal() else None,
        vni=int(number) if number and number.isdecimal() else None,
        generation=generation,
        conditions=list(conditions),
        attachments=keys,
        endpoints=len(endpoints),
        nodes=places,
        ports=counts,
        selfTest={node: found["faults"] for node, found in _here(facts, name)},
    )


def _here(facts: Facts, name: str) -> Iterator[tuple[str, Report]]:
    """The nodes that a network is on, each with what the agent says of it there."""
    for node, report in facts.read():
        for network in report.get("networks") or ():
            if network["name"] == name:
                yield node, network


def _waiting_pods(judged: _Judge) -> None:
    """Pods that should have a primary network, and have no addresses in it."""
    facts = judged.facts
    labelled = {
        item["metadata"]["name"]
        for item in facts.of(NAMESPACES)
        if names.PRIMARY_NETWORK_LABEL in (item["metadata"].get("labels") or {})
    }
    for pod in facts.of(PODS):
        metadata = pod["metadata"]
        if metadata.get("namespace") not in labelled or not pods.node_of(pod) or not pods.alive(pod):
            continue
        if pod["spec"].get("hostNetwork") or pods.attached(pod) or metadata.get("deletionTimestamp"):
            continue
        waited = facts.now - decode_time(metadata["creationTimestamp"])
        if waited > ALLOCATION_PATIENCE:
            says = f"it has waited {waited.total_seconds():.0f} s for addresses in its namespace's network"
            step = f"has namespace {metadata['namespace']} a network? kubectl get udn,net-attach-def,events -n " + str(
                metadata["namespace"]
            )
            judged.find(Grade.BROKEN, f"pod {object_key(pod)}", says, step)


# Machines


def _migrations(judged: _Judge) -> Iterator[Line]:
    for item in sorted(judged.facts.of(VMIMS), key=object_key):
        phase = (item.get("status") or {}).get("phase") or "Pending"
        if phase in MIGRATION_OVER:
            continue
        machine = (item.get("spec") or {}).get("vmiName", "?")
        yield judged.line(
            f"migration {object_key(item)}",
            f"of machine {machine}: {phase}",
            machine=f"{item['metadata']['namespace']}/{machine}",
            phase=phase,
        )


def _claims(judged: _Judge) -> Iterator[Line]:
    for item in sorted(judged.facts.of(CLAIMS), key=object_key):
        about, status = f"claim {object_key(item)}", item.get("status") or {}
        for condition in status.get("conditions") or ():
            if condition.get("status") == "False":
                says = f"{condition.get('type')} is False: {condition.get('message')}"
                judged.find(Grade.BROKEN, about, says, f"kubectl describe ipamclaim {_flags(item)}")
        addresses = list(status.get("ips") or ())
        owner = (status.get("ownerPod") or {}).get("name")
        says = ", ".join(addresses) or "no addresses"
        yield judged.line(about, says + (f", used by pod {owner}" if owner else ""), addresses=addresses, pod=owner)


def _flags(item: Object) -> str:
    """kubectl's words for an object."""
    namespace = item["metadata"].get("namespace")
    return f"-n {namespace} {item['metadata']['name']}" if namespace else str(item["metadata"]["name"])
