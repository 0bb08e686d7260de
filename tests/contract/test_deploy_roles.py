"""The controller's roles are what it uses: an audited run of the real program, driven through everything that it does.

Nothing that it asks for may be refused, and nothing may be granted that it does not ask for. What it asks for only when
it loses a race is listed here, each with the race.
"""

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from vmnet.agent.credentials import Credentials
from vmnet.controller.agent_certificates import renewed
from vmnet.kube.api import (
    CLAIMS,
    CUDNS,
    ENDPOINT_SLICES,
    NADS,
    NAMESPACES,
    NODES,
    PODS,
    SECRETS,
    UDNS,
    VMIMS,
    VMIS,
    VMS,
    Kube,
    NotFound,
    Object,
    Resource,
    Unavailable,
)
from vmnet.kube.client import KubeClient
from vmnet.lab import manifests
from vmnet.lab.apiserver.audit import used
from vmnet.lab.apiserver.server import ApiServer
from vmnet.lab.apiserver.testing import Kubectl, running_server
from vmnet.lab.kubectl import find
from vmnet.model import names

DEADLINE = 60.0
SYSTEM = "vmnet-system"
USER = f"system:serviceaccount:{SYSTEM}:vmnet-controller"
CRDS = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False)

Right = tuple[str, str, str, str]
"""Verb, group, resource (with subresource), name where the role names one."""

SELDOM: dict[Right, str] = {
    ("get", "k8s.cni.cncf.io", "ipamclaims", ""): "another made the claim, and the watch has not told",
    (
        "delete",
        "k8s.cni.cncf.io",
        "ipamclaims",
        "",
    ): "its machine is gone, and the cluster's collector has not come yet",
    ("get", "k8s.cni.cncf.io", "network-attachment-definitions", ""): "another made it, and the watch has not told",
}


async def eventually(what: str, look: Callable[[], Awaitable[Any]]) -> Any:
    """The first true answer."""
    try:
        async with asyncio.timeout(DEADLINE):
            while True:
                with contextlib.suppress(NotFound):
                    if found := await look():
                        return found
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None


def served(resource: Resource) -> Object:
    """A definition that lets a kind of KubeVirt be served."""
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    version = {"name": resource.version, "served": True, "storage": True, "schema": schema}
    kinds = {"kind": resource.kind, "plural": resource.plural}
    spec = {"group": resource.group, "scope": "Namespaced", "names": kinds, "versions": [version]}
    return {"metadata": {"name": f"{resource.plural}.{resource.group}"}, "spec": spec}


def made(resource: Resource, name: str, **body: Any) -> Object:
    metadata = {"name": name, **body.pop("metadata", {})}
    return {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata, **body}


def pod(name: str, node: str = "", **metadata: Any) -> Object:
    spec = {"containers": [{"name": "main", "image": "none"}], **({"nodeName": node} if node else {})}
    return made(PODS, name, metadata=metadata, spec=spec)


@asynccontextmanager
async def controller(server: ApiServer, directory: Path) -> AsyncIterator[None]:
    """``vmnet controller`` as its service account, with the webhook."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [found.getsockname()[1] for found in (one, two)]
    kubeconfig = server.account_kubeconfig(directory / "controller", SYSTEM, "vmnet-controller")
    words = [
        *("-m", "vmnet.cmd", "controller", "--kubeconfig", str(kubeconfig), "--namespace", SYSTEM),
        *("--metrics-address", f"127.0.0.1:{ports[0]}", "--webhook-address", f"127.0.0.1:{ports[1]}"),
        *("--webhook-url", f"https://127.0.0.1:{ports[1]}"),
    ]
    log = directory / "controller.log"
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, stderr=stderr, env={**os.environ, "POD_NAME": "one"}
        )
    try:
        yield
        process.terminate()
        async with asyncio.timeout(DEADLINE):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        sys.stderr.write(log.read_text())


class Scenario:
    """Everything that the controller does, one after another."""

    def __init__(self, kube: Kube, agent: Kube) -> None:
        self.kube = kube
        self.agent = agent

    async def annotated(self, resource: Resource, name: str, key: str, namespace: str | None = None) -> str | None:
        found = (await self.kube.get(resource, name, namespace))["metadata"].get("annotations") or {}
        value: str | None = found.get(key)
        return value

    async def allocated(self, name: str, namespace: str) -> None:
        key = names.POD_NETWORKS_ANNOTATION
        await eventually(f"addresses of {name}", lambda: self.annotated(PODS, name, key, namespace))

    async def gone(self, resource: Resource, name: str, namespace: str | None = None) -> None:
        async def look() -> bool:
            try:
                await self.kube.get(resource, name, namespace)
            except NotFound:
                return True
            return False

        await eventually(f"no {resource.plural} {name}", look)

    async def nodes(self) -> None:
        await self.kube.create(NODES, made(NODES, "n1"))
        await eventually("a node's number", lambda: self.annotated(NODES, "n1", names.NODE_NUMBER_ANNOTATION))

    async def certificate(self) -> None:
        async with asyncio.timeout(DEADLINE):
            await Credentials(self.agent, "n1").renew()

    async def networks(self) -> None:
        layer2 = {"role": "Primary", "subnets": ["192.168.0.0/16"], "ipam": {"lifecycle": "Persistent"}}
        selector = {"matchLabels": {"tenant": "shared"}}
        network = {"topology": "Layer2", "layer2": layer2}
        await self.kube.create(CUDNS, made(CUDNS, "shared", spec={"namespaceSelector": selector, "network": network}))
        layer3 = {"role": "Primary", "subnets": [{"cidr": "10.9.0.0/16", "hostSubnet": 24}]}
        await self.kube.create(UDNS, made(UDNS, "routed", spec={"topology": "Layer3", "layer3": layer3}), "red")
        await self.kube.create(PODS, pod("web", "n1", labels={"app": "web"}), "blue")
        await self.kube.create(PODS, pod("parts", "n1"), "red")
        await self.allocated("web", "blue")
        await self.allocated("parts", "red")

    async def slices(self) -> None:
        reference = {"kind": "Pod", "name": "web", "namespace": "blue"}
        endpoint = {"addresses": ["10.244.0.9"], "targetRef": reference, "conditions": {"ready": True}}
        labels = {"kubernetes.io/service-name": "web"}
        ports = [{"name": "", "port": 80, "protocol": "TCP"}]
        body = made(ENDPOINT_SLICES, "web-1", metadata={"labels": labels}, addressType="IPv4", endpoints=[endpoint])
        await self.kube.create(ENDPOINT_SLICES, {**body, "ports": ports}, "blue")

        async def mirror() -> Object | None:
            listed = await self.kube.list(ENDPOINT_SLICES, "blue", labels=f"{names.MIRRORED_SERVICE_LABEL}=web")
            return listed.items[0] if listed.items else None

        await eventually("a mirror", mirror)
        await self.kube.patch(ENDPOINT_SLICES, "web-1", {"ports": [{**ports[0], "port": 81}]}, "blue")

        async def followed() -> bool:
            found = await mirror()
            return found is not None and found["ports"][0]["port"] == 81

        await eventually("the mirror follows", followed)
        # Only the controller removes a mirror whose Service's pods are of another network now.
        await self.kube.patch(ENDPOINT_SLICES, "web-1", {"metadata": {"labels": {"kubernetes.io/service-name": None}}}, "blue")  # fmt: skip  # noqa: E501

        async def removed() -> bool:
            return await mirror() is None

        await eventually("the mirror goes", removed)

    async def machines(self) -> None:
        spec = {"domain": {}, "networks": [{"name": "happy", "pod": {}}]}
        vm = await self.kube.create(VMS, made(VMS, "vm", spec={"template": {"spec": spec}}), "blue")
        owner = {"apiVersion": VMS.api_version, "kind": VMS.kind, "name": "vm", "uid": vm["metadata"]["uid"]}
        vmi = await self.kube.create(
            VMIS, made(VMIS, "vm", metadata={"ownerReferences": [{**owner, "controller": True}]}, spec=spec), "blue"
        )

        async def filled() -> bool:
            return bool(((await self.kube.get(CLAIMS, "vm.happy", "blue")).get("status") or {}).get("ips"))

        await eventually("the claim's addresses", filled)
        await self.kube.create(VMIS, made(VMIS, "lone", spec=spec), "blue")

        async def alone() -> bool:
            return bool((await self.kube.get(CLAIMS, "lone.happy", "blue"))["metadata"]["ownerReferences"])

        await eventually("the claim of a machine without a VM", alone)
        uid = vmi["metadata"]["uid"]
        mine = {"apiVersion": VMIS.api_version, "kind": VMIS.kind, "name": "vm", "uid": uid, "controller": True}
        labels = {names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE, names.CREATED_BY_LABEL: uid}

        async def launched(name: str) -> bool:
            # Until a replica has read its certificate the API cannot ask it, and must.
            try:
                await self.kube.create(PODS, pod(name, "n1", labels=labels, ownerReferences=[mine]), "blue")
            except Unavailable as error:
                if "failed calling webhook" not in str(error):
                    raise
                return False
            return True

        for name in ("source", "target"):
            await eventually(f"pod {name}", lambda name=name: launched(name))  # type: ignore[misc]
            await self.allocated(name, "blue")
        for number in ("1", "2"):
            state = {
                "migrationUid": number,
                "sourcePod": "source",
                "targetPod": "target",
                "sourceNode": "n0",
                "targetNode": "n1",
                "startTimestamp": "2026-01-01T00:00:00Z",
                "failed": True,
            }
            await self.kube.patch(VMIS, "vm", {"status": {"migrationState": state}}, "blue")

            async def recorded(number: str = number) -> bool:
                text = await self.annotated(VMIS, "vm", names.MIGRATION_RECORD_ANNOTATION, "blue")
                return bool(text) and json.loads(str(text))["uid"] == number

            # The same event twice: the second raises the count of the first.
            await eventually("the record of a migration", recorded)

    async def the_end(self) -> None:
        await self.kube.delete(VMS, "vm", "blue")
        await self.kube.delete(VMIS, "lone", "blue")
        await self.gone(CLAIMS, "vm.happy", "blue")
        for namespace, name in (("blue", "web"), ("blue", "source"), ("blue", "target"), ("red", "parts")):
            # The cluster's collector may have been there.
            with contextlib.suppress(NotFound):
                await self.kube.delete(PODS, name, namespace, grace_seconds=0)
        await self.kube.delete(CUDNS, "shared")
        await self.kube.delete(UDNS, "routed", "red")
        await self.gone(CUDNS, "shared")
        await self.gone(UDNS, "routed", "red")
        await self.gone(NADS, "shared", "blue")


async def test_the_controllers_roles_are_what_it_uses(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        run = Kubectl(server, tmp_path, str(find()))
        await run.check("apply", "--server-side", "-f", str(manifests.INSTALL), timeout=90)
        kube = await KubeClient.connect(server.kubeconfig(tmp_path / "admin"), user_agent="test")
        agent = await KubeClient.connect(
            server.account_kubeconfig(tmp_path / "agent", SYSTEM, "vmnet-agent", "n1"), user_agent="test"
        )
        try:
            for resource in (VMS, VMIS, VMIMS):
                await kube.create(CRDS, served(resource))
            for name, labels in (("blue", {"tenant": "shared"}), ("red", {})):
                labels = {names.PRIMARY_NETWORK_LABEL: "", **labels}
                await kube.create(NAMESPACES, made(NAMESPACES, name, metadata={"labels": labels}))
            # One that cannot be read is made anew.
            await kube.create(SECRETS, made(SECRETS, "vmnet-webhook"), SYSTEM)
            scenario = Scenario(kube, agent)
            async with controller(server, tmp_path):
                await scenario.nodes()
                await scenario.certificate()
                await scenario.networks()
                await scenario.slices()
                await scenario.machines()
                await scenario.the_end()
            # The next leader finds an authority that is about to expire.
            old = renewed(None, datetime.now(UTC) - timedelta(days=3650)).secret_data()
            await kube.patch(SECRETS, "vmnet-agents", {"data": old}, SYSTEM)
            async with controller(server, tmp_path):
                await scenario.certificate()
            lines = [line for line in server.audit.lines if line.user == USER]
        finally:
            await kube.close()
            await agent.close()
    refused = [line.asked for line in lines if not line.allowed]
    assert refused == []
    rights = set(manifests.rights("vmnet-controller"))
    asked = used(lines, rights)
    excess, lack = sorted(rights - asked - SELDOM.keys()), sorted(asked - rights)
    assert not excess, f"granted, but not used: {excess}"
    assert not lack, f"used, but not granted by a rule of its own: {lack}"
    assert SELDOM.keys() <= rights
