"""The Node object."""

import asyncio
from collections.abc import Callable

import pytest

from vmnet.kube.api import LEASES, NODES, KubeError, Resource, Unavailable
from vmnet.kube.fake import FakeKube
from vmnet.lab.kubelet import node
from vmnet.lab.kubelet.network import Network, NetworkError
from vmnet.lab.kubelet.node import NodeReporter

ADDRESSES = ("172.30.0.11", "fd00:30::11")


class FaultyNetwork(Network):
    """Says what the test wants it to say."""

    fault = ""

    async def status(self) -> None:
        if self.fault:
            raise NetworkError(self.fault)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def ready(kube: FakeKube) -> tuple[str, str]:
    item = kube.peek(NODES, "n1") or {}
    for condition in (item.get("status") or {}).get("conditions") or []:
        if condition["type"] == "Ready":
            return condition["status"], condition["message"]
    return "", ""


async def test_a_node_registers_reports_and_renews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "STATUS_INTERVAL", 0.01)
    monkeypatch.setattr(node, "HEARTBEAT", 0.02)
    refused = 3

    def fail(verb: str, resource: Resource, name: str) -> KubeError | None:
        nonlocal refused
        refused -= 1
        return Unavailable("connection refused") if refused >= 0 else None

    kube, network = FakeKube(fail=fail), FaultyNetwork()
    running = asyncio.ensure_future(NodeReporter(kube, "n1", ADDRESSES, 10250, network).run())
    try:
        await until(lambda: ready(kube)[0] == "True")
        item = kube.peek(NODES, "n1")
        assert item is not None
        internal = [entry["address"] for entry in item["status"]["addresses"] if entry["type"] == "InternalIP"]
        assert internal == list(ADDRESSES)
        assert item["metadata"]["labels"]["kubernetes.io/hostname"] == "n1"
        assert item["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"] == 10250
        await until(lambda: kube.peek(LEASES, "n1", node.LEASE_NAMESPACE))
        first = (kube.peek(LEASES, "n1", node.LEASE_NAMESPACE) or {})["spec"]["renewTime"]
        await until(lambda: (kube.peek(LEASES, "n1", node.LEASE_NAMESPACE) or {})["spec"]["renewTime"] != first)
        network.fault = "no agent"
        await until(lambda: ready(kube)[0] == "False")
        assert "no agent" in ready(kube)[1]
        network.fault = ""
        await until(lambda: ready(kube)[0] == "True")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def test_conditions_keep_the_time_of_their_last_change() -> None:
    first = node.node_status("n1", ADDRESSES, 1, "", 1000.0, {})
    second = node.node_status("n1", ADDRESSES, 1, "gone", 2000.0, first)
    times = {item["type"]: item["lastTransitionTime"] for item in second["conditions"]}
    assert times["Ready"] != times["DiskPressure"]
