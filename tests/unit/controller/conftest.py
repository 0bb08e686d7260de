"""A cluster in memory with the whole controller at work on it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

import pytest

from vmnet.controller.cluster import WATCHED, Cluster
from vmnet.controller.controller import Controller
from vmnet.kube.api import CLAIMS, CUDNS, EVENTS, NADS, NAMESPACES, NODES, PODS, UDNS, VMIS, VMS, Object, Resource
from vmnet.kube.fake import FakeKube
from vmnet.kube.watch import ListWatch
from vmnet.model import names

T = TypeVar("T")
DEADLINE_SECONDS = 30.0


class World:
    """The API and what a user, KubeVirt and kubelet do to it."""

    def __init__(self) -> None:
        self.kube = FakeKube()
        # Some hours after the recordings were made.
        self.now = datetime(2026, 11, 23, 12, tzinfo=UTC)

    @asynccontextmanager
    async def controller(self) -> AsyncIterator[Controller]:
        """A leading controller for the time of the block."""
        informers = {resource: ListWatch(self.kube, resource) for resource in WATCHED}
        made = Controller(self.kube, Cluster(informers), lambda: self.now)
        tasks = [asyncio.create_task(informer.run()) for informer in informers.values()]
        tasks.append(asyncio.create_task(made.run()))
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await made.ready.wait()
            yield made
            if tasks[-1].done():
                tasks[-1].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def namespace(self, name: str, *, labelled: bool = True, **labels: str) -> Object:
        found = {"kubernetes.io/metadata.name": name, **labels}
        if labelled:
            found[names.PRIMARY_NETWORK_LABEL] = ""
        return self.kube.seed(NAMESPACES, {"metadata": {"name": name, "labels": found}, "status": {"phase": "Active"}})

    def node(self, name: str, number: int | str | None = None, **metadata: Any) -> Object:
        annotations = {names.NODE_NUMBER_ANNOTATION: str(number)} if number is not None else {}
        return self.kube.seed(NODES, {"metadata": {"name": name, "annotations": annotations, **metadata}})

    def number(self, node: str) -> int | None:
        found = self.kube.peek(NODES, node)
        text = ((found or {}).get("metadata", {}).get("annotations") or {}).get(names.NODE_NUMBER_ANNOTATION)
        return int(text) if text else None

    def cudn(self, name: str, *namespaces: str, uid: str | None = None, **layer2: Any) -> Object:
        block = {
            "role": "Primary",
            "subnets": ["192.168.0.0/16", "fd00:10::/64"],
            "ipam": {"lifecycle": "Persistent"},
            **layer2,
        }
        expression = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": list(namespaces)}
        item: Object = {
            "metadata": {"name": name},
            "spec": {
                "namespaceSelector": {"matchExpressions": [expression]},
                "network": {"topology": "Layer2", "layer2": block},
            },
        }
        if uid:
            item["metadata"]["uid"] = uid
        return self.kube.seed(CUDNS, item)

    def udn(self, namespace: str, name: str, **layer2: Any) -> Object:
        block = {"role": "Primary", "subnets": ["10.20.0.0/24"], **layer2}
        body = {
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"topology": "Layer2", "layer2": block},
        }
        return self.kube.seed(UDNS, body)

    def layer3(self, namespace: str, name: str, *subnets: str, role: str = "Primary") -> Object:
        """``subnets``: ``<cidr>`` or ``<cidr>/<length of the nodes' parts>``."""
        listed = []
        for text in subnets:
            address, _, rest = text.partition("/")
            length, _, host = rest.partition("/")
            listed.append({"cidr": f"{address}/{length}", **({"hostSubnet": int(host)} if host else {})})
        spec = {"topology": "Layer3", "layer3": {"role": role, "subnets": listed}}
        found = self.kube.peek(UDNS, name, namespace) or {"metadata": {"name": name, "namespace": namespace}}
        return self.kube.seed(UDNS, {**found, "spec": spec})

    def parts(self, node: str) -> dict[str, list[str]]:
        found = self.kube.peek(NODES, node)
        text = ((found or {}).get("metadata", {}).get("annotations") or {}).get(names.NODE_SUBNETS_ANNOTATION)
        return json.loads(text) if text else {}

    def secondary(self, namespace: str, name: str, **layer2: Any) -> Object:
        return self.udn(namespace, name, **{"role": "Secondary", "subnets": ["10.30.0.0/24"], **layer2})

    def pod(self, namespace: str, name: str, *, node: str = "n1", **metadata: Any) -> Object:
        body = {
            "metadata": {"name": name, "namespace": namespace, **metadata},
            "spec": {"nodeName": node},
            "status": {"phase": "Pending"},
        }
        return self.kube.seed(PODS, body)

    def vm(self, namespace: str, name: str, *, mac: str | None = None, addresses: list[str] | None = None) -> Object:
        interface: dict[str, Any] = {"name": "happy", "binding": {"name": "l2bridge"}}
        if mac:
            interface["macAddress"] = mac
        annotations = {"network.kubevirt.io/addresses": json.dumps({"happy": addresses})} if addresses else {}
        template = {
            "metadata": {"annotations": annotations},
            "spec": {
                "domain": {"devices": {"interfaces": [interface]}},
                "networks": [{"name": "happy", "pod": {}}],
            },
        }
        body = {"metadata": {"name": name, "namespace": namespace}, "spec": {"template": template}}
        return self.kube.seed(VMS, body)

    def vmi(self, vm: Object, *, node: str = "") -> Object:
        template = vm["spec"]["template"]
        owner = {
            "apiVersion": "kubevirt.io/v1",
            "kind": "VirtualMachine",
            "name": vm["metadata"]["name"],
            "uid": vm["metadata"]["uid"],
            "controller": True,
        }
        metadata = {
            "name": vm["metadata"]["name"],
            "namespace": vm["metadata"]["namespace"],
            "annotations": template["metadata"]["annotations"],
            "ownerReferences": [owner],
        }
        return self.kube.seed(VMIS, {"metadata": metadata, "spec": template["spec"], "status": {"nodeName": node}})

    def launcher(self, vmi: Object, name: str, *, node: str = "n1", claim: bool = False, **labels: str) -> Object:
        metadata = vmi["metadata"]
        annotations = {names.DOMAIN_ANNOTATION: metadata["name"]}
        if claim:
            annotations[names.PRIMARY_CLAIM_ANNOTATION] = f"{metadata['name']}.happy"
        owner = {
            "apiVersion": "kubevirt.io/v1",
            "kind": "VirtualMachineInstance",
            "name": metadata["name"],
            "uid": metadata["uid"],
            "controller": True,
        }
        return self.pod(
            metadata["namespace"],
            name,
            node=node,
            labels={"kubevirt.io": "virt-launcher", names.CREATED_BY_LABEL: metadata["uid"], **labels},
            annotations=annotations,
            ownerReferences=[owner],
        )

    def finish(self, pod: Object, phase: str = "Succeeded") -> None:
        found = self.kube.peek(PODS, pod["metadata"]["name"], pod["metadata"]["namespace"])
        assert found is not None
        found["status"]["phase"] = phase
        self.kube.seed(PODS, found)

    async def until(self, look: Callable[[], T | None]) -> T:
        """The first true value of ``look``; the world moves on in between."""
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not (found := look()):
                    await asyncio.sleep(0.01)
                return found
        except TimeoutError:
            raise AssertionError(f"not reached; calls: {self.kube.calls[-20:]}") from None

    async def settled(self, controller: Controller) -> None:
        """Nothing left to do: informers caught up and queues empty for a while."""
        calm = 0
        async with asyncio.timeout(DEADLINE_SECONDS):
            while calm < 20:
                await asyncio.sleep(0)
                calm = calm + 1 if controller.idle else 0

    def allocation(self, namespace: str, pod: str, key: str) -> dict[str, Any] | None:
        found = self.kube.peek(PODS, pod, namespace)
        text = ((found or {}).get("metadata", {}).get("annotations") or {}).get(names.POD_NETWORKS_ANNOTATION)
        entry = json.loads(text).get(key) if text else None
        return entry if isinstance(entry, dict) else None

    def condition(self, resource: Resource, name: str, type: str, namespace: str | None = None) -> Object | None:
        found = self.kube.peek(resource, name, namespace)
        conditions = ((found or {}).get("status") or {}).get("conditions") or []
        return next((entry for entry in conditions if entry["type"] == type), None)

    def nad(self, namespace: str, name: str) -> Object | None:
        return self.kube.peek(NADS, name, namespace)

    def claim(self, namespace: str, name: str) -> Object | None:
        return self.kube.peek(CLAIMS, name, namespace)

    def claim_ips(self, namespace: str, name: str) -> list[str]:
        return ((self.claim(namespace, name) or {}).get("status") or {}).get("ips") or []

    def events(self, reason: str) -> list[Object]:
        return [item for item in self.kube._of(EVENTS).values() if item["reason"] == reason]

    async def told(self, reason: str, text: str) -> Object:
        """An event of that reason whose message has that text."""
        return await self.until(lambda: next((item for item in self.events(reason) if text in item["message"]), None))


@pytest.fixture
def world() -> World:
    return World()
