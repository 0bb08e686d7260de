"""PID 1 of a pod: ``python -m vmnet.lab.kubelet.sandbox``, with a ``SandboxConfig`` as JSON on standard input.

It makes the pod's namespaces and then starts, signals and reaps containers as it is told on a Unix socket (one JSON
object per line, a JSON object back). It outlives kubelet, which finds it again by the socket. When it ends, the kernel
ends every process of the pod.

``{"call": "start", "id": …, "argv": […], "environment": {…}, "directory": …, "log": …}`` → ``{"pid": …}``
``{"call": "signal", "id": …, "number": …}`` → ``{}``
``{"call": "watch"}`` → ``{"containers": {id: {…}}}`` now and after every change
Any of them may answer ``{"error": …}``.
"""

import errno
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from vmnet.lab import cgroups, namespaces

MAX_LINE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class SandboxConfig:
    """What the pod's namespaces look like. ``netns`` is empty for a pod on the host's network."""

    socket: str
    netns: str
    hostname: str
    resolver: str
    """File that becomes /etc/resolv.conf; empty to keep the node's."""
    hosts: str
    """File that becomes /etc/hosts."""
    mounts: tuple[tuple[str, str], ...] = ()
    """(source, target) bind mounts; a target that does not exist is skipped."""
    cgroup: str = ""
    """Directory of the pod's cgroup; empty to stay in the caller's."""


@dataclass(slots=True)
class ContainerState:
    """One run of a container. Times are seconds since the epoch; ``exit`` is negative for a signal."""

    pid: int
    started: float
    exit: int | None = None
    finished: float | None = None


def enter(config: SandboxConfig) -> None:
    """Make and enter the namespaces; returns only in the pod's PID 1. Raises OSError."""
    if config.cgroup:
        cgroups.enter(Path(config.cgroup))
    if config.netns:
        namespaces.setns(config.netns, namespaces.CLONE_NEWNET)
    flags = namespaces.CLONE_NEWNS | namespaces.CLONE_NEWPID | namespaces.CLONE_NEWUTS | namespaces.CLONE_NEWIPC
    namespaces.unshare(flags)
    ready_read, ready_write = os.pipe()
    if os.fork():
        os.close(ready_write)
        # The starter waits for us: it learns from the exit status whether the pod's PID 1 got as far as its socket.
        os._exit(0 if os.read(ready_read, 1) else 1)
    os.close(ready_read)
    os.setsid()
    namespaces.make_mounts_private()
    namespaces.mount("proc", "/proc", "proc")
    if config.netns:
        namespaces.mount("sysfs", "/sys", "sysfs")
        socket.sethostname(config.hostname)
    for source, target in ((config.resolver, "/etc/resolv.conf"), (config.hosts, "/etc/hosts"), *config.mounts):
        if source and Path(target).exists():
            namespaces.bind(source, Path(target).resolve())
    os.set_inheritable(ready_write, False)
    Sandbox(Path(config.socket), ready_write).run()


class Sandbox:
    """The loop of PID 1."""

    def __init__(self, path: Path, ready: int) -> None:
        self._containers: dict[str, ContainerState] = {}
        self._selector = selectors.DefaultSelector()
        self._watchers: set[socket.socket] = set()
        self._buffers: dict[socket.socket, bytes] = {}
        self._ending = False
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(16)
        os.write(ready, b"1")
        os.close(ready)

    def run(self) -> None:
        """Until SIGTERM."""
        wake_read, wake_write = os.pipe()
        for descriptor in (wake_read, wake_write):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._terminate)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(wake_read, selectors.EVENT_READ)
        while not self._ending:
            for key, _ in self._selector.select():
                if key.fileobj == wake_read:
                    os.read(wake_read, 512)
                    self._reap()
                elif key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._read(key.fileobj)

    def _terminate(self, *_: Any) -> None:
        self._ending = True

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(5)
        self._buffers[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
            return
        *lines, rest = (self._buffers[connection] + data).split(b"\n")
        if len(rest) > MAX_LINE:
            self._drop(connection)
            return
        self._buffers[connection] = rest
        for line in lines:
            self._send(connection, self._answer(connection, line))

    def _drop(self, connection: socket.socket) -> None:
        if self._buffers.pop(connection, None) is None:
            return
        self._watchers.discard(connection)
        self._selector.unregister(connection)
        connection.close()

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        try:
            connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._drop(connection)

    def _answer(self, connection: socket.socket, line: bytes) -> dict[str, Any]:
        try:
            body = json.loads(line)
            match body["call"]:
                case "start":
                    return self._start(body)
                case "signal":
                    return self._signal(body["id"], body["number"])
                case "watch":
                    self._watchers.add(connection)
                    return self._snapshot()
                case call:
                    return {"error": f"unknown call {call!r}"}
        except OSError as error:
            return {"error": f"{error.filename or ''}: {error.strerror}".lstrip(": ")}
        except (ValueError, KeyError, TypeError) as error:
            return {"error": f"malformed call: {error!r}"}

    def _start(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["id"] in self._containers:
            return {"error": f"container {body['id']} was started already"}
        with open(body["log"], "ab") as log:
            process = subprocess.Popen(
                body["argv"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=body["directory"],
                env=body["environment"],
                start_new_session=True,
            )
        # Reaped here by number; the object must not wait for it too.
        process.returncode = 0
        self._containers[body["id"]] = ContainerState(process.pid, time.time())
        self._tell()
        return {"pid": process.pid}

    def _signal(self, identifier: str, number: int) -> dict[str, Any]:
        state = self._containers[identifier]
        if state.exit is None:
            try:
                os.killpg(state.pid, number)
            except OSError as error:
                if error.errno != errno.ESRCH:
                    raise
        return {}

    def _reap(self) -> None:
        changed = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            for state in self._containers.values():
                if state.pid == pid and state.exit is None:
                    state.exit, state.finished = os.waitstatus_to_exitcode(status), time.time()
                    changed = True
        if changed:
            self._tell()

    def _snapshot(self) -> dict[str, Any]:
        return {"containers": {key: asdict(state) for key, state in self._containers.items()}}

    def _tell(self) -> None:
        for watcher in tuple(self._watchers):
            self._send(watcher, self._snapshot())


def main() -> None:
    """Entry point."""
    body = json.load(sys.stdin)
    body["mounts"] = tuple((source, target) for source, target in body["mounts"])
    enter(SandboxConfig(**body))


if __name__ == "__main__":
    main()
