"""NetworkPolicy on the real kernel: pods on two nodes, and what passes between them."""

import asyncio
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from vmnet.lab.init import COMPONENTS
from vmnet.lab.lab import Lab
from vmnet.model import addresses, names
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role

DRIVER = Path(__file__).with_name("policy_node.py")
PACKETS = Path(__file__).with_name("policy_packets.py")
ENTER = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec"]
# A private /run, so that no namespace made here has a name outside.
PREPARE = 'mount -t tmpfs tmpfs /run; mkdir /run/netns; ip link set lo up; exec "$0" "$@"'
NETWORK = Network(
    "cluster_udn_colored",
    NetworkId(7),
    role=Role.PRIMARY,
    subnets=(addresses.network("192.168.0.0/16"), addresses.network("fd20::/64")),
)

SERVE = """
import socket, sys, threading
def echo(found):
    while True:
        data, peer = found.recvfrom(2048)
        found.sendto(data, peer)
def stream(found):
    while True:
        connection, _ = found.accept()
        threading.Thread(target=one, args=(connection,), daemon=True).start()
def one(connection):
    with connection:
        while data := connection.recv(2048):
            connection.sendall(data)
for port in map(int, sys.argv[1:]):
    tcp = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    threading.Thread(target=stream, args=(tcp,)).start()
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    udp.bind(("::", port))
    threading.Thread(target=echo, args=(udp,)).start()
print("ready", flush=True)
"""

ASK = """
import json, socket, subprocess, sys, threading, time
wait = float(sys.argv[1]); asked = json.loads(sys.argv[2]); answers = [False] * len(asked)
def ask(index, kind, address, port):
    until = time.monotonic() + wait
    while not answers[index] and time.monotonic() < until:
        if kind == "ping":
            done = subprocess.run(["ping", "-c", "1", "-W", "1", address], stdout=subprocess.DEVNULL)
            answers[index] = done.returncode == 0
            continue
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as found:
            found.settimeout(min(wait, 5) if kind == "tcp" else 0.3)
            try:
                found.connect((address, port)); found.send(b"hello"); answers[index] = found.recv(9) == b"hello"
            except OSError:
                time.sleep(0.05)
threads = [threading.Thread(target=ask, args=(index, *item)) for index, item in enumerate(asked)]
for item in threads: item.start()
for item in threads: item.join()
print(json.dumps(answers))
"""

Question = tuple[str, str, int]


def pod(name: str, host: int, node: str, namespace: str, labels: dict[str, str] | None = None) -> dict[str, Any]:
    address = addresses.address(f"192.168.0.{host}")
    entry = {"ip_addresses": [f"{address}/16", f"fd20::{host}/64"], "mac_address": addresses.mac_for(address)}
    return {
        "metadata": {
            "namespace": namespace,
            "name": name,
            "uid": f"uid-{name}",
            "labels": labels if labels is not None else {"app": name},
            "annotations": {names.POD_NETWORKS_ANNOTATION: json.dumps({f"{namespace}/colored": entry})},
        },
        "spec": {
            "nodeName": node,
            "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}],
        },
        "status": {"phase": "Running"},
    }


def labelled(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}}


def policy(name: str, namespace: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": namespace, "name": name, "uid": f"uid-{name}"}, "spec": spec}


def nad(namespace: str) -> dict[str, Any]:
    annotations = {names.NETWORK_ID_ANNOTATION: str(NETWORK.id)}
    metadata = {"namespace": namespace, "name": "colored", "annotations": annotations}
    return {"metadata": metadata, "spec": {"config": NETWORK.to_nad_config(f"{namespace}/colored")}}


def node(name: str) -> dict[str, Any]:
    found = [{"type": "InternalIP", "address": f"172.30.0.1{name[1]}"}]
    return {"metadata": {"name": name}, "status": {"addresses": found}}


def put(kind: str, item: dict[str, Any]) -> dict[str, Any]:
    return {"do": "put", "with": {"kind": kind, "item": item}}


def drop(kind: str, key: str) -> dict[str, Any]:
    return {"do": "drop", "with": {"kind": kind, "key": key}}


class Fabric:
    """Two nodes with agents, a world that they read, and pods."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.world: dict[str, list[dict[str, Any]]] = {
            "nodes": [node("n1"), node("n2")],
            "namespaces": [labelled("red", color="red"), labelled("yellow", color="yellow")],
            "nads": [nad("red"), nad("yellow")],
            "pods": [],
            "policies": [],
        }

    async def agent(self, on: str, *steps: dict[str, Any]) -> list[Any]:
        """A new agent on a node: it adopts what is there and takes the steps."""
        given = json.dumps({"world": self.world, "steps": [{"do": "adopt", "with": {}}, *steps]})
        done = await self.lab.exec(on, [sys.executable, str(DRIVER), on], stdin=given, timeout=90)
        assert done.exit == 0, done.stderr
        return list(json.loads(done.stdout))[1:]

    async def start(self, *pods: dict[str, Any]) -> None:
        self.world["pods"] += pods
        for on in ("n1", "n2"):
            here = [item for item in pods if item["spec"]["nodeName"] == on]
            attach = [
                {"do": "attach", "with": {"pod": f"{item['metadata']['namespace']}/{item['metadata']['name']}"}}
                for item in here
            ]
            await self.agent(on, *attach)
            for item in here:
                await self.serve(on, item["metadata"]["name"])
        await self.everywhere()

    async def serve(self, on: str, name: str) -> None:
        argv = ["ip", "netns", "exec", name, sys.executable, "-c", SERVE, "8080", "8081", "9090", "9099"]
        log = await self.lab.spawn(f"serve-{name}", on, argv)
        async with asyncio.timeout(60):
            while "ready" not in log.read_text():
                await asyncio.sleep(0.05)

    async def everywhere(self, *steps: dict[str, Any]) -> None:
        for on in ("n1", "n2"):
            await self.agent(on, *steps)
        for step in steps:
            kind = step["with"]["kind"]
            if step["do"] == "put":
                given = step["with"]["item"]
                held = self.world[kind]
                same = [item for item in held if _key(item) == _key(given)]
                for item in same:
                    held.remove(item)
                held.append(given)
            else:
                self.world[kind] = [item for item in self.world[kind] if _key(item) != step["with"]["key"]]

    async def ask(self, name: str, *asked: Question, wait: float) -> list[bool]:
        on = next(item["spec"]["nodeName"] for item in self.world["pods"] if item["metadata"]["name"] == name)
        argv = ["ip", "netns", "exec", name, sys.executable, "-c", ASK, str(wait), json.dumps(asked)]
        done = await self.lab.exec(on, argv, timeout=100)
        assert done.exit == 0, done.stderr
        return list(json.loads(done.stdout))

    async def expect(self, name: str, yes: list[Question] = [], no: list[Question] = []) -> None:  # noqa: B006
        """What a pod reaches, then what it does not."""
        answers = dict(zip(yes, await self.ask(name, *yes, wait=40), strict=True)) if yes else {}
        assert all(answers.values()), f"{name} should reach {[item for item, answer in answers.items() if not answer]}"
        answers = dict(zip(no, await self.ask(name, *no, wait=1.5), strict=True)) if no else {}
        assert not any(answers.values()), f"{name} reaches {[item for item, answer in answers.items() if answer]}"


def _key(item: dict[str, Any]) -> str:
    metadata = item["metadata"]
    return f"{metadata['namespace']}/{metadata['name']}" if "namespace" in metadata else str(metadata["name"])


@pytest.fixture
async def fabric() -> AsyncIterator[Fabric]:
    async with Lab(name=f"policy-{os.getpid()}-{uuid.uuid4().hex[:6]}", nodes=2, without=COMPONENTS) as lab:
        yield Fabric(lab)


def to(host: int, *ports: int, kinds: tuple[str, ...] = ("tcp",), families: str = "46") -> list[Question]:
    found = []
    for family in families:
        address = f"192.168.0.{host}" if family == "4" else f"fd20::{host}"
        found += [(kind, address, port) for kind in kinds for port in ports]
    return found


def pings(host: int) -> list[Question]:
    return to(host, 0, kinds=("ping",))


async def test_egress_of_red_to_one_port_of_labelled_pods(fabric: Fabric) -> None:
    """The issue's own case, and that it ends with the policy."""
    red, near, far = pod("red-0", 11, "n1", "red"), pod("red-1", 12, "n1", "red"), pod("yellow-0", 13, "n2", "yellow")
    await fabric.start(red, near, far)
    both = [*to(12, 8080, 9090), *to(13, 8080, 9090)]
    await fabric.expect("red-0", yes=[*both, *pings(13)])
    egress = [
        {
            "to": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "yellow-0"}}}],
            "ports": [{"port": 8080}],
        }
    ]
    one = policy("one", "red", podSelector={}, policyTypes=["Egress"], egress=egress)
    await fabric.everywhere(put("policies", one))
    await fabric.expect(
        "red-0",
        yes=to(13, 8080),
        no=[*to(13, 9090), *to(13, 8080, kinds=("udp",)), *pings(13), *pings(12), *to(12, 8080)],
    )
    # Nobody is isolated for ingress, and yellow not at all.
    await fabric.expect("yellow-0", yes=[*to(11, 8080, 9090), *pings(11)])
    # A label edit lets the neighbour in, another one takes it out.
    await fabric.everywhere(put("pods", pod("red-1", 12, "n1", "red", {"app": "yellow-0"})))
    await fabric.expect("red-0", yes=to(12, 8080), no=to(12, 9090))
    await fabric.everywhere(put("pods", pod("red-1", 12, "n1", "red", {})))
    await fabric.expect("red-0", no=to(12, 8080))
    await fabric.everywhere(drop("policies", "red/one"))
    await fabric.expect("red-0", yes=[*both, *pings(12)])


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_random_policies_admit_exactly_what_the_api_says(seed: int) -> None:
    """Some 30,000 packets of all kinds between pods and the outside, while pods, namespaces and policies change."""
    process = await asyncio.create_subprocess_exec(
        *(*ENTER, PREPARE, sys.executable, str(PACKETS), str(seed), "40"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 110)
    assert process.returncode == 0, output.decode()
