"""vmnet.runtime.garbage: what is known for long is not looked through again and again."""

import asyncio
import gc
import weakref

from vmnet.runtime.garbage import NEVER, collect, short_breaks


class Ring:
    """Refers to itself."""

    def __init__(self) -> None:
        self.own = self


def test_inside_only_what_is_young_is_looked_at_unasked() -> None:
    before = gc.get_threshold()
    with short_breaks():
        assert gc.get_threshold() == (*before[:2], NEVER)
    assert gc.get_threshold() == before


async def test_garbage_is_collected_and_the_rest_is_spared() -> None:
    with short_breaks():
        ring = weakref.ref(Ring())
        collecting = asyncio.create_task(collect())
        await asyncio.sleep(0)
        spared = gc.get_freeze_count()
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)

    assert ring() is None
    assert spared > 0
    assert gc.get_freeze_count() == 0
