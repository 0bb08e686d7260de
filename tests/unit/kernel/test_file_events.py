"""inotify on a real directory."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from vmnet.kernel import file_events
from vmnet.kernel.file_events import DirectoryEvents

SECONDS = 30.0


async def test_everything_that_installers_do_is_told(tmp_path: Path) -> None:
    target, aside = tmp_path / "10-a.conflist", tmp_path / "aside"
    events = DirectoryEvents(tmp_path)
    # What happened before may have been missed.
    assert await events.changed(SECONDS)
    for act in (
        lambda: target.write_text("one"),
        lambda: target.write_text("two"),
        lambda: (aside.write_text("three"), aside.replace(target)),
        lambda: target.rename(tmp_path / "10-a.conflist.cilium_bak"),
        lambda: (tmp_path / "10-a.conflist.cilium_bak").unlink(),
    ):
        act()
        assert await events.changed(SECONDS)
        while await events.changed(0.01):
            pass
    events.close()


async def test_silence_is_told_too(tmp_path: Path) -> None:
    events = DirectoryEvents(tmp_path)
    assert await events.changed(SECONDS)
    assert not await events.changed(0.01)
    (tmp_path / "x").write_text("")
    assert await events.changed(SECONDS)
    events.close()
    events.close()


async def test_where_nothing_can_be_told_it_is_looked_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_events, "UNTOLD", 0.01)
    events = DirectoryEvents(tmp_path / "none")
    async with asyncio.timeout(SECONDS):
        assert not await events.changed(10 * SECONDS)
    events.close()
    # As on a node that has no inotify instance left.
    async with asyncio.timeout(SECONDS):
        assert not await events.changed(10 * SECONDS)


async def test_a_directory_that_comes_late_and_one_that_is_replaced_are_followed(tmp_path: Path) -> None:
    directory = tmp_path / "net.d"
    events = DirectoryEvents(directory)
    assert not await events.changed(0.01)
    directory.mkdir()
    assert await events.changed(SECONDS)
    shutil.rmtree(directory)
    while await events.changed(0.01):
        pass
    directory.mkdir()
    os.utime(directory)
    assert await events.changed(SECONDS)
    running = asyncio.create_task(events.changed(SECONDS))
    await asyncio.sleep(0)
    (directory / "x").write_text("")
    assert await running
    events.close()
