"""Answering commands on the node: one Unix socket, one question for each connection.

A question is a line of JSON, ``{"ask": "status", …}``; so is what comes back. ``vmnet.inspect.local`` asks.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

SECONDS: Final = 30.0
"""For an answer."""
LONGEST: Final = 4096
"""Octets of a question."""

Answerer = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""Gets the whole question, returns the answer; ``{"error": …}`` where it cannot be answered."""


class Inspection:
    """Serves what ``answerers`` know, by what is asked for."""

    def __init__(self, path: Path, answerers: Mapping[str, Answerer]) -> None:
        self._path = path
        self._answerers = dict(answerers)
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; only root may ask. A socket that a dead agent left behind is replaced."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._server = await asyncio.start_unix_server(self._serve, path=self._path, limit=LONGEST)
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            self._server = None
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(SECONDS):
                line = await reader.readline()
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (OSError, TimeoutError, ValueError) as error:
            log.info("a question was not answered: %s", error or type(error).__name__)
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            question = json.loads(line)
            answerer = self._answerers[question["ask"]]
        except (ValueError, KeyError, TypeError):
            return {"error": f"bad question: ask for one of {', '.join(sorted(self._answerers))}"}
        return await answerer(question)
