"""``python -m vmnet.lab.virt controller`` (one in the cluster) and ``… handler`` (one on each node)."""

import argparse
import asyncio
import logging
import os
import signal
from contextlib import suppress
from pathlib import Path

from vmnet.kube.client import KubeClient
from vmnet.lab import directory
from vmnet.lab.guest.image import guest_image
from vmnet.lab.virt import controller, handler, qemu

log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = argparse.ArgumentParser(prog="python -m vmnet.lab.virt", description=__doc__)
    roles = found.add_subparsers(dest="role", required=True)
    one = roles.add_parser("controller")
    each = roles.add_parser("handler")
    each.add_argument("--node-name", "--node", dest="node", required=True)
    each.add_argument("--address", action="append", default=[], help="of this node (default: its InternalIPs)")
    for role in (one, each):
        role.add_argument("--kubeconfig", type=Path, required=True)
    return found


async def _controller(options: argparse.Namespace) -> None:
    kube = await KubeClient.connect(options.kubeconfig, user_agent="virt-controller")
    try:
        await asyncio.to_thread(_choose_accelerator)
        await controller.run(kube)
    finally:
        await kube.close()


def _choose_accelerator() -> None:
    """Once, before the first machine: the first guest should not wait for it, and the lab says what was found."""
    accelerator = qemu.choose_accelerator(guest_image(log.info))
    log.info("accelerator: %s (%s)", accelerator.name, accelerator.reason)
    place = os.environ.get(directory.ENVIRONMENT_VARIABLE)
    if place:
        temporary = Path(place, ".accelerator")
        temporary.write_text(accelerator.name + "\n")
        temporary.rename(Path(place, "accelerator"))


async def _handler(options: argparse.Namespace) -> None:
    kube = await KubeClient.connect(options.kubeconfig, user_agent="virt-handler")
    try:
        addresses = tuple(options.address) or await handler.node_addresses(kube, options.node)
        await handler.Handler(kube, options.node, addresses).run()
    finally:
        await kube.close()


async def _until_told(options: argparse.Namespace) -> None:
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    if task is not None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
    await (_controller(options) if options.role == "controller" else _handler(options))


def main() -> None:
    """Entry point."""
    options = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with suppress(asyncio.CancelledError, KeyboardInterrupt):
        asyncio.run(_until_told(options))


if __name__ == "__main__":
    main()
