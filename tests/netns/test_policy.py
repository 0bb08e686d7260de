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

pytestmark = pytest.mark.timeout(300)  # many short programs one after another, on a machine that others use too

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
    output, _ = await asyncio.wait_for(process.communicate(), 280)
    assert process.returncode == 0, output.decode()


async def test_ingress_by_name_range_and_block_from_the_other_node(fabric: Fabric) -> None:
    pods = (
        pod("red-0", 11, "n1", "red"),
        pod("red-1", 12, "n1", "red"),
        pod("yellow-0", 13, "n2", "yellow"),
        pod("yellow-1", 14, "n2", "yellow"),
    )
    await fabric.start(*pods)
    deny = policy("deny", "yellow", podSelector={}, policyTypes=["Ingress", "Egress"])
    await fabric.everywhere(put("policies", deny))
    await fabric.expect("red-0", no=[*to(13, 8080, 9090, kinds=("tcp", "udp")), *pings(13)])
    await fabric.expect("yellow-0", no=[*to(14, 8080), *to(11, 8080, kinds=("tcp", "udp")), *pings(11)])
    red = {"namespaceSelector": {"matchLabels": {"color": "red"}}}
    blocks = [
        {"ipBlock": {"cidr": "192.168.0.0/16", "except": ["192.168.0.12/32"]}},
        {"ipBlock": {"cidr": "fd20::/64", "except": ["fd20::12/128"]}},
    ]
    named = policy("named", "yellow", podSelector={}, ingress=[{"from": [red], "ports": [{"port": "web"}]}])
    ranged = policy(
        "ranged", "yellow", podSelector={}, ingress=[{"from": blocks, "ports": [{"port": 9090, "endPort": 9098}]}]
    )
    # Policies add up, and replies leave though egress is denied.
    await fabric.everywhere(put("policies", named), put("policies", ranged))
    await fabric.expect(
        "red-0", yes=to(13, 8080, 9090), no=[*to(13, 8081, 9099), *to(13, 8080, 9090, kinds=("udp",)), *pings(13)]
    )
    await fabric.expect("red-1", yes=to(13, 8080), no=to(13, 9090))
    await fabric.expect("yellow-1", no=[*to(13, 8080, 9090)])
    anything = policy("anything", "yellow", podSelector={}, ingress=[{"from": [red]}])
    await fabric.everywhere(drop("policies", "yellow/named"), put("policies", anything))
    await fabric.expect("red-1", yes=[*to(13, 8080, 9090, kinds=("tcp", "udp")), *pings(13)])
    # The namespace is relabelled: nobody is red any more.
    await fabric.everywhere(put("namespaces", labelled("red", color="pink")))
    await fabric.expect("red-1", no=[*to(13, 8080), *pings(13)])


SERVICE = """
table inet service {
  chain in { type nat hook prerouting priority dstnat; ip daddr 10.96.0.9 tcp dport 80 dnat ip to 192.168.0.11:8080; }
  chain out {
    type nat hook postrouting priority srcnat - 5;
    ct status dnat ip saddr 192.168.0.11 ip daddr 192.168.0.11 snat ip to 192.168.0.1
  }
}
"""


async def test_a_service_leads_to_the_pod_itself_under_default_deny(fabric: Fabric) -> None:
    """And to nobody else: the policy sees the backend, whatever was asked for."""
    await fabric.start(pod("red-0", 11, "n1", "red"), pod("red-1", 12, "n1", "red"))
    done = await fabric.lab.exec("n1", ["ip", "netns", "exec", "vmnet-7", "nft", "-f", "-"], stdin=SERVICE)
    assert done.exit == 0, done.stderr
    service: Question = ("tcp", "10.96.0.9", 80)
    deny = policy("deny", "red", podSelector={}, policyTypes=["Ingress", "Egress"])
    await fabric.everywhere(put("policies", deny))
    await fabric.expect("red-0", yes=[service, ("tcp", "192.168.0.11", 9090)], no=to(12, 8080))
    await fabric.expect("red-1", no=[service])
    pods = [{"podSelector": {}}]
    ports = [{"port": 8080}]
    allow = policy("allow", "red", podSelector={}, ingress=[{"from": pods, "ports": ports}], egress=[{"to": pods}])
    await fabric.everywhere(put("policies", allow))
    await fabric.expect("red-1", yes=[service, *to(11, 8080)], no=to(11, 9090))


FLOOD = """
import socket, struct, sys, time
mac, ours, targets = sys.argv[1], sys.argv[2], sys.argv[3:]
as_bytes = lambda text: bytes.fromhex(text.replace(":", ""))
own = as_bytes(mac)
def checksum(data):
    total = sum(struct.unpack("!10H", data)); total = (total & 0xffff) + (total >> 16)
    return ~(total + (total >> 16)) & 0xffff
def datagram(to, address, source, mark):
    body = struct.pack("!HHHH", source, 7777, 8 + len(mark), 0) + mark
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, 17, 0)
    head += socket.inet_aton(ours) + socket.inet_aton(address)
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return as_bytes(to) + own + b"\\x08\\x00" + head + body
beat = b"\\xff" * 6 + own + bytes.fromhex("08060001080006040001") + own + socket.inet_aton(ours) + bytes(24) + b"BEAT"
while True:
    try:
        found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3))
        found.bind(("ovn-udn1", 3)); break
    except OSError:
        time.sleep(0.001)
print("bound", flush=True)
count, beats, seen = 0, 0, set()
while True:
    count += 1
    frames = [datagram(*item.split("/"), 20000 + count % 40000, b"UNICAST") for item in targets]
    frames += [datagram("01:00:5e:00:00:fb", "224.0.0.251", 20000 + count % 40000, b"MULTICAST")]
    frames += [datagram("ff:ff:ff:ff:ff:ff", "192.168.255.255", 20000 + count % 40000, b"BROADCAST")]
    try:
        for frame in frames: found.send(frame)
        if count % 20 == 0: found.send(beat)
    except OSError:
        pass  # it is not up yet
    time.sleep(0.001)
    while True:
        try:
            data, address = found.recvfrom(2048)
        except OSError:
            break
        if address[2] in (3, 4): continue  # for another, before the bridge knows where that is; or our own
        if data.endswith(b"BEAT"):
            beats += 1
            if beats % 10 == 0: print("beats", beats, flush=True)
        for mark in (b"UNICAST", b"MULTICAST", b"BROADCAST"):
            if data[23] == 17 and data.endswith(mark) and (mark, data[6:12]) not in seen:  # no error that quotes it
                seen.add((mark, data[6:12]))
                print(mark.decode(), "from", data[6:12].hex(":"), flush=True)
"""


class Floods:
    """Pods that send to each other without a pause, from the moment that their interface is there."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.logs = fabric, dict[str, Path]()

    async def start(self, name: str, on: str, host: int, *targets: int) -> None:
        made = await self.fabric.lab.exec(on, ["sh", "-c", f"ip netns list | grep -qw {name} || ip netns add {name}"])
        assert made.exit == 0, made.stderr
        found = [f"{mac(target)}/192.168.0.{target}" for target in targets]
        argv = ["ip", "netns", "exec", name, sys.executable, "-c", FLOOD, mac(host), f"192.168.0.{host}", *found]
        self.logs[name] = await self.fabric.lab.spawn(f"flood-{name}", on, argv)

    def heard(self, name: str) -> set[str]:
        return {line for line in self.logs[name].read_text().splitlines() if " from " in line}

    async def beats(self) -> None:
        """Everybody has heard another thirty beats: what was sent before them has come, or never will."""
        before = {name: self._count(name) for name in self.logs}
        async with asyncio.timeout(90):
            while any(self._count(name) < before[name] + 30 for name in self.logs):
                await asyncio.sleep(0.05)

    def _count(self, name: str) -> int:
        lines = self.logs[name].read_text().splitlines()
        return max((int(line.split()[1]) for line in lines if line.startswith("beats")), default=0)


def mac(host: int) -> str:
    return str(addresses.mac_for(addresses.address(f"192.168.0.{host}")))


async def test_no_packet_slips_through_while_something_changes(fabric: Fabric) -> None:
    """A port joins under default deny; policies and labels change around a port; an agent starts again."""
    fabric.world["policies"] = [
        policy("deny", "red", podSelector={}, policyTypes=["Ingress", "Egress"]),
        policy("one", "red", podSelector={"matchLabels": {"role": "one"}}, ingress=[{"ports": [{"port": 8080}]}]),
    ]
    yellow = (pod("yellow-0", 13, "n1", "yellow"), pod("yellow-1", 14, "n2", "yellow"))
    await fabric.start(*yellow)
    floods = Floods(fabric)
    await floods.start("red-0", "n1", 11, 13, 14)
    await floods.start("yellow-0", "n1", 13, 11, 14)
    await floods.start("yellow-1", "n2", 14, 11)
    joining = pod("red-0", 11, "n1", "red")
    fabric.world["pods"].append(joining)
    await fabric.agent("n2")
    await fabric.agent("n1", {"do": "attach", "with": {"pod": "red/red-0"}})
    await floods.beats()
    steps = []
    for round_ in range(6):
        labels = {"role": "one"} if round_ % 2 == 0 else {"app": "other"}
        port = 9090 if round_ % 2 == 0 else 8080
        spec = {"podSelector": {"matchLabels": {"role": "one"}}, "ingress": [{"ports": [{"port": port}]}]}
        steps += [put("pods", pod("red-0", 11, "n1", "red", labels)), put("policies", policy("one", "red", **spec))]
    await fabric.agent("n1", *steps)
    handles = await _handles(fabric)
    await fabric.agent("n1")
    assert await _handles(fabric) == handles, "what is right is adopted, not written again"
    await floods.beats()
    assert floods.heard("red-0") == set()
    many = {"MULTICAST", "BROADCAST"}
    assert floods.heard("yellow-0") == {f"{kind} from {mac(14)}" for kind in many}
    assert floods.heard("yellow-1") == {f"{kind} from {mac(13)}" for kind in {*many, "UNICAST"}}
    # Everything works that is expected to: the floods come through once nothing isolates the pod.
    await fabric.agent("n1", drop("policies", "red/deny"), drop("policies", "red/one"))
    async with asyncio.timeout(60):
        while len(floods.heard("red-0")) < 6:
            await asyncio.sleep(0.05)


async def _handles(fabric: Fabric) -> str:
    listed = ["ip", "netns", "exec", "vmnet-7", "nft", "-a", "list", "tables"]
    done = await fabric.lab.exec("n1", listed)
    assert "vmnet-policy" in done.stdout
    return done.stdout
