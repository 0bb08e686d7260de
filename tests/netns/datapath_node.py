"""One node of a datapath test, as a program: reads a JSON list of steps, answers with a JSON list of results.

It runs inside a lab's node (its own network and mount namespace) and uses the product's planners and kernel seam.
"""

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from vmnet.kernel.linux import LinuxKernel
from vmnet.model.addresses import IPNetwork, mac_for
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
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role, Topology
from vmnet.plan import network as network_plan
from vmnet.plan import node as node_plan
from vmnet.plan.network import PodInterface

NODES = {f"n{number}": Node(f"n{number}", ip_address(f"172.30.0.1{number}"), number) for number in (1, 2, 3)}


ROUTED = range(20, 30)
"""Numbers of Layer3 networks; they all have the same subnets."""


SWITCHED = range(30, 40)
"""Numbers of secondary networks."""


def part(node: str) -> tuple[IPNetwork, ...]:
    number = NODES[node].number
    return ip_network(f"103.103.{number}.0/24"), ip_network(f"fd20:0:0:{number}::/64")


def router(net: int, node: str) -> Node:
    subnets = ((network(net).name, part(node)),) if net in ROUTED else ()
    return replace(NODES[node], subnets=subnets)


def network(number: int) -> Network:
    if number in ROUTED:
        ranges = (ip_network("103.103.0.0/16"), ip_network("fd20::/48"))
        return Network(f"test-{number}", NetworkId(number), Topology.LAYER3, subnets=ranges, host_prefixes=(24, 64))
    subnets = (ip_network("192.168.0.0/16"), ip_network("fd20::/64"))
    role = Role.SECONDARY if number in SWITCHED else Role.PRIMARY
    return Network(name=f"test-{number}", id=NetworkId(number), subnets=subnets, role=role)


def endpoint(net: int, host: int, node: str, pod: str) -> Endpoint:
    address, address6 = ip_interface(f"192.168.0.{host}/16"), ip_interface(f"fd20::{host}/64")
    if net in ROUTED:
        address, address6 = (ip_interface(f"{own[host]}/{own.prefixlen}") for own in part(node))
    return Endpoint(
        PodReference("ns", pod, f"uid-{net}-{pod}-{node}"),
        f"test-{net}",
        node,
        mac_for(address.ip),
        (address, address6),
        # Everybody here is a machine, but who is called a pod.
        machine=None if pod.startswith("pod") else MachineReference("ns", pod),
    )


def make_pod(namespace: str) -> None:
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    subprocess.run(["ip", "-n", namespace, "link", "set", "lo", "up"], check=True)


class Driver:
    def __init__(self, node: str) -> None:
        self.node = NODES[node]
        self.kernel = LinuxKernel()

    async def desired(self, net: int, endpoints: list[list[Any]], standby: list[str]) -> NodeNetwork:
        found = [endpoint(net, host, node, pod) for host, node, pod in endpoints]
        state = await self.kernel.observe_node()
        observed = await self.kernel.observe_network(network(net).namespace)
        present = {link.name for link in observed.ports()} if observed else set()
        return NodeNetwork(
            network=network(net).at(part(self.node.name)),
            node=self.node,
            mtu=1450,
            join=node_plan.allocate_join(state, NetworkId(net)),
            ports=tuple(LocalPort(item) for item in found if item.node == self.node.name and item.port in present),
            remotes=tuple(
                RemoteEndpoint(item, NODES[item.node].address, settled=item.pod.name not in standby)
                for item in found
                if item.node != self.node.name and f"{item.pod.name}@{item.node}" not in standby
            ),
            peers=tuple(node.address for name, node in NODES.items() if name != self.node.name),
            routers=tuple(router(net, name) for name in NODES if name != self.node.name),
        )

    async def render(self, net: int, endpoints: list[list[Any]], standby: list[str]) -> int:
        others = [node.address for node in NODES.values() if node != self.node]
        state = await self.kernel.observe_node()
        here = {NetworkId(int(name.removeprefix("vmnet-"))) for name in state.namespaces} | {NetworkId(net)}
        await self.kernel.apply(node_plan.plan(state, vteps=others, networks=here))
        desired = await self.desired(net, endpoints, standby)
        observed = await self.kernel.observe_network(network(net).namespace)
        await self.kernel.apply(network_plan.plan(desired, observed))
        for host, node, pod in endpoints:
            port = endpoint(net, host, node, pod)
            if node != self.node.name or port.port in {item.endpoint.port for item in desired.ports}:
                continue
            namespace = f"{pod}-{net}"
            make_pod(namespace)
            state = PortState.STANDBY if f"{pod}@{node}" in standby else PortState.ACTIVE
            local = LocalPort(port, state)
            desired = replace(desired, ports=(*desired.ports, local))
            observed = await self.kernel.observe_network(network(net).namespace)
            assert observed is not None
            inside = PodInterface(f"/run/netns/{namespace}", f"container-{pod}")
            await self.kernel.apply(network_plan.attach(desired, local, inside, observed))
        # The second pass asserts what a first could not know; a third must find nothing to do.
        observed = await self.kernel.observe_network(network(net).namespace)
        await self.kernel.apply(network_plan.plan(desired, observed))
        observed = await LinuxKernel().observe_network(network(net).namespace)
        return len(network_plan.plan(desired, observed))

    async def detach(self, net: int, host: int, pod: str) -> None:
        found = network(net).namespace
        observed = await self.kernel.observe_network(found)
        assert observed is not None
        await self.kernel.apply(network_plan.detach(found, endpoint(net, host, self.node.name, pod).port, observed))

    async def gate(self, net: int, host: int, pod: str) -> str:
        port = endpoint(net, host, self.node.name, pod)
        observed = await self.kernel.observe_network(network(net).namespace)
        assert observed is not None
        if port.mac in observed.moved:
            return "moved"
        return "closed" if port.port in observed.standby - observed.open else "open"

    async def vtep(self, net: int, host: int) -> list[str]:
        mac = endpoint(net, host, "n1", "any").mac
        observed = await self.kernel.observe_network(network(net).namespace)
        assert observed is not None
        return sorted({str(entry.vtep or "local") for entry in observed.fdb if entry.mac == mac})

    async def join(self, net: int, family: str) -> str:
        found = node_plan.allocate_join(await self.kernel.observe_node(), NetworkId(net))
        return str(found.network_ipv4.ip if family == "4" else found.network_ipv6.ip)

    async def remove(self, net: int) -> bool:
        await self.kernel.apply(network_plan.remove(NetworkId(net)))
        state = await self.kernel.observe_node()
        return network(net).namespace not in state.namespaces and not state.joins


async def main(node: str) -> None:
    driver = Driver(node)
    results = [await getattr(driver, step["do"])(**step["with"]) for step in json.load(sys.stdin)]
    await driver.kernel.close()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
