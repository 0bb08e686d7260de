"""A lab on an API server that is not its own: here the embedded one and its controllers, run apart on the loopback."""

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from vmnet.kube.api import NAMESPACES, NODES
from vmnet.kube.client import KubeClient
from vmnet.lab import demo, kubectl
from vmnet.lab.directory import start_time
from vmnet.lab.errors import LabError
from vmnet.lab.lab import Lab
from vmnet.lab.virt import subresources

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.timeout(240),
]

NAMESPACE = "red-namespace"
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "plain", "namespace": NAMESPACE},
    "spec": {
        "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "main", "image": "registry.k8s.io/pause:3.10"}],
    },
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """The external cluster: its kubeconfig, by the name ``localhost``, with files for what can be a file."""

    kubeconfig: Path


@asynccontextmanager
async def running(
    log: Path, *argv: str, descriptors: tuple[int, ...] = ()
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that ends with the block."""
    with open(log, "wb") as file:  # noqa: ASYNC230
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", *argv, stdout=file, stderr=file, pass_fds=descriptors
        )
    try:
        yield process
        assert process.returncode is None, log.read_text()  # noqa: ASYNC240
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 10)
            except TimeoutError:
                process.kill()
                await process.wait()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    own = tmp_path / "own-kubeconfig"
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port = listener.getsockname()[1]
        read, write = os.pipe()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(
                running(
                    tmp_path / "apiserver.log",
                    "vmnet.lab.apiserver",
                    *("--inherit-fd", str(listener.fileno()), "--certificates", str(tmp_path / "certificates")),
                    *("--kubeconfig", str(own), "--kubeconfig-url", f"https://localhost:{port}"),
                    *("--ready-fd", str(write)),
                    descriptors=(listener.fileno(), write),
                )
            )
            os.close(write)
            ready = await asyncio.wait_for(asyncio.to_thread(os.read, read, 1), 60)
            os.close(read)
            assert ready, (tmp_path / "apiserver.log").read_text()
            await stack.enter_async_context(
                running(tmp_path / "controllers.log", "vmnet.lab.controllers", "--kubeconfig", str(own))
            )
            yield Cluster(_with_files(own, tmp_path))


def _with_files(own: Path, directory: Path) -> Path:
    """The same kubeconfig as people have it: beside it a CA and a token file, named relative to it."""
    body = yaml.safe_load(own.read_text())
    (entry,) = body["clusters"]
    entry["cluster"].pop("certificate-authority-data")
    entry["cluster"]["certificate-authority"] = "certificates/ca.crt"
    (user,) = body["users"]
    (directory / "token").write_text(user["user"].pop("token") + "\n")
    user["user"]["tokenFile"] = "token"
    path = directory / "kubeconfig"
    path.write_text(yaml.safe_dump(body))
    return path


async def _kubectl(cluster: Cluster, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        str(kubectl.find()),
        *("--kubeconfig", str(cluster.kubeconfig), *arguments),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    return output.decode()


def _marked(lab: Lab) -> list[str]:
    """Processes, anywhere on the machine, that belong to the lab."""
    marker = f"VMNET_LAB_DIR={lab.directory.path}".encode()
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                if marker in (path / "environ").read_bytes().split(b"\0"):
                    found.append((path / "cmdline").read_text().replace("\0", " "))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return found


async def test_a_lab_on_an_external_api(cluster: Cluster) -> None:
    lab = Lab(f"t-{secrets.token_hex(4)}", 2, without=("virt",), kubeconfig=cluster.kubeconfig)
    try:
        state = await lab.up(dies_with_caller=True)
        status = await lab.status()
        running_there = {item["name"] for item in status["processes"]}
        assert "api-relay" in running_there
        assert running_there.isdisjoint({"apiserver", "controllers"})
        assert status["api"].startswith("https://localhost:")
        # The lab's own kubeconfig for the machine leads to the same cluster.
        assert await lab.kubectl("get", "nodes", "-o", "name") == "node/n1\nnode/n2\n"
        documents = list(yaml.safe_load_all(demo.MANIFEST.read_text()))
        wanted = [item for item in documents if item["kind"] != "VirtualMachine"]
        await lab.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all([*wanted, POD]))
        await lab.kubectl("wait", f"cudn/{demo.NETWORK}", "--for=condition=NetworkReady", "--timeout=60s")
        await lab.kubectl("wait", "-n", NAMESPACE, "pod/plain", "--for=condition=Ready", "--timeout=90s")
        pod = json.loads(await _kubectl(cluster, "get", "pod", "-n", NAMESPACE, "plain", "-o", "json"))
        networks = json.loads(pod["metadata"]["annotations"]["k8s.ovn.org/pod-networks"])
        addresses = networks[f"{NAMESPACE}/{demo.NETWORK}"]["ip_addresses"]
        assert any(text.startswith("192.168.") for text in addresses)
        # As virtctl would, where nobody serves its group.
        machine = next(item for item in documents if item["kind"] == "VirtualMachine")
        machine["spec"]["runStrategy"] = "Halted"
        await lab.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(machine))
        name = machine["metadata"]["name"]
        await demo.Scenario(lab, lambda _: None).subresource(NAMESPACE, name, "start")
        strategy = await lab.kubectl("get", "-n", NAMESPACE, "vm", name, "-o", "jsonpath={.spec.runStrategy}")
        assert strategy == "Always"
        with pytest.raises(LabError, match="VM is not running"):
            await subresources.on_machine(lab.kubeconfig, NAMESPACE, name, "migrate")
        assert state.relay
    finally:
        await lab.down()
    assert _marked(lab) == []
    assert start_time(state.relay) is None
    assert not lab.directory.path.exists()
    assert await _kubectl(cluster, "get", "nodes", "-o", "name") == "node/n1\nnode/n2\n"


async def test_the_relay_ends_with_a_lab_that_is_killed_and_its_own_end_is_reported(cluster: Cluster) -> None:
    without = ("virt", "agent", "kubelet")
    lab = Lab(f"t-{secrets.token_hex(4)}", 1, without=without, kubeconfig=cluster.kubeconfig)
    try:
        state = await lab.up()
        os.kill(state.init, signal.SIGKILL)
        # Ours to reap: the return says that it has ended.
        assert (await asyncio.wait_for(asyncio.to_thread(os.waitpid, state.relay, 0), 20))[0] == state.relay
        state = await lab.up()
        failing = asyncio.ensure_future(lab.failure())
        os.kill(state.relay, signal.SIGKILL)
        await lab.exec("fabric", [str(kubectl.find()), "get", "--raw", "/version"])
        failed = await asyncio.wait_for(failing, 30)
        assert (failed["name"], failed["exit"]) == ("api-relay", 1)
        assert "the relay on the machine has ended" in failed["tail"]
    finally:
        await lab.down()


async def test_a_node_that_is_not_the_labs_is_not_overwritten(cluster: Cluster) -> None:
    kube = await KubeClient.connect(cluster.kubeconfig, user_agent="test")
    try:
        await kube.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
        assert (await kube.get(NAMESPACES, "default"))["metadata"]["name"] == "default"
    finally:
        await kube.close()
    lab = Lab(f"t-{secrets.token_hex(4)}", 1, kubeconfig=cluster.kubeconfig)
    with pytest.raises(LabError, match="node 'n1' that is not a lab's"):
        await lab.up()
    assert not lab.directory.path.exists()


def _kubeconfig(**changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        # Port 1 of the loopback: nobody listens there.
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    return {**body, **changes}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (None, "cannot be read: No such file"),
        ("- a list", "is not a kubeconfig"),
        (_kubeconfig(**{"current-context": ""}), "current-context is not set"),
        (_kubeconfig(**{"current-context": "other"}), "contexts has no usable entry 'other'"),
        (_kubeconfig(users=[]), "users has no usable entry 'u'"),
        (_kubeconfig(users=[{"name": "u", "user": {"exec": {"command": "x"}}}]), "user 'u' uses user.exec"),
        (_kubeconfig(users=[{"name": "u", "user": {"client-key": "absent.pem"}}]), "user.client-key: .*absent.pem"),
        (_kubeconfig(clusters=[{"name": "c", "cluster": {"server": "nowhere"}}]), "cluster.server 'nowhere'"),
        (_kubeconfig(), "https://127.0.0.1:1 of .* cannot be used"),
    ],
    ids=["absent", "list", "no context", "unknown context", "no user", "exec", "no key", "no URL", "unreachable"],
)
async def test_bad_kubeconfigs_are_refused_before_anything_is_made(tmp_path: Path, body: Any, says: str) -> None:
    path = tmp_path / "kubeconfig"
    if body is not None:
        path.write_text(body if isinstance(body, str) else yaml.safe_dump(body))
    lab = Lab(f"t-{secrets.token_hex(4)}", 1, kubeconfig=path)
    with pytest.raises(LabError, match=says) as caught:
        await lab.up()
    assert caught.value.next_step
    assert not lab.directory.path.exists()
