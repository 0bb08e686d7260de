"""What the API says and what the kernel's gate did, in every order in which they can come."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from ipaddress import ip_network
from typing import Any, cast

import pytest

from vmnet.agent.announcer import Announcer
from vmnet.agent.cluster import Cluster, Stores
from vmnet.agent.cut_over import CutOvers
from vmnet.agent.networks import Networks
from vmnet.kernel.fake import FakeKernel
from vmnet.kube.api import (
    ENDPOINT_SLICES,
    NADS,
    NAMESPACES,
    NODES,
    PODS,
    POLICIES,
    SERVICES,
    VMIS,
    KubeError,
)
from vmnet.kube.fake import FakeInformer, FakeKube
from vmnet.model import addresses, names
from vmnet.model.endpoint import Endpoint, MachineReference, PortState
from vmnet.model.migration import Carried, LastFrame, Way
from vmnet.model.names import InterfaceName, NamespaceName, NetworkId
from vmnet.model.network import Network, Role
from vmnet.plan import firewall, ops
from vmnet.plan.network import PodInterface

KINDS = (PODS, NODES, NAMESPACES, NADS, VMIS, SERVICES, ENDPOINT_SLICES, POLICIES)
NETWORK = Network("blue_net", NetworkId(7), role=Role.PRIMARY, subnets=(ip_network("192.168.0.0/16"),))
NAD = "blue/net"
MACHINE = MachineReference("blue", "vm")
MAC = "0a:58:c0:a8:00:05"
RARP = b"\xff" * 6 + addresses.mac_bytes(names.MacAddress(MAC)) + b"\x80\x35" + bytes(46)


class Announcements:
    """Counts; what is announced is the announcer's own test."""

    def __init__(self) -> None:
        self.said: list[str] = []

    async def prepare(self, network: Network, mtu: int, endpoint: Endpoint) -> None:
        return

    def announce(self, endpoint: Endpoint, now: float) -> int:
        self.said.append(endpoint.pod.name)
        return 1

    def cancel(self, endpoint: Endpoint) -> None:
        self.said.append(f"-{endpoint.pod.name}")

    def forget(self, endpoint: Endpoint) -> None:
        return

    async def settled(self, endpoint: Endpoint) -> Counter[Any]:
        return Counter()


class Arrivals:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def expect(self, network: Network, endpoint: Endpoint) -> None:
        self.told.append(f"expect {endpoint.pod.name}")

    def arrived(self, endpoint: Endpoint) -> None:
        self.told.append(f"arrived {endpoint.pod.name}")

    def forget(self, endpoint: Endpoint) -> None:
        self.told.append(f"forget {endpoint.pod.name}")

    async def settled(self, endpoint: Endpoint, seconds: float) -> Carried:
        return Carried(Way.STREAMED, 3, 0.25)

    def last_frame(self, endpoint: Endpoint) -> LastFrame | None:
        return LastFrame(1795426800.5, 0.001)


class PacketEnd(socket.socket):
    """A datagram end that names the sender as a packet socket does: a frame from the guest's side."""

    def recvmsg(self, size: int, ancillary: int = 0, flags: int = 0) -> Any:
        data, found, bits, _ = super().recvmsg(size, ancillary, flags)
        return data, found, bits, ("port", 0x8035, socket.PACKET_HOST, 1, b"")


class PacketKernel(FakeKernel):
    async def packet_socket(
        self,
        namespace: NamespaceName,
        interface: InterfaceName,
        *,
        protocols: Sequence[int] = (),
        udp_ports: Sequence[int] = (),
    ) -> socket.socket:
        found = await super().packet_socket(namespace, interface, protocols=protocols, udp_ports=udp_ports)
        end = PacketEnd(fileno=found.detach())
        end.setblocking(False)
        return end


class World:
    """Node ``n1`` or ``n2`` of a machine that goes from pod ``source`` on n1 to pod ``target`` on n2."""

    def __init__(self, node: str) -> None:
        self.kernel, self.kube, self.says = PacketKernel(), FakeKube(), Announcements()
        self.stores = {kind: FakeInformer(kind) for kind in KINDS}
        self.cluster = Cluster(
            Stores(*(cast(Any, self.stores[kind]) for kind in KINDS)),
            on_network=lambda name: None,
            on_machine=lambda machine: None,
        )
        self.networks = Networks(self.kernel, self.cluster, node, (), lambda endpoint: None)
        self.arrivals = Arrivals()
        self.cut_overs = CutOvers(
            self.kernel, self.kube, self.cluster, self.networks, cast(Announcer, self.says), cast(Any, self.arrivals)
        )
        for number in (1, 2):
            address = [{"type": "InternalIP", "address": f"172.30.0.1{number}"}]
            self.stores[NODES].put({"metadata": {"name": f"n{number}"}, "status": {"addresses": address}})
        self.stores[NADS].put(
            {
                "metadata": {"namespace": "blue", "name": "net", "annotations": {names.NETWORK_ID_ANNOTATION: "7"}},
                "spec": {"config": NETWORK.to_nad_config(NAD)},
            }
        )

    def pod(self, name: str, node: str, *, ready: bool = False, phase: str = "Running") -> None:
        allocated = {NAD: {"ip_addresses": ["192.168.0.5/16"], "mac_address": MAC}}
        annotations = {names.POD_NETWORKS_ANNOTATION: json.dumps(allocated), names.DOMAIN_ANNOTATION: "vm"}
        if ready:
            annotations[names.TARGET_READY_ANNOTATION] = "2026-11-23T10:00:00Z"
        metadata = {
            "namespace": "blue",
            "name": name,
            "uid": f"uid-{name}",
            "labels": {names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE},
            "annotations": annotations,
            "creationTimestamp": {"source": "2026-11-23T09:00:00Z"}.get(name, "2026-11-23T09:30:00Z"),
        }
        self.stores[PODS].put({"metadata": metadata, "spec": {"nodeName": node}, "status": {"phase": phase}})

    def vmi(self, node: str, **state: Any) -> None:
        status: dict[str, Any] = {"nodeName": node}
        if state:
            status["migrationState"] = {"sourcePod": "source", "targetPod": "target", **state}
        self.stores[VMIS].put({"metadata": {"namespace": "blue", "name": "vm"}, "status": status})

    def endpoint(self, pod: str) -> Endpoint:
        found = self.cluster.endpoint(f"blue/{pod}")
        assert found is not None
        return found

    async def attach(self, pod: str, state: PortState) -> Endpoint:
        endpoint, netns = self.endpoint(pod), f"/run/netns/{pod}"
        self.kernel.make_pod(netns)
        mtu = await self.networks.attach(NETWORK, endpoint, state, PodInterface(netns, pod))
        await self.cut_overs.stage(NETWORK, mtu, endpoint, state)
        return endpoint

    async def gate_does(self, script: str) -> None:
        """The kernel's own doing: no part of the agent takes part."""
        await self.kernel.apply((ops.LoadFirewall(NETWORK.namespace, script),))

    async def is_open(self, endpoint: Endpoint) -> bool:
        gate = await self.networks.gate(NETWORK, endpoint)
        assert gate is not None
        return gate.open

    async def reconcile(self) -> None:
        await self.cut_overs.reconcile(MACHINE)


@pytest.fixture
async def source() -> AsyncIterator[World]:
    """n1, from which the machine goes."""
    world = World("n1")
    world.pod("source", "n1")
    world.vmi("n1")
    await world.attach("source", PortState.ACTIVE)
    world.pod("target", "n2")
    world.vmi("n1", startTimestamp="now")
    yield world
    await world.cut_overs.close()
    await world.kernel.close()


@pytest.fixture
async def target() -> AsyncIterator[World]:
    """n2, to which the machine goes; its port is staged."""
    world = World("n2")
    world.pod("source", "n1")
    world.pod("target", "n2")
    world.vmi("n1", startTimestamp="now")
    await world.attach("target", PortState.STANDBY)
    yield world
    await world.cut_overs.close()
    await world.kernel.close()


async def test_a_target_stays_closed_until_one_of_the_keys_comes(target: World) -> None:
    await target.reconcile()
    assert not await target.is_open(target.endpoint("target"))
    assert target.says.said == []


async def test_the_annotation_opens_a_target_whose_guest_said_nothing(target: World) -> None:
    target.pod("target", "n2", ready=True)
    await target.reconcile()
    assert await target.is_open(target.endpoint("target"))
    assert target.says.said == ["target"]
    await target.reconcile()
    assert target.says.said == ["target"], "said once"


async def test_the_frame_is_made_permanent_and_announced_once(target: World) -> None:
    endpoint = target.endpoint("target")
    await target.gate_does(firewall.open_script(endpoint.port))
    target.kernel.peers[-1][1].send(RARP)
    async with asyncio.timeout(10):
        while not target.says.said:
            await asyncio.sleep(0)
    assert ops.SetFdb(NETWORK.namespace, endpoint.port, endpoint.mac) in target.kernel.applied
    target.pod("target", "n2", ready=True)
    await target.reconcile()
    assert target.says.said == ["target"], "the second key finds the door open"


async def test_connections_are_asked_for_from_the_staging_on_and_told_when_the_guest_is_here(target: World) -> None:
    endpoint = target.endpoint("target")
    assert target.arrivals.told == ["expect target"]
    await target.gate_does(firewall.open_script(endpoint.port))
    target.kernel.peers[-1][1].send(RARP)
    async with asyncio.timeout(10):
        while not target.says.said:
            await asyncio.sleep(0)
    assert set(target.arrivals.told[1:]) == {"arrived target"}
    target.cut_overs.forget(endpoint)
    assert target.arrivals.told[-1] == "forget target"


async def test_a_target_opened_by_its_frame_stays_open_while_the_api_is_behind(target: World) -> None:
    endpoint = target.endpoint("target")
    await target.gate_does(firewall.open_script(endpoint.port))
    await target.reconcile()
    assert await target.is_open(endpoint)


async def test_a_target_stays_open_while_the_machine_s_store_has_no_migration_yet(target: World) -> None:
    """The pods' watch and the machines' are two: the one may be behind the other."""
    endpoint = target.endpoint("target")
    target.vmi("n1")
    await target.gate_does(firewall.open_script(endpoint.port))
    await target.reconcile()
    assert await target.is_open(endpoint)


async def test_a_target_stays_open_while_the_store_holds_the_previous_migration(target: World) -> None:
    endpoint = target.endpoint("target")
    target.vmi("n1", sourcePod="earlier", targetPod="source", completed=True)
    await target.gate_does(firewall.open_script(endpoint.port))
    await target.reconcile()
    assert await target.is_open(endpoint)


async def test_a_target_closes_when_its_migration_failed(target: World) -> None:
    endpoint = target.endpoint("target")
    await target.gate_does(firewall.open_script(endpoint.port))
    target.vmi("n1", failed=True, completed=True)
    await target.reconcile()
    assert not await target.is_open(endpoint)


async def test_a_source_stays_open_until_the_api_says_otherwise(source: World) -> None:
    await source.reconcile()
    assert await source.is_open(source.endpoint("source"))


@pytest.mark.parametrize("how", ["annotation", "node"])
async def test_a_source_closes_on_the_api_s_word(source: World, how: str) -> None:
    if how == "annotation":
        source.pod("target", "n2", ready=True)
    else:
        source.vmi("n2", startTimestamp="now")
    await source.reconcile()
    assert not await source.is_open(source.endpoint("source"))
    there = [op for op in source.kernel.applied if isinstance(op, ops.SetFdb) and op.interface == names.VXLAN_L2]
    assert str(there[-1].vtep) == "172.30.0.12"


async def test_a_source_that_the_frame_closed_is_not_reopened_by_an_api_that_is_behind(source: World) -> None:
    await source.gate_does(firewall.moved_script(source.endpoint("source").mac))
    await source.reconcile()
    assert not await source.is_open(source.endpoint("source"))
    assert source.says.said == []


async def test_a_failed_migration_reopens_the_source_and_says_so(source: World) -> None:
    await source.gate_does(firewall.moved_script(source.endpoint("source").mac))
    source.vmi("n1", failed=True, completed=True)
    await source.reconcile()
    assert await source.is_open(source.endpoint("source"))
    assert source.says.said == ["source"]


async def test_a_source_reopens_when_the_target_s_pod_died(source: World) -> None:
    await source.gate_does(firewall.moved_script(source.endpoint("source").mac))
    source.pod("target", "n2", phase="Failed")
    await source.reconcile()
    assert await source.is_open(source.endpoint("source"))


async def test_a_source_that_a_late_frame_closed_reopens_though_the_next_migration_has_begun(source: World) -> None:
    source.pod("target", "n2", phase="Failed")
    source.vmi("n1", failed=True, completed=True)
    await source.gate_does(firewall.moved_script(source.endpoint("source").mac))
    source.pod("next", "n2", phase="Pending")
    await source.reconcile()
    assert await source.is_open(source.endpoint("source"))
    assert source.says.said == ["source"]


async def test_a_source_stays_closed_once_the_next_target_may_have_the_guest(source: World) -> None:
    source.pod("target", "n2", phase="Failed")
    source.vmi("n1", failed=True, completed=True)
    source.pod("next", "n2")
    await source.gate_does(firewall.moved_script(source.endpoint("source").mac))
    await source.reconcile()
    assert not await source.is_open(source.endpoint("source"))


@pytest.mark.parametrize("kind", [PODS, VMIS], ids=lambda kind: kind.plural)
async def test_a_source_stays_closed_while_a_watch_is_broken_that_may_hide_the_next_target(
    source: World, kind: Any
) -> None:
    source.vmi("n1", failed=True, completed=True)
    source.pod("target", "n2", phase="Pending")
    source.stores[kind].failure = KubeError("no answer")
    await source.gate_does(firewall.moved_script(source.endpoint("source").mac))
    source.vmi("n1", startTimestamp="later")
    await source.reconcile()
    assert not await source.is_open(source.endpoint("source"))


async def test_a_source_whose_pod_goes_while_it_is_looked_at_does_not_call_its_machine_back(source: World) -> None:
    """The pod that is left is the one that the machine moved to, and all is settled: but not here."""
    endpoint = source.endpoint("source")
    await source.gate_does(firewall.moved_script(endpoint.mac))
    source.vmi("n2", completed=True)
    look = source.networks.gate

    async def gate(network: Network, found: Endpoint) -> Any:
        seen = await look(network, found)
        source.stores[PODS].drop("blue/source")
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source.networks, "gate", gate)
        await source.reconcile()
    assert not await source.is_open(endpoint)
    assert source.says.said == []


async def test_a_former_target_whose_frame_was_missed_is_not_reopened_when_it_leaves(target: World) -> None:
    """Its guest spoke while nobody listened (between two agents), ran here, and now goes on to a third pod."""
    endpoint = target.endpoint("target")
    await target.gate_does(firewall.open_script(endpoint.port))
    target.pod("target", "n2", ready=True)
    target.pod("source", "n1", phase="Succeeded")
    target.vmi("n2", completed=True)
    await target.reconcile()
    assert await target.is_open(endpoint)
    target.pod("next", "n1")
    target.vmi("n2", sourcePod="target", targetPod="next", startTimestamp="later")
    await target.gate_does(firewall.moved_script(endpoint.mac))
    await target.reconcile()
    assert not await target.is_open(endpoint)


async def test_a_frame_that_came_while_no_agent_ran_is_told_and_written_down_once(target: World) -> None:
    endpoint = target.endpoint("target")
    created = await target.kube.create(PODS, {"metadata": {"namespace": "blue", "name": "target"}}, "blue")
    await target.gate_does(firewall.open_script(endpoint.port))
    target.cut_overs.catch_up(NETWORK, replace(endpoint, pod=replace(endpoint.pod, uid=created["metadata"]["uid"])))
    async with asyncio.timeout(10):
        while True:
            pod = await target.kube.get(PODS, "target", "blue")
            if names.CUT_OVER_ANNOTATION in (pod["metadata"].get("annotations") or {}):
                break
            await asyncio.sleep(0)
    written = json.loads(pod["metadata"]["annotations"][names.CUT_OVER_ANNOTATION])
    assert (written["key"], written["opened_at"], written["frame_at"]) == ("frame", None, None), "nobody saw when"
    assert target.says.said == ["target"]
    held = target.stores[PODS].held["blue/target"]
    target.stores[PODS].put({**held, "metadata": {**held["metadata"], "annotations": pod["metadata"]["annotations"]}})
    target.cut_overs.catch_up(NETWORK, endpoint)
    assert target.says.said == ["target"]


async def test_a_source_s_port_that_lost_its_rules_after_the_move_stays_closed(source: World) -> None:
    endpoint = source.endpoint("source")
    source.pod("target", "n2", ready=True)
    state = source.kernel.networks[NETWORK.namespace]
    source.kernel.networks[NETWORK.namespace] = replace(state, sets={}, chains=frozenset({"port_in"}))
    await source.networks.render(NETWORK.name)
    assert not await source.is_open(endpoint)
