"""The lab's kubelet on a real node of a lab: real namespaces, Debian's CNI plugins, an API in memory.

Each scenario runs inside the node's namespaces: pytest brings a lab up and executes this very file there.
"""

# Files and processes have no events to wait for, and nothing else runs in these loops.
# ruff: noqa: ASYNC240

import asyncio
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from vmnet.kube.api import EVENTS, PODS, Object, PatchType, Resource
from vmnet.kube.events import Recorder
from vmnet.kube.fake import FakeKube
from vmnet.kube.watch import ListWatch
from vmnet.lab import cgroups
from vmnet.lab.kubelet.__main__ import Kubelet
from vmnet.lab.kubelet.network import Network
from vmnet.lab.kubelet.pods import Node, SandboxRecord
from vmnet.lab.kubelet.server import KubeletServer
from vmnet.lab.lab import Lab
from vmnet.runtime.tasks import TaskScope

NAMESPACE = "default"
FINALIZER = "test/holds"
AGNHOST = "registry.k8s.io/e2e-test-images/agnhost:2.53"


REFUSING_PLUGIN = f"""#!{sys.executable}
import json, os, pathlib, sys
command = os.environ["CNI_COMMAND"]
with open("/run/calls", "a") as calls:
    print(command, file=calls)
body = json.load(sys.stdin)
pathlib.Path("/run/config-" + command).write_text(json.dumps(body))
if command == "ADD":
    if os.path.exists("/run/refuse"):
        print(json.dumps({{"code": 11, "msg": "no allocation yet"}}))
        sys.exit(1)
    result = body["prevResult"]
    result["dns"] = {{"domain": "changed.test"}}
    print(json.dumps(result))
"""


class Kube(FakeKube):
    """The API in memory, with the one strategic merge that kubelet relies on: conditions by their type."""

    async def patch(
        self, resource: Resource, name: str, body: object, namespace: str | None = None, **options: Any
    ) -> Object:
        if resource == PODS and options.get("type") is PatchType.STRATEGIC and isinstance(body, dict):
            before = (self.peek(PODS, name, namespace) or {}).get("status") or {}
            merged = {item["type"]: item for item in before.get("conditions") or []}
            merged |= {item["type"]: item for item in body["status"].get("conditions") or []}
            body = {**body, "status": {**body["status"], "conditions": list(merged.values())}}
        return await super().patch(resource, name, body, namespace, **options)


class World:
    """One node, its kubelet, and the API that both see."""

    def __init__(self) -> None:
        self.kube = Kube()
        pods = Path(os.environ["VMNET_LAB_DIR"]) / "pods"
        recorder = Recorder(self.kube, "kubelet", host="n1")
        self.node = Node("n1", ("172.30.0.11", "fd00:30::11"), self.kube, recorder, Network(), pods, ("172.30.0.100",))
        self.kubelet: Kubelet | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Kubelet]:
        informer = ListWatch(self.kube, PODS, fields="spec.nodeName=n1")
        kubelet = Kubelet(self.node, informer)
        async with TaskScope() as scope:
            scope.service(informer.run(), "watch")
            scope.service(kubelet.run(), "kubelet")
            yield kubelet

    async def create(self, name: str, container: Object, **spec: Any) -> str:
        """Make a pod with one container; its uid. A finalizer keeps the object, so that deletion is graceful."""
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE, "finalizers": [FINALIZER]},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "any", **container}], **spec},
        }
        return str((await self.kube.create(PODS, body, NAMESPACE))["metadata"]["uid"])

    async def until(self, name: str, condition: Callable[[Object], object], seconds: float = 20) -> Object:
        pod: Object | None = None
        try:
            async with asyncio.timeout(seconds):
                while True:
                    pod = self.kube.peek(PODS, name, NAMESPACE)
                    if pod is not None and condition(pod):
                        return pod
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"pod {name} is {json.dumps(pod, indent=1)}") from None

    async def until_clean(self, seconds: float = 20) -> None:
        """No pod directory, no namespace, no cached result, no address is left."""
        places = [self.node.pods, Path("/run/netns"), Path("/var/lib/cni/results")]
        left: list[str] = []
        try:
            async with asyncio.timeout(seconds):
                while True:
                    left = [str(path) for place in places if place.exists() for path in place.iterdir()]
                    left += [str(path) for path in Path("/var/lib/cni/networks/lab-default").glob("10.*")]
                    if not left:
                        return
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"left: {left}") from None

    async def delete(self, name: str, grace: int = 5) -> None:
        await self.kube.delete(PODS, name, NAMESPACE, grace_seconds=grace)

    def events(self, name: str) -> list[tuple[str, str]]:
        found = [item for item in self.kube._of(EVENTS).values() if item["involvedObject"]["name"] == name]
        return [(item["reason"], item["message"]) for item in found]


def condition(pod: Object, kind: str) -> str | None:
    found = {item["type"]: item["status"] for item in (pod.get("status") or {}).get("conditions") or []}
    return found.get(kind)


def ready(pod: Object) -> bool:
    return condition(pod, "Ready") == "True"


def container(pod: Object) -> Object:
    statuses = (pod.get("status") or {}).get("containerStatuses") or [{}]
    return dict(statuses[0])


def phase(pod: Object) -> str | None:
    found = (pod.get("status") or {}).get("phase")
    return None if found is None else str(found)


async def a_pod_lives_and_goes(world: World) -> None:
    probe = {"httpGet": {"port": "http", "path": "/hostname"}, "periodSeconds": 1}
    uid = await world.create(
        "web",
        {
            "image": AGNHOST,
            "args": ["netexec"],
            "ports": [{"name": "http", "containerPort": 8080}],
            "readinessProbe": probe,
        },
    )
    async with world.running():
        pod = await world.until("web", ready)
        status = pod["status"]
        assert status["phase"] == "Running"
        assert status["podIP"].startswith("10.244.1.")
        assert [item["ip"].rpartition(":")[0] for item in status["podIPs"]] == ["", "fd00:10:244:1:"]
        assert status["hostIPs"] == [{"ip": "172.30.0.11"}, {"ip": "fd00:30::11"}]
        assert container(pod)["imageID"].startswith(f"{AGNHOST}@sha256:")
        assert container(pod)["started"] is True
        async with aiohttp.ClientSession() as session, session.get(f"http://{status['podIP']}:8080/hostname") as answer:
            assert await answer.text() == "web"
        assert ("Started", "Started container c") in world.events("web")
        await world.delete("web")
        await world.until("web", lambda pod: phase(pod) in ("Succeeded", "Failed"))
        await world.until_clean()
        assert container(world.kube.peek(PODS, "web", NAMESPACE) or {})["state"]["terminated"]["exitCode"] == 0
    assert not (world.node.pods / uid).exists()


async def a_finished_pod_keeps_its_status_and_loses_its_network(world: World) -> None:
    command = ["sh", "-c", "hostname; cat /etc/resolv.conf; echo $WHERE $(A) $MINE; echo $$; exit 3"]
    env = [
        {"name": "WHERE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "A", "value": "b"},
        {"name": "MINE", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]
    uid = await world.create("job", {"command": command, "env": env}, restartPolicy="Never", hostname="worker")
    async with world.running():
        pod = await world.until("job", lambda pod: phase(pod) == "Failed")
        assert container(pod)["state"]["terminated"]["exitCode"] == 3
        async with asyncio.timeout(10):
            while os.listdir("/run/netns"):
                await asyncio.sleep(0.02)
        log = (world.node.pods / uid / "c.log").read_text().splitlines()
        assert log[0] == "worker"
        assert "nameserver 172.30.0.100" in log
        assert f"n1 b {pod['status']['podIP']}" in log
        assert container(world.kube.peek(PODS, "job", NAMESPACE) or {})["restartCount"] == 0
        await world.delete("job")
        await world.until_clean()
        assert phase(world.kube.peek(PODS, "job", NAMESPACE) or {}) == "Failed"


async def a_crashing_container_is_restarted_ever_later(world: World) -> None:
    await world.create("crash", {"command": ["sh", "-c", "exit 1"]})
    await world.create("worker", {"command": ["sh", "-c", "exit 0"]}, restartPolicy="OnFailure")
    async with world.running():
        pod = await world.until("crash", lambda pod: container(pod).get("restartCount", 0) >= 2)
        assert phase(pod) == "Running"
        assert container(pod)["lastState"]["terminated"]["exitCode"] == 1
        assert "BackOff" in [reason for reason, _ in world.events("crash")]
        pod = await world.until("worker", lambda pod: phase(pod) == "Succeeded")
        assert container(pod)["restartCount"] == 0
        for name in ("crash", "worker"):
            await world.delete(name)
        await world.until_clean()


async def init_containers_come_first(world: World) -> None:
    inits = [
        {"name": "one", "image": "any", "command": ["sh", "-c", "sleep 0.3; echo one >> $VMNET_LAB_POD_DIR/order"]},
        {"name": "two", "image": "any", "command": ["sh", "-c", "echo two >> $VMNET_LAB_POD_DIR/order"]},
    ]
    main = {"command": ["sh", "-c", "echo main >> $VMNET_LAB_POD_DIR/order; exec sleep 100"]}
    uid = await world.create("ordered", main, initContainers=inits)
    async with world.running():
        pod = await world.until("ordered", ready)
        async with asyncio.timeout(10):
            while (world.node.pods / uid / "order").read_text().split() != ["one", "two", "main"]:
                await asyncio.sleep(0.02)
        assert [item["ready"] for item in pod["status"]["initContainerStatuses"]] == [True, True]
        await world.delete("ordered", grace=0)
        await world.until_clean()


async def probes_decide(world: World) -> None:
    marker = Path(os.environ["VMNET_LAB_DIR"]) / "marker"
    readiness = {"exec": {"command": ["test", "-e", str(marker)]}, "periodSeconds": 1, "failureThreshold": 1}
    await world.create("gated", {"command": ["sleep", "100"], "readinessProbe": readiness})
    liveness = {"tcpSocket": {"port": 9}, "periodSeconds": 1, "failureThreshold": 1}
    await world.create("dying", {"command": ["sleep", "100"], "livenessProbe": liveness})
    async with world.running():
        pod = await world.until("gated", lambda pod: container(pod).get("started"))
        assert not ready(pod)
        marker.touch()
        await world.until("gated", ready)
        marker.unlink()
        await world.until("gated", lambda pod: not ready(pod))
        await world.until("dying", lambda pod: container(pod).get("restartCount", 0) >= 1)
        assert any(reason == "Unhealthy" and "Liveness" in text for reason, text in world.events("dying"))
        for name in ("gated", "dying"):
            await world.delete(name)
        await world.until_clean()


async def readiness_gates_are_waited_for(world: World) -> None:
    gate = "kubevirt.io/virtual-machine-unpaused"
    await world.create("vm", {"command": ["sleep", "100"]}, readinessGates=[{"conditionType": gate}])
    async with world.running():
        pod = await world.until("vm", lambda pod: condition(pod, "ContainersReady") == "True")
        assert not ready(pod)
        conditions = [*pod["status"]["conditions"], {"type": gate, "status": "True"}]
        await world.kube.patch(PODS, "vm", {"status": {"conditions": conditions}}, NAMESPACE, subresource="status")
        await world.until("vm", ready)
        await world.delete("vm")
        await world.until_clean()


async def a_refusing_plugin_is_told_and_tried_again(world: World) -> None:
    configuration = Path("/etc/cni/net.d/10-lab.conflist")
    good = configuration.read_text()
    body = json.loads(good)
    body["plugins"].append({"type": "refuses"})
    refuses = Path("/opt/cni/bin/refuses")
    # Notes every call; refuses ADD for as long as a file is there.
    refuses.write_text(REFUSING_PLUGIN)
    refuses.chmod(0o755)
    Path("/run/refuse").touch()
    configuration.write_text(json.dumps(body))
    await world.create("late", {"command": ["sleep", "100"]})
    async with world.running():
        async with asyncio.timeout(20):
            while not any(reason == "FailedCreatePodSandBox" for reason, _ in world.events("late")):
                await asyncio.sleep(0.02)
        (message,) = {text for reason, text in world.events("late") if reason == "FailedCreatePodSandBox"}
        assert "no allocation yet" in message
        assert "refuses" in message
        Path("/run/refuse").unlink()
        pod = await world.until("late", ready)
        assert pod["status"]["podIP"].startswith("10.244.1.")
        assert json.loads(Path("/run/config-ADD").read_text())["prevResult"]["interfaces"][0]["name"] == "cni0"
        (uid,) = [path.name for path in world.node.pods.iterdir()]
        record = SandboxRecord.read(world.node.pods / uid)
        assert record is not None
        await world.node.network.check(record.attachment)
        assert Path("/run/calls").read_text().split()[-1] == "CHECK"
        await world.delete("late")
        await world.until_clean()
    calls = Path("/run/calls").read_text().split()
    assert calls[:2] == ["ADD", "DEL"]
    assert calls[-1] == "DEL"
    assert json.loads(Path("/run/config-DEL").read_text())["prevResult"]["dns"] == {"domain": "changed.test"}


async def a_restarted_kubelet_adopts(world: World) -> None:
    uid = await world.create("stays", {"command": ["sleep", "1000"]})
    gone = await world.create("goes", {"command": ["sleep", "1000"]})
    async with world.running() as kubelet:
        for name in ("stays", "goes"):
            await world.until(name, ready)
        worker = kubelet.worker(NAMESPACE, "stays")
        assert worker is not None
        assert worker.sandbox is not None
        before = (worker.sandbox.pid, dict(worker.sandbox.containers))
    # While no kubelet runs, one pod vanishes from the API.
    await world.kube.patch(PODS, "goes", {"metadata": {"finalizers": None}}, NAMESPACE)
    world.kube.vanish(PODS, "goes", NAMESPACE)
    assert Path(f"/proc/{before[0]}").exists()
    async with world.running() as kubelet:
        async with asyncio.timeout(20):
            while (
                (world.node.pods / gone).exists()
                or (worker := kubelet.worker(NAMESPACE, "stays")) is None
                or worker.sandbox is None
            ):
                await asyncio.sleep(0.02)
        assert (worker.sandbox.pid, worker.sandbox.containers) == before
        pod = await world.until("stays", ready)
        assert container(pod)["restartCount"] == 0
        assert len(os.listdir("/run/netns")) == 1
        # A pod whose PID 1 is killed gets a new sandbox.
        os.kill(before[0], signal.SIGKILL)
        await world.until("stays", lambda pod: ready(pod) and container(pod)["restartCount"] == 1)
        await world.delete("stays")
        await world.until_clean()
    assert not (world.node.pods / uid).exists()


async def grace_is_kept_and_can_be_cut_short(world: World) -> None:
    stubborn = {"command": ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"]}
    uid = await world.create("stubborn", stubborn)
    async with world.running():
        await world.until("stubborn", ready)
        log = world.node.pods / uid / "c.log"
        async with asyncio.timeout(10):
            while "up" not in log.read_text():
                await asyncio.sleep(0.02)
        started = asyncio.get_running_loop().time()
        await world.delete("stubborn", grace=1)
        await world.until_clean()
        assert asyncio.get_running_loop().time() - started >= 0.9
        pod = world.kube.peek(PODS, "stubborn", NAMESPACE)
        assert pod is not None
        assert container(pod)["state"]["terminated"]["exitCode"] == 137
        await world.create("forced", stubborn)
        await world.until("forced", ready)
        await world.delete("forced", grace=600)
        async with asyncio.timeout(10):
            while not any(reason == "Killing" for reason, _ in world.events("forced")):
                await asyncio.sleep(0.02)
        # ``kubectl delete --force --grace-period=0``: the object is gone at once.
        await world.kube.patch(PODS, "forced", {"metadata": {"finalizers": None}}, NAMESPACE)
        await world.until_clean()


async def logs_and_exec_are_served(world: World) -> None:
    await world.create(
        "shell", {"command": ["sh", "-c", "echo one; echo two; exec sleep 1000"], "env": [{"name": "X", "value": "y"}]}
    )
    base = f"http://127.0.0.1:18250/api/v1/namespaces/{NAMESPACE}/pods/shell"
    async with world.running() as kubelet:
        await world.until("shell", ready)
        runner = web.AppRunner(KubeletServer(kubelet.worker, "secret").application(), handle_signals=False)
        await runner.setup()
        await asyncio.create_subprocess_exec("ip", "link", "set", "lo", "up")
        await web.TCPSite(runner, "127.0.0.1", 18250).start()
        headers = {"Authorization": "Bearer secret"}
        async with aiohttp.ClientSession(headers=headers) as session:
            async with session.get(f"{base}/log", headers={"Authorization": "Bearer wrong"}) as answer:
                assert answer.status == 401
            async with session.get(f"{base}/log") as answer:
                assert await answer.text() == "one\ntwo\n"
            async with session.get(f"{base}/log", params={"tailLines": "1"}) as answer:
                assert await answer.text() == "two\n"
            words = ["sh", "-c", "read line; echo got $line $X; echo err >&2; hostname; exit 5"]
            query = [*(("command", word) for word in words), ("stdin", "true"), ("stdout", "true"), ("stderr", "true")]
            output, status = await execute(session, f"{base}/exec", query, b"hello\n")
            assert output == {1: b"got hello y\nshell\n", 2: b"err\n"}
            assert status["details"]["causes"] == [{"reason": "ExitCode", "message": "5"}]
            query = [("command", "cat"), ("stdin", "true"), ("stdout", "true"), ("stderr", "true")]
            output, status = await execute(session, f"{base}/exec", query, b"x" * 100_000, close=True)
            assert output == {1: b"x" * 100_000}
            assert status["status"] == "Success"
            query = [
                ("command", "sh"),
                ("command", "-c"),
                ("command", "test -t 0 && tty"),
                ("tty", "true"),
                ("stdout", "true"),
            ]
            output, status = await execute(session, f"{base}/exec", query, b"")
            assert output[1].startswith(b"/dev/pts/"), output
            query = [("command", "/no/such/program"), ("stdout", "true"), ("stderr", "true")]
            _, status = await execute(session, f"{base}/exec", query, b"")
            assert status["status"] == "Failure"
        await runner.cleanup()
        await world.delete("shell")
        await world.until_clean()


async def execute(
    session: aiohttp.ClientSession, url: str, query: list[tuple[str, str]], stdin: bytes, *, close: bool = False
) -> tuple[dict[int, bytes], Object]:
    output: dict[int, bytes] = {}
    async with session.ws_connect(url, params=query, protocols=("v5.channel.k8s.io",)) as socket:
        assert socket.protocol == "v5.channel.k8s.io"
        if stdin:
            await socket.send_bytes(b"\0" + stdin)
        if close:
            await socket.send_bytes(bytes([255, 0]))
        async with asyncio.timeout(20):
            async for message in socket:
                if message.data[0] == 3:
                    return output, json.loads(message.data[1:])
                output[message.data[0]] = output.get(message.data[0], b"") + message.data[1:]
    raise AssertionError("no status")


async def a_pod_on_the_host_network(world: World) -> None:
    await world.create("host", {"command": ["sh", "-c", "ip -br link; exec sleep 100"]}, hostNetwork=True)
    async with world.running():
        pod = await world.until("host", ready)
        assert pod["status"]["podIPs"] == [{"ip": "172.30.0.11"}, {"ip": "fd00:30::11"}]
        assert not os.listdir("/run/netns")
        await world.delete("host")
        await world.until_clean()


async def pods_are_not_in_the_cgroup_of_kubelet(world: World) -> None:
    own = cgroups.kubelet(Path(os.environ["VMNET_LAB_DIR"]).name, "n1")
    if not cgroups.make(own):
        return  # this machine has no cgroup v2
    cgroups.enter(own)
    assert cgroups.pods() == own.parent / "kubepods"
    world.node = replace(world.node, cgroups=cgroups.pods())
    look = ["sh", "-c", "cat /proc/self/cgroup; exec sleep 100"]
    probe = {"exec": {"command": ["sh", "-c", "cat /proc/self/cgroup > /run/probed"]}}
    uids = {
        "own": await world.create("own", {"command": look, "readinessProbe": probe}),
        "host": await world.create("host", {"command": look}, hostNetwork=True),
    }
    async with world.running():
        for name, uid in uids.items():
            await world.until(name, ready)
            inside = str(own.parent / "kubepods" / uid).removeprefix(str(cgroups.MOUNT))
            log = world.node.pods / uid / "c.log"
            async with asyncio.timeout(20):
                while f"0::{inside}\n" not in log.read_text():
                    await asyncio.sleep(0.02)
        assert f"/kubepods/{uids['own']}\n" in Path("/run/probed").read_text()
        assert (own / "cgroup.procs").read_text().split() == [str(os.getpid())]
        for name in uids:
            await world.delete(name)
        await world.until_clean()
    assert not [path for path in (own.parent / "kubepods").iterdir() if path.is_dir()]


async def faults_are_named(world: World) -> None:
    await world.create("image", {"image": "nginx:1"})
    await world.create("program", {"command": ["/no/such/program"]})
    await world.create(
        "config",
        {"command": ["true"], "env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}}]},
    )
    async with world.running():
        for name, reason in (
            ("image", "ImagePullBackOff"),
            ("program", "RunContainerError"),
            ("config", "CreateContainerConfigError"),
        ):
            pod = await world.until(
                name, lambda pod, r=reason: container(pod).get("state", {}).get("waiting", {}).get("reason") == r
            )
            assert phase(pod) == "Pending"
            assert container(pod)["state"]["waiting"]["message"]
            await world.delete(name)
        await world.until_clean()


SCENARIOS: dict[str, Callable[[World], Awaitable[None]]] = {
    scenario.__name__: scenario
    for scenario in (
        a_pod_lives_and_goes,
        a_finished_pod_keeps_its_status_and_loses_its_network,
        a_crashing_container_is_restarted_ever_later,
        init_containers_come_first,
        probes_decide,
        readiness_gates_are_waited_for,
        a_refusing_plugin_is_told_and_tried_again,
        a_restarted_kubelet_adopts,
        grace_is_kept_and_can_be_cut_short,
        logs_and_exec_are_served,
        a_pod_on_the_host_network,
        pods_are_not_in_the_cgroup_of_kubelet,
        faults_are_named,
    )
}


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_kubelet(scenario: str) -> None:
    async with Lab(f"k-{secrets.token_hex(4)}", 1, without=("apiserver", "agent", "outside")) as lab:
        done = await lab.exec("n1", [sys.executable, __file__, scenario], timeout=100)
        assert done.exit == 0, done.stderr[-8000:]
    assert lab.directory.name not in cgroups.labs()


if __name__ == "__main__":
    logging.basicConfig(level="INFO", stream=sys.stderr)
    asyncio.run(SCENARIOS[sys.argv[1]](World()))
