"""``vmnet sysdump``: one redacted archive of all that somebody needs to find out what is wrong with a cluster."""

import argparse
import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import aiohttp

from vmnet.inspect import collection, connection, node_state
from vmnet.inspect.archive import Entry
from vmnet.inspect.connection import Connection

METRICS_SECONDS: Final = 20.0
_EPILOG: Final = """\
In it: versions, the report of vmnet status, objects of networks and of vmnet, logs and metrics of controllers and
agents, and what each node's kernel has. Values of Secrets, credentials and cloud-init are taken out; names, addresses
and events of tenants are in it. MANIFEST.json lists each file, how it was got, and what failed. The archive is written
also where parts cannot be had.

examples:
  vmnet sysdump
  vmnet sysdump -o /tmp/before-upgrade.tar.gz --context production
  kubectl vmnet sysdump
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.epilog = _EPILOG
    connection.add_arguments(parser)
    parser.add_argument(
        "--output", "-o", type=Path, metavar="FILE", help="(default: vmnet-sysdump-<time>.tar.gz in this directory)"
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument("--local", action="store_true", help="what this node's kernel has, as JSON to standard output")
    parser.add_argument("--metrics-of", metavar="URL", help="print what is served there, nothing else")


async def run(arguments: argparse.Namespace) -> int:
    """Write it. Raises KubeError, InspectionError, OSError."""
    if arguments.metrics_of:
        return await _metrics(arguments.metrics_of)
    if arguments.local:
        outputs = await node_state.read()
        print(json.dumps({"outputs": [item.as_json() for item in outputs]}))
        return 0
    path = arguments.output or Path(f"vmnet-sysdump-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.tar.gz")
    chosen = Connection.of(arguments)
    kube = await chosen.kube("vmnet-sysdump")
    try:
        missed = await collection.write(
            kube,
            chosen,
            path,
            force=arguments.force,
            tell=lambda text: print(f"sysdump: {text}", file=sys.stderr, flush=True),
        )
    finally:
        await kube.close()
    for line in told(missed):
        print(f"sysdump: not in it: {line}", file=sys.stderr)
    print(path)
    return 0


def told(missed: Iterable[Entry]) -> list[str]:
    """What could not be had, a line for each reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in missed:
        name = entry.path or entry.how
        found.setdefault((name.rpartition("/")[2], " ".join(entry.error.split())), []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} like it' * (len(names) > 1)}: {why}" for (_, why), names in found.items()
    ]


async def _metrics(url: str) -> int:
    timeout = aiohttp.ClientTimeout(total=METRICS_SECONDS)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
            response.raise_for_status()
            print(await response.text(), end="")
    except (TimeoutError, aiohttp.ClientError) as error:
        print(f"vmnet sysdump: {url}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    return 0
