"""Ethernet frames and the checksum."""

from ipaddress import IPv6Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.utils import checksum as scapy_checksum

from vmnet.model.names import MacAddress
from vmnet.wire import ethernet
from vmnet.wire.ethernet import EtherType
from vmnet.wire.malformed import Malformed


def test_short_frames_are_padded_and_headers_come_back() -> None:
    frame = ethernet.encode(ethernet.BROADCAST, MacAddress("0a:58:c0:a8:00:05"), EtherType.ARP, b"x")
    assert len(frame) == ethernet.MINIMUM
    decoded = ethernet.decode(frame)
    assert (decoded.destination, decoded.source, decoded.ethertype) == (
        ethernet.BROADCAST,
        "0a:58:c0:a8:00:05",
        EtherType.ARP,
    )
    assert decoded.payload.rstrip(b"\0") == b"x"


def test_half_a_header_is_malformed() -> None:
    with pytest.raises(Malformed):
        ethernet.decode(bytes(13))


def test_multicast_maps_to_its_mac() -> None:
    assert ethernet.multicast_mac(IPv6Address("ff02::1:2")) == "33:33:00:01:00:02"


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(min_size=1, max_size=200))
def test_the_checksum_is_the_one_scapy_computes(data: bytes) -> None:
    assert ethernet.checksum(data) % 0xFFFF == scapy_checksum(data) % 0xFFFF
    if len(data) % 2 == 0:
        total = data + ethernet.checksum(data).to_bytes(2, "big")
        assert ethernet.checksum(total) == 0
