"""How much one client may ask: a token bucket per address, in bounded memory. Pure; time is an argument."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

CLIENTS: Final = 4096
"""Buckets kept; of more clients the one that was quiet for longest starts anew."""


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class ClientLimit:
    """``rate`` queries a second for ever, ``burst`` at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def allows(self, client: str, now: float) -> bool:
        """Take a token of the client's; False when there is none. ``now``: seconds of any monotonic clock."""
        bucket = self._buckets.get(client)
        if bucket is None:
            bucket = self._buckets[client] = _Bucket(self._burst, now)
            if len(self._buckets) > CLIENTS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(client)
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.at) * self._rate)
        bucket.at = now
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True
