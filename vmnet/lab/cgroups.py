"""cgroups (version 2) of a lab: as on a real node, each kubelet and each pod has its own.

``/vmnet-lab/<lab>/<node>/kubelet.service`` holds the node's kubelet and nothing else, ``…/<node>/kubepods/<uid>`` the
processes of a pod: a packet filter can tell a kubelet's probes from what anybody else on the node sends. Directories
outlive the processes that were in them, so whoever ends or starts a lab removes what dead ones have left. A machine
without cgroup v2, or with a read-only one, has a lab without them.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from vmnet.lab import namespaces

MOUNT: Final = Path("/sys/fs/cgroup")
"""Where every host of the lab has the hierarchy, wherever the machine has it."""
ROOT: Final = "vmnet-lab"
KUBELET: Final = "kubelet.service"
PODS: Final = "kubepods"
_ATTEMPTS: Final = 5


def hierarchy(mountinfo: str | None = None) -> Path | None:
    """Where this mount namespace has cgroup v2 as a whole; None when it has not."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    for line in text.splitlines():
        words, _, rest = line.partition(" - ")
        root, target = words.split()[3:5]
        if rest.split()[0] == "cgroup2" and root == "/":
            return Path(target)
    return None


def mount_sys() -> None:
    """A /sys that shows the network namespace of this process, with cgroup v2 where the machine has it. Raises OSError.

    sysfs shows the network namespace of whoever mounted it."""
    present = hierarchy() is not None
    namespaces.mount("sysfs", "/sys", "sysfs")
    if present:
        namespaces.mount("cgroup2", MOUNT, "cgroup2")


def kubelet(lab: str, node: str) -> Path:
    """Directory, in a host of the lab, of a node's kubelet."""
    return MOUNT / ROOT / lab / node / KUBELET


def pods() -> Path | None:
    """Directory for the pods of the kubelet that asks; None when it has no cgroup of its own."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, _, path = line.split(":", 2)
        if number == "0" and path.endswith(f"/{KUBELET}"):
            return MOUNT / path.lstrip("/").removesuffix(KUBELET) / PODS
    return None


def make(directory: Path) -> bool:
    """Make a cgroup; False where there is no hierarchy to make it in."""
    if not (MOUNT / "cgroup.procs").exists():
        return False
    for _ in range(_ATTEMPTS):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:  # another lab that ends took the empty root away in between
            continue
        except OSError:  # read-only, or delegated to nobody
            return False
        return True
    return False


def enter(directory: Path) -> None:
    """Move this process; what it starts from now on begins there. Raises OSError."""
    (directory / "cgroup.procs").write_text("0")


def entering(directory: Path | None) -> tuple[str, ...]:
    """Words before a command that shall run in a cgroup from its first instruction on."""
    if directory is None:
        return ()
    return ("sh", "-c", 'echo 0 >"$0" && exec "$@"', str(directory / "cgroup.procs"))


def remove(directory: Path) -> bool:
    """Remove a cgroup and those below it; False when a process is still in one of them."""
    for folder, _, _ in os.walk(directory, topdown=False):
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return True


def remove_lab(lab: str) -> None:
    """Called on the machine when all processes of a lab have ended."""
    root = hierarchy()
    if root is not None and remove(root / ROOT / lab):
        with suppress(OSError):  # other labs are in it
            (root / ROOT).rmdir()


def labs() -> list[str]:
    """Called on the machine: labs, living and dead, that have cgroups."""
    root = hierarchy()
    if root is None or not (root / ROOT).is_dir():
        return []
    return sorted(path.name for path in (root / ROOT).iterdir() if path.is_dir())
