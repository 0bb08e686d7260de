"""``vmnet uninstall``: takes vmnet out of a node, or out of a cluster's objects, and says what it cannot take."""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final

from vmnet.agent.conflist import RESULTS, Conflist, shim
from vmnet.agent.removal import remove_datapath
from vmnet.controller.removal import withdraw
from vmnet.kernel.api import KernelError
from vmnet.kernel.linux import LinuxKernel
from vmnet.kube.client import KubeClient
from vmnet.model.configuration import BY_PATH
from vmnet.model.removal import Removal

_EPILOG: Final = """\
in this order:
  kubectl delete -k deploy/controller -k deploy/agent        nobody writes any more; all traffic goes on
  vmnet uninstall --node                                     on every node that is drained
  vmnet uninstall --cluster                                  what the controller wrote
  kubectl delete -k deploy/                                  the rest; with the definitions go the tenants' networks

Exit status 1 where something is left that must go first, which is said.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--node",
        action="store_true",
        help="the CNI plugin and the datapath of the node that this runs on, whose agent has ended. While agents run"
        " they take out the plugin themselves, on every node: set agent.installCni to remove",
    )
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="finalizers, numbers of nodes, mirrored EndpointSlices and webhooks; networks and claims stay, for they"
        " are the tenants'",
    )
    parser.add_argument(
        "--with-ports",
        action="store_true",
        help="also the networks that pods of the node are attached to: these pods have no network then",
    )
    for path in (
        *("agent.cniConfigurations", "agent.cniPrograms", "agent.cniSocket"),
        *("controller.namespace", "shared.kubeconfig"),
    ):
        option = BY_PATH[path]
        kind = Path if path.startswith("agent.") or option.default is None else str
        parser.add_argument(option.flag, type=kind, default=option.default, help=f"{option.explanation} (%(default)s)")
    parser.add_argument(
        "--cni-results", type=Path, default=RESULTS, help="where the runtime remembers attachments (%(default)s)"
    )
    parser.add_argument("--output", "-o", choices=("text", "json"), default="text", help="%(default)s")


async def run(arguments: argparse.Namespace) -> int:
    """Take it out, and print what was done. Exit status 1 where something is left. Raises KubeError, OSError."""
    if not arguments.node and not arguments.cluster:
        print("vmnet uninstall: say what of: --node, or --cluster (see --help)", file=sys.stderr)
        return 2
    removal = Removal()
    if arguments.node:
        if await _answers(arguments.cni_socket):
            print("vmnet uninstall: an agent runs on this node and would put everything back", file=sys.stderr)
            print("  → end it first; or let it take out the plugin: set agent.installCni to remove", file=sys.stderr)
            return 1
        try:
            removal += await _from_node(arguments)
        except KernelError as error:
            print(f"vmnet uninstall: {error}", file=sys.stderr)
            return 1
    if arguments.cluster:
        kube = await KubeClient.connect(arguments.kubeconfig, user_agent="vmnet-uninstall")
        try:
            removal += await withdraw(kube, arguments.namespace)
        finally:
            await kube.close()
    if arguments.output == "json":
        print(json.dumps(asdict(removal), indent=2))
    else:
        for sentence in (*removal.done, *(f"stays: {item}" for item in removal.kept)):
            print(sentence)
        for sentence in removal.left:
            print(f"left: {sentence}")
        if removal == Removal():
            print("there is nothing of vmnet")
    return 1 if removal.left else 0


async def _from_node(arguments: argparse.Namespace) -> Removal:
    kernel = LinuxKernel()
    try:
        removal, attached = await remove_datapath(kernel, arguments.cni_socket.parent, with_ports=arguments.with_ports)
    finally:
        await kernel.close()
    directories = arguments.cni_conf_dir, arguments.cni_bin_dir
    results = arguments.cni_results
    conflist = Conflist(*directories, shim(), remove=True, networks=lambda: attached, results=results)
    return removal + await asyncio.to_thread(conflist.take_out)


async def _answers(path: Path) -> bool:
    try:
        async with asyncio.timeout(5):
            _, writer = await asyncio.open_unix_connection(str(path))
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
