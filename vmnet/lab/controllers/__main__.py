"""``python -m vmnet.lab.controllers``: run until SIGTERM or SIGINT."""

import argparse
import asyncio
import logging
import signal
from pathlib import Path

from vmnet.kube.client import KubeClient
from vmnet.lab import topology
from vmnet.lab.controllers.controllers import Controllers


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = argparse.ArgumentParser(prog="python -m vmnet.lab.controllers", description=__doc__)
    found.add_argument("--kubeconfig", type=Path, required=True, metavar="PATH")
    return found


async def _run(kubeconfig: Path) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    kube = await KubeClient.connect(kubeconfig, user_agent="vmnet-lab-controllers")
    try:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(Controllers(kube, topology.LOAD_BALANCER_POOLS).run(), name="controllers")
            await stop.wait()
            running.cancel()
    finally:
        await kube.close()


def main() -> None:
    """Run the stand-ins."""
    options = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(_run(options.kubeconfig))


if __name__ == "__main__":
    main()
