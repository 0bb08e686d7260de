"""PID 1 of the lab, and the supervisor below it.

``vmnet.lab.launch`` starts this module as the first process of new PID, mount, network, UTS and IPC namespaces. PID 1
only reaps; its child builds the lab. When either ends, however it ends, the kernel ends every process in the PID
namespace, and with the last of them every network namespace, link and mount.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import yaml

from vmnet.lab import cgroups, control, kubectl, namespaces, nodes, topology
from vmnet.lab.container import CREDENTIALS
from vmnet.lab.control import Body
from vmnet.lab.directory import LabDirectory
from vmnet.lab.errors import LabError
from vmnet.lab.guest import probe
from vmnet.lab.kubelet import components
from vmnet.lab.nodes import Held
from vmnet.lab.processes import Processes, Specification, Status, python_module
from vmnet.runtime.tasks import first_failure

log = logging.getLogger(__name__)

REPOSITORY: Final = Path(__file__).parents[2]
DEPLOY: Final = REPOSITORY / "deploy"
WEBHOOK: Final = DEPLOY / "controller" / "webhook.yaml"
RIGHTS: Final = (
    DEPLOY / "base" / "namespace.yaml",
    *(DEPLOY / component / "rbac.yaml" for component in ("controller", "agent")),
    DEPLOY / "users",
    DEPLOY / "admission",
)
"""What the components may do, and what they may not: the lab's run with a cluster's rights, as its service accounts."""
AGENT: Final = DEPLOY / "agent" / "daemonset.yaml"
CONTROLLER: Final = DEPLOY / "controller" / "deployment.yaml"
CRDS: Final = (REPOSITORY / "deploy" / "crds", Path(__file__).parent / "data" / "crds")
COMPONENTS: Final = ("apiserver", "controllers", "controller", "agent", "kubelet", "proxy", "dns", "virt", "outside")
CLUSTER_DNS: Final = Path(__file__).parent / "data" / "cluster-dns.yaml"
START_TIMEOUT: Final = 240.0
"""Seconds; on an idle machine it takes about ten."""
_REVIVALS: Final = 5
"""A leader that loses its lease, on a machine too busy to renew it, is started again this often."""


def main() -> None:
    """Entry point: fork the supervisor, reap until it ends, and end with it."""
    arguments = _parser().parse_args()
    child = os.fork()
    if child == 0:
        sys.exit(asyncio.run(_supervise(arguments)))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: os.kill(child, received))
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vmnet.lab.init")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--api-port", type=int, help="port of --listener on the machine's loopback")
    parser.add_argument("--listener", type=int, help="descriptor of the socket the API inherits")
    parser.add_argument("--external-api", metavar="URL", default="", help="instead of both: who serves the API")
    parser.add_argument("--progress", type=int, required=True, help="descriptor that steps are reported on")
    parser.add_argument("--without", action="append", default=[], choices=COMPONENTS)
    return parser


async def _supervise(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    progress = Progress(arguments.progress)
    supervisor = Supervisor(arguments, progress)
    try:
        await supervisor.run()
    except (LabError, OSError, ExceptionGroup) as failure:
        error = first_failure(failure)
        log.error("the lab ends", exc_info=None if isinstance(error, LabError) else error)
        progress.failed(error if isinstance(error, LabError) else LabError(f"{type(error).__name__}: {error}"))
        return 1
    return 0


class Progress:
    """Tells the starting command what is being done: a JSON object per line."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._pipe = os.fdopen(descriptor, "w")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Report the beginning and, if it succeeds, the end of a step."""
        started = time.monotonic()
        self._tell({"step": name, "state": "begun"})
        log.info("%s", name)
        yield
        seconds = round(time.monotonic() - started, 2)
        log.info("%s: %.2f s", name, seconds)
        self._tell({"step": name, "state": "done", "seconds": seconds})

    def ready(self) -> None:
        """All is up; nothing more will be told."""
        self._tell({"ready": True})
        self._pipe.close()

    def failed(self, error: LabError) -> None:
        """The lab ends now."""
        if not self._pipe.closed:
            with suppress(LabError):
                self._tell({"error": str(error), "next_step": error.next_step})

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            print(json.dumps(message), file=self._pipe, flush=True)
        except BrokenPipeError:
            # Killed before it noted which processes are this lab: nobody could ever end it.
            raise LabError("the command that started the lab ended before the lab was ready") from None


class Supervisor:
    """Builds the lab and serves its control socket until it is told to stop."""

    def __init__(self, arguments: argparse.Namespace, progress: Progress) -> None:
        self._directory = LabDirectory(arguments.directory)
        self._hosts = topology.nodes(arguments.nodes)
        self._external: str = arguments.external_api
        self._api_port: int = arguments.api_port
        self._listener: int = arguments.listener
        self._without = frozenset(arguments.without)
        self._progress = progress
        self._held: dict[str, Held] = {}
        self._stop = asyncio.Event()
        self._failure: asyncio.Future[Status] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Until told to stop. Raises LabError (in a group) when the lab cannot be made."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        async with asyncio.TaskGroup() as group:
            self._processes = Processes(self._directory, self._held, group)
            self._processes.observe(self._ended)
            server = await control.serve(self._directory.control_socket, self._commands())
            building = group.create_task(self._build(), name="build")
            await self._stop.wait()
            log.info("stopping")
            building.cancel()
            server.close()
            await self._processes.stop_all()

    def _ended(self, status: Status) -> None:
        if status.failed and not self._stop.is_set():
            log.error("process %s on %s ended by itself, exit status %s", status.name, status.host, status.exit)
            if not self._failure.done():
                self._failure.set_result(status)

    # Building

    async def _build(self) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await self._build_in_order()
        except TimeoutError:
            raise LabError(f"the lab was not up within {START_TIMEOUT:g} s", "see the logs") from None
        self._progress.ready()

    async def _build_in_order(self) -> None:
        with self._progress.step("network: fabric, nodes and the outside host"):
            await self._make_network()
        if "outside" not in self._without:
            outside = Specification("outside", topology.OUTSIDE, python_module("vmnet.lab.outside"))
            await self._start(outside)
            if "virt" not in self._without:
                # The other end of streams that leave the cluster.
                await self._start(
                    Specification("outside-probe", topology.OUTSIDE, (str(probe.probe_binary()), "serve"))
                )
        if "apiserver" not in self._without:
            with self._progress.step("Kubernetes API"):
                await self._start_api()
            with self._progress.step("custom resource definitions"):
                await self._apply_definitions()
            with self._progress.step("controllers, agents, kubelets"):
                await self._start_components()
                await self._until_nodes_are_ready()
            with self._progress.step("agents ready"):
                await self._until_agents_are_ready()
            if self._has_dns:
                with self._progress.step("cluster DNS"):
                    await self._start_dns()
        if "outside" not in self._without:
            await self._unless_failed(_until_outside_answers(), "the outside host")

    async def _make_network(self) -> None:
        namespaces.make_mounts_private()
        socket.sethostname(f"vmnet-{self._directory.name}")
        nodes.make_mount_points()
        nodes.private_run(self._directory.path)
        cgroups.mount_sys()
        await topology.run_batch(topology.fabric_batch())
        async with asyncio.TaskGroup() as group:
            for host in (*self._hosts, topology.OUTSIDE_HOST):
                group.create_task(self._make_host(host))

    async def _make_host(self, host: topology.Host) -> None:
        held = await nodes.hold(host.name, self._directory)
        self._held[host.name] = held
        await topology.run_batch(topology.join_batch(host, held.pid))
        await topology.run_batch(topology.host_batch(host, self._hosts), held.prefix)
        if host != topology.OUTSIDE_HOST:
            await topology.load_rules(topology.masquerade_rules(), held.prefix)
            configuration = topology.network_configuration(host)
            topology.write_network_configuration(configuration, self._directory.node(host.name) / "etc-cni-net.d")

    async def _start_api(self) -> None:
        ready_read, ready_write = os.pipe()
        try:
            await self._start(self._relay(ready_write) if self._external else self._embedded_api(ready_write))
        finally:
            os.close(ready_write)
        await self._unless_failed(_read_byte(ready_read), "the API server")
        if not self._external:
            self._write_kubeconfigs()

    def _relay(self, ready: int) -> Specification:
        socket_path = str(self._directory.api_socket)
        argv = python_module("vmnet.lab.relay", "fabric", "--socket", socket_path, "--ready-fd", str(ready))
        return Specification("api-relay", topology.FABRIC, argv, descriptors=(ready,))

    def _embedded_api(self, ready: int) -> Specification:
        return Specification(
            "apiserver",
            topology.FABRIC,
            python_module(
                "vmnet.lab.apiserver",
                "--listen",
                f"{topology.FABRIC_IPV4}:{topology.API_PORT}",
                "--inherit-fd",
                str(self._listener),
                "--certificates",
                str(self._directory.certificates),
                "--kubeconfig",
                str(self._directory.kubeconfig),
                *("--service-cidr", ",".join(str(found) for found in topology.SERVICE_RANGES)),
                *("--audit-log", str(self._directory.audit)),
                *self._accounts(),
                *self._mounts(),
                "--ready-fd",
                str(ready),
            ),
            descriptors=(self._listener, ready),
        )

    def _accounts(self) -> list[str]:
        accounts = {"vmnet-controller": "controller"}
        accounts |= {f"vmnet-agent@{host.name}": f"agent-{host.name}" for host in self._hosts}
        return [
            word
            for account, process in accounts.items()
            for word in ("--account", f"{components.NAMESPACE}/{account}={self._directory.account(process)}")
        ]

    def _kubeconfig(self, process: str) -> str:
        """What one of our components connects with: its service account's, or what an external API's user gave us."""
        return str(self._directory.inner_kubeconfig if self._external else self._directory.account(process))

    def _mounts(self) -> list[str]:
        """What virtctl calls is served by the API server itself: the lab needs no second TLS server for it."""
        if "virt" in self._without:
            return []
        return ["--mount", "vmnet.lab.virt.subresources", "--mount-kubeconfig", str(self._directory.inner_kubeconfig)]

    def _write_kubeconfigs(self) -> None:
        """The same credentials for both sides; only the address differs."""
        text = self._directory.kubeconfig.read_text()
        for path, server in (
            (self._directory.kubeconfig, f"https://127.0.0.1:{self._api_port}"),
            (self._directory.inner_kubeconfig, f"https://{topology.FABRIC_IPV4}:{topology.API_PORT}"),
        ):
            body = yaml.safe_load(text)
            for item in body["clusters"]:
                item["cluster"]["server"] = server
            temporary = path.with_name(f".{path.name}")
            temporary.touch(mode=0o600)
            temporary.write_text(yaml.safe_dump(body))
            temporary.rename(path)

    async def _apply_definitions(self) -> None:
        paths = [path for folder in CRDS for path in sorted(folder.glob("*.yaml"))]
        files = [word for path in paths if path.name != "kustomization.yaml" for word in ("-f", str(path))]
        if files:
            await self._kubectl("apply", "--server-side", "--force-conflicts", *files)
            await self._kubectl("wait", "--for=condition=Established", "--timeout=30s", *files)
        if not self._external:
            files = [word for path in RIGHTS for word in _files(path)]
            await self._kubectl("apply", "--server-side", *files)
        if not self._external and "controller" not in self._without:
            await self._kubectl("apply", "-f", str(WEBHOOK))

    async def _start_components(self) -> None:
        inner = str(self._directory.inner_kubeconfig)
        fabric = (
            ("controllers", python_module("vmnet.lab.controllers", "--kubeconfig", inner)),
            (
                "controller",
                self._confined(
                    CONTROLLER,
                    "controller",
                    "controller",
                    # As in a cluster, where a kubelet asks it.
                    *("--metrics-address", f"0.0.0.0:{components.CONTROLLER_PORT}"),
                    *self._webhook(),
                ),
            ),
            ("virt", python_module("vmnet.lab.virt", "controller", "--kubeconfig", inner)),
        )
        wanted = []
        for component, argv in fabric:
            name = "virt-controller" if component == "virt" else component
            revived = _REVIVALS if component == "controller" else 0
            wanted.append((component, Specification(name, topology.FABRIC, argv, revived=revived)))
        for host in self._hosts:
            wanted += self._node_components(host, inner)
        async with asyncio.TaskGroup() as group:
            for component, specification in wanted:
                if component not in self._without:
                    group.create_task(self._start(specification))

    def _confined(self, manifest: Path, process: str, *words: str) -> tuple[str, ...]:
        """A component of ours, as the container that its manifest describes."""
        secret = f"{self._kubeconfig(process)}={CREDENTIALS}"
        started = python_module("vmnet.lab.container", str(manifest), "--secret", secret, "--")
        return (*started, *python_module("vmnet.cmd", *words, "--kubeconfig", CREDENTIALS))

    def _webhook(self) -> tuple[str, ...]:
        """The controller's options. An API server of another cluster cannot reach it here."""
        if self._external:
            return ()
        address = f"{topology.FABRIC_IPV4}:{topology.WEBHOOK_PORT}"
        return ("--webhook-address", address, "--webhook-url", f"https://{address}")

    def _node_components(self, host: topology.Host, kubeconfig: str) -> list[tuple[str, Specification]]:
        node = ("--node-name", host.name, "--kubeconfig", kubeconfig)
        node_words = ("--node", host.name, "--kubeconfig", kubeconfig)
        agent = self._confined(
            AGENT,
            f"agent-{host.name}",
            "agent",
            *("--node-name", host.name),
            # In a cluster it is that of the node's process 1.
            *("--node-mounts", f"/proc/{self._held[host.name].pid}/ns/mnt"),
            "--metrics-address",
            f"{host.ipv4}:{topology.METRICS_PORT}",
            "--localnet",
            f"{topology.PHYSICAL_NETWORK}={topology.PHYSICAL_BRIDGE}",
            "--dns-upstream",
            str(topology.OUTSIDE_HOST.ipv4),
            # As in a cluster, where it finds by itself that it is in one.
            *("--install-cni", "yes"),
        )
        kubelet = python_module(
            "vmnet.lab.kubelet",
            *node_words,
            *("--address", str(host.ipv4), "--address", str(host.ipv6)),
            *(("--cluster-dns", str(topology.CLUSTER_DNS)) if self._has_dns else ()),
            *(word for subnet in topology.pod_subnets(host) for word in ("--pod-cidr", subnet)),
        )
        handler = python_module("vmnet.lab.virt", "handler", *node)
        own = cgroups.kubelet(self._directory.name, host.name)
        return [
            ("agent", Specification(f"agent-{host.name}", host.name, agent)),
            (
                "kubelet",
                Specification(f"kubelet-{host.name}", host.name, kubelet, cgroup=own if cgroups.make(own) else None),
            ),
            ("proxy", Specification(f"proxy-{host.name}", host.name, python_module("vmnet.lab.proxy", *node_words))),
            ("virt", Specification(f"virt-handler-{host.name}", host.name, handler)),
        ]

    @property
    def _has_dns(self) -> bool:
        """It is a Service with a pod, so it needs what makes these; an external cluster may have its own."""
        return not self._external and not self._without & {"dns", "proxy", "kubelet", "controllers", "apiserver"}

    async def _start_dns(self) -> None:
        await self._kubectl("apply", "-f", str(CLUSTER_DNS))
        rollout = ("rollout", "status", "-n", "kube-system", "deployment/coredns", "--timeout=60s")
        await self._unless_failed(self._kubectl(*rollout, timeout=70), "the cluster DNS")

    async def _until_nodes_are_ready(self) -> None:
        if "kubelet" in self._without:
            return
        names = [f"node/{host.name}" for host in self._hosts]
        for name in names:
            # One at a time: of several that are missing kubectl makes one error that it does not wait for.
            await self._unless_failed(
                self._kubectl("wait", "--for=create", "--timeout=60s", name, timeout=70), "the kubelets"
            )
        await self._unless_failed(
            self._kubectl("wait", "--for=condition=Ready", "--timeout=60s", *names, timeout=70), "the kubelets"
        )

    async def _until_agents_are_ready(self) -> None:
        if "agent" in self._without:
            return
        async with asyncio.TaskGroup() as group:
            for host in self._hosts:
                group.create_task(self._unless_failed(_until_ready(host), f"the agent on {host.name}"))

    async def _start(self, specification: Specification) -> None:
        await self._processes.start(specification)

    async def _kubectl(self, *arguments: str, timeout: float = 60) -> str:
        status, output, errors = await self._processes.run(
            topology.FABRIC, (str(kubectl.find()), *arguments), timeout=timeout
        )
        if status != 0:
            raise LabError(f"kubectl {' '.join(arguments[:2])}: {errors.decode(errors='replace').strip()}")
        return output.decode()

    async def _unless_failed(self, what: Any, name: str) -> None:
        """Await ``what``, but give up as soon as a process of the lab ends by itself. Raises LabError."""
        task = asyncio.ensure_future(what)
        try:
            await asyncio.wait({task, self._failure}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and task.exception() is not None:
                # A closed pipe or a refused connection is often the first sign of an exit that is noticed next.
                await asyncio.wait({self._failure}, timeout=1)
            if not self._failure.done():
                await task
                return
        finally:
            task.cancel()
        status = self._failure.result()
        raise LabError(
            f"waiting for {name}: process {status.name} ended by itself, exit status {status.exit}\n"
            + self._directory.log_tail(status.name),
            f"its log: {status.log}",
        )

    # Control

    def _commands(self) -> Mapping[str, control.Command]:
        return {
            "status": self._command_status,
            "restart": self._command_restart,
            "signal": self._command_signal,
            "exec": self._command_exec,
            "spawn": self._command_spawn,
            "wait": self._command_wait,
            "failure": self._command_failure,
            "stop": self._command_stop,
        }

    async def _command_status(self, _: Mapping[str, Any]) -> Body:
        hosts = [{"name": topology.FABRIC, "ipv4": str(topology.FABRIC_IPV4), "ipv6": str(topology.FABRIC_IPV6)}]
        hosts += [
            {"name": host.name, "ipv4": str(host.ipv4), "ipv6": str(host.ipv6)}
            for host in (*self._hosts, topology.OUTSIDE_HOST)
        ]
        statuses = [{**asdict(item), "failed": item.failed} for item in self._processes.statuses()]
        api = self._external or f"https://127.0.0.1:{self._api_port}"
        return {"hosts": hosts, "processes": statuses, "api": api}

    async def _command_restart(self, body: Mapping[str, Any]) -> Body:
        return asdict(await self._processes.restart(body["name"]))

    async def _command_signal(self, body: Mapping[str, Any]) -> Body:
        self._processes.kill(body["name"], int(body["signal"]))
        return {}

    async def _command_exec(self, body: Mapping[str, Any]) -> Body:
        status, output, errors = await self._processes.run(
            body["host"], [str(word) for word in body["argv"]], float(body["seconds"]), body.get("stdin", "").encode()
        )
        return {"exit": status, "stdout": output.decode(errors="replace"), "stderr": errors.decode(errors="replace")}

    async def _command_spawn(self, body: Mapping[str, Any]) -> Body:
        argv = tuple(str(word) for word in body["argv"])
        return asdict(await self._processes.start(Specification(body["name"], body["host"], argv)))

    async def _command_wait(self, body: Mapping[str, Any]) -> Body:
        return asdict(await self._processes.wait(body["name"], float(body["seconds"])))

    async def _command_failure(self, _: Mapping[str, Any]) -> Body:
        status = await asyncio.shield(self._failure)
        return {**asdict(status), "tail": self._directory.log_tail(status.name)}

    async def _command_stop(self, _: Mapping[str, Any]) -> Body:
        self._stop.set()
        return {}


def _files(path: Path) -> list[str]:
    """kubectl's words for a manifest or for all of a folder."""
    found = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    return [word for item in found if item.name != "kustomization.yaml" for word in ("-f", str(item))]


async def _read_byte(descriptor: int) -> None:
    """Wait until a process has written to the pipe. Raises LabError when it closed it without."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    try:
        if not await reader.read(1):
            raise LabError("the API server ended before it was ready")
    finally:
        transport.close()


async def _until_outside_answers() -> None:
    """Poll its DNS port, which it opens last."""
    while True:
        try:
            _, writer = await asyncio.open_connection(str(topology.OUTSIDE_HOST.ipv6), 53)
        except OSError:
            await asyncio.sleep(0.05)  # not listening yet
        else:
            writer.close()
            return


async def _until_ready(host: topology.Host) -> None:
    """Poll the agent's /readyz until it says 200."""
    while True:
        try:
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_connection(str(host.ipv4), topology.METRICS_PORT)
                try:
                    writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
                    line = await reader.readline()
                finally:
                    writer.close()
            if b" 200 " in line:
                return
        except OSError:
            pass  # not listening yet; TimeoutError is an OSError too
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    main()
