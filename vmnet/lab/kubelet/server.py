"""What the API server asks of a node: container logs, and exec by websocket (subprotocol ``v5.channel.k8s.io``).

In that protocol the first byte of a binary message is its channel: 0 stdin, 1 stdout, 2 stderr, 3 the final Status,
4 terminal size; 255 closes the channel that the next byte names.
"""

import asyncio
import fcntl
import hmac
import json
import logging
import os
import pty
import signal
import struct
import termios
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import yaml
from aiohttp import WSMsgType, web

from vmnet.kube.api import Object
from vmnet.lab.errors import LabError
from vmnet.lab.kubelet.environment import Unresolvable

log = logging.getLogger(__name__)

STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
PROTOCOLS: Final = ("v5.channel.k8s.io", "v4.channel.k8s.io")
CHUNK: Final = 32 * 1024
POLL: Final = 0.2
"""How often a log that is followed is looked at."""


class RunningPod(Protocol):
    """What the server asks of a pod: the kubelet's own, or one that stands for a process of the lab."""

    @property
    def pod(self) -> Object:
        """The API's object."""
        ...

    def log_path(self, container: str) -> Path:
        """Both outputs of a container, of all its runs."""
        ...

    def runs(self, container: str) -> bool:
        """Whether the container runs."""
        ...

    @property
    def entering(self) -> tuple[str, ...]:
        """Words before a command that shall run in the pod."""
        ...

    def container_environment(self, container: str) -> Mapping[str, str]:
        """What exec into a container sees. Raises Unresolvable, LabError."""
        ...


FindPod = Callable[[str, str], RunningPod | None]


class KubeletServer:
    """HTTP handlers. ``token``: what the API server proves itself with; without one every request is refused."""

    def __init__(self, find: FindPod, token: str | None) -> None:
        self._find = find
        self._token = token

    def application(self) -> web.Application:
        """The routes: the API server's own paths."""
        application = web.Application(middlewares=[self._authenticate])
        base = "/api/v1/namespaces/{namespace}/pods/{name}"
        application.add_routes(
            [web.get(f"{base}/log", self.logs), web.get(f"{base}/exec", self.exec), web.post(f"{base}/exec", self.exec)]
        )
        return application

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self._token is None or not hmac.compare_digest(given.encode(), self._token.encode()):
            return _failure(401, "Unauthorized", "Unauthorized")
        response: web.StreamResponse = await handler(request)
        return response

    def _container(self, request: web.Request) -> tuple[RunningPod, str] | web.Response:
        """The pod and the container that a request means, or the refusal."""
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        worker = self._find(namespace, name)
        if worker is None:
            return _failure(404, "NotFound", f'pods "{name}" not found on this node')
        spec = worker.pod["spec"]
        names = [item["name"] for item in (*spec["containers"], *(spec.get("initContainers") or []))]
        container = request.query.get("container") or names[0]
        if container not in names:
            return _failure(400, "BadRequest", f"container {container} is not valid for pod {name}")
        return worker, container

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """``kubectl logs``: ``tailLines``, ``limitBytes`` and ``follow`` are honoured."""
        found = self._container(request)
        if isinstance(found, web.Response):
            return found
        worker, container = found
        path = worker.log_path(container)
        if not path.exists():
            message = f"container {container!r} in pod {request.match_info['name']!r} is waiting to start"
            return _failure(400, "BadRequest", message)
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        offset = _tail_offset(path, int(request.query.get("tailLines", -1)))
        limit = int(request.query.get("limitBytes", 0)) or None
        follow = request.query.get("follow") in ("true", "1")
        async for data in _read(path, offset, limit, lambda: follow and worker.runs(container)):
            await response.write(data)
        await response.write_eof()
        return response

    async def exec(self, request: web.Request) -> web.StreamResponse:
        """``kubectl exec``."""
        found = self._container(request)
        if isinstance(found, web.Response):
            return found
        worker, container = found
        words = request.query.getall("command", [])
        if not worker.runs(container):
            return _failure(500, "InternalError", f"container not running ({container})")
        if not words:
            return _failure(400, "BadRequest", "you must specify at least 1 command for the container")
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return _failure(400, "BadRequest", "exec needs a websocket upgrade")
        try:
            environment = worker.container_environment(container)
        except (Unresolvable, LabError) as error:
            return _failure(500, "InternalError", str(error))
        socket = web.WebSocketResponse(protocols=PROTOCOLS, max_msg_size=1 << 22, autoclose=False)
        await socket.prepare(request)
        flags = {name: request.query.get(name) in ("true", "1") for name in ("stdin", "stdout", "stderr", "tty")}
        session = _Session(socket, flags)
        # The session begins inside the pod: a shell's job control needs process groups of the pod's own PID namespace.
        terminal = ("setsid", "--ctty", "--wait") if flags["tty"] else ()
        status = await session.run([*worker.entering, *terminal, *words], environment)
        await socket.send_bytes(bytes([ERROR]) + json.dumps(status).encode())
        await socket.close()
        return socket


class _Session:
    """One exec: a process, and a websocket that carries its streams."""

    def __init__(self, socket: web.WebSocketResponse, flags: Mapping[str, bool]) -> None:
        self._socket = socket
        self._flags = flags

    async def run(self, argv: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
        """Until the process or the client ends; the final Status."""
        try:
            if self._flags["tty"]:
                return await self._run_on_terminal(argv, {**environment, "TERM": "xterm"})
            return await self._run_on_pipes(argv, environment)
        except OSError as error:
            return _status_of(f"{argv[-1]}: {error.strerror}", 126)

    async def _run_on_pipes(self, argv: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE if self._flags["stdin"] else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(environment),
            start_new_session=True,
        )

        def typed(data: bytes) -> None:
            if process.stdin is not None and not process.stdin.is_closing():
                process.stdin.write(data)

        def closed() -> None:
            if process.stdin is not None:
                process.stdin.close()

        async def pump(stream: asyncio.StreamReader | None, channel: int) -> None:
            while stream is not None and (data := await stream.read(CHUNK)):
                await self._send(channel, data)

        outputs = asyncio.gather(pump(process.stdout, STDOUT), pump(process.stderr, STDERR))
        return await self._until_end(process, outputs, typed, closed, lambda *_: None)

    async def _run_on_terminal(self, argv: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
        master, slave = pty.openpty()
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env=dict(environment),
                start_new_session=True,
            )
        finally:
            os.close(slave)
        os.set_blocking(master, False)
        ready = asyncio.Event()
        loop = asyncio.get_running_loop()

        def resized(columns: int, rows: int) -> None:
            fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

        async def pump() -> None:
            while True:
                await ready.wait()
                try:
                    data = os.read(master, CHUNK)
                except BlockingIOError:
                    ready.clear()
                    continue
                except OSError:  # EIO: the last process on the terminal is gone
                    return
                await self._send(STDOUT, data)

        loop.add_reader(master, ready.set)
        try:
            outputs = asyncio.ensure_future(pump())
            return await self._until_end(process, outputs, lambda data: _write_all(master, data), lambda: None, resized)
        finally:
            loop.remove_reader(master)
            os.close(master)

    async def _until_end(
        self,
        process: asyncio.subprocess.Process,
        outputs: "asyncio.Future[Any]",
        typed: Callable[[bytes], None],
        closed: Callable[[], None],
        resized: Callable[[int, int], None],
    ) -> dict[str, Any]:
        client = asyncio.ensure_future(self._receive(typed, closed, resized))
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait({client, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                os.killpg(process.pid, signal.SIGKILL)
                await ended
            # What it wrote last is still in the pipes; a background child may hold them open.
            await asyncio.wait({outputs}, timeout=2)
        finally:
            client.cancel()
            outputs.cancel()
            await asyncio.gather(client, outputs, return_exceptions=True)
        code = process.returncode or 0
        return _status_of("", code) if code == 0 else _status_of(f"command terminated with exit code {code}", code)

    async def _receive(
        self, typed: Callable[[bytes], None], closed: Callable[[], None], resized: Callable[[int, int], None]
    ) -> None:
        async for message in self._socket:
            if message.type is not WSMsgType.BINARY or not message.data:
                continue
            channel, data = message.data[0], message.data[1:]
            if channel == STDIN:
                typed(data)
            elif channel == CLOSE and data[:1] == bytes([STDIN]):
                closed()
            elif channel == RESIZE:
                size = json.loads(data)
                resized(int(size["Width"]), int(size["Height"]))

    async def _send(self, channel: int, data: bytes) -> None:
        if not self._socket.closed:
            await self._socket.send_bytes(bytes([channel]) + data)


def _write_all(descriptor: int, data: bytes) -> None:
    try:
        os.write(descriptor, data)
    except BlockingIOError:
        log.warning("terminal input of %d bytes dropped: nobody reads it", len(data))


def _status_of(message: str, code: int) -> dict[str, Any]:
    """The Status that ends an exec, as kubectl reads the exit code from it."""
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code if code > 0 else 128 - code)}]},
    }


def _failure(code: int, reason: str, message: str) -> web.Response:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }
    return web.json_response(body, status=code)


def _tail_offset(path: Path, lines: int) -> int:
    """Where the last ``lines`` lines begin; 0 for all (negative)."""
    if lines < 0:
        return 0
    data = path.read_bytes()
    position = len(data) - (1 if data.endswith(b"\n") else 0)
    for _ in range(lines):
        position = data.rfind(b"\n", 0, position)
        if position < 0:
            return 0
    return len(data) if lines == 0 else position + 1


async def _read(path: Path, offset: int, limit: int | None, more: Callable[[], bool]) -> AsyncIterator[bytes]:
    """The file from ``offset``, at most ``limit`` bytes; waits for more as long as ``more`` says so."""
    with open(path, "rb") as file:  # noqa: ASYNC230 - a local file
        file.seek(offset)
        while True:
            expecting = more()
            while data := file.read(CHUNK if limit is None else min(CHUNK, limit)):
                yield data
                if limit is not None:
                    limit -= len(data)
                    if limit <= 0:
                        return
            if not expecting:
                return
            await asyncio.sleep(POLL)


def token_of(kubeconfig: Path | None) -> str | None:
    """The bearer token of a kubeconfig's user: the embedded API proves itself to kubelets with the same one."""
    if kubeconfig is None:
        return None
    body = yaml.safe_load(kubeconfig.read_text())
    context: dict[str, Any] = next(
        (item["context"] for item in body["contexts"] if item["name"] == body["current-context"]), {}
    )
    user: dict[str, Any] = next((item["user"] for item in body["users"] if item["name"] == context.get("user")), {})
    token = user.get("token")
    return str(token) if token else None
