"""Asking the agent of the node that a command runs on, by its Unix socket (``vmnet.agent.inspection``)."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

SECONDS: Final = 35.0
LONGEST: Final = 64 << 20
"""Octets of an answer."""


async def ask(path: Path, what: str, question: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One question. Raises OSError: no agent listens there, or it does not answer."""
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_unix_connection(str(path), limit=LONGEST)
            try:
                writer.write(json.dumps({"ask": what, **(question or {})}).encode() + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError as error:
        raise OSError(f"the agent at {path} did not answer within {SECONDS:g} s") from error
    except OSError as error:
        raise OSError(f"no agent at {path}: {error.strerror or error}") from error
    if not line:
        raise OSError(f"the agent at {path} closed the connection")
    found: dict[str, Any] = json.loads(line)
    return found
