"""Serving a view on sockets that the caller opened (in another network namespace, usually)."""

import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import socket
import struct
import sys
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from time import monotonic
from typing import Any, Final

import uvloop

from vmnet_dns import message, zonefile
from vmnet_dns.answer import (
    Alias,
    Answer,
    Outcome,
    Transport,
    answer,
    deny,
    fail,
    follow,
    keep_bytes,
    refuse,
    refuse_stranger,
)
from vmnet_dns.datagrams import NAME, SIZE, Batch
from vmnet_dns.forward import Forwarder, Found, Routes, Upstream
from vmnet_dns.limit import ClientLimit
from vmnet_dns.message import Malformed, Query, Rcode
from vmnet_dns.tally import Tally
from vmnet_dns.zone import Subnet, View

log = logging.getLogger(__name__)
query_log = logging.getLogger("vmnet_dns.queries")
"""One line per query where it is asked for: network, client, name, type, rcode, outcome."""

DRAIN: Final = 64
"""Datagrams taken per wake-up: enough to make the wake-up cheap, few enough to let the loop serve the others."""
IDLE_SECONDS: Final = 10.0
"""A TCP client that says nothing for so long is sent away (RFC 7766 section 6.2.3)."""
CONNECTIONS: Final = 128
CONNECTIONS_PER_CLIENT: Final = 8
LOCAL_RATE: Final = (2000.0, 4000.0)
"""Queries per second and burst of one client."""
FORWARD_RATE: Final = (200.0, 400.0)
"""The same for what must be asked upstream: dearer by far."""
PIPELINED: Final = 32
"""Queries of one TCP connection that wait for the world at once; of more the connection itself waits."""

Labels = tuple[str, str, str]
"""Type, rcode and outcome of a query: ``A``, ``NOERROR``, ``local``; all of them bounded (``other``).

Outcomes: local, forwarded, cached, stale, failed, refused, limited, malformed.
"""
_LIMITED: Final = ("other", "other", "limited")
_HOT: Final = Batch(DRAIN)
"""One event loop serves all sockets of a process, one after another: they share this memory."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a question has the answer that it has."""

    wire: bytes
    outcome: str
    rcode: str
    zone: str | None
    """The zone that decides; None: the rest of the world."""
    alias: str | None = None
    """Where aliases of this network lead out of it."""
    upstream: str | None = None
    """Who answered, now or at the time when the answer was kept."""
    asked: tuple[str, ...] = ()
    """Who is asked about such names."""
    age: int = 0
    """Seconds for which the answer has been kept."""


@dataclass(frozen=True, slots=True)
class _Told:
    wire: bytes | None
    labels: Labels
    found: Found | None = None


class Server:
    """One network's responder: any number of UDP and TCP sockets, one view, one forwarder."""

    def __init__(
        self,
        view: View,
        forwarder: Forwarder | None = None,
        *,
        tally: Tally | None = None,
        local_rate: tuple[float, float] = LOCAL_RATE,
        forward_rate: tuple[float, float] = FORWARD_RATE,
        idle_seconds: float = IDLE_SECONDS,
        log_queries: bool = False,
    ) -> None:
        """Clients outside ``view.subnets`` (and link-local ones) are refused. Without forwarder all else is REFUSED."""
        self._view = view
        self._forwarder = forwarder
        self.tally = tally or Tally()
        self._local = ClientLimit(*local_rate)
        """Clients of the network only: who has a bucket here is inside."""
        self._strangers = ClientLimit(*local_rate)
        self._forward = ClientLimit(*forward_rate)
        self._idle_seconds = idle_seconds
        self._log_queries = log_queries
        self._udp: list[socket.socket] = []
        self._listeners: list[asyncio.Server] = []
        self._connections: dict[str, int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def view(self) -> View:
        """What is answered from. It may be changed in place."""
        return self._view

    def update(self, view: View) -> None:
        """Answer from another view from now on."""
        if view.subnets != self._view.subnets:
            self._local.buckets.clear()
        self._view = view

    def forward(self, routes: Routes) -> None:
        """Ask other upstreams from now on. Raises ValueError for a server that was made without a forwarder."""
        if self._forwarder is None:
            raise ValueError("this responder asks nobody")
        self._forwarder.route(routes)

    def serve_udp(self, sock: socket.socket) -> None:
        """Answer datagrams of a bound, non-blocking socket, which is ours from now on."""
        self._udp.append(sock)
        asyncio.get_running_loop().add_reader(sock.fileno(), self._drain, sock, sock.fileno(), sock.family)

    async def serve_tcp(self, listener: socket.socket) -> None:
        """Answer on the connections of a listening socket, which is ours from now on."""
        self._listeners.append(await asyncio.start_server(self._connected, sock=listener))

    async def close(self) -> None:
        """Close all sockets and end what is under way."""
        loop = asyncio.get_running_loop()
        for sock in self._udp:
            loop.remove_reader(sock.fileno())
            sock.close()
        self._udp.clear()
        for listener in self._listeners:
            listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listeners.clear()

    async def explain(self, query: bytes) -> Explanation:
        """Answer a well-formed query of nobody, uncounted and unlimited, and say why. Raises ValueError."""
        found = answer(self._view, query, transport=Transport.TCP)
        try:
            parsed = message.parse_query(query)
        except Malformed as error:
            raise ValueError(str(error)) from error
        asked = found.query
        alias = found.alias
        if found.outcome is not Outcome.FORWARD or asked is None:
            told = _Told(found.wire, _labels(found))
        elif self._forwarder is None:
            told = _Told(refuse(asked).wire, _refused(asked))
        else:
            target = alias.target if alias is not None else asked
            told = self._tell(asked, alias, self._forwarder.cached(target) or await self._forwarder.ask(target), 0xFFFF)
        name = alias.target.name if alias is not None else parsed.name
        zone = self._view.zone_of(name)
        outside = found.outcome is Outcome.FORWARD and self._forwarder is not None
        known = told.found.response.upstream if told.found is not None else None
        return Explanation(
            told.wire or b"",
            told.labels[2],
            told.labels[1],
            message.decode_name(zone.apex) if zone is not None else None,
            message.decode_name(name) if alias is not None else None,
            str(known) if known is not None else None,
            tuple(map(str, self._forwarder.upstreams(name))) if outside and self._forwarder is not None else (),
            told.found.age if told.found is not None else 0,
        )

    # UDP

    def _drain(self, sock: socket.socket, descriptor: int, family: int) -> None:
        batch = _HOT
        try:
            received = batch.receive(descriptor)
        except OSError as error:
            # An ICMP error that one of our answers caused is reported here; the next datagram is not its fault.
            log.debug("receiving on %s: %s", self._view.network, error)
            return
        now = monotonic()
        # What follows is run for every query of every guest; names are looked up once.
        ready = self._view.ready.by_bytes if not self._log_queries else {}
        buckets, queries, numbers, names = self._local.buckets, batch.queries, batch.numbers, batch.names
        stride, length = batch.STRIDE, batch.LENGTH
        low, high = (4, 8) if family == socket.AF_INET else (8, 24)
        counts: dict[Labels, int] = {}
        for at in range(received):
            start = at * SIZE
            query = queries[start : start + numbers[at * stride + length]].tobytes()
            kept = ready.get(query[2:].lower())
            if kept is not None:
                head, end, tail, rest, labels = kept
                place = at * NAME
                bucket = buckets.get(names[place + low : place + high].tobytes())
                if bucket is not None and bucket.tokens >= 1 and query.endswith(tail):
                    bucket.tokens -= 1
                    batch.answer(at, query[:2] + head + query[12:end] + rest)
                    counts[labels] = counts.get(labels, 0) + 1
                    continue
            self._answer_datagram(sock, batch, at, query, now, counts)
        for lost in batch.send(descriptor, family):
            # A full buffer or an unreachable client: a lost datagram, which clients expect.
            log.debug("answering on %s: %s", self._view.network, lost)
        if counts:
            # From the wake-up until the last answer of the batch was sent: for most of them a little too much.
            seconds = monotonic() - now
            for labels, number in counts.items():
                self.tally.count(labels, seconds, number)

    def _answer_datagram(
        self, sock: socket.socket, batch: Batch, at: int, query: bytes, now: float, counts: dict[Labels, int]
    ) -> None:
        """What is not answered from the query's bytes alone."""
        client = batch.client(at, sock.family)
        found = self._answer(query, client[0], Transport.UDP, now)
        if isinstance(found, Answer):
            if found.query is not None:
                limit = min(max(found.query.size, message.UDP_MINIMUM), message.UDP_MAXIMUM)
                self._start(self._forward_datagram(sock, client, found, limit, now))
            return
        self._write_log(client[0], query, found.labels)
        counts[found.labels] = counts.get(found.labels, 0) + 1
        if found.wire is not None:
            batch.answer(at, found.wire)

    async def _forward_datagram(
        self, sock: socket.socket, client: Any, asked: Answer, limit: int, began: float
    ) -> None:
        wire = await self._ask(asked, limit, client[0], began)
        if sock.fileno() < 0:
            return
        try:
            sock.sendto(wire, client)
        except OSError as error:
            log.debug("answering %s on %s: %s", client[0], self._view.network, error)

    # TCP

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        client = str(writer.get_extra_info("peername")[0])
        held = self._connections.get(client, 0)
        if held >= CONNECTIONS_PER_CLIENT or sum(self._connections.values()) >= CONNECTIONS:
            writer.transport.abort()
            return
        self._connections[client] = held + 1
        waiting = asyncio.Semaphore(PIPELINED)
        try:
            # Ends of connections in all their forms are the client's right and no error of ours.
            with contextlib.suppress(asyncio.IncompleteReadError, TimeoutError, OSError):
                while await self._converse(reader, writer, client, waiting):
                    pass
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._idle_seconds):
                    # Who asks and then closes its half still wants the answers.
                    for _ in range(PIPELINED):
                        await waiting.acquire()
        finally:
            writer.close()
            self._connections[client] -= 1
            if not self._connections[client]:
                del self._connections[client]

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: str, waiting: asyncio.Semaphore
    ) -> bool:
        """One query, and its answer if that is at hand; False ends the connection.

        What the world is asked is answered when it answers, and holds up nobody (RFC 7766 section 6.2.1.1).
        """
        async with asyncio.timeout(self._idle_seconds):
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            query = await reader.readexactly(length)
        began = monotonic()
        found = self._answer(query, client, Transport.TCP, began)
        if isinstance(found, Answer):
            async with asyncio.timeout(self._idle_seconds):
                await waiting.acquire()
            self._start(self._forward_stream(writer, found, client, began, waiting))
            return True
        self._write_log(client, query, found.labels)
        self.tally.count(found.labels, monotonic() - began)
        if found.wire is None:
            return False
        await self._write(writer, found.wire)
        return True

    async def _forward_stream(
        self, writer: asyncio.StreamWriter, asked: Answer, client: str, began: float, waiting: asyncio.Semaphore
    ) -> None:
        try:
            wire = await self._ask(asked, 0xFFFF, client, began)
            with contextlib.suppress(TimeoutError, OSError):
                await self._write(writer, wire)
        finally:
            waiting.release()

    async def _write(self, writer: asyncio.StreamWriter, wire: bytes) -> None:
        writer.write(struct.pack("!H", len(wire)) + wire)
        async with asyncio.timeout(self._idle_seconds):
            await writer.drain()

    # Both

    def _answer(self, query: bytes, client: str, transport: Transport, now: float) -> _Told | Answer:
        """What to send, not counted yet; an Answer: ask the world."""
        key = ip_address(client.partition("%")[0]).packed
        inside = key in self._local.buckets or self._inside(client)
        if not (self._local if inside else self._strangers).allows(key, now):
            return _Told(None, _LIMITED)
        found = answer(self._view, query, transport=transport) if inside else refuse_stranger(query)
        asked = found.query
        if found.outcome is not Outcome.FORWARD or asked is None:
            if transport is Transport.UDP and inside:
                keep_bytes(self._view, query, found)
            return _Told(found.wire, _labels(found))
        limit = 0xFFFF if transport is Transport.TCP else min(asked.size, message.UDP_MAXIMUM)
        if self._forwarder is None or not asked.flags & message.RD:
            if found.alias is not None:
                # As far as this network knows it.
                wire = follow(asked, found.alias, Rcode.NOERROR, 0, b"", limit)
                return _Told(wire, (message.type_name(asked.type), Rcode.NOERROR.name, Outcome.LOCAL.value))
            return _Told(refuse(asked).wire, _refused(asked))
        cached = self._forwarder.cached(found.alias.target if found.alias is not None else asked)
        if cached is not None:
            return self._tell(asked, found.alias, cached, limit)
        if not self._forward.allows(key, now):
            return _Told(None, (message.type_name(asked.type), "other", "limited"))
        return found

    async def _ask(self, asked: Answer, limit: int, client: str, began: float) -> bytes:
        """Answer from the world, counted; SERVFAIL when there is none."""
        if asked.query is None or self._forwarder is None:
            return b""
        target = asked.alias.target if asked.alias is not None else asked.query
        told = self._tell(asked.query, asked.alias, await self._forwarder.ask(target), limit)
        self._write_log(client, asked.query, told.labels)
        self.tally.count(told.labels, monotonic() - began)
        return told.wire or b""

    def _tell(self, query: Query, alias: Alias | None, found: Found | None, limit: int) -> _Told:
        """What the world says, as far as this network may hear it."""
        kind = message.type_name(query.type)
        if found is None:
            return _Told(fail(query), (kind, Rcode.SERVFAIL.name, "failed"))
        if any(self._view.owns(name) for name in found.response.owners):
            # An alias of the world that leads back into the cluster: what is there, this view alone says.
            return _Told(deny(query).wire, (kind, Rcode.NXDOMAIN.name, "refused"), found)
        labels = kind, message.rcode_name(found.rcode), found.origin.value
        if alias is None:
            return _Told(found.render(query, limit), labels, found)
        count, records = found.flat(alias.target)
        return _Told(follow(query, alias, found.rcode, count, records, limit), labels, found)

    def _inside(self, client: str) -> bool:
        address = ip_address(client.partition("%")[0])
        return address.is_link_local or any(address in subnet for subnet in self._view.subnets)

    def _write_log(self, client: str, query: bytes | Query, labels: Labels) -> None:
        if not self._log_queries:
            return
        try:
            parsed = query if isinstance(query, Query) else message.parse_query(query)
            name, kind = message.decode_name(parsed.question[:-4]), str(parsed.type)
        except Malformed:
            name, kind = "-", "-"
        query_log.info("%s %s %s %s %s %s", self._view.network, client, name, kind, labels[1], labels[2])

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """The one place where tasks begin; ``close`` ends them."""
        task = asyncio.get_running_loop().create_task(work, name=f"dns {self._view.network}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a query on %s failed", self._view.network, exc_info=error)


def _labels(found: Answer) -> Labels:
    return message.type_name(found.type), message.rcode_name(found.rcode), found.outcome.value


def _refused(query: Query) -> Labels:
    return message.type_name(query.type), Rcode.REFUSED.name, "refused"


_EPILOG = """\
A zone file is TOML:

  network = "happy-tenant"          # a label, for the log
  domain = "cluster.local"          # names below it are answered here and nowhere else
  subnets = ["192.168.0.0/16"]      # clients outside are refused; reverse names inside are answered here
  servers = ["192.168.0.1"]         # where this responder is reached (ns.dns.<domain>)
  forwarded = ["kubernetes.default.svc.cluster.local"]   # others' names that this network may see

  [[host]]                          # A or AAAA for every name, PTR to the first
  names = ["blue.blue-namespace.vm.cluster.local"]
  addresses = ["192.168.0.5", "fd00::5"]

  [[record]]                        # SRV, CNAME or TXT
  name = "_http._tcp.web.red.svc.cluster.local"
  srv = {port = 80, target = "blue.blue-namespace.vm.cluster.local"}

Everything else is forwarded to the upstreams. Try it:

  vmnet-dns zone.toml --listen 127.0.0.1:5353 --upstream 1.1.1.1 --allow 127.0.0.0/8
  dig @127.0.0.1 -p 5353 blue.blue-namespace.vm.cluster.local

SIGHUP reads the zone file again; SIGTERM and SIGINT end the responder.
"""


def main(arguments: list[str] | None = None) -> int:
    """``vmnet-dns``: serve one zone file."""
    parser = argparse.ArgumentParser(
        prog="vmnet-dns",
        description="Answer DNS for one isolated network, described by a zone file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("zone", type=Path, help="zone file (TOML, see below)")
    parser.add_argument(
        "--listen", action="append", default=[], metavar="ADDRESS:PORT", help="UDP and TCP; again for more addresses"
    )
    parser.add_argument(
        "--upstream",
        action="append",
        default=[],
        metavar="[DOMAIN=]ADDRESS[:PORT]",
        help="server for the rest of the world, or for one domain of it; again for more servers",
    )
    parser.add_argument("--log-queries", action="store_true", help="one line for every query")
    parser.add_argument(
        "--rate", type=float, default=LOCAL_RATE[0], help="queries per second that one client may ask (%(default)g)"
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="CIDR", help="answer these clients too, besides the subnets'"
    )
    parser.add_argument("--check", action="store_true", help="only read the zone file and say what is in it")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        allowed = tuple(ip_network(text) for text in options.allow)
        view = zonefile.load(options.zone, allowed=allowed)
        listen = [_endpoint(text) for text in options.listen or ["127.0.0.1:5353"]]
        routes = upstream_routes(options.upstream)
    except (OSError, ValueError) as error:
        print(f"vmnet-dns: {error}", file=sys.stderr)
        return 2
    if options.check:
        print(f"{options.zone}: network {view.network}, {len(view.records)} records, domain {view.domain}")
        return 0
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(options, view, listen, routes, allowed))
    except OSError as error:
        print(f"vmnet-dns: cannot listen: {error}", file=sys.stderr)
        return 1
    return 0


def upstream_routes(texts: Iterable[str]) -> Routes:
    """``domain=address:port`` or ``address:port``, any number of each. Raises ValueError."""
    routes: dict[bytes, list[Upstream]] = {}
    for text in texts:
        domain, _, endpoint = text.rpartition("=")
        routes.setdefault(message.encode_name(domain), []).append(Upstream(*_endpoint(endpoint)))
    return routes


def _endpoint(text: str) -> tuple[Any, int]:
    """``address``, ``address:port`` or ``[address]:port``. Raises ValueError."""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        return ip_address(host), int(port.removeprefix(":") or 53)
    if text.count(":") == 1:
        host, _, port = text.partition(":")
        return ip_address(host), int(port)
    return ip_address(text), 53


async def _open(family: int, stream: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


async def _serve(
    options: argparse.Namespace,
    view: View,
    listen: list[tuple[Any, int]],
    routes: Routes,
    allowed: tuple[Subnet, ...],
) -> None:
    path: Path = options.zone
    server = Server(
        view,
        Forwarder(routes, _open) if routes else None,
        local_rate=(options.rate, 2 * options.rate),
        log_queries=options.log_queries,
    )
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def reload() -> None:
        try:
            server.update(zonefile.load(path, allowed=allowed))
            log.info("%s read again: %d records", path, len(server.view.records))
        except (OSError, ValueError) as error:
            log.error("%s not read, the old names stay: %s", path, error)

    loop.add_signal_handler(signal.SIGHUP, reload)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    try:
        for address, port in listen:
            family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
            udp = socket.socket(family, socket.SOCK_DGRAM)
            udp.setblocking(False)
            udp.bind((str(address), port))
            server.serve_udp(udp)
            tcp = socket.socket(family, socket.SOCK_STREAM)
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tcp.setblocking(False)
            # Port 0 (tests): the same number for both.
            tcp.bind((str(address), udp.getsockname()[1]))
            tcp.listen(128)
            await server.serve_tcp(tcp)
            log.info("serving %s on %s port %d", view.network, address, udp.getsockname()[1])
        # The names are here to stay: looking through all of them for garbage would hold up answers for milliseconds.
        gc.freeze()
        await ended.wait()
    finally:
        await server.close()
