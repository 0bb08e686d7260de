"""The lock on eth0 of pods with a network of their own, in a lab of two nodes: the agents, the kubelets and kubectl."""

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio

from vmnet.lab.errors import LabError
from vmnet.lab.lab import Lab
from vmnet.model import names
from vmnet.plan import lock

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

AGNHOST = "registry.k8s.io/e2e-test-images/agnhost:2.53"
SECONDS = 120.0


def namespace(name: str) -> dict[str, Any]:
    labels = {names.PRIMARY_NETWORK_LABEL: ""}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def network(where: str, *subnets: str) -> dict[str, Any]:
    return {
        "apiVersion": "k8s.ovn.org/v1",
        "kind": "UserDefinedNetwork",
        "metadata": {"name": "tenant", "namespace": where},
        "spec": {"topology": "Layer2", "layer2": {"role": "Primary", "subnets": list(subnets)}},
    }


def pod(where: str, name: str, node: str, **annotations: str) -> dict[str, Any]:
    probe = {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1, "failureThreshold": 3}
    container = {
        "name": "main",
        "image": AGNHOST,
        "args": ["netexec", "--http-port=8080", "--udp-port=8081"],
        "readinessProbe": probe,
        "livenessProbe": probe,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": where, "annotations": annotations},
        "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [container]},
    }


class Cluster:
    """The lab, and what the tests ask of it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    async def apply(self, *items: dict[str, Any]) -> None:
        await self.lab.kubectl("apply", "-f", "-", stdin="\n".join(json.dumps(item) for item in items))

    async def ready(self, where: str, *pods: str) -> None:
        targets = [f"pod/{name}" for name in pods]
        try:
            await self.lab.kubectl("wait", "-n", where, "--for=condition=Ready", "--timeout=120s", *targets)
        except LabError as error:
            raise AssertionError(f"{error}\n{self.tails()}") from None

    async def get(self, *words: str) -> Any:
        return json.loads(await self.lab.kubectl("get", *words, "-o", "json"))

    async def default_addresses(self, where: str, name: str) -> tuple[str, ...]:
        item = await self.get("pod", "-n", where, name)
        entry = json.loads(item["metadata"]["annotations"][names.POD_NETWORKS_ANNOTATION])["default"]
        assert entry["role"] == "infrastructure-locked"
        return tuple(text.partition("/")[0] for text in entry["ip_addresses"])

    async def curl(self, source: tuple[str, ...], address: str, port: int = 8080) -> bool:
        host = f"[{address}]" if ":" in address else address
        return await self.run(source, "curl", "-s", "-m", "2", "-o", "/dev/null", f"http://{host}:{port}/hostname")

    async def ping(self, source: tuple[str, ...], address: str) -> bool:
        return await self.run(source, "ping", "-c", "1", "-W", "2", address)

    async def run(self, source: tuple[str, ...], *argv: str) -> bool:
        """Whether a command succeeds on a node, or in a pod (its namespace and name)."""
        if len(source) == 1:
            return (await self.lab.exec(source[0], list(argv))).exit == 0
        try:
            await self.lab.kubectl("exec", "-n", source[0], source[1], "--", *argv)
        except LabError:
            return False
        return True

    async def tables(self, node: str) -> list[str]:
        """The tables of locks, with the kernel's handles: one that was made anew has another."""
        listed = await self.lab.exec(node, ["nft", "-a", "list", "tables"])
        assert listed.exit == 0, listed.stderr
        return sorted(line for line in listed.stdout.splitlines() if lock.PREFIX in line)

    async def locks(self, node: str) -> frozenset[str]:
        """The veths whose pods are locked."""
        listed = await self.lab.exec(node, ["nft", "-j", "list", "chains"])
        assert listed.exit == 0, listed.stderr
        chains = (item["chain"] for item in json.loads(listed.stdout)["nftables"] if "chain" in item)
        return frozenset(lock.devices(chain["name"] for chain in chains if chain["table"] == lock.PREFIX).values())

    async def until(self, look: Callable[[], Awaitable[object]], what: str) -> Any:
        last: object = None
        try:
            async with asyncio.timeout(SECONDS):
                while not (last := await look()):
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise AssertionError(f"{what}: {last!r}; {self.tails()}") from None
        return last

    def tails(self) -> str:
        return "\n".join(self.lab.directory.log_tail(name, 20) for name in ("agent-n1", "agent-n2", "controller"))


OUTSIDERS = (("n1",), ("n2",), ("default", "near"), ("default", "far"))
"""Processes of the nodes that are not the kubelet, pods of the default network on the same and on the other node."""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    """Two nodes without machines; pods of a network on both, and pods of the default one."""
    async with Lab(f"2-{secrets.token_hex(4)}", 2, without=("virt",)) as lab:
        found = Cluster(lab)
        await found.apply(
            namespace("red"),
            network("red", "10.20.0.0/16", "fd20::/64"),
            pod("red", "a", "n1"),
            pod("red", "b", "n2"),
            pod("red", "c", "n1"),
            pod("default", "near", "n1"),
            pod("default", "far", "n2"),
        )
        await found.ready("red", "a", "b", "c")
        await found.ready("default", "near", "far")
        yield found


async def reached(cluster: Cluster, addresses: tuple[str, ...], port: int = 8080) -> list[tuple[Any, ...]]:
    """Who reaches a port at which addresses."""
    asked = [(source, address) for source in OUTSIDERS for address in addresses]
    answers = await asyncio.gather(*(cluster.curl(source, address, port) for source, address in asked))
    return [item for item, answer in zip(asked, answers, strict=True) if answer]


async def test_only_the_kubelet_reaches_eth0(cluster: Cluster) -> None:
    # They are ready, so the kubelets' probes pass. Pods of the default network are as they were.
    near = (await cluster.get("pod", "-n", "default", "near"))["status"]["podIPs"]
    plain = tuple(item["ip"] for item in near)
    assert len(await reached(cluster, plain)) == len(OUTSIDERS) * len(plain), cluster.tails()
    restarts = "{.status.containerStatuses[0].restartCount}"
    for name in ("a", "b"):
        locked = await cluster.default_addresses("red", name)
        assert len(locked) == 2
        assert await reached(cluster, locked) == [], await cluster.tables("n1")
        for address in locked:
            for source in OUTSIDERS:
                assert not await cluster.ping(source, address), (source, address)
            # Not from its own network either, and its own eth0 begins nothing.
            assert not await cluster.curl(("red", "c"), address)
        for own, address in zip(locked, plain, strict=True):
            assert not await cluster.run(("red", name), "ping", "-c", "1", "-W", "2", "-I", own, address)
        assert await cluster.lab.kubectl("get", "pod", "-n", "red", name, "-o", f"jsonpath={restarts}") == "0"
    ready = await cluster.get("pod", "-n", "red", "a")
    assert [item["status"] for item in ready["status"]["conditions"] if item["type"] == "Ready"] == ["True"]


async def test_a_pod_opens_what_it_names_and_closes_it_again(cluster: Cluster) -> None:
    locked = await cluster.default_addresses("red", "a")
    everyone = len(OUTSIDERS) * len(locked)

    async def annotate(text: str) -> None:
        value = f"{names.OPEN_PORTS_ANNOTATION}={text}" if text else f"{names.OPEN_PORTS_ANNOTATION}-"
        await cluster.lab.kubectl("annotate", "--overwrite", "pod", "-n", "red", "a", value)

    async def all_in() -> bool:
        return len(await reached(cluster, locked)) == everyone

    async def nobody_in() -> bool:
        return not await reached(cluster, locked)

    await annotate("[{protocol: tcp, port: 8080}]")
    await cluster.until(all_in, "an opened port is reached")
    # The other pod of this node, the other protocol.
    assert await reached(cluster, await cluster.default_addresses("red", "c")) == []
    assert not await cluster.ping(("n1",), locked[0])
    await annotate("[{protocol: icmp}, {protocol: tcp, port: 9999}]")
    await cluster.until(nobody_in, "a port that is named no longer is closed")
    for source in OUTSIDERS:
        for address in locked:
            assert await cluster.ping(source, address), (source, address)
    await annotate("[{protocol: tcp, port: 8080}, {protocol: tcp, port: http}]")
    assert await nobody_in()

    async def told() -> list[str]:
        events = await cluster.get("events", "-n", "red", "--field-selector", "involvedObject.name=a,type=Warning")
        return [item["message"] for item in events["items"] if item["reason"] == "OpenDefaultPortsMisread"]

    assert "[1].port" in (await cluster.until(told, "an event names what is wrong"))[0]
    await annotate("")
    assert await nobody_in()
    await cluster.ready("red", "a")


async def test_a_network_meets_neither_the_default_one_nor_the_node(cluster: Cluster) -> None:
    near = [item["ip"] for item in (await cluster.get("pod", "-n", "default", "near"))["status"]["podIPs"]]
    far = [item["ip"] for item in (await cluster.get("pod", "-n", "default", "far"))["status"]["podIPs"]]
    inside = ("red", "a")
    for address in (*near, *far):
        assert not await cluster.curl(inside, address), address
        assert not await cluster.ping(inside, address), address
    for address in ("172.30.0.11", "fd00:30::11"):
        assert not await cluster.curl(inside, address, 9465), "the agent's metrics"
        assert not await cluster.ping(inside, address), address
    # Out of it is open: the outside, and what every network may ask. The API server wants to know who asks.
    for address in ("172.30.0.100", "fd00:30::100"):
        assert await cluster.ping(inside, address), address
        assert await cluster.curl(inside, address, 80), address
    api = (await cluster.get("service", "-n", "default", "kubernetes"))["spec"]["clusterIP"]
    assert await cluster.run(inside, "curl", "-sk", "-m", "5", "-o", "/dev/null", f"https://{api}/version")
    # Nobody comes in by the join, from this node or from a pod.
    joins = await cluster.lab.exec("n1", ["ip", "-j", "addr", "show"])
    (join,) = [link for link in json.loads(joins.stdout) if link["ifname"].startswith(names.JOIN_PREFIX)]
    ends = [item["local"] for item in join["addr_info"] if item["scope"] == "global"]
    assert len(ends) == 2
    for end in ends:
        head, last = end[: max(end.rfind("."), end.rfind(":")) + 1], end[max(end.rfind("."), end.rfind(":")) + 1 :]
        other = head + (str(int(last) + 1) if "." in end else f"{int(last, 16) + 1:x}")
        for source in (("n1",), ("default", "near")):
            assert not await cluster.ping(source, other), (source, other)


async def test_an_agent_that_starts_finds_the_locks_of_the_one_before(cluster: Cluster) -> None:
    await cluster.apply(pod("red", "d", "n1"))
    await cluster.ready("red", "d")
    locked = await cluster.default_addresses("red", "d")
    before = await cluster.tables("n1")
    assert len(await cluster.locks("n1")) == 3  # a, c and d
    await cluster.lab.kill("agent-n1")
    # A lock needs no agent.
    assert await reached(cluster, locked) == []
    await cluster.lab.restart("agent-n1")
    await cluster.apply(pod("red", "e", "n1"))
    await cluster.ready("red", "e")
    assert await cluster.tables("n1") == before, "nothing is made anew"
    await cluster.lab.kill("agent-n1")
    await cluster.lab.kubectl("delete", "pod", "-n", "red", "d", "e", "--wait=false")
    await cluster.lab.restart("agent-n1")

    async def gone() -> bool:
        return len(await cluster.locks("n1")) == 2

    await cluster.until(gone, "the locks of pods that went are gone")
    assert await reached(cluster, await cluster.default_addresses("red", "a")) == []
    await cluster.ready("red", "a", "c")
