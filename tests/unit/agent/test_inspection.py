"""The socket on which commands on the node ask the agent."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vmnet.agent.inspection import Inspection
from vmnet.inspect.local import ask


async def echo(question: Mapping[str, Any]) -> dict[str, Any]:
    return {"heard": dict(question)}


async def long(question: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": "x" * 1_000_000}


async def test_what_is_asked_for_decides_who_answers(tmp_path: Path) -> None:
    path = tmp_path / "run" / "agent.sock"
    path.parent.mkdir()
    path.write_text("what a dead agent has left")
    inspection = Inspection(path, {"echo": echo, "long": long})
    await inspection.start()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert await ask(path, "echo", {"a": 1}) == {"heard": {"ask": "echo", "a": 1}}
    assert len((await ask(path, "long"))["text"]) == 1_000_000
    assert await ask(path, "other") == {"error": "bad question: ask for one of echo, long"}
    await inspection.close()
    assert not path.exists()
    with pytest.raises(OSError, match=f"no agent at {path}"):
        await ask(path, "echo")
