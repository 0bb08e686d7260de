"""Random policies on the real kernel, packet by packet against a naive reading of the API's text.

A program that runs in namespaces of its own: ``python policy_packets.py SEED CASES``. One network with pods on this
node, some of which count as another node's, and with addresses outside. Each case changes a few things in the world,
loads what the planner makes of it, sends every kind of packet between everybody, and compares what arrives with what
should.
"""

import asyncio
import ctypes
import ipaddress
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from vmnet.kernel.linux import LinuxKernel
from vmnet.model.addresses import link_local, mac_bytes, mac_for
from vmnet.model.endpoint import Endpoint, LocalPort, Node, NodeNetwork, PodReference
from vmnet.model.names import NetworkId
from vmnet.model.network import Network
from vmnet.model.policy import Protocol, parse
from vmnet.plan import network as planner
from vmnet.plan import node as node_planner
from vmnet.plan.network import PodInterface
from vmnet.plan.policy import Member, NetworkPolicies
from vmnet.plan.table import Marks, Table

SUBNETS = (ipaddress.ip_network("192.168.0.0/16"), ipaddress.ip_network("fd20::/64"))
NETWORK = Network("n", NetworkId(7), subnets=SUBNETS)
HERE = Node("n1", ipaddress.ip_address("127.0.0.1"))
NAMESPACES = ("red", "blue", "free")
PODS = {"red-0": 11, "red-1": 12, "blue-0": 13, "blue-1": 14, "free-0": 15, "red-away": 16, "blue-away": 17}
OUTSIDE = {"x": ("203.0.113.5", "2001:db8::5"), "y": ("198.51.100.77", "2001:db8:1::7")}
PORTS = (80, 81, 443, 8080)
NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1}
MAGIC, MARK = b"poLi", b"enD!"
LIBC = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")
Labels = dict[str, str]
Packet = tuple[str, str, str, str, int]
"""From, to, family (``4``, ``6``, ``link``), protocol, destination port."""


# --- the world, as the API has it ---------------------------------------------------------------------------------


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.namespaces = {name: self.labels("team") for name in NAMESPACES}
        self.pods = {name: self.pod() for name in PODS}
        self.policies: dict[str, dict[str, dict[str, Any]]] = {"red": {}, "blue": {}}

    def labels(self, *more: str) -> Labels:
        keys = [key for key in ("app", "tier", *more) if self.random.random() < 0.7]
        return {key: self.random.choice("abc") for key in keys}

    def pod(self) -> dict[str, Any]:
        named = [
            {"name": name, "containerPort": self.random.choice(PORTS), "protocol": self.random.choice(("TCP", "UDP"))}
            for name in ("web", "dns")
            if self.random.random() < 0.7
        ]
        return {"labels": self.labels(), "ports": named}

    def change(self) -> list[tuple[str, str]]:
        """Something happens; what it happened to, by kind and name."""
        found = []
        for _ in range(self.random.randint(1, 3)):
            kind = self.random.choice(("namespace", "pod", "pod", "policy", "policy", "policy"))
            if kind == "namespace":
                name = self.random.choice(NAMESPACES)
                self.namespaces[name] = self.labels("team")
            elif kind == "pod":
                name = self.random.choice(tuple(PODS))
                self.pods[name] = self.pod()
            else:
                namespace, number = self.random.choice(tuple(self.policies)), self.random.choice("123")
                name = f"{namespace}/{number}"
                held = self.policies[namespace]
                if number in held and self.random.random() < 0.4:
                    del held[number]
                else:
                    held[number] = self.spec()
            found.append((kind, name))
        return found

    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = {"podSelector": self.selector()}
        for section, peers in (("ingress", "from"), ("egress", "to")):
            if self.random.random() < 0.6:
                spec[section] = [self.rule(peers) for _ in range(self.random.randint(0, 2))]
        types = self.random.choice((None, ["Ingress"], ["Egress"], ["Ingress", "Egress"]))
        return {**spec, "policyTypes": types} if types else spec

    def selector(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.random.random() < 0.4:
            found["matchLabels"] = {self.random.choice(("app", "tier")): self.random.choice("abc")}
        if self.random.random() < 0.4:
            operator = self.random.choice(("In", "NotIn", "Exists", "DoesNotExist"))
            expression = {"key": self.random.choice(("app", "tier", "team")), "operator": operator}
            values = {"values": self.random.sample("abc", 2)} if operator in ("In", "NotIn") else {}
            found["matchExpressions"] = [{**expression, **values}]
        return found

    def rule(self, peers: str) -> dict[str, Any]:
        rule: dict[str, Any] = {}
        if self.random.random() < 0.8:
            rule[peers] = [self.peer() for _ in range(self.random.randint(1, 2))]
        if self.random.random() < 0.7:
            rule["ports"] = [self.port() for _ in range(self.random.randint(1, 3))]
        return rule

    def peer(self) -> dict[str, Any]:
        kind = self.random.choice(("pods", "namespaces", "both", "name", "block", "block"))
        if kind == "block":
            block = self.random.choice(
                ("192.168.0.12/30", "192.168.0.0/24", "203.0.113.0/24", "0.0.0.0/0", "::/0", "fd20::/124", "fe80::/10")
            )
            network = ipaddress.ip_network(block)
            inside = ["192.168.0.13/32", "203.0.113.5/32", "128.0.0.0/1", "fd20::12/128", "2001:db8::/32"]
            given = (ipaddress.ip_network(text) for text in inside)
            fitting = [str(item) for item in given if item.version == network.version and _within(item, network)]
            some = self.random.sample(fitting, self.random.randint(0, min(2, len(fitting))))
            return {"ipBlock": {"cidr": block, **({"except": some} if some else {})}}
        found: dict[str, Any] = {}
        if kind in ("pods", "both"):
            found["podSelector"] = self.selector()
        if kind in ("namespaces", "both"):
            found["namespaceSelector"] = self.selector()
        if kind == "name":
            name = self.random.choice(NAMESPACES)
            found["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": name}}
        return found

    def port(self) -> dict[str, Any]:
        kind = self.random.choice(("number", "number", "range", "name", "protocol"))
        found: dict[str, Any] = {}
        if self.random.random() < 0.7 or kind == "protocol":
            found["protocol"] = self.random.choice(("TCP", "UDP", "SCTP"))
        if kind == "number":
            found["port"] = self.random.choice(PORTS)
        elif kind == "range":
            first = self.random.choice(PORTS)
            found |= {"port": first, "endPort": self.random.randint(first, 9000)}
        elif kind == "name":
            found["port"] = self.random.choice(("web", "dns", "none"))
        return found


def _within(inner: Any, outer: Any) -> bool:
    return bool(inner.subnet_of(outer))


# --- the API's text, read naively ---------------------------------------------------------------------------------


def space(pod: str) -> str:
    return pod.partition("-")[0]


def selects(selector: dict[str, Any], labels: Labels) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        key, operator, values = expression["key"], expression["operator"], expression.get("values", [])
        present = key in labels
        if operator == "In" and not (present and labels[key] in values):
            return False
        if operator == "NotIn" and present and labels[key] in values:
            return False
        if operator == "Exists" and not present:
            return False
        if operator == "DoesNotExist" and present:
            return False
    return True


def addresses(who: str) -> dict[str, str]:
    if who in OUTSIDE:
        return dict(zip("46", OUTSIDE[who], strict=True))
    ipv4 = ipaddress.ip_address(f"192.168.0.{PODS[who]}")
    return {"4": str(ipv4), "6": f"fd20::{PODS[who]}", "link": str(link_local(mac_for(ipv4)))}


def peer_matches(world: World, peer: dict[str, Any], who: str, family: str, namespace: str) -> bool:
    if "ipBlock" in peer:
        address = ipaddress.ip_address(addresses(who)[family])
        inside = [ipaddress.ip_network(text) for text in peer["ipBlock"].get("except", [])]
        return address in ipaddress.ip_network(peer["ipBlock"]["cidr"]) and not any(address in item for item in inside)
    if who in OUTSIDE:
        return False
    if "namespaceSelector" in peer:
        labels = {**world.namespaces[space(who)], "kubernetes.io/metadata.name": space(who)}
        if not selects(peer["namespaceSelector"], labels):
            return False
    elif space(who) != namespace:
        return False
    return selects(peer.get("podSelector", {}), world.pods[who]["labels"])


def port_matches(world: World, port: dict[str, Any], protocol: str, number: int, destination: str) -> bool:
    if port.get("protocol", "TCP") != protocol:
        return False
    wanted = port.get("port")
    if wanted is None:
        return True
    if isinstance(wanted, str):
        named = world.pods[destination]["ports"] if destination in PODS else []
        return any((x["name"], x["protocol"], x["containerPort"]) == (wanted, protocol, number) for x in named)
    return bool(wanted <= number <= port.get("endPort", wanted))


def admitted(world: World, pod: str, direction: str, packet: Packet) -> bool:
    """Whether the policies that select a pod admit a packet in one direction."""
    source, destination, family, protocol, number = packet
    peer, key = (source, "from") if direction == "ingress" else (destination, "to")
    isolated = False
    for spec in world.policies.get(space(pod), {}).values():
        if not selects(spec["podSelector"], world.pods[pod]["labels"]):
            continue
        types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]
        if direction.capitalize() not in types:
            continue
        isolated = True
        for rule in spec.get(direction, []):
            peers, ports = rule.get(key, []), rule.get("ports", [])
            if peers and not any(peer_matches(world, item, peer, family, space(pod)) for item in peers):
                continue
            if ports and not any(port_matches(world, item, protocol, number, destination) for item in ports):
                continue
            return True
    return not isolated


def should_arrive(world: World, packet: Packet) -> bool:
    source, destination = packet[:2]
    leaves = source not in PODS or source.endswith("away") or admitted(world, source, "egress", packet)
    enters = destination not in PODS or destination.endswith("away") or admitted(world, destination, "ingress", packet)
    return leaves and enters


# --- packets ------------------------------------------------------------------------------------------------------


def checksum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def payload(protocol: str, source_port: int, port: int, tail: bytes, version: int) -> bytes:
    if protocol == "TCP":
        return struct.pack("!HHIIBBHHH", source_port, port, 1, 0, 5 << 4, 2, 1024, 0, 0) + tail
    if protocol == "UDP":
        return struct.pack("!HHHH", source_port, port, 8 + len(tail), 0) + tail
    if protocol == "SCTP":  # an INIT with nothing in it that anybody would answer
        return struct.pack("!HHIIBBH", source_port, port, 0, 0, 1, 0, 20) + bytes(16) + tail
    return struct.pack("!BBHHH", 8 if version == 4 else 128, 0, 0, source_port, 1) + tail


def frame(
    ours: str, theirs: str, macs: tuple[bytes, bytes], protocol: str, ports: tuple[int, int], tail: bytes
) -> bytes:
    source, destination = ipaddress.ip_address(ours), ipaddress.ip_address(theirs)
    number = 58 if protocol == "ICMP" and source.version == 6 else NUMBERS[protocol]
    body = payload(protocol, *ports, tail, source.version)
    pseudo = b"" if number == 1 else source.packed + destination.packed + struct.pack("!II", len(body), number)
    place = {6: 16, 17: 6, 1: 2, 58: 2}.get(number)
    if place is not None:
        body = body[:place] + struct.pack("!H", checksum(pseudo + body)) + body[place + 2 :]
    if source.version == 4:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, number, 0)
        whole = header + source.packed + destination.packed
        header = whole[:10] + struct.pack("!H", checksum(whole)) + whole[12:]
    else:
        header = struct.pack("!IHBB", 6 << 28, len(body), number, 64) + source.packed + destination.packed
    return macs[1] + macs[0] + struct.pack("!H", 0x0800 if source.version == 4 else 0x86DD) + header + body


def within(namespace: str, call: Callable[[], T]) -> T:
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        if LIBC.setns(there.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), namespace)
        try:
            return call()
        finally:
            LIBC.setns(home.fileno(), 0x40000000)


def packets(interface: str) -> socket.socket:
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3))
    found.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
    found.bind((interface, 3))
    return found


class Wires:
    """A packet socket at everybody's end."""

    def __init__(self, upward: bytes) -> None:
        self.sockets = {name: within(name, lambda: packets("ovn-udn1")) for name in PODS}
        self.sockets["node"] = packets("vmj7")
        self.upward = upward
        self.count = 0

    def macs(self, source: str, destination: str) -> tuple[bytes, bytes]:
        if source in OUTSIDE:
            return bytes(6), self.upward
        own = mac_bytes(mac_for(ipaddress.ip_address(addresses(source)["4"])))
        if destination in OUTSIDE:
            return own, mac_bytes(NETWORK.gateway_mac)
        return own, mac_bytes(mac_for(ipaddress.ip_address(addresses(destination)["4"])))

    def place(self, who: str) -> str:
        return "node" if who in OUTSIDE else who

    def send(self, found: list[Packet]) -> set[int]:
        """Send all; the indices of those that arrived where they were sent to."""
        for index, (source, destination, family, protocol, port) in enumerate(found):
            self.count += 1
            ports = 20000 + self.count % 40000, port
            ours, theirs = addresses(source)[family], addresses(destination)[family]
            tail = MAGIC + struct.pack("!I", index)
            self.sockets[self.place(source)].send(
                frame(ours, theirs, self.macs(source, destination), protocol, ports, tail)
            )
        arrived, ended = set(), set[str]()
        # What comes after it by as long a way: ARP is never blocked, nor the pod whose namespace has no policies.
        out = frame(addresses("free-0")["4"], OUTSIDE["x"][0], self.macs("free-0", "x"), "UDP", (9, 9), MARK)
        self.sockets["free-0"].send(out)
        for sender in ("free-0", "red-0"):  # the bridge gives nobody back what he sent
            self.sockets[sender].send(self._arp(sender))
        until = time.monotonic() + 60
        while ended != self.sockets.keys():
            assert time.monotonic() < until, f"the last frame did not come to {self.sockets.keys() - ended}"
            for name, found_socket in self.sockets.items():
                for data in self._received(found_socket):
                    if data.endswith(MARK):
                        ended.add(name)
                    elif data[-8:-4] == MAGIC:
                        index = struct.unpack("!I", data[-4:])[0]
                        if self.place(found[index][1]) == name:
                            arrived.add(index)
        return arrived

    def _arp(self, who: str) -> bytes:
        own = self.macs(who, "x")[0]
        head = b"\xff" * 6 + own + bytes.fromhex("08060001080006040001") + own
        return head + ipaddress.ip_address(addresses(who)["4"]).packed + bytes(24) + MARK

    def _received(self, found: socket.socket) -> Iterator[bytes]:
        while True:
            try:
                data, address = found.recvfrom(2048)
            except BlockingIOError:
                return
            if address[2] != socket.PACKET_OUTGOING:
                yield data


def everything(chance: random.Random) -> list[Packet]:
    found: list[Packet] = []
    everybody = (*PODS, *OUTSIDE)
    for source in everybody:
        for destination in everybody:
            if source == destination or (source in OUTSIDE and destination in OUTSIDE):
                continue
            families = ("4", "6") if {source, destination} & OUTSIDE.keys() else ("4", "6", "link")
            for family in families:
                for protocol in NUMBERS:
                    found.append((source, destination, family, protocol, chance.choice((*PORTS, 9))))
    chance.shuffle(found)
    return found


# --- the node -----------------------------------------------------------------------------------------------------


def endpoint(name: str) -> Endpoint:
    ipv4, ipv6 = (
        ipaddress.ip_interface(f"{addresses(name)[family]}/{subnet.prefixlen}")
        for family, subnet in zip("46", SUBNETS, strict=True)
    )
    return Endpoint(PodReference(space(name), name, f"uid-{name}"), "n", HERE.name, mac_for(ipv4.ip), (ipv4, ipv6))


def member(world: World, name: str) -> Member:
    pod = world.pods[name]
    ports = frozenset((item["name"], Protocol(item["protocol"]), item["containerPort"]) for item in pod["ports"])
    return Member(endpoint(name).pod, pod["labels"], endpoint(name).all_addresses, ports)


def read(namespace: str, spec: dict[str, Any]) -> Any:
    return parse({"metadata": {"namespace": namespace}, "spec": spec})


def told(world: World) -> NetworkPolicies:
    found = NetworkPolicies()
    for name, labels in world.namespaces.items():
        found.put_namespace(name, labels)
    for name in PODS:
        found.put_member(member(world, name))
    for namespace, policies in world.policies.items():
        for name, spec in policies.items():
            found.put_policy(name, read(namespace, spec))
    return found


def tell(policies: NetworkPolicies, world: World, kind: str, name: str) -> None:
    namespace, _, number = name.partition("/")
    if kind == "namespace":
        policies.put_namespace(name, world.namespaces[name])
    elif kind == "pod":
        policies.put_member(member(world, name))
    elif number in world.policies[namespace]:
        policies.put_policy(number, read(namespace, world.policies[namespace][number]))
    else:
        policies.drop_policy(namespace, number)


async def prepared(kernel: LinuxKernel) -> None:
    wanted = NodeNetwork(NETWORK, HERE, 1450, node_planner.allocate_join(await kernel.observe_node(), NETWORK.id))
    await kernel.apply(planner.plan(wanted, None))
    for name in PODS:
        state = await kernel.observe_network(NETWORK.namespace)
        assert state is not None
        port = LocalPort(endpoint(name))
        await kernel.apply(planner.attach(wanted, port, PodInterface(f"/run/netns/{name}", name), state))
        wanted = replace(wanted, ports=(*wanted.ports, port))
    await kernel.apply(planner.plan(wanted, await kernel.observe_network(NETWORK.namespace)))


def uplink_mac() -> bytes:
    shown = subprocess.run(["ip", "-j", "-n", "vmnet-7", "link", "show", "up0"], capture_output=True, check=True)
    return mac_bytes(json.loads(shown.stdout)[0]["address"])


async def main(seed: int, cases: int) -> None:
    kernel, world = LinuxKernel(), World(seed)
    await prepared(kernel)
    wires = Wires(uplink_mac())
    local = [endpoint(name) for name in PODS if not name.endswith("away")]
    policies, held, marks = told(world), dict[str, Table](), dict[str, Marks]()
    arrived = sent = 0
    for case in range(cases):
        happened = world.change()
        for kind, name in happened:
            tell(policies, world, kind, name)
        tables = policies.tables(local)
        await kernel.apply(tuple(planner.load_tables(NETWORK.namespace, marks, tables, held)))
        marks = planner.marks_then(marks, tables, held)
        held = {table.identity: table for table in tables}
        anew = {table.identity: table.digest for table in told(world).tables(local)}
        assert anew == {identity: table.digest for identity, table in held.items()}, f"case {case}: {happened}"
        found = everything(world.random)
        passed = wires.send(found)
        for index, packet in enumerate(found):
            right = should_arrive(world, packet)
            if right != (index in passed):
                print(json.dumps({"pods": world.pods, "namespaces": world.namespaces, "policies": world.policies}))
                print("\n".join(table.whole() for table in tables))
                raise AssertionError(f"seed {seed}, case {case}: {packet} should {'' if right else 'not '}arrive")
        arrived, sent = arrived + len(passed), sent + len(found)
    await kernel.close()
    assert 0.1 < arrived / sent < 0.9, "cases that admit everything, or nothing, say nothing"
    print(f"{sent} packets, {arrived} arrived")


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one queue, in which packets do not overtake each other
    Path("/run/netns").mkdir(exist_ok=True)
    for pod_name in PODS:
        subprocess.run(["ip", "netns", "add", pod_name], check=True)
        subprocess.run(["ip", "-n", pod_name, "link", "set", "lo", "up"], check=True)
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
