"""ARP and RARP: against scapy, and against what QEMU sends."""

from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.l2 import ARP, Ether

from vmnet.model.names import MacAddress
from vmnet.wire import arp
from vmnet.wire.arp import Operation
from vmnet.wire.malformed import Malformed

MAC = MacAddress("0a:58:c0:a8:00:05")
GATEWAY_MAC = MacAddress("0a:58:c0:a8:00:01")
ADDRESS = IPv4Address("192.168.0.5")
GATEWAY = IPv4Address("192.168.0.1")


@pytest.mark.parametrize(
    "packet",
    [
        arp.gratuitous_request(MAC, ADDRESS),
        arp.gratuitous_reply(MAC, ADDRESS),
        arp.reply(GATEWAY_MAC, GATEWAY, MAC, ADDRESS),
        arp.reverse_announcement(MAC),
    ],
    ids=["request", "reply", "gateway", "rarp"],
)
def test_scapy_reads_what_is_meant(packet: arp.Arp) -> None:
    frame = arp.encode(packet)
    assert len(frame) == 60
    outer, seen = Ether(frame), ARP(frame[14:])
    assert (outer.src, outer.dst) == (packet.source, packet.destination)
    assert outer.type == (0x8035 if packet.operation == Operation.REVERSE_REQUEST else 0x0806)
    assert (seen.op, seen.hwsrc, seen.psrc) == (packet.operation, packet.sender_mac, str(packet.sender))
    assert (seen.hwdst, seen.pdst) == (packet.target_mac, str(packet.target))
    assert arp.decode(frame) == packet


def test_the_reverse_announcement_is_qemus() -> None:
    """Octet for octet what QEMU 7.2 broadcasts for this MAC when a guest resumes."""
    expected = "ffffffffffff0a58c0a80005803500010800060400030a58c0a80005000000000a58c0a8000500000000" + "00" * 18
    assert arp.encode(arp.reverse_announcement(MAC)).hex() == expected


def test_only_announcements_are_gratuitous() -> None:
    assert arp.gratuitous_request(MAC, ADDRESS).gratuitous
    assert arp.gratuitous_reply(MAC, ADDRESS).gratuitous
    assert not arp.reply(GATEWAY_MAC, GATEWAY, MAC, ADDRESS).gratuitous
    assert not arp.reverse_announcement(MAC).gratuitous


GOOD = arp.encode(arp.gratuitous_request(MAC, ADDRESS))


@pytest.mark.parametrize(
    "frame",
    [
        GOOD[:41],
        GOOD[:12] + b"\x08\x00" + GOOD[14:],
        GOOD[:14] + b"\x00\x06" + GOOD[16:],
        GOOD[:18] + b"\x08" + GOOD[19:],
        GOOD[:20] + b"\x00\x09" + GOOD[22:],
        GOOD[:20] + bytes(2) + GOOD[22:],
    ],
    ids=["short", "ethertype", "hardware", "size", "operation-9", "operation-0"],
)
def test_odd_packets_are_malformed(frame: bytes) -> None:
    with pytest.raises(Malformed):
        arp.decode(frame)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(max_size=64), st.booleans())
def test_nothing_else_is_raised(data: bytes, headed: bool) -> None:
    try:
        packet = arp.decode(GOOD[:14] + data if headed else data)
    except Malformed:
        return
    assert packet.operation in Operation
