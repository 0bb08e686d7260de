"""What an agent says of its node."""

import asyncio
from dataclasses import replace
from typing import Any, cast

import pytest

from vmnet.agent.self_report import SelfReport
from vmnet.agent.self_test import SelfTest
from vmnet.kernel.fake import FakeKernel
from vmnet.kube.api import Unavailable
from vmnet.kube.events import Recorder
from vmnet.kube.fake import FakeInformer, FakeKube
from vmnet.model import addresses
from vmnet.model.endpoint import Endpoint, MachineReference, PodReference
from vmnet.model.names import InterfaceName, MacAddress, NetworkId
from vmnet.model.network import Network, Role
from vmnet.plan.health import Fault, Part
from vmnet.plan.state import LinkState, NetworkState
from vmnet.runtime.backoff import Backoff
from vmnet.runtime.queue import KeyedQueue, work

NETWORK = Network("tested", NetworkId(7), role=Role.SECONDARY, subnets=(addresses.network("192.168.0.0/16"),))


def machine(name: str, octet: int) -> Endpoint:
    """A machine's interface."""
    return Endpoint(
        PodReference("ns", f"virt-launcher-{name}", f"uid-{name}"),
        NETWORK.name,
        "n1",
        MacAddress(f"0a:58:c0:a8:00:{octet:02x}"),
        (addresses.interface(f"192.168.0.{octet}/16"),),
        machine=MachineReference("ns", name),
    )


class Networks:
    """The networks of a node, as the test says."""

    node_name = "n1"

    def __init__(self) -> None:
        self.found: tuple[Fault, ...] = ()
        self.endpoints: tuple[Endpoint, ...] = ()

    def known(self) -> frozenset[str]:
        return frozenset({NETWORK.name})

    def present(self, name: str) -> Network | None:
        return NETWORK

    def attached(self, name: str) -> tuple[Endpoint, ...]:
        return self.endpoints

    async def examine(self, name: str) -> tuple[Fault, ...] | None:
        return self.found

    async def examine_node(self) -> tuple[Fault, ...]:
        return ()


class World:
    """An agent's parts."""

    def __init__(self) -> None:
        self.networks, self.kernel, self.queue = Networks(), FakeKernel(), KeyedQueue(Backoff(first=60, most=60))
        self.kernel.networks[NETWORK.namespace] = NetworkState(NETWORK.namespace)
        self.store = FakeInformer(cast(Any, type("Kind", (), {"plural": "pods"})))
        self.missing: list[str] = []
        self.test = SelfTest(
            self.kernel,
            cast(Any, self.networks),
            Recorder(FakeKube(), "vmnet-agent", host="n1"),
            lambda network: None,
            lambda: None,
            node=lambda: None,
            domain="cluster.local",
            period=30,
        )
        stores = type("Stores", (), {"all": lambda _: (self.store,)})()
        self.report = SelfReport(
            self.kernel,
            cast(Any, self.networks),
            self.test,
            cast(Any, stores),
            {"network": self.queue},
            missing=lambda: self.missing,
            chained=lambda: {"path": "/etc/cni/net.d/10.conflist", "problem": None},
        )

    async def ask(self) -> dict[str, Any]:
        """The report."""
        return await self.report.answer({"ask": "status"})


@pytest.fixture
def world() -> World:
    return World()


async def test_a_node_that_is_well(world: World) -> None:
    found = await world.ask()
    assert found["node"] == "n1"
    assert found["notReady"] == found["failing"] == found["faults"] == []
    assert found["watches"] == [{"kind": "pods", "synced": True, "failure": None}]
    assert found["cniConfiguration"]["problem"] is None
    (network,) = found["networks"]
    assert (network["name"], network["id"], network["faults"], network["ports"]) == ("tested", 7, [], [])


async def test_networks_are_looked_at_when_it_is_asked_and_nothing_is_told_or_mended(world: World) -> None:
    world.networks.found = (Fault(Part.BRIDGE, "br0 is gone"), Fault(Part.POD, "pod ns/a has lost its port"))
    (network,) = (await world.ask())["networks"]
    # A pod that ends looks for a moment as if it had lost its port.
    assert network["faults"] == ["br0 is gone"]
    assert world.test.report() == {}
    await world.test.look(NETWORK.name)
    (network,) = (await world.ask())["networks"]
    assert network["faults"] == ["br0 is gone", "pod ns/a has lost its port"]


async def test_beyond_its_time_it_says_what_the_self_test_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmnet.agent.self_report.LOOK_SECONDS", -1.0)
    world.networks.found = (Fault(Part.BRIDGE, "br0 is gone"),)
    await world.test.look(NETWORK.name)
    world.networks.found = ()
    (network,) = (await world.ask())["networks"]
    assert (network["looked"], network["faults"]) == ("self-test", ["br0 is gone"])


async def test_ports_say_whether_they_carry_frames(world: World) -> None:
    here, target, left = machine("here", 5), machine("target", 6), machine("left", 7)
    world.networks.endpoints = (here, target, left)
    links = {
        item.port: LinkState(item.port, MacAddress("02:00:00:00:00:01"), 1450, True, kind="veth")
        for item in (here, target, left)
    }
    nobody = InterfaceName("p000000000000")
    links[nobody] = LinkState(nobody, MacAddress("02:00:00:00:00:01"), 1450, True, kind="veth")
    state = NetworkState(NETWORK.namespace, links=links)
    sets = {"standby": frozenset({(str(target.port),)}), "moved": frozenset({(str(left.mac),)})}
    world.kernel.networks[NETWORK.namespace] = replace(state, sets=sets)
    (network,) = (await world.ask())["networks"]
    found = {item["machine"]: item["state"] for item in network["ports"]}
    assert found == {"ns/here": "open", "ns/target": "standby", "ns/left": "moved", None: "open"}


async def test_what_fails_is_named_with_its_reason(world: World) -> None:
    async def fail(key: str) -> None:
        raise ValueError(f"no room for {key}")

    world.missing.append("the CNI plugin is not chained yet")
    world.store.failure = Unavailable("connection refused")
    world.queue.add("tested")
    working = asyncio.create_task(work(world.queue, fail, expected=(ValueError,)))
    try:
        async with asyncio.timeout(60):
            while not world.queue.failing():
                await asyncio.sleep(0)
    finally:
        working.cancel()
    found = await world.ask()
    assert found["failing"] == [{"kind": "network", "key": "tested", "times": 1, "error": "no room for tested"}]
    assert found["notReady"] == ["the CNI plugin is not chained yet"]
    assert found["watches"][0]["failure"] == "connection refused"
