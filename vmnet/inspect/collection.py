"""Gathering what somebody needs who was not there: objects, logs, metrics, kernels, and what status says of it all."""

import asyncio
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from vmnet.inspect import status_text, verdicts
from vmnet.inspect.archive import FILE_LIMIT, Archive, Entry
from vmnet.inspect.connection import Connection
from vmnet.inspect.errors import InspectionError, NodeUnreadable
from vmnet.inspect.facts import DEFINITIONS, collect
from vmnet.inspect.nodes import AGENT_LABEL, CONTROLLER_LABEL, Nodes
from vmnet.inspect.redaction import redact_object, redact_text
from vmnet.kube.api import (
    CLAIMS,
    CUDNS,
    ENDPOINT_SLICES,
    EVENTS,
    LEASES,
    MUTATING_WEBHOOKS,
    NADS,
    NAMESPACES,
    NODES,
    PODS,
    POLICIES,
    SECRETS,
    SERVICE_CIDRS,
    SERVICES,
    UDNS,
    VALIDATING_WEBHOOKS,
    VMIMS,
    VMIS,
    VMS,
    Kube,
    KubeError,
    Object,
    Resource,
    object_key,
)
from vmnet.model import names
from vmnet.runtime.tasks import first_failure

CONFIG_MAPS: Final = Resource("", "v1", "configmaps", "ConfigMap")
DAEMON_SETS: Final = Resource("apps", "v1", "daemonsets", "DaemonSet")
DEPLOYMENTS: Final = Resource("apps", "v1", "deployments", "Deployment")
WHOLE: Final = (NODES, NAMESPACES, UDNS, CUDNS, NADS, CLAIMS, VMIMS, SERVICE_CIDRS)
"""Kinds of which all objects are taken: they are networks' own, or few."""
OF_NETWORKS: Final = (PODS, SERVICES, ENDPOINT_SLICES, POLICIES, VMS, VMIS, EVENTS)
"""Kinds of which those in namespaces with a network are taken, and in vmnet's own."""
OF_SYSTEM: Final = (CONFIG_MAPS, SECRETS, LEASES, DAEMON_SETS, DEPLOYMENTS)
"""Kinds of which those in vmnet's own namespace are taken."""
LOG_LINES: Final = 20_000
"""Of each container, the last ones."""
LOG_SECONDS: Final = 60.0
LOCAL_SECONDS: Final = 180.0
"""For a node to say what its kernel has."""
AT_ONCE: Final = 4
LOCAL_WORDS: Final = ("vmnet", "sysdump", "--local")

Tell = Callable[[str], None]


async def write(
    kube: Kube, connection: Connection, path: Path, *, force: bool = False, tell: Tell = lambda text: None
) -> tuple[Entry, ...]:
    """Write the archive; returns what could not be had. ``tell`` hears of progress. Raises InspectionError."""
    about = {
        "taken": datetime.now(UTC).isoformat(),
        "by": f"vmnet {version('vmnet')}",
        "redacted": "values of Secrets, credentials in texts, cloud-init: see docs/status-and-sysdump.md",
    }
    with Archive(path, force=force, about=about) as archive:
        gathering = _Gathering(kube, connection, archive, tell)
        await gathering.run()
        return archive.missed


class _Gathering:
    """One archive's."""

    def __init__(self, kube: Kube, connection: Connection, archive: Archive, tell: Tell) -> None:
        self._kube = kube
        self._connection = connection
        self._archive = archive
        self._tell = tell
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> None:
        """All parts; what one of them cannot have keeps no other from what it can."""
        for says, part in (
            ("versions", self._versions),
            ("status", self._status),
            ("objects", self._objects),
            ("logs and metrics", self._pods),
            ("nodes", self._nodes),
        ):
            self._tell(says)
            try:
                await part()
            except* (KubeError, InspectionError, TimeoutError) as group:
                self._archive.miss(says, str(first_failure(group)))

    async def _versions(self) -> None:
        found: dict[str, Any] = {"vmnet": version("vmnet"), "python": sys.version}
        self._archive.add_json("versions.json", found, "this command")
        await self._kubectl("kubectl-version.json", ("version", "-o", "json"))

    async def _status(self) -> None:
        verdict = verdicts.judge(await collect(self._kube, self._connection))
        self._archive.add("status.txt", redact_text(status_text.text(verdict)) + "\n", "vmnet status")
        self._archive.add("status.json", redact_text(status_text.json_text(verdict)) + "\n", "vmnet status -o json")

    # Objects

    async def _objects(self) -> None:
        namespaces = [self._connection.namespace]
        for resource in WHOLE:
            items = await self._list(resource)
            self._add_objects(resource, items)
            namespaces += _namespaces_of(resource, items)
        wanted = sorted(set(namespaces))
        for resource in OF_NETWORKS:
            await self._list_in(resource, [*wanted, "default"] if resource is EVENTS else wanted)
        for resource in OF_SYSTEM:
            await self._list_in(resource, [self._connection.namespace])
        hooks = [item for kind in (MUTATING_WEBHOOKS, VALIDATING_WEBHOOKS) for item in await self._list(kind)]
        ours = [item for item in hooks if (item["metadata"].get("name") or "").startswith("vmnet-")]
        self._add("objects/webhookconfigurations.json", ours, "list of webhook configurations")
        groups = {UDNS.group, NADS.group, VMIS.group}
        found = [item for item in await self._list(DEFINITIONS) if item.get("spec", {}).get("group") in groups]
        # Without the schemas, which are this version's and long.
        short = [
            {**item, "spec": {key: item["spec"].get(key) for key in ("group", "scope", "names")}} for item in found
        ]
        self._add("objects/customresourcedefinitions.json", short, "list, without schemas")

    async def _list(self, resource: Resource, namespace: str | None = None) -> list[Object]:
        try:
            return list((await self._kube.list(resource, namespace)).items)
        except KubeError as error:
            where = f" in namespace {namespace}" if namespace else ""
            self._archive.miss(f"list {resource.plural}{where}", str(error))
            return []

    async def _list_in(self, resource: Resource, namespaces: Iterable[str]) -> None:
        self._add_objects(
            resource, [item for namespace in namespaces for item in await self._list(resource, namespace)]
        )

    def _add_objects(self, resource: Resource, items: list[Object]) -> None:
        named = [{"apiVersion": resource.api_version, "kind": resource.kind, **item} for item in items]
        self._add(f"objects/{resource.plural}.json", named, f"list of {resource.plural}")

    def _add(self, path: str, items: list[Object], how: str) -> None:
        redacted = [redact_object(item) for item in sorted(items, key=object_key)]
        self._archive.add_json(path, {"kind": "List", "apiVersion": "v1", "items": redacted}, how)

    # Pods of vmnet

    async def _pods(self) -> None:
        namespace = self._connection.namespace
        found = [
            *(await self._kube.list(PODS, namespace, labels=CONTROLLER_LABEL)).items,
            *(await self._kube.list(PODS, namespace, labels=AGENT_LABEL)).items,
        ]
        async with asyncio.TaskGroup() as group:
            for pod in found:
                group.create_task(self._pod(pod), name=f"pod {object_key(pod)}")

    async def _pod(self, pod: Object) -> None:
        namespace, name = self._connection.namespace, str(pod["metadata"]["name"])
        restarts = {
            item["name"]: int(item.get("restartCount", 0))
            for item in (pod.get("status") or {}).get("containerStatuses") or ()
        }
        for container in pod["spec"]["containers"]:
            log = ("logs", "-n", namespace, name, "-c", container["name"], f"--tail={LOG_LINES}")
            limit = f"--limit-bytes={FILE_LIMIT * 4}"
            await self._kubectl(f"logs/{name}.{container['name']}.log", (*log, limit), end=True)
            if restarts.get(container["name"]):
                path = f"logs/{name}.{container['name']}.previous.log"
                await self._kubectl(path, (*log, limit, "--previous"), end=True)
            port = next((item for item in container.get("ports") or () if item.get("name") == "metrics"), None)
            address = (pod.get("status") or {}).get("podIP")
            if port is not None and address:
                host = f"[{address}]" if ":" in address else address
                url = f"http://{host}:{port['containerPort']}/metrics"
                words = ("exec", "-n", namespace, name, "-c", container["name"], "--")
                await self._kubectl(f"metrics/{name}.txt", (*words, "vmnet", "sysdump", "--metrics-of", url))

    async def _kubectl(self, path: str, words: tuple[str, ...], *, end: bool = False) -> None:
        how = "kubectl " + " ".join(words)
        try:
            async with self._slots:
                done = await self._connection.kubectl(words, LOG_SECONDS)
        except TimeoutError:
            self._archive.miss(how, f"it did not end within {LOG_SECONDS:g} s", path)
            return
        if done.exit:
            self._archive.miss(how, done.stderr[:500] or f"exit status {done.exit}", path)
            return
        self._archive.add(path, redact_text(done.stdout.decode(errors="replace")), how, end=end)

    # Nodes

    async def _nodes(self) -> None:
        nodes = Nodes(self._kube, self._connection, at_once=AT_ONCE)
        agents = await nodes.refresh()

        async def one(node: str) -> None:
            await self._node(nodes, node)

        async with asyncio.TaskGroup() as group:
            for node in sorted(agents):
                group.create_task(one(node), name=f"node {node}")

    async def _node(self, nodes: Nodes, node: str) -> None:
        how = f"on node {node}: {' '.join(LOCAL_WORDS)}"
        try:
            found = (await nodes.run(node, LOCAL_WORDS, seconds=LOCAL_SECONDS)).json()
        except NodeUnreadable as error:
            self._archive.miss(how, str(error), f"nodes/{node}")
            return
        for item in found["outputs"]:
            path, done = f"nodes/{node}/{item['path']}", f"on node {node}: {item['how']}"
            if item["error"]:
                self._archive.miss(done, item["error"], path)
            else:
                self._archive.add(path, redact_text(item["text"]), done, cut=item["cut"])
        self._tell(f"node {node}")


def _namespaces_of(resource: Resource, items: Iterable[Object]) -> list[str]:
    """Namespaces that have to do with networks."""
    if resource is NAMESPACES:
        return [
            item["metadata"]["name"]
            for item in items
            if names.PRIMARY_NETWORK_LABEL in (item["metadata"].get("labels") or {})
        ]
    if resource in (UDNS, NADS, CLAIMS, VMIMS):
        return [item["metadata"]["namespace"] for item in items]
    return []
