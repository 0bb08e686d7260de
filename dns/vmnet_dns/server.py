"""Serving a view on sockets that the caller opened (in another network namespace, usually)."""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import struct
import sys
from collections.abc import Callable, Coroutine
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final

import uvloop

from vmnet_dns import message, zonefile
from vmnet_dns.answer import Answer, Outcome, Transport, answer, fail, refuse, refuse_stranger
from vmnet_dns.forward import Forwarder, Upstream
from vmnet_dns.limit import ClientLimit
from vmnet_dns.message import Query, Rcode
from vmnet_dns.zone import Subnet, View

log = logging.getLogger(__name__)

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
_KNOWN_CLIENTS: Final = 4096

Observe = Callable[[str, str, str], None]
"""Called with (type, rcode, outcome) for every query: ``A``, ``NOERROR``, ``local``.

Outcomes: local, forwarded, cached, failed, refused, limited, malformed. Type and rcode are bounded (``other``).
"""


def _unobserved(kind: str, rcode: str, outcome: str) -> None:
    del kind, rcode, outcome


class Server:
    """One network's responder: any number of UDP and TCP sockets, one view, one forwarder."""

    def __init__(
        self,
        view: View,
        forwarder: Forwarder | None = None,
        *,
        observe: Observe = _unobserved,
        local_rate: tuple[float, float] = LOCAL_RATE,
        forward_rate: tuple[float, float] = FORWARD_RATE,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        """Clients outside ``view.subnets`` (and link-local ones) are refused. Without forwarder all else is REFUSED."""
        self._view = view
        self._forwarder = forwarder
        self._observe = observe
        self._local = ClientLimit(*local_rate)
        self._forward = ClientLimit(*forward_rate)
        self._idle_seconds = idle_seconds
        self._clients: dict[str, bool] = {}
        self._udp: list[socket.socket] = []
        self._listeners: list[asyncio.Server] = []
        self._connections: dict[str, int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._clock = asyncio.get_running_loop().time

    @property
    def view(self) -> View:
        """What is answered from."""
        return self._view

    def update(self, view: View) -> None:
        """Answer from another view from now on."""
        if view.subnets != self._view.subnets:
            self._clients.clear()
        self._view = view

    def serve_udp(self, sock: socket.socket) -> None:
        """Answer datagrams of a bound, non-blocking socket, which is ours from now on."""
        self._udp.append(sock)
        asyncio.get_running_loop().add_reader(sock.fileno(), self._drain, sock)

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

    # UDP

    def _drain(self, sock: socket.socket) -> None:
        now = self._clock()
        for _ in range(DRAIN):
            try:
                query, client = sock.recvfrom(4096)
            except BlockingIOError:
                return
            except OSError as error:
                # An ICMP error that one of our answers caused is reported here; the next datagram is not its fault.
                log.debug("receiving on %s: %s", self._view.network, error)
                continue
            found = self._answer(query, client[0], Transport.UDP, now)
            if found is None:
                continue
            if found.outcome is Outcome.FORWARD and found.query is not None:
                self._start(self._forward_datagram(sock, client, found.query))
            elif found.wire is not None:
                self._send(sock, found.wire, client)

    async def _forward_datagram(self, sock: socket.socket, client: Any, query: Query) -> None:
        limit = min(max(query.size, message.UDP_MINIMUM), message.UDP_MAXIMUM)
        wire = await self._ask(query, limit)
        if sock.fileno() >= 0:
            self._send(sock, wire, client)

    def _send(self, sock: socket.socket, wire: bytes, client: Any) -> None:
        try:
            sock.sendto(wire, client)
        except OSError as error:
            # A full buffer or an unreachable client: a lost datagram, which clients expect.
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
        try:
            # Ends of connections in all their forms are the client's right and no error of ours.
            with contextlib.suppress(asyncio.IncompleteReadError, TimeoutError, OSError):
                while await self._converse(reader, writer, client):
                    pass
        finally:
            writer.close()
            self._connections[client] -= 1
            if not self._connections[client]:
                del self._connections[client]

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: str) -> bool:
        """One query and its answer; False ends the connection."""
        async with asyncio.timeout(self._idle_seconds):
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            query = await reader.readexactly(length)
        found = self._answer(query, client, Transport.TCP, self._clock())
        if found is None:
            return False
        wire = found.wire
        if found.outcome is Outcome.FORWARD and found.query is not None:
            wire = await self._ask(found.query, 0xFFFF)
        if wire is None:
            return False
        writer.write(struct.pack("!H", len(wire)) + wire)
        async with asyncio.timeout(self._idle_seconds):
            await writer.drain()
        return True

    # Both

    def _answer(self, query: bytes, client: str, transport: Transport, now: float) -> Answer | None:
        """The answer, already counted unless it is to be forwarded; None: drop the query."""
        if not self._local.allows(client, now):
            self._observe("other", "other", "limited")
            return None
        found = answer(self._view, query, transport=transport) if self._inside(client) else refuse_stranger(query)
        if found.outcome is Outcome.FORWARD and found.query is not None:
            return self._forwarded(found, found.query, client, transport, now)
        self._observe(message.type_name(found.type), message.rcode_name(found.rcode), found.outcome.value)
        return found

    def _forwarded(self, found: Answer, query: Query, client: str, transport: Transport, now: float) -> Answer | None:
        kind = message.type_name(query.type)
        if self._forwarder is None or not query.flags & message.RD:
            self._observe(kind, Rcode.REFUSED.name, "refused")
            return refuse(query)
        limit = 0xFFFF if transport is Transport.TCP else min(query.size, message.UDP_MAXIMUM)
        cached = self._forwarder.cached(query, limit)
        if cached is not None:
            wire, rcode = cached
            self._observe(kind, message.rcode_name(rcode), "cached")
            return Answer(wire, Outcome.LOCAL, query.type, rcode)
        if not self._forward.allows(client, now):
            self._observe(kind, "other", "limited")
            return None
        return found

    async def _ask(self, query: Query, limit: int) -> bytes:
        """Answer from the world, counted; SERVFAIL when there is none."""
        kind = message.type_name(query.type)
        found = await self._forwarder.ask(query, limit) if self._forwarder is not None else None
        if found is None:
            self._observe(kind, Rcode.SERVFAIL.name, "failed")
            return fail(query)
        wire, rcode = found
        self._observe(kind, message.rcode_name(rcode), "forwarded")
        return wire

    def _inside(self, client: str) -> bool:
        known = self._clients.get(client)
        if known is None:
            if len(self._clients) >= _KNOWN_CLIENTS:
                self._clients.clear()
            address = ip_address(client.partition("%")[0])
            known = address.is_link_local or any(address in subnet for subnet in self._view.subnets)
            self._clients[client] = known
        return known

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """The one place where tasks begin; ``close`` ends them."""
        task = asyncio.get_running_loop().create_task(work, name=f"dns {self._view.network}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a query on %s failed", self._view.network, exc_info=error)


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
        "--upstream", action="append", default=[], metavar="ADDRESS[:PORT]", help="server for the rest of the world"
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
        upstreams = [Upstream(*_endpoint(text)) for text in options.upstream]
    except (OSError, ValueError) as error:
        print(f"vmnet-dns: {error}", file=sys.stderr)
        return 2
    if options.check:
        print(f"{options.zone}: network {view.network}, {len(view.records)} records, domain {view.domain}")
        return 0
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(options.zone, view, listen, upstreams, allowed))
    except OSError as error:
        print(f"vmnet-dns: cannot listen: {error}", file=sys.stderr)
        return 1
    return 0


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
    path: Path, view: View, listen: list[tuple[Any, int]], upstreams: list[Upstream], allowed: tuple[Subnet, ...]
) -> None:
    server = Server(view, Forwarder(upstreams, _open) if upstreams else None)
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
        await ended.wait()
    finally:
        await server.close()
