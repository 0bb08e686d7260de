"""Looking at a node: a command of ours, in the pod of the node's agent, by the administrator's own kubectl.

Whoever may ``kubectl exec`` into the agent is the node's administrator; vmnet's own accounts need no right for this.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmnet.inspect.connection import Connection
from vmnet.inspect.errors import NodeUnreadable
from vmnet.kube.api import NODES, PODS, Kube, Object

AGENT_LABEL: Final = "app.kubernetes.io/name=vmnet-agent"
CONTROLLER_LABEL: Final = "app.kubernetes.io/name=vmnet-controller"
CONTAINER: Final = "agent"
SECONDS: Final = 30.0
"""For one command on one node."""
AT_ONCE: Final = 8
"""kubectls that run beside each other: each is a process of some 50 MB."""
_ENDED: Final = "command terminated with exit code"
"""What kubectl writes to stderr when the command, and not kubectl, has failed."""


@dataclass(frozen=True, slots=True)
class AgentPod:
    """The agent of a node, as the API knows it. ``name`` is empty where the node has none."""

    node: str
    name: str = ""
    phase: str = ""
    ready: bool = False
    running: bool = False
    """Its container runs: it can be asked, ready or not."""
    restarts: int = 0
    why: str = ""
    """Why it does not run or is not ready, in the API's words; empty where it is ready."""

    @classmethod
    def of(cls, pod: Object) -> "AgentPod":
        """From a Pod."""
        status = pod.get("status") or {}
        containers = {item["name"]: item for item in status.get("containerStatuses") or ()}
        container = containers.get(CONTAINER) or {}
        state: Mapping[str, Any] = container.get("state") or {}
        conditions = {item["type"]: item for item in status.get("conditions") or ()}
        ready = conditions.get("Ready", {}).get("status") == "True"
        waiting, ended = state.get("waiting") or {}, state.get("terminated") or {}
        why = waiting.get("message") or waiting.get("reason")
        if not why and ended:
            why = f"its container ended with exit status {ended.get('exitCode', '?')}"
        why = why or conditions.get("Ready", {}).get("message") or f"it is {status.get('phase') or 'Pending'}"
        return cls(
            node=str(pod["spec"].get("nodeName", "")),
            name=str(pod["metadata"]["name"]),
            phase=str(status.get("phase", "")),
            ready=ready,
            running="running" in state and "deletionTimestamp" not in pod["metadata"],
            restarts=int(container.get("restartCount", 0)),
            why="" if ready else str(why),
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command said on a node. ``exit`` is the command's own."""

    node: str
    pod: str
    exit: int
    stdout: bytes
    stderr: str

    def json(self) -> Any:
        """Its output as JSON. Raises NodeUnreadable: it is something else, so agent and command do not fit."""
        try:
            return json.loads(self.stdout)
        except ValueError:
            said = self.stderr or self.stdout.decode(errors="replace").strip() or "nothing"
            raise NodeUnreadable(
                self.node,
                self.pod,
                f"the agent's answer is no JSON; it said: {said[:300]}",
                "does the agent run the same version? See: vmnet status",
            ) from None


class Nodes:
    """The cluster's nodes. ``refresh`` reads which agents there are; ``run`` asks one of them."""

    def __init__(self, kube: Kube, connection: Connection, *, at_once: int = AT_ONCE) -> None:
        self._kube = kube
        self._connection = connection
        self._slots = asyncio.Semaphore(at_once)
        self._agents: dict[str, AgentPod] = {}

    @property
    def agents(self) -> Mapping[str, AgentPod]:
        """Node → its agent, as ``refresh`` found them; a node without an agent has one without a name."""
        return self._agents

    async def refresh(self) -> Mapping[str, AgentPod]:
        """Read nodes and agents anew. Raises KubeError."""
        nodes = (await self._kube.list(NODES)).items
        pods = (await self._kube.list(PODS, self._connection.namespace, labels=AGENT_LABEL)).items
        self._agents = agents_of(nodes, pods)
        return self._agents

    async def run(self, node: str, words: Sequence[str], *, seconds: float = SECONDS) -> Answer:
        """Run a command in the agent's pod of ``node``. Raises NodeUnreadable; KubeError where nobody has refreshed.

        The command's own failure is no error: see ``Answer.exit``.
        """
        if not self._agents:
            await self.refresh()
        agent = self._agents.get(node)
        namespace = self._connection.namespace
        if agent is None:
            known = ", ".join(sorted(self._agents)) or "none"
            raise NodeUnreadable(node, "", f"the cluster has no such node (it has: {known})", "kubectl get nodes")
        if not agent.name:
            raise NodeUnreadable(
                node, "", "no agent runs there", f"kubectl describe daemonset -n {namespace} vmnet-agent"
            )
        where = f"-n {namespace} {agent.name}"
        if not agent.running:
            raise NodeUnreadable(
                node,
                agent.name,
                f"the agent does not run: {agent.why}",
                f"kubectl describe pod {where}; kubectl logs {where} --previous",
            )
        exec_words = ("exec", "-n", namespace, agent.name, "-c", CONTAINER, "--", *words)
        try:
            async with self._slots:
                done = await self._connection.kubectl(exec_words, seconds)
        except TimeoutError:
            raise NodeUnreadable(
                node,
                agent.name,
                f"{' '.join(words)} did not end within {seconds:g} s",
                f"is the node overloaded or away? kubectl get node {node}; kubectl logs {where}",
            ) from None
        if done.exit and _ENDED not in done.stderr:
            raise NodeUnreadable(
                node, agent.name, f"kubectl exec failed: {done.stderr or f'exit status {done.exit}'}", _exec_step(where)
            )
        lines = [line for line in done.stderr.splitlines() if _ENDED not in line]
        return Answer(node, agent.name, done.exit, done.stdout, "\n".join(lines))

    async def run_all(
        self, words: Sequence[str], nodes: Iterable[str] | None = None, *, seconds: float = SECONDS
    ) -> dict[str, Answer | NodeUnreadable]:
        """Run a command on all nodes, or on some; a node that cannot be asked has its error in the answer's place."""
        if not self._agents:
            await self.refresh()

        async def one(node: str) -> Answer | NodeUnreadable:
            try:
                return await self.run(node, words, seconds=seconds)
            except NodeUnreadable as error:
                return error

        chosen = tuple(sorted(self._agents) if nodes is None else nodes)
        async with asyncio.TaskGroup() as group:
            tasks = {node: group.create_task(one(node), name=f"ask {node}") for node in chosen}
        return {node: task.result() for node, task in tasks.items()}


def agents_of(nodes: Iterable[Object], pods: Iterable[Object]) -> dict[str, AgentPod]:
    """Node → its agent. Of several (one ends, one begins) the one that runs counts, of these the one that is ready."""
    found = {str(item["metadata"]["name"]): AgentPod(str(item["metadata"]["name"])) for item in nodes}
    for pod in pods:
        agent = AgentPod.of(pod)
        if agent.node in found:
            found[agent.node] = max(
                found[agent.node], agent, key=lambda item: (item.running, item.ready, bool(item.name))
            )
    return found


def _exec_step(where: str) -> str:
    return f"may you exec there? kubectl auth can-i create pods/exec; by hand: kubectl exec {where} -- vmnet status"
