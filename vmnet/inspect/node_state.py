"""What the kernel of a node has, as text of the tools that every administrator knows; runs on the node."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmnet.kernel.namespaces import DIRECTORY

SECONDS: Final = 20.0
"""For one command."""
LIMIT: Final = 4 << 20
"""Octets of one output."""
AT_ONCE: Final = 4
_SYSCTLS: Final = (
    *(f"net/ipv4/conf/{where}/{name}" for where in ("all", "default") for name in ("forwarding", "rp_filter")),
    *(f"net/ipv4/conf/all/{name}" for name in ("arp_ignore", "arp_announce", "accept_local", "route_localnet")),
    "net/ipv4/ip_forward",
    "net/ipv4/neigh/default/gc_thresh3",
    *(f"net/ipv6/conf/{where}/{name}" for where in ("all", "default") for name in ("forwarding", "accept_ra")),
    "net/ipv6/conf/all/disable_ipv6",
    "net/ipv6/neigh/default/gc_thresh3",
    *(f"net/bridge/bridge-nf-call-{name}" for name in ("iptables", "ip6tables", "arptables")),
    *(f"net/netfilter/nf_conntrack_{name}" for name in ("count", "max", "buckets", "tcp_be_liberal", "tcp_loose")),
)
COMMANDS: Final[dict[str, tuple[str, ...]]] = {
    "links.json": ("ip", "-d", "-s", "-j", "link", "show"),
    "addresses.json": ("ip", "-d", "-j", "address", "show"),
    "routes.json": ("ip", "-d", "-j", "route", "show", "table", "all"),
    "routes6.json": ("ip", "-6", "-d", "-j", "route", "show", "table", "all"),
    "rules.json": ("ip", "-d", "-j", "rule", "show"),
    "neighbours.json": ("ip", "-d", "-j", "neighbour", "show"),
    "fdb.json": ("bridge", "-d", "-j", "fdb", "show"),
    "vlan.json": ("bridge", "-d", "-j", "vlan", "show"),
    "mdb.json": ("bridge", "-d", "-j", "mdb", "show"),
    "ruleset.json": ("nft", "-j", "list", "ruleset"),
    "sysctls.txt": ("grep", "-s", "", *(f"/proc/sys/{path}" for path in _SYSCTLS)),
}
"""In the node's own namespace and in each network's: file name → command."""
_INCOMPLETE: Final = frozenset({"sysctls.txt"})
"""Of these a failure is no failure: a namespace has not all of what is asked for."""


@dataclass(frozen=True, slots=True)
class Output:
    """One command's. ``path`` begins with ``node`` or the namespace's name."""

    path: str
    how: str
    text: str = ""
    cut: int = 0
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """For ``vmnet sysdump --local``."""
        return {"path": self.path, "how": self.how, "text": self.text, "cut": self.cut, "error": self.error}


async def read(namespaces: Path = DIRECTORY) -> list[Output]:
    """Everything, of the node's namespace and of all networks'."""
    slots = asyncio.Semaphore(AT_ONCE)
    found = await asyncio.to_thread(_present, namespaces)
    places: list[tuple[str, tuple[str, ...]]] = [("node", ())]
    places += [(name, ("ip", "netns", "exec", name)) for name in found]

    async def one(place: str, prefix: Sequence[str], name: str, words: Sequence[str]) -> Output:
        async with slots:
            return await _output(f"{place}/{name}", (*prefix, *words), incomplete=name in _INCOMPLETE)

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(one(place, prefix, name, words), name=f"{place} {name}")
            for place, prefix in places
            for name, words in COMMANDS.items()
        ]
    return [task.result() for task in tasks]


def _present(namespaces: Path) -> list[str]:
    return sorted(path.name for path in namespaces.glob("vmnet-*")) if namespaces.is_dir() else []


async def _output(path: str, words: Sequence[str], *, incomplete: bool) -> Output:
    how = " ".join(words if len(words) < 16 else (*words[:8], "…"))
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return Output(path, how, error=f"{words[0]}: {error.strerror}")
    try:
        async with asyncio.timeout(SECONDS):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return Output(path, how, error=f"it did not end within {SECONDS:g} s")
    if process.returncode and not (incomplete and output):
        said = errors.decode(errors="replace").strip() or f"exit status {process.returncode}"
        return Output(path, how, error=said[:500])
    text = output[:LIMIT].decode(errors="replace")
    return Output(path, how, text, max(0, len(output) - LIMIT))
