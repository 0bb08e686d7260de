"""``vmnet controller``: one leader per cluster reconciles; the others keep their caches warm and wait."""

import argparse
import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from aiohttp import web

from vmnet import metrics
from vmnet.cmd import sources
from vmnet.controller.agent_certificates import Signer
from vmnet.controller.cluster import WATCHED, Cluster
from vmnet.controller.controller import Controller
from vmnet.controller.webhook import Keeper, Place, Reviewer, Server
from vmnet.kube.api import (
    CLAIMS,
    CUDNS,
    NADS,
    NAMESPACES,
    UDNS,
    VMIMS,
    VMIS,
    VMS,
    AlreadyExists,
    Kube,
    NotFound,
    Unavailable,
)
from vmnet.kube.client import KubeClient
from vmnet.kube.lease import Elector
from vmnet.kube.watch import ListWatch
from vmnet.runtime.backoff import Backoff
from vmnet.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

LEASE: Final = "vmnet-controller"
_PATIENCE: Final = Backoff()
_MAY_BE_ABSENT: Final = {VMS, VMIS, VMIMS}
"""KubeVirt may not be installed. Our own CRDs may not be there yet either, but without them there is no work."""
_OWN: Final = (UDNS, CUDNS, NADS, CLAIMS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    sources.add_arguments(parser, "shared", "controller")


async def _elect(kube: Kube, namespace: str, elector: Elector, leading: Callable[[], Awaitable[None]]) -> None:
    """Stand for election, in a namespace that exists: outside a cluster nobody has applied the manifests for us."""
    failures = 0
    while True:
        try:
            try:
                await kube.get(NAMESPACES, namespace)
            except NotFound:
                await kube.create(NAMESPACES, {"metadata": {"name": namespace}})
                log.info("namespace %s created", namespace)
        except AlreadyExists:
            break
        except Unavailable as error:
            failures += 1
            log.warning("namespace %s: %s", namespace, error)
            await asyncio.sleep(_PATIENCE.delay(failures, random.random()))  # noqa: S311
        else:
            break
    await elector.run(leading)


async def run(arguments: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT (0), or until the lease is lost (1: whoever started us starts us again)."""
    settled = sources.settle(arguments)
    logging.getLogger().setLevel(settled.configuration.shared.log_level.upper())
    settled.tell("shared", "controller")
    shared, own = settled.configuration.shared, settled.configuration.controller
    namespace = own.namespace
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    kube = await KubeClient.connect(shared.kubeconfig, user_agent="vmnet-controller")
    try:
        informers = {resource: ListWatch(kube, resource, optional=resource in _MAY_BE_ABSENT) for resource in WATCHED}
        cluster = Cluster(informers)
        controller = Controller(kube, cluster, namespace=namespace)
        identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}_{secrets.token_hex(4)}"
        elector = Elector(kube, namespace=namespace, name=LEASE, identity=identity)
        lost = False
        place = Place(namespace, own.webhook_url)
        served = (own.webhook_address.host, own.webhook_address.port) if own.webhook_address else None
        webhook = Server(kube, Reviewer(kube, cluster, namespace), place, served) if served else None

        def ready() -> str | None:
            return "\n".join(missing()) or None

        def missing() -> Iterator[str]:
            behind = sorted(item.resource.plural for item in informers.values() if not item.synced.is_set())
            if behind:
                missing = [resource.plural for resource in _OWN if informers[resource].missing]
                hint = f" (CRDs not installed: {', '.join(missing)})" if missing else ""
                yield f"not listed yet: {', '.join(behind)}{hint}"
            if elector.leading and not controller.ready.is_set():
                yield "reservations are being loaded"
            if webhook is not None and not webhook.addresses:
                yield "the webhook has no certificate yet: the leader makes it"

        async def leading() -> None:
            nonlocal lost
            metrics.LEADING.labels(LEASE).set(1)
            try:
                async with TaskScope() as duties:
                    duties.service(Signer(kube, namespace).run(), "agents' certificates")
                    if webhook is not None:
                        duties.service(Keeper(kube, place).run(), "webhook certificates")
                    await controller.run()
            finally:
                metrics.LEADING.labels(LEASE).set(0)
                # Only a fresh process may lead again: this one's memory may be behind what the next leader writes.
                lost = not stop.is_set()
                stop.set()

        metrics.LEADING.labels(LEASE).set(0)
        runner = web.AppRunner(metrics.application(ready), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, own.metrics_address.host, own.metrics_address.port).start()
            async with TaskScope() as tasks:
                for informer in informers.values():
                    tasks.service(informer.run(), f"watch {informer.resource.plural}")
                if webhook is not None:
                    tasks.service(webhook.run(), "webhook")
                election = tasks.start(_elect(kube, namespace, elector, leading), "election")
                log.info("controller %s, cluster domain %s", identity, shared.cluster_domain)
                await stop.wait()
                election.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    # The elector gives the lease back, so that the next leader need not wait for it to expire.
                    await election
        finally:
            await runner.cleanup()
        if lost:
            log.error("the lease was lost")
        return 1 if lost else 0
    finally:
        await kube.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
