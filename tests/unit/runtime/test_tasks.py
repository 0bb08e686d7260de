import asyncio

import pytest

from vmnet.runtime.tasks import TaskScope, TaskSet, first_failure


async def forever() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise ValueError("broken")


async def test_the_end_of_the_block_ends_its_tasks() -> None:
    async with asyncio.timeout(10):
        async with TaskScope() as scope:
            task = scope.start(forever(), "waiter")
            assert task.get_name() == "waiter"
    assert task.cancelled()


async def test_a_failing_task_ends_the_block() -> None:
    with pytest.RaisesGroup(ValueError):
        async with asyncio.timeout(10), TaskScope() as scope:
            scope.start(fail(), "broken")
            await forever()


async def test_a_service_must_not_return() -> None:
    async def short() -> None:
        return

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="watcher ended")):
        async with asyncio.timeout(10), TaskScope() as scope:
            scope.service(short(), "watcher")
            await forever()


async def test_failures_in_a_set_are_told_and_touch_nobody_else() -> None:
    failures: list[str] = []
    tasks = TaskSet(lambda name, error: failures.append(f"{name}: {error}"))
    waiter = tasks.start(forever(), "waiter")
    with pytest.raises(ValueError):
        await tasks.start(fail(), "broken")
    await asyncio.sleep(0)
    assert failures == ["broken: broken"]
    assert not waiter.done()
    await tasks.close()
    assert waiter.cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        tasks.start(forever(), "late")


def test_the_first_failure_is_found_in_groups_within_groups() -> None:
    cause = KeyError("first")
    group = BaseExceptionGroup("outer", [ExceptionGroup("inner", [cause, ValueError()]), OSError()])
    assert first_failure(group) is cause
    assert first_failure(cause) is cause
