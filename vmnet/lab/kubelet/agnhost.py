"""A stand-in for the parts of Kubernetes' ``agnhost`` test image that network tests use: ``netexec`` and ``pause``.

``netexec`` serves HTTP: ``/`` (the time), ``/clientip``, ``/hostname``, ``/healthz``, ``/echo?msg=&code=``,
``/header?key=``, ``/dial?host=&port=&request=&protocol=&tries=`` (asks another netexec) and ``/exit?code=``. Over
UDP, and over SCTP where the kernel has it, ``echo <msg>``, ``clientip`` and ``hostname`` are answered. Port -1 is off.
"""

import argparse
import asyncio
import json
import signal
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, cast

import aiohttp
from aiohttp import web

IPPROTO_SCTP: Final = 132
DIAL_TIMEOUT: Final = 5.0
MOST_TRIES: Final = 1000


def peer_text(peer: Sequence[object]) -> str:
    """``address:port``, IPv4-mapped addresses unwrapped, others in brackets."""
    address = str(peer[0]).removeprefix("::ffff:")
    return f"[{address}]:{peer[1]}" if ":" in address else f"{address}:{peer[1]}"


def reply_to(message: bytes, peer: Sequence[object]) -> bytes:
    """The answer to one datagram."""
    word, _, rest = message.decode(errors="replace").strip().partition(" ")
    match word.lower():
        case "echo":
            return rest.encode()
        case "clientip":
            return peer_text(peer).encode()
        case "hostname":
            return socket.gethostname().encode()
    return b""


def log(text: str) -> None:
    """A line of the container's log."""
    print(f"{datetime.now(UTC):%Y/%m/%d %H:%M:%S} {text}", file=sys.stderr, flush=True)


@web.middleware
async def logged(request: web.Request, handler: Any) -> web.StreamResponse:
    """One line for each request, as of the image."""
    log(f"{request.method} {request.path_qs}")
    response: web.StreamResponse = await handler(request)
    return response


async def clientip(request: web.Request) -> web.Response:
    """The peer."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    if peer is None:
        return web.Response(status=500, text="no peer address")
    return web.Response(text=peer_text(peer))


async def hostname(_: web.Request) -> web.Response:
    """The pod's host name."""
    return web.Response(text=socket.gethostname())


async def healthz(_: web.Request) -> web.Response:
    """Something to probe: it serves, so it is well."""
    return web.Response()


async def echo(request: web.Request) -> web.Response:
    """``msg`` back, with status ``code``."""
    code = request.query.get("code", "200")
    if not code.isdigit() or not 100 <= int(code) < 600:
        return web.Response(status=400, text=f"status code {code!r} is not one")
    return web.Response(status=int(code), text=request.query.get("msg", ""))


async def header(request: web.Request) -> web.Response:
    """The value of the request's header ``key``."""
    return web.Response(text=request.headers.get(request.query.get("key", ""), ""))


async def now(_: web.Request) -> web.Response:
    """The time."""
    return web.Response(text=f"NOW: {datetime.now(UTC)}")


async def dial(request: web.Request) -> web.Response:
    """Ask another netexec ``tries`` times, and tell its answers and the errors."""
    query = request.query
    host, port, wanted = query.get("host", ""), query.get("port", ""), query.get("request", "hostname")
    tries = query.get("tries", "1")
    if not host or not port.isdigit() or not tries.isdigit() or int(tries) > MOST_TRIES:
        return web.Response(status=400, text="dial needs host, port and a number of tries")
    responses, errors = [], []
    for _ in range(int(tries)):
        try:
            async with asyncio.timeout(DIAL_TIMEOUT):
                if query.get("protocol", "http") == "udp":
                    responses.append(await _ask_by_datagram(host, int(port), wanted))
                else:
                    responses.append(await _ask_by_http(host, int(port), wanted))
        except (OSError, aiohttp.ClientError) as error:  # TimeoutError is an OSError
            errors.append(str(error) or type(error).__name__)
    body = {key: found for key, found in (("responses", responses), ("errors", errors)) if found}
    return web.Response(text=json.dumps(body))


async def _ask_by_http(host: str, port: int, request: str) -> str:
    where = f"[{host}]" if ":" in host else host
    async with aiohttp.ClientSession() as session, session.get(f"http://{where}:{port}/{request}") as answer:
        return await answer.text()


async def _ask_by_datagram(host: str, port: int, request: str) -> str:
    loop = asyncio.get_running_loop()
    received: asyncio.Future[bytes] = loop.create_future()
    transport, _ = await loop.create_datagram_endpoint(lambda: _Answer(received), remote_addr=(host, port))
    try:
        transport.sendto(request.encode())
        return (await received).decode(errors="replace")
    finally:
        transport.close()


async def leave(request: web.Request) -> web.Response:
    """End with exit status ``code``."""
    code = request.query.get("code", "0")
    if not code.isdigit() or int(code) > 255:
        return web.Response(status=400, text=f"exit status {code!r} is not one")
    asyncio.get_running_loop().call_later(0.1, sys.exit, int(code))
    return web.Response(text=f"exiting with status {code}")


class _Answer(asyncio.DatagramProtocol):
    def __init__(self, received: "asyncio.Future[bytes]") -> None:
        self._received = received

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if not self._received.done():
            self._received.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self._received.done():
            self._received.set_exception(exc)


class UdpAnswers(asyncio.DatagramProtocol):
    """Answers over UDP."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to send."""
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer at once."""
        self._transport.sendto(reply_to(data, addr), addr)


async def _answer_messages(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One SCTP association: an answer for each message."""
    try:
        while data := await reader.read(2048):
            writer.write(reply_to(data, writer.get_extra_info("peername")))
            await writer.drain()
    except ConnectionError:
        return
    finally:
        writer.close()


def _dual_stack(kind: int, port: int, protocol: int = 0) -> socket.socket:
    """A bound socket of both families; asyncio would make an IPv6 one IPv6-only."""
    opened = socket.socket(socket.AF_INET6, kind, protocol)
    opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.bind(("::", port))
    return opened


async def netexec(arguments: argparse.Namespace, stop: asyncio.Event) -> None:
    """Serve until ``stop``. Raises OSError: a port is taken, or the kernel has no SCTP."""
    application = web.Application(middlewares=[logged])
    application.add_routes(
        [
            web.get("/", now),
            web.get("/clientip", clientip),
            web.get("/hostname", hostname),
            web.get("/hostName", hostname),
            web.get("/healthz", healthz),
            web.get("/echo", echo),
            web.get("/header", header),
            web.get("/dial", dial),
            web.get("/exit", leave),
        ]
    )
    runner = web.AppRunner(application, handle_signals=False, shutdown_timeout=1)
    await runner.setup()
    if arguments.udp_port != -1:
        udp = _dual_stack(socket.SOCK_DGRAM, arguments.udp_port)
        await asyncio.get_running_loop().create_datagram_endpoint(UdpAnswers, sock=udp)
        log(f"Started UDP server on port {arguments.udp_port}")
    if arguments.sctp_port != -1:
        sctp = _dual_stack(socket.SOCK_STREAM, arguments.sctp_port, IPPROTO_SCTP)
        await asyncio.start_server(_answer_messages, sock=sctp)
        log(f"Started SCTP server on port {arguments.sctp_port}")
    if arguments.http_port != -1:
        await web.SockSite(runner, _dual_stack(socket.SOCK_STREAM, arguments.http_port)).start()
        log(f"Started HTTP server on port {arguments.http_port}")
    await stop.wait()
    await runner.cleanup()


def parser() -> argparse.ArgumentParser:
    """The image's own commands and options, as far as they are here."""
    found = argparse.ArgumentParser(prog="agnhost", allow_abbrev=False)
    commands = found.add_subparsers(dest="command", required=True)
    commands.add_parser("pause")
    serve = commands.add_parser("netexec", allow_abbrev=False)
    serve.add_argument("--http-port", type=int, default=8080)
    serve.add_argument("--udp-port", type=int, default=8081)
    serve.add_argument("--sctp-port", type=int, default=-1)
    return found


async def run(argv: Sequence[str]) -> None:
    """Parse and run until SIGTERM."""
    arguments = parser().parse_args(argv)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if arguments.command == "netexec":
        await netexec(arguments, stop)
    else:
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1:]))
