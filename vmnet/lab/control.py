"""The socket by which commands and tests steer a running lab: one JSON object per line each way, one call a connection.

A call is ``{"command": …, …}``; the answer ``{"ok": true, …}`` or ``{"ok": false, "error": …, "next_step": …}``.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from vmnet.lab.errors import LabError

log = logging.getLogger(__name__)

LINE_LIMIT: Final = 64 << 20
"""Bytes of a line: the output of a program that was run in a host is one."""

Body = dict[str, Any]
Command = Callable[[Mapping[str, Any]], Awaitable[Body]]


async def call(path: Path, timeout: float, command: str, **arguments: Any) -> Body:
    """One call. Raises LabError: the lab's own, or that it is not there."""
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(str(path), limit=LINE_LIMIT)
            try:
                writer.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
                await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
    except (FileNotFoundError, ConnectionError) as error:
        raise LabError(f"lab {path.parent.name!r} is not up ({error})", "start it with: vmnet lab up") from error
    except TimeoutError:
        raise LabError(
            f"lab {path.parent.name!r} did not answer {command!r} within {timeout:g} s",
            f"see {path.parent}/logs/init.log",
        ) from None
    if not line:
        raise LabError(f"lab {path.parent.name!r} ended during {command!r}")
    body: Body = json.loads(line)
    if not body.pop("ok"):
        raise LabError(body["error"], body.get("next_step", ""))
    return body


async def serve(path: Path, commands: Mapping[str, Command]) -> asyncio.AbstractServer:
    """Listen; each call runs as a task of its own connection."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            if line:
                writer.write(json.dumps(await answer(line)).encode() + b"\n")
                await writer.drain()
        except ConnectionError as error:
            log.info("control connection: %s", error)
        finally:
            writer.close()

    async def answer(line: bytes) -> Body:
        try:
            body = json.loads(line)
            command = commands[body["command"]]
        except (ValueError, KeyError, TypeError):
            return {"ok": False, "error": f"the lab does not know the command {line[:200]!r}"}
        try:
            return {"ok": True, **await command(body)}
        except LabError as error:
            return {"ok": False, "error": str(error), "next_step": error.next_step}
        except (KeyError, TypeError, ValueError) as error:
            return {"ok": False, "error": f"malformed call {line[:200]!r}: {error!r}"}

    return await asyncio.start_unix_server(connected, str(path), limit=LINE_LIMIT)
