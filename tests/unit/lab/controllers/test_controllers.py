"""All stand-ins against the embedded API, with unmodified kubectl; the test plays the kubelets."""

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest

from vmnet.kube.api import (
    ENDPOINT_SLICES,
    NAMESPACES,
    NODES,
    PODS,
    SERVICES,
    Kube,
    KubeError,
    NotFound,
    Object,
    PatchType,
)
from vmnet.kube.client import KubeClient
from vmnet.kube.codec import encode_time
from vmnet.kube.watch import ListWatch
from vmnet.lab.apiserver.testing import Kubectl, running_server
from vmnet.lab.controllers.cluster import REPLICA_SETS, SERVICE_ACCOUNTS
from vmnet.lab.controllers.controllers import Controllers

NAMESPACE = "work"
PATIENCE = 30.0
KUBECTL = shutil.which("kubectl") or str(Path(sys.executable).parent / "kubectl")


class Kubelets:
    """Makes placed pods ready (unless held) and lets deleted ones go."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._watch = ListWatch(kube, PODS)
        self._watch.add_handler(lambda old, new: self._queue.put_nowait(new) if new else None)
        self._queue: asyncio.Queue[Object] = asyncio.Queue()
        self._number = 0
        self.held: Callable[[Object], bool] = lambda _pod: False

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch.run())
            while True:
                try:
                    await self._play(await self._queue.get())
                except KubeError:
                    continue

    async def _play(self, pod: Object) -> None:
        metadata = pod["metadata"]
        if not pod["spec"].get("nodeName") or self.held(pod):
            return
        if "deletionTimestamp" in metadata:
            await self._kube.delete(PODS, metadata["name"], metadata["namespace"], uid=metadata["uid"], grace_seconds=0)
        elif "podIP" not in (pod.get("status") or {}):
            self._number += 1
            await self._kube.patch(
                PODS,
                metadata["name"],
                {
                    "status": {
                        "phase": "Running",
                        "podIP": f"10.244.0.{self._number}",
                        "podIPs": [{"ip": f"10.244.0.{self._number}"}, {"ip": f"fd00::{self._number}"}],
                        "conditions": [
                            {"type": "Ready", "status": "True", "lastTransitionTime": encode_time(datetime.now(UTC))}
                        ],
                    }
                },
                metadata["namespace"],
                type=PatchType.STRATEGIC,
                subresource="status",
            )


POOLS = ((IPv4Address("192.0.2.100"), IPv4Address("192.0.2.101")), (IPv6Address("2001:db8::100"),))


@dataclass
class Cluster:
    kube: Kube
    kubectl: Kubectl
    kubelets: Kubelets
    controllers: Controllers
    nodes: list[str] = field(default_factory=list)

    async def apply(self, *objects: Object) -> None:
        for item in objects:
            await self.kubectl.check("apply", "-n", NAMESPACE, "-f", "-", stdin=json.dumps(item))

    async def pods(self) -> dict[str, Object]:
        listed = await self.kube.list(PODS, NAMESPACE)
        return {item["metadata"]["name"]: item for item in listed.items}

    async def until(self, what: Callable[[], Any]) -> Any:
        """The first true result of an async function. Raises TimeoutError."""
        async with asyncio.timeout(PATIENCE):
            while True:
                found = await what()
                if found:
                    return found
                await asyncio.sleep(0.02)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with _cluster(tmp_path) as found:
        yield found


@asynccontextmanager
async def _cluster(directory: Path) -> AsyncIterator[Cluster]:
    async with running_server(directory, service_ranges=("10.96.0.0/16", "fd00:10:96::/112")) as server:
        kubectl = Kubectl(server, directory, KUBECTL)
        kubectl.environment()
        kube = await KubeClient.connect(directory / "kubeconfig", user_agent="test")
        try:
            for name in ("n1", "n2", "n3"):
                await kube.create(NODES, _node(name))
            await kube.create(NAMESPACES, {"metadata": {"name": NAMESPACE}})
            controllers, kubelets = Controllers(kube, POOLS), Kubelets(kube)
            tasks = [asyncio.ensure_future(controllers.run()), asyncio.ensure_future(kubelets.run())]
            try:
                async with asyncio.timeout(PATIENCE):
                    await controllers.ready.wait()
                yield Cluster(kube, kubectl, kubelets, controllers)
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(item, asyncio.CancelledError) for item in results), results
        finally:
            await kube.close()


def _node(name: str) -> Object:
    number = name.removeprefix("n")
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {
            "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"},
            "addresses": [
                {"type": "InternalIP", "address": f"192.0.2.{number}"},
                {"type": "InternalIP", "address": f"2001:db8::{number}"},
            ],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def _template(image: str = "c:1", **spec: Any) -> Object:
    container = {"name": "c", "image": image, "ports": [{"name": "http", "containerPort": 8080}]}
    return {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [container], **spec}}


def _workload(kind: str, name: str, replicas: int, **more: Any) -> Object:
    template = more.pop("template", None) or _template()
    spec = {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": template, **more}
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def _pod(name: str, **spec: Any) -> Object:
    template = _template(**spec)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, **template["metadata"]},
        "spec": template["spec"],
    }


async def test_default_service_account_in_every_namespace(cluster: Cluster) -> None:
    async def account() -> Object | None:
        try:
            return await cluster.kube.get(SERVICE_ACCOUNTS, "default", NAMESPACE)
        except NotFound:
            return None

    first = await cluster.until(account)
    await cluster.kube.delete(SERVICE_ACCOUNTS, "default", NAMESPACE)

    async def again() -> bool:
        found = await account()
        return found is not None and found["metadata"]["uid"] != first["metadata"]["uid"]

    assert await cluster.until(again)


async def test_deployment_rolls_out_scales_rolls_back_and_goes(cluster: Cluster) -> None:
    kubectl = cluster.kubectl
    await cluster.apply(_workload("Deployment", "web", 3))
    out = await kubectl.check("rollout", "status", "deployment/web", "-n", NAMESPACE, "--timeout=30s")
    assert 'deployment "web" successfully rolled out' in out
    pods = await cluster.pods()
    assert len(pods) == 3
    # The stand-in spreads pods: three nodes, three pods.
    assert {pod["spec"]["nodeName"] for pod in pods.values()} == {"n1", "n2", "n3"}

    await kubectl.check("set", "image", "deployment/web", "c=c:2", "-n", NAMESPACE)
    await kubectl.check("rollout", "status", "deployment/web", "-n", NAMESPACE, "--timeout=30s")

    async def images() -> list[str]:
        return sorted(pod["spec"]["containers"][0]["image"] for pod in (await cluster.pods()).values())

    async def new_only() -> bool:
        return await images() == ["c:2"] * 3

    assert await cluster.until(new_only)
    history = await kubectl.check("rollout", "history", "deployment/web", "-n", NAMESPACE)
    assert [line.split()[0] for line in history.splitlines() if line[:1].isdigit()] == ["1", "2"]

    await kubectl.check("rollout", "undo", "deployment/web", "-n", NAMESPACE)
    await kubectl.check("rollout", "status", "deployment/web", "-n", NAMESPACE, "--timeout=30s")

    async def old_again() -> bool:
        return await images() == ["c:1"] * 3

    assert await cluster.until(old_again)

    await kubectl.check("scale", "deployment/web", "--replicas=1", "-n", NAMESPACE)

    async def one() -> bool:
        return len(await cluster.pods()) == 1

    assert await cluster.until(one)
    await kubectl.check("delete", "deployment/web", "-n", NAMESPACE)

    async def nothing() -> bool:
        return not await cluster.pods() and not (await cluster.kube.list(REPLICA_SETS, NAMESPACE)).items

    assert await cluster.until(nothing)


async def test_stateful_set_in_order_and_updated_from_the_end(cluster: Cluster) -> None:
    seen: list[str] = []
    cluster.controllers.informers[PODS].add_handler(
        lambda old, new: seen.append(f"+{new['metadata']['name']}") if new is not None and old is None else None
    )
    cluster.controllers.informers[PODS].add_handler(
        lambda old, new: seen.append(f"-{old['metadata']['name']}") if old is not None and new is None else None
    )
    cluster.kubelets.held = lambda pod: pod["metadata"]["name"] == "db-1" and "db-2" not in seen and held
    held = True
    await cluster.apply(_workload("StatefulSet", "db", 3, serviceName="db"))

    async def two() -> bool:
        return set(await cluster.pods()) == {"db-0", "db-1"}

    assert await cluster.until(two)
    pods = await cluster.pods()
    labels = pods["db-1"]["metadata"]["labels"]
    assert (labels["apps.kubernetes.io/pod-index"], labels["statefulset.kubernetes.io/pod-name"]) == ("1", "db-1")
    assert (pods["db-1"]["spec"]["hostname"], pods["db-1"]["spec"]["subdomain"]) == ("db-1", "db")

    held = False
    await cluster.kube.patch(PODS, "db-1", {"metadata": {"annotations": {"go": "on"}}}, NAMESPACE)
    await cluster.kubectl.check("rollout", "status", "statefulset/db", "-n", NAMESPACE, "--timeout=30s")
    assert seen == ["+db-0", "+db-1", "+db-2"]

    seen.clear()
    await cluster.kubectl.check("set", "image", "statefulset/db", "c=c:2", "-n", NAMESPACE)
    await cluster.kubectl.check("rollout", "status", "statefulset/db", "-n", NAMESPACE, "--timeout=30s")
    assert seen == ["-db-2", "+db-2", "-db-1", "+db-1", "-db-0", "+db-0"]

    seen.clear()
    await cluster.kubectl.check("scale", "statefulset/db", "--replicas=1", "-n", NAMESPACE)

    async def one() -> bool:
        return set(await cluster.pods()) == {"db-0"}

    assert await cluster.until(one)
    assert seen == ["-db-2", "-db-1"]


async def test_pod_without_a_node_waits_says_why_and_recovers(cluster: Cluster) -> None:
    for name in ("n1", "n2", "n3"):
        await cluster.kubectl.check("cordon", name)
    await cluster.apply(_pod("waiting"))

    async def refused() -> Object | None:
        pod = (await cluster.pods())["waiting"]
        conditions = (pod.get("status") or {}).get("conditions") or ()
        return next((item for item in conditions if item["type"] == "PodScheduled"), None)

    condition = await cluster.until(refused)
    assert (condition["status"], condition["reason"]) == ("False", "Unschedulable")
    assert condition["message"] == "0/3 nodes are available: 3 node(s) were unschedulable."

    async def told() -> bool:
        return "FailedScheduling" in await cluster.kubectl.check("events", "-n", NAMESPACE)

    assert await cluster.until(told)
    await cluster.kubectl.check("uncordon", "n2")

    async def placed() -> str | None:
        return (await cluster.pods())["waiting"]["spec"].get("nodeName")

    assert await cluster.until(placed) == "n2"


async def test_anti_affinity_keeps_pods_apart_until_one_goes(cluster: Cluster) -> None:
    term = {"labelSelector": {"matchLabels": {"app": "web"}}, "topologyKey": "kubernetes.io/hostname"}
    apart = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    await cluster.apply(*(_pod(f"p{number}", affinity=apart) for number in range(4)))

    async def places() -> dict[str, str]:
        pods = await cluster.pods()
        return {name: pod["spec"]["nodeName"] for name, pod in pods.items() if pod["spec"].get("nodeName")}

    async def three() -> dict[str, str] | None:
        found = await places()
        return found if len(found) == 3 else None

    found = await cluster.until(three)
    assert set(found.values()) == {"n1", "n2", "n3"}
    first = next(iter(found))
    await cluster.kubectl.check("delete", "pod", first, "-n", NAMESPACE)
    again = await cluster.until(three)
    assert set(again) == {f"p{number}" for number in range(4)} - {first}
    assert set(again.values()) == {"n1", "n2", "n3"}


async def test_endpoint_slices_follow_pods_in_both_families(cluster: Cluster) -> None:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "labels": {"team": "a"}},
        "spec": {
            "selector": {"app": "web"},
            "ipFamilyPolicy": "PreferDualStack",
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }
    await cluster.apply(service, _workload("Deployment", "web", 2))

    async def full() -> dict[str, Object] | None:
        listed = await cluster.kube.list(ENDPOINT_SLICES, NAMESPACE, labels="kubernetes.io/service-name=web")
        found = {item["addressType"]: item for item in listed.items}
        ready = [len([end for end in item["endpoints"] or () if end["conditions"]["ready"]]) for item in found.values()]
        return found if ready == [2, 2] else None

    found = await cluster.until(full)
    assert set(found) == {"IPv4", "IPv6"}
    assert found["IPv4"]["ports"] == [{"name": "http", "protocol": "TCP", "port": 8080}]
    assert found["IPv6"]["metadata"]["labels"]["team"] == "a"
    assert found["IPv6"]["endpoints"][0]["addresses"][0].startswith("fd00::")

    # A deleted pod stays listed as terminating until it is gone.
    cluster.kubelets.held = lambda pod: "deletionTimestamp" in pod["metadata"]
    await cluster.kubectl.check("scale", "deployment/web", "--replicas=1", "-n", NAMESPACE)

    async def leaving() -> list[Object]:
        item = next(
            item
            for item in (await cluster.kube.list(ENDPOINT_SLICES, NAMESPACE)).items
            if item["addressType"] == "IPv4"
        )
        return [end["conditions"] for end in item["endpoints"] if end["conditions"]["terminating"]]

    assert await cluster.until(leaving) == [{"ready": False, "serving": True, "terminating": True}]
    await cluster.kubectl.check("delete", "service", "web", "-n", NAMESPACE)

    async def gone() -> bool:
        return not (await cluster.kube.list(ENDPOINT_SLICES, NAMESPACE)).items

    assert await cluster.until(gone)


async def test_load_balancers_get_addresses_of_their_families_that_nobody_else_has(cluster: Cluster) -> None:
    spec = {"type": "LoadBalancer", "selector": {"app": "web"}, "ports": [{"port": 80}]}
    families = {"a": ["IPv4"], "b": ["IPv4"], "c": ["IPv6", "IPv4"]}
    for name, given in families.items():
        policy = {"ipFamilies": given, "ipFamilyPolicy": "PreferDualStack" if len(given) > 1 else "SingleStack"}
        body = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {**spec, **policy}}
        await cluster.apply(body)

    async def ingress(name: str) -> list[str]:
        service = await cluster.kube.get(SERVICES, name, NAMESPACE)
        found = (service["status"].get("loadBalancer") or {}).get("ingress") or ()
        return [item["ip"] for item in found]

    given_to = {name: await cluster.until(lambda name=name: ingress(name)) for name in families}
    assert sorted([*given_to["a"], *given_to["b"]]) == ["192.0.2.100", "192.0.2.101"]
    # The IPv4 pool is exhausted: what is left is given.
    assert given_to["c"] == ["2001:db8::100"]
    before = given_to["b"]
    await cluster.kube.patch(SERVICES, "a", {"spec": {"type": "ClusterIP"}}, NAMESPACE)

    async def none() -> bool:
        return not await ingress("a")

    assert await cluster.until(none)
    await cluster.kube.patch(SERVICES, "b", {"metadata": {"labels": {"look": "again"}}}, NAMESPACE)
    await cluster.kube.patch(SERVICES, "c", {"metadata": {"labels": {"look": "again"}}}, NAMESPACE)

    async def both() -> bool:
        return await ingress("c") == ["2001:db8::100", *given_to["a"]]

    assert await cluster.until(both)
    assert await ingress("b") == before


async def test_settles(cluster: Cluster) -> None:
    """Nothing is written once everything is as it should be."""
    await cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]},
        },
        _workload("Deployment", "web", 2),
    )
    await cluster.kubectl.check("rollout", "status", "deployment/web", "-n", NAMESPACE, "--timeout=30s")

    async def calm() -> bool:
        return all(queue.idle for queue in cluster.controllers.queues.values())

    await cluster.until(calm)
    version = (await cluster.kube.list(PODS, NAMESPACE)).resource_version
    for kind, queue in cluster.controllers.queues.items():
        if kind in ("service", "deployment"):
            queue.add(f"{NAMESPACE}/web")
    await cluster.until(calm)
    assert (await cluster.kube.list(PODS, NAMESPACE)).resource_version == version
