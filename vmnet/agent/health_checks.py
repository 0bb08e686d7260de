"""Tells load balancers whether this node has endpoints of a Service, by HTTP on the Service's healthCheckNodePort.

For Services with ``externalTrafficPolicy: Local``: a load balancer sends to the nodes that answer 200. Status, headers
and body are kube-proxy's. Where a kube-proxy runs it may have the port already, for it knows the Service too; it counts
the same pods, by the EndpointSlices of the default network, and is left alone.
"""

import asyncio
import errno
import json
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from aiohttp import web

log = logging.getLogger(__name__)

_BACKLOG: Final = 64


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """What is told of one Service. ``endpoints``: how many of its ready ones are on this node."""

    namespace: str
    name: str
    endpoints: int


class HealthChecks:
    """The listeners of one node, one for each port. Belongs to one event loop."""

    def __init__(self, healthy: Callable[[], bool] = lambda: True, host: str = "::") -> None:
        """``healthy``: whether Services are served here at all. ``host``: the address to listen on; ``::`` for all."""
        self._healthy = healthy
        self._host = host
        self._checks: Mapping[int, HealthCheck] = {}
        self._runner: web.AppRunner | None = None
        self._sites: dict[int, web.SockSite] = {}
        self._taken: set[int] = set()
        """Ports that somebody else has."""
        self._changing = asyncio.Lock()

    async def follow(self, checks: Mapping[int, HealthCheck]) -> bool:
        """Serve these ports and no others; False when somebody else has one of them, and it is to be tried again."""
        async with self._changing:
            self._checks = dict(checks)
            for port in self._sites.keys() - checks.keys():
                await self._sites.pop(port).stop()
            self._taken &= checks.keys()
            for port in sorted(checks.keys() - self._sites.keys()):
                await self._listen(port)
            return not self._taken

    async def close(self) -> None:
        """Stop listening."""
        async with self._changing:
            self._sites.clear()
            if self._runner is not None:
                await self._runner.cleanup()
                self._runner = None

    async def _listen(self, port: int) -> None:
        if self._runner is None:
            application = web.Application()
            application.router.add_get("/{path:.*}", self._answer)
            self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
            await self._runner.setup()
        try:
            opened = self._open(port)
        except OSError as error:
            if port not in self._taken:
                log.info(
                    "health checks of %s at port %d are somebody else's: %s", _name(self._checks[port]), port, error
                )
            self._taken.add(port)
            return
        self._taken.discard(port)
        site = web.SockSite(self._runner, opened, backlog=_BACKLOG)
        await site.start()
        self._sites[port] = site

    def _open(self, port: int) -> socket.socket:
        if self._host == "::":
            try:
                return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
            except OSError as error:
                # A node without IPv6.
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
            return socket.create_server(("", port))
        return socket.create_server((self._host, port))

    async def _answer(self, request: web.Request) -> web.Response:
        if request.transport is None:
            raise web.HTTPServiceUnavailable
        check = self._checks.get(request.transport.get_extra_info("sockname")[1])
        if check is None:  # it ends
            raise web.HTTPServiceUnavailable
        healthy = self._healthy()
        body = {
            "service": {"namespace": check.namespace, "name": check.name},
            "localEndpoints": check.endpoints,
            "serviceProxyHealthy": healthy,
        }
        return web.Response(
            status=200 if check.endpoints and healthy else 503,
            text=json.dumps(body, indent="\t"),
            content_type="application/json",
            headers={
                "X-Content-Type-Options": "nosniff",
                "X-Load-Balancing-Endpoint-Weight": str(check.endpoints),
            },
        )


def _name(check: HealthCheck) -> str:
    return f"{check.namespace}/{check.name}"
