"""When probes reached the guests' cards: frames that leave a node by a machine's port, by the kernel's clock.

What a guest answers shows how soon an emulated processor comes to it, too; what reaches its card shows the network.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

PORT: Final = 7007
"""Where the guests answer probes."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One probe at one port. ``at``: seconds since the epoch."""

    at: float
    interface: str
    address: str


def command(namespace: str, addresses: Iterable[str]) -> list[str]:
    """What tells of every frame of a probe to these addresses that leaves the namespace's bridge, until SIGINT."""
    hosts = " or ".join(f"dst host {address}" for address in addresses)
    return [
        *("ip", "netns", "exec", namespace, "tcpdump", "-i", "any", "-Q", "out", "-n", "-tt", "-l", "-B", "8192"),
        *("--time-stamp-precision=nano", f"udp dst port {PORT} and ({hosts})"),
    ]


def deliveries(text: str) -> list[Delivery]:
    """Of tcpdump's lines, ``1795531347.747000000 p3f2a Out IP 192.168.0.9.4444 > 192.168.0.4.7007: UDP, length 16``."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) > 6 and words[2:4] == ["Out", "IP"]:
            found.append(Delivery(float(words[0]), words[1], words[6].rstrip(":").rpartition(".")[0]))
    return found


def gap(source: Sequence[Delivery], target: Sequence[Delivery], stopped: float) -> float | None:
    """Milliseconds between the last that reached the source before its guest stopped, and the first at the target."""
    before = [item.at for item in source if item.at <= stopped]
    after = [item.at for item in target if item.at > stopped]
    return (min(after) - max(before)) * 1e3 if before and after else None


def longest(found: Iterable[Delivery]) -> float | None:
    """Milliseconds of the longest time between two."""
    times = sorted(item.at for item in found)
    return max((later - sooner for sooner, later in pairwise(times)), default=0.0) * 1e3 or None


def at_ports(found: Iterable[Delivery], address: str, ports: Collection[str]) -> list[Delivery]:
    """Those to an address, by these ports."""
    return [item for item in found if item.address == address and item.interface in ports]
