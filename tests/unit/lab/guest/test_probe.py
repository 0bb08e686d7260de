"""The traffic probe against itself, in one process each, over loopback in a namespace of its own."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from vmnet.lab.guest.probe import probe_binary

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")


@asynccontextmanager
async def server() -> AsyncIterator[tuple[str, ...]]:
    """Serving in a new namespace; yields what enters it."""
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", str(probe_binary()), "serve"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(10):
            await process.stdout.readline()
        yield ("nsenter", "-t", str(process.pid), "-n", "--")
    finally:
        process.kill()
        await process.communicate()


async def start(prefix: tuple[str, ...], *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *prefix,
        str(probe_binary()),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def link(prefix: tuple[str, ...], state: str) -> None:
    process = await asyncio.create_subprocess_exec(*prefix, "ip", "link", "set", "lo", state)
    assert await process.wait() == 0


async def result(process: asyncio.subprocess.Process, stdin: bytes = b"") -> dict[str, Any]:
    async with asyncio.timeout(20):
        output, _ = await process.communicate(stdin)
    return dict(json.loads(output.decode().splitlines()[-1]))


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_echo(address: str) -> None:
    async with server() as prefix:
        found = await result(await start(prefix, "udp", address, "7007", "500", "0.5"))
    assert found["sent"] == found["received"] > 100
    assert (found["lost"], found["duplicates"], found["reordered"], found["errors"]) == (0, 0, 0, 0)
    assert found["rtt_p50_ms"] <= found["rtt_p99_ms"]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_streams(address: str) -> None:
    async with server() as prefix:
        sending = await start(prefix, "send", address, "7008", "0.5", "200000")
        receiving = await start(prefix, "receive", address, "7009", "0.5")
        sent, received = await result(sending), await result(receiving)
    assert (sent["resets"], sent["errors"], received["resets"], received["errors"]) == (0, 0, 0, 0)
    assert 50_000 < sent["bytes"] < 200_000
    assert received["bytes"] > 50_000


async def test_stop_by_standard_input_and_progress() -> None:
    async with server() as prefix:
        process = await start(prefix, "udp", "127.0.0.1", "7007", "100", "600", "--json-lines")
        assert process.stdout is not None
        async with asyncio.timeout(10):
            progress = json.loads(await process.stdout.readline())
        found = await result(process, b"stop\n")
    assert progress["progress"] == "udp"
    assert found["result"] == "udp"
    assert found["sent"] >= progress["sent"] > 0


async def test_a_silence_is_a_gap_and_a_loss() -> None:
    async with server() as prefix:
        process = await start(prefix, "udp", "127.0.0.1", "7007", "200", "600")
        await asyncio.sleep(0.5)
        await link(prefix, "down")
        await asyncio.sleep(0.4)
        await link(prefix, "up")
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        found = await result(process)
    assert found["lost"] > 30
    assert found["longest_gap_ms"] > 300
    assert any(gap["ms"] > 300 and gap["at_ms"] > 300 for gap in found["gaps"])


async def test_a_refused_connection_is_a_reset() -> None:
    async with server() as prefix:
        process = await start(prefix, "send", "127.0.0.1", "7", "5")
        found = await result(process)
    assert (process.returncode, found["resets"], found["bytes"]) == (1, 1, 0)


async def test_bad_arguments_are_named() -> None:
    process = await start((), "resolve", "name", "MX")
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"MX is not A, AAAA or PTR" in errors
