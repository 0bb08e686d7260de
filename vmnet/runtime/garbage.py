"""Short breaks for garbage: looking through everything that a process knows takes hundreds of milliseconds."""

import asyncio
import contextlib
import gc
from collections.abc import Iterator
from typing import Final

ROUND_SECONDS: Final = 300.0
NEVER: Final = 1 << 30


@contextlib.contextmanager
def short_breaks() -> Iterator[None]:
    """Inside, the interpreter looks of its own accord at what is young only: ``collect`` does the rest."""
    before = gc.get_threshold()
    gc.set_threshold(before[0], before[1], NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


async def collect() -> None:
    """Until cancelled, now and every five minutes: collect what is garbage, and spare what is left from then on.

    What is spared and thrown away later is freed at once, as ever, unless it refers to itself in a circle.
    """
    while True:
        gc.collect()
        gc.freeze()
        await asyncio.sleep(ROUND_SECONDS)
