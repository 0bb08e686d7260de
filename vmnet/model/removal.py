"""What an uninstallation did, and what it could not do, in sentences."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Removal:
    """``left`` must go before the uninstallation is over; ``kept`` stays on purpose, for whoever is told to judge."""

    done: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def __add__(self, other: Self) -> "Removal":
        return Removal(self.done + other.done, self.left + other.left, self.kept + other.kept)
