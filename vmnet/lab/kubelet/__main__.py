"""``python -m vmnet.lab.kubelet``: the kubelet of one node of the lab; runs in the node's namespaces."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Final

from aiohttp import web

from vmnet.kube.api import PODS, Object
from vmnet.kube.client import KubeClient
from vmnet.kube.events import Recorder
from vmnet.kube.watch import ListWatch
from vmnet.lab import cgroups, topology
from vmnet.lab.directory import ENVIRONMENT_VARIABLE, LabDirectory
from vmnet.lab.kubelet import components
from vmnet.lab.kubelet.components import ComponentPods
from vmnet.lab.kubelet.network import Network, NetworkError
from vmnet.lab.kubelet.node import NodeReporter
from vmnet.lab.kubelet.pods import Node, PodWorker, remove_leftover
from vmnet.lab.kubelet.runtime import RuntimeFault
from vmnet.lab.kubelet.server import KubeletServer, token_of
from vmnet.runtime.tasks import TaskScope, TaskSet

log = logging.getLogger(__name__)

PORT: Final = 10250


class Kubelet:
    """Gives every pod of this node a worker."""

    def __init__(self, node: Node, informer: ListWatch) -> None:
        self._node = node
        self._informer = informer
        self._workers: dict[str, PodWorker] = {}
        self._tasks = TaskSet()

    async def run(self) -> None:
        """Until cancelled. Pods go on without us."""
        try:
            await self._informer.synced.wait()
            await self._remove_leftovers()
            self._informer.add_handler(self._changed)
            await asyncio.Event().wait()
        finally:
            await self._tasks.close()

    def worker(self, namespace: str, name: str) -> PodWorker | None:
        """The worker of a pod, by its name."""
        for worker in self._workers.values():
            metadata = worker.pod["metadata"]
            if metadata["namespace"] == namespace and metadata["name"] == name:
                return worker
        return None

    def _changed(self, old: Object | None, new: Object | None) -> None:
        # A pod may be replaced by its namesake between two looks: the uid tells.
        if old is not None and (new is None or new["metadata"]["uid"] != old["metadata"]["uid"]):
            gone = self._workers.get(old["metadata"]["uid"])
            if gone is not None:
                gone.vanish()
        if new is None or components.ANNOTATION in (new["metadata"].get("annotations") or {}):
            return
        uid = new["metadata"]["uid"]
        worker = self._workers.get(uid)
        if worker is not None:
            worker.update(new)
            return
        worker = PodWorker(self._node, new)
        self._workers[uid] = worker
        self._tasks.start(self._run(worker), f"pod {new['metadata']['namespace']}/{new['metadata']['name']}")

    async def _run(self, worker: PodWorker) -> None:
        try:
            await worker.run()
        finally:
            self._workers.pop(worker.uid, None)

    async def _remove_leftovers(self) -> None:
        known = {item["metadata"]["uid"] for item in self._informer.items()}
        for directory in sorted(self._node.pods.iterdir()) if self._node.pods.exists() else ():
            if directory.name not in known:
                try:
                    await remove_leftover(self._node, directory)
                except (RuntimeFault, NetworkError) as error:
                    log.warning("%s: %s", directory, error)


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    result = argparse.ArgumentParser(prog="vmnet.lab.kubelet")
    result.add_argument("--node", required=True)
    result.add_argument("--address", action="append", required=True, help="InternalIP, IPv4 first (repeat for IPv6)")
    result.add_argument("--kubeconfig", type=Path)
    result.add_argument("--pod-cidr", action="append", default=[], help="the node's share of the default network")
    result.add_argument("--port", type=int, default=PORT, help="where exec and logs are served")
    result.add_argument(
        "--cluster-dns",
        action="append",
        help=f"name server of pods (default: {topology.OUTSIDE_HOST.ipv4}, the lab's outside host)",
    )
    return result


async def run(arguments: argparse.Namespace) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    directory = LabDirectory(Path(os.environ[ENVIRONMENT_VARIABLE]))
    kube = await KubeClient.connect(arguments.kubeconfig, user_agent=f"vmnet-lab-kubelet/{arguments.node}")
    network = Network()
    node = Node(
        name=arguments.node,
        addresses=tuple(arguments.address),
        kube=kube,
        recorder=Recorder(kube, "kubelet", host=arguments.node),
        network=network,
        pods=directory.pods,
        cluster_dns=tuple(arguments.cluster_dns or [str(topology.OUTSIDE_HOST.ipv4)]),
        cgroups=cgroups.pods(),
    )
    informer = ListWatch(kube, PODS, fields=f"spec.nodeName={arguments.node}")
    kubelet = Kubelet(node, informer)
    ours = ComponentPods(kube, directory, arguments.node, arguments.address, components.NAMESPACE)
    reporter = NodeReporter(kube, arguments.node, arguments.address, arguments.port, network, arguments.pod_cidr)
    runner = web.AppRunner(
        KubeletServer(
            lambda namespace, name: ours.find(namespace, name) or kubelet.worker(namespace, name),
            token_of(arguments.kubeconfig),
        ).application(),
        handle_signals=False,
        shutdown_timeout=1,
        access_log=None,
    )
    await runner.setup()
    for address in arguments.address:
        await web.TCPSite(runner, address, arguments.port).start()
    try:
        async with TaskScope() as scope:
            scope.service(informer.run(), "watch pods")
            scope.service(reporter.run(), "report the node")
            scope.service(kubelet.run(), "run pods")
            scope.service(ours.run(), "show the lab's processes as pods")
            await stop.wait()
    finally:
        await runner.cleanup()
        await kube.close()


def main() -> None:
    """Entry point."""
    logging.basicConfig(
        level=os.environ.get("VMNET_LOG_LEVEL", "INFO"),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    asyncio.run(run(parser().parse_args()))


if __name__ == "__main__":
    main()
