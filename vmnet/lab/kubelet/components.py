"""Pods of what the lab runs as processes: the agent of this node, and on the first node the controllers.

As a kubelet does for static pods, this one shows them in the API as pods that it has not been given by it, made from
the manifests of ``deploy/``: ``kubectl get``, ``logs`` and ``exec`` work as on a cluster. Whether the process runs, the
lab's init knows; whether it is ready, its own ``/readyz``. Who deletes such a pod has its process restarted.
"""

import asyncio
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from vmnet.kube.api import NODES, PODS, AlreadyExists, Kube, KubeError, NotFound, Object, PatchType
from vmnet.lab import cgroups, control, topology
from vmnet.lab.container import CREDENTIALS
from vmnet.lab.directory import LabDirectory
from vmnet.lab.errors import LabError
from vmnet.lab.kubelet import status
from vmnet.lab.kubelet.sandbox import ContainerState
from vmnet.lab.kubelet.status import Observed
from vmnet.lab.processes import python_module

log = logging.getLogger(__name__)

NAMESPACE: Final = "vmnet-system"
ANNOTATION: Final = "lab.vmnet.k8s.ovn.org/process"
"""On these pods: the lab's process that each one is. A kubelet of the lab runs no pod that has it."""
INTERVAL: Final = 2.0
"""Seconds between two looks at the processes."""
CALL_SECONDS: Final = 20.0
READY_SECONDS: Final = 2.0
CONTROLLER: Final = "controller"
CONTROLLER_PORT: Final = 9411
_DEPLOY: Final = Path(__file__).parents[3] / "deploy"
_UNUSED: Final = ("volumes", "priorityClassName", "topologySpreadConstraints", "nodeSelector")
"""What the manifests say of pods that means nothing for a process."""


@dataclass(frozen=True, slots=True)
class Component:
    """One process of ours that has a pod on this node."""

    process: str
    manifest: Path
    """Of the Deployment or DaemonSet whose template the pod is made from."""
    address: str
    """Where it serves ``/readyz``; also the pod's."""
    port: int
    entering: tuple[str, ...] = ()
    """Words before a command that shall run where it runs."""

    @property
    def template(self) -> Object:
        """``metadata`` and ``spec`` of its pods."""
        template: Object = yaml.safe_load(self.manifest.read_text())["spec"]["template"]
        return template


def components(node: str) -> tuple[Component, ...]:
    """Those of a node. The controllers run on none: they are shown on the first."""
    host = next((host for host in topology.nodes(topology.MAX_NODES) if host.name == node), None)
    if host is None:
        return ()
    found = [Component(f"agent-{node}", _DEPLOY / "agent" / "daemonset.yaml", str(host.ipv4), topology.METRICS_PORT)]
    if host == topology.node(1):
        fabric = ("nsenter", "--net=/proc/1/ns/net", "--mount=/proc/1/ns/mnt", "--uts=/proc/1/ns/uts", "--")
        manifest = _DEPLOY / "controller" / "deployment.yaml"
        found.append(Component(CONTROLLER, manifest, str(topology.FABRIC_IPV4), CONTROLLER_PORT, fabric))
    return tuple(found)


def pod_of(component: Component, node: str, node_uid: str, namespace: str) -> Object:
    """What is created for a component. It goes with its Node."""
    template = component.template
    spec = {key: value for key, value in template["spec"].items() if key not in _UNUSED}
    spec["containers"] = [
        {key: value for key, value in container.items() if key != "volumeMounts"} for container in spec["containers"]
    ]
    owner = {"apiVersion": "v1", "kind": "Node", "name": node, "uid": node_uid, "controller": True}
    name = template["metadata"]["labels"]["app.kubernetes.io/name"]
    metadata = {
        "name": f"{name}-{node}",
        "namespace": namespace,
        "labels": template["metadata"]["labels"],
        "annotations": {**template["metadata"].get("annotations", {}), ANNOTATION: component.process},
        "ownerReferences": [owner],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {**spec, "nodeName": node}}


@dataclass(slots=True)
class ComponentPod:
    """A component's pod, as the kubelet's server asks it: the counterpart of ``PodWorker``."""

    component: Component
    directory: LabDirectory
    pod: Object
    process: Mapping[str, Any] | None = None
    """What the lab's init says of it; None before it was started."""
    ready: bool = False
    began: dict[int, float] = field(default_factory=dict)
    """Number of each start seen → when it was, in seconds since the epoch."""
    ended: dict[int, float] = field(default_factory=dict)
    """… → when it was first seen to have ended."""

    def log_path(self, container: str) -> Path:
        """Of all runs of the process."""
        return self.directory.log(self.component.process)

    def runs(self, container: str) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process["exit"] is None

    @property
    def entering(self) -> tuple[str, ...]:
        """Words before a command that shall run as the manifest's container; never in the kubelet's control group."""
        pods = cgroups.pods()
        own = pods / self.component.process if pods is not None else None
        account = self.directory.account(self.component.process)
        # An external API's clients are all who gave us its kubeconfig.
        secret = f"{account if account.exists() else self.directory.inner_kubeconfig}={CREDENTIALS}"
        confined = python_module("vmnet.lab.container", str(self.component.manifest), "--secret", secret, "--")
        group = cgroups.entering(own if own is not None and cgroups.make(own) else None)
        return (*group, *self.component.entering, *confined)

    def container_environment(self, container: str) -> Mapping[str, str]:
        """The process's own, with the account that it has. Raises LabError when it has ended."""
        if self.process is None:
            raise LabError(f"process {self.component.process} was not started")
        try:
            found = Path(f"/proc/{self.process['pid']}/environ").read_bytes()
        except OSError as error:
            raise LabError(f"process {self.component.process} has ended") from error
        values = dict(item.split("=", 1) for item in os.fsdecode(found).split("\0") if "=" in item)
        return {**values, "KUBECONFIG": CREDENTIALS}

    def status(self, node_addresses: tuple[str, ...], now: float) -> Object:
        """The pod's status."""
        (container,) = (item["name"] for item in self.pod["spec"]["containers"])
        if self.process is None:
            return status.pod_status(self.pod, Observed(), node_addresses, now)
        starts, code = int(self.process["starts"]), self.process["exit"]
        started = self.began.setdefault(starts, now - float(self.process["seconds"]))
        finished = None if code is None else self.ended.setdefault(starts, now)
        run = ContainerState(int(self.process["pid"]), started, code, finished)
        observed = Observed(
            addresses=(self.component.address,),
            sandbox=True,
            runs={container: (run,)},
            restarts={container: starts - 1},
            ready={container: self.ready},
            started={container: True},
        )
        return status.pod_status(self.pod, observed, node_addresses, now)


class ComponentPods:
    """Keeps the pods of a node's components right."""

    def __init__(
        self, kube: Kube, directory: LabDirectory, node: str, addresses: Iterable[str], namespace: str
    ) -> None:
        self._kube = kube
        self._directory = directory
        self._node = node
        self._addresses = tuple(addresses)
        self._namespace = namespace
        self._components = components(node)
        self._pods: dict[str, ComponentPod] = {}
        self._sent: dict[str, Object] = {}

    def find(self, namespace: str, name: str) -> ComponentPod | None:
        """A pod of ours, by its name."""
        return next(
            (
                found
                for found in self._pods.values()
                if (found.pod["metadata"]["namespace"], found.pod["metadata"]["name"]) == (namespace, name)
            ),
            None,
        )

    async def run(self) -> None:
        """For ever."""
        told = ""
        while True:
            try:
                await self._look()
                told = ""
            except (KubeError, LabError) as error:
                # Said once: an API of another cluster may have no namespace for them, and none may be up yet.
                if str(error) != told:
                    log.info("pods of the lab's processes: %s", error)
                    told = str(error)
            await asyncio.sleep(INTERVAL)

    async def _look(self) -> None:
        found = await control.call(self._directory.control_socket, CALL_SECONDS, "status")
        processes = {item["name"]: item for item in found["processes"]}
        for component in self._components:
            if component.process in processes:
                await self._keep(component, processes[component.process])

    async def _keep(self, component: Component, process: Mapping[str, Any]) -> None:
        entry = self._pods.get(component.process)
        try:
            if entry is None:
                entry = ComponentPod(component, self._directory, await self._create(component))
                self._pods[component.process] = entry
            else:
                metadata = entry.pod["metadata"]
                entry.pod = await self._kube.get(PODS, metadata["name"], metadata["namespace"])
        except NotFound:
            # The namespace does not exist, or the pod was deleted by force: begin anew with the next look.
            self._forget(component)
            if entry is None:
                raise
            return
        if entry.pod["metadata"].get("deletionTimestamp"):
            await self._replace(entry)
            return
        entry.process = process
        entry.ready = process["exit"] is None and await _is_ready(component)
        wanted = entry.status(self._addresses, time.time())
        if wanted != self._sent.get(component.process) or not entry.pod.get("status", {}).get("containerStatuses"):
            metadata = entry.pod["metadata"]
            body = {"metadata": {"uid": metadata["uid"]}, "status": wanted}
            entry.pod = await self._kube.patch(
                PODS, metadata["name"], body, metadata["namespace"], type=PatchType.STRATEGIC, subresource="status"
            )
            self._sent[component.process] = wanted

    async def _create(self, component: Component) -> Object:
        node = await self._kube.get(NODES, self._node)
        body = pod_of(component, self._node, node["metadata"]["uid"], self._namespace)
        try:
            return await self._kube.create(PODS, body, self._namespace)
        except AlreadyExists:
            # An earlier kubelet's.
            return await self._kube.get(PODS, body["metadata"]["name"], self._namespace)

    async def _replace(self, entry: ComponentPod) -> None:
        """What a deleted pod of a DaemonSet means: its process ends, and another one begins."""
        metadata = entry.pod["metadata"]
        await control.call(self._directory.control_socket, CALL_SECONDS, "restart", name=entry.component.process)
        self._forget(entry.component)
        await self._kube.delete(PODS, metadata["name"], metadata["namespace"], uid=metadata["uid"], grace_seconds=0)

    def _forget(self, component: Component) -> None:
        self._pods.pop(component.process, None)
        self._sent.pop(component.process, None)


async def _is_ready(component: Component) -> bool:
    try:
        async with asyncio.timeout(READY_SECONDS):
            reader, writer = await asyncio.open_connection(component.address, component.port)
            try:
                writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
                line = await reader.readline()
            finally:
                writer.close()
    except OSError:  # TimeoutError is one
        return False
    return b" 200 " in line
