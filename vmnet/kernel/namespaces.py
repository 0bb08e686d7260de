"""Network namespaces: where they are, and a thread that goes into them."""

import asyncio
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from vmnet.model.names import NamespaceName

DIRECTORY: Final = Path("/run/netns")
CLONE_NEWNET: Final = 0x40000000
"""linux/sched.h."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def path_of(namespace: NamespaceName) -> Path:
    """The file that stands for a network namespace."""
    return DIRECTORY / namespace


class Worker:
    """One thread that runs short functions inside network namespaces. The event loop's thread never leaves its own."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netns", initializer=self._remember)
        self._home = -1

    def _remember(self) -> None:
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    async def run(self, netns: str | None, function: Callable[[], Any]) -> Any:
        """Result of ``function`` in the namespace at path ``netns`` (None: the own one). Raises OSError."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._run, netns, function)

    def _run(self, netns: str | None, function: Callable[[], Any]) -> Any:
        if netns is None:
            return function()
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
        """End the thread."""
        self._executor.shutdown(wait=True)
        if self._home >= 0:
            os.close(self._home)
            self._home = -1


def _enter(descriptor: int) -> None:
    if _LIBC.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
