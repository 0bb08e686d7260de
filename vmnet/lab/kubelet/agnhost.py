"""A stand-in for the parts of Kubernetes' ``agnhost`` test image that network tests use: ``netexec`` and ``pause``.

``netexec`` serves ``/``, ``/clientip``, ``/hostname`` and ``/echo?msg=`` over HTTP, and answers UDP by the same words.
"""

import argparse
import asyncio
import signal
import socket
import sys
from collections.abc import Sequence
from typing import cast

from aiohttp import web


async def clientip(request: web.Request) -> web.Response:
    """``address:port`` of the peer, IPv4-mapped addresses unwrapped."""
    peer = request.transport.get_extra_info("peername") if request.transport else None
    if peer is None:
        return web.Response(status=500, text="no peer address")
    address = str(peer[0]).removeprefix("::ffff:")
    return web.Response(text=f"[{address}]:{peer[1]}" if ":" in address else f"{address}:{peer[1]}")


async def hostname(_: web.Request) -> web.Response:
    """The pod's host name."""
    return web.Response(text=socket.gethostname())


async def echo(request: web.Request) -> web.Response:
    """``msg`` back."""
    return web.Response(text=request.query.get("msg", ""))


async def now(_: web.Request) -> web.Response:
    """Something to probe."""
    return web.Response(text=f"NOW: {asyncio.get_running_loop().time()}")


class UdpAnswers(asyncio.DatagramProtocol):
    """``hostname`` and ``clientip`` and ``echo …`` over UDP."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to send."""
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer at once."""
        word, _, rest = data.decode(errors="replace").strip().partition(" ")
        if word.lower() == "echo":
            answer = rest
        elif word.lower() == "clientip":
            answer = f"{addr[0].removeprefix('::ffff:')}:{addr[1]}"
        else:
            answer = socket.gethostname()
        self._transport.sendto(answer.encode(), addr)


async def netexec(arguments: argparse.Namespace, stop: asyncio.Event) -> None:
    """Serve until ``stop``."""
    application = web.Application()
    application.add_routes(
        [web.get("/", now), web.get("/clientip", clientip), web.get("/hostname", hostname), web.get("/echo", echo)]
    )
    runner = web.AppRunner(application, handle_signals=False, shutdown_timeout=1)
    await runner.setup()
    # One dual-stack socket each; asyncio would make an IPv6 one IPv6-only.
    http = socket.create_server(("::", arguments.http_port), family=socket.AF_INET6, dualstack_ipv6=True)
    await web.SockSite(runner, http).start()
    if arguments.udp_port > 0:
        udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        udp.bind(("::", arguments.udp_port))
        await asyncio.get_running_loop().create_datagram_endpoint(UdpAnswers, sock=udp)
    await stop.wait()
    await runner.cleanup()


async def run(argv: Sequence[str]) -> None:
    """Parse and run until SIGTERM."""
    parser = argparse.ArgumentParser(prog="agnhost")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pause")
    serve = commands.add_parser("netexec")
    serve.add_argument("--http-port", type=int, default=8080)
    serve.add_argument("--udp-port", type=int, default=8081)
    arguments = parser.parse_args(argv)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if arguments.command == "netexec":
        await netexec(arguments, stop)
    else:
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1:]))
