"""The controller as users run it: real processes against the embedded API server with the CRDs of ``deploy/``."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from vmnet.kube.api import (
    CLAIMS,
    CUDNS,
    LEASES,
    MUTATING_WEBHOOKS,
    NADS,
    NAMESPACES,
    PODS,
    UDNS,
    VALIDATING_WEBHOOKS,
    VMIMS,
    VMIS,
    VMS,
    Forbidden,
    Invalid,
    Kube,
    NotFound,
    Object,
    Resource,
    Unavailable,
)
from vmnet.kube.client import KubeClient
from vmnet.lab.apiserver.testing import running_server
from vmnet.lab.kubectl import find as find_kubectl
from vmnet.model import names

ROOT = Path(__file__).parents[2]
CRDS = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False)
SYSTEM = "vmnet-system"
DEADLINE = 40.0
KEY = "blue/happy-tenant"


def kubevirt_crd(resource: Resource) -> Object:
    """Only what the controller needs of KubeVirt: the kind is served. A VMI has no status subresource (recorded)."""
    version: Object = {
        "name": resource.version,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
    }
    kinds = {"kind": resource.kind, "plural": resource.plural}
    return {
        "apiVersion": CRDS.api_version,
        "kind": CRDS.kind,
        "metadata": {"name": f"{resource.plural}.{resource.group}"},
        "spec": {"group": resource.group, "scope": "Namespaced", "names": kinds, "versions": [version]},
    }


@asynccontextmanager
async def cluster(directory: Path) -> AsyncIterator[tuple[Kube, Path]]:
    """An API server with our CRDs, namespaces red and blue, and a client."""
    async with running_server(directory) as server:
        kubeconfig = server.kubeconfig(directory / "kubeconfig")
        kube = await KubeClient.connect(kubeconfig, user_agent="vmnet-test")
        try:
            for path in sorted((ROOT / "deploy" / "crds").glob("k8s.*.yaml")):
                await kube.create(CRDS, yaml.safe_load(path.read_text()))
            for name in ("red", "blue"):
                labels = {names.PRIMARY_NETWORK_LABEL: ""}
                await kube.create(NAMESPACES, {"metadata": {"name": name, "labels": labels}})
            yield kube, kubeconfig
        finally:
            await kube.close()


class Process:
    """One ``vmnet controller``."""

    def __init__(self, made: asyncio.subprocess.Process, port: int) -> None:
        self.made = made
        self.port = port

    async def page(self, path: str) -> tuple[int, str]:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{self.port}{path}") as answer:
                return answer.status, await answer.text()
        except aiohttp.ClientError as error:
            return 0, str(error)

    async def stop(self) -> int:
        if self.made.returncode is None:
            self.made.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE):
            return await self.made.wait()


@asynccontextmanager
async def controller(kubeconfig: Path, name: str = "one", *more: str) -> AsyncIterator[Process]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    arguments = [
        *("-m", "vmnet.cmd", "controller", "--kubeconfig", str(kubeconfig)),
        *("--namespace", SYSTEM, "--metrics-address", f"127.0.0.1:{port}", "--log-level", "info"),
        *more,
    ]
    log = kubeconfig.with_name(f"{name}.log")
    with log.open("wb") as stderr:
        made = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stderr=stderr, env={**os.environ, "POD_NAME": name}
        )
    process = Process(made, port)
    try:
        yield process
    finally:
        if made.returncode is None:
            made.kill()
        await made.wait()
        sys.stderr.write(log.read_text())


async def eventually(look: Callable[[], Awaitable[Any]]) -> Any:
    """The first true answer."""
    async with asyncio.timeout(DEADLINE):
        while True:
            with contextlib.suppress(NotFound):
                found = await look()
                if found:
                    return found
            await asyncio.sleep(0.05)


def condition(item: Object, kind: str) -> Object | None:
    conditions = (item.get("status") or {}).get("conditions") or []
    return next((entry for entry in conditions if entry["type"] == kind), None)


def network(name: str = "happy-tenant") -> Object:
    expression = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["red", "blue"]}
    return {
        "apiVersion": CUDNS.api_version,
        "kind": CUDNS.kind,
        "metadata": {"name": name},
        "spec": {
            "namespaceSelector": {"matchExpressions": [expression]},
            "network": {
                "topology": "Layer2",
                "layer2": {
                    "role": "Primary",
                    "subnets": ["192.168.0.0/16", "fd00:10::/64"],
                    "ipam": {"lifecycle": "Persistent"},
                },
            },
        },
    }


def pod(name: str, **metadata: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, **metadata},
        "spec": {"containers": [{"name": "main", "image": "none"}]},
    }


async def allocation(kube: Kube, name: str) -> Any:
    found = await kube.get(PODS, name, "blue")
    text = (found["metadata"].get("annotations") or {}).get(names.POD_NETWORKS_ANNOTATION)
    return json.loads(text).get(KEY) if text else None


async def test_networks_pods_machines_and_their_end(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (kube, kubeconfig), controller(kubeconfig) as process:
        # KubeVirt is not installed: that must not keep the controller from being ready.
        await eventually(lambda: _ready(process))
        await kube.create(CUDNS, network())
        await kube.create(PODS, pod("web"), "blue")
        first = await eventually(lambda: allocation(kube, "web"))
        assert first["ip_addresses"] == ["192.168.0.3/16", "fd00:10::3/64"]
        created = await eventually(lambda: _condition(kube, CUDNS, "happy-tenant", None, "NetworkReady"))
        assert (created["status"], created["reason"]) == ("True", "NetworkAttachmentDefinitionReady")
        # KubeVirt arrives.
        for resource in (VMS, VMIS, VMIMS):
            await kube.create(CRDS, kubevirt_crd(resource))
        interfaces = {"devices": {"interfaces": [{"name": "happy"}]}}
        template = {"spec": {"domain": interfaces, "networks": [{"name": "happy", "pod": {}}]}}
        body = {
            "apiVersion": VMS.api_version,
            "kind": VMS.kind,
            "metadata": {"name": "blue"},
            "spec": {"template": template},
        }
        vm = await eventually(lambda: kube.create(VMS, body, "blue"))
        claim = await eventually(lambda: _filled(kube, "blue.happy"))
        assert claim["status"]["ips"] == ["192.168.0.4/16", "fd00:10::4/64"]
        assert claim["spec"]["network"] == "cluster_udn_happy-tenant"
        owner = {"apiVersion": VMS.api_version, "kind": VMS.kind, "name": "blue", "uid": vm["metadata"]["uid"]}
        vmi = await kube.create(
            VMIS,
            {
                "apiVersion": VMIS.api_version,
                "kind": VMIS.kind,
                "metadata": {"name": "blue", "ownerReferences": [{**owner, "controller": True}]},
                "spec": template["spec"],
            },
            "blue",
        )
        uid = vmi["metadata"]["uid"]
        launcher = {"apiVersion": VMIS.api_version, "kind": VMIS.kind, "name": "blue", "uid": uid, "controller": True}
        for name in ("source", "target"):
            labels = {names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE, names.CREATED_BY_LABEL: uid}
            await kube.create(PODS, pod(name, labels=labels, ownerReferences=[launcher]), "blue")
        source = await eventually(lambda: allocation(kube, "source"))
        assert source == await eventually(lambda: allocation(kube, "target"))
        assert source["ip_addresses"] == claim["status"]["ips"]
        # What cannot be done is said, and done once the cause is gone.
        spec = {"topology": "Layer2", "layer2": {"role": "Primary", "subnets": ["10.0.0.0/24"]}}
        second = {"metadata": {"name": "second"}, "apiVersion": UDNS.api_version, "kind": UDNS.kind, "spec": spec}
        await kube.create(UDNS, second, "blue")
        refused = await eventually(lambda: _condition(kube, UDNS, "second", "blue", "NetworkReady"))
        assert "has primary network cluster_udn_happy-tenant already" in refused["message"]
        status, page = await process.page("/metrics")
        assert status == 200
        assert 'vmnet_network_addresses_used{family="ipv4",network="cluster_udn_happy-tenant"} 2.0' in page
        # The network waits for its pods; the claim goes with its machine.
        await kube.delete(CUDNS, "happy-tenant")
        waiting = await eventually(lambda: _waits(kube))
        assert "blue/web" in waiting["message"]
        await kube.delete(VMIS, "blue", "blue")
        await kube.delete(VMS, "blue", "blue")
        await eventually(lambda: _gone(kube, CLAIMS, "blue.happy", "blue"))
        for name in ("web", "source", "target"):
            with contextlib.suppress(NotFound):
                await kube.delete(PODS, name, "blue", grace_seconds=0)
        await eventually(lambda: _gone(kube, CUDNS, "happy-tenant", None))
        await eventually(lambda: _gone(kube, NADS, "happy-tenant", "blue"))
        await eventually(lambda: _true(kube, UDNS, "second", "blue"))
        assert await process.stop() == 0


async def test_the_webhook_names_claims_and_keeps_others_from_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ("--webhook-address", url, "--webhook-url", f"https://{url}")
    async with cluster(tmp_path) as (kube, kubeconfig):
        for resource in (VMS, VMIS, VMIMS):
            await kube.create(CRDS, kubevirt_crd(resource))
        await kube.create(CUDNS, network())
        documents = yaml.safe_load_all((ROOT / "deploy" / "controller" / "webhook.yaml").read_text())
        for document, resource in zip(documents, (MUTATING_WEBHOOKS, VALIDATING_WEBHOOKS), strict=True):
            await kube.create(resource, document)
        spec = {"domain": {}, "networks": [{"name": "happy", "pod": {}}]}
        kind = {"apiVersion": VMIS.api_version, "kind": VMIS.kind}
        await eventually(lambda: kube.create(VMIS, {**kind, "metadata": {"name": "lone"}, "spec": spec}, "blue"))
        vmi = await kube.get(VMIS, "lone", "blue")
        owner = {**kind, "name": "lone", "uid": vmi["metadata"]["uid"], "controller": True}
        labels = {"kubevirt.io": "virt-launcher", names.CREATED_BY_LABEL: vmi["metadata"]["uid"]}

        async with controller(kubeconfig, "one", *options) as process:

            async def configured() -> bool:
                found = await kube.get(VALIDATING_WEBHOOKS, "vmnet-pods")
                return bool(found["webhooks"][0]["clientConfig"].get("url"))

            await eventually(configured)

            async def accepted() -> Object | None:
                try:
                    return await kube.create(PODS, pod("source", labels=labels, ownerReferences=[owner]), "blue")
                except Unavailable:
                    # The replica is about to read its certificate.
                    return None

            made = await eventually(accepted)
            assert (await process.page("/readyz"))[0] == 200
            assert made["metadata"]["annotations"][names.PRIMARY_CLAIM_ANNOTATION] == "lone.happy"
            await eventually(lambda: allocation(kube, "source"))
            forged = {names.PRIMARY_CLAIM_ANNOTATION: "victim.happy"}
            with pytest.raises(Forbidden, match="is not one of machine lone"):
                await kube.create(
                    PODS, pod("thief", labels=labels, ownerReferences=[owner], annotations=forged), "blue"
                )
            assert await process.stop() == 0
        # Nobody answers: pods of machines wait, all others do not, and those that run are changed as ever.
        with pytest.raises(Unavailable, match="failed calling webhook"):
            await kube.create(PODS, pod("target", labels=labels, ownerReferences=[owner]), "blue")
        await kube.create(PODS, pod("plain"), "blue")
        harmless = {"labels": {"kubevirt.io/nodeName": "n1"}, "annotations": {"some": "thing"}}
        for name in ("source", "plain"):
            changed = await kube.patch(PODS, name, {"metadata": harmless}, "blue")
            assert changed["metadata"]["labels"]["kubevirt.io/nodeName"] == "n1"
        bind: list[Object] = [
            {"annotations": {names.PRIMARY_CLAIM_ANNOTATION: "victim.happy"}},
            {"annotations": {names.NETWORKS_ANNOTATION: "other"}},
            {"labels": {names.CREATED_BY_LABEL: "somebody-else"}},
            {"ownerReferences": []},
        ]
        for change in bind:
            with pytest.raises(Unavailable, match="failed calling webhook"):
                await kube.patch(PODS, "source", {"metadata": change}, "blue")
        with pytest.raises(Unavailable, match="failed calling webhook"):
            await kube.patch(PODS, "plain", {"metadata": {"labels": labels}}, "blue")
        assert (await kube.get(PODS, "source", "blue"))["metadata"]["ownerReferences"] == [owner]


async def test_a_wrong_network_is_refused_by_the_api(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (kube, _):
        wrong = network()
        wrong["spec"]["network"]["layer2"]["subnets"] = ["192.168.0.0/16", "10.0.0.0/8"]
        with pytest.raises(Invalid, match=r"layer2\.subnets: two entries must be of two IP families"):
            await kube.create(CUDNS, wrong)
        made = await kube.create(CUDNS, network())
        made["spec"]["network"]["layer2"]["mtu"] = 1400
        with pytest.raises(Invalid, match="layer2: is immutable"):
            await kube.replace(CUDNS, made)


async def test_the_second_controller_leads_as_soon_as_the_first_stops(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (kube, kubeconfig), controller(kubeconfig, "one") as one:
        await eventually(lambda: _leader(kube, "one"))
        async with controller(kubeconfig, "two") as two:
            await eventually(lambda: _ready(two))
            await kube.create(CUDNS, network())
            await kube.create(PODS, pod("before"), "blue")
            before = await eventually(lambda: allocation(kube, "before"))
            assert await one.stop() == 0
            await eventually(lambda: _leader(kube, "two"))
            await kube.create(PODS, pod("after"), "blue")
            after = await eventually(lambda: allocation(kube, "after"))
            assert await two.stop() == 0
    assert before["ip_addresses"] == ["192.168.0.3/16", "fd00:10::3/64"]
    assert after["ip_addresses"] == ["192.168.0.4/16", "fd00:10::4/64"]


async def test_a_controller_that_lost_its_lease_ends(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (kube, kubeconfig), controller(kubeconfig, "one") as process:
        await eventually(lambda: _leader(kube, "one"))
        body = {"spec": {"holderIdentity": "somebody-else", "leaseDurationSeconds": 60}}
        await kube.patch(LEASES, "vmnet-controller", body, SYSTEM)
        async with asyncio.timeout(DEADLINE):
            assert await process.made.wait() == 1


async def test_without_our_definitions_the_controller_says_what_is_missing(tmp_path: Path) -> None:
    served = ("--webhook-address", "127.0.0.1:1")
    async with (
        running_server(tmp_path) as server,
        controller(server.kubeconfig(tmp_path / "kubeconfig"), "one", *served) as process,
    ):
        async with asyncio.timeout(DEADLINE):
            while "CRDs not installed" not in (page := await process.page("/readyz"))[1]:
                await asyncio.sleep(0.05)
        assert page[0] == 503
        assert "the webhook has no certificate yet" in page[1]
        for resource in (UDNS, CUDNS, NADS, CLAIMS):
            assert resource.plural in page[1]
        assert (await process.page("/livez"))[0] == 200
        assert await process.stop() == 0


async def test_networks_and_namespaces_that_come_and_go(tmp_path: Path) -> None:
    """What an administrator types, in the order in which it may come."""
    async with cluster(tmp_path) as (kube, kubeconfig), controller(kubeconfig):
        run = Kubectl(kubeconfig)
        # A pod of a labelled namespace waits for a network that does not exist, and says so.
        await run("create", "-n", "red", "-f", "-", stdin=pod("early"))
        waits = ("get", "events", "-n", "red", "--field-selector", "reason=ErrorAllocatingPod", "-o", "json")
        await eventually(lambda: run.says(waits, "labelled for a primary network, but has none yet"))
        selector = {"matchLabels": {"tenant": "shared"}}
        shared = network("shared")
        shared["spec"]["namespaceSelector"] = selector
        await run("apply", "-f", "-", stdin=shared)
        told = ("get", "cudn", "shared", "-o", "json")
        await eventually(lambda: run.says(told, "no namespace is selected yet"))
        # The selector finds a namespace when its labels change, and the pod starts.
        await run("label", "namespace", "red", "tenant=shared")
        await eventually(lambda: run.says(("get", "pod", "-n", "red", "early", "-o", "json"), "red/shared"))
        await eventually(lambda: run.says(told, "in following namespaces: [red]"))
        # A NAD that somebody deletes by hand returns, with the same number.
        nad = ("get", "net-attach-def", "-n", "red", "shared", "-o", "json")
        first = json.loads(await run(*nad))
        await run("delete", "net-attach-def", "-n", "red", "shared", "--wait=false")
        await eventually(lambda: run.differs(nad, first["metadata"]["uid"]))
        second = json.loads(await run(*nad))
        assert (second["spec"], second["metadata"]["annotations"]) == (first["spec"], first["metadata"]["annotations"])
        # A selector that is edited adds a namespace, and lets one go that pods use only when they have gone.
        selector = {"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["blue"]}]}
        shared["spec"]["namespaceSelector"] = selector
        await run("apply", "-f", "-", stdin=shared)
        await eventually(lambda: run.says(told, "kept in namespace red, where pods use it: red/early"))
        await eventually(lambda: run.says(told, "in following namespaces: [blue]"))
        await run("get", "net-attach-def", "-n", "red", "shared")
        await run("delete", "pod", "-n", "red", "early", "--grace-period=0", "--force")
        await eventually(lambda: _gone(kube, NADS, "shared", "red"))
        await eventually(lambda: run.lacks(told, "kept in namespace red"))
        # A second primary network of a namespace is refused, and has its turn when the first one goes.
        spec = {"topology": "Layer2", "layer2": {"role": "Primary", "subnets": ["10.0.0.0/24"]}}
        second = {"apiVersion": UDNS.api_version, "kind": UDNS.kind, "metadata": {"name": "second"}, "spec": spec}
        await run("apply", "-n", "blue", "-f", "-", stdin=second)
        refused = ("get", "udn", "-n", "blue", "second", "-o", "json")
        await eventually(lambda: run.says(refused, "has primary network cluster_udn_shared already"))
        # A primary network does not come to a namespace without the label.
        await run("create", "namespace", "plain")
        await run("apply", "-n", "plain", "-f", "-", stdin=second)
        lacking = ("get", "udn", "-n", "plain", "second", "-o", "json")
        await eventually(lambda: run.says(lacking, f"lacks the label {names.PRIMARY_NETWORK_LABEL}"))
        # In use it stays, and names the pods, also those that came after; then it goes.
        await run("create", "-n", "blue", "-f", "-", stdin=pod("one"))
        await eventually(lambda: run.says(("get", "pod", "-n", "blue", "one", "-o", "json"), "blue/shared"))
        await run("delete", "cudn", "shared", "--wait=false")
        await eventually(lambda: run.says(told, "cannot be deleted while pods use it: blue/one"))
        await run("create", "-n", "blue", "-f", "-", stdin=pod("two"))
        await eventually(lambda: run.says(told, "cannot be deleted while pods use it: blue/one, blue/two"))
        await run("delete", "pod", "-n", "blue", "one", "--grace-period=0", "--force")
        await eventually(lambda: run.says(told, "cannot be deleted while pods use it: blue/two"))
        await run("delete", "pod", "-n", "blue", "two", "--grace-period=0", "--force")
        await run("wait", "--for=delete", "cudn/shared", "--timeout=40s")
        await eventually(lambda: run.says(refused, "NetworkAttachmentDefinition has been created"))


async def test_secondary_networks_by_kubectl(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (kube, kubeconfig), controller(kubeconfig):
        run = Kubectl(kubeconfig)
        spec = {"topology": "Layer2", "layer2": {"role": "Secondary", "subnets": ["10.30.0.0/24"]}}
        storage = {"apiVersion": UDNS.api_version, "kind": UDNS.kind, "metadata": {"name": "storage"}, "spec": spec}
        await run("create", "namespace", "plain")
        await run("apply", "-n", "plain", "-f", "-", stdin=storage)
        asks = {names.NETWORKS_ANNOTATION: json.dumps([{"name": "storage", "ips": ["10.30.0.9/24"]}])}
        await run("create", "-n", "plain", "-f", "-", stdin=pod("web", annotations=asks))
        shown = ("get", "pod", "-n", "plain", "web", "-o", "json")
        await eventually(lambda: run.says(shown, "plain/storage"))
        await run("create", "-n", "plain", "-f", "-", stdin=pod("other", annotations=asks))
        events = ("get", "events", "-n", "plain", "-o", "json")
        await eventually(lambda: run.says(events, "10.30.0.9 is in use by pod plain/web"))
        await run("delete", "udn", "-n", "plain", "storage", "--wait=false")
        told = ("get", "udn", "-n", "plain", "storage", "-o", "json")
        await eventually(lambda: run.says(told, "cannot be deleted while pods use it: plain/web"))
        await run("delete", "pod", "-n", "plain", "web", "other", "--grace-period=0", "--force")
        await eventually(lambda: _gone(kube, UDNS, "storage", "plain"))
        await eventually(lambda: _gone(kube, NADS, "storage", "plain"))


class Kubectl:
    """The unmodified program."""

    def __init__(self, kubeconfig: Path) -> None:
        self._environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}

    async def __call__(self, *words: str, stdin: Object | None = None) -> str:
        process = await asyncio.create_subprocess_exec(
            str(find_kubectl()),
            *words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
        )
        async with asyncio.timeout(DEADLINE):
            output, errors = await process.communicate(json.dumps(stdin).encode() if stdin else b"")
        assert process.returncode == 0, f"kubectl {' '.join(words)}: {errors.decode()}"
        return output.decode()

    async def says(self, words: tuple[str, ...], text: str) -> bool:
        return text in await self(*words)

    async def lacks(self, words: tuple[str, ...], text: str) -> bool:
        return text not in await self(*words)

    async def differs(self, words: tuple[str, ...], uid: str) -> bool:
        try:
            return str(json.loads(await self(*words))["metadata"]["uid"]) != uid
        except AssertionError:
            return False


async def _ready(process: Process) -> bool:
    return (await process.page("/readyz"))[0] == 200


async def _leader(kube: Kube, name: str) -> bool:
    lease = await kube.get(LEASES, "vmnet-controller", SYSTEM)
    return str(lease["spec"].get("holderIdentity") or "").startswith(f"{name}_")


async def _condition(kube: Kube, resource: Resource, name: str, namespace: str | None, kind: str) -> Object | None:
    return condition(await kube.get(resource, name, namespace), kind)


async def _true(kube: Kube, resource: Resource, name: str, namespace: str) -> bool:
    found = await _condition(kube, resource, name, namespace, "NetworkReady")
    return found is not None and found["status"] == "True"


async def _waits(kube: Kube) -> Object | None:
    found = await _condition(kube, CUDNS, "happy-tenant", None, "NetworkReady")
    return found if found is not None and "while pods use it" in found["message"] else None


async def _filled(kube: Kube, name: str) -> Object | None:
    found = await kube.get(CLAIMS, name, "blue")
    return found if (found.get("status") or {}).get("ips") else None


async def _gone(kube: Kube, resource: Resource, name: str, namespace: str | None) -> bool:
    try:
        await kube.get(resource, name, namespace)
    except NotFound:
        return True
    return False
