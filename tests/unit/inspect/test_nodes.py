"""Which agent is a node's, and what is said of one that cannot be asked."""

from pathlib import Path
from typing import Any

import pytest

from vmnet.inspect.connection import Connection
from vmnet.inspect.errors import NodeUnreadable
from vmnet.inspect.nodes import AgentPod, Answer, Nodes, agents_of
from vmnet.kube.api import NODES, PODS
from vmnet.kube.fake import FakeKube

SYSTEM = "vmnet-system"


def node(name: str) -> dict[str, Any]:
    """A Node."""
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}


def pod(name: str, on: str, *, ready: bool = True, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """An agent's Pod."""
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    if not ready:
        condition["message"] = "containers with unready status: [agent]"
    container = {"name": "agent", "restartCount": 2, "state": {"running": {}} if state is None else state}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": SYSTEM, "labels": {"app.kubernetes.io/name": "vmnet-agent"}},
        "spec": {"nodeName": on, "containers": [{"name": "agent"}]},
        "status": {"phase": "Running", "conditions": [condition], "containerStatuses": [container]},
    }


def test_a_node_without_an_agent_is_known_as_one() -> None:
    found = agents_of([node("n1"), node("n2")], [pod("a", "n1")])
    assert found["n1"] == AgentPod("n1", "a", "Running", True, True, 2)
    assert found["n2"] == AgentPod("n2")


def test_while_an_agent_is_replaced_the_one_that_runs_counts() -> None:
    old, new = pod("old", "n1"), pod("new", "n1", ready=False, state={"waiting": {"reason": "ContainerCreating"}})
    assert agents_of([node("n1")], [old, new])["n1"].name == "old"
    old["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    new["status"]["containerStatuses"][0]["state"] = {"running": {}}
    assert agents_of([node("n1")], [old, new])["n1"].name == "new"


def test_an_agent_that_is_not_well_says_why() -> None:
    ended = AgentPod.of(pod("a", "n1", ready=False, state={"terminated": {"exitCode": 137}}))
    assert not ended.running
    assert ended.why == "its container ended with exit status 137"
    unready = AgentPod.of(pod("a", "n1", ready=False))
    assert unready.running
    assert unready.why == "containers with unready status: [agent]"


async def test_a_node_that_cannot_be_asked_is_an_error_that_names_the_next_step(tmp_path: Path) -> None:
    kube = FakeKube()
    for name in ("n1", "n2", "n3"):
        await kube.create(NODES, node(name))
    for item in (pod("a", "n1", ready=False, state={"terminated": {"exitCode": 1}}), pod("c", "n3")):
        await kube.create(PODS, item, SYSTEM)
        status = {"status": item["status"]}
        await kube.patch(PODS, item["metadata"]["name"], status, SYSTEM, subresource="status")
    # kubectl itself cannot reach this cluster.
    configuration = tmp_path / "kubeconfig"
    configuration.write_text("apiVersion: v1\nkind: Config\n")
    found = await Nodes(kube, Connection(configuration)).run_all(
        ["vmnet", "status", "--local"], ["n1", "n2", "n3", "n4"]
    )
    assert all(isinstance(item, NodeUnreadable) for item in found.values())
    assert str(found["n1"]) == "node n1, pod a: the agent does not run: its container ended with exit status 1"
    assert str(found["n2"]) == "node n2: no agent runs there"
    assert str(found["n3"]).startswith("node n3, pod c: kubectl exec failed: ")
    assert str(found["n4"]) == "node n4: the cluster has no such node (it has: n1, n2, n3)"
    assert all(isinstance(item, NodeUnreadable) and item.next_step for item in found.values())


def test_an_answer_that_is_no_json_names_the_agent() -> None:
    assert Answer("n1", "a", 1, b'{"a": 1}', "").json() == {"a": 1}
    with pytest.raises(NodeUnreadable, match="node n1, pod a: the agent's answer is no JSON; it said: unknown option"):
        Answer("n1", "a", 2, b"", "unknown option").json()
