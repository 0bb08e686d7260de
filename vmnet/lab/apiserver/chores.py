"""A queue of things to look at, each once however often it is named, worked off by one task."""

import asyncio
import logging
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

_log = logging.getLogger(__name__)
BATCH: Final = 32
"""Items worked off before requests get a turn."""


class Chores(Generic[Item]):
    """``work`` is called with one item at a time; it is synchronous, like every write to the store."""

    def __init__(self, name: str, work: Callable[[Item], None]) -> None:
        self._name = name
        self._work = work
        self._pending: dict[Item, None] = {}
        self._ready = asyncio.Event()

    def add(self, item: Item) -> None:
        """Have an item looked at soon."""
        self._pending[item] = None
        self._ready.set()

    async def run(self) -> None:
        """Work until cancelled. What fails is logged and left until it is named again."""
        while True:
            await self._ready.wait()
            for _ in range(BATCH):
                if not self._pending:
                    self._ready.clear()
                    break
                item = next(iter(self._pending))
                del self._pending[item]
                try:
                    self._work(item)
                except Exception:
                    _log.exception("%s: %s", self._name, item)
            await asyncio.sleep(0)
