"""Changes in one directory, as inotify tells them: ``await changed(timeout)`` instead of looking every moment."""

import asyncio
import contextlib
import ctypes
import os
from pathlib import Path
from typing import Final

_IN_CLOSE_WRITE: Final = 0x8
_IN_MOVED: Final = 0xC0
_IN_CREATE: Final = 0x100
_IN_DELETE: Final = 0x200
_IN_DELETE_SELF: Final = 0x400
_IN_MOVE_SELF: Final = 0x800
_IN_ONLYDIR: Final = 0x01000000
"""linux/inotify.h."""
_EVENTS: Final = _IN_CLOSE_WRITE | _IN_MOVED | _IN_CREATE | _IN_DELETE | _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_ONLYDIR

UNTOLD: Final = 2.0
"""Seconds after which to look where changes are not told: no such directory yet, or no inotify instance left."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class DirectoryEvents:
    """Says when an entry of ``directory`` came, went or was written. Close it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._happened = asyncio.Event()
        self._watch = -1
        self._inode = 0
        self._descriptor = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor >= 0:
            asyncio.get_running_loop().add_reader(self._descriptor, self._read)

    async def changed(self, timeout: float) -> bool:
        """Wait for a change since the last call; False when there was none for ``timeout`` seconds.

        A directory that is not there, or was replaced by another, is looked for again at each call. While nothing can
        be told the wait is ``UNTOLD`` at most.
        """
        self._follow()
        try:
            async with asyncio.timeout(timeout if self._inode else min(timeout, UNTOLD)):
                await self._happened.wait()
        except TimeoutError:
            return False
        self._happened.clear()
        return True

    def close(self) -> None:
        """Stop listening."""
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _follow(self) -> None:
        try:
            inode = self._directory.stat().st_ino
        except OSError:
            self._inode = 0
            return
        if inode == self._inode or self._descriptor < 0:
            return
        if self._watch >= 0:
            _LIBC.inotify_rm_watch(self._descriptor, self._watch)
        self._watch = _LIBC.inotify_add_watch(self._descriptor, os.fsencode(self._directory), _EVENTS)
        self._inode = inode if self._watch >= 0 else 0
        if self._watch >= 0:
            # What happened before is not told.
            self._happened.set()

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._descriptor, 65536):
                self._happened.set()
