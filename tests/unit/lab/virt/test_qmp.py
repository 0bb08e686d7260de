"""The monitor's protocol against a scripted QEMU."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from vmnet.lab.virt.qmp import QemuError, Qmp

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


@asynccontextmanager
async def qemu(path: Path) -> AsyncIterator[list[dict[str, object]]]:
    """Answers ``ok``, refuses ``bad``, tells STOP before it answers ``stop``, hangs up on ``quit``."""
    heard: list[dict[str, object]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        while line := await reader.readline():
            message = json.loads(line)
            heard.append(message)
            answer: dict[str, object] = {"return": {"heard": message["execute"]}, "id": message["id"]}
            if message["execute"] == "bad":
                answer = {"error": {"class": "GenericError", "desc": "no such thing"}, "id": message["id"]}
            if message["execute"] == "stop":
                event = {"event": "STOP", "timestamp": {"seconds": 10, "microseconds": 250000}}
                # In two pieces: a line may come in any number of reads.
                text = json.dumps(event).encode()
                writer.write(text[:7])
                await writer.drain()
                await asyncio.sleep(0)
                writer.write(text[7:] + b"\r\n")
            if message["execute"] == "quit":
                break
            writer.write(json.dumps(answer).encode() + b"\r\n")
        writer.close()

    server = await asyncio.start_unix_server(serve, str(path))
    async with server:
        yield heard


async def test_commands_answers_and_errors(tmp_path: Path) -> None:
    async with qemu(tmp_path / "q") as heard, await Qmp.connect(tmp_path / "q") as monitor:
        assert heard[0]["execute"] == "qmp_capabilities"
        assert await monitor.execute("ok", some_thing=1) == {"heard": "ok"}
        assert heard[1]["arguments"] == {"some-thing": 1}
        with pytest.raises(QemuError, match="no such thing"):
            await monitor.execute("bad")
        answers = await asyncio.gather(*(monitor.execute(name) for name in ("a", "b", "c")))
        assert [answer["heard"] for answer in answers] == ["a", "b", "c"]


async def test_events_carry_qemus_time(tmp_path: Path) -> None:
    async with qemu(tmp_path / "q"), await Qmp.connect(tmp_path / "q") as monitor:
        told: list[str] = []
        monitor.listen(lambda event: told.append(event.name))
        await monitor.execute("stop")
        event = await monitor.wait_for(lambda event: event.name == "STOP", 5)
        assert event.time == 10.25
        assert told == ["STOP"]
        with pytest.raises(QemuError, match="did not report"):
            await monitor.wait_for(lambda event: event.name == "RESUME", 0.05)


async def test_the_end_of_qemu(tmp_path: Path) -> None:
    async with qemu(tmp_path / "q"), await Qmp.connect(tmp_path / "q") as monitor:
        waiting = asyncio.ensure_future(monitor.wait_for(lambda event: False, 5))
        with pytest.raises(QemuError, match="went away"):
            await monitor.execute("quit")
        with pytest.raises(QemuError, match="went away"):
            await waiting
        with pytest.raises(QemuError, match="went away"):
            await monitor.execute("ok")


async def test_no_monitor(tmp_path: Path) -> None:
    with pytest.raises(QemuError, match="no monitor"):
        await Qmp.connect(tmp_path / "none", timeout=0.1)
