"""When a fault is told, to whom, and how often; what is a fault is ``test_health``'s matter."""

import asyncio
import socket
from typing import Any, cast

import pytest
from prometheus_client import generate_latest

from vmnet import metrics
from vmnet.agent.self_test import SelfTest
from vmnet.kernel.api import KernelError
from vmnet.kernel.fake import FakeKernel
from vmnet.kube.api import EVENTS
from vmnet.kube.events import Recorder
from vmnet.kube.fake import FakeKube
from vmnet.model import addresses
from vmnet.model.addresses import IPAddress
from vmnet.model.names import NamespaceName, NetworkId
from vmnet.model.network import Network, Role
from vmnet.plan.health import Fault, Part
from vmnet.plan.state import NetworkState

NETWORK = Network("tested", NetworkId(7), role=Role.PRIMARY, subnets=(addresses.network("192.168.0.0/16"),))
GONE = Fault(Part.BRIDGE, "br0 is gone")
POD = Fault(Part.POD, "pod ns/a has lost its port")


class Networks:
    """What looks at the kernel find, as the test says."""

    node_name = "n1"

    def __init__(self) -> None:
        self.found: tuple[Fault, ...] | None = ()
        self.failure: Exception | None = None

    def known(self) -> frozenset[str]:
        return frozenset({NETWORK.name})

    def present(self, name: str) -> Network | None:
        return NETWORK if self.found is not None else None

    async def examine(self, name: str) -> tuple[Fault, ...] | None:
        if self.failure is not None:
            raise self.failure
        return self.found

    async def examine_node(self) -> tuple[Fault, ...]:
        return self.found or ()


class Kernel(FakeKernel):
    """A gateway that answers whoever asks it, unless it shall be silent: a real socket on this machine."""

    silent = False

    async def udp_socket(self, namespace: NamespaceName, address: IPAddress, port: int) -> socket.socket:
        opened = await super().udp_socket(namespace, address, port)
        return cast(socket.socket, _Gateway(opened, self))


class _Gateway(socket.socket):
    def __init__(self, opened: socket.socket, kernel: Kernel) -> None:
        opened.close()
        super().__init__(socket.AF_INET, socket.SOCK_DGRAM)
        self.setblocking(False)
        self.bind(("127.0.0.1", 0))
        self._kernel = kernel

    def sendto(self, data: Any, *where: Any) -> int:
        if not self._kernel.silent:
            super().sendto(b"xx" + data[2:], self.getsockname())  # somebody else's answer comes first
            return super().sendto(data, self.getsockname())
        return len(data)


class World:
    def __init__(self) -> None:
        self.networks, self.kernel, self.kube = Networks(), Kernel(), FakeKube()
        self.kernel.networks[NETWORK.namespace] = NetworkState(NETWORK.namespace)
        self.mended: list[str] = []
        self.test = SelfTest(
            self.kernel,
            cast(Any, self.networks),
            Recorder(self.kube, "vmnet-agent", host="n1"),
            self.mended.append,
            lambda: self.mended.append("the node"),
            node=lambda: {"metadata": {"name": "n1", "uid": "u1"}},
            domain="cluster.local",
            period=30,
        )

    async def look(self, *faults: Fault) -> None:
        self.networks.found = faults
        await self.test.look(NETWORK.name)

    async def reasons(self) -> list[str]:
        return [item["reason"] for item in (await self.kube.list(EVENTS)).items]

    def gauge(self) -> str | None:
        start = f'vmnet_network_healthy{{network="{NETWORK.name}",node="n1"}} '
        lines = generate_latest(metrics.REGISTRY).decode().splitlines()
        return next((line.removeprefix(start) for line in lines if line.startswith(start)), None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr("vmnet.agent.self_test.ANSWER_SECONDS", 0.05)
    return World()


async def test_a_fault_is_told_once_and_mended_until_it_is_gone(world: World) -> None:
    await world.look()
    assert (world.gauge(), world.test.report()) == ("1.0", {NETWORK.name: []})
    await world.look(GONE)
    await world.look(GONE)
    assert (world.gauge(), world.test.report()) == ("0.0", {NETWORK.name: ["br0 is gone"]})
    assert world.mended == [NETWORK.name, NETWORK.name]
    assert await world.reasons() == ["NetworkBroken"]
    await world.look()
    assert world.gauge() == "1.0"
    assert sorted(await world.reasons()) == ["NetworkBroken", "NetworkMended"]


async def test_a_pod_that_ends_is_no_fault_until_it_is_seen_twice(world: World) -> None:
    await world.look(POD)
    assert (world.gauge(), await world.reasons()) == ("1.0", [])
    await world.look(POD)
    assert world.gauge() == "0.0"
    assert world.test.report() == {NETWORK.name: [POD.says]}


async def test_a_gateway_that_does_not_answer_twice(world: World) -> None:
    world.kernel.silent = True
    await world.look()
    assert world.gauge() == "1.0"
    await world.look()
    assert world.test.report() == {NETWORK.name: ["gateway 192.168.0.1 does not answer DNS"]}
    world.kernel.silent = False
    await world.look()
    assert world.test.report() == {NETWORK.name: []}


async def test_a_network_that_has_left_has_no_health(world: World) -> None:
    await world.look(GONE)
    world.networks.found = None
    await world.test.look(NETWORK.name)
    assert (world.gauge(), world.test.report()) == (None, {})


async def test_a_look_that_fails_changes_nothing(world: World) -> None:
    await world.look(GONE)
    world.networks.failure = KernelError("nft: out of memory")
    await world.look()
    assert world.gauge() == "0.0"


async def test_what_the_node_lacks_is_told_by_itself(world: World) -> None:
    world.networks.found = (GONE,)
    await world.test.look("")
    assert world.test.node_faults() == (GONE,)
    assert world.mended == ["the node"]
    assert world.test.report() == {}


async def test_it_goes_round_until_cancelled(world: World) -> None:
    world.networks.found = (GONE,)
    running = asyncio.create_task(world.test.run())
    async with asyncio.timeout(30):
        while not {NETWORK.name, "the node"} <= set(world.mended):
            await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
