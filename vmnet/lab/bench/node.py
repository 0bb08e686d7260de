"""One node of the datapath benchmark, as a program that runs inside the lab's node.

``python -m vmnet.lab.bench.node NODE`` reads a JSON object of numbers, renders a network with the product's planners
and kernel seam, and beside it, for the same pods, a bare bridge and VXLAN as a hand would make them.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any, Final

from vmnet.kernel.linux import LinuxKernel
from vmnet.model.addresses import mac_for
from vmnet.model.endpoint import Endpoint, LocalPort, Node, NodeNetwork, PodReference, RemoteEndpoint
from vmnet.model.names import NetworkId
from vmnet.model.network import Network
from vmnet.model.policy import parse
from vmnet.model.service import Backend, Service, ServicePort
from vmnet.plan import network as network_plan
from vmnet.plan import node as node_plan
from vmnet.plan import policy, services
from vmnet.plan.network import PodInterface
from vmnet.plan.table import Table

NETWORK: Final = Network("bench", NetworkId(7), subnets=(ip_network("10.128.0.0/16"), ip_network("fd20::/64")))
NODES: Final = {name: Node(name, ip_address(f"172.30.0.1{name[1:]}"), number=int(name[1:])) for name in ("n1", "n2")}
PODS: Final = {"a": ("n1", 11), "b": ("n2", 12), "c": ("n1", 13)}
"""Pod → its node and the host part of its address; ``10.128.0.x`` in the network, ``10.129.0.x`` on the bare one."""
MTU: Final = 1450
BARE_VNI: Final = 70


SERVICES: Final = {"b": ip_address("10.96.7.1"), "c": ip_address("10.96.7.2")}
"""Pod → cluster address of a Service that it alone answers for."""
SERVICE_PORT: Final = 80
POLICY: Final = {
    "metadata": {"namespace": "bench", "name": "members"},
    "spec": {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"bench": "member"}}}]}],
        "egress": [{"to": [{"podSelector": {"matchLabels": {"bench": "member"}}}]}],
    },
}
"""Every pod is isolated both ways and may speak with every other: what it costs is looked up for every connection."""


def network_address(pod: str) -> str:
    """A pod's address in the network."""
    return f"10.128.0.{PODS[pod][1]}"


def bare_address(pod: str) -> str:
    """The same pod's address on the bare bridge."""
    return f"10.129.0.{PODS[pod][1]}"


def endpoint(host: int, node: str, pod: str) -> Endpoint:
    """Number ``host`` of the subnet."""
    subnet = NETWORK.subnets[0]
    address = ip_interface(f"{subnet[host]}/{subnet.prefixlen}")
    addresses = (address, ip_interface(f"fd20::{host:x}/64"))
    return Endpoint(PodReference("bench", pod, f"uid-{pod}"), NETWORK.name, node, mac_for(address.ip), addresses)


def tables(wanted: NodeNetwork, ports: Sequence[LocalPort], port: int) -> tuple[Table, ...]:
    """The Services, and the policy over every endpoint, as an agent would have them once ``ports`` are there."""
    found = [
        Service(
            "bench",
            f"service-{pod}",
            (address,),
            (
                ServicePort(
                    "",
                    "tcp",
                    SERVICE_PORT,
                    backends=(Backend(endpoint(PODS[pod][1], PODS[pod][0], pod).addresses[0].ip, port, PODS[pod][0]),),
                ),
            ),
        )
        for pod, address in SERVICES.items()
    ]
    policies = policy.NetworkPolicies()
    policies.put_namespace("bench", {})
    policies.put_policy("members", parse(POLICY))
    local = [item.endpoint for item in ports]
    for item in (*local, *(remote.endpoint for remote in wanted.remotes)):
        addresses = tuple(address.ip for address in item.addresses)
        policies.put_member(policy.Member(item.pod, {"bench": "member"}, addresses))
    return (*services.network_tables(replace(wanted, ports=tuple(ports)), found, ()), *policies.tables(local))


def desired(node: Node, join_state: Any, total: int) -> NodeNetwork:
    """The network with the pods of this benchmark and others, ``total`` in all, on the other node."""
    other = next(item for item in NODES.values() if item.name != node.name)
    everyone = [endpoint(host, name, pod) for pod, (name, host) in PODS.items()]
    everyone += [endpoint(256 + number, other.name, f"other-{number}") for number in range(total - len(everyone))]
    return NodeNetwork(
        network=NETWORK,
        node=node,
        mtu=MTU,
        join=node_plan.allocate_join(join_state, NETWORK.id),
        remotes=tuple(RemoteEndpoint(item, other.address) for item in everyone if item.node != node.name),
        peers=(other.address,),
        routers=(other,),
    )


async def render(kernel: LinuxKernel, node: Node, total: int, port: int) -> dict[str, float]:
    """Make the network; seconds that each part took."""
    other = next(item for item in NODES.values() if item.name != node.name)
    await kernel.apply(node_plan.plan(await kernel.observe_node(), vteps=(other.address,), networks={NETWORK.id}))
    wanted = desired(node, await kernel.observe_node(), total)
    begun = time.monotonic()
    here = [LocalPort(endpoint(host, name, pod)) for pod, (name, host) in PODS.items() if name == node.name]
    found = network_plan.plan(wanted, None, tables(wanted, here, port))
    planned = time.monotonic()
    await kernel.apply(found)
    applied = time.monotonic()
    for pod, (name, host) in PODS.items():
        if name != node.name:
            continue
        await _run("ip", "netns", "add", pod)
        await _run("ip", "-n", pod, "link", "set", "lo", "up")
        local = LocalPort(endpoint(host, name, pod))
        wanted = replace(wanted, ports=(*wanted.ports, local))
        observed = await kernel.observe_network(NETWORK.namespace)
        if observed is None:
            raise RuntimeError(f"{NETWORK.namespace} is not there")
        await kernel.apply(network_plan.attach(wanted, local, PodInterface(f"/run/netns/{pod}", pod), observed))
    return {"plan_s": planned - begun, "apply_s": applied - planned}


async def bare(node: Node) -> None:
    """A bridge, a VXLAN and a veth per pod, and nothing else, in a namespace of their own."""
    other = next(item for item in NODES.values() if item.name != node.name)
    await _run("ip", "netns", "add", "bare")
    await _run(
        *f"ip link add name vmb0 mtu {MTU} type vxlan id {BARE_VNI} local {node.address} dstport 4789".split(),
    )
    lines = [
        f"link add name br0 mtu {MTU} type bridge mcast_snooping 0 forward_delay 0",
        "link set dev br0 up",
        "link set dev vmb0 master br0 up",
    ]
    await _run("ip", "link", "set", "dev", "vmb0", "netns", "bare")
    for pod, (name, _) in PODS.items():
        if name == node.name:
            lines += [
                f"link add name p{pod} mtu {MTU} type veth peer name bare0 mtu {MTU} netns {pod}",
                f"link set dev p{pod} master br0 up",
            ]
    await _run("ip", "-n", "bare", "-batch", "-", stdin="\n".join(lines))
    flood = f"bridge fdb append 00:00:00:00:00:00 dev vmb0 dst {other.address}".split()
    await _run("ip", "netns", "exec", "bare", *flood)
    for pod, (name, _) in PODS.items():
        if name == node.name:
            await _run("ip", "-n", pod, "addr", "add", f"{bare_address(pod)}/16", "dev", "bare0")
            await _run("ip", "-n", pod, "link", "set", "bare0", "up")


async def _run(*argv: str, stdin: str = "") -> None:
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(30):
        _, errors = await process.communicate(stdin.encode())
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {errors.decode(errors='replace').strip()}")


async def main(name: str) -> None:
    """Render both; print what it took."""
    wanted = json.load(sys.stdin)
    kernel = LinuxKernel()
    try:
        taken = await render(kernel, NODES[name], int(wanted["endpoints"]), int(wanted["port"]))
        await bare(NODES[name])
    finally:
        await kernel.close()
    json.dump(taken, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
