"""The keyed work queue between informers and reconcilers.

A key that is added many times before it is taken is worked on once. One key is never worked on twice at the same time;
a key that is added while it is worked on is worked on again afterwards. Different keys run side by side.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable

from vmnet.runtime.backoff import Backoff

log = logging.getLogger(__name__)

Observe = Callable[[str, str, float], None]
"""Called with (kind, result, seconds) after every reconciliation; result is ``ok``, ``requeued`` or ``error``."""


class KeyedQueue:
    """Coalescing queue of keys. All methods belong to the event loop's thread."""

    def __init__(self, backoff: Backoff | None = None, *, chance: Callable[[], float] = random.random) -> None:
        self._backoff = backoff or Backoff()
        self._chance = chance
        self._ready: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[str] = set()
        self._running: set[str] = set()
        self._again: set[str] = set()
        self._failures: dict[str, int] = {}
        self._why: dict[str, str] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._unsettled: dict[str, tuple[float, asyncio.TimerHandle]] = {}
        """Since when (loop time) something happens to a key again and again, and the timer that ends the wait."""

    def __len__(self) -> int:
        """Keys that are ready and not taken (those that wait for a timer do not count)."""
        return len(self._queued)

    @property
    def idle(self) -> bool:
        """True when nothing is ready or worked on; timers may still be armed."""
        return not self._queued and not self._running

    def add(self, key: str) -> None:
        """Work on ``key`` as soon as possible."""
        if key in self._running:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.put_nowait(key)

    def add_after(self, key: str, seconds: float) -> None:
        """Work on ``key`` after ``seconds``, unless something asks for it earlier."""
        if seconds <= 0:
            self.add(key)
            return
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= loop.time() + seconds:
                return
            timer.cancel()
        self._timers[key] = loop.call_later(seconds, self._due, key)

    def add_settled(self, key: str, quiet: float, longest: float) -> None:
        """Work on ``key`` once this has not been called for ``quiet`` seconds, or ``longest`` seconds after the first
        call, unless something asks for it earlier."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        if key in self._unsettled:
            since, timer = self._unsettled[key]
            timer.cancel()
        due = min(loop.time() + quiet, since + longest)
        self._unsettled[key] = since, loop.call_at(due, self._due, key)

    def retry(self, key: str, why: str = "") -> float:
        """Work on ``key`` again after its back-off, which grows with every call until ``forget``. Returns the delay."""
        self._failures[key] = self._failures.get(key, 0) + 1
        self._why[key] = why
        delay = self._backoff.delay(self._failures[key], self._chance())
        self.add_after(key, delay)
        return delay

    def forget(self, key: str) -> None:
        """``key`` succeeded: its next failure waits the shortest delay again."""
        self._failures.pop(key, None)
        self._why.pop(key, None)

    def failing(self) -> dict[str, tuple[int, str]]:
        """Keys whose last work failed: how often in a row, and why."""
        return {key: (count, self._why.get(key, "")) for key, count in self._failures.items()}

    def failures(self, key: str) -> int:
        """Failures of ``key`` in a row."""
        return self._failures.get(key, 0)

    async def get(self) -> str:
        """Take a key; ``done`` gives it back. An armed timer of the key is dropped: its work happens now."""
        key = await self._ready.get()
        self._queued.discard(key)
        self._running.add(key)
        self._disarm(key)
        return key

    def done(self, key: str) -> None:
        """The work on ``key`` ended, well or badly."""
        self._running.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def close(self) -> None:
        """Disarm all timers."""
        for key in (*self._timers, *self._unsettled):
            self._disarm(key)

    def _disarm(self, key: str) -> None:
        _, settled = self._unsettled.pop(key, (0.0, None))
        for timer in (self._timers.pop(key, None), settled):
            if timer is not None:
                timer.cancel()

    def _due(self, key: str) -> None:
        self._disarm(key)
        self.add(key)


async def work(
    queue: KeyedQueue,
    reconcile: Callable[[str], Awaitable[float | None]],
    workers: int = 4,
    kind: str = "",
    *,
    observe: Observe | None = None,
    expected: tuple[type[Exception], ...] = (),
) -> None:
    """Reconcile keys until cancelled, ``workers`` at a time.

    ``reconcile`` returns None, or the seconds after which it wants to look at the key again. An exception is logged
    (with a traceback, unless it is one of the ``expected`` kinds, such as a write conflict) and tried again after the
    key's back-off.
    """

    async def one(key: str) -> None:
        started = time.monotonic()
        result = "ok"
        try:
            again = await reconcile(key)
        except Exception as error:
            result = "error"
            delay = queue.retry(key, str(error) or type(error).__name__)
            if isinstance(error, expected):
                log.info("%s %s: %s; again in %.1f s", kind, key, error, delay)
            else:
                log.exception("%s %s failed %d times; again in %.1f s", kind, key, queue.failures(key), delay)
        else:
            queue.forget(key)
            if again is not None:
                result = "requeued"
                queue.add_after(key, again)
        finally:
            queue.done(key)
        if observe is not None:
            observe(kind, result, time.monotonic() - started)
        # A key that is there again, and a reconciler that never waited, must not keep everything else from running.
        await asyncio.sleep(0)

    async def worker() -> None:
        while True:
            await one(await queue.get())

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(workers):
                group.create_task(worker(), name=f"{kind or 'work'}-{number}")
    finally:
        queue.close()
