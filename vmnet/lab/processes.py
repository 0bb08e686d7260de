"""The lab's own processes: each with a log file, watched, and restarted only when somebody asks.

A process that exits by itself is a fault of the lab or the product, so it is reported, never hidden by a restart. The
one exception is the controller: a leader that could not renew its lease ends by design; a Deployment starts it again.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmnet.lab import cgroups, topology
from vmnet.lab.directory import ENVIRONMENT_VARIABLE, LabDirectory
from vmnet.lab.errors import LabError
from vmnet.lab.nodes import Held

STOP_SECONDS: Final = 5.0
"""Between SIGTERM and SIGKILL."""


@dataclass(frozen=True, slots=True)
class Specification:
    """What to run. ``host`` is a name of ``topology`` (a node, ``outside``) or ``fabric``."""

    name: str
    host: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    descriptors: tuple[int, ...] = ()
    """File descriptors that it inherits."""
    cgroup: Path | None = None
    """Directory of the cgroup that it runs in; None for the lab's own."""
    revived: int = 0
    """How often it is started again when it ends by itself; ``Status.starts`` tells."""


@dataclass(frozen=True, slots=True)
class Status:
    """One process as ``status`` shows it. ``exit`` is negative for a signal, None while it runs."""

    name: str
    host: str
    pid: int
    seconds: float
    exit: int | None
    expected: bool
    """It was asked to end."""
    starts: int
    log: str

    @property
    def failed(self) -> bool:
        """It ended and nobody asked for it."""
        return self.exit is not None and not self.expected


@dataclass(slots=True)
class _Process:
    specification: Specification
    process: asyncio.subprocess.Process
    started: float
    starts: int = 1
    expected: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


def python_module(module: str, *arguments: str) -> tuple[str, ...]:
    """Words that run a module with this interpreter."""
    return (sys.executable, "-m", module, *arguments)


class Processes:
    """Processes by name. ``group`` owns the tasks that watch them."""

    def __init__(self, directory: LabDirectory, hosts: Mapping[str, Held], group: asyncio.TaskGroup) -> None:
        self._directory = directory
        self._hosts = hosts
        self._group = group
        self._table: dict[str, _Process] = {}
        self._watchers: list[Callable[[Status], None]] = []

    def prefix(self, host: str) -> tuple[str, ...]:
        """Words that enter a host's namespaces. Raises LabError for an unknown host."""
        if host == topology.FABRIC:
            return ()
        if host not in self._hosts:
            raise LabError(f"the lab has no host {host!r}", f"it has {', '.join([topology.FABRIC, *self._hosts])}")
        return self._hosts[host].prefix

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Environment of every process of the lab."""
        base = {key: os.environ[key] for key in ("LANG", "LC_ALL", "VMNET_LOG_LEVEL") if key in os.environ}
        binaries = Path(sys.executable).parent
        return {
            **base,
            "PATH": f"{binaries}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "PYTHONUNBUFFERED": "1",
            "KUBECONFIG": str(self._directory.inner_kubeconfig),
            ENVIRONMENT_VARIABLE: str(self._directory.path),
            **(extra or {}),
        }

    def observe(self, watcher: Callable[[Status], None]) -> None:
        """Call ``watcher`` whenever a process has ended."""
        self._watchers.append(watcher)

    async def start(self, specification: Specification) -> Status:
        """Start one process. Raises LabError when one of that name runs, or the program is not there."""
        name = specification.name
        known = self._table.get(name)
        if known is not None and not known.ended.is_set():
            raise LabError(f"process {name!r} already runs", f"restart it with: vmnet lab restart {name}")
        # A local file that is opened once; the loop does not notice.
        with open(self._directory.log(name), "ab") as log:  # noqa: ASYNC230
            try:
                process = await asyncio.create_subprocess_exec(
                    *cgroups.entering(specification.cgroup),
                    *self.prefix(specification.host),
                    *specification.argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.environment(specification.environment),
                    pass_fds=specification.descriptors,
                )
            except OSError as error:
                raise LabError(f"process {name!r} could not be started: {error}") from error
        entry = _Process(specification, process, time.monotonic(), known.starts + 1 if known else 1)
        self._table[name] = entry
        self._group.create_task(self._watch(entry), name=f"watch {name}")
        return self._status(entry)

    async def restart(self, name: str) -> Status:
        """End a process with SIGTERM, then SIGKILL, and start it again. Raises LabError."""
        entry = self._entry(name)
        await self._end(entry)
        return await self.start(entry.specification)

    def kill(self, name: str, number: int) -> None:
        """Send a signal; if it ends the process, that was asked for. Raises LabError."""
        entry = self._entry(name)
        if entry.ended.is_set():
            raise LabError(f"process {name!r} has ended already")
        entry.expected = number not in (signal.SIGSTOP, signal.SIGCONT)
        entry.process.send_signal(number)

    async def wait(self, name: str, timeout: float) -> Status:
        """Wait until it has ended. Raises LabError when it has not in ``timeout`` seconds."""
        entry = self._entry(name)
        try:
            async with asyncio.timeout(timeout):
                await entry.ended.wait()
        except TimeoutError:
            raise LabError(f"process {name!r} still runs after {timeout:g} s") from None
        return self._status(entry)

    def statuses(self) -> list[Status]:
        """All processes, in the order of their first start."""
        return [self._status(entry) for entry in self._table.values()]

    async def stop_all(self) -> None:
        """End all: first all get SIGTERM, then whoever is left SIGKILL."""
        running = [entry for entry in self._table.values() if not entry.ended.is_set()]
        async with asyncio.TaskGroup() as group:
            for entry in running:
                group.create_task(self._end(entry))

    async def run(self, host: str, argv: Sequence[str], timeout: float, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """Run a program to its end in a host: (exit status, output, errors). Raises LabError when it takes too long."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self.prefix(host),
                *argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=self.environment(),
            )
        except OSError as error:
            raise LabError(f"{argv[0]} could not be started on {host}: {error}") from error
        try:
            async with asyncio.timeout(timeout):
                output, errors = await process.communicate(stdin)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise LabError(f"{' '.join(argv)} on {host} did not end within {timeout:g} s") from None
        return process.returncode or 0, output, errors

    def _entry(self, name: str) -> _Process:
        if name not in self._table:
            raise LabError(f"the lab has no process {name!r}", f"it has {', '.join(self._table)}")
        return self._table[name]

    def _status(self, entry: _Process) -> Status:
        name = entry.specification.name
        return Status(
            name=name,
            host=entry.specification.host,
            pid=entry.process.pid,
            seconds=round(time.monotonic() - entry.started, 1),
            exit=entry.process.returncode if entry.ended.is_set() else None,
            expected=entry.expected,
            starts=entry.starts,
            log=str(self._directory.log(name)),
        )

    async def _watch(self, entry: _Process) -> None:
        await entry.process.wait()
        entry.ended.set()
        if not entry.expected and entry.starts <= entry.specification.revived:
            await self.start(entry.specification)
            return
        for watcher in self._watchers:
            watcher(self._status(entry))

    async def _end(self, entry: _Process) -> None:
        entry.expected = True
        if entry.ended.is_set():
            return
        entry.process.send_signal(signal.SIGCONT)
        entry.process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await entry.ended.wait()
        except TimeoutError:
            entry.process.kill()
            await entry.ended.wait()
