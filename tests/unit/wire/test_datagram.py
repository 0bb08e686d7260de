"""UDP frames: against scapy, both families, and against broken headers."""

import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from vmnet.model.names import MacAddress
from vmnet.wire import datagram
from vmnet.wire.datagram import Datagram
from vmnet.wire.malformed import Malformed

HERE, THERE = MacAddress("0a:58:c0:a8:00:01"), MacAddress("0a:58:c0:a8:00:05")


def ipv4(payload: bytes = b"payload") -> Datagram:
    return Datagram(HERE, THERE, IPv4Address("192.168.0.1"), IPv4Address("192.168.0.5"), 67, 68, payload)


def ipv6(payload: bytes = b"payload") -> Datagram:
    return Datagram(HERE, THERE, IPv6Address("fe80::1"), IPv6Address("fe80::5"), 547, 546, payload)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.binary(max_size=300), st.sampled_from([ipv4, ipv6]))
def test_checksums_are_scapys(payload: bytes, make: type[Datagram]) -> None:
    sent = make(payload)  # type: ignore[call-arg]
    frame = datagram.encode(sent)
    assert datagram.decode(frame) == sent
    seen = Ether(frame)
    outer = IP if seen.haslayer(IP) else IPv6
    sums = [seen[UDP].chksum]
    del seen[UDP].chksum
    if outer is IP:
        sums.append(seen[IP].chksum)
        del seen[IP].chksum
    again = Ether(bytes(seen))
    assert sums == ([again[UDP].chksum, again[IP].chksum] if outer is IP else [again[UDP].chksum])
    assert again[UDP].chksum != 0


def test_a_checksum_of_zero_is_sent_as_its_other_form() -> None:
    """Find a payload whose sum comes to zero: on the wire it must say 0xFFFF."""
    empty = datagram.encode(ipv4(bytes(2)))
    rest = struct.unpack_from("!H", empty, 14 + 20 + 6)[0]
    frame = datagram.encode(ipv4(rest.to_bytes(2, "big")))
    assert struct.unpack_from("!H", frame, 14 + 20 + 6)[0] == 0xFFFF


def test_options_and_padding_are_skipped() -> None:
    frame = bytes(
        Ether(src=HERE, dst=THERE) / IP(src="1.2.3.4", dst="5.6.7.8", options=b"\x01\x01\x01\x00") / UDP() / b"x"
    )
    assert datagram.decode(frame + bytes(9)).payload == b"x"


def change(frame: bytes, offset: int, value: bytes) -> bytes:
    return frame[:offset] + value + frame[offset + len(value) :]


FOUR, SIX = datagram.encode(ipv4(bytes(40))), datagram.encode(ipv6(bytes(40)))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        change(FOUR, 12, b"\x86\xdc"),
        FOUR[:33],
        change(FOUR, 14, b"\x55"),
        change(FOUR, 14, b"\x44"),
        change(FOUR, 14, b"\x4f") [:40],
        change(FOUR, 16, b"\xff\xff"),
        change(FOUR, 16, b"\x00\x13"),
        change(FOUR, 20, b"\x20\x00"),
        change(FOUR, 20, b"\x00\x01"),
        change(FOUR, 23, b"\x06"),
        change(FOUR, 38, b"\x00\x07"),
        change(FOUR, 38, b"\xff\xff"),
        change(FOUR, 16, b"\x00\x18"),
        SIX[:50],
        change(SIX, 14, b"\x40"),
        change(SIX, 18, b"\xff\xff"),
        change(SIX, 20, b"\x00"),
        change(SIX, 58, b"\x00\x00"),
    ],
)  # fmt: skip
def test_broken_headers_are_malformed(frame: bytes) -> None:
    with pytest.raises(Malformed):
        datagram.decode(frame)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.sampled_from([FOUR, SIX]), st.integers(12, 70), st.binary(min_size=1, max_size=6), st.integers(0, 110))
def test_nothing_else_is_raised(frame: bytes, offset: int, value: bytes, size: int) -> None:
    try:
        datagram.decode(change(frame, offset, value)[:size])
    except Malformed:
        return


def test_two_families_are_refused() -> None:
    with pytest.raises(ValueError):
        datagram.encode(Datagram(HERE, THERE, IPv4Address(1), IPv6Address(1), 1, 2, b""))
    with pytest.raises(ValueError):
        datagram.encode(Datagram(HERE, THERE, IPv6Address(1), IPv4Address(1), 1, 2, b""))
