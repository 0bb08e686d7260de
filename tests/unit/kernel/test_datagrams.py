"""Messages of conntrack, built as nfnetlink_conntrack.h describes them, and what is no such message."""

import struct
from ipaddress import IPv4Address, IPv6Address

from vmnet.kernel.datagrams import decode
from vmnet.plan.state import Datagrams


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def ends(source: str, source_port: int, to: str, port: int, protocol: int = 17) -> bytes:
    packed = [(IPv6Address if ":" in text else IPv4Address)(text).packed for text in (source, to)]
    first = 1 if len(packed[0]) == 4 else 3
    addresses = attribute(first, packed[0]) + attribute(first + 1, packed[1])
    numbers = attribute(1, bytes((protocol,)))
    numbers += attribute(2, struct.pack("!H", source_port)) + attribute(3, struct.pack("!H", port))
    return attribute(0x8001, addresses) + attribute(0x8002, numbers)


def message(original: bytes, reply: bytes, status: int) -> bytes:
    parts = attribute(0x8001, original) + attribute(0x8002, reply) + attribute(3, struct.pack("!I", status))
    return b"\x02\0\0\0" + parts


def test_what_was_asked_for_and_who_answers() -> None:
    for client, asked, backend in (
        ("192.168.0.11", "10.96.0.21", "192.168.0.12"),
        ("fd20::11", "fd00:10:96::21", "fd20::12"),
    ):
        original = ends(client, 40000, asked, 80)
        found = decode(message(original, ends(backend, 8080, client, 40000), 0x1AE))
        kind = type(IPv6Address(asked) if ":" in asked else IPv4Address(asked))
        assert found == Datagrams(kind(asked), 80, kind(backend), 8080, original)


def test_other_protocols_and_what_is_not_translated_are_nobody_s_datagrams() -> None:
    client, asked, backend = "192.168.0.11", "10.96.0.21", "192.168.0.12"
    original, reply = ends(client, 40000, asked, 80), ends(backend, 8080, client, 40000)
    assert decode(message(original, reply, 0x188)) is None, "not translated"
    stream = ends(client, 40000, asked, 80, protocol=6)
    assert decode(message(stream, reply, 0x1AE)) is None
    assert decode(b"\x02\0\0\0" + attribute(0x8001, original)) is None
    assert decode(b"\x02\0\0\0") is None
    assert decode(b"\x02\0\0\0\x02\0\x01\0") is None, "an attribute that is shorter than itself"
