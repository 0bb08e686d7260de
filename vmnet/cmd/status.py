"""``vmnet status``: every component, node and network, what is broken, why, and the next step."""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

from vmnet.inspect import connection, status_text
from vmnet.inspect.connection import Connection
from vmnet.inspect.errors import InspectionError
from vmnet.inspect.facts import collect
from vmnet.inspect.local import ask
from vmnet.inspect.verdicts import Grade, Verdict, judge
from vmnet.kube.api import Kube, KubeError
from vmnet.model.configuration import BY_PATH
from vmnet.runtime.tasks import first_failure

BROKEN: Final = 1
UNREADABLE: Final = 2
AGAIN_SECONDS: Final = 2.0
"""Between two looks with ``--wait``."""
_EPILOG: Final = """\
Nodes are looked at by a command in their agents' pods, through kubectl: this needs the right to exec there, and gives
vmnet's own accounts none.

exit status:
  0  all is well (warnings do not count)
  1  something is broken
  2  something could not be looked at, and nothing else is broken

examples:
  vmnet status
  vmnet status --wait --timeout 300          after an installation or an upgrade
  vmnet status -o json | jq '.findings'
  kubectl vmnet status --context production
  kubectl exec -n vmnet-system ds/vmnet-agent -- vmnet status --local      one node, asked on the node
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.epilog = _EPILOG
    connection.add_arguments(parser)
    parser.add_argument("--wait", action="store_true", help="until all is well, with progress on standard error")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="for --wait (default: %(default)g)"
    )
    parser.add_argument("--output", "-o", choices=("text", "json"), default="text", help="(%(default)s)")
    parser.add_argument("--local", action="store_true", help="of this node alone, asked from its agent by its socket")
    parser.add_argument(
        "--socket", type=Path, default=BY_PATH["dns.socket"].default, help="the agent's, for --local (%(default)s)"
    )


async def run(arguments: argparse.Namespace) -> int:
    """Look, print. Exit status: see the epilog."""
    if arguments.local:
        return await local(arguments)
    chosen = Connection.of(arguments)
    try:
        kube = await chosen.kube("vmnet-status")
    except KubeError as error:
        return _unreadable(error)
    try:
        verdict = await _look(kube, chosen, arguments.timeout if arguments.wait else None)
    except (KubeError, InspectionError) as error:
        return _unreadable(error)
    finally:
        await kube.close()
    print(status_text.json_text(verdict) if arguments.output == "json" else status_text.text(verdict))
    return {Grade.BROKEN: BROKEN, Grade.UNKNOWN: UNREADABLE}.get(verdict.grade, 0)


async def _look(kube: Kube, chosen: Connection, seconds: float | None) -> Verdict:
    """One look; with ``seconds``, looks until all is well or that time is over: then the last one.

    Raises KubeError, InspectionError."""
    until, told = time.monotonic() + (seconds or 0.0), ""
    while True:
        verdict, failure = None, None
        try:
            verdict = judge(await _collect(kube, chosen))
        except KubeError as error:
            failure = error
        if verdict is not None and (seconds is None or verdict.grade in (Grade.OK, Grade.WARNING)):
            return verdict
        if failure is not None and seconds is None:
            raise failure
        says = _missing(verdict) if verdict is not None else f"the API cannot be read: {failure}"
        if says != told:
            print(f"waiting: {says}", file=sys.stderr, flush=True)
            told = says
        if time.monotonic() + AGAIN_SECONDS > until:
            if verdict is not None:
                return verdict
            raise failure or KubeError("the API was not asked")
        await asyncio.sleep(AGAIN_SECONDS)


def _missing(verdict: Verdict) -> str:
    """What a verdict that is not good waits for."""
    first, *more = [item for item in verdict.findings if item.grade in (Grade.BROKEN, Grade.UNKNOWN)]
    return f"{first.about}: {first.says}" + (f" (and {len(more)} more)" if more else "")


async def _collect(kube: Kube, chosen: Connection) -> Any:
    try:
        return await collect(kube, chosen)
    except ExceptionGroup as group:
        # The first of what the lists have raised; the others say the same.
        raise first_failure(group) from group


def _unreadable(error: KubeError | InspectionError) -> int:
    print(f"vmnet status: {error}", file=sys.stderr)
    step = (
        error.next_step if isinstance(error, InspectionError) else "does kubectl get nodes work with this kubeconfig?"
    )
    if step:
        print(f"  → {step}", file=sys.stderr)
    return UNREADABLE


async def local(arguments: argparse.Namespace) -> int:
    """What the agent of this node says of it."""
    try:
        found = await ask(arguments.socket, "status")
    except OSError as error:
        print(f"vmnet status: {error}", file=sys.stderr)
        print("  → --local is for a node, in the agent's pod; without it the whole cluster is asked", file=sys.stderr)
        return UNREADABLE
    if arguments.output == "json":
        print(json.dumps(found))
    else:
        print(local_text(found))
    well = not (found["notReady"] or found["faults"] or any(network["faults"] for network in found["networks"]))
    return 0 if well else BROKEN


def local_text(found: dict[str, Any]) -> str:
    """For people."""
    lines = [f"node {found['node']}: agent {found['version']}, {'not ready' if found['notReady'] else 'ready'}"]
    lines += [f"  not ready: {reason}" for reason in found["notReady"]]
    lines += [f"  broken: {fault}" for fault in found["faults"]]
    chained = found["cniConfiguration"]
    if chained is not None:
        lines.append(f"  CNI configuration: {chained['path'] or 'none'}")
    lines += [f"  behind in {item['kind']}: {item['failure']}" for item in found["watches"] if item["failure"]]
    lines += [
        f"  {item['kind']} {item['key']} failed {item['times']} times: {item['error']}" for item in found["failing"]
    ]
    for network in found["networks"]:
        ports = network.get("ports") or ()
        waiting = sum(port["state"] == "standby" for port in ports)
        lines.append(f"  network {network['name']}: {len(ports)} ports" + (f", {waiting} standby" if waiting else ""))
        lines += [f"    broken: {fault}" for fault in network["faults"]]
    return "\n".join(lines)
