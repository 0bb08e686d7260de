"""The agent's end of CNI: one Unix socket, one call per connection (``vmnet.cni.call``)."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from vmnet import metrics
from vmnet.cni import call, request
from vmnet.cni.call import Answer
from vmnet.cni.errors import CniError, Code
from vmnet.cni.request import Request

log = logging.getLogger(__name__)

READ_TIMEOUT: Final = 10.0
"""Seconds for the shim to send its call and to take the answer: both are local."""
MAX_CALLS: Final = 64
"""Calls served at once; the others wait in the socket's backlog."""

Handler = Callable[[Request], Awaitable[Answer]]


class CniServer:
    """Serves one handler. Errors that the handler raises become CNI error JSON."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self._path = path
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._slots = asyncio.Semaphore(MAX_CALLS)

    async def start(self) -> None:
        """Listen. A socket that a dead agent left behind is replaced; its waiting shims connect again."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._server = await asyncio.start_unix_server(self._serve, path=self._path)
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Stop listening; calls under way are cancelled with their tasks."""
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._slots:
                answer = await self._answer(await call.read_frame(reader, READ_TIMEOUT))
                await call.write_frame(writer, call.encode_answer(answer), READ_TIMEOUT)
        except CniError as error:
            log.warning("CNI call: %s %s", error.message, error.details)
        finally:
            writer.close()

    async def _answer(self, body: bytes) -> Answer:
        started = time.monotonic()
        command, result, version = "unknown", "ok", "1.1.0"
        try:
            asked = call.decode_call(body)
            version = request.version_of(asked.config)
            found = asked.request()
            command = found.command.value
            return await self._handler(found)
        except CniError as error:
            result = str(int(error.code))
            log.info("CNI %s: %s %s", command, error.message, error.details)
            return call.failure(error, version)
        except Exception as error:
            # The runtime must get an error it can show on the pod, whatever went wrong here.
            log.exception("CNI %s", command)
            result = str(int(Code.INTERNAL))
            return call.failure(CniError(Code.INTERNAL, f"{type(error).__name__}: {error}"), version)
        finally:
            metrics.CNI_REQUESTS.labels(command, result).observe(time.monotonic() - started)
