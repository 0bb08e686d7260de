"""The control socket: answers, errors with their next step, and callers that ask nonsense."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vmnet.lab import control
from vmnet.lab.errors import LabError


async def echo(body: Mapping[str, Any]) -> control.Body:
    return {"said": body["word"]}


async def refuse(_: Mapping[str, Any]) -> control.Body:
    raise LabError("no process 'x'", "it has a, b")


async def test_a_call_and_its_answer(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with await control.serve(path, {"echo": echo}):
        assert await control.call(path, 5, "echo", word="x" * 1_000_000) == {"said": "x" * 1_000_000}


async def test_errors_keep_their_next_step(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with await control.serve(path, {"refuse": refuse, "echo": echo}):
        with pytest.raises(LabError) as caught:
            await control.call(path, 5, "refuse")
        assert (str(caught.value), caught.value.next_step) == ("no process 'x'", "it has a, b")
        with pytest.raises(LabError, match="does not know"):
            await control.call(path, 5, "fly")
        with pytest.raises(LabError, match="malformed"):
            await control.call(path, 5, "echo")


async def test_a_lab_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="is not up") as caught:
        await control.call(tmp_path / "control.sock", 5, "status")
    assert "vmnet lab up" in caught.value.next_step


async def test_a_lab_that_does_not_answer(tmp_path: Path) -> None:
    async def hang(_: Mapping[str, Any]) -> control.Body:
        await asyncio.sleep(30)
        return {}

    path = tmp_path / "control.sock"
    async with await control.serve(path, {"hang": hang}):
        with pytest.raises(LabError, match="did not answer"):
            await control.call(path, 0.1, "hang")
