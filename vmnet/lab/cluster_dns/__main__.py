"""``python -m vmnet.lab.cluster_dns``: what the container of the pod in kube-system runs, until SIGTERM."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from aiohttp import web

from vmnet.kube.api import ENDPOINT_SLICES, SERVICES
from vmnet.kube.client import KubeClient
from vmnet.kube.watch import ListWatch
from vmnet.lab.cluster_dns.records import Names, names
from vmnet.lab.cluster_dns.server import Server
from vmnet.lab.directory import ENVIRONMENT_VARIABLE, LabDirectory
from vmnet.runtime.tasks import TaskScope

READY_PORT: Final = 8181
"""Where readiness is asked, as of CoreDNS."""


class Cluster:
    """The cluster's names, made again when something has changed and somebody asks."""

    def __init__(self, kube: KubeClient, domain: str) -> None:
        self.informers = [ListWatch(kube, resource) for resource in (SERVICES, ENDPOINT_SLICES)]
        self._domain = domain
        self._names: Names | None = None
        for informer in self.informers:
            informer.add_handler(self._changed)

    def _changed(self, *_: object) -> None:
        self._names = None

    def names(self) -> Names:
        """What exists now."""
        if self._names is None:
            services, slices = (informer.items() for informer in self.informers)
            self._names = names(services, slices, self._domain)
        return self._names


def nameservers(text: str) -> list[str]:
    """Servers of a resolv.conf."""
    return [words[1] for line in text.splitlines() if (words := line.split())[:1] == ["nameserver"] and words[1:]]


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    found = argparse.ArgumentParser(prog="vmnet.lab.cluster_dns", description=__doc__)
    found.add_argument("--kubeconfig", type=Path, help="default: the lab's own")
    found.add_argument("--domain", default="cluster.local")
    return found


async def run(arguments: argparse.Namespace) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    kubeconfig = arguments.kubeconfig or LabDirectory(Path(os.environ[ENVIRONMENT_VARIABLE])).inner_kubeconfig
    kube = await KubeClient.connect(kubeconfig, user_agent="vmnet-lab-cluster-dns")
    cluster = Cluster(kube, arguments.domain)
    runner = web.AppRunner(_readiness(), handle_signals=False, shutdown_timeout=1, access_log=None)
    try:
        async with TaskScope() as scope:
            for informer in cluster.informers:
                scope.service(informer.run(), f"watch {informer.resource.plural}")
            for informer in cluster.informers:
                await informer.synced.wait()
            scope.service(Server(cluster.names, _upstreams()).run(), "serve")
            await runner.setup()
            await web.TCPSite(runner, None, READY_PORT).start()
            await stop.wait()
    finally:
        await runner.cleanup()
        await kube.close()


def _upstreams() -> Sequence[str]:
    """The node's servers: the pod's policy is ``Default``."""
    return nameservers(Path("/etc/resolv.conf").read_text())


def _readiness() -> web.Application:
    async def ready(_: web.Request) -> web.Response:
        return web.Response(text="OK")

    application = web.Application()
    application.add_routes([web.get("/ready", ready)])
    return application


def main() -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    asyncio.run(run(parser().parse_args()))


if __name__ == "__main__":
    main()
