"""What a guest says that is not its to say: none of it arrives anywhere."""

import asyncio
import json
import sys
from typing import Any

import pytest
from scapy.all import (
    ARP,
    IP,
    LLC,
    STP,
    UDP,
    Dot1Q,
    Dot3,
    Ether,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    Packet,
    Raw,
)

from vmnet.lab.demo import BLUE, RED

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

OTHER = "0a:58:c0:a8:00:63"
LISTEN = """
import signal, socket, sys
found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
found.bind((sys.argv[1], 0))
print("ready", flush=True)
while b"HONEST" not in (frame := found.recvfrom(4096)[0]):
    if b"FORGED" in frame: print(frame[frame.index(b"FORGED"):].split(b";")[0].decode(), flush=True)
print("end", flush=True)
signal.pause()
"""


def forged(own: str, ipv4: str, ipv6: str) -> dict[str, Packet]:
    """Frames of a guest with these addresses, by what is wrong with each."""
    four, six = Ether(src=own, dst="ff:ff:ff:ff:ff:ff"), Ether(src=own, dst="33:33:00:00:00:01")
    mine4, mine6 = IP(src=ipv4, dst="192.168.0.12"), IPv6(src=ipv6, dst="ff02::1")
    reverse = Ether(src=own, dst="ff:ff:ff:ff:ff:ff", type=0x8035)
    return {
        "MAC": Ether(src=OTHER, dst="ff:ff:ff:ff:ff:ff") / mine4 / UDP(),
        "IPv4": four / IP(src="192.168.0.99", dst="192.168.0.12") / UDP(),
        "IPv4 fragment": four / IP(src="192.168.0.99", dst="192.168.0.12", frag=100, proto=17),
        "IPv6": six / IPv6(src="fd20:1234::99", dst="ff02::1") / ICMPv6EchoRequest(),
        "link-local": six / IPv6(src="fe80::99", dst="ff02::1") / ICMPv6EchoRequest(),
        "ARP sender MAC": four / ARP(op=2, hwsrc=OTHER, psrc=ipv4),
        "ARP sender IP": four / ARP(op=2, hwsrc=own, psrc="192.168.0.1"),
        "ND target": six / mine6 / ICMPv6ND_NA(tgt="fd20:1234::1"),
        "ND source": six / IPv6(src="fd20:1234::99", dst="ff02::1") / ICMPv6ND_NS(tgt="fd20:1234::1"),
        "duplicate detection": six / IPv6(src="::", dst="ff02::1") / ICMPv6ND_NS(tgt="fd20:1234::99"),
        "DHCP server": four / mine4 / UDP(sport=67, dport=68),
        "DHCPv6 server": six / mine6 / UDP(sport=547, dport=546),
        "RA": six / mine6 / ICMPv6ND_RA(),
        "redirect": six / mine6 / ICMPv6ND_Redirect(tgt=ipv6, dst="fd20:1234::99"),
        "RA behind hop-by-hop": six / mine6 / IPv6ExtHdrHopByHop() / ICMPv6ND_RA(),
        "RA behind options": six / mine6 / IPv6ExtHdrDestOpt() / ICMPv6ND_RA(),
        "RA in a fragment": six / mine6 / IPv6ExtHdrFragment(m=1) / ICMPv6ND_RA(),
        "options in a fragment": six / mine6 / IPv6ExtHdrFragment(m=1, nh=60) / IPv6ExtHdrDestOpt(nh=58),
        "RARP of another": Ether(src=OTHER, dst="ff:ff:ff:ff:ff:ff", type=0x8035) / ARP(op=3, hwsrc=OTHER),
        "RARP for another": reverse / ARP(op=3, hwsrc=OTHER, hwdst=OTHER, psrc="0.0.0.0", pdst="0.0.0.0"),
        "802.1Q": four / Dot1Q(vlan=5) / mine4 / UDP(),
        "802.1ad": Ether(src=own, dst="ff:ff:ff:ff:ff:ff", type=0x88A8) / Dot1Q(vlan=5) / mine4 / UDP(),
        "MPLS": Ether(src=own, dst="ff:ff:ff:ff:ff:ff", type=0x8847) / Raw(bytes.fromhex("000011ff")),
        "LLDP": Ether(src=own, dst="01:80:c2:00:00:0e", type=0x88CC),
        "STP": Dot3(src=own, dst="01:80:c2:00:00:00") / LLC(dsap=0x42, ssap=0x42, ctrl=3) / STP(),
    }


async def test_forged_frames_of_a_guest_arrive_nowhere(world: Any) -> None:
    guest = await world.scenario.guest(*BLUE)
    own = (await guest.run(["cat", "/sys/class/net/eth0/address"])).stdout.strip()
    ipv4, ipv6 = (text.partition("/")[0] for text in await world.scenario.addresses(guest))
    listeners = []
    nodes = {await world.node_of(RED), await world.node_of(BLUE)}
    for node in nodes:
        namespaces = json.loads((await world.lab.exec(node, ["ip", "-j", "netns", "list"])).stdout)
        inside = [item["name"] for item in namespaces if item["name"].startswith("vmnet-")]
        # On each segment, which every port is on, and at the node's uplink.
        for place, interface in (*((name, "br0") for name in inside), ("", "eth0")):
            enter = ["ip", "netns", "exec", place] if place else []
            name = f"forged-{node}-{place}"
            log = await world.lab.spawn(name, node, [*enter, sys.executable, "-c", LISTEN, interface])
            listeners.append((name, log, place))
    async with asyncio.timeout(60):
        while not all("ready" in log.read_text() for _, log, _ in listeners):
            await asyncio.sleep(0.05)
    frames = [
        bytes(frame / Raw(f"FORGED{name};".encode() + bytes(40))) for name, frame in forged(own, ipv4, ipv6).items()
    ]
    honest = Ether(src=own, dst="ff:ff:ff:ff:ff:ff") / IP(src=ipv4, dst="192.168.0.12") / UDP(sport=9, dport=4242)
    lines = "".join(f"{frame.hex()}\n" for frame in (*frames, bytes(honest / Raw(b"HONEST" + bytes(40)))))
    sent = await guest.run(["probe", "frames", "eth0"], input=lines)
    assert (sent.exit, json.loads(sent.stdout)) == (0, {"sent": len(frames) + 1}), sent
    # The honest frame comes last: where it is, the others would be. It leaves a node only if the network is on another.
    awaited = [log for _, log, place in listeners if place or len(nodes) > 1]
    async with asyncio.timeout(120):
        while not all("end" in log.read_text() for log in awaited):
            await asyncio.sleep(0.05)
    for name, log, _ in listeners:
        await world.lab.kill(name)
        await world.lab.wait(name)
        assert set(log.read_text().split()) <= {"ready", "end"}, name
