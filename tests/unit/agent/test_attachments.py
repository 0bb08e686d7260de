"""CNI requests, from what the runtime sends to what the kernel and the API have afterwards."""

import asyncio
import json
from collections.abc import AsyncIterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any, cast

import pytest

from vmnet import metrics
from vmnet.agent import attachments
from vmnet.agent.attachments import Attachments
from vmnet.agent.cut_over import CutOvers
from vmnet.agent.default_interfaces import DefaultInterfaces
from vmnet.agent.multus import Mode, Multus
from vmnet.agent.networks import Networks
from vmnet.agent.policy_tables import PolicyTables
from vmnet.cni.call import Call, encode_call
from vmnet.cni.errors import CniError, Code
from vmnet.cni.request import Attachment, Command, Request
from vmnet.kernel.fake import FakeKernel
from vmnet.kube.api import NADS, PODS, POLICIES, Object
from vmnet.kube.fake import FakeKube
from vmnet.model import names
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role
from vmnet.plan.network import owner_of

PRIMARY = Network("red_tenant", NetworkId(1), role=Role.PRIMARY, subnets=(ip_network("10.20.0.0/16"),))
STORAGE = Network("red_storage", NetworkId(2), role=Role.SECONDARY, subnets=(ip_network("10.30.0.0/24"),))
BARE = Network("red_bare", NetworkId(3), role=Role.SECONDARY)
NETNS = "/run/netns/pod"
DEFAULT = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "cni0"}, {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": NETNS}],
    "ips": [{"address": "10.244.0.5/24", "gateway": "10.244.0.1", "interface": 1}],
    "routes": [{"dst": "0.0.0.0/0"}],
}


class Announcements:
    """The announcer's own test says what it does."""

    async def prepare(self, *_: Any) -> None:
        return

    def forget(self, *_: Any) -> None:
        return


class Arrivals:
    """Connections that come along: their own test says what they do."""

    def forget(self, *_: Any) -> None:
        return


class Node:
    """n1, with the real parts of the agent over a kernel and an API in memory."""

    def __init__(self, api: Any, directory: Path, mode: Mode = Mode.AUTO) -> None:
        self.api = api
        self.kernel, self.kube, self.synced = FakeKernel(), FakeKube(), asyncio.Event()
        self.kernel.make_pod(NETNS)
        self.synced.set()
        self.missing: str | None = None
        self.broken = False
        self.multus = Multus(mode, directory)
        self.defaults = DefaultInterfaces(self.kernel, self.kube, api.informers, api.cluster, "n1", lambda: None)
        self.networks = Networks(
            self.kernel,
            api.cluster,
            "n1",
            (),
            lambda endpoint: self.cut_overs.forget(endpoint),
            (self.defaults,),
            on_observed=self.defaults.observed,
        )
        self.cut_overs = CutOvers(
            self.kernel, self.kube, api.cluster, self.networks, cast(Any, Announcements()), cast(Any, Arrivals())
        )
        self.policies = PolicyTables(self.kube, api.informers, api.cluster, "n1", lambda network: None)
        self.handler = Attachments(
            self.kube,
            api.cluster,
            self.networks,
            self.cut_overs,
            self.policies,
            self.synced,
            self.multus,
            self.defaults,
            lambda: self.missing,
            lambda: self.broken,
        )

    def pod(self, **more: Any) -> None:
        item = self.api.pod("red/a", **more)
        self.kube.seed(PODS, json.loads(json.dumps(item)))

    async def call(
        self,
        command: Command,
        nad: str | None = None,
        interface: str = "eth0",
        previous: Object | None = None,
        valid: tuple[Attachment, ...] = (),
        container: str = "c1",
    ) -> Any:
        network = {"red/storage": STORAGE, "red/bare": BARE, "red/tenant": PRIMARY}.get(nad or "")
        config = json.loads(network.to_nad_config(nad)) if network and nad else {"name": "default"}
        args = {"K8S_POD_NAMESPACE": "red", "K8S_POD_NAME": "a", "K8S_POD_UID": "uid-a"}
        request = Request(command, "1.0.0", container, NETNS, interface, args, config, previous, valid)
        answer = await self.handler.handle(request)
        return json.loads(answer.output) if answer.output else None

    async def add(self, nad: str | None = None, interface: str = "eth0") -> Any:
        return await self.call(Command.ADD, nad, interface, None if nad else DEFAULT)

    async def refusal(self, *arguments: Any, **more: Any) -> CniError:
        with pytest.raises(CniError) as caught:
            await self.call(*arguments, **more)
        return caught.value

    def ports(self) -> set[tuple[int, str, str]]:
        """Network number, container and interface of every port."""
        return {
            (int(namespace.removeprefix("vmnet-")), *owner_of(link))
            for namespace, state in self.kernel.networks.items()
            for link in state.ports()
        }

    def annotations(self) -> dict[str, Any]:
        found = self.kube.peek(PODS, "a", "red")
        assert found is not None
        keys = (names.NETWORK_STATUS_ANNOTATION, names.POD_NETWORKS_ANNOTATION)
        return {key: json.loads(text) for key in keys if (text := found["metadata"]["annotations"].get(key))}


@pytest.fixture
async def node(api: Any, tmp_path: Path) -> AsyncIterator[Node]:
    api.namespace("red")
    api.node("n1", "172.30.0.11")
    for network in (PRIMARY, STORAGE, BARE):
        api.nad(f"red/{network.name.partition('_')[2]}", network)
    made = Node(api, tmp_path)
    yield made
    await made.cut_overs.close()
    await made.kernel.close()


async def test_one_add_makes_every_interface_where_no_multus_is(node: Node) -> None:
    node.pod(asks="storage,bare@raw0", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24", red__bare="")
    answer = await node.add()
    assert [item["name"] for item in answer["interfaces"]] == ["cni0", "eth0", "ovn-udn1", "net1", "raw0"]
    assert answer["ips"] == [
        {"address": "10.244.0.5/24", "interface": 1},
        {"address": "10.20.0.3/16", "interface": 2, "gateway": "10.20.0.1"},
        {"address": "10.30.0.1/24", "interface": 3},
    ]
    assert node.ports() == {(1, "c1", "ovn-udn1"), (2, "c1", "net1"), (3, "c1", "raw0")}
    written = node.annotations()
    assert [(item["interface"], item.get("default")) for item in written[names.NETWORK_STATUS_ANNOTATION]] == [
        ("eth0", None),
        ("ovn-udn1", True),
        ("net1", None),
        ("raw0", None),
    ]
    assert written[names.POD_NETWORKS_ANNOTATION]["default"]["role"] == "infrastructure-locked"
    assert set(node.kernel.pods[NETNS]) == {"ovn-udn1", "net1", "raw0"}


async def test_a_pod_without_a_primary_network_keeps_its_default_route(node: Node) -> None:
    node.api.namespace("red", labelled=False)
    node.pod(asks="storage", red__storage="10.30.0.1/24")
    answer = await node.add()
    assert answer["ips"][0] == DEFAULT["ips"][0]
    assert answer["routes"] == DEFAULT["routes"]
    written = node.annotations()
    assert [(item["interface"], item.get("default")) for item in written[names.NETWORK_STATUS_ANNOTATION]] == [
        ("eth0", True),
        ("net1", None),
    ]
    assert "default" not in written[names.POD_NETWORKS_ANNOTATION]


async def test_a_pod_that_wants_nothing_is_passed_on(node: Node) -> None:
    node.api.namespace("red", labelled=False)
    node.pod()
    assert await node.add() == DEFAULT
    assert node.ports() == set()
    assert names.NETWORK_STATUS_ANNOTATION not in node.annotations()


async def test_with_multus_each_call_makes_one_interface(node: Node) -> None:
    node.pod(asks="storage,bare", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24", red__bare="")
    node.multus.called()
    answer = await node.add()
    assert [item["name"] for item in answer["interfaces"]] == ["cni0", "eth0", "ovn-udn1"]
    assert names.NETWORK_STATUS_ANNOTATION not in node.annotations(), "that is Multus' to write"
    assert node.annotations()[names.POD_NETWORKS_ANNOTATION]["default"]["ip_address"] == "10.244.0.5/24"
    answer = await node.add("red/storage", "net1")
    assert answer["interfaces"] == [{"name": "net1", "mac": "0a:58:00:00:01:01", "sandbox": NETNS}]
    assert answer["ips"] == [{"address": "10.30.0.1/24", "interface": 0}]
    await node.add("red/bare", "other0")
    assert node.ports() == {(1, "c1", "ovn-udn1"), (2, "c1", "net1"), (3, "c1", "other0")}
    for nad, interface in ((None, "eth0"), ("red/storage", "net1"), ("red/bare", "other0")):
        await node.call(Command.CHECK, nad, interface, {"cniVersion": "1.0.0"})


async def test_a_meta_plugin_s_del_ends_its_interface_and_the_chain_s_all(node: Node) -> None:
    node.pod(asks="storage,bare", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24", red__bare="")
    await node.add()
    await node.call(Command.DEL, "red/storage", "net1")
    assert node.ports() == {(1, "c1", "ovn-udn1"), (3, "c1", "net2")}
    assert (await node.refusal(Command.CHECK, "red/storage", "net1", {})).code == Code.CHECK_FAILED
    await node.call(Command.DEL, "red/storage", "net1")
    await node.call(Command.DEL, container="another")
    assert len(node.ports()) == 2
    await node.call(Command.DEL)
    assert node.ports() == set()
    await node.call(Command.DEL)


async def test_check_looks_at_every_interface_that_add_made(node: Node) -> None:
    node.pod(asks="storage", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24")
    await node.add()
    await node.call(Command.CHECK, previous=DEFAULT)
    del node.kernel.pods[NETNS]["net1"]
    assert "net1 lacks its addresses" in (await node.refusal(Command.CHECK, previous=DEFAULT)).message


async def test_garbage_of_the_chain_is_told_by_container_and_of_a_meta_plugin_by_interface(node: Node) -> None:
    node.pod(asks="storage,bare", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24", red__bare="")
    await node.add()
    before = metrics.LEFT_OVERS.labels("port")._value.get()
    await node.call(Command.GC, valid=(Attachment("c1", "eth0"),))
    assert len(node.ports()) == 3, "the container is there, with all its interfaces"
    assert metrics.LEFT_OVERS.labels("port")._value.get() == before
    await node.call(Command.GC, "red/storage", valid=(Attachment("c1", "net2"),))
    assert node.ports() == {(1, "c1", "ovn-udn1"), (3, "c1", "net2")}
    await node.call(Command.GC, valid=(Attachment("c2", "eth0"),))
    assert node.ports() == set()
    assert metrics.LEFT_OVERS.labels("port")._value.get() == before + 3


async def test_a_refused_request_says_why(node: Node) -> None:
    node.pod(asks="green/secret", red__tenant="10.20.0.3/16")
    error = await node.refusal(Command.ADD, previous=DEFAULT)
    assert (error.code, "belongs to another namespace" in error.message) == (Code.INVALID_CONFIG, True)
    node.pod(asks="tenant", red__tenant="10.20.0.3/16")
    assert "is a primary network" in (await node.refusal(Command.ADD, previous=DEFAULT)).message
    node.pod(asks="[", red__tenant="10.20.0.3/16")
    error = await node.refusal(Command.ADD, previous=DEFAULT)
    assert (error.code, "not JSON" in error.message) == (Code.INVALID_CONFIG, True)
    assert "is a primary network" in (await node.refusal(Command.ADD, "red/tenant", "net1")).message
    assert node.ports() == set()


async def test_a_network_of_another_plugin_is_not_ours_to_give(node: Node) -> None:
    foreign = {"metadata": {"namespace": "red", "name": "other"}, "spec": {"config": '{"type": "macvlan"}'}}
    node.api.stores[NADS].put(foreign)
    node.pod(asks="other", red__tenant="10.20.0.3/16")
    answer = await node.add()
    assert [item["name"] for item in answer["interfaces"]] == ["cni0", "eth0", "ovn-udn1"]


async def test_add_waits_for_what_is_not_there_and_says_what_that_is(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachments, "ALLOCATION_TIMEOUT", 0.05)
    node.pod(asks="storage,absent", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24")
    error = await node.refusal(Command.ADD, previous=DEFAULT)
    assert (error.code, "red/absent does not exist" in error.message) == (Code.TRY_AGAIN_LATER, True)
    node.pod(asks="storage", red__tenant="10.20.0.3/16")
    assert "has no entry for red/storage" in (await node.refusal(Command.ADD, previous=DEFAULT)).message
    assert node.ports() == set(), "nothing is half done"
    node.api.stores[PODS].drop("red/a")
    assert "has not shown this pod" in (await node.refusal(Command.ADD, previous=DEFAULT)).message
    node.synced.clear()
    assert (await node.refusal(Command.STATUS)).code == Code.NOT_AVAILABLE
    node.synced.set()
    node.missing = "a table is gone"
    assert (await node.refusal(Command.STATUS)).code == Code.NOT_AVAILABLE
    node.broken = True
    error = await node.refusal(Command.STATUS)
    assert (error.code, error.details) == (Code.LIMITED_CONNECTIVITY, "a table is gone")
    node.synced.clear()
    assert "cannot read the cluster" in (await node.refusal(Command.ADD, previous=DEFAULT)).message


async def test_add_goes_on_as_soon_as_the_controller_has_written(node: Node) -> None:
    node.pod(asks="storage", red__tenant="10.20.0.3/16")
    adding = asyncio.create_task(node.add())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not adding.done()
    node.pod(asks="storage", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24")
    async with asyncio.timeout(30):
        answer = await adding
    assert [item["name"] for item in answer["interfaces"]][-1] == "net1"


async def test_a_name_that_the_runtime_chose_is_known_to_the_next_agent(node: Node, tmp_path: Path) -> None:
    node.pod(asks="storage", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24")
    await node.add("red/storage", "store0")
    fresh = type(node.api)()
    fresh.namespace("red")
    fresh.node("n1", "172.30.0.11")
    for key, network in (("red/tenant", PRIMARY), ("red/storage", STORAGE)):
        fresh.nad(key, network)
    fresh.pod("red/a", asks="storage", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24")
    after = Node(fresh, tmp_path)
    after.kernel = node.kernel
    after.networks = Networks(node.kernel, fresh.cluster, "n1", (), lambda endpoint: None)
    assert [endpoint.interface for endpoint in await after.networks.adopt()] == ["store0"]
    assert node.ports() == {(2, "c1", "store0")}


async def test_add_waits_for_the_policies_that_are_older_than_the_pod(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = {"namespace": "red", "name": "deny"}
    older = node.kube.seed(POLICIES, {"metadata": metadata, "spec": {"podSelector": {}}})
    node.pod(red__tenant="10.20.0.3/16")
    monkeypatch.setattr(attachments, "POLICIES_TIMEOUT", 0.05)
    error = await node.refusal(Command.ADD, previous=DEFAULT)
    assert (error.code, node.ports()) == (Code.TRY_AGAIN_LATER, set())
    assert "its NetworkPolicies are not known" in error.message
    monkeypatch.setattr(attachments, "POLICIES_TIMEOUT", 60.0)
    async with asyncio.TaskGroup() as tasks:
        adding = tasks.create_task(node.add())
        for _ in range(50):
            await asyncio.sleep(0)
        assert node.ports() == set()
        node.api.stores[POLICIES].put(older)
        await adding
    assert node.ports() == {(1, "c1", "ovn-udn1")}


async def test_an_agent_that_starts_while_a_nad_is_missing_leaves_its_pods_connected(node: Node) -> None:
    node.pod(asks="storage", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24")
    await node.add()
    fresh = type(node.api)()
    fresh.namespace("red")
    fresh.node("n1", "172.30.0.11")
    fresh.nad("red/tenant", PRIMARY)
    fresh.pod("red/a", asks="storage", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24")
    after = Networks(node.kernel, fresh.cluster, "n1", (), lambda endpoint: None)
    assert [endpoint.network for endpoint in await after.adopt()] == ["red_tenant"]
    assert node.ports() == {(1, "c1", "ovn-udn1"), (2, "c1", "net1")}
    fresh.nad("red/storage", STORAGE)
    assert fresh.networks[-1] == "red_storage"
    await after.render("red_storage")
    assert len(node.ports()) == 2
    fresh.stores[NADS].drop("red/storage")
    fresh.stores[PODS].drop("red/a")
    await Networks(node.kernel, fresh.cluster, "n1", (), lambda endpoint: None).adopt()
    assert node.ports() == set(), "nobody misses it"


async def test_what_was_deleted_while_no_agent_ran_is_caught_up_with(node: Node, tmp_path: Path) -> None:
    node.pod(asks="storage,bare", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24", red__bare="")
    await node.add()
    left = tmp_path / "cni-deleted"
    await node.handler.catch_up(left)
    left.mkdir()
    config = STORAGE.to_nad_config("red/storage")
    environment = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "net1"}
    (left / "c1@net1").write_bytes(encode_call(Call(environment, config.encode())))
    (left / "c2@eth0").write_bytes(b"{")
    (left / ".c3@eth0.77").write_bytes(b"not complete")
    await node.handler.catch_up(left)
    assert node.ports() == {(1, "c1", "ovn-udn1"), (3, "c1", "net2")}
    assert [path.name for path in left.iterdir()] == [".c3@eth0.77"], "what is carried out, or never can be, is gone"
