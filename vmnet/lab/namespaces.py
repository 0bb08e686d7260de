"""Linux namespaces and mounts, by their system calls: Python 3.11 has no wrapper for them."""

import ctypes
import os
import signal
from pathlib import Path
from typing import Final

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

MS_BIND: Final = 0x1000
MS_MOVE: Final = 0x2000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19
MS_SHARED: Final = 1 << 20
MNT_DETACH: Final = 2

_PR_SET_PDEATHSIG: Final = 1

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")


def unshare(flags: int) -> None:
    """Leave the namespaces in ``flags`` (CLONE_NEW…) for new ones. Raises OSError."""
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(path: str | Path, kind: int = 0) -> None:
    """Enter the namespace that ``path`` (a /proc/…/ns file or a bind mount of one) stands for. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(descriptor, kind), f"setns({path})")
    finally:
        os.close(descriptor)


def mount(source: str | Path, target: str | Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). Raises OSError."""
    _check(
        _libc.mount(os.fsencode(source), os.fsencode(target), kind.encode() or None, flags, data.encode() or None),
        f"mount {source} on {target}",
    )


def unmount(target: str | Path) -> None:
    """Detach a mount, also when it is busy. Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), f"unmount {target}")


def bind(source: str | Path, target: str | Path) -> None:
    """Bind-mount a file or directory. Raises OSError."""
    mount(source, target, flags=MS_BIND)


def make_mounts_private() -> None:
    """Mounts made from now on in this mount namespace stay in it. Raises OSError."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send this process ``number`` when the parent thread ends, however it ends. Raises OSError."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def sysctl(name: str, value: str | int) -> None:
    """Write ``/proc/sys/<name>`` (slashes, not dots) of this network namespace. Raises OSError."""
    Path("/proc/sys", name).write_text(f"{value}\n")
