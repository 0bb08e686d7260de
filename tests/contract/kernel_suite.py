"""What every kernel must do. The fake runs it in the test's own process, the real one in a program (``__main__``)."""

import asyncio
import subprocess
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

from vmnet.kernel.api import Gone, Kernel
from vmnet.kernel.linux import LinuxKernel
from vmnet.model import names
from vmnet.model.addresses import mac_for
from vmnet.model.endpoint import (
    Endpoint,
    LocalPort,
    MachineReference,
    Node,
    NodeNetwork,
    PodReference,
    PortState,
    RemoteEndpoint,
)
from vmnet.model.names import InterfaceName, NetworkId
from vmnet.model.network import Network
from vmnet.plan import firewall, ops
from vmnet.plan import network as planner
from vmnet.plan import node as node_planner
from vmnet.plan.network import PodInterface

NETWORK = Network(name="n", id=NetworkId(7), subnets=(ip_network("192.168.0.0/16"), ip_network("fd20::/64")))
HERE, THERE = Node("n1", ip_address("127.0.0.1")), Node("n2", ip_address("172.30.0.12"))
POD = "/run/netns/pod"


def endpoint(host: int, node: str) -> Endpoint:
    addresses = (ip_interface(f"192.168.0.{host}/16"), ip_interface(f"fd20::{host}/64"))
    machine = MachineReference("ns", f"vm{host}")
    reference = PodReference("ns", f"p{host}", f"uid-{host}-{node}")
    return Endpoint(reference, "n", node, mac_for(addresses[0].ip), addresses, machine=machine)


async def suite(make: Callable[[], Kernel], make_pod: Callable[[str], None]) -> None:
    """Render, attach, adopt, move, detach and remove; every second look has nothing to do."""
    kernel = make()
    namespace = NETWORK.namespace
    assert await kernel.observe_network(namespace) is None
    try:
        await kernel.packet_socket(namespace, names.BRIDGE)
        raise AssertionError("a socket in a namespace that is not there")
    except Gone:
        pass

    # The node, once.
    await kernel.apply(node_planner.plan(await kernel.observe_node()))
    assert node_planner.plan(await kernel.observe_node()) == ()

    # Who may speak for which networks.
    for vteps, networks in (((THERE.address,), {NETWORK.id}), ((), {NETWORK.id, NetworkId(8)}), ((), set())):
        await kernel.apply(node_planner.plan(await kernel.observe_node(), vteps=vteps, networks=networks))
        state_of_node = await kernel.observe_node()
        assert node_planner.plan(state_of_node, vteps=vteps, networks=networks) == ()
        assert state_of_node.sets["vteps4"] == {str(address) for address in vteps}

    # A network with a remote endpoint.
    desired = NodeNetwork(
        network=NETWORK,
        node=HERE,
        mtu=1450,
        join=node_planner.allocate_join(await kernel.observe_node(), NETWORK.id),
        remotes=(RemoteEndpoint(endpoint(12, "n2"), THERE.address),),
        peers=(THERE.address,),
    )
    await kernel.apply(planner.plan(desired, None))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert planner.plan(desired, state) == ()
    assert namespace in (await kernel.observe_node()).namespaces
    assert node_planner.allocate_join(await kernel.observe_node(), NETWORK.id) == desired.join

    # A standby port.
    port = LocalPort(endpoint(11, "n1"), PortState.STANDBY)
    name = port.endpoint.port
    make_pod(POD)
    desired = replace(desired, ports=(port,))
    await kernel.apply(planner.attach(desired, port, PodInterface(POD, "container"), state))
    await kernel.apply(planner.plan(desired, await kernel.observe_network(namespace)))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert state.links[name].master == names.BRIDGE
    assert state.links[name].up
    assert state.links[name].alias == "container"
    assert set(firewall.chains_of(name)) <= state.chains
    assert name in state.standby
    assert name not in state.open
    inside = await kernel.observe_pod(POD, names.PRIMARY_INTERFACE)
    assert inside is not None
    assert inside.mac == port.endpoint.mac
    assert inside.mtu == 1450
    assert set(port.endpoint.addresses) <= inside.addresses
    assert await kernel.observe_pod(POD, InterfaceName("none")) is None
    assert await kernel.observe_pod("/run/netns/none", names.PRIMARY_INTERFACE) is None

    # Somebody else takes over what is there.
    adopted = await make().observe_network(namespace)
    assert planner.plan(desired, adopted) == ()

    # The second key, and a machine that leaves.
    opened = ops.LoadFirewall(namespace, firewall.open_script(name))
    await kernel.apply((opened, *planner.repoint_local(namespace, port.endpoint)))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert name in state.open
    assert {entry.interface for entry in state.fdb if entry.mac == port.endpoint.mac} == {name}
    away = RemoteEndpoint(replace(port.endpoint, node="n2"), THERE.address)
    moved = ops.LoadFirewall(namespace, firewall.moved_script(port.endpoint.mac))
    await kernel.apply((moved, *planner.repoint_remote(namespace, away)))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert state.moved == {port.endpoint.mac}
    assert {entry.vtep for entry in state.fdb if entry.mac == port.endpoint.mac} == {THERE.address}
    back = ops.LoadFirewall(namespace, firewall.not_moved_script(port.endpoint.mac))
    await kernel.apply((back, *planner.repoint_local(namespace, port.endpoint)))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert state.moved == frozenset()
    assert planner.plan(desired, state) == ()

    # Sockets belong to the namespace.
    opened_socket = await kernel.packet_socket(namespace, names.BRIDGE, udp_ports=(67, 547))
    opened_socket.close()

    # Nothing stays.
    desired = replace(desired, ports=())
    await kernel.apply(planner.plan(desired, state))
    state = await kernel.observe_network(namespace)
    assert state is not None
    assert name not in state.links
    assert name not in state.standby | state.open
    assert not set(firewall.chains_of(name)) & state.chains
    await kernel.apply(planner.remove(NETWORK.id))
    assert await kernel.observe_network(namespace) is None
    node = await kernel.observe_node()
    assert namespace not in node.namespaces
    assert not node.joins
    await kernel.close()


def _make_pod(path: str) -> None:
    name = path.rpartition("/")[2]
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)


if __name__ == "__main__":
    asyncio.run(suite(LinuxKernel, _make_pod))
