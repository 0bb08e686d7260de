"""DNS over UDP and TCP: names of the cluster from memory, everything else from the upstream servers."""

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, cast

from dnslib import AAAA, CNAME, PTR, QTYPE, RCODE, RR, SOA, SRV, A, DNSError, DNSRecord

from vmnet.lab.cluster_dns.records import Names, Record
from vmnet.runtime.tasks import TaskSet

log = logging.getLogger(__name__)

TTL: Final = 5
UPSTREAM_TIMEOUT: Final = 2.0
TRIES: Final = 2
IDLE: Final = 30.0
PLAIN_UDP: Final = 512  # RFC 1035 section 2.3.4


def parse(data: bytes) -> DNSRecord | None:
    """A query with one question; None for anything else."""
    try:
        request = DNSRecord.parse(data)
    except (DNSError, ValueError, struct.error, IndexError):
        return None
    return request if not request.header.qr and len(request.questions) == 1 else None


def answer(request: DNSRecord, names: Names) -> DNSRecord | None:
    """The reply for a name of the cluster; None when another server is to be asked."""
    question = request.questions[0]
    name, kind = str(question.qname), str(QTYPE.get(question.qtype))
    if not names.owns(name):
        return None
    reply = request.reply(ra=1, aa=1)
    records = names.find(name, kind)
    for record in records or ():
        reply.add_answer(_resource(question.qname, record))
        if record.type == "SRV":
            _add_targets(reply, names, record)
    if records is None:
        reply.header.rcode = RCODE.NXDOMAIN
    if not reply.rr:
        # A negative answer without SOA could not be cached (RFC 2308 section 3).
        soa = SOA(f"ns.dns.{names.domain}", f"hostmaster.{names.domain}", (1, 7200, 1800, 86400, TTL))
        reply.add_auth(RR(names.domain, QTYPE.SOA, ttl=TTL, rdata=soa))
    return reply


def _add_targets(reply: DNSRecord, names: Names, record: Record) -> None:
    target = record.data.split()[3]
    for kind in ("A", "AAAA"):
        for found in names.find(target, kind) or ():
            reply.add_ar(_resource(target, found))


def _resource(name: object, record: Record) -> RR:
    match record.type:
        case "A":
            data = A(record.data)
        case "AAAA":
            data = AAAA(record.data)
        case "CNAME":
            data = CNAME(record.data)
        case "PTR":
            data = PTR(record.data)
        case _:
            priority, weight, port, target = record.data.split()
            data = SRV(int(priority), int(weight), int(port), target)
    return RR(name, getattr(QTYPE, record.type), ttl=TTL, rdata=data)


def limited(reply: DNSRecord, request: DNSRecord) -> bytes:
    """The reply as one datagram: with TC, and nothing in it, when the client takes no larger one."""
    limit = max([PLAIN_UDP, *(item.rclass for item in request.ar if item.rtype == QTYPE.OPT)])
    data = bytes(reply.pack())
    return data if len(data) <= limit else bytes(reply.truncate().pack())


class Server:
    """``names`` gives the current names. ``upstreams``: addresses of servers, tried in order."""

    def __init__(self, names: Callable[[], Names], upstreams: Sequence[str]) -> None:
        self._names = names
        self._upstreams = tuple(upstreams)
        self._tasks = TaskSet()

    async def run(self, port: int = 53) -> None:
        """Serve both families until cancelled. Raises OSError when the port is taken."""
        loop = asyncio.get_running_loop()
        datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        datagrams.bind(("::", port))
        transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self._start, self), sock=datagrams)
        listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        server = await asyncio.start_server(self._stream, sock=listener)
        try:
            await asyncio.Event().wait()
        finally:
            server.close()
            transport.close()
            await self._tasks.close()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._tasks.start(coroutine, "query")

    async def reply_to_datagram(self, data: bytes) -> bytes | None:
        """The reply to one UDP message; None for what deserves none."""
        request = parse(data)
        if request is None:
            return None
        reply = answer(request, self._names())
        return limited(reply, request) if reply is not None else await self._forward(request, data, _ask_by_datagram)

    async def _reply_on_stream(self, data: bytes) -> bytes | None:
        request = parse(data)
        if request is None:
            return None
        reply = answer(request, self._names())
        return bytes(reply.pack()) if reply is not None else await self._forward(request, data, _ask_by_stream)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                async with asyncio.timeout(IDLE):
                    (length,) = struct.unpack("!H", await reader.readexactly(2))
                    data = await reader.readexactly(length)
                reply = await self._reply_on_stream(data)
                if reply is None:
                    return
                writer.write(struct.pack("!H", len(reply)) + reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            return
        finally:
            writer.close()

    async def _forward(
        self, request: DNSRecord, data: bytes, ask: Callable[[str, bytes], Coroutine[Any, Any, bytes]]
    ) -> bytes:
        """What the first upstream that answers says, unchanged; SERVFAIL when none does."""
        for upstream in self._upstreams * TRIES:
            try:
                async with asyncio.timeout(UPSTREAM_TIMEOUT):
                    return await ask(upstream, data)
            except (OSError, asyncio.IncompleteReadError) as error:  # TimeoutError is an OSError
                log.info("%s: %r", upstream, error)
        reply = request.reply(ra=1, aa=0)
        reply.header.rcode = RCODE.SERVFAIL
        return bytes(reply.pack())


async def _ask_by_datagram(upstream: str, data: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    received: asyncio.Future[bytes] = loop.create_future()
    transport, _ = await loop.create_datagram_endpoint(lambda: _Reply(data[:2], received), remote_addr=(upstream, 53))
    try:
        transport.sendto(data)
        return await received
    finally:
        transport.close()


async def _ask_by_stream(upstream: str, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(upstream, 53)
    try:
        writer.write(struct.pack("!H", len(data)) + data)
        await writer.drain()
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        return await reader.readexactly(length)
    finally:
        writer.close()


class _Reply(asyncio.DatagramProtocol):
    """Waits for the message with our identifier on a connected socket."""

    def __init__(self, identifier: bytes, received: "asyncio.Future[bytes]") -> None:
        self._identifier = identifier
        self._received = received

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if data[:2] == self._identifier and not self._received.done():
            self._received.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self._received.done():
            self._received.set_exception(exc)


class _Datagrams(asyncio.DatagramProtocol):
    """Queries by UDP, each a task of its own: one slow upstream does not hold up the others."""

    def __init__(self, start: Callable[[Coroutine[Any, Any, None]], None], server: Server) -> None:
        self._start = start
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._start(self._reply(data, addr))

    async def _reply(self, data: bytes, addr: tuple[str, int]) -> None:
        reply = await self._server.reply_to_datagram(data)
        if reply is not None:
            self._transport.sendto(reply, addr)
