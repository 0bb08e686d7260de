import asyncio
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from vmnet.agent.networks import Networks
from vmnet.agent.policy_tables import REASON, PolicyTables, named_ports
from vmnet.kernel.fake import FakeKernel
from vmnet.kube.api import EVENTS, NADS, NAMESPACES, PODS, POLICIES, Object, Unavailable
from vmnet.kube.fake import FakeKube, refuse
from vmnet.model import names
from vmnet.model.endpoint import LocalPort, Node, NodeNetwork, PortState
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role
from vmnet.model.policy import Protocol
from vmnet.plan import ops
from vmnet.plan.network import BRIDGED_SYSCTLS, PodInterface
from vmnet.plan.node import allocate_join
from vmnet.plan.state import NodeState
from vmnet.plan.table import Table

RED = Network("cluster_udn_red", NetworkId(1), role=Role.PRIMARY, subnets=(ip_network("10.20.0.0/16"),))
BLUE = Network("blue_net", NetworkId(2), role=Role.PRIMARY, subnets=(ip_network("10.20.0.0/16"),))
HERE = Node("n1", ip_address("172.30.0.11"))
BROKEN = {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "everywhere"}}]}]}


class World:
    """Two networks that have the same subnet; red and yellow are on one of them."""

    def __init__(self, api: Any) -> None:
        self.api, self.kube, self.changed = api, FakeKube(), list[str]()
        self.source = PolicyTables(self.kube, api.informers, api.cluster, "n1", self.changed.append)
        for name in ("red", "yellow", "blue"):
            api.namespace(name)
        api.node("n1", "172.30.0.11")
        api.nad("red/net", RED)
        api.nad("yellow/net", RED)
        api.nad("blue/net", BLUE)

    def pod(self, key: str, host: int, node: str = "n1", labels: dict[str, str] | None = None, **more: Any) -> None:
        namespace = key.partition("/")[0]
        item = self.api.pod(key, node, **{f"{namespace}__net": f"10.20.0.{host}/16"}, **more)
        item = {**item, "metadata": {**item["metadata"], "labels": labels or {}}}
        self.api.stores[PODS].put(item)

    def policy(self, key: str, version: int = 1, **spec: Any) -> Object:
        namespace, _, name = key.partition("/")
        metadata = {"namespace": namespace, "name": name, "uid": f"uid-{name}", "resourceVersion": str(version)}
        item = {"metadata": metadata, "spec": spec}
        self.api.stores[POLICIES].put(item)
        return item

    def tables(self, network: Network, *keys: str) -> tuple[Table, ...]:
        ports = tuple(LocalPort(self.api.cluster.endpoint(key)) for key in keys)
        return self.source.network_tables(
            NodeNetwork(network, HERE, 1450, allocate_join(NodeState(), network.id), ports)
        )

    def peers(self, network: Network, *keys: str) -> set[str]:
        sets = self.tables(network, *keys)[0].sets
        return {text for name, found in sets.items() if name.startswith("peers4") for text in found.texts()}

    def since(self) -> list[str]:
        found = sorted(set(self.changed))
        self.changed.clear()
        return found


@pytest.fixture
def world(api: Any) -> World:
    return World(api)


FROM_PODS = {"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {}}]}]}


def test_peers_are_of_the_same_network_alone(world: World) -> None:
    world.pod("red/a", 5)
    world.pod("yellow/b", 6, "n2")
    world.pod("blue/c", 7)
    world.policy("red/all", **FROM_PODS)
    assert world.peers(RED, "red/a") == {"10.20.0.5", "10.20.0.6"}
    assert world.tables(BLUE, "blue/c") == ()


def test_only_the_networks_concerned_are_told(world: World) -> None:
    world.pod("red/a", 5)
    world.pod("yellow/b", 6, "n2")
    world.pod("blue/c", 7)
    world.tables(RED, "red/a")
    world.tables(BLUE, "blue/c")
    world.since()
    world.policy("red/all", **FROM_PODS)
    assert world.since() == [RED.name]
    world.tables(RED, "red/a")
    world.policy("yellow/all", **FROM_PODS)
    assert world.since() == [], "no port of yellow is here"
    world.pod("yellow/d", 8, "n2")
    assert world.since() == [RED.name]
    world.pod("yellow/d", 8, "n2", labels={"a": "b"})
    assert world.since() == [], "every selector finds it as before"
    world.api.stores[NAMESPACES].put({"metadata": {"name": "yellow", "labels": {"a": "b"}}})
    assert world.since() == []
    world.api.stores[POLICIES].drop("red/all")
    assert world.since() == [RED.name]
    assert world.tables(RED, "red/a") == ()


def test_a_pod_that_has_ended_is_nobody_s_peer(world: World) -> None:
    world.pod("red/a", 5)
    world.policy("red/all", **FROM_PODS)
    world.pod("yellow/b", 6, "n2")
    assert world.peers(RED, "red/a") == {"10.20.0.5", "10.20.0.6"}
    world.pod("yellow/b", 6, "n2", phase="Succeeded")
    assert world.peers(RED, "red/a") == {"10.20.0.5"}
    world.pod("yellow/b", 9, "n2", uid="another")
    assert world.peers(RED, "red/a") == {"10.20.0.5", "10.20.0.9"}
    world.api.stores[PODS].drop("yellow/b")
    assert world.peers(RED, "red/a") == {"10.20.0.5"}


def test_stores_may_be_filled_in_any_order(api: Any) -> None:
    world = World(api)
    for store in (NADS, NAMESPACES):
        for key in tuple(api.stores[store].held):
            api.stores[store].drop(key)
    world.policy("red/all", **FROM_PODS)
    world.pod("red/a", 5)
    world.pod("yellow/b", 6)
    api.nad("red/net", RED)
    assert world.peers(RED, "red/a") == set(), "no namespace is known yet"
    api.namespace("yellow")
    api.nad("yellow/net", RED)
    assert world.peers(RED, "red/a") == {"10.20.0.6"}
    api.namespace("red")
    assert world.peers(RED, "red/a") == {"10.20.0.5", "10.20.0.6"}
    api.stores[NADS].drop("yellow/net")
    api.stores[PODS].drop("yellow/b")
    assert world.peers(RED, "red/a") == {"10.20.0.5"}


async def test_a_joining_pod_is_isolated_before_its_port_comes_up(world: World) -> None:
    kernel = FakeKernel()
    networks = Networks(kernel, world.api.cluster, "n1", (), lambda endpoint: None, (world.source,))
    world.pod("red/a", 5)
    world.policy("red/deny", podSelector={"matchLabels": {"app": "db"}}, policyTypes=["Ingress", "Egress"])

    async def attach(key: str) -> list[str]:
        """What the kernel was told, up to the port."""
        kernel.applied.clear()
        kernel.make_pod(f"/run/netns/{key}")
        inside = PodInterface(f"/run/netns/{key}", key)
        endpoint = world.api.cluster.endpoint(key)
        await networks.attach(RED, endpoint, PortState.ACTIVE, inside)
        opened = ops.AttachToBridge(RED.namespace, endpoint.port, "br0", hairpin=True)
        before = kernel.applied[: kernel.applied.index(opened)]
        return [op.script for op in before if isinstance(op, ops.LoadFirewall) and "vmnet-policy" in op.script]

    assert await attach("red/a") == []
    world.pod("red/b", 6, labels={"app": "db"})
    (script,) = [text for text in await attach("red/b") if "inet vmnet-policy" in text]
    assert "10.20.0.6 : jump in_" in script
    assert ops.SetSysctls(RED.namespace, BRIDGED_SYSCTLS) in kernel.applied
    world.pod("red/c", 7, labels={"app": "db"})
    (script,) = [text for text in await attach("red/c") if "inet vmnet-policy" in text]
    assert "10.20.0.7 : jump in_" in script
    assert "10.20.0.6" not in script, "what is there is not written again"


async def test_a_migration_s_target_is_isolated_as_its_source_is(world: World) -> None:
    """Though its port is closed yet: its guest's frame opens it, and no agent is asked then."""
    kernel = FakeKernel()
    networks = Networks(kernel, world.api.cluster, "n1", (), lambda endpoint: None, (world.source,))
    world.policy("red/deny", podSelector={}, policyTypes=["Ingress"])
    for name, node in (("source", "n2"), ("target", "n1")):
        world.pod(f"red/{name}", 5, node, labels={names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE}, machine="vm")
    kernel.make_pod("/run/netns/target")
    endpoint = world.api.cluster.endpoint("red/target")
    inside = PodInterface("/run/netns/target", "target")
    assert endpoint.machine is not None
    await networks.attach(RED, endpoint, PortState.STANDBY, inside)
    scripts = [op.script for op in kernel.applied if isinstance(op, ops.LoadFirewall)]
    loaded = next(index for index, text in enumerate(scripts) if "10.20.0.5 : jump in_" in text)
    assert loaded < next(index for index, text in enumerate(scripts) if f"in_{endpoint.port}" in text)
    # The source's end changes nothing for the target.
    world.pod("red/source", 5, "n2", phase="Succeeded", machine="vm")
    assert "10.20.0.5" in (world.tables(RED, "red/target")[0].sets["in4"].elements or ())


async def test_a_policy_that_cannot_be_understood_closes_and_is_told_of(world: World) -> None:
    world.pod("red/a", 5)
    world.policy("red/odd", **BROKEN)
    judged, _ = world.tables(RED, "red/a")
    assert [found.rules for name, found in judged.chains.items() if name.startswith("in_")] == [("drop",)]
    async with asyncio.TaskGroup() as tasks:
        telling = tasks.create_task(world.source.tell())
        async with asyncio.timeout(30):
            while not (events := (await world.kube.list(EVENTS, "red")).items):
                await asyncio.sleep(0)
        (event,) = events
        assert (event["reason"], event["type"], event["involvedObject"]["name"]) == (REASON, "Warning", "odd")
        assert event["message"].startswith("spec.ingress[0].from[0].ipBlock.cidr: 'everywhere' is not a CIDR")
        # The same thing is told once, however often it is seen.
        world.policy("red/odd", 2, **BROKEN)
        world.policy("red/other", podSelector={"matchLabels": {"a": 1}})
        async with asyncio.timeout(30):
            while len(events := (await world.kube.list(EVENTS, "red")).items) < 2:
                await asyncio.sleep(0)
        assert sorted((item["involvedObject"]["name"], item["count"]) for item in events) == [("odd", 1), ("other", 1)]
        telling.cancel()
    world.policy("red/odd", 3, podSelector={}, ingress=[{}])
    assert world.tables(RED, "red/a") == ()


async def test_only_a_node_with_pods_of_the_namespace_tells(world: World) -> None:
    world.pod("red/a", 5, "n2")
    world.policy("red/odd", **BROKEN)
    world.pod("blue/c", 5)
    world.policy("blue/odd", **BROKEN)
    async with asyncio.TaskGroup() as tasks:
        telling = tasks.create_task(world.source.tell())
        async with asyncio.timeout(30):
            while not (await world.kube.list(EVENTS, "blue")).items:
                await asyncio.sleep(0)
        assert (await world.kube.list(EVENTS, "red")).items == ()
        world.pod("red/b", 6)
        async with asyncio.timeout(30):
            while not (await world.kube.list(EVENTS, "red")).items:
                await asyncio.sleep(0)
        telling.cancel()


async def test_policies_older_than_a_pod_are_waited_for(world: World) -> None:
    def seed(key: str) -> Object:
        namespace, _, name = key.partition("/")
        metadata = {"namespace": namespace, "name": name}
        return world.kube.seed(POLICIES, {"metadata": metadata, "spec": {"podSelector": {}}})

    await world.source.wait_for_policies("red")
    first, _ = seed("red/one"), seed("blue/other")
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(world.source.wait_for_policies("red"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        world.api.stores[POLICIES].put({**first, "metadata": {**first["metadata"], "uid": "its-predecessor"}})
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        world.api.stores[POLICIES].put(first)
        async with asyncio.timeout(30):
            await waiting
    newer = {**first, "metadata": {**first["metadata"], "resourceVersion": "999"}}
    world.api.stores[POLICIES].put(newer)
    await world.source.wait_for_policies("red")


async def test_an_api_that_does_not_answer_is_no_reason_to_go_on(api: Any) -> None:
    source = PolicyTables(FakeKube(fail=refuse("list")), api.informers, api.cluster, "n1", lambda network: None)
    with pytest.raises(Unavailable):
        await source.wait_for_policies("red")


def test_named_ports_are_those_of_containers_that_run() -> None:
    pod = {
        "spec": {
            "containers": [
                {"ports": [{"name": "web", "containerPort": 80}, {"containerPort": 81}]},
                {"ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
                {},
            ],
            "initContainers": [
                {"ports": [{"name": "never", "containerPort": 1}]},
                {"restartPolicy": "Always", "ports": [{"name": "proxy", "containerPort": 2, "protocol": "SCTP"}]},
            ],
        }
    }
    assert named_ports(pod) == {("web", Protocol.TCP, 80), ("dns", Protocol.UDP, 53), ("proxy", Protocol.SCTP, 2)}
    assert named_ports({"spec": {}}) == frozenset()
