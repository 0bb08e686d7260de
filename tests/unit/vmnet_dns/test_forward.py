"""The forwarder against real sockets that misbehave."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmnet_dns.forward import (
    CACHE_ENTRIES,
    STALE_MOST,
    STALE_TTL,
    Forwarder,
    Found,
    Origin,
    Response,
    Upstream,
    decode_response,
)
from vmnet_dns.message import Malformed, Query, encode_name, parse_query

Reaction = Callable[[dns.message.Message], list[bytes]]


async def open_socket(family: int, stream: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


def query(name: str = "example.org", kind: str = "A", **options: object) -> Query:
    return parse_query(dns.message.make_query(name, kind, **options).to_wire())  # type: ignore[arg-type]


def reply(
    to: dns.message.Message, *texts: str, ttl: int = 60, rcode: str = "NOERROR", soa: int = 0
) -> dns.message.Message:
    made = dns.message.make_response(to)
    made.set_rcode(dns.rcode.from_text(rcode))
    name = to.question[0].name
    if texts:
        made.answer.append(
            dns.rrset.from_text_list(name, ttl, "IN", dns.rdatatype.to_text(to.question[0].rdtype), texts)
        )
    if soa:
        made.authority.append(dns.rrset.from_text("org.", 900, "IN", "SOA", f"a. b. 1 2 3 4 {soa}"))
    return made


class Resolver:
    """One upstream on 127.0.0.1, UDP and TCP on the same port."""

    def __init__(self) -> None:
        self.asked: list[dns.message.Message] = []
        self.ports: list[int] = []
        self.tcp = 0
        self.udp_reaction: Reaction = lambda asked: [reply(asked, "192.0.2.1").to_wire()]
        self.tcp_reaction: Reaction = lambda asked: [reply(asked, "192.0.2.1").to_wire()]

    async def start(self) -> None:
        resolver = self

        class Protocol(asyncio.DatagramProtocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport = cast(asyncio.DatagramTransport, transport)

            def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
                asked = dns.message.from_wire(data)
                resolver.asked.append(asked)
                resolver.ports.append(addr[1])
                for wire in resolver.udp_reaction(asked):
                    self.transport.sendto(wire, addr)

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            asked = dns.message.from_wire(await reader.readexactly(length))
            self.tcp += 1
            for wire in self.tcp_reaction(asked):
                writer.write(struct.pack("!H", len(wire)) + wire)
            await writer.drain()
            writer.close()

        self.transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            Protocol, local_addr=("127.0.0.1", 0)
        )
        port = self.transport.get_extra_info("sockname")[1]
        self.server = await asyncio.start_server(connected, "127.0.0.1", port)
        self.upstream = Upstream(ip_address("127.0.0.1"), port)

    async def stop(self) -> None:
        self.transport.close()
        self.server.close()


@pytest.fixture
async def resolver() -> AsyncIterator[Resolver]:
    made = Resolver()
    await made.start()
    yield made
    await made.stop()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def parsed(found: Found | None, asked: Query | None = None, limit: int = 512) -> dns.message.Message:
    assert found is not None
    message = dns.message.from_wire(found.render(asked or query(), limit))
    assert message.rcode() == found.rcode
    return message


async def test_an_answer_comes_back_with_the_clients_id_and_spelling(resolver: Resolver) -> None:
    asked = dns.message.make_query("wWw.Example.Org", "A", id=77)
    forwarder = Forwarder([resolver.upstream], open_socket)
    found = parsed(await forwarder.ask(parse_query(asked.to_wire())), parse_query(asked.to_wire()))
    assert asked.is_response(found)
    assert found.question[0].name.labels[0] == b"wWw"
    assert found.answer[0][0].to_text() == "192.0.2.1"
    assert found.flags & dns.flags.RA
    assert found.edns == -1
    assert resolver.asked[0].edns == 0
    assert resolver.asked[0].flags & dns.flags.RD


async def test_ids_and_ports_are_random(resolver: Resolver) -> None:
    resolver.udp_reaction = lambda asked: [reply(asked, "192.0.2.1", ttl=0).to_wire()]
    forwarder = Forwarder([resolver.upstream], open_socket)
    for _ in range(8):
        await forwarder.ask(query())
    assert len({asked.id for asked in resolver.asked}) > 4
    assert len(set(resolver.ports)) > 4


async def test_the_cache_keeps_an_answer_for_its_ttl_and_counts_it_down(resolver: Resolver) -> None:
    clock = Clock()
    forwarder = Forwarder([resolver.upstream], open_socket, clock=clock)
    assert forwarder.cached(query()) is None
    await forwarder.ask(query())
    clock.now += 45
    found = parsed(forwarder.cached(query("EXAMPLE.org", use_edns=0)), query(use_edns=0))
    assert found.answer[0].ttl == 15
    assert found.edns == 0
    clock.now += 15
    assert forwarder.cached(query()) is None
    assert forwarder.cached(query(kind="AAAA")) is None


@pytest.mark.parametrize(("rcode", "soa", "kept"), [("NXDOMAIN", 20, 20), ("NOERROR", 900, 30), ("NXDOMAIN", 0, 0)])
async def test_denials_are_kept_as_long_as_the_soa_says_and_not_long(
    resolver: Resolver, rcode: str, soa: int, kept: int
) -> None:
    clock = Clock()
    resolver.udp_reaction = lambda asked: [reply(asked, rcode=rcode, soa=soa).to_wire()]
    forwarder = Forwarder([resolver.upstream], open_socket, clock=clock)
    assert parsed(await forwarder.ask(query())).rcode() == dns.rcode.from_text(rcode)
    clock.now += max(0, kept - 1)
    assert (forwarder.cached(query()) is not None) == (kept > 0)
    clock.now += 1
    assert forwarder.cached(query()) is None


async def test_forged_and_foreign_answers_do_not_end_the_wait(resolver: Resolver) -> None:
    def react(asked: dns.message.Message) -> list[bytes]:
        good = reply(asked, "192.0.2.1").to_wire()
        other = reply(dns.message.make_query("evil.org", "A", id=asked.id), "192.0.2.66").to_wire()
        wrong_id = struct.pack("!H", asked.id ^ 1) + reply(asked, "192.0.2.66").to_wire()[2:]
        return [b"", b"noise", asked.to_wire(), wrong_id, other, good[:20], good]

    resolver.udp_reaction = react
    forwarder = Forwarder([resolver.upstream], open_socket)
    assert parsed(await forwarder.ask(query())).answer[0][0].to_text() == "192.0.2.1"
    assert len(resolver.asked) == 1


async def test_a_truncated_answer_is_asked_for_over_tcp(resolver: Resolver) -> None:
    many = [f"192.0.2.{number}" for number in range(200)]

    def truncated(asked: dns.message.Message) -> list[bytes]:
        made = reply(asked)
        made.flags |= dns.flags.TC
        return [made.to_wire()]

    resolver.udp_reaction = truncated
    resolver.tcp_reaction = lambda asked: [reply(asked, *many).to_wire(max_size=0xFFFF)]
    forwarder = Forwarder([resolver.upstream], open_socket)
    whole = parsed(await forwarder.ask(query()), limit=0xFFFF)
    assert len(whole.answer[0]) == 200
    assert resolver.tcp == 1
    short = parsed(forwarder.cached(query()))
    assert short.flags & dns.flags.TC
    assert 20 < len(short.answer[0]) < 200


async def test_the_next_upstream_is_asked_and_the_good_one_goes_first(resolver: Resolver) -> None:
    closed = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    closed.bind(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    silent = Upstream(ip_address("127.0.0.1"), port)
    forwarder = Forwarder([silent, resolver.upstream], open_socket, try_seconds=0.2)
    clock = asyncio.get_running_loop().time
    began = clock()
    assert await forwarder.ask(query()) is not None
    assert clock() - began >= 0.2
    began = clock()
    assert await forwarder.ask(query("example.com")) is not None
    assert clock() - began < 0.2
    closed.close()


async def test_a_failing_upstream_is_no_answer_while_another_has_one(resolver: Resolver) -> None:
    other = Resolver()
    await other.start()
    other.udp_reaction = lambda asked: [reply(asked, rcode="SERVFAIL").to_wire()]
    forwarder = Forwarder([other.upstream, resolver.upstream], open_socket)
    assert parsed(await forwarder.ask(query())).rcode() == dns.rcode.NOERROR
    resolver.udp_reaction = lambda asked: [reply(asked, rcode="REFUSED").to_wire()]
    assert parsed(await forwarder.ask(query("example.com"))).rcode() in (dns.rcode.REFUSED, dns.rcode.SERVFAIL)
    await other.stop()


async def test_no_answer_from_anybody_is_none_in_bounded_time() -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    upstream = Upstream(ip_address("127.0.0.1"), sock.getsockname()[1])
    forwarder = Forwarder([upstream], open_socket, try_seconds=0.1, total_seconds=0.3)
    found = await asyncio.gather(*(forwarder.ask(query()) for _ in range(5)))
    assert found == [None] * 5
    sock.close()
    assert await Forwarder([], open_socket).ask(query()) is None


async def test_equal_questions_are_asked_once(resolver: Resolver) -> None:
    forwarder = Forwarder([resolver.upstream], open_socket)
    found = await asyncio.gather(*(forwarder.ask(query()) for _ in range(20)))
    assert all(item is not None for item in found)
    assert len(resolver.asked) == 1


async def test_the_others_ask_on_when_the_first_client_goes_away(resolver: Resolver) -> None:
    resolver.udp_reaction = lambda asked: []
    forwarder = Forwarder([resolver.upstream], open_socket, try_seconds=5)
    first = asyncio.create_task(forwarder.ask(query()))
    async with asyncio.timeout(10):
        while not resolver.asked:
            await asyncio.sleep(0.01)
    second = asyncio.create_task(forwarder.ask(query()))
    await asyncio.sleep(0)
    resolver.udp_reaction = lambda asked: [reply(asked, "192.0.2.1").to_wire()]
    first.cancel()
    async with asyncio.timeout(10):
        assert await second is not None


async def test_a_server_without_edns_is_asked_without(resolver: Resolver) -> None:
    def old(asked: dns.message.Message) -> list[bytes]:
        if asked.edns >= 0:
            return [struct.pack("!6H", asked.id, 0x8001, 0, 0, 0, 0)]
        return [reply(asked, "192.0.2.1").to_wire()]

    resolver.udp_reaction = old
    forwarder = Forwarder([resolver.upstream], open_socket)
    assert parsed(await forwarder.ask(query())).answer


async def test_the_cache_is_bounded(resolver: Resolver) -> None:
    forwarder = Forwarder([resolver.upstream], open_socket)
    response = Response(0x8180, (0, 0, 0), b"x" * 100, (), 0, 60)
    for number in range(CACHE_ENTRIES + 50):
        forwarder._remember(str(number).encode(), response)
    assert len(forwarder._cache) == CACHE_ENTRIES
    for number in range(100):
        forwarder._remember(b"big" + str(number).encode(), Response(0x8180, (0, 0, 0), b"x" * 60_000, (), 0, 60))
    assert forwarder._octets <= 4 * 1024 * 1024
    assert forwarder._octets == sum(len(item.response.sections) for item in forwarder._cache.values())


async def test_what_was_known_is_told_while_no_upstream_answers(resolver: Resolver) -> None:
    clock = Clock()
    forwarder = Forwarder([resolver.upstream], open_socket, clock=clock, try_seconds=0.05, stale_seconds=0.1)
    assert parsed(await forwarder.ask(query())).answer[0].ttl == 60
    clock.now += 61
    resolver.udp_reaction = lambda asked: []
    found = await forwarder.ask(query())
    assert found is not None
    assert found.origin is Origin.STALE
    assert parsed(found).answer[0].ttl == STALE_TTL
    asked = len(resolver.asked)
    # For a while nobody is asked again, then the upstreams get another chance.
    again = forwarder.cached(query())
    assert again is not None
    assert again.origin is Origin.STALE
    assert len(resolver.asked) == asked
    clock.now += STALE_TTL
    assert forwarder.cached(query()) is None
    resolver.udp_reaction = lambda asked: [reply(asked, "192.0.2.2").to_wire()]
    fresh = await forwarder.ask(query())
    assert fresh is not None
    assert fresh.origin is Origin.FORWARDED
    assert parsed(fresh).answer[0][0].to_text() == "192.0.2.2"
    resolver.udp_reaction = lambda asked: [reply(asked, rcode="SERVFAIL").to_wire()]
    clock.now += 61
    failed = await forwarder.ask(query())
    assert failed is not None
    assert failed.origin is Origin.STALE
    clock.now += STALE_MOST
    assert parsed(await forwarder.ask(query())).rcode() == dns.rcode.SERVFAIL


async def test_each_domain_has_its_own_upstreams(resolver: Resolver) -> None:
    other = Resolver()
    await other.start()
    other.udp_reaction = lambda asked: [reply(asked, "192.0.2.9").to_wire()]
    routes = {encode_name("."): [resolver.upstream], encode_name("corp.example"): [other.upstream]}
    forwarder = Forwarder(routes, open_socket)
    for name, address in (
        ("a.corp.example", "192.0.2.9"),
        ("Corp.Example", "192.0.2.9"),
        ("notcorp.example", "192.0.2.1"),
    ):
        assert parsed(await forwarder.ask(query(name)), query(name)).answer[0][0].to_text() == address
    forwarder.route({encode_name("corp.example"): [other.upstream]})
    assert await forwarder.ask(query("example.net")) is None
    await other.stop()


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("A", "192.0.2.1"),
        ("AAAA", "2001:db8::1"),
        ("CNAME", "www.example.org."),
        ("MX", "10 mail.example.org."),
        ("SRV", "0 0 80 www.example.org."),
        ("NS", "ns.example.org."),
        ("PTR", "www.example.org."),
        ("TXT", '"a" "b"'),
        ("CAA", '0 issue "ca.example.org"'),
        ("HTTPS", '1 . alpn="h2"'),
    ],
)
def test_answers_are_taken_out_of_their_message(kind: str, data: str) -> None:
    asked = query("example.org", kind)
    made = dns.message.make_response(dns.message.make_query("example.org", kind, id=1))
    made.answer.append(dns.rrset.from_text("example.org.", 60, "IN", kind, data))
    response = decode_response(made.to_wire(), asked, 1)
    assert response is not None
    count, records = response.flat(asked, 10)
    wire = struct.pack("!6H", 1, 0x8180, 0, count, 0, 0) + records
    told = dns.message.from_wire(wire)
    assert [(item.name.to_text(), item.ttl, item[0].to_text()) for item in told.answer] == [("example.org.", 50, data)]
    assert response.names(asked) == [encode_name("example.org")]


def test_dnssec_is_asked_for_and_passed_on_only_when_wanted() -> None:
    asked = dns.message.make_query("example.org", "A", want_dnssec=True)
    made = reply(asked, "192.0.2.1")
    made.flags |= dns.flags.AD
    plain, secure = query(), query(want_dnssec=True)
    response = decode_response(made.to_wire(), plain, asked.id)
    assert response is not None
    assert not dns.message.from_wire(response.render(plain, 512)).flags & dns.flags.AD
    told = dns.message.from_wire(response.render(secure, 512))
    assert told.flags & dns.flags.AD
    assert told.ednsflags & dns.flags.DO


GOOD = reply(dns.message.make_query("example.org", "A", id=1, use_edns=0), "192.0.2.1", "192.0.2.2", soa=5).to_wire()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(12, 200), st.integers(0, 255)), max_size=5), st.integers(0, 60))
def test_damaged_answers_are_rendered_readably_or_refused(changes: list[tuple[int, int]], cut: int) -> None:
    wire = bytearray(GOOD)
    for at, value in changes:
        wire[at % len(wire)] = value
    try:
        response = decode_response(bytes(wire[: len(wire) - cut]), query(), 1)
    except Malformed:
        return
    if response is not None:
        assert len(response.render(query(), 512)) <= 512
        assert response.keep >= 0
