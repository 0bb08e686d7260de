"""Somebody deletes parts of a network under a running agent; it tells, and mends them. Then it is uninstalled."""

import asyncio
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("self_test_node.py")
ENTER = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec"]
# A private /run, so that no namespace made here has a name outside.
PREPARE = 'mount -t tmpfs tmpfs /run; mkdir /run/netns; ip link set lo up; exec "$0" "$@"'


async def run(case: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(*ENTER, PREPARE, sys.executable, str(PROGRAM), case),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 110)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_what_is_broken_is_told_and_mended() -> None:
    assert (await run("mended")).count("mended") >= 14


async def test_nothing_is_left_of_what_is_uninstalled() -> None:
    await run("uninstalled")
