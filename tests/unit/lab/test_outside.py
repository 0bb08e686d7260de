"""The outside host's DNS answers, read back by an independent implementation."""

import asyncio
import struct

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import pytest

from vmnet.lab import outside


def ask(name: str, kind: str) -> dns.message.Message:
    reply = outside.answer(dns.message.make_query(name, kind, use_edns=True).to_wire())
    assert reply is not None
    return dns.message.from_wire(reply)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("www.outside.test", "A", "172.30.0.100"),
        ("WWW.Outside.Test", "AAAA", "fd00:30::100"),
        ("100.0.30.172.in-addr.arpa", "PTR", "www.outside.test."),
        ("0.0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.3.0.0.0.0.d.f.ip6.arpa", "PTR", "www.outside.test."),
    ],
)
def test_its_zone_is_answered(name: str, kind: str, expected: str) -> None:
    reply = ask(name, kind)
    assert reply.rcode() == dns.rcode.NOERROR
    assert [rdata.to_text() for rrset in reply.answer for rdata in rrset] == [expected]
    assert reply.flags & dns.flags.AA


def test_a_name_without_that_type_is_an_empty_answer() -> None:
    reply = ask("www.outside.test", "MX")
    assert (reply.rcode(), reply.answer) == (dns.rcode.NOERROR, [])
    assert [rrset.rdtype for rrset in reply.authority] == [dns.rdatatype.SOA]


@pytest.mark.parametrize("name", ["nothing.outside.test", "example.com", "1.0.0.10.in-addr.arpa"])
def test_everything_else_does_not_exist(name: str) -> None:
    assert ask(name, "A").rcode() == dns.rcode.NXDOMAIN


@pytest.mark.parametrize("data", [b"", b"x", b"\x00" * 11, b"\xff" * 40])
def test_garbage_is_not_answered(data: bytes) -> None:
    assert outside.answer(data) is None


def test_a_response_is_not_answered() -> None:
    reply = ask("www.outside.test", "A")
    assert outside.answer(reply.to_wire()) is None


async def test_queries_over_tcp() -> None:
    server = await asyncio.start_server(outside.answer_stream, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for _ in range(2):
            wire = dns.message.make_query("www.outside.test", "A").to_wire()
            writer.write(struct.pack("!H", len(wire)) + wire)
            (length,) = struct.unpack("!H", await asyncio.wait_for(reader.readexactly(2), 5))
            reply = dns.message.from_wire(await asyncio.wait_for(reader.readexactly(length), 5))
            assert reply.rcode() == dns.rcode.NOERROR
        writer.close()
