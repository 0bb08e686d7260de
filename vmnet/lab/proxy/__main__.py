"""``python -m vmnet.lab.proxy``: runs in a node's namespaces until SIGTERM."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from vmnet.kube.client import KubeClient
from vmnet.lab import topology
from vmnet.lab.proxy.announcing import Announcer, Interface
from vmnet.lab.proxy.proxy import Proxy
from vmnet.model.names import MacAddress


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    found = argparse.ArgumentParser(prog="vmnet.lab.proxy", description=__doc__)
    found.add_argument("--node", required=True)
    found.add_argument("--kubeconfig", type=Path, required=True)
    found.add_argument("--interface", default="eth0", help="where load balancer addresses are answered for")
    return found


def _interface(name: str) -> Interface:
    return Interface(name, MacAddress(Path(f"/sys/class/net/{name}/address").read_text().strip()))


async def run(arguments: argparse.Namespace) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    kube = await KubeClient.connect(arguments.kubeconfig, user_agent=f"vmnet-lab-proxy/{arguments.node}")
    networks = (str(topology.DEFAULT_POD_NETWORK), str(topology.DEFAULT_POD_NETWORK_IPV6))
    proxy = Proxy(kube, arguments.node, networks, Announcer(_interface(arguments.interface)))
    try:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(proxy.run(), name="proxy")
            await stop.wait()
            running.cancel()
    finally:
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
