"""Network namespaces: where they are, how they are made, and threads that go into them."""

import asyncio
import ctypes
import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from vmnet.model.names import NamespaceName

DIRECTORY: Final = Path("/run/netns")
CLONE_FS: Final = 0x00000200
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWNET: Final = 0x40000000
"""linux/sched.h."""
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_SHARED: Final = 1 << 20
MNT_DETACH: Final = 2
"""linux/mount.h."""
THREADS: Final = 32
"""One look at a network takes eight at once, and a cut-over does not wait for the looks at others."""
T = TypeVar("T")
_THREAD: Final = "/proc/thread-self/ns/net"

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def path_of(namespace: NamespaceName) -> Path:
    """The file that stands for a network namespace."""
    return DIRECTORY / namespace


def add(namespace: NamespaceName) -> None:
    """Make a network namespace, as ``ip netns add`` does: its file keeps it. Raises OSError.

    The calling thread is in the new namespace afterwards.
    """
    path = path_of(namespace)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        _mount(None, path.parent, MS_SHARED | MS_REC)
    except OSError as error:
        # Not a mount of its own yet; who first makes a namespace makes it one, or namespaces would be mounted twice.
        if error.errno != errno.EINVAL:
            raise
        _mount(path.parent, path.parent, MS_BIND | MS_REC)
        _mount(None, path.parent, MS_SHARED | MS_REC)
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    try:
        _check(_LIBC.unshare(CLONE_NEWNET), "unshare")
        _mount(Path(_THREAD), path, MS_BIND)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def remove(namespace: NamespaceName) -> None:
    """Take away the file that keeps a network namespace. Raises OSError, not when there is none."""
    path = path_of(namespace)
    with suppress(OSError):  # a file that nothing is mounted on
        _check(_LIBC.umount2(os.fsencode(path), MNT_DETACH), f"unmount {path}")
    path.unlink(missing_ok=True)


class Workers:
    """Threads that run short functions inside network namespaces. The event loop's thread never leaves its own.

    A program that a function runs is in the namespace from its start, which costs one ``exec`` less than ``nsenter``.

    With ``mounts`` (a /proc/…/ns/mnt file) the threads see the files of that mount namespace: in a container
    ``/run/netns`` and ``/proc/sys`` are not the node's, or cannot be written. Nothing may be imported or executed by
    them then.
    """

    def __init__(self, mounts: Path | None = None, threads: int = THREADS) -> None:
        self._mounts = mounts
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="netns")
        # All of them now: beside a calculation a thread takes milliseconds to start, and who starts it waits for that.
        together = threading.Barrier(threads)
        for _ in range(threads):
            self._executor.submit(together.wait)
        self._thread = threading.local()
        self._home = os.open(_THREAD, os.O_RDONLY | os.O_CLOEXEC)

    def _begin(self) -> None:
        if self._mounts is not None:
            descriptor = os.open(self._mounts, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # Only who shares root and working directory with nobody may change mount namespaces.
                _check(_LIBC.unshare(CLONE_FS), "unshare")
                _check(_LIBC.setns(descriptor, CLONE_NEWNS), f"setns {self._mounts}")
            finally:
                os.close(descriptor)
        self._thread.ready = True

    async def run(self, netns: str | None, function: Callable[[], T]) -> T:
        """Result of ``function`` in the namespace at path ``netns`` (None: the own one). Raises OSError.

        Cancelled, it still waits for the end: whoever cleans up then must not meet the function at work.
        """
        future = asyncio.get_running_loop().run_in_executor(self._executor, self._run, netns, function)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait((future,))
            if not future.cancelled():
                future.exception()  # nobody asks for it any more
            raise

    def _run(self, netns: str | None, function: Callable[[], T]) -> T:
        if not getattr(self._thread, "ready", False):
            self._begin()
        if netns is not None:
            descriptor = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _enter(descriptor)
            finally:
                os.close(descriptor)
        try:
            return function()
        finally:
            _enter(self._home)

    def close(self) -> None:
        """End the threads."""
        self._executor.shutdown(wait=True)
        if self._home >= 0:
            os.close(self._home)
            self._home = -1


def _enter(descriptor: int) -> None:
    _check(_LIBC.setns(descriptor, CLONE_NEWNET), "setns")


def _mount(source: Path | None, target: Path, flags: int) -> None:
    _check(_LIBC.mount(os.fsencode(source or "none"), os.fsencode(target), None, flags, None), f"mount on {target}")


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
