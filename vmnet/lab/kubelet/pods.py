"""One pod on this node, from its first sight to its deletion: level-triggered, one task per pod.

What the pod should be is the API object; what it is, is asked from its sandbox. So a restarted kubelet goes on where
the old one was, and the pods do not notice.
"""

import asyncio
import base64
import json
import logging
import os
import random
import secrets
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmnet.kube.api import PODS, Kube, KubeError, NotFound, Object, PatchType, Resource
from vmnet.kube.events import Recorder
from vmnet.lab import cgroups
from vmnet.lab.directory import ENVIRONMENT_VARIABLE
from vmnet.lab.kubelet import environment, images, network, probes, runtime, status
from vmnet.lab.kubelet.network import Network, NetworkError
from vmnet.lab.kubelet.runtime import RuntimeFault, Sandbox
from vmnet.lab.kubelet.sandbox import ContainerState, SandboxConfig
from vmnet.lab.kubelet.status import Observed, Waiting
from vmnet.runtime.backoff import Backoff
from vmnet.runtime.tasks import TaskSet

log = logging.getLogger(__name__)

POD_DIRECTORY_VARIABLE: Final = "VMNET_LAB_POD_DIR"
CLUSTER_DOMAIN: Final = "cluster.local"
DEFAULT_GRACE: Final = 30.0
CONFIGMAPS: Final = Resource("", "v1", "configmaps", "ConfigMap")
SECRETS: Final = Resource("", "v1", "secrets", "Secret")

SANDBOX_BACKOFF: Final = Backoff(first=0.5, most=10.0)
CRASH_BACKOFF: Final = Backoff(first=1.0, most=60.0, jitter=0.0)
"""kubelet's own starts at 10 s and ends at 5 min: a lab is for people who wait."""
CRASH_FORGOTTEN: Final = 120.0
"""A run this long makes the next crash a first one."""
API_BACKOFF: Final = Backoff(first=0.2, most=5.0)


@dataclass(frozen=True, slots=True)
class Node:
    """What all pods of a node share."""

    name: str
    addresses: tuple[str, ...]
    """InternalIPs, IPv4 first."""
    kube: Kube
    recorder: Recorder
    network: Network
    pods: Path
    """Directory that holds one directory per pod uid."""
    cluster_dns: tuple[str, ...]
    cgroups: Path | None = None
    """Directory of the pods' cgroups, one for each uid; None where pods stay in kubelet's."""


@dataclass(frozen=True, slots=True)
class SandboxRecord:
    """``sandbox.json`` in a pod's directory: what a restarted kubelet needs to find or to clean up a sandbox."""

    node: str
    container_id: str
    netns: str
    namespace: str
    name: str
    uid: str
    addresses: tuple[str, ...]
    ready: bool
    """CNI ADD has succeeded."""

    @property
    def attachment(self) -> network.Attachment:
        """For the CNI plugins."""
        return network.Attachment(
            self.container_id, self.netns, network.pod_args(self.namespace, self.name, self.uid, self.container_id)
        )

    def write(self, directory: Path) -> None:
        """Replace the file."""
        body = {field: getattr(self, field) for field in self.__dataclass_fields__}
        temporary = directory / ".sandbox.json"
        temporary.write_text(json.dumps(body))
        temporary.rename(directory / "sandbox.json")

    @classmethod
    def read(cls, directory: Path) -> "SandboxRecord | None":
        """None when there is none, or only part of one."""
        try:
            body = json.loads((directory / "sandbox.json").read_text())
            return cls(**{**body, "addresses": tuple(body["addresses"])})
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None


class PodWorker:
    """Runs one pod. ``update`` and ``vanish`` tell it news; ``run`` returns when nothing of the pod is left."""

    def __init__(self, node: Node, pod: Object) -> None:
        self.pod = pod
        self.uid: str = pod["metadata"]["uid"]
        self._node = node
        self._directory = node.pods / self.uid
        self._wake = asyncio.Event()
        self._gone = False
        self._deadline: float | None = None
        self._tasks = TaskSet()
        self._sandbox: Sandbox | None = None
        self._record: SandboxRecord | None = None
        self._sandbox_failures = 0
        self._not_before = 0.0
        self._waiting: dict[str, Waiting] = {}
        self._ready: dict[str, bool] = {}
        self._started: dict[str, bool] = {}
        self._attempts: dict[str, int] = {}
        self._crashes: dict[str, int] = {}
        self._restart_at: dict[str, float] = {}
        self._probes: dict[str, TaskSet] = {}
        self._ending = False
        self._finished = False
        self._sent: Object | None = None

    # News

    def update(self, pod: Object) -> None:
        """The API has a newer version."""
        self.pod = pod
        self._wake.set()

    def vanish(self) -> None:
        """The API has no such pod any more: end it at once."""
        self._gone = True
        self._wake.set()

    @property
    def sandbox(self) -> Sandbox | None:
        """The running sandbox."""
        return self._sandbox

    def runs(self, container: str) -> bool:
        """Whether a container runs, for logs and exec."""
        sandbox = self._sandbox
        return sandbox is not None and any(
            state.exit is None for key, state in sandbox.containers.items() if key.rpartition(".")[0] == container
        )

    def log_path(self, container: str) -> Path:
        """Both outputs of a container, of all its runs."""
        return Path(self._directory, f"{container}.log")

    @property
    def cgroup(self) -> Path | None:
        """Directory of the pod's cgroup, which its sandbox and everything in it is in."""
        return self._node.cgroups / self.uid if self._node.cgroups is not None else None

    @property
    def entering(self) -> tuple[str, ...]:
        """Words before a command that shall run in the pod. Raises RuntimeFault without a sandbox."""
        if self._sandbox is None:
            raise RuntimeFault("the sandbox is gone")
        own = self.cgroup
        return (*cgroups.entering(own if own is not None and own.exists() else None), *self._sandbox.enter())

    def container_environment(self, container: str) -> Mapping[str, str]:
        """What exec into a container sees. Raises KeyError, Unresolvable."""
        found = next(item for item in self._containers() if item["name"] == container)
        return environment.variables(found, self.pod, self._facts(), self._base_environment(), {})

    # The loop

    async def run(self) -> None:
        """Until the pod is gone."""
        failures = 0
        try:
            await self._adopt()
            while True:
                self._wake.clear()
                delay: float | None
                try:
                    if self._gone or self.pod["metadata"].get("deletionTimestamp"):
                        await self._end()
                        return
                    delay = await self._sync()
                    failures = 0
                except (KubeError, RuntimeFault, NetworkError) as error:
                    failures += 1
                    delay = API_BACKOFF.delay(failures, random.random())  # noqa: S311 - spreads retries
                    log.warning("pod %s: %s; again in %.1f s", self._name, error, delay)
                await self._sleep(delay)
        finally:
            await self._close()

    async def _sleep(self, delay: float | None) -> None:
        """Until there is news, at most ``delay`` seconds."""
        try:
            async with asyncio.timeout(delay):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _close(self) -> None:
        for tasks in self._probes.values():
            await tasks.close()
        await self._tasks.close()
        if self._sandbox is not None:
            self._sandbox.close()

    async def _adopt(self) -> None:
        """Take over what an earlier kubelet left."""
        self._record = SandboxRecord.read(self._directory)
        for entry in (self.pod.get("status") or {}).get("containerStatuses") or []:
            self._attempts[entry["name"]] = entry.get("restartCount", 0)
        if self._record is None:
            return
        sandbox: Sandbox | None = None
        try:
            sandbox = await Sandbox.connect(self._directory / "sandbox.sock")
            await sandbox.refresh()
        except RuntimeFault:
            self._sandbox = sandbox
            await self._remove_sandbox()
            return
        # Not before its containers are known: who sees a sandbox without any would start them again.
        self._sandbox = sandbox
        for identifier in self._sandbox.containers:
            name, _, attempt = identifier.rpartition(".")
            self._attempts[name] = max(self._attempts.get(name, 0), int(attempt))
        for container in self._containers():
            run = self._last_run(container["name"])
            if run is not None and run.exit is None:
                self._watch_container(container)
        self._follow()

    async def _sync(self) -> float | None:
        """One step towards the spec; the seconds after which to look again, None for news only."""
        if self._finished or (self.pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
            # Like a real node: a finished pod keeps its object, not its network.
            self._finished = True
            await self._remove_sandbox()
            return None
        delay = await self._ensure_sandbox()
        if delay is None:
            delay = await self._sync_containers()
        if await self._report() in ("Succeeded", "Failed"):
            self._finished = True
            await self._remove_sandbox()
            return None
        return delay

    # Sandbox

    async def _ensure_sandbox(self) -> float | None:
        """None when it is there, else the seconds after which to try again."""
        if self._sandbox is not None and self._record is not None and self._record.ready:
            return None
        now = time.monotonic()
        if now < self._not_before:
            return self._not_before - now
        await self._report()
        try:
            await self._make_sandbox()
        except (NetworkError, RuntimeFault) as error:
            self._sandbox_failures += 1
            delay = SANDBOX_BACKOFF.delay(self._sandbox_failures, random.random())  # noqa: S311 - spreads retries
            self._not_before = time.monotonic() + delay
            await self._event("FailedCreatePodSandBox", f"Failed to create pod sandbox: {error}", warning=True)
            await self._remove_sandbox()
            return delay
        self._sandbox_failures = 0
        return None

    async def _make_sandbox(self) -> None:
        await self._remove_sandbox()
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        metadata, host_network = self.pod["metadata"], bool(self.pod["spec"].get("hostNetwork"))
        container_id = secrets.token_hex(32)
        name = f"cni-{container_id[:16]}"
        record = SandboxRecord(
            node=self._node.name,
            container_id=container_id,
            netns="" if host_network else f"/run/netns/{name}",
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=self.uid,
            addresses=self._node.addresses if host_network else (),
            ready=host_network,
        )
        # Written first: whatever comes next, somebody will find what to clean up.
        record.write(self._directory)
        self._record = record
        if not host_network:
            await runtime.make_network_namespace(name)
            record = await self._attach(record)
        self._write_files(record)
        own = self.cgroup
        self._sandbox = await Sandbox.create(
            SandboxConfig(
                socket=str(self._directory / "sandbox.sock"),
                netns=record.netns,
                hostname=environment.hostname(self.pod),
                resolver=str(self._directory / "resolv.conf"),
                hosts="" if host_network else str(self._directory / "hosts"),
                cgroup=str(own) if own is not None and cgroups.make(own) else "",
            ),
            self._directory / "sandbox.log",
        )
        self._follow()

    async def _attach(self, record: SandboxRecord) -> SandboxRecord:
        """CNI ADD. While it runs the pod may be deleted: then it is given up."""
        adding = asyncio.ensure_future(self._node.network.add(record.attachment))
        leaving = asyncio.ensure_future(self._leaving())
        try:
            await asyncio.wait({adding, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not adding.done():
                raise NetworkError("the pod was deleted while its network was being made")
            result = adding.result()
        finally:
            for task in (adding, leaving):
                task.cancel()
            await asyncio.gather(adding, leaving, return_exceptions=True)
        addresses = network.addresses(result)
        record = SandboxRecord(
            record.node,
            record.container_id,
            record.netns,
            record.namespace,
            record.name,
            record.uid,
            tuple(sorted(addresses, key=lambda text: ":" in text)),
            True,
        )
        record.write(self._directory)
        self._record = record
        return record

    async def _leaving(self) -> None:
        """Returns once the pod shall go."""
        while not self._gone and not self.pod["metadata"].get("deletionTimestamp"):
            self._wake.clear()
            await self._wake.wait()
        self._wake.set()

    def _write_files(self, record: SandboxRecord) -> None:
        node_resolver = Path("/etc/resolv.conf").read_text()
        text = environment.resolver(self.pod, self._node.cluster_dns, CLUSTER_DOMAIN, node_resolver)
        (self._directory / "resolv.conf").write_text(text)
        environment.write_hosts(self._directory / "hosts", self.pod, record.addresses)

    def _follow(self) -> None:
        if self._sandbox is not None:
            self._tasks.start(self._follow_until_gone(self._sandbox), f"follow {self._name}")

    async def _follow_until_gone(self, sandbox: Sandbox) -> None:
        await sandbox.follow(self._wake.set)
        if self._sandbox is sandbox and not self._ending:
            # Its PID 1 was killed: everything in it has ended with it.
            self._sandbox = None
            self._attempts = {name: attempt + 1 for name, attempt in self._attempts.items()}
            await self._event("SandboxChanged", "Pod sandbox changed, it will be killed and re-created.")
            self._wake.set()

    async def _remove_sandbox(self) -> None:
        """Processes, then network, then namespace. Raises RuntimeFault or NetworkError: try again."""
        for tasks in self._probes.values():
            await tasks.close()
        self._probes.clear()
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            await sandbox.stop()
        if self.cgroup is not None:
            cgroups.remove(self.cgroup)
        record = self._record
        if record is None:
            return
        if record.netns:
            await self._node.network.delete(record.attachment)
            await runtime.remove_network_namespace(record.netns)
        (self._directory / "sandbox.json").unlink(missing_ok=True)
        self._record = None

    # Containers

    def _containers(self) -> list[Object]:
        spec = self.pod["spec"]
        return [*(spec.get("initContainers") or []), *spec["containers"]]

    def _runs(self, name: str) -> list[ContainerState]:
        if self._sandbox is None:
            return []
        found = [
            (int(key.rpartition(".")[2]), state)
            for key, state in self._sandbox.containers.items()
            if key.rpartition(".")[0] == name
        ]
        return [state for _, state in sorted(found, key=lambda pair: pair[0])]

    def _last_run(self, name: str) -> ContainerState | None:
        runs = self._runs(name)
        return runs[-1] if runs else None

    async def _sync_containers(self) -> float | None:
        """Start what should run; the seconds after which to look again."""
        spec = self.pod["spec"]
        policy = spec.get("restartPolicy", "Always")
        for container in spec.get("initContainers") or []:
            run = self._last_run(container["name"])
            if run is not None and run.exit == 0:
                continue
            if run is not None and run.exit is None:
                return None
            if run is not None and not status.restarts_after(policy, run.exit or 0):
                return None
            return await self._start_when_due(container, run)
        delays = []
        for container in spec["containers"]:
            run = self._last_run(container["name"])
            if run is not None and (run.exit is None or not status.restarts_after(policy, run.exit)):
                continue
            delay = await self._start_when_due(container, run)
            if delay is not None:
                delays.append(delay)
        return min(delays, default=None)

    async def _start_when_due(self, container: Object, run: ContainerState | None) -> float | None:
        """Start a container, or say when: a crashed one waits longer each time."""
        name = container["name"]
        if run is not None and name not in self._restart_at:
            await self._stop_probes(name)
            lasted = (run.finished or run.started) - run.started
            self._crashes[name] = 1 if lasted > CRASH_FORGOTTEN else self._crashes.get(name, 0) + 1
            # The first restart is immediate.
            delay = CRASH_BACKOFF.delay(self._crashes[name] - 1, 1.0)
            self._restart_at[name] = time.monotonic() + delay
            if delay:
                message = f"back-off {delay:.0f}s restarting failed container={name} pod={self._name}"
                self._waiting[name] = Waiting("CrashLoopBackOff", message)
                await self._event("BackOff", message, warning=True)
        left = self._restart_at.get(name, 0.0) - time.monotonic()
        if left > 0:
            return left
        try:
            await self._start(container, first=run is None)
        except (images.UnknownImage, environment.Unresolvable, RuntimeFault) as error:
            reason = {
                images.UnknownImage: "ImagePullBackOff",
                environment.Unresolvable: "CreateContainerConfigError",
            }.get(type(error), "RunContainerError")
            self._waiting[name] = Waiting(reason, str(error))
            event = "Failed" if reason != "RunContainerError" else "FailedStart"
            await self._event(event, f"Error: {error}", warning=True)
            self._crashes[name] = self._crashes.get(name, 0) + 1
            delay = CRASH_BACKOFF.delay(self._crashes[name], 1.0)
            self._restart_at[name] = time.monotonic() + delay
            return delay
        self._restart_at.pop(name, None)
        self._waiting.pop(name, None)
        return None

    async def _start(self, container: Object, *, first: bool) -> None:
        name, sandbox = container["name"], self._sandbox
        if sandbox is None:
            raise RuntimeFault("the sandbox is gone")
        sources = await self._sources()
        values = environment.variables(container, self.pod, self._facts(), self._base_environment(), sources)
        words = images.argv(
            container.get("image", ""),
            [environment.expand(word, values) for word in container.get("command") or []],
            [environment.expand(word, values) for word in container.get("args") or []],
        )
        if not first or f"{name}.{self._attempts.get(name, 0)}" in sandbox.containers:
            self._attempts[name] = self._attempts.get(name, 0) + 1
        identifier = f"{name}.{self._attempts.setdefault(name, 0)}"
        await sandbox.start(identifier, words, values, container.get("workingDir") or "/", self.log_path(name))
        await sandbox.refresh()
        await self._event("Started", f"Started container {name}")
        self._watch_container(container)

    async def _sources(self) -> dict[str, Object]:
        """ConfigMaps and Secrets that environments refer to; those that do not exist are left out."""
        found: dict[str, Object] = {}
        for key in environment.referenced_sources(self.pod):
            kind, _, name = key.partition("/")
            try:
                item = await self._node.kube.get(
                    CONFIGMAPS if kind == "configmaps" else SECRETS, name, self.pod["metadata"]["namespace"]
                )
            except NotFound:
                continue
            data = item.get("data") or {}
            found[key] = data if kind == "configmaps" else {k: base64.b64decode(v).decode() for k, v in data.items()}
        return found

    def _facts(self) -> environment.PodFacts:
        addresses = self._record.addresses if self._record is not None else ()
        return environment.PodFacts(self._node.name, self._node.addresses, addresses)

    def _base_environment(self) -> dict[str, str]:
        names = ("PATH", ENVIRONMENT_VARIABLE, "LANG", "PYTHONUNBUFFERED", "VMNET_LOG_LEVEL")
        return {
            **{name: os.environ[name] for name in names if name in os.environ},
            "HOME": "/root",
            "HOSTNAME": environment.hostname(self.pod),
            POD_DIRECTORY_VARIABLE: str(self._directory),
        }

    # Probes

    def _watch_container(self, container: Object) -> None:
        """Begin to probe a container that was just started (or found running)."""
        name = container["name"]
        tasks = TaskSet()
        self._probes[name] = tasks
        startup = container.get("startupProbe")
        self._started[name] = startup is None
        self._ready[name] = startup is None and container.get("readinessProbe") is None
        if startup is None:
            self._watch_started(container, tasks)
            return

        def started(good: bool, why: str) -> None:
            if not good:
                self._unhealthy(container, "Startup", why)
            elif not self._started[name]:
                self._started[name] = True
                self._ready[name] = container.get("readinessProbe") is None
                self._watch_started(container, tasks)
                self._wake.set()

        self._probe(tasks, container, startup, started, ready=False)

    def _watch_started(self, container: Object, tasks: TaskSet) -> None:
        name = container["name"]

        def readiness(good: bool, why: str) -> None:
            self._ready[name] = good
            if not good:
                message = f"Readiness probe failed: {why}"
                self._tasks.start(self._event("Unhealthy", message, warning=True), f"event {self._name}")
            self._wake.set()

        def liveness(good: bool, why: str) -> None:
            if not good:
                self._unhealthy(container, "Liveness", why)

        if container.get("readinessProbe"):
            self._probe(tasks, container, container["readinessProbe"], readiness, ready=False)
        if container.get("livenessProbe"):
            self._probe(tasks, container, container["livenessProbe"], liveness, ready=True)

    def _probe(self, tasks: TaskSet, container: Object, probe: Object, result: Any, *, ready: bool) -> None:
        async def execute(words: Sequence[str], timeout: float) -> tuple[int, str]:
            return await self._execute(container["name"], words, timeout)

        async def once() -> str | None:
            addresses = self._record.addresses if self._record is not None else ()
            return await probes.attempt(probe, container, addresses[0] if addresses else "", execute)

        settings = probes.ProbeSettings.of(probe)
        tasks.start(probes.watch(settings, once, result, ready), f"probe {self._name}/{container['name']}")

    def _unhealthy(self, container: Object, kind: str, why: str) -> None:
        """A liveness or startup probe crossed its threshold: the container is ended and restartPolicy decides."""

        async def kill() -> None:
            name = container["name"]
            await self._event("Unhealthy", f"{kind} probe failed: {why}", warning=True)
            await self._event("Killing", f"Container {name} failed {kind.lower()} probe, will be restarted")
            grace = float(self.pod["spec"].get("terminationGracePeriodSeconds") or DEFAULT_GRACE)
            await self._stop_container(name, time.monotonic() + grace)

        self._tasks.start(kill(), f"kill {self._name}")

    async def _execute(self, container: str, words: Sequence[str], timeout: float) -> tuple[int, str]:
        if self._sandbox is None:
            return 1, "the sandbox is gone"
        process = await asyncio.create_subprocess_exec(
            *self.entering,
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(self.container_environment(container)),
        )
        try:
            output, _ = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        return process.returncode or 0, output.decode(errors="replace")

    async def _stop_probes(self, name: str) -> None:
        tasks = self._probes.pop(name, None)
        if tasks is not None:
            await tasks.close()

    async def _stop_container(self, name: str, deadline: float) -> None:
        """SIGTERM, and SIGKILL at the deadline (which an earlier one of the pod overrides)."""
        sandbox = self._sandbox
        if sandbox is None:
            return
        identifier = f"{name}.{self._attempts.get(name, 0)}"
        await sandbox.signal(identifier, signal.SIGTERM)
        while self._sandbox is sandbox:
            state = sandbox.containers.get(identifier)
            left = min(deadline, self._deadline or deadline) - time.monotonic()
            if state is None or state.exit is not None:
                return
            if left <= 0:
                await sandbox.signal(identifier, signal.SIGKILL)
                return
            await asyncio.sleep(min(left, 0.05))

    # Status and end

    async def _report(self) -> str:
        """Write the status if it changed; returns the phase."""
        observed = self._observed()
        wanted = status.pod_status(self.pod, observed, self._node.addresses, time.time())
        if wanted != self._sent or self._lost(wanted):
            await self._patch(wanted)
            self._sent = wanted
        return str(wanted["phase"])

    def _lost(self, wanted: Object) -> bool:
        """Whether the API's object lacks what was written last, because somebody wrote over it."""
        current = {item["type"]: item.get("status") for item in (self.pod.get("status") or {}).get("conditions") or []}
        return any(current.get(item["type"]) != item["status"] for item in wanted["conditions"])

    def _observed(self) -> Observed:
        names = [container["name"] for container in self._containers()]
        record = self._record
        up = self._sandbox is not None and record is not None and record.ready
        return Observed(
            addresses=record.addresses if record is not None else (),
            sandbox=up,
            runs={name: self._runs(name) for name in names},
            restarts=dict(self._attempts),
            waiting=dict(self._waiting),
            ready=dict(self._ready),
            started=dict(self._started),
            ending=self._ending,
        )

    async def _patch(self, wanted: Object) -> None:
        metadata = self.pod["metadata"]
        body = {"metadata": {"uid": self.uid}, "status": wanted}
        await self._node.kube.patch(
            PODS, metadata["name"], body, metadata["namespace"], type=PatchType.STRATEGIC, subresource="status"
        )

    async def _end(self) -> None:
        """Stop everything, say how it ended, and let the API forget the pod. Raises: try again."""
        if not self._ending:
            self._ending = True
            for tasks in self._probes.values():
                await tasks.close()
            self._probes.clear()
        self._renew_deadline()
        running = [
            container["name"]
            for container in self._containers()
            if (run := self._last_run(container["name"])) is not None and run.exit is None
        ]
        if running and not self._gone:
            for name in running:
                await self._event("Killing", f"Stopping container {name}")
            watching = asyncio.ensure_future(self._follow_deadline())
            try:
                deadline = self._deadline or time.monotonic()
                await asyncio.gather(*(self._stop_container(name, deadline) for name in running))
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
        if self._sandbox is not None and not self._gone:
            await self._until_exits_are_known(running)
        if self._sandbox is not None and not self._gone and not self._finished:
            final = status.pod_status(self.pod, self._observed(), self._node.addresses, time.time())
            try:
                await self._patch(final)
            except NotFound:
                self._gone = True
        self._finished = True
        await self._remove_sandbox()
        await self._forget()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _renew_deadline(self) -> None:
        metadata = self.pod["metadata"]
        grace = 0.0 if self._gone else float(metadata.get("deletionGracePeriodSeconds") or 0)
        deadline = time.monotonic() + grace
        self._deadline = min(self._deadline or deadline, deadline)

    async def _follow_deadline(self) -> None:
        """A second delete may shorten the grace period while the first one is waited for."""
        while True:
            self._wake.clear()
            await self._wake.wait()
            self._renew_deadline()

    async def _until_exits_are_known(self, names: Sequence[str]) -> None:
        """After SIGKILL the exit status comes a moment later."""
        deadline = time.monotonic() + runtime.CALL_TIMEOUT
        while self._sandbox is not None and time.monotonic() < deadline:
            runs = [self._last_run(name) for name in names]
            if all(run is None or run.exit is not None for run in runs):
                return
            await asyncio.sleep(0.02)

    async def _forget(self) -> None:
        metadata = self.pod["metadata"]
        try:
            await self._node.kube.delete(PODS, metadata["name"], metadata["namespace"], uid=self.uid, grace_seconds=0)
        except NotFound:
            return
        except KubeError as error:
            if error.code != 409:  # a new pod of that name is none of ours
                raise

    @property
    def _name(self) -> str:
        metadata = self.pod["metadata"]
        return f"{metadata['namespace']}/{metadata['name']}"

    async def _event(self, reason: str, message: str, *, warning: bool = False) -> None:
        log.log(logging.WARNING if warning else logging.INFO, "pod %s: %s: %s", self._name, reason, message)
        await self._node.recorder.event(
            {"apiVersion": "v1", "kind": "Pod", **self.pod}, reason, message, "Warning" if warning else "Normal"
        )


async def remove_leftover(node: Node, directory: Path) -> None:
    """Clean up after a pod that the API does not know any more. Raises RuntimeFault, NetworkError."""
    record = SandboxRecord.read(directory)
    if record is None or record.node != node.name:
        return
    log.info("pod %s/%s is gone: removing what it left", record.namespace, record.name)
    try:
        sandbox = await Sandbox.connect(directory / "sandbox.sock")
        await sandbox.stop()
    except RuntimeFault:
        log.info("its sandbox had ended")
    if record.netns:
        await node.network.delete(record.attachment)
        await runtime.remove_network_namespace(record.netns)
    if node.cgroups is not None:
        cgroups.remove(node.cgroups / record.uid)
    shutil.rmtree(directory, ignore_errors=True)
