"""Where the node's kubelet is in the hierarchy of control groups (version 2), so that its packets can be told."""

import os
from pathlib import Path
from typing import Final

from vmnet.plan.state import Cgroup

MOUNT: Final = Path("/sys/fs/cgroup")
"""Where nft looks paths up; there is no option."""
PROCESSES: Final = Path("/proc")
UNIT: Final = "/kubelet.service"
PROGRAM: Final = "kubelet"


def kubelet(path: str | None = None) -> Cgroup | None:
    """The group at ``path``, or else the one of the process of this network namespace that is the kubelet.

    That process is known by its systemd unit or by its name. None when there is no such group, when it is the root
    (everything is in that), or when the hierarchy is not mounted where nft looks.
    """
    if not (MOUNT / "cgroup.controllers").exists():
        return None
    found = _find() if path is None else path
    return at(found) if found is not None else None


def at(path: str) -> Cgroup | None:
    """The group at a path, as it is now: systemd makes a new directory for a unit that it starts again."""
    name = path.strip("/")
    try:
        return Cgroup(name, os.stat(MOUNT / name).st_ino) if name else None
    except OSError:
        return None


def _find() -> str | None:
    own = _network(PROCESSES / "self")
    for process in PROCESSES.iterdir():
        if not process.name.isdecimal():
            continue
        try:
            path = path_in((process / "cgroup").read_text())
            if path is None:
                continue
            named = path.endswith(UNIT) or (process / "comm").read_text().strip() == PROGRAM
            if named and _network(process) == own:
                return path
        except OSError:  # it ended meanwhile
            continue
    return None


def path_in(text: str) -> str | None:
    """The path in the version 2 hierarchy that a process's ``cgroup`` file tells; None when it is the root."""
    for line in text.splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            return path if path != "/" else None
    return None


def _network(process: Path) -> tuple[int, int]:
    found = os.stat(process / "ns" / "net")
    return found.st_dev, found.st_ino
