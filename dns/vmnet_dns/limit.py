"""How much one client may ask: a token bucket per address, in bounded memory. Pure; time is an argument."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

CLIENTS: Final = 4096
"""Buckets kept; of more clients the one that was known for longest starts anew."""


@dataclass(slots=True)
class Bucket:
    """What one client may still ask before the clock is looked at again."""

    tokens: float
    at: float


class ClientLimit:
    """``rate`` queries a second for ever, ``burst`` at once.

    A bucket is filled up when it is empty, for the time since it was last filled: that is cheaper than at every query,
    and a client that was quiet in between gets twice the burst at most.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self.buckets: dict[Hashable, Bucket] = {}
        """By client. Who finds one with a token in it may take that without asking ``allows``."""

    def allows(self, client: Hashable, now: float) -> bool:
        """Take a token of the client's; False when there is none. ``now``: seconds of any monotonic clock."""
        bucket = self.buckets.get(client)
        if bucket is None:
            bucket = self.buckets[client] = Bucket(self._burst, now)
            if len(self.buckets) > CLIENTS:
                del self.buckets[next(iter(self.buckets))]
        elif bucket.tokens < 1:
            bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.at) * self._rate)
            bucket.at = now
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True
