"""``vmnet migration``: what each live migration did to its machine's network, from the records that they leave."""

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from vmnet.controller.migrations import recorded
from vmnet.kube.api import VMIS, Expired, Kube, NotFound, Object, Unavailable, object_key
from vmnet.kube.client import KubeClient
from vmnet.runtime.backoff import Backoff

Record = Mapping[str, Any]

HEADINGS: Final = ("NAMESPACE", "VM", "OUTCOME", "FROM", "TO", "KEY", "BLACKOUT", "ENDED")
_PATIENCE: Final = Backoff()
_EPILOG: Final = """\
A machine's instance (VMI) carries the record of its last migration. KEY is what opened the target's port: the guest's
own frame, or KubeVirt's word (annotation). BLACKOUT is what the datapath saw: from the last frame that the guest sent
on its old node to the first one that reached it on the new one, whatever of that time nobody had anything to say.

examples:
  vmnet migration list                       every machine's last migration
  vmnet migration show blue -n blue-namespace
  vmnet migration watch -o json              one line per migration, as they end
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.epilog = _EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in (
        ("list", "every machine's last migration"),
        ("show", "one machine's last migration, all of it"),
        ("watch", "migrations as they end, until Ctrl-C"),
    ):
        action = actions.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == "show":
            action.add_argument("vm", help="name of the VirtualMachineInstance")
        action.add_argument(
            "-n",
            "--namespace",
            default="default" if name == "show" else None,
            help="of the machine (default: default)" if name == "show" else "only this one (default: all)",
        )
        action.add_argument("-o", "--output", choices=("table", "json"), default="table", help="(%(default)s)")
        action.add_argument("--kubeconfig", type=Path, help="file to connect with (default: $KUBECONFIG)")


async def run(arguments: argparse.Namespace) -> int:
    """Run it. Raises KubeError."""
    kube = await KubeClient.connect(arguments.kubeconfig, user_agent="vmnet-migration")
    as_json = arguments.output == "json"
    try:
        if arguments.action == "show":
            return await show(kube, arguments.namespace, arguments.vm, as_json=as_json)
        if arguments.action == "watch":
            await watch(kube, arguments.namespace, as_json=as_json)
            return 0
        return await list_all(kube, arguments.namespace, as_json=as_json)
    finally:
        await kube.close()


async def list_all(kube: Kube, namespace: str | None, *, as_json: bool) -> int:
    """Print the records of all machines, or of one namespace's."""
    items = (await kube.list(VMIS, namespace)).items
    found = sorted((vmi for vmi in items if recorded(vmi)), key=lambda vmi: str(recorded(vmi).get("ended") or ""))
    if as_json:
        print(json.dumps([_whole(vmi) for vmi in found], indent=2))
    elif found:
        print(table(found))
    else:
        where = f" in namespace {namespace}" if namespace else ""
        print(f"No machine{where} has a record of a migration.", file=sys.stderr)
    return 0


async def show(kube: Kube, namespace: str, name: str, *, as_json: bool) -> int:
    """Print one machine's record."""
    try:
        vmi = await kube.get(VMIS, name, namespace)
    except NotFound:
        print(
            f"vmnet migration: there is no VirtualMachineInstance {namespace}/{name}\n"
            "  → is it running, and is -n its namespace? See: vmnet migration list",
            file=sys.stderr,
        )
        return 1
    if not recorded(vmi):
        print(f"vmnet migration: {namespace}/{name} has not been migrated since it started", file=sys.stderr)
        return 1
    print(json.dumps(_whole(vmi), indent=2) if as_json else details(vmi))
    return 0


async def watch(kube: Kube, namespace: str | None, *, as_json: bool) -> None:
    """Print a line for each migration that ends from now on; only Ctrl-C ends it."""
    seen: dict[str, Any] = {}
    failures, first = 0, True
    while True:
        try:
            listed = await kube.list(VMIS, namespace)
            for vmi in listed.items:
                _tell(vmi, seen, quiet=first, as_json=as_json)
            if first and not as_json:
                print(_line(HEADINGS), flush=True)
            first, failures = False, 0
            async for event in kube.watch(VMIS, listed.resource_version, namespace):
                if "uid" in event.object["metadata"]:
                    _tell(event.object, seen, as_json=as_json)
        except Expired:
            continue  # what has ended meanwhile is in the next list
        except Unavailable as error:
            if first:
                raise
            print(f"vmnet migration: {error}; trying again", file=sys.stderr)
            await asyncio.sleep(_PATIENCE.delay(failures, random.random()))  # noqa: S311 - spreads retries
            failures += 1


def _tell(vmi: Object, seen: dict[str, Any], *, as_json: bool, quiet: bool = False) -> None:
    key, uid = object_key(vmi), recorded(vmi).get("uid")
    if uid is None or seen.get(key) == uid:
        return
    seen[key] = uid
    if not quiet:
        print(json.dumps(_whole(vmi)) if as_json else _line(_row(vmi)), flush=True)


def _whole(vmi: Object) -> dict[str, Any]:
    return {"namespace": vmi["metadata"]["namespace"], "name": vmi["metadata"]["name"], **recorded(vmi)}


def table(found: Iterable[Object]) -> str:
    """Records of machines, a line each, under headings."""
    return "\n".join(_line(cells) for cells in (HEADINGS, *map(_row, found)))


def _line(cells: Iterable[str]) -> str:
    widths = (24, 20, 10, 16, 16, 11, 10, 0)
    return " ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _row(vmi: Object) -> tuple[str, ...]:
    found = recorded(vmi)
    return (
        vmi["metadata"]["namespace"],
        vmi["metadata"]["name"],
        str(found.get("outcome", "")),
        str(_part(found, "from").get("node", "")),
        str(_part(found, "to").get("node", "")),
        str(_part(found, "cutOver").get("key", "-")),
        _milliseconds(found.get("blackoutSeconds")),
        str(found.get("ended") or "-"),
    )


def details(vmi: Object) -> str:
    """One machine's record for people."""
    found, cut_over = recorded(vmi), _part(recorded(vmi), "cutOver")
    lines = {
        "machine": object_key(vmi),
        "outcome": str(found.get("outcome", "")) + (f": {found['reason']}" if found.get("reason") else ""),
        "from": _place(found, "from"),
        "to": _place(found, "to"),
        "network": found.get("network", "-"),
        "addresses": ", ".join(found.get("addresses", ())),
        "MAC": found.get("mac", "-"),
        "mode": found.get("mode") or "-",
        "started": found.get("started") or "-",
        "ended": found.get("ended") or "-",
        "opened by": cut_over.get("key", "-"),
        "annotation after opening": _after(cut_over, "annotationAt"),
        "guest was silent": _milliseconds(found.get("pauseSeconds")),
        "blackout": _blackout(found, cut_over),
        "from opening to first frame": _milliseconds(found.get("deliverySeconds")),
        "announcements": cut_over.get("announcements", "-"),
        "connections": _connections(_part(cut_over, "connections")),
    }
    known = lines.keys() | {"machine", "aborted", "uid", "blackoutSeconds", "cutOver", "mac", "reason"}
    known |= {"pauseSeconds", "deliverySeconds"}
    lines |= {key: json.dumps(value) for key, value in found.items() if key not in known}
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name + ':':<{width}}{value}" for name, value in lines.items())


def _part(found: Record, name: str) -> Record:
    part = found.get(name)
    return part if isinstance(part, dict) else {}


def _place(found: Record, name: str) -> str:
    place = _part(found, name)
    return f"{place.get('node', '-')} (pod {place.get('pod', '-')})"


def _connections(found: Record) -> str:
    """What conntrack had to be told of (docs/migration.md)."""
    if found.get("way") in (None, "nobody"):
        return "-"
    text = f"{found.get('carried', 0)} ({found['way']})"
    return f"{text} in {_milliseconds(found['handOverSeconds'])}" if found.get("handOverSeconds") is not None else text


def _milliseconds(value: Any) -> str:
    return f"{value * 1000:.1f} ms" if isinstance(value, int | float) else "-"


def _blackout(found: Record, cut_over: Record) -> str:
    """With what the two nodes' clocks leave open."""
    error = cut_over.get("lastFrameError")
    return _milliseconds(found.get("blackoutSeconds")) + (f" ± {_milliseconds(error)}" if error is not None else "")


def _after(cut_over: Record, key: str) -> str:
    opened, at = cut_over.get("openedAt"), cut_over.get(key)
    return _milliseconds(at - opened) if isinstance(opened, int | float) and isinstance(at, int | float) else "-"
