"""Keeps one node's rules and announcements what the API's objects say."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from vmnet.kube.api import ENDPOINT_SLICES, NODES, SERVICES, Kube
from vmnet.kube.watch import ListWatch
from vmnet.lab.proxy import rules
from vmnet.lab.proxy.announcing import Announcer, announced
from vmnet.lab.proxy.services import Backend, ServicePort, service_ports
from vmnet.runtime.backoff import Backoff
from vmnet.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

GATHER: Final = 0.03
"""Seconds that further changes are waited for after the first one: a rollout is many."""
TIMEOUT: Final = 20.0
BACKOFF: Final = Backoff(first=0.2, most=5.0, jitter=0.0)


class ProxyError(Exception):
    """A program refused; the message is its own."""


class Proxy:
    """``announcer`` None: load balancer addresses are somebody else's."""

    def __init__(self, kube: Kube, node: str, pod_networks: Sequence[str], announcer: Announcer | None) -> None:
        self._node = node
        self._pod_networks = tuple(pod_networks)
        self._announcer = announcer
        self._informers = {resource: ListWatch(kube, resource) for resource in (SERVICES, ENDPOINT_SLICES, NODES)}
        self._changed = asyncio.Event()
        self._loaded = ""
        self._datagram: dict[str, frozenset[Backend]] = {}

    async def run(self) -> None:
        """Until cancelled. The rules stay: connections outlive this process, as with kube-proxy."""
        for informer in self._informers.values():
            informer.add_handler(lambda *_: self._changed.set())
        async with TaskScope() as scope:
            for resource, informer in self._informers.items():
                scope.service(informer.run(), f"watch {resource.plural}")
            if self._announcer is not None:
                scope.service(self._announcer.run(), "announce")
            for informer in self._informers.values():
                await informer.synced.wait()
            await self._follow()

    async def _follow(self) -> None:
        failures = 0
        while True:
            self._changed.clear()
            try:
                await self._bring_up_to_date()
                failures = 0
            except ProxyError as error:
                failures += 1
                log.error("%s", error)
                await asyncio.sleep(BACKOFF.delay(failures, 1.0))
                continue
            await self._changed.wait()
            await asyncio.sleep(GATHER)

    async def _bring_up_to_date(self) -> None:
        services = list(self._informers[SERVICES].items())
        slices = list(self._informers[ENDPOINT_SLICES].items())
        ports = service_ports(services, slices)
        text = rules.ruleset(ports, self._node, self._pod_networks)
        if text != self._loaded:
            await _feed(("nft", "-f", "-"), text)
            self._loaded = text
            await self._forget_datagrams(ports)
        if self._announcer is not None:
            nodes = self._informers[NODES].items()
            self._announcer.answer_for(announced(services, slices, nodes, self._node))

    async def _forget_datagrams(self, ports: Sequence[ServicePort]) -> None:
        """A UDP client that goes on sending would follow its conntrack entry to an endpoint that is gone for ever."""
        current: dict[str, frozenset[Backend]] = {}
        for port in ports:
            if port.protocol == "udp":
                key = f"{port.service}:{port.port_name}/{port.version}"
                current[key] = frozenset(port.backends)
        for key, before in self._datagram.items():
            for backend in before - current.get(key, frozenset()):
                family = "ipv6" if ":" in backend.address else "ipv4"
                # Exit status 1 says that there was no such entry.
                await _feed(
                    ("conntrack", "-D", "-f", family, "-p", "udp", "--reply-src", backend.address), "", accepted=(0, 1)
                )
        self._datagram = current


async def _feed(argv: Sequence[str], text: str, accepted: Sequence[int] = (0,)) -> None:
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise ProxyError(f"{argv[0]}: {error}") from error
    try:
        async with asyncio.timeout(TIMEOUT):
            _, errors = await process.communicate(text.encode())
    except TimeoutError:
        process.kill()
        await process.wait()
        raise ProxyError(f"{argv[0]} did not end within {TIMEOUT:g} s") from None
    if process.returncode not in accepted:
        raise ProxyError(f"{' '.join(argv)}: {errors.decode(errors='replace').strip()[-2000:]}")
