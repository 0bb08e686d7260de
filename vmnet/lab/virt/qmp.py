"""QEMU's machine protocol (docs/interop/qmp-spec): commands, answers and events as JSON lines over a Unix socket."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from vmnet.lab.errors import LabError

COMMAND_TIMEOUT: Final = 20.0


class QemuError(LabError):
    """QEMU refused a command, or went away."""


@dataclass(frozen=True, slots=True)
class Event:
    """``time``: seconds since the epoch, stamped by QEMU when it happened."""

    name: str
    data: dict[str, Any]
    time: float


class Qmp(asyncio.Protocol):
    """One connection to one monitor. A monitor serves one client at a time; events go to all monitors."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._transport: asyncio.BaseTransport | None = None
        self._buffer = b""
        self._number = 0
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._greeting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[Event], None]] = []
        self.events: list[Event] = []
        """All that happened since the connection was made."""
        self.closed = asyncio.Event()

    @classmethod
    async def connect(cls, path: str | Path, timeout: float = COMMAND_TIMEOUT) -> Self:
        """Wait for the socket to be there, greet, and leave the capabilities mode. Raises QemuError."""
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + timeout
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            connection.setblocking(False)
            try:
                await loop.sock_connect(connection, str(path))
                break
            except OSError as error:
                connection.close()
                if time.monotonic() > deadline:
                    raise QemuError(f"no monitor at {path}: {error}") from None
            await asyncio.sleep(0.02)
        _, monitor = await loop.create_unix_connection(lambda: cls(connection), sock=connection)
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0.1)):
                await monitor._greeting
                await monitor.execute("qmp_capabilities")
        except TimeoutError:
            monitor.close()
            raise QemuError(f"the monitor at {path} does not answer; is another client connected?") from None
        except BaseException:
            monitor.close()
            raise
        return monitor

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; QEMU runs on."""
        if self._transport is not None:
            self._transport.close()

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call on every event from now on, in the order they come."""
        self._listeners.append(listener)

    async def execute(self, command: str, descriptor: int | None = None, **arguments: Any) -> Any:
        """Run a command, ``descriptor`` going with it; ``_`` in argument names stands for ``-``. Raises QemuError."""
        if self.closed.is_set():
            raise QemuError(f"{command}: QEMU went away")
        self._number += 1
        number = self._number
        body: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            body["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        data = json.dumps(body).encode() + b"\n"
        try:
            # Commands are short and go one by one: the socket's buffer always has room for one.
            if descriptor is None:
                self._socket.send(data)
            else:
                socket.send_fds(self._socket, [data], [descriptor])
            async with asyncio.timeout(COMMAND_TIMEOUT):
                return await future
        except TimeoutError:
            raise QemuError(f"{command}: no answer within {COMMAND_TIMEOUT:g} s") from None
        except OSError as error:
            raise QemuError(f"{command}: {error}") from None
        finally:
            self._answers.pop(number, None)

    async def wait_for(self, matches: Callable[[Event], bool], timeout: float, since: int = 0) -> Event:
        """The first event, from the ``since``-th on, that matches. Raises QemuError: timeout, or QEMU ended."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    for event in self.events[since:]:
                        if matches(event):
                            return event
                    since = len(self.events)
                    if self.closed.is_set():
                        raise QemuError("QEMU went away")
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            names = [event.name for event in self.events[-5:]]
            raise QemuError(f"QEMU did not report it within {timeout:g} s; its last events: {names}") from None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            if line.strip():
                self._message(json.loads(line))

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set()
        self._changed.set()
        for future in (self._greeting, *self._answers.values()):
            if not future.done():
                future.set_exception(QemuError("QEMU went away"))
                future.exception()  # taken note of: nobody may be waiting

    def _message(self, message: dict[str, Any]) -> None:
        if "QMP" in message:
            if not self._greeting.done():
                self._greeting.set_result(None)
        elif "event" in message:
            stamp = message["timestamp"]
            event = Event(message["event"], message.get("data", {}), stamp["seconds"] + stamp["microseconds"] / 1e6)
            self.events.append(event)
            self._changed.set()
            for listener in self._listeners:
                listener(event)
        else:
            future = self._answers.get(message.get("id", -1))
            if future is None or future.done():
                return
            if "error" in message:
                future.set_exception(QemuError(message["error"].get("desc", "error")))
            else:
                future.set_result(message.get("return"))
