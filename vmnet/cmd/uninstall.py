"""``vmnet uninstall --node``: this node makes pods without vmnet again."""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from vmnet.agent.conflist import Conflist, shim
from vmnet.kernel import namespaces
from vmnet.model.configuration import BY_PATH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument(
        "--node",
        action="store_true",
        help="of the node that this runs on, whose agent has ended. While agents run they do it themselves, on every"
        " node: set agent.installCni to remove",
    )
    for path in ("agent.cniConfigurations", "agent.cniPrograms", "agent.cniSocket"):
        option = BY_PATH[path]
        parser.add_argument(option.flag, type=Path, default=option.default, help=f"{option.explanation} (%(default)s)")
    parser.add_argument("--output", "-o", choices=("text", "json"), default="text", help="%(default)s")


async def run(arguments: argparse.Namespace) -> int:
    """Take it out, and print what was done. Exit status 1 where something is left. Raises OSError."""
    if not arguments.node:
        print("vmnet uninstall: say what of: --node takes the CNI plugin out of this node", file=sys.stderr)
        return 2
    if await _answers(arguments.cni_socket):
        print("vmnet uninstall: an agent runs on this node and would put the plugin back", file=sys.stderr)
        print("  → set agent.installCni to remove and restart it, or end it first", file=sys.stderr)
        return 1
    # Of networks alone, by the name that the agent gives them.
    found = [path.name for path in namespaces.DIRECTORY.glob("vmnet-[0-9]*")]
    conflist = Conflist(arguments.cni_conf_dir, arguments.cni_bin_dir, shim(), remove=True, networks=lambda: found)
    removal = await asyncio.to_thread(conflist.take_out)
    if arguments.output == "json":
        print(json.dumps({"done": removal.done, "left": removal.left}, indent=2))
    else:
        for sentence in removal.done:
            print(sentence)
        for sentence in removal.left:
            print(f"left: {sentence}")
        if not removal.done and not removal.left:
            print("nothing of vmnet is in this node's CNI directories")
    return 1 if removal.left else 0


async def _answers(path: Path) -> bool:
    try:
        async with asyncio.timeout(5):
            _, writer = await asyncio.open_unix_connection(str(path))
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
