"""How soon a changed name is right: a whole agent on the real kernel, with one network of many machines.

``python -m vmnet.lab.bench.dns_changes NAMES`` in network and mount namespaces of its own (``measure`` makes them).
A pod of the network tells the agent's watch of a machine that is new, has another address or is gone, and asks the
network's DNS, half a millisecond after each answer, until the answer is right. Measured until then: from the event's
arrival in the agent's watch (``watched``), and from its being sent to the agent (``sent``), which may be busy. The next
change comes at any time, also while the datapath follows the last one. The API is a store in the agent's own process,
which reads each event as JSON and passes it to the agent's watches.
"""

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from ipaddress import IPv4Address
from typing import Any, Final

from vmnet.agent.agent import Agent
from vmnet.agent.cluster import Stores
from vmnet.kernel.linux import LinuxKernel
from vmnet.kube.api import (
    NADS,
    NAMESPACES,
    NODES,
    PODS,
    VMIS,
    Object,
    Resource,
    WatchEvent,
)
from vmnet.kube.fake import FakeKube
from vmnet.lab.errors import LabError
from vmnet.model import addresses, configuration, names
from vmnet.model.configuration import Configuration
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role
from vmnet_dns.message import encode_name

NETWORK: Final = Network("bench_net", NetworkId(7), role=Role.PRIMARY, subnets=(addresses.network("10.64.0.0/10"),))
NAMESPACE: Final = "bench"
FIRST: Final = IPv4Address("10.64.0.10")
GATEWAY: Final = "10.64.0.1"
EVENTS: Final = "/run/events.sock"
PAUSE_SECONDS: Final = 0.0005
SPREAD_SECONDS: Final = 0.1
"""The next change comes after anything up to this."""
DEADLINE: Final = 300.0
KINDS: Final = ("new", "changed", "deleted")
SINCE: Final = ("watched", "sent")
PREPARE: Final = 'mount -t tmpfs tmpfs /run; mkdir /run/netns /run/vmnet; ip link set lo up; exec "$0" "$@"'


def pod(number: int, address: IPv4Address, node: str = "n2") -> Object:
    """The pod of a machine."""
    name = f"vm{number}"
    entry = {
        "ip_addresses": [f"{address}/10"],
        "mac_address": addresses.mac_for(address),
        "role": "primary",
    }
    return {
        "metadata": {
            "namespace": NAMESPACE,
            "name": f"virt-launcher-{name}",
            "uid": f"uid-{name}",
            "labels": {names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE},
            "annotations": {
                names.DOMAIN_ANNOTATION: name,
                names.POD_NETWORKS_ANNOTATION: json.dumps({f"{NAMESPACE}/net": entry}),
            },
        },
        "spec": {"nodeName": node},
        "status": {"phase": "Running"},
    }


class Store(FakeKube):
    """Tells when the watch of pods brings something."""

    def __init__(self) -> None:
        super().__init__()
        self.brought: Callable[[float], None] | None = None

    async def watch(
        self,
        resource: Resource,
        resource_version: str,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
    ) -> AsyncIterator[WatchEvent]:
        """See the Protocol."""
        async for event in super().watch(resource, resource_version, namespace, labels=labels, fields=fields):
            if resource is PODS and self.brought is not None:
                self.brought(time.monotonic())
            yield event


def cluster(machines: int) -> Store:
    """Two nodes, the network, ``machines`` machines on the other node, and the pod that asks on this one."""
    kube = Store()
    for number in (1, 2):
        kube.seed(
            NODES,
            {
                "metadata": {"name": f"n{number}", "annotations": {names.NODE_NUMBER_ANNOTATION: str(number)}},
                "status": {"addresses": [{"type": "InternalIP", "address": f"172.30.0.1{number}"}]},
            },
        )
    kube.seed(NAMESPACES, {"metadata": {"name": NAMESPACE, "labels": {names.PRIMARY_NETWORK_LABEL: ""}}})
    identity = {names.NETWORK_ID_ANNOTATION: str(NETWORK.id)}
    nad = {"namespace": NAMESPACE, "name": "net", "annotations": identity}
    kube.seed(NADS, {"metadata": nad, "spec": {"config": NETWORK.to_nad_config(f"{NAMESPACE}/net")}})
    asker = pod(0, FIRST, "n1")
    asker["metadata"] |= {"name": "asker", "uid": "uid-asker", "labels": {}}
    kube.seed(PODS, asker)
    for at in range(1, machines + 1):
        kube.seed(PODS, pod(at, FIRST + at))
        networks = [{"name": "tenant", "pod": {}}]
        kube.seed(VMIS, {"metadata": {"namespace": NAMESPACE, "name": f"vm{at}"}, "spec": {"networks": networks}})
    # Watches begin after all this.
    kube.compact()
    return kube


async def serve(machines: int, changes: int) -> dict[str, Any]:
    """The agent, and the pod's program beside it; returns what that found. Raises LabError."""
    for words in (
        "link add eth0 type veth peer name wire",
        "link set wire up",
        "addr add 172.30.0.11/24 dev eth0",
        "link set eth0 up",
        "route add default via 172.30.0.1 dev eth0",
        "netns add pod",
    ):
        await _run("ip", *words.split())
    kube, kernel = cluster(machines), LinuxKernel()
    settings = Configuration(agent=configuration.Agent(node_name="n1", kubelet_cgroup=""))
    agent = Agent(settings, kernel, kube, Stores.watching(kube))

    async def events(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kube.brought = lambda at: writer.write(f"{at}\n".encode())
        while line := await reader.readline():
            item = json.loads(line)
            if item["spec"].get("nodeName"):
                kube.seed(PODS, item)
            else:
                kube.vanish(PODS, item["metadata"]["name"], NAMESPACE)
        kube.brought = None
        writer.close()

    listening = await asyncio.start_unix_server(events, EVENTS, limit=1 << 20)
    working = asyncio.create_task(agent.run())
    try:
        async with asyncio.timeout(DEADLINE):
            # It waits inside until the agent has taken its networks over.
            await _attach()
        program = ("-m", "vmnet.lab.bench.dns_changes", "--ask", str(machines), "--changes", str(changes))
        found: dict[str, Any] = json.loads(await _run("ip", "netns", "exec", "pod", sys.executable, *program))
        return found
    finally:
        listening.close()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await kernel.close()


async def _attach() -> None:
    """What a container runtime does, by way of the plugin."""
    environment = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "container-asker",
        "CNI_NETNS": "/run/netns/pod",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": f"K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME=asker;K8S_POD_UID=uid-asker",
    }
    config = {"cniVersion": "1.0.0", "name": "cluster", "type": "vmnet", "prevResult": {"cniVersion": "1.0.0"}}
    await _run(sys.executable, "-m", "vmnet.cni.shim", stdin=json.dumps(config), env=environment)


async def _run(*words: str, stdin: str = "", env: dict[str, str] | None = None) -> str:
    process = await asyncio.create_subprocess_exec(
        *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env
    )
    async with asyncio.timeout(DEADLINE):
        out, err = await process.communicate(stdin.encode())
    if process.returncode:
        raise LabError(f"{words}: {out.decode()[-400:]} {err.decode()[-400:]}")
    return out.decode()


def ask(machines: int, changes: int) -> dict[str, list[float]]:
    """In the pod: tell the agent of changes, and see when each is right; milliseconds by kind and beginning.

    Raises LabError.
    """
    rng = random.Random(1)  # noqa: S311 - to be had again, not to be secret
    found: dict[str, list[float]] = {f"{kind}, {since}": [] for kind in KINDS for since in SINCE}
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as watch,
        watch.makefile("r") as brought,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver,
    ):
        watch.connect(EVENTS)
        resolver.connect((GATEWAY, 53))
        resolver.settimeout(1.0)
        for change in range(changes):
            number = machines + 1 + change
            for kind, address in zip(KINDS, (FIRST + number, FIRST + number + changes, None), strict=True):
                item = pod(number, address or FIRST, "n2" if address is not None else "")
                wanted = address.packed if address is not None else b""
                time.sleep(rng.uniform(0, SPREAD_SECONDS))
                began = time.monotonic()
                watch.sendall(json.dumps(item).encode() + b"\n")
                while _answer(resolver, f"vm{number}", rng) != wanted:
                    if time.monotonic() - began > DEADLINE:
                        raise LabError(f"vm{number} is not {kind}")
                    time.sleep(PAUSE_SECONDS)
                right = time.monotonic()
                for since, moment in zip(SINCE, (float(brought.readline()), began), strict=True):
                    found[f"{kind}, {since}"].append((right - moment) * 1e3)
    return found


def _answer(resolver: socket.socket, machine: str, rng: random.Random) -> bytes | None:
    """The one address of a machine; nothing in it: there is no such name; None: no answer."""
    number = rng.randbytes(2)
    query = number + bytes.fromhex("01000001000000000000") + encode_name(f"{machine}.{NAMESPACE}.vm.cluster.local")
    try:
        resolver.send(query + bytes.fromhex("00010001"))
        while (told := resolver.recv(1232))[:2] != number:
            pass
    except OSError:
        return None
    if told[3] & 0xF == 3:
        return b""
    # The answer's record is the last: its data are the message's last octets.
    return told[-4:] if told[7] == 1 else None


def measure(machines: int, changes: int, first: Sequence[str] = ()) -> dict[str, Any]:
    """Milliseconds from event to right answer, by kind of change. ``first``: a command before all. Raises LabError."""
    enter = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec", PREPARE]
    words = [*first, sys.executable, "-m", "vmnet.lab.bench.dns_changes", str(machines), "--changes", str(changes)]
    done = subprocess.run([*enter, *words], capture_output=True, text=True, check=False, timeout=4 * DEADLINE)
    if done.returncode:
        raise LabError(f"changes among {machines} names: {done.stderr.strip()[-800:]}")
    found: dict[str, list[float]] = json.loads(done.stdout)
    return {"names": machines, "changes": {kind: summary(values) for kind, values in found.items()}}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Percentiles."""
    ordered = sorted(values)
    return {
        "number": len(ordered),
        "p50_ms": statistics.median(ordered),
        "p99_ms": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
        "max_ms": ordered[-1],
    }


def main() -> None:
    """Entry point, in namespaces of its own."""
    parser = argparse.ArgumentParser(prog="dns-changes", description=__doc__)
    parser.add_argument("machines", type=int, nargs="?", default=1000, help="%(default)s")
    parser.add_argument("--changes", type=int, default=100, help="of each kind (%(default)s)")
    parser.add_argument("--ask", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask is not None:
        print(json.dumps(ask(options.ask, options.changes)))
        return
    print(json.dumps(asyncio.run(serve(options.machines, options.changes))))


if __name__ == "__main__":
    main()
