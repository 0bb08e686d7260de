"""``python -m vmnet.lab.outside``: the host outside the cluster: a web server, and a DNS server for everybody.

The DNS server is authoritative for ``outside.test`` and its reverse names; every other name is NXDOMAIN, for it is
also the end of the lab's forwarding chain. It answers in bounded time and never asks anyone else.
"""

import asyncio
import logging
import signal
import socket
import struct
import time
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Final, cast

from aiohttp import web
from dnslib import AAAA, PTR, QTYPE, RCODE, RR, SOA, A, DNSError, DNSRecord

from vmnet.lab import topology

log = logging.getLogger(__name__)

ZONE: Final = "outside.test."
TTL: Final = 60
STREAM_CHUNK: Final = 16 * 1024
STREAM_INTERVAL: Final = 0.02
"""16 KiB every 20 ms: 800 kB/s, enough to see every gap and little enough for an emulated guest."""

Addresses = Mapping[str, tuple[str, str]]
"""Name to (IPv4, IPv6)."""

NAMES: Final[Addresses] = {
    f"{name}{ZONE}": (str(topology.OUTSIDE_HOST.ipv4), str(topology.OUTSIDE_HOST.ipv6)) for name in ("", "www.", "ns.")
}


def answer(query: bytes, names: Addresses = NAMES) -> bytes | None:
    """The response to one DNS message; None for what is not a query."""
    try:
        request = DNSRecord.parse(query)
    except (DNSError, ValueError, struct.error, IndexError):
        return None
    if request.header.qr or not request.questions:
        return None
    reply = request.reply(ra=0, aa=1)
    question = request.questions[0]
    name = str(question.qname).lower()
    kind = QTYPE.get(question.qtype)
    pointers = _pointers(names)
    if name in names:
        ipv4, ipv6 = names[name]
        if kind in ("A", "ANY"):
            reply.add_answer(RR(question.qname, QTYPE.A, ttl=TTL, rdata=A(ipv4)))
        if kind in ("AAAA", "ANY"):
            reply.add_answer(RR(question.qname, QTYPE.AAAA, ttl=TTL, rdata=AAAA(ipv6)))
    elif name in pointers:
        if kind in ("PTR", "ANY"):
            reply.add_answer(RR(question.qname, QTYPE.PTR, ttl=TTL, rdata=PTR(pointers[name])))
    else:
        reply.header.rcode = RCODE.NXDOMAIN
    if not reply.rr:
        # A negative answer without SOA could not be cached (RFC 2308 section 3).
        soa = SOA(f"ns.{ZONE}", f"hostmaster.{ZONE}", (1, 3600, 600, 86400, TTL))
        reply.add_auth(RR(ZONE if name.endswith(ZONE) else ".", QTYPE.SOA, ttl=TTL, rdata=soa))
    return bytes(reply.pack())


def _pointers(names: Addresses) -> dict[str, str]:
    return {f"{ip_address(text).reverse_pointer}.": f"www.{ZONE}" for addresses in names.values() for text in addresses}


class DatagramAnswers(asyncio.DatagramProtocol):
    """DNS over UDP."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to send."""
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer at once."""
        reply = answer(data)
        if reply is not None:
            self._transport.sendto(reply, addr)


async def answer_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """DNS over one TCP connection (RFC 1035 section 4.2.2)."""
    try:
        while True:
            async with asyncio.timeout(30):
                (length,) = struct.unpack("!H", await reader.readexactly(2))
                reply = answer(await reader.readexactly(length))
            if reply is None:
                return
            writer.write(struct.pack("!H", len(reply)) + reply)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
        return
    finally:
        writer.close()


async def hello(request: web.Request) -> web.Response:
    """Who asks, as seen from outside: the translated address."""
    return web.json_response({"client": request.remote, "path": request.path})


async def stream(request: web.Request) -> web.StreamResponse:
    """A download without end, at a constant pace; a client that does not read slows it down."""
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    await response.prepare(request)
    chunk = bytes(STREAM_CHUNK)
    loop = asyncio.get_running_loop()
    due = loop.time()
    started = time.monotonic()
    sent = 0
    try:
        while True:
            await response.write(chunk)
            sent += len(chunk)
            due = max(due + STREAM_INTERVAL, loop.time())
            await asyncio.sleep(due - loop.time())
    except (ConnectionError, asyncio.CancelledError) as error:
        log.info("stream to %s: %d bytes in %.1f s, %r", request.remote, sent, time.monotonic() - started, error)
        raise


async def serve() -> None:
    """Until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    application = web.Application()
    application.add_routes([web.get("/", hello), web.get("/stream", stream)])
    runner = web.AppRunner(application, handle_signals=False, shutdown_timeout=1)
    await runner.setup()
    for host, family in (
        (str(topology.OUTSIDE_HOST.ipv4), socket.AF_INET),
        (str(topology.OUTSIDE_HOST.ipv6), socket.AF_INET6),
    ):
        await web.TCPSite(runner, host, 80).start()
        await loop.create_datagram_endpoint(DatagramAnswers, local_addr=(host, 53), family=family)
        await asyncio.start_server(answer_stream, host, 53, family=family)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve())
