"""What is well, what is broken, and what is said of it: from facts as the API and the agents give them."""

import copy
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from vmnet.inspect.errors import NodeUnreadable
from vmnet.inspect.facts import Facts
from vmnet.inspect.nodes import AgentPod
from vmnet.inspect.verdicts import Finding, Grade, judge
from vmnet.kube.api import (
    CLAIMS,
    MUTATING_WEBHOOKS,
    NADS,
    NAMESPACES,
    NODES,
    PODS,
    UDNS,
    VALIDATING_WEBHOOKS,
    VMIMS,
    Object,
)
from vmnet.model import addresses, names
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
NETWORK = Network("red_happy", NetworkId(7), role=Role.PRIMARY, subnets=(addresses.network("192.168.0.0/16"),))
ESTABLISHED = {"status": {"conditions": [{"type": "Established", "status": "True"}]}}
HOOK = {"webhooks": [{"clientConfig": {"caBundle": "Zm9v"}}]}


def report(node: str, **changes: Any) -> dict[str, Any]:
    """What a good agent says."""
    port = {"port": "p1", "state": "open", "pod": "red/a", "machine": None, "mac": "0a:58:00:00:00:05", "addresses": []}
    network = {"name": "red_happy", "present": True, "looked": "now", "faults": [], "ports": [port]}
    return {
        "node": node,
        "version": "0.1.0",
        "notReady": [],
        "cniConfiguration": {"path": "/etc/cni/net.d/10-lab.conflist", "problem": None},
        "watches": [{"kind": "pods", "synced": True, "failure": None}],
        "failing": [],
        "faults": [],
        "networks": [network] if node == "n1" else [],
        **changes,
    }


def pod(name: str, node: str, allocated: bool = True) -> Object:
    """A pod of namespace red, five minutes old."""
    annotations = {names.POD_NETWORKS_ANNOTATION: json.dumps({"red/happy": {}})} if allocated else {}
    created = (NOW - timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "metadata": {"name": name, "namespace": "red", "annotations": annotations, "creationTimestamp": created},
        "spec": {"nodeName": node},
        "status": {"phase": "Running"},
    }


def good() -> Facts:
    """A cluster of two nodes with one network, where all is well."""
    ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    nodes = tuple(
        {"metadata": {"name": name, "annotations": {names.NODE_NUMBER_ANNOTATION: "1"}}, **ready}
        for name in ("n1", "n2")
    )
    condition = {"type": "NetworkCreated", "status": "True", "observedGeneration": 2, "message": "made"}
    udn = {
        "metadata": {
            "name": "happy",
            "namespace": "red",
            "generation": 2,
            "annotations": {names.NETWORK_ID_ANNOTATION: "7"},
        },
        "spec": {"topology": "Layer2", "layer2": {"role": "Primary", "subnets": ["192.168.0.0/16"]}},
        "status": {"conditions": [condition]},
    }
    nad = {
        "metadata": {"name": "happy", "namespace": "red", "annotations": {names.NETWORK_ID_ANNOTATION: "7"}},
        "spec": {"config": NETWORK.to_nad_config("red/happy")},
    }
    claim = {
        "metadata": {"name": "vm.net", "namespace": "red"},
        "status": {"ips": ["192.168.0.5/16"], "conditions": [{"type": "IPsAllocated", "status": "True"}]},
    }
    controller = {"metadata": {"name": "vmnet-controller-1", "namespace": "vmnet-system"}, "spec": {}, **ready}
    return Facts(
        now=NOW,
        namespace="vmnet-system",
        objects={
            NODES: nodes,
            NAMESPACES: ({"metadata": {"name": "red", "labels": {names.PRIMARY_NETWORK_LABEL: ""}}},),
            PODS: (pod("a", "n1"),),
            NADS: (nad,),
            UDNS: (udn,),
            CLAIMS: (claim,),
            VMIMS: (
                {
                    "metadata": {"name": "m", "namespace": "red"},
                    "spec": {"vmiName": "vm"},
                    "status": {"phase": "Running"},
                },
                {"metadata": {"name": "old", "namespace": "red"}, "status": {"phase": "Failed"}},
            ),
        },
        controllers=(controller,),
        lease={
            "spec": {
                "holderIdentity": "vmnet-controller-1",
                "leaseDurationSeconds": 15,
                "renewTime": (NOW - timedelta(seconds=5)).strftime("%Y-%m-%dT%H:%M:%S.000000Z"),
            }
        },
        definitions={"userdefinednetworks.k8s.ovn.org": ESTABLISHED},
        webhooks={MUTATING_WEBHOOKS.kind: HOOK, VALIDATING_WEBHOOKS.kind: HOOK},
        certificate=NOW + timedelta(days=60),
        agents={name: AgentPod(name, f"vmnet-agent-{name}", "Running", True, True) for name in ("n1", "n2")},
        reports={name: report(name) for name in ("n1", "n2")},
    )


def changed(kind: Any, **parts: Any) -> Facts:
    """The good cluster, the first object of one kind with these parts."""
    facts = good()
    first, *rest = copy.deepcopy(facts.of(kind))
    first.update(parts)
    return replace(facts, objects={**facts.objects, kind: (first, *rest)})


def with_report(node: str, **changes: Any) -> Facts:
    """The good cluster, where one agent says something else."""
    facts = good()
    return replace(facts, reports={**facts.reports, node: report(node, **changes)})


def only(facts: Facts) -> Finding:
    """The one thing that is found."""
    (finding,) = judge(facts).findings
    assert finding.next_step
    return finding


def test_a_cluster_where_all_is_well_has_a_line_for_everything_and_no_finding() -> None:
    verdict = judge(good())
    assert verdict.findings == ()
    assert verdict.grade is Grade.OK
    lines = {line.about: line for _, section in verdict.sections() for line in section}
    assert set(lines) == {
        *("definitions", "controller", "webhook", "node n1", "node n2", "network red_happy"),
        *("migration red/m", "claim red/vm.net"),
    }
    network = lines["network red_happy"]
    assert network.says == "id 7, Layer2, Primary, 1 endpoints on n1, ports 1 open, 0 standby"
    assert network.details["selfTest"] == {"n1": []}
    assert network.details["conditions"][0]["observedGeneration"] == 2


UNHAPPY = [{"name": "red_happy", "present": True, "faults": ["br0 lacks gateway address 192.168.0.1"], "ports": []}]
CASES: dict[str, tuple[Facts, Grade, str, str]] = {
    "definition missing": (
        replace(good(), definitions={"userdefinednetworks.k8s.ovn.org": None}),
        Grade.BROKEN,
        "definitions",
        "userdefinednetworks.k8s.ovn.org is not installed",
    ),
    "nobody leads": (replace(good(), lease=None), Grade.BROKEN, "controller", "nobody holds the lease"),
    "leader silent": (
        replace(good(), now=NOW + timedelta(seconds=50)),
        Grade.BROKEN,
        "controller",
        "vmnet-controller-1 has not renewed the lease for 55 s",
    ),
    "no controller": (replace(good(), controllers=()), Grade.BROKEN, "controller", "no controller runs in namespace"),
    "certificate low": (
        replace(good(), certificate=NOW + timedelta(days=3)),
        Grade.WARNING,
        "webhook",
        "its certificate ends in 3 days",
    ),
    "certificate over": (
        replace(good(), certificate=NOW - timedelta(days=3)),
        Grade.BROKEN,
        "webhook",
        "its certificate has expired",
    ),
    "webhook not trusted": (
        replace(good(), webhooks={MUTATING_WEBHOOKS.kind: {"webhooks": [{}]}, VALIDATING_WEBHOOKS.kind: HOOK}),
        Grade.BROKEN,
        "webhook",
        "has no caBundle",
    ),
    "agent missing": (
        replace(
            good(),
            agents={**good().agents, "n2": AgentPod("n2")},
            reports={**good().reports, "n2": NodeUnreadable("n2", "", "no agent runs there", "kubectl describe")},
        ),
        Grade.BROKEN,
        "node n2",
        "no agent runs there",
    ),
    "exec refused": (
        replace(good(), reports={**good().reports, "n2": NodeUnreadable("n2", "a", "kubectl exec failed: no", "ask")}),
        Grade.UNKNOWN,
        "node n2",
        "kubectl exec failed",
    ),
    "agent not ready": (
        with_report("n2", notReady=["not listed yet: pods"]),
        Grade.BROKEN,
        "node n2",
        "the agent is not ready: not listed yet: pods",
    ),
    "chain": (
        with_report("n2", notReady=["no chain"], cniConfiguration={"path": None, "problem": "no chain"}),
        Grade.BROKEN,
        "node n2",
        "the agent is not ready: no chain",
    ),
    "behind": (
        with_report("n2", watches=[{"kind": "pods", "synced": True, "failure": "refused"}]),
        Grade.BROKEN,
        "node n2",
        "the agent is behind the API in pods: refused",
    ),
    "failing once": (
        with_report("n2", failing=[{"kind": "network", "key": "x", "times": 1, "error": "busy"}]),
        Grade.WARNING,
        "node n2",
        "network x failed 1 times: busy",
    ),
    "failing": (
        with_report("n2", failing=[{"kind": "network", "key": "x", "times": 9, "error": "busy"}]),
        Grade.BROKEN,
        "node n2",
        "network x failed 9 times: busy",
    ),
    "network fault": (
        with_report("n1", networks=UNHAPPY),
        Grade.BROKEN,
        "network red_happy",
        "on node n1: br0 lacks gateway address 192.168.0.1",
    ),
    "versions": (
        with_report("n2", version="0.2.0"),
        Grade.WARNING,
        "agents",
        "agents are of different versions: 0.1.0, 0.2.0",
    ),
    "node not ready": (
        changed(NODES, status={"conditions": [{"type": "Ready", "status": "False", "message": "no disk"}]}),
        Grade.BROKEN,
        "node n1",
        "the node is not ready: no disk",
    ),
    "node without number": (changed(NODES, metadata={"name": "n1"}), Grade.BROKEN, "node n1", "it has no number yet"),
    "condition false": (
        changed(
            UDNS,
            status={
                "conditions": [
                    {"type": "NetworkCreated", "status": "False", "observedGeneration": 2, "message": "overlap"}
                ]
            },
        ),
        Grade.BROKEN,
        "network red_happy",
        "NetworkCreated is False: overlap",
    ),
    "condition old": (
        changed(UDNS, status={"conditions": [{"type": "NetworkCreated", "status": "True", "observedGeneration": 1}]}),
        Grade.BROKEN,
        "network red_happy",
        "NetworkCreated speaks of an earlier version of it (generation 1)",
    ),
    "no conditions": (changed(UDNS, status={}), Grade.BROKEN, "network red_happy", "no controller has looked at it"),
    "claim": (
        changed(
            CLAIMS,
            status={"conditions": [{"type": "IPsAllocated", "status": "False", "message": "the subnet is full"}]},
        ),
        Grade.BROKEN,
        "claim red/vm.net",
        "IPsAllocated is False: the subnet is full",
    ),
    "pod waits": (
        replace(good(), objects={**good().objects, PODS: (pod("a", "n1"), pod("b", "n1", allocated=False))}),
        Grade.BROKEN,
        "pod red/b",
        "it has waited 300 s for addresses",
    ),
    "unreadable": (
        replace(good(), unreadable=("secrets vmnet-webhook cannot be read: 403",)),
        Grade.UNKNOWN,
        "cluster",
        "cannot be read",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_is_one_finding_that_names_object_reason_and_next_step(case: str) -> None:
    facts, grade, about, says = CASES[case]
    finding = only(facts)
    assert (finding.grade, finding.about) == (grade, about)
    assert says in finding.says
    assert judge(facts).grade is grade
    graded = {line.about: line.grade for _, section in judge(facts).sections() for line in section}
    # An object's line is as bad as the worst that was found about it.
    assert graded.get(about, grade) is grade


def test_the_worst_comes_first() -> None:
    facts = replace(with_report("n2", version="0.2.0"), lease=None)
    assert [item.grade for item in judge(facts).findings] == [Grade.BROKEN, Grade.WARNING]
