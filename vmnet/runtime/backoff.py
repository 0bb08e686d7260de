"""Exponential back-off as a value: pure, the random number is an argument."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays in seconds: ``first``, then ``factor`` times longer with every failure, at most ``most``."""

    first: float = 0.2
    most: float = 30.0
    factor: float = 2.0
    jitter: float = 0.5
    """Share of the delay that is left to chance: 0.5 spreads a delay of 1 s over 0.5 … 1 s."""

    def delay(self, failures: int, chance: float) -> float:
        """Wait after ``failures`` failures in a row (0: no wait); ``chance`` is uniform in [0, 1)."""
        if failures <= 0:
            return 0.0
        # The exponent is bounded before the power: 2.0 ** 2000 would overflow.
        steps = min(failures - 1, 64)
        full = min(self.most, self.first * self.factor**steps)
        return full * (1 - self.jitter * (1 - chance))
