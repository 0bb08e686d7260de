"""One agent on the real kernel: its networks are broken, or it is uninstalled. A program for namespaces of its own.

``python self_test_node.py CASE`` exits 0 when the case holds, and prints what was done.
"""

# Files of a private /run have no events to wait for.
# ruff: noqa: ASYNC240

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest

from vmnet import metrics
from vmnet.agent import self_test
from vmnet.agent.agent import Agent
from vmnet.agent.cluster import Stores
from vmnet.kernel.linux import LinuxKernel
from vmnet.kube.api import (
    EVENTS,
    NADS,
    NAMESPACES,
    NODES,
    PODS,
)
from vmnet.kube.fake import FakeKube
from vmnet.model import addresses, configuration, names
from vmnet.model.configuration import Configuration
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role

DEADLINE = 60
NETWORK = Network(
    "blue_net",
    NetworkId(7),
    role=Role.PRIMARY,
    subnets=(addresses.network("192.168.0.0/16"), addresses.network("fd20::/64")),
)
INSIDE = ["ip", "-n", NETWORK.namespace]
NFT = ["ip", "netns", "exec", NETWORK.namespace, "nft"]
BREAKAGES: tuple[tuple[str, list[str]], ...] = (
    ("bridge", [*INSIDE, "link", "del", "br0"]),
    ("bridge", [*INSIDE, "link", "set", "br0", "down"]),
    ("gateway", [*INSIDE, "addr", "del", "192.168.0.1/16", "dev", "br0"]),
    ("gateway", [*INSIDE, "addr", "del", "fd20::1/64", "dev", "br0"]),
    ("tunnel", [*INSIDE, "link", "del", "vx0"]),
    ("tunnel", [*INSIDE, "link", "set", "vx0", "nomaster"]),
    ("tunnel", [*INSIDE, "link", "del", "rt0"]),
    ("join", [*INSIDE, "link", "del", "up0"]),
    ("join", [*INSIDE, "route", "del", "default"]),
    ("tables", [*NFT, "delete", "table", "netdev", "vmnet"]),
    ("tables", [*NFT, "delete", "table", "inet", "vmnet-services"]),
    ("tables", [*NFT, "flush", "ruleset"]),
    ("port", [*INSIDE, "link", "set", names.port_interface("uid-a", names.PRIMARY_INTERFACE), "nomaster"]),
)


def run(*words: str, **more: Any) -> str:
    done = subprocess.run(words, capture_output=True, text=True, **more)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


async def until(what: str, look: Callable[[], Any]) -> Any:
    try:
        async with asyncio.timeout(DEADLINE):
            while not (found := look()):
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"in vain waited until {what}") from None
    return found


def cluster() -> FakeKube:
    kube = FakeKube()
    kube.seed(
        NODES,
        {
            "metadata": {"name": "n1", "annotations": {names.NODE_NUMBER_ANNOTATION: "1"}},
            "status": {"addresses": [{"type": "InternalIP", "address": "172.30.0.11"}]},
        },
    )
    kube.seed(NAMESPACES, {"metadata": {"name": "blue", "labels": {names.PRIMARY_NETWORK_LABEL: ""}}})
    number = {names.NETWORK_ID_ANNOTATION: str(NETWORK.id)}
    nad = {"namespace": "blue", "name": "net", "annotations": number}
    kube.seed(NADS, {"metadata": nad, "spec": {"config": NETWORK.to_nad_config("blue/net")}})
    allocated = {
        "blue/net": {
            "ip_addresses": ["192.168.0.5/16", "fd20::5/64"],
            "mac_address": "0a:58:c0:a8:00:05",
            "role": "primary",
        }
    }
    metadata = {
        "namespace": "blue",
        "name": "a",
        "uid": "uid-a",
        "annotations": {names.POD_NETWORKS_ANNOTATION: json.dumps(allocated)},
    }
    kube.seed(PODS, {"metadata": metadata, "spec": {"nodeName": "n1"}, "status": {"phase": "Running"}})
    return kube


async def attach() -> None:
    """What a container runtime does, by way of the plugin."""
    environment = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "container-a",
        "CNI_NETNS": "/run/netns/pod",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": "K8S_POD_NAMESPACE=blue;K8S_POD_NAME=a;K8S_POD_UID=uid-a",
    }
    config = {"cniVersion": "1.0.0", "name": "cluster", "type": "vmnet", "prevResult": {"cniVersion": "1.0.0"}}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vmnet.cni.shim"),
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(DEADLINE):
        output, _ = await process.communicate(json.dumps(config).encode())
    assert process.returncode == 0, output


def found(part: str, network: str = NETWORK.name) -> float:
    return metrics.NETWORK_FAULTS.labels(network, "n1", part)._value.get()


def healthy() -> bool:
    line = f'vmnet_network_healthy{{network="{NETWORK.name}",node="n1"}} 1.0'
    return line in generate_latest(metrics.REGISTRY).decode().splitlines()


async def broken(agent: Agent, part: str, words: list[str]) -> None:
    before = found(part)
    run(*words)
    await until(f"{words} is found", lambda: found(part) > before)
    await until(f"{words} is mended", healthy)
    assert agent.networks() == {NETWORK.name: []}
    for address in ("192.168.0.1", "fd20::1"):
        # Duplicate address detection and the like may take a moment; the pod's own stack tries again.
        run("ip", "netns", "exec", "pod", "ping", "-c", "1", "-w", "20", address)
    print("mended", part, *words)


def prepare() -> None:
    for words in (
        "link add eth0 type veth peer name wire",
        "link set wire up",
        "addr add 172.30.0.11/24 dev eth0",
        "link set eth0 up",
        "route add default via 172.30.0.1 dev eth0",
        "netns add pod",
    ):
        run("ip", *words.split())


@asynccontextmanager
async def agent_of_n1(kube: FakeKube) -> AsyncIterator[Agent]:
    """An agent at work, with a pod on its network."""
    settings = Configuration(
        agent=configuration.Agent(node_name="n1", kubelet_cgroup="", self_test_seconds=1),
    )
    # This node has nothing else to do.
    self_test.SHARE = 0.5
    self_test.MEND_SECONDS = 0.1
    kernel = LinuxKernel()
    agent = Agent(settings, kernel, kube, Stores.watching(kube))
    assert agent.missing()[0].startswith("not listed yet: ")
    assert "the node's networks are being taken over" in agent.missing()
    working = asyncio.create_task(agent.run())
    try:
        await until("the agent is ready", lambda: agent.not_ready() is None)
        await attach()
        await until("the network is tested", healthy)
        yield agent
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await kernel.close()


async def mended() -> None:
    kube = cluster()
    async with agent_of_n1(kube) as agent:
        for part, words in BREAKAGES:
            await broken(agent, part, words)
        events = [item["reason"] for item in (await kube.list(EVENTS)).items]
        assert {"NetworkBroken", "NetworkMended"} <= set(events), events

        before = found("tables", "")
        run("nft", "delete", "table", "inet", "vmnet")
        await until("the node is not ready", lambda: found("tables", "") > before)
        await until("the node is ready again", lambda: agent.not_ready() is None)
        print("mended the node")

        run("ip", "netns", "del", NETWORK.namespace)
        says = await until("the loss is told", lambda: [text for text in agent.networks()[NETWORK.name] if text])
        assert "blue/a" in says[0] or "gone" in says[0], says
        assert not healthy()
        assert agent.not_ready() is None
        print("told of the loss:", *says)


def uninstall(*more: str) -> tuple[int, dict[str, list[str]]]:
    """``vmnet uninstall --node``: its exit status, and what it says."""
    words = ("uninstall", "--node", "-o", "json", "--cni-conf-dir", "/run/net.d", "--cni-bin-dir", "/run/bin", *more)
    done = subprocess.run([sys.executable, "-m", "vmnet.cmd", *words], capture_output=True, text=True)
    print(words, done.stdout, done.stderr)
    return done.returncode, json.loads(done.stdout or "{}")


def devices() -> set[str]:
    return {item["ifname"] for item in json.loads(run("ip", "-j", "link", "show"))}


async def uninstalled() -> None:
    before = devices()
    for name in ("net.d", "bin"):
        Path("/run", name).mkdir()
    async with agent_of_n1(cluster()):
        assert uninstall()[0] == 1, "while an agent runs"
        Path("/run/vmnet/cni-deleted").mkdir(exist_ok=True)
    assert devices() > before
    status, said = uninstall()
    assert status == 1
    assert "container" in said["left"][0], said
    assert "inet vmnet" in run("nft", "list", "tables"), "what guards the networks stays while they do"
    status, said = uninstall("--with-ports")
    assert any("default route" in item for item in said["kept"]), said
    assert devices() == before
    assert run("nft", "list", "ruleset") == ""
    assert run("ip", "netns", "list").split() == ["pod"]
    assert [item["ifname"] for item in json.loads(run("ip", "-n", "pod", "-j", "link", "show"))] == ["lo"]
    assert list(Path("/run/vmnet").iterdir()) == []
    assert uninstall() == (0, {"done": [], "left": [], "kept": []})


if __name__ == "__main__":
    Path("/run/vmnet").mkdir(exist_ok=True)
    prepare()
    asyncio.run({"mended": mended, "uninstalled": uninstalled}[sys.argv[1]]())
