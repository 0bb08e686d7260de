import pytest

from vmnet.runtime.backoff import Backoff


def test_the_first_try_does_not_wait() -> None:
    assert Backoff().delay(0, 0.5) == 0


def test_delays_grow_up_to_the_most() -> None:
    backoff = Backoff(first=1, most=10, factor=2, jitter=0)
    assert [backoff.delay(failures, 0.3) for failures in range(1, 7)] == [1, 2, 4, 8, 10, 10]


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.999])
def test_jitter_only_shortens_by_its_share(chance: float) -> None:
    delay = Backoff(first=4, most=4, jitter=0.25).delay(3, chance)
    assert 3 <= delay <= 4


def test_ten_thousand_failures_do_not_overflow() -> None:
    assert Backoff(first=0.1, most=30, jitter=0).delay(10_000, 0) == 30
