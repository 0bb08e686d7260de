"""The whole virt component on the embedded API with real guests; only kubelet and scheduler are played."""

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from vmnet.kube.api import NODES, PODS, VMIMS, VMIS, VMS, EventType, KubeError, NotFound, Object, PatchType, Resource
from vmnet.kube.client import KubeClient
from vmnet.lab import directory
from vmnet.lab.apiserver.server import ApiServer
from vmnet.lab.guest.agent import GuestAgent
from vmnet.lab.guest.image import guest_image
from vmnet.lab.virt import controller, kinds, qemu, subresources
from vmnet.lab.virt.handler import Handler
from vmnet.lab.virt.qmp import Qmp
from vmnet.model import names
from vmnet.runtime.tasks import TaskScope

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and tap devices need root"),
    pytest.mark.timeout(240),
]

DEFINITIONS = Path(directory.__file__).parent / "data" / "crds"
DEFINITION = Resource(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False
)
NODE_NAMES = ("n1", "n2")
MAC = "0a:58:c0:a8:00:05"
SETUP = (
    "ip link set lo up && ip link add ovn-udn1 mtu 1400 type veth peer name other && "
    f"ip link set ovn-udn1 address {MAC} && ip addr add 192.168.0.5/16 dev ovn-udn1 && "
    'ip link set ovn-udn1 up && ip link set other up && exec "$@"'
)
STATUS = json.dumps([{"interface": "eth0"}, {"interface": "ovn-udn1", "default": True}])


@dataclass
class Kubelet:
    """Runs launcher pods in namespaces, on the first of the nodes that their anti-affinity allows."""

    kube: KubeClient
    root: Path
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    hold: bool = False
    """Leave new pods unscheduled."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                with suppress(KubeError):
                    for pod in (await self.kube.list(PODS)).items:
                        uid = pod["metadata"]["uid"]
                        if uid not in self.seen and not self.hold:
                            self.seen.add(uid)
                            group.create_task(self._pod(pod))
                await asyncio.sleep(0.05)

    async def _pod(self, pod: Object) -> None:
        name, namespace, uid = (pod["metadata"][key] for key in ("name", "namespace", "uid"))
        node = None
        while node is None:
            taken = set()
            if "podAntiAffinity" in pod["spec"]["affinity"]:
                selector = f"{names.CREATED_BY_LABEL}={pod['metadata']['labels'][names.CREATED_BY_LABEL]}"
                others = (await self.kube.list(PODS, namespace, labels=selector)).items
                taken = {item["spec"].get("nodeName") for item in others if kinds.pod_alive(item)}
            node = next((item for item in NODE_NAMES if item not in taken), None)
            if node is None:
                await asyncio.sleep(0.05)  # a pod of the last migration is still ending
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name},
            "target": {"kind": "Node", "name": node},
        }
        await self.kube.create(Resource("", "v1", f"pods/{name}/binding", "Binding"), binding, namespace)
        await self._status(pod, {names.NETWORK_STATUS_ANNOTATION: STATUS})
        place = self.root / "pods" / uid
        place.mkdir(parents=True)
        container = pod["spec"]["containers"][0]
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT)
        try:
            process = await asyncio.create_subprocess_exec(
                *("unshare", "--net", "--mount", "sh", "-c", SETUP, "sh", *container["command"], *container["args"]),
                stdout=log,
                stderr=log,
                env={**os.environ, "VMNET_LAB_POD_DIR": str(place)},
            )
        finally:
            os.close(log)
        self.processes[uid] = process
        try:
            await self._running(pod)
            waiting = asyncio.ensure_future(process.wait())
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=0.05)
                current = await self._get(pod)
                if current is None or kinds.deleting(current):
                    process.send_signal(signal.SIGTERM) if process.returncode is None else None
                    await asyncio.wait({waiting}, timeout=20)
                    break
                await self._ready(current)
            code = process.returncode if process.returncode is not None else 1
            with suppress(NotFound):
                await self._ended(pod, code)
            while (current := await self._get(pod)) is not None and not kinds.deleting(current):
                await asyncio.sleep(0.05)
            with suppress(NotFound):
                await self.kube.delete(PODS, name, namespace, uid=uid, grace_seconds=0)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _get(self, pod: Object) -> Object | None:
        with suppress(NotFound):
            found = await self.kube.get(PODS, pod["metadata"]["name"], pod["metadata"]["namespace"])
            return found if found["metadata"]["uid"] == pod["metadata"]["uid"] else None
        return None

    async def _status(self, pod: Object, annotations: dict[str, str]) -> None:
        metadata = pod["metadata"]
        await self.kube.patch(PODS, metadata["name"], {"metadata": {"annotations": annotations}}, metadata["namespace"])

    async def _patch(self, pod: Object, status: Object) -> None:
        metadata = pod["metadata"]
        await self.kube.patch(
            PODS,
            metadata["name"],
            {"status": status},
            metadata["namespace"],
            type=PatchType.STRATEGIC,
            subresource="status",
        )

    async def _running(self, pod: Object) -> None:
        container = {
            "name": "compute",
            "image": kinds.LAUNCHER_IMAGE,
            "imageID": f"{kinds.LAUNCHER_IMAGE}@sha256:{'0' * 64}",
            "ready": True,
            "started": True,
            "restartCount": 0,
            "state": {"running": {"startedAt": kinds.now()}},
        }
        await self._patch(pod, {"phase": "Running", "containerStatuses": [container]})

    async def _ready(self, pod: Object) -> None:
        status = "True" if kinds.is_true(pod, kinds.UNPAUSED_GATE) else "False"
        found = kinds.condition(pod, "Ready")
        if found is not None and found["status"] == status:
            return
        condition = {"type": "Ready", "status": status, "lastTransitionTime": kinds.now()}
        if status == "False":
            condition["reason"] = "ReadinessGatesNotReady"
        await self._patch(pod, {"conditions": [condition]})

    async def _ended(self, pod: Object, code: int) -> None:
        container = {
            "name": "compute",
            "image": kinds.LAUNCHER_IMAGE,
            "imageID": f"{kinds.LAUNCHER_IMAGE}@sha256:{'0' * 64}",
            "ready": False,
            "started": False,
            "restartCount": 0,
            "state": {"terminated": {"exitCode": code, "reason": "Completed" if code == 0 else "Error"}},
        }
        await self._patch(
            pod,
            {
                "phase": "Succeeded" if code == 0 else "Failed",
                "containerStatuses": [container],
                "conditions": [{"type": "Ready", "status": "False", "reason": "PodCompleted"}],
            },
        )


@dataclass
class Cluster:
    """The API with the component on it."""

    server: ApiServer
    kube: KubeClient
    kubelet: Kubelet
    root: Path
    jobs: "Writes"
    instances: "Writes"
    handlers: list[asyncio.Task[None]] = field(default_factory=list)
    restart_handlers: Callable[[], Awaitable[None]] = field(init=False)

    def start_handlers(self, scope: TaskScope, clients: list[KubeClient]) -> None:
        for number, client in enumerate(clients, start=1):
            handler = Handler(client, f"n{number}", (f"127.0.0.{number}",))
            self.handlers.append(scope.start(handler.run(), f"handler n{number}"))

        async def restart() -> None:
            for task in self.handlers:
                task.cancel()
            await asyncio.wait(self.handlers)
            self.handlers.clear()
            self.start_handlers(scope, clients)

        self.restart_handlers = restart

    async def written(self, job: Object) -> tuple[list[str], list[set[str]]]:
        """What was written about a migration, in the form of ``recorded``."""
        uid = job["metadata"]["uid"]

        async def all_seen() -> bool:
            vmi = await self.vmi()
            return (
                vmi is not None
                and kinds.TARGET_NODE_LABEL not in kinds.labels(vmi)
                and any(
                    item["metadata"]["resourceVersion"] == vmi["metadata"]["resourceVersion"]
                    for item in self.instances.seen
                )
            )

        await self.until("the watches have caught up", all_seen)
        return phases(self.jobs.of(uid)), sequence(self.instances.seen, uid)

    async def migrate(self, until: str) -> Object:
        """Start a migration and wait for the job's phase."""
        assert await self.call("virtualmachines", "blue", "migrate") == (202, "")

        async def there() -> Object | None:
            active = [item for item in (await self.kube.list(VMIMS)).items if kinds.phase(item) not in kinds.FINAL]
            return next((item for item in active if kinds.phase(item) == until), None)

        return dict(await self.until(f"the migration is {until}", there))

    async def detected(self) -> bool:
        return bool(kinds.migration_state(await self.vmi() or {"status": {}}).get("targetNodeDomainDetected"))

    async def place(self, key: str) -> Path:
        """Directory of the migration's sourcePod or targetPod."""
        vmi = await self.vmi()
        assert vmi is not None
        return self.directory(await self.pod(kinds.migration_state(vmi)[key]))

    async def call(self, plural: str, name: str, verb: str, body: Object | None = None) -> tuple[int, str]:
        url = f"{self.server.url}/apis/subresources.kubevirt.io/v1/namespaces/blue-namespace/{plural}/{name}/{verb}"
        headers = {"Authorization": f"Bearer {self.server.tokens.admin}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.put(url, data=json.dumps(body or {}), ssl=False) as answer,
        ):
            return answer.status, await answer.text()

    async def vmi(self) -> Object | None:
        with suppress(NotFound):
            return await self.kube.get(VMIS, "blue", "blue-namespace")
        return None

    async def until(self, what: str, check: Callable[[], Awaitable[Any]], seconds: float = 60) -> Any:
        try:
            async with asyncio.timeout(seconds):
                while not (found := await check()):
                    await asyncio.sleep(0.05)
                return found
        except TimeoutError:
            raise AssertionError(f"never happened: {what}\n{await self.describe()}") from None

    async def describe(self) -> str:
        items: list[Object] = [await self.vmi() or {}]
        for resource in (VMS, VMIMS, PODS):
            items += (await self.kube.list(resource)).items
        parts = [
            yaml.safe_dump(
                {"kind": item.get("kind"), "name": item.get("metadata", {}).get("name"), "status": item.get("status")}
            )
            for item in items
        ]
        parts += [f"{path}:\n{path.read_text()[-1500:]}" for path in self.root.glob("pods/*/log")]
        return "\n".join(parts)

    async def running(self) -> Object:
        async def check() -> Object | None:
            vmi = await self.vmi()
            return vmi if vmi and kinds.phase(vmi) == "Running" and kinds.is_true(vmi, "Ready") else None

        return await self.until("the guest runs", check)

    async def job(self, name: str | None = None) -> Object:
        jobs = (await self.kube.list(VMIMS, "blue-namespace")).items
        jobs = [item for item in jobs if name in (None, item["metadata"]["name"])]
        return max(jobs, key=lambda item: int(item["metadata"]["resourceVersion"]), default={})

    async def job_ended(self) -> Object:
        async def check() -> Object | None:
            job = await self.job()
            return job if job and kinds.phase(job) in kinds.FINAL and not job["metadata"].get("finalizers") else None

        return await self.until("the migration ends", check)

    async def pod(self, name: str) -> Object:
        return await self.kube.get(PODS, name, "blue-namespace")

    def directory(self, pod: Object) -> Path:
        return self.root / "pods" / pod["metadata"]["uid"]


def machine(**spec: Any) -> Object:
    return {
        "apiVersion": kinds.API_VERSION,
        "kind": "VirtualMachine",
        "metadata": {"name": "blue", "namespace": "blue-namespace"},
        "spec": {
            "runStrategy": "Always",
            "template": {
                "spec": {
                    "domain": {
                        "devices": {"disks": [], "interfaces": [{"name": "happy", "binding": {"name": "l2bridge"}}]},
                        "resources": {"requests": {"memory": "128Mi"}},
                    },
                    "networks": [{"name": "happy", "pod": {}}],
                }
            },
            **spec,
        },
    }


RECORDED = Path(__file__).parents[1] / "data" / "kubevirt" / "migrations.jsonl"
STATE_KEYS = (
    *("startTimestamp", "endTimestamp", "targetNodeDomainDetected", "targetNodeDomainReadyTimestamp"),
    *("completed", "failed", "abortRequested", "abortStatus", "mode", "migrationPolicyName"),
)


def facts(item: Object) -> set[str]:
    """What the object says of a migration, without names and times."""
    found = set()
    state = kinds.migration_state(item)
    for key in STATE_KEYS:
        if key in state:
            value = state[key]
            found.add(f"{key}={value}" if key in ("completed", "failed", "mode", "abortStatus") else key)
    if state:
        found.add("at " + ("target" if item["status"].get("nodeName") == state.get("targetNode") else "source"))
        found.add(
            "label "
            + ("target" if kinds.labels(item).get(kinds.NODE_NAME_LABEL) == state.get("targetNode") else "source")
        )
    if kinds.TARGET_NODE_LABEL in kinds.labels(item):
        found.add("targeted")
    return found


def sequence(writes: list[Object], uid: str) -> list[set[str]]:
    """The changes of ``facts`` over the writes about one migration."""
    steps: list[set[str]] = []
    last: set[str] = set()
    for item in writes:
        if kinds.migration_state(item).get("migrationUid") != uid:
            continue
        now = facts(item)
        if now != last:
            steps.append({f"+{fact}" for fact in now - last} | {f"-{fact}" for fact in last - now})
            last = now
    return steps


def recorded(scenario: str) -> tuple[list[str], list[set[str]]]:
    """(phases of the job, changes of the instance) as the real control plane wrote them."""
    lines = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    own = [line for line in lines if line["scenario"] == scenario]
    jobs = [line["object"] for line in own if line["resource"] == "virtualmachineinstancemigrations"]
    instances = [line["object"] for line in own if line["resource"] == "virtualmachineinstances"]
    return phases(jobs), sequence(instances, jobs[0]["metadata"]["uid"])


def phases(jobs: list[Object]) -> list[str]:
    return [phase for phase in dict.fromkeys(kinds.phase(job) for job in jobs) if phase]


@dataclass
class Writes:
    """Every version of the objects of one kind."""

    kube: KubeClient
    resource: Resource
    seen: list[Object] = field(default_factory=list)

    async def run(self) -> None:
        version = (await self.kube.list(self.resource)).resource_version
        while True:
            with suppress(KubeError):
                async for event in self.kube.watch(self.resource, version):
                    version = event.object["metadata"]["resourceVersion"]
                    if event.type is not EventType.BOOKMARK:
                        self.seen.append(event.object)

    def of(self, uid: str) -> list[Object]:
        return [item for item in self.seen if item["metadata"]["uid"] == uid]


@asynccontextmanager
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    # Sockets have paths of at most 107 octets, and pytest's are long.
    root = Path(tempfile.mkdtemp(prefix="vmnet-"))
    monkeypatch.setenv(directory.ENVIRONMENT_VARIABLE, str(root))
    image = await asyncio.to_thread(guest_image)
    await asyncio.to_thread(qemu.choose_accelerator, image)
    server = ApiServer(tmp_path / "apiserver")
    await server.start()
    config = tmp_path / "kubeconfig"
    server.kubeconfig(config)
    mounted = subresources.mount(server, config)
    clients = [await KubeClient.connect(config, user_agent=f"test-{number}") for number in range(4)]
    kube = clients[0]
    try:
        for path in sorted(DEFINITIONS.glob("kubevirt-*.yaml")):
            await kube.create(DEFINITION, yaml.safe_load(path.read_text()))
        await kube.create(
            Resource("", "v1", "namespaces", "Namespace", namespaced=False),
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "blue-namespace"}},
        )
        for name in NODE_NAMES:
            await kube.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
        kubelet = Kubelet(kube, root)
        jobs, instances = Writes(kube, VMIMS), Writes(kube, VMIS)
        async with TaskScope() as scope:
            scope.service(jobs.run(), "watch jobs")
            scope.service(instances.run(), "watch instances")
            scope.service(controller.run(clients[1]), "controller")
            scope.service(kubelet.run(), "kubelet")
            made = Cluster(server, kube, kubelet, root, jobs, instances)
            made.start_handlers(scope, clients[2:])
            yield made
    finally:
        await mounted.close()
        for client in clients:
            await client.close()
        await server.stop()
        shutil.rmtree(root)


async def test_start_migrate_stop_start_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(tmp_path, monkeypatch) as made:
        await made.kube.create(VMS, machine(), "blue-namespace")
        vmi = await made.running()
        assert vmi["status"]["nodeName"] == "n1"
        assert vmi["status"]["interfaces"][0]["mac"] == MAC
        assert vmi["status"]["interfaces"][0]["podInterfaceName"] == "ovn-udn1"
        assert vmi["metadata"]["labels"] == {kinds.NODE_NAME_LABEL: "n1"}
        source = (await made.kube.list(PODS, "blue-namespace")).items[0]
        agent = GuestAgent(made.directory(source) / qemu.AGENT_SOCKET)
        job = await agent.start(["sleep", "1000"])
        await agent.run(["ip", "addr", "add", "192.168.0.5/16", "dev", "eth0"])
        agent.close()

        assert await made.call("virtualmachines", "blue", "migrate") == (202, "")
        status, text = await made.call("virtualmachines", "blue", "migrate")
        assert status == 500
        assert "in-flight migration detected" in json.loads(text)["message"]
        done = await made.job_ended()
        assert kinds.phase(done) == "Succeeded"
        assert await made.written(done) == recorded("B-migration")
        vmi = await made.vmi()
        assert vmi is not None
        state = vmi["status"]["migrationState"]
        assert (state["sourceNode"], state["targetNode"], vmi["status"]["nodeName"]) == ("n1", "n2", "n2")
        assert done["status"]["migrationState"] == state
        target = await made.pod(state["targetPod"])
        assert target["metadata"]["annotations"][names.TARGET_READY_ANNOTATION].endswith(" +0000 UTC")
        assert float(vmi["metadata"]["annotations"][kinds.PAUSE_ANNOTATION]) > 0
        async with GuestAgent(made.directory(target) / qemu.AGENT_SOCKET) as moved:
            assert (await moved.poll(job)).running

        async def source_done() -> bool:
            return kinds.phase(await made.pod(source["metadata"]["name"])) == "Succeeded"

        await made.until("the source pod completes", source_done)
        await made.running()

        async def unlabelled() -> bool:
            return kinds.TARGET_NODE_LABEL not in ((await made.vmi()) or {})["metadata"]["labels"]

        await made.until("the target's label is gone", unlabelled)

        assert (await made.call("virtualmachines", "blue", "stop"))[0] == 202

        async def gone() -> bool:
            return await made.vmi() is None and not (await made.kube.list(PODS, "blue-namespace")).items

        await made.until("the instance is gone", gone)

        async def stopped() -> bool:
            vm = await made.kube.get(VMS, "blue", "blue-namespace")
            return vm["status"]["printableStatus"] == "Stopped" and not vm["status"].get("created")

        await made.until("the machine is stopped", stopped)
        assert (await made.call("virtualmachines", "blue", "start"))[0] == 202
        second = await made.running()
        assert second["metadata"]["uid"] != vmi["metadata"]["uid"]
        await made.kube.delete(VMS, "blue", "blue-namespace")
        await made.until("everything is gone", gone)

        async def no_machine() -> bool:
            return not (await made.kube.list(VMS, "blue-namespace")).items

        await made.until("the machine is gone", no_machine)


def policy(**spec: Any) -> Object:
    return {
        "apiVersion": "migrations.kubevirt.io/v1alpha1",
        "kind": "MigrationPolicy",
        "metadata": {"name": "slow"},
        "spec": {"selectors": {"virtualMachineInstanceSelector": {"speed": "slow"}}, **spec},
    }


async def test_migrations_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(tmp_path, monkeypatch) as made:
        slow = machine()
        slow["spec"]["template"]["metadata"] = {"labels": {"speed": "slow"}}
        # Slow enough that memory is on its way for as long as a test needs.
        await made.kube.create(kinds.MIGRATION_POLICIES, policy(bandwidthPerMigration="1Mi"))
        await made.kube.create(VMS, slow, "blue-namespace")
        vmi = await made.running()
        agent = GuestAgent(made.directory((await made.kube.list(PODS)).items[0]) / qemu.AGENT_SOCKET)
        await agent.ready()

        # C4: cancelled before virt-handler heard of it.
        made.kubelet.hold = True
        job = await made.migrate("Scheduling")
        await made.kube.delete(VMIMS, job["metadata"]["name"], "blue-namespace")
        await made.until("the job is gone", lambda: _absent(made, job))
        assert phases(made.jobs.of(job["metadata"]["uid"])) == recorded("C4-cancel-before-handoff")[0]
        assert "migrationState" not in ((await made.vmi()) or {})["status"]
        made.kubelet.hold = False
        await made.until("the target pod is gone", lambda: _pods(made, 1))

        # C3: cancelled while it runs.
        job = await made.migrate("Running")
        await made.until("the target has heard of it", made.detected)
        await made.kube.delete(VMIMS, job["metadata"]["name"], "blue-namespace")
        await made.until("the job is gone", lambda: _absent(made, job))
        ours, theirs = await made.written(job), recorded("C3-cancel-while-running")
        assert ours[0] == theirs[0]
        assert _without_policy(ours[1]) == theirs[1]

        # C1: QEMU gives up on the source.
        job = await made.migrate("Running")
        await made.until("the target has heard of it", made.detected)
        async with await Qmp.connect(await made.place("sourcePod") / qemu.API_QMP_SOCKET) as monitor:
            await monitor.execute("migrate_cancel")
        await made.job_ended()
        ours, theirs = await made.written(job), recorded("C1-failed-while-running")
        assert ours[0] == theirs[0]
        # There the target's word came too late to be recorded; all else is in that order.
        steps = [step - {"+targetNodeDomainDetected"} for step in _without_policy(ours[1])]
        assert [step for step in steps if step] == theirs[1]

        # C2: the target's QEMU dies; whoever sees it first says so.
        job = await made.migrate("Running")
        async with await Qmp.connect(await made.place("targetPod") / qemu.API_QMP_SOCKET) as monitor:
            await monitor.execute("quit")
        failed = await made.job_ended()
        assert kinds.phase(failed) == "Failed"
        assert failed["status"]["migrationState"]["failureReason"]
        assert (await agent.run(["true"])).exit == 0
        assert ((await made.vmi()) or {})["status"]["nodeName"] == vmi["status"]["nodeName"]
        agent.close()

        # Both virt-handlers restart while memory is on its way: QEMU goes on, and they take it up again.
        await made.kube.patch(kinds.MIGRATION_POLICIES, "slow", {"spec": {"bandwidthPerMigration": "8Mi"}})
        job = await made.migrate("Running")
        await made.until("the target has heard of it", made.detected)
        await made.restart_handlers()
        assert kinds.phase(await made.job_ended()) == "Succeeded"
        vmi = await made.running()
        assert vmi["status"]["nodeName"] == "n2"
        await made.kube.patch(kinds.MIGRATION_POLICIES, "slow", {"spec": {"bandwidthPerMigration": "1Mi"}})

        # C5: post-copy; the policy leaves pre-copy no time.
        await made.kube.patch(
            kinds.MIGRATION_POLICIES, "slow", {"spec": {"allowPostCopy": True, "completionTimeoutPerGiB": 1}}
        )
        assert (await made.call("virtualmachines", "blue", "migrate"))[0] == 202
        done = await made.job_ended()
        assert kinds.phase(done) == "Succeeded"
        ours, theirs = await made.written(done), recorded("C5-post-copy")
        assert ours[0] == theirs[0]
        assert _without_policy(ours[1]) == _without_policy(theirs[1])
        async with GuestAgent(await made.place("targetPod") / qemu.AGENT_SOCKET) as moved:
            assert (await moved.run(["true"])).exit == 0


async def _absent(made: Cluster, job: Object) -> bool:
    return all(item["metadata"]["uid"] != job["metadata"]["uid"] for item in (await made.kube.list(VMIMS)).items)


async def _pods(made: Cluster, count: int) -> bool:
    return len((await made.kube.list(PODS)).items) == count


def _without_policy(steps: list[set[str]]) -> list[set[str]]:
    return [step - {"+migrationPolicyName"} for step in steps]


async def test_pause_console_restart_and_shutdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(tmp_path, monkeypatch) as made:
        await made.kube.create(VMS, machine(), "blue-namespace")
        vmi = await made.running()
        await console(made)

        assert await made.call("virtualmachineinstances", "blue", "pause") == (200, "")

        async def paused() -> bool:
            vm = await made.kube.get(VMS, "blue", "blue-namespace")
            pod = (await made.kube.list(PODS)).items[0]
            return vm["status"]["printableStatus"] == "Paused" and not kinds.is_true(pod, "Ready")

        await made.until("the guest is paused and its pod not ready", paused)
        assert (await made.call("virtualmachineinstances", "blue", "pause"))[0] == 409
        assert await made.call("virtualmachineinstances", "blue", "unpause") == (200, "")
        await made.running()

        async def another() -> Object | None:
            now = await made.vmi()
            running = now and kinds.phase(now) == "Running" and kinds.is_true(now, "Ready")
            return now if running and now["metadata"]["uid"] != vmi["metadata"]["uid"] else None

        assert await made.call("virtualmachines", "blue", "restart") == (202, "")
        vmi = await made.until("another instance runs", another)
        assert not (await made.kube.get(VMS, "blue", "blue-namespace"))["status"].get("stateChangeRequests")

        pod = next(item for item in (await made.kube.list(PODS)).items if kinds.pod_alive(item))
        async with GuestAgent(made.directory(pod) / qemu.AGENT_SOCKET) as agent:
            await agent.start(["poweroff"])
        await made.until("a machine that runs always comes back", another)


async def console(made: Cluster) -> None:
    place = "namespaces/blue-namespace/virtualmachineinstances/blue/console"
    url = f"{made.server.url}/apis/subresources.kubevirt.io/v1/{place}"
    headers = {"Authorization": f"Bearer {made.server.tokens.admin}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.ws_connect(url, protocols=("plain.kubevirt.io",), ssl=False) as socket,
        asyncio.timeout(30),
    ):
        assert socket.protocol == "plain.kubevirt.io"
        text = b""
        while b"42-on-blue" not in text:
            if text.endswith(b"# ") or not text:
                await socket.send_bytes(b"echo $((6*7))-on-$(hostname)\n")
            message = await socket.receive()
            assert message.type == aiohttp.WSMsgType.BINARY
            text += message.data
