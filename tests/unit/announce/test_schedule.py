"""Schedules as values."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmnet.announce import schedule
from vmnet.announce.schedule import (
    INITIAL_INTERVAL,
    JITTER,
    MAX_INTERVAL,
    MIN_INTERVAL,
    ROUNDS,
    Advertising,
    Draw,
    Rounds,
    advertising,
    announcement_rounds,
)


def least(low: float, high: float) -> float:
    return low


def most(low: float, high: float) -> float:
    return high


def test_the_first_round_is_due_at_once_and_the_series_ends() -> None:
    rounds = announcement_rounds(100.0, least)
    sent = []
    while (at := rounds.next_at()) is not None:
        assert not rounds.due(at - 0.001)
        assert rounds.due(at)
        sent.append(round(at - 100.0, 6))
        rounds = rounds.after(at)
    assert tuple(sent) == ROUNDS
    assert not rounds.due(1e9)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.floats(0, 1), st.floats(0, 1e6))
def test_jitter_only_stretches_and_is_bounded(share: float, now: float) -> None:
    times = announcement_rounds(now, lambda low, high: low + share * (high - low)).times
    assert times[0] == now
    assert sorted(times) == list(times)
    assert times[-1] - now <= ROUNDS[-1] * (1 + JITTER) + 1e-6
    assert times[-1] - now >= ROUNDS[-1] - 1e-6


def test_a_late_caller_sends_one_round_for_all_it_missed() -> None:
    rounds = announcement_rounds(0.0, least).after(0.0)
    assert rounds.due(0.6)
    assert rounds.after(0.6) == Rounds((1.0, 3.0))
    assert rounds.after(60.0).next_at() is None


@pytest.mark.parametrize("draw", [least, most])
def test_advertisements_begin_close_together_and_go_on_for_ever(draw: Draw) -> None:
    state = advertising(0.0)
    times = []
    for _ in range(6):
        assert not state.due(state.next_at() - 0.001)
        times.append(state.next_at())
        state = state.after(times[-1], draw)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert times[0] == 0.0
    assert gaps[:2] == [INITIAL_INTERVAL] * 2, "three initial advertisements"
    assert all(MIN_INTERVAL <= gap <= MAX_INTERVAL for gap in gaps[2:])


def test_a_late_advertisement_is_not_made_up_for() -> None:
    state = Advertising(10.0, 0).after(5000.0, most)
    assert state.next_at() == 5000.0 + MAX_INTERVAL


def test_the_router_lives_longer_than_its_advertisements_are_apart() -> None:
    from vmnet.wire.router import ROUTER_LIFETIME

    assert ROUTER_LIFETIME > 3 * schedule.MAX_INTERVAL
