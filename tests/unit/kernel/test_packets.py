"""The kernel itself runs each filter: it accepts classic BPF on any datagram socket, and needs no privilege for it."""

import socket
from collections.abc import Sequence

import pytest
from scapy.layers.dhcp6 import DHCP6_Solicit
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import ICMPv6ND_NS, ICMPv6ND_RA, ICMPv6ND_RS, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from vmnet.kernel import packets

ARP_FRAME = Ether() / ARP()
RARP_FRAME = Ether(type=0x8035) / ARP(op=3)
DHCP4 = Ether() / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67) / Raw(b"x" * 240)
DHCP4_OPTIONS = Ether() / IP(options=[IPOption_NOP()] * 8) / UDP(sport=68, dport=67) / Raw(b"x")
DHCP4_TO_A_CLIENT = Ether() / IP() / UDP(sport=67, dport=68)
DNS4 = Ether() / IP() / UDP(sport=4000, dport=53)
TCP4 = Ether() / IP() / TCP(sport=4000, dport=67)
FRAGMENT = Ether() / IP(frag=10, proto=17) / Raw(bytes.fromhex("0044004300080000") * 4)
DHCP6 = Ether() / IPv6() / UDP(sport=546, dport=547) / DHCP6_Solicit()
DNS6 = Ether() / IPv6() / UDP(sport=4000, dport=53)
SOLICITATION = Ether() / IPv6() / ICMPv6ND_RS()
ADVERTISEMENT = Ether() / IPv6() / ICMPv6ND_RA()
NEIGHBOUR = Ether() / IPv6() / ICMPv6ND_NS()
TCP6 = Ether() / IPv6() / TCP(dport=547)
ALL = {name: frame for name, frame in globals().items() if isinstance(frame, Packet)}


def passed(protocols: Sequence[int], udp_ports: Sequence[int]) -> set[str]:
    """Names of the frames that get through."""
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, receiver:
        receiver.setblocking(False)
        program = packets.frame_filter(protocols, udp_ports)
        if program:
            packets.attach_filter(receiver, program)
        found = set()
        for name, frame in ALL.items():
            try:
                sender.send(bytes(frame))
            except PermissionError:  # a filtered frame on this kind of socket
                continue
            try:
                assert receiver.recv(4096) == bytes(frame), "and whole"
            except BlockingIOError:
                continue
            found.add(name)
        return found


def test_no_filter_passes_everything() -> None:
    assert packets.frame_filter((), ()) == ()
    assert passed((), ()) == set(ALL)


@pytest.mark.parametrize(
    ("protocols", "expected"),
    [
        ([0x8035], {"RARP_FRAME"}),
        ([0x0806, 0x8035], {"ARP_FRAME", "RARP_FRAME"}),
        ([0x86DD], {"DHCP6", "DNS6", "SOLICITATION", "ADVERTISEMENT", "NEIGHBOUR", "TCP6"}),
    ],
)
def test_by_ethertype(protocols: list[int], expected: set[str]) -> None:
    assert passed(protocols, ()) == expected


def test_what_the_guest_services_hear() -> None:
    assert passed((0x0800, 0x86DD), (67, 547)) == {"DHCP4", "DHCP4_OPTIONS", "DHCP6", "SOLICITATION"}


def test_ports_alone_mean_both_families() -> None:
    assert passed((), (67, 547)) == passed((0x0800, 0x86DD), (67, 547))


def test_one_family_only() -> None:
    assert passed((0x0800,), (67, 547)) == {"DHCP4", "DHCP4_OPTIONS"}


def test_a_frame_that_ends_before_its_header_is_dropped() -> None:
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, receiver:
        receiver.setblocking(False)
        packets.attach_filter(receiver, packets.frame_filter((0x0800,), (67,)))
        for length in range(1, len(bytes(DHCP4)[:36])):
            try:
                sender.send(bytes(DHCP4)[:length])
            except PermissionError:
                continue
        with pytest.raises(BlockingIOError):
            receiver.recv(4096)
