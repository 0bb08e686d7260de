"""The host's side of the guest's command agent (``probe agent``): lines over a virtio-serial port."""

import asyncio
import base64
import json
import shlex
import signal
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast
from urllib.parse import quote

from vmnet.lab.errors import LabError

REQUEST_TIMEOUT: Final = 30.0
"""Seconds for one answer from a guest that is up; a booting one is waited for as long as the caller says."""
_RETRY_AFTER: Final = 1.0
"""Seconds without an answer after which a request is sent again: the guest may have moved to another QEMU."""
_WAIT: Final = 0.5
_LINE_LIMIT: Final = 2**20


class AgentError(LabError):
    """The guest did not answer, or could not do what was asked."""


@dataclass(frozen=True, slots=True)
class Result:
    """A command that ended in the guest. ``exit``: its status, 128 + N for signal N, 127 for no such program."""

    exit: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class JobState:
    """A command in the guest, running or ended (``exit`` is None while it runs); all of its output so far."""

    running: bool
    exit: int | None
    stdout: str
    stderr: str


class _Connection(asyncio.Protocol):
    """One connection to the port; answers are handed to whoever waits for them."""

    def __init__(self) -> None:
        self.waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.transport: asyncio.Transport | None = None
        self.lost = False
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # Ends what a predecessor left unfinished: it may have been cut off in the middle of a line.
        self.transport.write(b"\n")

    def data_received(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > _LINE_LIMIT:
            self._buffer = b""
        for line in lines:
            request, _, body = line.partition(b" ")
            future = self.waiting.get(request.decode(errors="replace"))
            if future is None or future.done():
                continue
            try:
                future.set_result(json.loads(body))
            except ValueError:
                continue  # the rest of a line that was cut off; the request is repeated

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError("the guest's port closed"))


class GuestAgent:
    """Runs commands in the guest behind ``socket_path``. Several calls may run at once; it reconnects by itself.

    Jobs have names of their own: a ``GuestAgent`` on the migration target's socket goes on with jobs of the source's.
    """

    def __init__(self, socket_path: str | Path) -> None:
        self.socket_path = Path(socket_path)
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the connection; jobs run on."""
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.abort()
        self._connection = None

    async def ready(self, timeout: float = 60) -> None:
        """Wait until the guest's agent answers, e.g. after boot. Raises AgentError."""
        await self._ask("ping", timeout=timeout)

    async def run(self, argv: Sequence[str], timeout: float = 30, input: str | None = None) -> Result:
        """Run a command to its end. Raises AgentError: no answer, or not done in ``timeout`` seconds (then killed)."""
        job = await self.start(argv, timeout=timeout)
        if input:
            await self._feed(job, input)
        await self._ask("input", job)
        try:
            async with asyncio.timeout(timeout + REQUEST_TIMEOUT):
                state = await self.poll(job, wait=_WAIT)
                while state.running:
                    state = await self.poll(job, wait=_WAIT)
        except TimeoutError:
            raise AgentError(f"{shlex.join(argv)}: no answer from the guest within {timeout:g} s") from None
        await self._ask("forget", job)
        if state.exit is None or state.exit == 128 + signal.SIGKILL:
            raise AgentError(f"{shlex.join(argv)}: not done within {timeout:g} s")
        return Result(state.exit, state.stdout, state.stderr)

    async def _feed(self, job: str, text: str) -> None:
        data = text.encode()
        taken = 0
        while taken < len(data):
            # Octets, not characters, are counted and cut.
            piece = data[taken : taken + 4096].decode("latin-1")
            taken = (await self._ask("input", job, str(taken), piece, encoding="latin-1"))["taken"]

    async def start(self, argv: Sequence[str], timeout: float = 0) -> str:
        """Start a command; returns its job name. The guest kills it after ``timeout`` seconds, 0: never."""
        job = uuid.uuid4().hex
        await self._ask("start", job, str(int(timeout * 1000)), *argv)
        return job

    async def poll(self, job: str, wait: float = 0) -> JobState:
        """State and whole output of a job; waits up to ``wait`` seconds for its end. Raises AgentError: no such job."""
        output: dict[str, bytes] = {"out": b"", "err": b""}
        while True:
            state = await self._ask(
                "poll", job, str(len(output["out"])), str(len(output["err"])), str(int(wait * 1000)), slack=wait
            )
            for key in output:
                output[key] += base64.b64decode(state[key])
            if all(len(output[key]) >= state[f"{key}_total"] for key in output):
                break
            wait = 0
        return JobState(
            running=state["state"] == "running",
            exit=state["exit"],
            stdout=output["out"].decode(errors="replace"),
            stderr=output["err"].decode(errors="replace"),
        )

    async def stop(self, job: str, number: int = signal.SIGTERM) -> None:
        """Send a signal to a job's processes."""
        await self._ask("stop", job, str(int(number)))

    async def finish(self, job: str, timeout: float = 15) -> dict[str, Any]:
        """End a ``probe`` job and return its result. Raises AgentError when there is none."""
        await self.stop(job)
        try:
            async with asyncio.timeout(timeout):
                state = await self.poll(job, wait=_WAIT)
                while state.running:
                    state = await self.poll(job, wait=_WAIT)
        except TimeoutError:
            raise AgentError(f"job {job} did not end within {timeout:g} s") from None
        await self._ask("forget", job)
        lines = state.stdout.strip().splitlines()
        try:
            result = json.loads(lines[-1])
        except (IndexError, ValueError):
            raise AgentError(f"job {job} gave no result: {state.stderr.strip() or 'no message'}") from None
        if not isinstance(result, dict):
            raise AgentError(f"job {job} gave no result: {lines[-1]}")
        return result

    async def _ask(
        self, *words: str, timeout: float = REQUEST_TIMEOUT, slack: float = 0, encoding: str = "utf-8"
    ) -> dict[str, Any]:
        """One request, repeated until it is answered; every operation may be repeated. Raises AgentError."""
        line = " ".join(quote(word, safe="/:.,=+@-_", encoding=encoding) or "%" for word in words)
        last: Exception | None = None
        try:
            async with asyncio.timeout(timeout + slack):
                while True:
                    try:
                        answer = await self._once(line, slack)
                        break
                    except (OSError, TimeoutError) as error:
                        last = error
                        await asyncio.sleep(0.05)
        except TimeoutError:
            reason = f": {last}" if last is not None and str(last) else ""
            raise AgentError(f"no answer from the guest at {self.socket_path} within {timeout:g} s{reason}") from None
        if "error" in answer:
            raise AgentError(f"the guest's agent: {answer['error']} ({' '.join(words[:2])})")
        return answer

    async def _once(self, line: str, slack: float) -> dict[str, Any]:
        connection = await self._connected()
        request = uuid.uuid4().hex[:16]
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        connection.waiting[request] = future
        try:
            if connection.transport is None:
                raise ConnectionResetError("the guest's port closed")
            connection.transport.write(f"{request} {line}\n".encode())
            async with asyncio.timeout(_RETRY_AFTER + slack):
                return await future
        finally:
            connection.waiting.pop(request, None)

    async def _connected(self) -> _Connection:
        async with self._connecting:
            if self._connection is None or self._connection.lost:
                loop = asyncio.get_running_loop()
                _, self._connection = await loop.create_unix_connection(_Connection, str(self.socket_path))
            return self._connection
