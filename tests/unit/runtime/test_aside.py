"""vmnet.runtime.aside: the event loop goes on while something long is calculated."""

import asyncio
import sys
import threading

import pytest

from vmnet.runtime.aside import SWITCH_SECONDS, aside, share


async def test_the_event_loop_goes_on_meanwhile() -> None:
    answered = threading.Event()
    calculation = asyncio.create_task(aside(answered.wait, 60))
    await asyncio.sleep(0)
    answered.set()  # a loop that waited for the calculation would not come here

    assert await calculation


async def test_a_failure_is_the_callers() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        await aside(int, "x")


def test_threads_take_turns_often() -> None:
    before = sys.getswitchinterval()
    try:
        share()
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    finally:
        sys.setswitchinterval(before)
