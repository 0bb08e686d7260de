"""Starting and ending the lab's process tree from the machine.

``unshare`` (util-linux) makes the namespaces and waits outside for PID 1 of the new PID namespace; it ends only after
the kernel has killed and reaped every process in it. If it is killed itself, the kernel kills PID 1.
"""

import asyncio
import json
import os
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmnet.lab import cgroups, namespaces, relay
from vmnet.lab.directory import ENVIRONMENT_VARIABLE, LabDirectory, State, start_time
from vmnet.lab.errors import LabError
from vmnet.lab.relay import ExternalApi

INIT_LOG: Final = "init"
END_SECONDS: Final = 20.0
"""For the kernel to end everything after SIGKILL of PID 1."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the start: ``seconds`` is None at its beginning."""

    name: str
    seconds: float | None = None


Listener = Callable[[Step], None]


async def start(
    directory: LabDirectory,
    nodes: int,
    listener: Listener,
    *,
    dies_with_caller: bool,
    without: Sequence[str] = (),
    external: ExternalApi | None = None,
) -> State:
    """Start a lab in an empty directory and return when it is ready. Raises LabError after ending what it started.

    ``dies_with_caller``: the lab ends with the calling process, even by SIGKILL. ``external``: the API that takes the
    place of the embedded one and of its controllers.
    """
    with ExitStack() as stack:
        if external is None:
            api = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
            port = int(api.getsockname()[1])
            words = ["--api-port", str(port), "--listener", str(api.fileno())]
            inherited = [api.fileno()]
        else:
            external.write(directory)
            api, port = stack.enter_context(relay.listen(directory)), 0
            words = ["--external-api", external.server, "--without", "controllers"]
            inherited = []
        read, write = os.pipe()
        try:
            words += ["--nodes", str(nodes), *(word for name in without for word in ("--without", name))]
            launcher = _launch(directory, words, inherited, write, dies_with_caller)
        finally:
            os.close(write)
        try:
            init = await _child_of(launcher)
            carrier = external.start(directory, api, init) if external else 0
            state = State(
                name=directory.name,
                launcher=launcher,
                launcher_start=start_time(launcher) or 0,
                init=init,
                init_start=start_time(init) or 0,
                nodes=nodes,
                api_port=port,
                relay=carrier,
                relay_start=(start_time(carrier) or 0) if carrier else 0,
            )
            directory.write_state(state)
            await _follow(read, listener, directory)
        except BaseException:
            # Also on Ctrl-C: nothing that was started may stay, except the logs.
            os.kill(launcher, signal.SIGKILL)
            await end(directory, keep_files=True)
            raise
    return state


def _launch(directory: LabDirectory, words: Sequence[str], inherited: Sequence[int], progress: int, dies: bool) -> int:
    argv = [
        *("unshare", "--fork", "--kill-child", "--pid", "--mount", "--net", "--uts", "--ipc", "--mount-proc", "--"),
        *(sys.executable, "-m", "vmnet.lab.init"),
        *("--directory", str(directory.path), "--progress", str(progress)),
        *words,
    ]
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        if dies:
            namespaces.die_with_parent()
            if os.getppid() != parent:  # the caller ended before the request took effect
                os._exit(1)
        null = os.open(os.devnull, os.O_RDONLY)
        log = os.open(directory.log(INIT_LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for descriptor in (*inherited, progress):
            os.set_inheritable(descriptor, True)
        os.execvpe(argv[0], argv, {**os.environ, ENVIRONMENT_VARIABLE: str(directory.path)})  # noqa: S606
    finally:
        os._exit(127)


async def _child_of(launcher: int, timeout: float = 10) -> int:
    """PID, outside, of the lab's PID 1. Raises LabError when the launcher ended."""
    try:
        async with asyncio.timeout(timeout):
            while True:
                children = _children(launcher)
                if children:
                    return children[0]
                if start_time(launcher) is None:
                    raise LabError("unshare could not make the lab's namespaces", "run: vmnet lab prerequisites")
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise LabError("the lab's first process did not start") from None


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


async def _follow(descriptor: int, listener: Listener, directory: LabDirectory) -> None:
    """Pass steps on until the lab is ready. Raises LabError when it is not going to be."""
    async for message in _messages(descriptor):
        if message.get("ready"):
            return
        if "error" in message:
            raise LabError(message["error"], message["next_step"])
        listener(Step(message["step"], message.get("seconds")))
    raise LabError(f"lab {directory.name!r} ended while it was starting\n{directory.log_tail(INIT_LOG)}")


async def _messages(descriptor: int) -> AsyncIterator[dict[str, Any]]:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    try:
        while line := await reader.readline():
            yield json.loads(line)
    finally:
        transport.close()


async def end(directory: LabDirectory, *, keep_files: bool = False) -> bool:
    """Kill what is left of a lab, wait until the kernel has ended all of it, remove its directory.

    Returns whether anything was running. Raises LabError when the kernel does not end it in time.
    """
    state = directory.read_state()
    ran = False
    if state is not None:
        # PID 1 first: while the launcher lives, its end tells that the whole namespace is gone.
        for pid, start in ((state.init, state.init_start), (state.launcher, state.launcher_start)):
            ran = await _end_process(pid, start) or ran
        if state.relay:
            # It ends with PID 1, by itself; this waits for it.
            await _end_process(state.relay, state.relay_start)
    cgroups.remove_lab(directory.name)
    if not keep_files:
        directory.remove()
    return ran


async def _end_process(pid: int, start: int) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        # The number may have been reused; the descriptor pins whatever it is now.
        now = start_time(pid)
        if now != start:
            if now is None:
                _reap(pid)
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        gone = await asyncio.to_thread(wait_ended, descriptor, END_SECONDS)
        if not gone:
            raise LabError(f"process {pid} of the lab does not end", "a process hangs in the kernel: see dmesg")
        _reap(pid)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)


def wait_ended(descriptor: int, timeout: float) -> bool:
    """Whether the process of a pidfd ended within ``timeout`` seconds; blocks."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def _reap(pid: int) -> None:
    """Collect the exit status of what ``start`` started, where it is our child."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return
