"""When things are sent again: times as values, for the shell that arms one timer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

ROUNDS: Final = (0.0, 0.05, 0.2, 0.5, 1.0, 3.0)
"""Seconds after the move. As QEMU's own announcements, and on beyond the second in which a slow peer may be deaf."""
JITTER: Final = 0.2
"""Each gap is up to this share longer, so that the machines of a drained node do not speak in chorus."""

INITIAL_ADVERTISEMENTS: Final = 3  # RFC 4861 section 10, MAX_INITIAL_RTR_ADVERTISEMENTS
INITIAL_INTERVAL: Final = 16.0  # RFC 4861 section 10, MAX_INITIAL_RTR_ADVERT_INTERVAL, seconds
MAX_INTERVAL: Final = 600.0  # RFC 4861 section 6.2.1, MaxRtrAdvInterval, seconds
MIN_INTERVAL: Final = 0.33 * MAX_INTERVAL  # RFC 4861 section 6.2.1, MinRtrAdvInterval

Draw = Callable[[float, float], float]
"""A number between two bounds, as ``random.uniform``."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """A bounded series. ``times`` are what is still to come, ascending, on the caller's clock in seconds."""

    times: tuple[float, ...]

    def next_at(self) -> float | None:
        """When to look again; None when the series is over."""
        return self.times[0] if self.times else None

    def due(self, now: float) -> bool:
        """Is a round due?"""
        return bool(self.times) and self.times[0] <= now

    def after(self, now: float) -> "Rounds":
        """The series once the due round was sent. Rounds that a late caller missed are not made up for."""
        return Rounds(tuple(time for time in self.times if time > now))


def announcement_rounds(now: float, draw: Draw) -> Rounds:
    """The rounds after a move; the first is due at once."""
    times: list[float] = [now]
    for previous, offset in pairwise(ROUNDS):
        gap = offset - previous
        times.append(times[-1] + gap + draw(0, JITTER * gap))
    return Rounds(tuple(times))


@dataclass(frozen=True, slots=True)
class Advertising:
    """Unsolicited router advertisements of one network (RFC 4861 section 6.2.4): endless, the first few close by."""

    at: float
    initial: int

    def next_at(self) -> float:
        """When the next one is due."""
        return self.at

    def due(self, now: float) -> bool:
        """Is one due?"""
        return self.at <= now

    def after(self, now: float, draw: Draw) -> "Advertising":
        """The schedule once the due one was sent at ``now``."""
        interval = draw(MIN_INTERVAL, MAX_INTERVAL)
        if self.initial > 1:
            return replace(self, at=now + min(interval, INITIAL_INTERVAL), initial=self.initial - 1)
        return Advertising(now + interval, 0)


def advertising(now: float) -> Advertising:
    """A network that begins to advertise, or whose advertisements have changed."""
    return Advertising(now, INITIAL_ADVERTISEMENTS)
