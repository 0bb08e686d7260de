"""The conntrack codec; the kernel's own part is in tests/netns/test_connections.py."""

import struct
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnet.kernel import connections
from vmnet.model.connection import ASSURED, CONFIRMED, SEEN_REPLY, TCP, UDP, Connection, Flow, TcpState

PORTS = st.integers(0, 0xFFFF)
FLOWS = st.one_of(
    st.builds(Flow, st.sampled_from((TCP, UDP)), addresses, PORTS, addresses, PORTS)
    for addresses in (st.builds(IPv4Address, st.binary(min_size=4, max_size=4)), st.ip_addresses(v=6))
)


def plain(flow: Flow, **more: object) -> Connection:
    tcp = TcpState(3, (7, 9), (11, 11)) if flow.protocol == TCP else None
    found = Connection(flow, flow.reversed(), CONFIRMED | SEEN_REPLY | ASSURED, 300, tcp=tcp)
    return replace(found, **more)  # type: ignore[arg-type]


def flow(protocol: int, source: str, destination: str) -> Flow:
    return Flow(protocol, ip_address(source), 1000, ip_address(destination), 80)


@given(FLOWS, st.integers(0, 2**32 - 1), st.integers(1, 2**31 - 1))
def test_what_is_written_is_what_is_read(flow: Flow, mark: int, timeout: int) -> None:
    entry = plain(flow, mark=mark, timeout=timeout)
    assert connections.decode(struct.pack("!BBH", 2, 0, 0) + connections.encode(entry)) == entry


def test_a_translated_entry_is_written_by_what_its_destination_becomes() -> None:
    asked = flow(TCP, "192.168.0.5", "10.96.0.7")
    entry = plain(asked, reply=Flow(TCP, ip_address("192.168.0.9"), 8080, asked.source, 1000))
    found = connections.attributes(connections.encode(entry))
    destination, source = (connections.attributes(found[kind]) for kind in (13, 6))
    assert (destination[1], destination[2]) == (entry.reply.source.packed,) * 2
    assert (source[1], source[2]) == (asked.source.packed,) * 2
    assert connections.attributes(destination[3])[1] == (8080).to_bytes(2, "big")
    # Or it would match and translate nothing.
    written = connections.decode(bytes(4) + connections.encode(entry))
    assert written is not None
    assert written.reply == asked.reversed()


def test_sequence_numbers_that_were_never_seen_are_not_judged() -> None:
    entry = plain(flow(TCP, "fd00::5", "fd00::6"), tcp=TcpState(3, (7, 7), (0x13, 0x03)))
    written = connections.decode(bytes(4) + connections.encode(entry))
    assert written is not None
    assert written.tcp == TcpState(3, (7, 7), (0x0B, 0x0B))


@given(st.binary(max_size=200))
def test_octets_of_any_kind_are_an_entry_or_none(data: bytes) -> None:
    connections.decode(data)
    for _, _, content in connections.messages(data):
        connections.decode(content)


@given(FLOWS, st.data())
def test_a_spoiled_entry_is_an_entry_or_none(flow: Flow, data: st.DataObject) -> None:
    content = bytearray(bytes(4) + connections.encode(plain(flow)))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    connections.decode(bytes(content[: data.draw(st.integers(0, len(content)))]))


def test_other_protocols_are_none() -> None:
    content = connections.encode(plain(flow(UDP, "192.168.0.5", "192.168.0.6")))
    assert connections.decode(bytes(4) + content.replace(b"\x05\x00\x01\x00\x11", b"\x05\x00\x01\x00\x01")) is None


@pytest.mark.parametrize("version", [4, 6])
def test_whoever_may_still_be_spoken_to_counts_with_all_ends(version: int) -> None:
    own, out, join = {
        4: ("192.168.0.5", "172.30.0.100", "100.65.0.6"),
        6: ("fd20::5", "fd00:30::100", "fd99::6"),
    }[version]
    went = flow(TCP, own, out)
    back = replace(went.reversed(), destination=ip_address(join))
    out_there = {ip_address(text) for text in (own, out, join)}
    assert connections.ends([plain(went, reply=back)]) == out_there
    for other in (
        plain(went, reply=back, tcp=TcpState(7)),
        plain(replace(went, protocol=UDP), status=CONFIRMED | SEEN_REPLY),
        plain(replace(went, protocol=UDP)),
    ):
        assert connections.ends([other]) == frozenset(), "over, asked once, or translated by nobody"
    datagrams = plain(replace(went, protocol=UDP), reply=replace(back, protocol=UDP))
    assert connections.ends([datagrams]) == out_there


def test_messages_are_told_apart() -> None:
    one = struct.pack("=IHHII", 19, 256, 0, 5, 0) + b"abc\0"
    two = struct.pack("=IHHII", 16, 3, 0, 6, 0)
    assert list(connections.messages(one + two + b"rest")) == [(256, 5, b"abc"), (3, 6, b"")]


def test_addresses_of_both_families_are_read() -> None:
    for text in ("192.168.0.5", "fd00::5"):
        found = connections.decode(bytes(4) + connections.encode(plain(flow(UDP, text, text))))
        assert found is not None
        assert isinstance(found.original.source, IPv4Address | IPv6Address)
        assert str(found.original.source) == text
