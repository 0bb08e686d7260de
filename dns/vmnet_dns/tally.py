"""What a responder has done, in plain numbers: counting must cost less than answering. Pure."""

from bisect import bisect_left
from typing import Final

BUCKETS: Final = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1.0, 5.0)
"""Upper bounds, seconds."""


class Tally:
    """Queries by (type, rcode, outcome), and how long they took by outcome."""

    def __init__(self) -> None:
        self.queries: dict[tuple[str, str, str], int] = {}
        self.times: dict[str, list[int]] = {}
        """By outcome, queries in each of BUCKETS and beyond the last."""
        self.seconds: dict[str, float] = {}
        """By outcome, of all queries together."""

    def count(self, labels: tuple[str, str, str], seconds: float, queries: int = 1) -> None:
        """Count queries that took ``seconds`` each."""
        outcome = labels[2]
        self.queries[labels] = self.queries.get(labels, 0) + queries
        times = self.times.get(outcome)
        if times is None:
            times = self.times[outcome] = [0] * (len(BUCKETS) + 1)
            self.seconds[outcome] = 0.0
        times[bisect_left(BUCKETS, seconds)] += queries
        self.seconds[outcome] += seconds * queries
