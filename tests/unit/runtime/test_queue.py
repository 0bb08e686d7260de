import asyncio
from collections.abc import Callable

import pytest

from vmnet.runtime.backoff import Backoff
from vmnet.runtime.queue import KeyedQueue, work

DEADLINE = 10


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.001)


async def test_equal_keys_are_taken_once() -> None:
    queue = KeyedQueue()
    for key in ("red", "blue", "red", "red"):
        queue.add(key)
    assert [await queue.get(), await queue.get()] == ["red", "blue"]
    assert len(queue) == 0


async def test_a_key_added_while_it_is_worked_on_comes_again_afterwards() -> None:
    queue = KeyedQueue()
    queue.add("red")
    assert await queue.get() == "red"
    queue.add("red")
    assert len(queue) == 0
    queue.done("red")
    assert await queue.get() == "red"
    queue.done("red")
    assert queue.idle


async def test_the_earlier_of_two_timers_holds_and_taking_the_key_drops_it() -> None:
    queue = KeyedQueue()
    queue.add_after("red", 3600)
    queue.add_after("red", 0.01)
    queue.add_after("red", 1800)
    async with asyncio.timeout(DEADLINE):
        assert await queue.get() == "red"
    queue.done("red")
    queue.add_after("red", 0.02)
    queue.add("red")
    await queue.get()
    queue.done("red")
    await asyncio.sleep(0.05)
    assert len(queue) == 0


async def test_a_key_that_settles_waits_for_the_last_call_but_no_longer_than_the_longest() -> None:
    queue, loop = KeyedQueue(), asyncio.get_running_loop()
    begun, taken = loop.time(), asyncio.create_task(queue.get())
    while not taken.done():  # never quiet: it would wait for ever but for the longest
        queue.add_settled("red", 3600, 0.05)
        await asyncio.sleep(0.001)
    assert loop.time() - begun >= 0.05
    queue.done("red")
    begun = loop.time()
    queue.add_settled("red", 0.03, 3600)
    queue.add_settled("red", 0.05, 3600)
    assert await asyncio.wait_for(queue.get(), DEADLINE) == "red"
    assert loop.time() - begun >= 0.05
    queue.done("red")
    assert queue.idle


async def test_a_key_that_settles_is_taken_early_by_whoever_asks_and_not_again() -> None:
    queue = KeyedQueue()
    queue.add_settled("red", 0.02, 3600)
    queue.add("red")
    assert await queue.get() == "red"
    queue.done("red")
    queue.add_settled("red", 3600, 7200)
    queue.add_after("red", 0.01)
    assert await asyncio.wait_for(queue.get(), DEADLINE) == "red"
    queue.done("red")
    await asyncio.sleep(0.05)
    assert len(queue) == 0


async def test_back_off_grows_until_the_key_is_forgotten() -> None:
    queue = KeyedQueue(Backoff(first=1, most=100, jitter=0))
    assert [queue.retry("red"), queue.retry("red"), queue.retry("blue")] == [1, 2, 1]
    queue.forget("red")
    assert queue.retry("red") == 1
    queue.close()


async def test_one_key_is_serial_and_different_keys_are_parallel() -> None:
    queue = KeyedQueue()
    inside: list[str] = []
    together: set[frozenset[str]] = set()
    gate = asyncio.Event()
    runs = 0

    async def reconcile(key: str) -> None:
        nonlocal runs
        assert key not in inside
        inside.append(key)
        together.add(frozenset(inside))
        runs += 1
        if runs == 1:
            queue.add(key)
        await gate.wait()
        inside.remove(key)

    task = asyncio.create_task(work(queue, reconcile, workers=3, kind="test"))
    queue.add("red")
    queue.add("blue")
    await until(lambda: frozenset({"red", "blue"}) in together)
    gate.set()
    await until(lambda: runs == 3 and queue.idle)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_failures_are_tried_again_and_results_observed() -> None:
    queue = KeyedQueue(Backoff(first=0.001, most=0.002))
    seen: list[str] = []
    calls = 0

    async def reconcile(key: str) -> float | None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("broken")
        if calls == 2:
            raise KeyError("expected")
        return 0.001 if calls == 3 else None

    task = asyncio.create_task(
        work(
            queue,
            reconcile,
            kind="test",
            observe=lambda kind, result, seconds: seen.append(result),
            expected=(KeyError,),
        )
    )
    queue.add("red")
    await until(lambda: len(seen) == 4)
    assert seen == ["error", "error", "requeued", "ok"]
    assert queue.failures("red") == 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_reconciler_that_adds_its_own_key_and_never_waits_starves_nobody() -> None:
    queue, rounds = KeyedQueue(), 0

    async def reconcile(key: str) -> None:
        nonlocal rounds
        rounds += 1
        queue.add(key)

    queue.add("red")
    working = asyncio.create_task(work(queue, reconcile))
    await asyncio.sleep(0)
    before = rounds
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert before <= rounds <= before + 8, "a turn of the loop is a turn for everybody"
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert rounds > 0
