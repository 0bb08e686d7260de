"""The planners' rules on the real kernel: three nodes, two networks with the same subnet."""

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
from vmnet.lab.lab import Completed, Lab

DRIVER = Path(__file__).with_name("datapath_node.py")
RARP = "Ether(src=own,dst='ff:ff:ff:ff:ff:ff',type=0x8035)/ARP(op=3,hwsrc=own,hwdst=own,psrc='0.0.0.0',pdst='0.0.0.0')"
PODS = [[11, "n1", "a"], [12, "n2", "b"], [13, "n1", "c"]]


class Fabric:
    """Nodes of a lab without any of its programs."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    async def node(self, node: str, do: str, **arguments: Any) -> Any:
        steps = json.dumps([{"do": do, "with": arguments}])
        result = await self.lab.exec(node, [sys.executable, str(DRIVER), node], stdin=steps, timeout=90)
        assert result.exit == 0, result.stderr
        return json.loads(result.stdout)[0]

    async def render(self, net: int, endpoints: list[list[Any]], standby: tuple[str, ...] = ()) -> None:
        for node in ("n1", "n2", "n3"):
            left = await self.node(node, "render", net=net, endpoints=endpoints, standby=list(standby))
            assert left == 0, f"{node} had {left} operations left on the second pass"

    async def pod(self, node: str, namespace: str, *argv: str, timeout: float = 60) -> Completed:
        return await self.lab.exec(node, ["ip", "netns", "exec", namespace, *argv], timeout=timeout)

    async def reaches(self, node: str, namespace: str, address: str) -> bool:
        return (await self.pod(node, namespace, "ping", "-c", "1", "-W", "3", address)).exit == 0

    async def send(self, node: str, namespace: str, code: str) -> None:
        """Send scapy frames from a pod; ``own`` is the pod's own MAC."""
        program = (
            f"from scapy.all import *\nconf.verb=0\nown=get_if_hwaddr('ovn-udn1')\nsendp({code}, iface='ovn-udn1')"
        )
        result = await self.pod(node, namespace, sys.executable, "-c", program)
        assert result.exit == 0, result.stderr


@pytest.fixture
async def fabric() -> AsyncIterator[Fabric]:
    async with Lab(name=f"datapath-{os.getpid()}-{uuid.uuid4().hex[:6]}", without=COMPONENTS) as lab:
        yield Fabric(lab)


async def test_same_subnet_twice_side_by_side(fabric: Fabric) -> None:
    await fabric.render(7, PODS)
    await fabric.render(8, [[11, "n1", "a"], [14, "n3", "d"]])
    for address in ("192.168.0.12", "fd20::12", "192.168.0.13", "fd20::13", "192.168.0.1", "fd20::1"):
        assert await fabric.reaches("n1", "a-7", address), address
    for address in ("172.30.0.100", "fd00:30::100"):
        assert await fabric.reaches("n1", "a-7", address), address
        assert await fabric.reaches("n1", "a-8", address), address
    assert await fabric.reaches("n1", "a-8", "192.168.0.14")
    assert not await fabric.reaches("n1", "a-7", "192.168.0.14"), "network 8 is not reachable from network 7"
    assert not await fabric.reaches("n1", "a-8", "192.168.0.12"), "network 7 is not reachable from network 8"
    for node in ("n1", "n2", "n3"):
        await fabric.node(node, "remove", net=8)
        assert await fabric.node(node, "remove", net=7), f"{node} keeps nothing"


async def test_the_first_frame_of_the_guest_moves_the_network(fabric: Fabric) -> None:
    """Machine b moves from n2 to n3; no agent runs, only what was staged acts."""
    moved = [[11, "n1", "a"], [12, "n2", "b"], [12, "n3", "b"]]
    await fabric.render(7, moved, standby=("b@n3", "b"))
    assert await fabric.reaches("n1", "a-7", "192.168.0.12")
    assert await fabric.node("n3", "gate", net=7, host=12, pod="b") == "closed"
    # What the target pod's own kernel says, and what others say, must not open it.
    await fabric.send(
        "n3", "b-7", "Ether(src=own,dst='ff:ff:ff:ff:ff:ff')/ARP(psrc='192.168.0.12',pdst='192.168.0.12')"
    )
    await fabric.send("n3", "b-7", "Ether(src='0a:58:c0:a8:00:0b',dst='ff:ff:ff:ff:ff:ff',type=0x8035)/ARP(op=3)")
    await fabric.send("n1", "a-7", "Ether(src=own,dst='ff:ff:ff:ff:ff:ff',type=0x8035)/ARP(op=3)")
    assert await fabric.node("n3", "gate", net=7, host=12, pod="b") == "closed"
    assert await fabric.node("n2", "gate", net=7, host=12, pod="b") == "open"
    assert not await fabric.reaches("n3", "b-7", "192.168.0.11")
    await fabric.send("n3", "b-7", RARP)
    assert await fabric.node("n3", "gate", net=7, host=12, pod="b") == "open"
    assert await fabric.node("n2", "gate", net=7, host=12, pod="b") == "moved"
    assert await fabric.node("n1", "vtep", net=7, host=12) == ["172.30.0.13"]
    assert await fabric.node("n2", "vtep", net=7, host=12) == ["172.30.0.13"]
    assert await fabric.reaches("n1", "a-7", "192.168.0.12")
    assert not await fabric.reaches("n2", "b-7", "192.168.0.11"), "the source's port is closed"
    # The API is behind: another look at it must not undo what the frame did.
    await fabric.render(7, moved, standby=("b@n3", "b"))
    assert await fabric.node("n1", "vtep", net=7, host=12) == ["172.30.0.13"]
    assert await fabric.reaches("n1", "a-7", "fd20::12")
    # And back, still without an agent.
    await fabric.send("n2", "b-7", RARP)
    assert await fabric.node("n2", "gate", net=7, host=12, pod="b") == "open"
    assert await fabric.node("n3", "gate", net=7, host=12, pod="b") == "moved"
    assert await fabric.reaches("n2", "b-7", "192.168.0.11")


async def test_the_first_frame_moves_a_machine_on_a_secondary_network_too(fabric: Fabric) -> None:
    """Nothing routes there, and nothing but the segment is reached."""
    moved = [[11, "n1", "a"], [12, "n2", "b"], [12, "n3", "b"]]
    await fabric.render(30, moved, standby=("b@n3", "b"))
    for address in ("192.168.0.12", "fd20::12"):
        assert await fabric.reaches("n1", "a-30", address), address
    for address in ("192.168.0.1", "172.30.0.100"):
        assert not await fabric.reaches("n1", "a-30", address), address
    assert await fabric.node("n3", "gate", net=30, host=12, pod="b") == "closed"
    await fabric.send("n3", "b-30", RARP)
    assert await fabric.node("n3", "gate", net=30, host=12, pod="b") == "open"
    assert await fabric.node("n2", "gate", net=30, host=12, pod="b") == "moved"
    assert await fabric.node("n1", "vtep", net=30, host=12) == ["172.30.0.13"]
    assert await fabric.reaches("n1", "a-30", "192.168.0.12")
    await fabric.render(30, moved, standby=("b@n3", "b"))
    assert await fabric.node("n1", "vtep", net=30, host=12) == ["172.30.0.13"]
    for node in ("n1", "n2", "n3"):
        assert await fabric.node(node, "remove", net=30), f"{node} keeps nothing"


EVERYONE = "dst='ff:ff:ff:ff:ff:ff'"
NODES6 = "dst='33:33:00:00:00:01')/IPv6(dst='ff02::1'"
FORGED = {
    "another MAC": f"Ether(src='0a:58:c0:a8:00:63',{EVERYONE})/IP(src='192.168.0.11',dst='192.168.0.12')/ICMP()",
    "another IPv4": f"Ether(src=own,{EVERYONE})/IP(src='192.168.0.99',dst='192.168.0.12')/ICMP()",
    "another IPv6": f"Ether(src=own,{NODES6},src='fd20::99')/ICMPv6EchoRequest()",
    "ARP for another": f"Ether(src=own,{EVERYONE})/ARP(op=2,hwsrc=own,psrc='192.168.0.12')",
    "ARP as another": f"Ether(src=own,{EVERYONE})/ARP(op=2,hwsrc='0a:58:c0:a8:00:0c',psrc='192.168.0.11')",
    "ND for another": f"Ether(src=own,{NODES6},src='fd20::11')/ICMPv6ND_NA(tgt='fd20::12')",
    "DHCP server": f"Ether(src=own,{EVERYONE})/IP(src='192.168.0.11')/UDP(sport=67,dport=68)",
    "router": f"Ether(src=own,{NODES6},src='fd20::11')/ICMPv6ND_RA()",
    "RARP of another": f"Ether(src='0a:58:c0:a8:00:0c',{EVERYONE},type=0x8035)/ARP(op=3)",
    "duplicate detection for another": f"Ether(src=own,{NODES6},src='::')/ICMPv6ND_NS(tgt='fd20::12')",
    "link-local of another": f"Ether(src=own,{NODES6},src='fe80::99')/ICMPv6EchoRequest()",
    "ND as another": f"Ether(src=own,{NODES6},src='fd20::12')/ICMPv6ND_NS(tgt='fd20::13')",
    "redirect": f"Ether(src=own,{NODES6},src='fd20::11')/ICMPv6ND_Redirect(tgt='fd20::11',dst='fd20::12')",
    "DHCPv6 server": f"Ether(src=own,{NODES6},src='fd20::11')/UDP(sport=547,dport=546)",
    "DHCP server without address": f"Ether(src=own,{EVERYONE})/IP(src='0.0.0.0')/UDP(sport=67,dport=68)",
    "fragment": f"Ether(src=own,{EVERYONE})/IP(src='192.168.0.99',dst='192.168.0.12',frag=100,proto=17)",
    "first fragment": f"Ether(src=own,{EVERYONE})/IP(src='192.168.0.99',dst='192.168.0.12',flags='MF')/UDP()",
    "router behind hop-by-hop": f"Ether(src=own,{NODES6},src='fd20::11')/IPv6ExtHdrHopByHop()/ICMPv6ND_RA()",
    "router behind options": f"Ether(src=own,{NODES6},src='fd20::11')/IPv6ExtHdrDestOpt()/ICMPv6ND_RA()",
    "router in a fragment": f"Ether(src=own,{NODES6},src='fd20::11')/IPv6ExtHdrFragment(m=1)/ICMPv6ND_RA()",
    "options in a fragment": (
        f"Ether(src=own,{NODES6},src='fd20::11')/IPv6ExtHdrFragment(m=1,nh=60)/IPv6ExtHdrDestOpt(nh=58)"
    ),
    "rest of options in a fragment": f"Ether(src=own,{NODES6},src='fd20::11')/IPv6ExtHdrFragment(offset=1,nh=60)",
    "ND in a fragment": f"Ether(src=own,{NODES6},src='fd20::11')/IPv6ExtHdrFragment(m=1)/ICMPv6ND_NA(tgt='fd20::11')",
    "headers without end": f"Ether(src=own,{NODES6},src='fd20::11',nh=60)/Raw(bytes([60,200,1,4,0,0,0,0]))",
    "802.1ad tag": f"Ether(src=own,{EVERYONE},type=0x88a8)/Dot1Q(vlan=5)/IP(src='192.168.0.11')/ICMP()",
    "two tags": f"Ether(src=own,{EVERYONE},type=0x88a8)/Dot1Q(vlan=5)/Dot1Q(vlan=6)/IP(src='192.168.0.11')",
    "priority tag": f"Ether(src=own,{EVERYONE})/Dot1Q(vlan=0)/IP(src='192.168.0.11',dst='192.168.0.12')/ICMP()",
    "MPLS": f"Ether(src=own,{EVERYONE},type=0x8847)/Raw(bytes.fromhex('000011ff'))",
    "LLDP": "Ether(src=own,dst='01:80:c2:00:00:0e',type=0x88cc)",
    "STP": "Dot3(src=own,dst='01:80:c2:00:00:00')/LLC(dsap=0x42,ssap=0x42,ctrl=3)/STP()",
    "RARP for another": f"Ether(src=own,{EVERYONE},type=0x8035)/ARP(op=3,hwsrc='0a:58:c0:a8:00:0c',hwdst=own)",
    "RARP of one for another": f"Ether(src=own,{EVERYONE},type=0x8035)/ARP(op=3,hwsrc=own,hwdst='0a:58:c0:a8:00:0c')",
    "VLAN tag": f"Ether(src=own,{EVERYONE})/Dot1Q(vlan=5)/IP(src='192.168.0.11',dst='192.168.0.12')/ICMP()",
}
POD_FORGED = {"RARP": f"Ether(src=own,{EVERYONE},type=0x8035)/ARP(op=3,hwsrc=own,hwdst=own)"}
HONEST = f"Ether(src=own,{EVERYONE})/IP(src='192.168.0.11',dst='192.168.0.12')/UDP(sport=9,dport=4242)"

LISTEN = """
import socket, sys
found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
found.bind((sys.argv[1], 0)); found.settimeout(60)
print("ready", flush=True)
seen = set()
while True:
    frame, address = found.recvfrom(2048)
    if address[2] == 4 and sys.argv[1] == "ovn-udn1": continue
    if b"HONEST" in frame: break
    if b"FORGED" in frame: seen.add(frame[frame.index(b"FORGED") + 6:].split(b";")[0].decode())
print(sorted(seen))
"""


@pytest.mark.parametrize(("net", "sender", "more"), [(7, "a", {}), (7, "pod", POD_FORGED), (30, "a", {})])
async def test_forged_frames_arrive_nowhere(fabric: Fabric, net: int, sender: str, more: dict[str, str]) -> None:
    """A machine's port has more rules than a pod's, and a secondary network no fewer than a primary one."""
    await fabric.render(net, [[11, "n1", sender], *PODS[1:]])
    listeners = []
    # A port of the same node, one of another node, the bridge, and what leaves the node by its uplink.
    places = (("n1", f"c-{net}", "ovn-udn1"), ("n2", f"b-{net}", "ovn-udn1"), ("n1", f"vmnet-{net}", "br0"))
    for node, namespace, interface in (*places, ("n1", "", "eth0")):
        name = f"listen-{namespace}"
        enter = ["ip", "netns", "exec", namespace] if namespace else []
        log = await fabric.lab.spawn(name, node, [*enter, sys.executable, "-c", LISTEN, interface])
        async with asyncio.timeout(60):
            while "ready" not in log.read_text():
                await asyncio.sleep(0.05)
        listeners.append((name, log))
    forged = ", ".join(f"{frame}/Raw(b'FORGED{name};' + bytes(40))" for name, frame in (FORGED | more).items())
    # The honest frame comes last, by the same queues: when it is there, what was forged is not still under way.
    await fabric.send("n1", f"{sender}-{net}", f"[{forged}, {HONEST}/Raw(b'HONEST' + bytes(40))]")
    for name, log in listeners:
        assert await fabric.lab.wait(name, timeout=60) == 0
        assert log.read_text().splitlines()[-1] == "[]"
    # What needs several fragments is no forgery.
    for address in ("192.168.0.12", "fd20::12"):
        large = await fabric.pod("n1", f"{sender}-{net}", "ping", "-c", "1", "-W", "5", "-s", "3000", address)
        assert large.exit == 0, large.stdout


async def test_a_tenant_cannot_speak_for_the_fabric(fabric: Fabric) -> None:
    """A guest may send what it likes to the nodes' VXLAN port; its node's own address would make it believed."""
    await fabric.render(7, PODS)
    await fabric.render(8, [[11, "n1", "a"], [14, "n3", "d"]])
    victim = "0a:58:c0:a8:00:0e"
    inner = f"Ether(src='{victim}',dst='ff:ff:ff:ff:ff:ff',type=0x8035)/ARP(op=3,hwsrc='{victim}')"
    header = "bytes.fromhex('0800000000000800')"
    program = (
        "from scapy.all import *; import socket, sys\n"
        f"frame = {header} + bytes({inner})\n"
        "for family, node in ((socket.AF_INET, sys.argv[1]), (socket.AF_INET6, sys.argv[2])):\n"
        "    with socket.socket(family, socket.SOCK_DGRAM) as found: found.sendto(frame, (node, 4789))\n"
    )
    for node in ("1", "3"):
        sent = await fabric.pod(
            "n1", "a-7", sys.executable, "-c", program, f"172.30.0.1{node}", f"fd00:30::1{node}", timeout=60
        )
        assert sent.exit == 0, sent.stderr
    # By the same way, and answered: what was sent before it has arrived.
    assert await fabric.reaches("n1", "a-7", "172.30.0.13")
    assert await fabric.node("n3", "gate", net=8, host=14, pod="d") == "open"
    assert await fabric.reaches("n1", "a-8", "192.168.0.14")


async def test_networks_do_not_meet_in_the_node(fabric: Fabric) -> None:
    await fabric.render(7, PODS[:1])
    await fabric.render(8, [[11, "n1", "a"]])
    for own, other in ((7, 8), (8, 7)):
        for family in ("4", "6"):
            address = await fabric.node("n1", "join", net=other, family=family)
            assert not await fabric.reaches("n1", f"a-{own}", address), f"network {own} reaches {address} of {other}"
            gateway = await fabric.node("n1", "join", net=own, family=family)
            assert await fabric.reaches("n1", f"a-{own}", gateway), f"network {own} has its own {gateway}"


FABRIC = """
import socket, sys, json
found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
found.bind(("vx0", 0)); found.settimeout(60)
print("ready", flush=True)
seen = set()
while True:
    frame, address = found.recvfrom(2048)
    if address[2] == 4: continue
    if b"HONEST" in frame: break
    kind = frame[12:14].hex()
    if frame[6:12].hex() == sys.argv[1]: seen.add("source " + kind)
    if kind == "0806" and socket.inet_aton("192.168.0.1") in (frame[28:32], frame[38:42]): seen.add("arp")
    if kind == "86dd" and frame[20] == 58 and frame[54] in (133, 134, 137): seen.add("router discovery")
    if kind == "86dd" and frame[20] == 58 and frame[54] in (135, 136):
        if frame[62:78] in (socket.inet_pton(10, "fd20::1"), socket.inet_pton(10, "fe80::1")): seen.add("nd")
print(json.dumps(sorted(seen)))
"""


async def test_the_gateway_is_never_heard_on_the_fabric(fabric: Fabric) -> None:
    await fabric.render(7, PODS)
    listen = ["ip", "netns", "exec", "vmnet-7", sys.executable, "-c", FABRIC, "0a58c0a80001"]
    log = await fabric.lab.spawn("listen", "n2", listen)
    async with asyncio.timeout(60):
        while "ready" not in log.read_text():
            await asyncio.sleep(0.05)
    for address in ("192.168.0.1", "fd20::1", "192.168.0.12", "fd20::12", "172.30.0.100", "fd00:30::100"):
        await fabric.pod("n1", "a-7", "ip", "neigh", "flush", "all")
        assert await fabric.reaches("n1", "a-7", address), address
        await fabric.pod("n2", "b-7", "ip", "neigh", "flush", "all")
        assert await fabric.reaches("n2", "b-7", address), address
    # The node itself speaks to a remote endpoint, from the gateway address.
    routed = await fabric.lab.exec("n1", ["ip", "netns", "exec", "vmnet-7", "ping", "-c1", "-W3", "192.168.0.12"])
    assert routed.exit == 1, "the answer goes to the other node's gateway"
    await fabric.send(
        "n1", "a-7", f"Ether(src=own,{EVERYONE})/ARP(op=1,hwsrc=own,psrc='192.168.0.11',pdst='192.168.0.1')"
    )
    await fabric.send("n1", "a-7", f"Ether(src=own,{NODES6},src='fd20::11')/ICMPv6ND_NS(tgt='fd20::1')")
    await fabric.send("n1", "a-7", f"Ether(src=own,{NODES6},src='fd20::11')/ICMPv6ND_RS()")
    await fabric.send("n1", "a-7", f"[{HONEST}/Raw(b'HONEST' + bytes(40))]")
    assert await fabric.lab.wait("listen", timeout=60) == 0
    assert log.read_text().splitlines()[-1] == "[]"


async def test_the_routers_of_all_nodes_reach_each_other(fabric: Fabric) -> None:
    """Router to router, in each network for itself, with no frame of it on the segment that the guests share."""
    await fabric.render(7, PODS)
    await fabric.render(8, PODS[:1])
    for node in ("n1", "n2", "n3"):
        for number in ("1", "2", "3"):
            for address in (f"100.88.0.{number}", f"fd97::{number}"):
                assert await fabric.reaches(node, "vmnet-7", address), f"{node} does not reach {address}"
    settings = ("ipv4/conf/rt0/rp_filter", "ipv4/conf/rt0/send_redirects", "ipv6/conf/rt0/accept_dad")
    found = await fabric.pod("n1", "vmnet-7", "cat", *(f"/proc/sys/net/{name}" for name in settings))
    assert found.stdout.split() == ["0", "0", "0"]
    # A guest's packets are routed there too, and the answers come back by the same way.
    for address in ("100.88.0.3", "fd97::3"):
        assert await fabric.reaches("n1", "a-7", address), address
        assert await fabric.reaches("n1", "a-8", address), address


async def test_only_nodes_speak_router_to_router(fabric: Fabric) -> None:
    """From an address that is no node's, a datagram with the VNI of the routers is not believed."""
    await fabric.render(7, PODS)
    frame = (
        "Ether(src='0a:59:00:00:00:01', dst=sys.argv[1])/IP(src='100.88.0.2', dst='192.168.0.11')"
        "/UDP(dport=9999)/Raw(b'FORGED')"
    )
    program = (
        "from scapy.all import *; import socket, sys\n"
        f"datagram = bytes.fromhex('0800000080000700') + bytes({frame})\n"
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(datagram, ('172.30.0.11', 4789))\n"
    )
    counted = ["cat", "/sys/class/net/rt0/statistics/rx_packets"]
    router = await fabric.lab.exec("n1", ["ip", "netns", "exec", "vmnet-7", "cat", "/sys/class/net/rt0/address"])

    async def received() -> int:
        return int((await fabric.lab.exec("n1", ["ip", "netns", "exec", "vmnet-7", *counted])).stdout)

    before = await received()
    for sender in ("outside", "n2"):
        sent = await fabric.lab.exec(sender, [sys.executable, "-c", program, router.stdout.strip()], timeout=60)
        assert sent.exit == 0, sent.stderr
    async with asyncio.timeout(60):
        while await received() == before:  # the node's one has arrived: the stranger's, sent before it, will not
            await asyncio.sleep(0.05)
    assert await received() == before + 1


SPOOF = """
from scapy.all import *
import sys
conf.verb = 0
source, target, mac = sys.argv[1:]
frame = Ether(src="0a:59:00:00:00:01", dst=mac)/IP(src="100.88.0.2", dst="192.168.0.11")/UDP(dport=9999)/Raw(b"FORGED")
datagram = UDP(sport=5000, dport=4789)/Raw(bytes.fromhex("0800000080000700") + bytes(frame))
send((IPv6 if ":" in source else IP)(src=source, dst=target)/datagram)
"""
TAKE = """
import socket
found = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
found.bind(("::", 4789))
print("ready", flush=True)
while True:
    print(found.recvfrom(2048)[1][0], flush=True)
"""


async def test_no_pod_speaks_as_another_node(fabric: Fabric) -> None:
    """A pod of the default network writes another node's address into its datagrams: its own node believes none."""
    await fabric.render(7, PODS)
    for words in (
        "netns add plain",
        "link add plain0 type veth peer name eth0 netns plain",
        "addr add 10.244.1.1/24 dev plain0",
        "addr add fd00:10:244:1::1/64 dev plain0 nodad",
        "link set plain0 up",
        "-n plain addr add 10.244.1.9/24 dev eth0",
        "-n plain addr add fd00:10:244:1::9/64 dev eth0 nodad",
        "-n plain link set eth0 up",
        "-n plain route add default via 10.244.1.1",
        "-n plain route add default via fd00:10:244:1::1",
    ):
        done = await fabric.lab.exec("n1", ["ip", *words.split()])
        assert done.exit == 0, done.stderr
    # The lab's fabric is IPv4: a socket stands for the one that an IPv6 fabric has.
    known = await fabric.lab.exec("n1", ["nft", "add element inet vmnet vteps6 { fd00:30::12 }"])
    assert known.exit == 0, known.stderr
    log = await fabric.lab.spawn("take", "n1", [sys.executable, "-c", TAKE])
    inside = ["ip", "netns", "exec", "vmnet-7", "cat"]
    router = (await fabric.lab.exec("n1", [*inside, "/sys/class/net/rt0/address"])).stdout.strip()

    async def received() -> tuple[int, int]:
        count = await fabric.lab.exec("n1", [*inside, "/sys/class/net/rt0/statistics/rx_packets"])
        return int(count.stdout), log.read_text().count("fd00:30::12")

    async with asyncio.timeout(60):
        while "ready" not in log.read_text():
            await asyncio.sleep(0.05)
    before = await received()
    for source, target in (("172.30.0.12", "172.30.0.11"), ("fd00:30::12", "fd00:30::11")):
        for address in ("10.244.1.1", "fd00:10:244:1::1"):
            assert await fabric.reaches("n1", "plain", address), address
        sent = await fabric.pod("n1", "plain", sys.executable, "-c", SPOOF, source, target, router)
        assert sent.exit == 0, sent.stderr
        # By the same device, and answered: what was sent before it has arrived.
        assert await fabric.reaches("n1", "plain", target)
    assert await received() == before
    for source, target in (("172.30.0.12", "172.30.0.11"), ("fd00:30::12", "fd00:30::11")):
        sent = await fabric.lab.exec("n2", [sys.executable, "-c", SPOOF, source, target, router], timeout=60)
        assert sent.exit == 0, sent.stderr
    async with asyncio.timeout(60):
        while await received() != (before[0] + 1, before[1] + 1):
            await asyncio.sleep(0.05)


ECHO = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], 8080), family=family) as listener:
    print("ready", flush=True)
    while True:
        stream, peer = listener.accept()
        with stream:
            stream.sendall(peer[0].encode())
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 8080), timeout=60) as stream:
    print(b"".join(iter(lambda: stream.recv(100), b"")).decode())
"""


async def test_a_layer3_network_is_routed_from_node_to_node(fabric: Fabric) -> None:
    """Two of them with the same subnets; pods on one node and on others; ping, and TCP with the client's address."""
    pods = [[11, "n1", "a"], [12, "n1", "b"], [11, "n2", "c"], [11, "n3", "d"]]
    await fabric.render(20, pods)
    await fabric.render(21, [[11, "n1", "a"], [14, "n2", "e"]])
    addresses = {pod: (f"103.103.{node[1]}.{host}", f"fd20:0:0:{node[1]}::{host:x}") for host, node, pod in pods}
    for _, node, pod in pods:
        for address in (found for other in addresses.values() for found in other):
            assert await fabric.reaches(node, f"{pod}-20", address), f"{pod} does not reach {address}"
        assert await fabric.reaches(node, f"{pod}-20", "172.30.0.100"), pod
        assert await fabric.reaches(node, f"{pod}-20", f"103.103.{node[1]}.1"), "its gateway"
    for index, address in enumerate(addresses["c"]):
        namespace = ["ip", "netns", "exec", "c-20"]
        log = await fabric.lab.spawn(f"echo{index}", "n2", [*namespace, sys.executable, "-c", ECHO, address])
        async with asyncio.timeout(60):
            while "ready" not in log.read_text():
                await asyncio.sleep(0.05)
        for pod in ("a", "b"):
            answer = await fabric.pod("n1", f"{pod}-20", sys.executable, "-c", ASK, address)
            assert answer.stdout.strip() == addresses[pod][index], "a router keeps the client's address"
    # The other network's pod has an address of the same part, on the same node.
    assert await fabric.reaches("n1", "a-21", "103.103.2.14")
    for own, address in ((20, "103.103.2.14"), (20, "fd20:0:0:2::e"), (21, "103.103.1.12"), (21, "103.103.3.11")):
        assert not await fabric.reaches("n1", f"a-{own}", address), f"network {own} reaches {address}"
    for node in ("n1", "n2", "n3"):
        await fabric.node(node, "remove", net=20)
        assert await fabric.node(node, "remove", net=21), f"{node} keeps nothing"


async def test_nobodys_part_of_a_layer3_network_does_not_leave_by_the_node(fabric: Fabric) -> None:
    await fabric.render(20, [[11, "n1", "a"]])
    for address in ("103.103.77.7", "fd20:0:0:4d::7"):
        answer = await fabric.pod("n1", "a-20", "ping", "-c", "1", "-W", "3", address)
        assert answer.exit == 1
        assert "unreachable" in answer.stdout.lower(), "the gateway says so at once"


async def test_a_layer3_network_hears_no_frame_that_is_for_others(fabric: Fabric) -> None:
    """Port security is the same as on a segment that spans nodes."""
    await fabric.render(20, [[11, "n1", "a"], [12, "n1", "b"], [11, "n2", "c"]])
    forged = (
        "Ether(src=own, dst='0a:58:67:67:01:0c')/IP(src='103.103.2.11', dst='103.103.1.12')",
        "Ether(src=own, dst='ff:ff:ff:ff:ff:ff')/ARP(op=2, hwsrc=own, psrc='103.103.1.1', pdst='103.103.1.12')",
        "Ether(src='0a:59:00:00:00:01', dst='0a:58:67:67:01:0c')/IP(src='103.103.1.11', dst='103.103.1.12')",
        "Ether(src=own, dst='0a:58:67:67:01:0c')/IP(src='100.88.0.2', dst='103.103.1.12')",
    )
    honest = "Ether(src=own, dst='0a:58:67:67:01:0c')/IP(src='103.103.1.11', dst='103.103.1.12')/UDP()"
    program = (
        "import socket\n"
        "found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))\n"
        "found.bind(('ovn-udn1', 0)); found.settimeout(60)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    frame = found.recv(2048)\n"
        "    if b'HONEST' in frame: break\n"
        "    if b'FORGED' in frame: print(frame.hex(), flush=True)\n"
    )
    log = await fabric.lab.spawn("hear", "n1", ["ip", "netns", "exec", "b-20", sys.executable, "-c", program])
    async with asyncio.timeout(60):
        while "ready" not in log.read_text():
            await asyncio.sleep(0.05)
    frames = ", ".join(f"{frame}/Raw(b'FORGED' + bytes(40))" for frame in forged)
    await fabric.send("n1", "a-20", f"[{frames}, {honest}/Raw(b'HONEST' + bytes(40))]")
    assert await fabric.lab.wait("hear", timeout=60) == 0
    assert log.read_text().split() == ["ready"]


DATAGRAM_ECHO = """
import socket
found = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
found.bind(("::", 7777))
print("ready", flush=True)
while True:
    data, peer = found.recvfrom(65536)
    found.sendto(data, peer)
"""
DATAGRAM_ASK = """
import socket, sys
address, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
found = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
found.bind(("", 7000))
found.connect((address, 7777))
found.settimeout(1)
answered = 0
for number in range(count):
    sent = (b"%d:" % number).ljust(size, b"x")
    found.send(sent)
    try:
        while found.recv(65536) != sent:
            pass
    except (TimeoutError, ConnectionRefusedError):
        continue
    answered += 1
print(answered)
"""
WATCH = """
table bridge watch {
  counter bridged { }
  chain forward { type filter hook forward priority 0; policy accept; ip protocol udp counter name "bridged"; ip6 nexthdr udp counter name "bridged"; }
}
"""  # noqa: E501


class ShortCut:
    """Two pods of one node and one of another, those that are asked with an echo of datagrams."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric

    async def begin(self) -> None:
        await self.fabric.render(7, [[11, "n1", "pod-a"], [12, "n2", "pod-b"], [13, "n1", "pod-c"]])
        for node in ("n1", "n2"):
            done = await self.fabric.pod(node, "vmnet-7", "nft", WATCH)
            assert done.exit == 0, done.stderr
        await self.echo("n2", "pod-b-7")
        await self.echo("n1", "pod-c-7")

    async def echo(self, node: str, pod: str) -> None:
        program = ["ip", "netns", "exec", pod, sys.executable, "-c", DATAGRAM_ECHO]
        log = await self.fabric.lab.spawn(f"echo-{pod}", node, program)
        async with asyncio.timeout(60):
            while "ready" not in log.read_text():
                await asyncio.sleep(0.05)

    async def ask(self, address: str, count: int, size: int = 64) -> int:
        done = await self.fabric.pod(
            "n1", "pod-a-7", sys.executable, "-c", DATAGRAM_ASK, address, str(count), str(size), timeout=120
        )
        assert done.exit == 0, done.stderr
        return int(done.stdout)

    async def bridged(self, node: str) -> int:
        done = await self.fabric.pod(node, "vmnet-7", "nft", "-j", "reset", "counter", "bridge", "watch", "bridged")
        assert done.exit == 0, done.stderr
        return sum(item["counter"]["packets"] for item in json.loads(done.stdout)["nftables"] if "counter" in item)


async def test_a_flow_that_was_judged_goes_by_the_short_cut(fabric: Fabric) -> None:
    """On one node and between two; what is cut into fragments is put together as before."""
    pods = ShortCut(fabric)
    await pods.begin()
    for address in ("192.168.0.13", "fd20::13", "192.168.0.12", "fd20::12"):
        assert await pods.ask(address, 200) == 200, address
        for node in ("n1", "n2"):
            assert await pods.bridged(node) < 100, f"{address}: of 400 datagrams nearly all pass {node} by"
        assert await pods.ask(address, 5, 4000) == 5, f"{address}: fragments of the same flow"


async def test_nobody_else_can_take_a_flow_s_short_cut(fabric: Fabric) -> None:
    pods = ShortCut(fabric)
    await pods.begin()
    assert await pods.ask("192.168.0.12", 20) == 20
    flow = "IP(src='192.168.0.11', dst='192.168.0.12')/UDP(sport=7000, dport=7777)/Raw(b'FORGED')"
    program = (
        "import socket\n"
        "found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))\n"
        "found.bind(('ovn-udn1', 0)); found.settimeout(60)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    frame = found.recv(2048)\n"
        "    if b'HONEST' in frame: break\n"
        "    if b'FORGED' in frame: print(frame.hex(), flush=True)\n"
    )
    log = await fabric.lab.spawn("hear", "n2", ["ip", "netns", "exec", "pod-b-7", sys.executable, "-c", program])
    async with asyncio.timeout(60):
        while "ready" not in log.read_text():
            await asyncio.sleep(0.05)
    honest = "IP(src='192.168.0.13', dst='192.168.0.12')/UDP(sport=7000, dport=7778)/Raw(b'HONEST')"
    to = "dst='0a:58:c0:a8:00:0c'"
    await fabric.send(
        "n1",
        "pod-c-7",
        f"[Ether(src='0a:58:c0:a8:00:0b', {to})/{flow}, Ether(src=own, {to})/{flow}, Ether(src=own, {to})/{honest}]",
    )
    assert await fabric.lab.wait("hear", timeout=60) == 0
    assert log.read_text().split() == ["ready"]


async def test_who_has_a_pod_s_addresses_next_has_its_flows_too(fabric: Fabric) -> None:
    pods = ShortCut(fabric)
    await pods.begin()
    assert await pods.ask("192.168.0.13", 20) == 20
    await fabric.node("n1", "detach", net=7, host=13, pod="pod-c")
    shown = await fabric.pod("n1", "vmnet-7", "nft", "list", "map", "netdev", "vmnet", "here")
    assert "0a:58" not in shown.stdout, shown.stdout
    await fabric.render(7, [[11, "n1", "pod-a"], [12, "n2", "pod-b"], [13, "n2", "pod-d"]])
    await pods.echo("n2", "pod-d-7")
    assert await pods.ask("192.168.0.13", 60) > 0
    assert await pods.ask("192.168.0.13", 20) == 20
