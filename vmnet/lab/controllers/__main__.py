"""``python -m vmnet.lab.controllers``: all stand-ins in one process."""

import argparse
import asyncio
import logging
import signal
from pathlib import Path

from vmnet.kube.api import NODES, PODS, Object, object_key
from vmnet.kube.client import KubeClient
from vmnet.kube.events import Recorder
from vmnet.kube.watch import ListWatch
from vmnet.lab.controllers.scheduler import Scheduler
from vmnet.runtime.queue import KeyedQueue, work
from vmnet.runtime.tasks import TaskScope


async def run(kubeconfig: Path) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    kube = await KubeClient.connect(kubeconfig, user_agent="vmnet-lab-controllers")
    try:
        pods, nodes = ListWatch(kube, PODS), ListWatch(kube, NODES)
        queue = KeyedQueue()
        pods.add_handler(lambda _, new: queue.add(object_key(new)) if new is not None else None)

        def nodes_changed(_: Object | None, __: Object | None) -> None:
            for pod in pods.items():
                if not pod["spec"].get("nodeName"):
                    queue.add(object_key(pod))

        nodes.add_handler(nodes_changed)
        scheduler = Scheduler(kube, pods, nodes, Recorder(kube, "default-scheduler"))
        async with TaskScope() as tasks:
            for informer in (pods, nodes):
                tasks.service(informer.run(), f"watch {informer.resource.plural}")
            for informer in (pods, nodes):
                await informer.synced.wait()
            tasks.service(work(queue, scheduler.reconcile, workers=1, kind="pod"), "scheduler")
            await stop.wait()
    finally:
        await kube.close()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="vmnet.lab.controllers")
    parser.add_argument("--kubeconfig", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(run(arguments.kubeconfig))


if __name__ == "__main__":
    main()
