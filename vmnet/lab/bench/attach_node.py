"""The node's half of the attachment benchmark: ``python -m vmnet.lab.bench.attach_node`` inside a lab's node.

Reads a JSON list of pods ``[namespace, name, uid]`` that are bound to this node and that no kubelet runs. For each, in
turn: a CNI ADD through the agent's socket, and the kernel's part of it as a shell script in a network of its own.
"""

import asyncio
import json
import shlex
import subprocess
import sys
import tempfile
import time
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any, Final

from vmnet.cni import shim
from vmnet.kernel import commands
from vmnet.kernel.commands import Batch, Step
from vmnet.kernel.linux import LinuxKernel
from vmnet.lab import topology
from vmnet.lab.kubelet import network as runtime
from vmnet.model.addresses import mac_for
from vmnet.model.endpoint import Endpoint, LocalPort, Node, NodeNetwork, PodReference
from vmnet.model.names import NetworkId
from vmnet.model.network import Network
from vmnet.plan import network as network_plan
from vmnet.plan import node as node_plan
from vmnet.plan.network import PodInterface
from vmnet.plan.ops import Op

BARE: Final = Network("bare", NetworkId(99), subnets=(ip_network("10.130.0.0/16"), ip_network("fd21::/64")))
CONFIGURATION: Final = json.dumps({"cniVersion": "1.0.0", "name": "lab-default", "type": "vmnet-cni"})


async def default_network(directory: Path, container: str, netns: str) -> dict[str, Any]:
    """eth0 by the node's default plugins; their result."""
    attachment = runtime.Attachment(container, netns, runtime.pod_args("bench", container, container, container))
    return dict(await runtime.Network(configuration=directory).add(attachment))


def add(pod: list[str], netns: str, previous: dict[str, Any]) -> float:
    """One ADD; seconds from request to reply. Raises RuntimeError with the CNI error."""
    namespace, name, uid = pod
    arguments = runtime.pod_args(namespace, name, uid, uid)
    environment = runtime.Attachment(uid, netns, arguments).environment("ADD")
    body = shim.encode(environment, json.dumps({**json.loads(CONFIGURATION), "prevResult": previous}).encode())
    begun = time.monotonic()
    answer = shim.exchange(shim.connect(shim.SOCKET, 10), body, 120)
    taken = time.monotonic() - begun
    if answer[0]:
        raise RuntimeError(f"pod {name}: {answer[1:].decode()}")
    return taken


def script(found: tuple[Op, ...]) -> str:
    """The same programs with the same input, one after another, as a shell would run them."""
    batches: list[Batch] = []
    writes: list[str] = []
    for op in found:
        for step in commands.render(op):
            if not isinstance(step, Step):
                continue
            if batches and batches[-1].takes(step):
                batches[-1].add(step, op)
            else:
                batches.append(Batch.of(step, op))
    for batch in batches:
        tolerant = " 2>/dev/null || true" if batch.step.may_fail else " || exit 1"
        enter = ["nsenter", f"--net={batch.step.netns}", "--"] if batch.step.netns else []
        writes.append(f"{shlex.join([*enter, *batch.argv()])} <<'END'{tolerant}\n{batch.script()}END")
    return "\n".join(writes) + "\n"


async def prepare_bare(kernel: LinuxKernel) -> NodeNetwork:
    """A network that only this benchmark's script attaches pods to."""
    wanted = NodeNetwork(
        network=BARE,
        node=Node("n1", ip_address(str(topology.node(1).ipv4))),
        mtu=1450,
        join=node_plan.allocate_join(await kernel.observe_node(), BARE.id),
    )
    await kernel.apply(network_plan.plan(wanted, None))
    return wanted


async def bare(kernel: LinuxKernel, wanted: NodeNetwork, index: int, netns: str, previous: dict[str, Any]) -> float:
    """Attach a pod by a shell script; seconds."""
    address = ip_interface(f"{BARE.subnets[0][index]}/16")
    reference = PodReference("bare", f"bare-{index}", f"bare-{index}")
    addresses = (address, ip_interface(f"fd21::{index:x}/64"))
    port = LocalPort(Endpoint(reference, BARE.name, "n1", mac_for(address.ip), addresses))
    observed = await kernel.observe_network(BARE.namespace)
    if observed is None:
        raise RuntimeError("the bare network is gone")
    default = tuple(
        (ip_interface(item["address"]), ip_address(item["gateway"])) for item in previous["ips"] if "gateway" in item
    )
    found = network_plan.attach(wanted, port, PodInterface(netns, reference.uid, default), observed)
    text = script(found)
    begun = time.monotonic()
    done = await asyncio.to_thread(
        subprocess.run, ["sh"], input=text, text=True, capture_output=True, timeout=60, check=False
    )
    taken = time.monotonic() - begun
    if done.returncode:
        raise RuntimeError(f"the bare script: {done.stderr}")
    return taken


async def main() -> None:
    """Both ways for every pod, in turn; print the times."""
    pods: list[list[str]] = json.load(sys.stdin)
    kernel = LinuxKernel()
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as directory:
        configuration = topology.network_configuration(topology.node(1))
        topology.write_network_configuration(configuration, Path(directory))
        wanted = await prepare_bare(kernel)
        for index, pod in enumerate(pods):
            for mine in (True, False) if index % 2 == 0 else (False, True):
                name = f"{'ours' if mine else 'bare'}-{index}"
                await asyncio.to_thread(subprocess.run, ["ip", "netns", "add", name], check=True)
                netns = f"/run/netns/{name}"
                previous = await default_network(Path(directory), name, netns)
                if mine:
                    ours.append(await asyncio.to_thread(add, pod, netns, previous))
                else:
                    theirs.append(await bare(kernel, wanted, 16 + index, netns, previous))
    await kernel.close()
    json.dump({"ours": ours, "bare": theirs}, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
