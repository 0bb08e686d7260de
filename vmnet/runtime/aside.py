"""Long calculations beside the event loop, which goes on reading events and answering names meanwhile."""

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

SWITCH_SECONDS: Final = 0.0005
"""How long the event loop waits at most when it has something to do while a calculation runs (Python: 0.005)."""

Result = TypeVar("Result")

_WORKER: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside")
"""One thread: two calculations at a time would end no sooner, and keep the event loop waiting for twice as long."""


def share() -> None:
    """Let the threads of this process take turns often enough for an event loop that answers within milliseconds."""
    sys.setswitchinterval(SWITCH_SECONDS)


async def aside(function: Callable[..., Result], *arguments: object) -> Result:
    """The result of a function of values that nobody changes meanwhile. Whoever waits may go away, it ends by itself.

    One step of the interpreter is never interrupted: a single call of ``json.loads`` or ``sorted`` holds up all others.
    """
    return await asyncio.get_running_loop().run_in_executor(_WORKER, function, *arguments)
