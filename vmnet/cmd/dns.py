"""``vmnet dns query``: what a network is answered, and where the answer comes from."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from vmnet.inspect.local import ask
from vmnet.model.configuration import BY_PATH

ELSEWHERE: Final = """\
The agent of a node that has the network answers. Which nodes have pods of it, and the agent's pod there:
  kubectl get pods -A -o wide
  kubectl get pods -n vmnet-system -l app.kubernetes.io/name=vmnet-agent -o wide
Ask in that pod:
  kubectl exec -n vmnet-system POD -- vmnet dns query NETWORK NAME"""
_WHY: Final = {
    "local": "from the records of this network",
    "forwarded": "asked of the world just now",
    "cached": "asked of the world before, and kept",
    "stale": "kept beyond its time, because no upstream answers",
    "failed": "no upstream answered",
    "refused": "this network may not know, or nobody is there to be asked",
    "malformed": "no question that could be answered",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    commands = parser.add_subparsers(dest="dns_command", metavar="COMMAND", required=True)
    query = commands.add_parser(
        "query",
        help="what a network is answered, and where the answer comes from",
        description="Ask a network's responder on this node, as the network's own guests would, and say why the answer "
        "is what it is. Run it on a node, or in the agent's pod: kubectl exec -n vmnet-system ds/vmnet-agent -- …",
    )
    query.add_argument("network", help="name of the network, e.g. blue-namespace_happy-tenant")
    query.add_argument("name", help="name to ask for, in full")
    query.add_argument("--type", "-t", default="A", help="A, AAAA, SRV, PTR, … (%(default)s)")
    query.add_argument("--output", "-o", choices=("text", "json"), default="text", help="%(default)s")
    query.add_argument(
        "--socket",
        type=Path,
        default=BY_PATH["dns.socket"].default,
        help="the agent's socket (%(default)s)",
    )


async def run(arguments: argparse.Namespace) -> int:
    """Ask, print. Exit status 1 where the name has no records of that type. Raises OSError when no agent is there."""
    question = {"network": arguments.network, "name": arguments.name, "type": arguments.type}
    try:
        found = await ask(arguments.socket, "dns", question)
    except OSError as error:
        raise OSError(f"{error}\n{ELSEWHERE}") from error
    if "error" in found:
        print(f"vmnet dns: {found['error']}", file=sys.stderr)
        if found.get("elsewhere"):
            print(ELSEWHERE, file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if arguments.output == "json" else text(found))
    return 0 if found["answers"] else 1


def text(found: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{found['name']} {found['type']} in {found['network']}: {found['rcode']}"]
    lines += [f"  {item['name']} {item['ttl']} {item['type']} {item['data']}" for item in found["answers"]]
    lines.append(f"{found['outcome']}: {_WHY[found['outcome']]}")
    if found["zone"]:
        lines.append(f"zone: {found['zone']}")
    if found["alias"]:
        lines.append(f"alias out of this network: {found['alias']}")
    if found["upstream"]:
        kept = f", {found['ageSeconds']} s ago" if found["ageSeconds"] else ""
        lines.append(f"answered by: {found['upstream']}{kept}")
    if found["upstreams"]:
        lines.append(f"upstreams: {', '.join(found['upstreams'])}")
    return "\n".join(lines)
