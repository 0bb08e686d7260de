"""Which pods' eth0 is locked, and what passes, from what CNI, the API and the kernel say."""

import asyncio
import json
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from vmnet.agent import default_interfaces
from vmnet.agent.default_interfaces import REASON, DefaultInterfaces
from vmnet.kernel.fake import FakeKernel
from vmnet.kube.api import EVENTS, PODS
from vmnet.kube.fake import FakeKube
from vmnet.model import addresses, names
from vmnet.model.endpoint import PodReference
from vmnet.model.names import InterfaceName, MacAddress, NetworkId
from vmnet.model.network import Network, Role
from vmnet.plan import lock
from vmnet.plan.network import load_tables
from vmnet.plan.state import Cgroup, DefaultInterface
from vmnet.plan.table import Table

NETWORK = Network("red_tenant", NetworkId(1), role=Role.PRIMARY, subnets=(ip_network("10.20.0.0/16"),))
NETNS = "/run/netns/pod"
OWN = frozenset({addresses.address("10.244.1.5"), addresses.address("fd00::5")})
ETH0 = DefaultInterface(InterfaceName("veth1"), MacAddress("02:00:00:00:00:05"), OWN)
POD = PodReference("red", "a", "uid-a")


class Node:
    """n1 with a pod that is about to join its network."""

    def __init__(self, api: Any) -> None:
        self.api, self.kernel, self.kube = api, FakeKernel(), FakeKube()
        self.kernel.defaults[NETNS] = ETH0
        self.kernel.node = replace(self.kernel.node, links=frozenset({InterfaceName("veth1")}))
        self.looks = 0
        self.held: dict[str, Table] = {}
        self.start()

    def start(self) -> None:
        self.defaults = DefaultInterfaces(self.kernel, self.kube, self.api.informers, self.api.cluster, "n1", self.look)

    def look(self) -> None:
        self.looks += 1

    def pod(self, open_ports: str | None = None, default: bool = False, name: str = "a") -> None:
        found = {names.OPEN_PORTS_ANNOTATION: open_ports} if open_ports is not None else {}
        item = self.api.pod(f"red/{name}", annotations=found, red__tenant="10.20.0.5/16")
        if default:
            entries = json.loads(item["metadata"]["annotations"][names.POD_NETWORKS_ANNOTATION])
            entries["default"] = {"ip_addresses": ["10.244.1.5/24", "fd00::5/64"], "mac_address": ETH0.mac}
            item["metadata"]["annotations"][names.POD_NETWORKS_ANNOTATION] = json.dumps(entries)

    def tables(self) -> dict[str, Table]:
        return {table.identity: table for table in self.defaults.node_tables({})}

    async def load(self) -> list[Any]:
        """What ``Networks`` does with tables; the operations that it took."""
        state = await self.kernel.observe_node()
        found = list(load_tables(None, state.tables, tuple(self.tables().values()), {}))
        await self.kernel.apply(found)
        return found

    def opened(self) -> frozenset[str]:
        return frozenset(self.tables()["inet vmnet-lock"].sets["open4"].elements or ())


@pytest.fixture
def node(api: Any) -> Node:
    api.namespace("red")
    api.node("n1", "172.30.0.11")
    api.nad("red/tenant", NETWORK)
    found = Node(api)
    found.pod()
    return found


async def test_a_pod_that_joins_is_locked_until_its_container_goes(node: Node) -> None:
    assert node.tables() == {}
    await node.defaults.lock(POD, "c1", NETNS)
    assert set(node.tables()) == {"inet vmnet-lock", lock.VETH_TABLE}
    assert node.tables()["inet vmnet-lock"].sets["pods4"].elements == {"10.244.1.5"}
    # The pod is gone from the API before its container is: nothing opens.
    node.api.stores[PODS].drop("red/a")
    assert node.tables()
    assert not node.defaults.unlock("c0", ("uid-b",))
    assert node.defaults.unlock("c1")
    assert node.tables() == {}


async def test_a_veth_that_went_takes_its_lock_along(node: Node) -> None:
    await node.defaults.lock(POD, "c1", NETNS)
    node.defaults.observed(await node.kernel.observe_node())
    assert node.tables()
    node.kernel.node = replace(node.kernel.node, links=frozenset())
    node.defaults.observed(await node.kernel.observe_node())
    assert node.tables() == {}


async def test_a_pod_without_a_veth_is_guarded_by_the_node(node: Node) -> None:
    node.kernel.defaults[NETNS] = replace(ETH0, device=None)
    await node.defaults.lock(POD, "c1", NETNS)
    assert set(node.tables()) == {"inet vmnet-lock"}
    del node.kernel.defaults[NETNS]
    await node.defaults.lock(POD, "c1", NETNS)
    assert node.tables() == {}


async def test_the_annotation_is_followed(node: Node) -> None:
    await node.defaults.lock(POD, "c1", NETNS)
    assert node.opened() == frozenset()
    node.pod("[{protocol: tcp, port: 80}]")
    assert node.opened() == {"10.244.1.5 . tcp . 80"}
    assert node.looks == 1
    node.pod("[{protocol: tcp, port: 80}]")
    assert node.looks == 1
    node.pod("[{protocol: tcp, port: 80}, {protocol: tcp}]")
    assert node.opened() == frozenset()
    telling = asyncio.create_task(node.defaults.tell())
    async with asyncio.timeout(10):
        while not (events := (await node.kube.list(EVENTS)).items):
            await asyncio.sleep(0)
    telling.cancel()
    assert [(item["reason"], item["type"], item["involvedObject"]["name"]) for item in events] == [
        (REASON, "Warning", "a")
    ]
    assert "[1].port" in events[0]["message"]
    node.pod()
    assert node.opened() == frozenset()


async def test_what_a_pod_opens_before_it_joins_is_open_at_once(node: Node) -> None:
    node.pod("[{protocol: udp, port: 53}]")
    await node.defaults.lock(POD, "c1", NETNS)
    assert node.opened() == {"10.244.1.5 . udp . 53"}


async def test_the_next_agent_finds_the_locks_as_they_are(node: Node) -> None:
    node.kernel.kubelet_group = Cgroup("system.slice/kubelet.service", 7)
    await node.defaults.adopt()
    await node.defaults.lock(POD, "c1", NETNS)
    assert len(await node.load()) == 2
    node.pod(default=True)
    node.kernel.defaults.clear()  # it is not asked where the kernel's tables tell
    node.start()
    await node.defaults.adopt()
    assert await node.load() == []
    # Its container, whichever it was, is known by its port.
    assert node.defaults.unlock("c1", ("uid-a",))


async def test_a_pod_that_nobody_locked_is_found_by_its_address(node: Node) -> None:
    node.pod(default=True)
    await node.defaults.adopt()
    assert set(node.tables()) == {"inet vmnet-lock", lock.VETH_TABLE}
    node.kernel.defaults.clear()
    node.start()
    await node.defaults.adopt()
    assert set(node.tables()) == {"inet vmnet-lock"}


async def test_a_kubelet_that_starts_anew_is_followed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_interfaces, "LOOK_SECONDS", 0)
    node.kernel.kubelet_group = Cgroup("system.slice/kubelet.service", 7)
    await node.defaults.adopt()
    await node.defaults.lock(POD, "c1", NETNS)
    assert "cgroup 7" in node.tables()["inet vmnet-lock"].whole()
    following = asyncio.create_task(node.defaults.follow_kubelet())
    node.kernel.kubelet_group = Cgroup("system.slice/kubelet.service", 8)
    async with asyncio.timeout(10):
        while node.looks < 1:
            await asyncio.sleep(0)
        assert "cgroup 8" in node.tables()["inet vmnet-lock"].whole()
        node.kernel.kubelet_group = None
        while node.looks < 2:
            await asyncio.sleep(0)
    following.cancel()
    assert "meta skuid 0" in node.tables()["inet vmnet-lock"].whole()
