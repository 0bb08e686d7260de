"""An agent that dies between any two operations, on the real kernel; a program that runs in namespaces of its own.

``python recovery.py CASE`` exits 0 when the case holds.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

from vmnet.kernel.linux import LinuxKernel
from vmnet.kernel.namespaces import Workers
from vmnet.model import names
from vmnet.model.addresses import IPNetwork, mac_for
from vmnet.model.endpoint import Endpoint, LocalPort, Node, NodeNetwork, PodReference, PortState, RemoteEndpoint
from vmnet.model.names import NamespaceName, NetworkId
from vmnet.model.network import Network, Role, Topology
from vmnet.plan import firewall, ops
from vmnet.plan import network as planner
from vmnet.plan import node as node_planner
from vmnet.plan.network import PodInterface
from vmnet.plan.state import NetworkState

THERE = Node("n2", ip_address("172.30.0.12"), 2)
POD = "/run/netns/pod"


def endpoint(host: int, node: str) -> Endpoint:
    addresses = (ip_interface(f"192.168.0.{host}/16"), ip_interface(f"fd20::{host}/64"))
    return Endpoint(PodReference("ns", f"p{host}", f"uid-{host}"), "n", node, mac_for(addresses[0].ip), addresses)


def in_pod(*arguments: str) -> str:
    return subprocess.run(["ip", "-n", "pod", *arguments], check=True, capture_output=True, text=True).stdout


async def desired(kernel: LinuxKernel, number: int) -> NodeNetwork:
    subnets = (ip_network("192.168.0.0/16"), ip_network("fd20::/64"))
    return NodeNetwork(
        network=Network(name="n", id=NetworkId(number), subnets=subnets),
        node=Node("n1", ip_address("127.0.0.1"), 1),
        mtu=1450,
        join=node_planner.allocate_join(await kernel.observe_node(), NetworkId(number)),
        remotes=(RemoteEndpoint(endpoint(12, "n2"), THERE.address),),
        peers=(THERE.address,),
        routers=(THERE,),
    )


async def routed(kernel: LinuxKernel, number: int) -> NodeNetwork:
    """A Layer3 network, whose other part is on the other node."""

    def parts(node: int) -> tuple[IPNetwork, ...]:
        return ip_network(f"103.103.{node}.0/24"), ip_network(f"fd20:0:0:{node}::/64")

    ranges = (ip_network("103.103.0.0/16"), ip_network("fd20::/48"))
    network = Network("r", NetworkId(number), Topology.LAYER3, subnets=ranges, host_prefixes=(24, 64))
    wanted = await desired(kernel, number)
    others = (replace(THERE, subnets=(("r", parts(2)),)),)
    return replace(wanted, network=network.at(parts(1)), remotes=(), peers=(), routers=others)


async def switched(kernel: LinuxKernel, number: int) -> NodeNetwork:
    """A secondary network."""
    wanted = await desired(kernel, number)
    return replace(wanted, network=replace(wanted.network, role=Role.SECONDARY), routers=())


async def local(kernel: LinuxKernel, number: int) -> NodeNetwork:
    """A Localnet network in the node's own bridge."""
    wanted = await switched(kernel, number)
    network = replace(wanted.network, topology=Topology.LOCALNET, physical="lan")
    bridge = names.InterfaceName("lan0")
    if bridge not in (await kernel.observe_node()).bridges:
        _make_bridge(bridge)
    return replace(wanted, network=network, remotes=(), peers=(), bridge=bridge, bridge_mtu=1500)


def _make_bridge(name: str) -> None:
    subprocess.run(["ip", "link", "add", name, "up", "type", "bridge"], check=True)


def _members(bridge: str) -> set[str]:
    listed = subprocess.run(["ip", "-j", "link", "show", "master", bridge], check=True, capture_output=True, text=True)
    return {item["ifname"] for item in json.loads(listed.stdout or "[]") if item.get("operstate") != "DOWN"}


async def observed(kernel: LinuxKernel, namespace: NamespaceName) -> NetworkState:
    state = await kernel.observe_network(namespace)
    assert state is not None
    return state


async def completed(kernel: LinuxKernel, wanted: NodeNetwork) -> None:
    """What a new agent does: look, plan, apply. It must end up with nothing to do and everything in place."""
    namespace = wanted.network.namespace
    await kernel.apply(planner.plan(wanted, await kernel.observe_network(namespace)))
    assert planner.plan(wanted, await observed(kernel, namespace)) == ()
    node = await kernel.observe_node()
    if wanted.network.joined:
        assert node.joins[names.join_interface(wanted.network.id)].ipv4 == wanted.join.node_ipv4
        assert node.joins[names.join_interface(wanted.network.id)].ipv6 == wanted.join.node_ipv6
    if wanted.bridge is not None:
        assert _members(wanted.bridge) == {names.localnet_interface(wanted.network.id)}
    worker = Workers()
    for key, value in planner.SYSCTLS if wanted.network.routed else planner.SWITCHED_SYSCTLS:
        path = Path("/proc/sys") / key
        if path.exists():
            assert (await worker.run(f"/run/netns/{namespace}", path.read_text)).strip() == value, key
    worker.close()


async def death_while_a_network_is_made(kernel: LinuxKernel) -> None:
    await _deaths(kernel, desired)


async def death_while_a_layer3_network_is_made(kernel: LinuxKernel) -> None:
    await _deaths(kernel, routed)


async def death_while_a_secondary_network_is_made(kernel: LinuxKernel) -> None:
    await _deaths(kernel, switched)


async def death_while_a_localnet_network_is_made(kernel: LinuxKernel) -> None:
    await _deaths(kernel, local)


async def _deaths(kernel: LinuxKernel, make: Callable[[LinuxKernel, int], Awaitable[NodeNetwork]]) -> None:
    whole = planner.plan(await make(kernel, 1), None)
    for done in range(1, len(whole)):
        wanted = await make(kernel, done)
        await kernel.apply(planner.plan(wanted, None)[:done])
        wanted = replace(wanted, join=node_planner.allocate_join(await kernel.observe_node(), NetworkId(done)))
        try:
            await completed(kernel, wanted)
        except AssertionError as error:
            raise AssertionError(f"death after {done} operations, the last {whole[done - 1]}: {error}") from error
        await kernel.apply(planner.remove(NetworkId(done)))


async def death_while_a_port_is_made(kernel: LinuxKernel) -> None:
    """The runtime asks again, for the same pod and the same namespace, whose eth0 has its own default route."""
    in_pod("link", "add", "eth0", "type", "veth", "peer", "name", "other")
    in_pod("addr", "add", "10.244.1.2/24", "dev", "eth0")
    for name in ("eth0", "other"):
        in_pod("link", "set", name, "up")
    in_pod("route", "add", "default", "via", "10.244.1.1", "dev", "eth0")
    wanted = await desired(kernel, 7)
    await kernel.apply(planner.plan(wanted, None))
    namespace = wanted.network.namespace
    port = LocalPort(endpoint(11, "n1"), PortState.STANDBY)
    pod = PodInterface(POD, "container", ((ip_interface("10.244.1.2/24"), ip_address("10.244.1.1")),))
    whole = planner.attach(wanted, port, pod, await observed(kernel, namespace))
    wanted = replace(wanted, ports=(port,))
    for done in range(1, len(whole) + 1):
        await kernel.apply(planner.attach(wanted, port, pod, await observed(kernel, namespace))[:done])
        await kernel.apply(planner.attach(wanted, port, pod, await observed(kernel, namespace)))
        await completed(kernel, wanted)
        state = await observed(kernel, namespace)
        assert state.standby == {port.endpoint.port}
        rules = in_pod("rule")
        assert rules.count("from 10.244.1.2 lookup") == 1, rules
        await kernel.apply(planner.detach(namespace, port.endpoint.port, state))
        assert not (await observed(kernel, namespace)).ports()


async def a_port_goes_while_its_state_changes(kernel: LinuxKernel) -> None:
    """Between look and removal its guest opens it, another removal is faster, or the kernel drops its chains."""
    wanted = await desired(kernel, 7)
    await kernel.apply(planner.plan(wanted, None))
    namespace, port = wanted.network.namespace, LocalPort(endpoint(11, "n1"), PortState.STANDBY)
    name = port.endpoint.port
    pod = PodInterface(POD, "container")

    async def gone() -> None:
        state = await observed(kernel, namespace)
        for set_name, elements in state.sets.items():
            assert name not in {element[0] for element in elements}, f"{set_name} keeps {elements}"
        assert not set(firewall.chains_of(name)) & state.chains

    await kernel.apply(planner.attach(wanted, port, pod, await observed(kernel, namespace)))
    before = await observed(kernel, namespace)
    await kernel.apply((ops.LoadFirewall(namespace, firewall.open_script(name)),))
    await kernel.apply(planner.detach(namespace, name, before))
    await gone()
    await kernel.apply(planner.detach(namespace, name, before))
    await gone()


async def a_network_comes_back_at_once(kernel: LinuxKernel) -> None:
    """The kernel clears a namespace away in its own time; the VNI must be free before."""
    for _ in range(8):
        wanted = await desired(kernel, 7)
        await kernel.apply(planner.plan(wanted, None))
        # A socket, as of a responder that is still closing, keeps the namespace alive after its name is gone.
        held = await kernel.packet_socket(wanted.network.namespace, names.BRIDGE)
        await kernel.apply(planner.remove(NetworkId(7)))
        await completed(kernel, await desired(kernel, 7))
        held.close()
        await kernel.apply(planner.remove(NetworkId(7)))


async def a_thousand_machines(kernel: LinuxKernel) -> None:
    """Batches: one program run for a thousand entries, and one look that finds them all."""
    wanted = await desired(kernel, 7)
    await kernel.apply(planner.plan(wanted, None))
    remotes = []
    for number in range(1000):
        addresses = (
            ip_interface(f"192.168.{number // 250 + 1}.{number % 250 + 1}/16"),
            ip_interface(f"fd20::1:{number:x}/64"),
        )
        pod = PodReference("ns", f"p{number}", f"uid-{number}")
        remotes.append(RemoteEndpoint(Endpoint(pod, "n", "n2", mac_for(addresses[0].ip), addresses), THERE.address))
    wanted = replace(wanted, remotes=tuple(remotes))
    state = await observed(kernel, wanted.network.namespace)
    started = time.monotonic()
    found = planner.plan(wanted, state)
    planned = time.monotonic()
    await kernel.apply(found)
    applied = time.monotonic()
    state = await observed(kernel, wanted.network.namespace)
    seen = time.monotonic()
    assert planner.plan(wanted, state) == ()
    print(
        f"{len(found)} operations: plan {planned - started:.3f} s, apply {applied - planned:.3f} s,"
        f" look {seen - applied:.3f} s, plan again {time.monotonic() - seen:.3f} s"
    )
    await completed(kernel, replace(wanted, remotes=()))


CASES: dict[str, Callable[[LinuxKernel], Awaitable[None]]] = {
    case.__name__: case
    for case in (
        death_while_a_network_is_made,
        death_while_a_layer3_network_is_made,
        death_while_a_secondary_network_is_made,
        death_while_a_localnet_network_is_made,
        death_while_a_port_is_made,
        a_port_goes_while_its_state_changes,
        a_network_comes_back_at_once,
        a_thousand_machines,
    )
}


async def main(case: str) -> None:
    kernel = LinuxKernel()
    await CASES[case](kernel)
    await kernel.close()


if __name__ == "__main__":
    subprocess.run(["ip", "netns", "add", "pod"], check=True)
    in_pod("link", "set", "lo", "up")
    asyncio.run(main(sys.argv[1]))
