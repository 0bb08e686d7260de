"""Numbers of networks and of nodes: unique in the cluster, however they came to be."""

from vmnet.model import names
from vmnet.model.names import NetworkId


class Numbers:
    """Who has which number, 1 … ``most``. Filled from what is written down before the first is given."""

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self._owners: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._next = 1

    def adopt(self, owner: str, number: int) -> str | None:
        """Note a number that is written down. Returns the other owner that has it already, None when all is well."""
        holder = self._owners.setdefault(number, owner)
        if holder != owner:
            return holder
        before = self._numbers.setdefault(owner, number)
        if before != number:
            # What is written on the owner itself is what nodes already use.
            self._owners.pop(before, None)
            self._numbers[owner] = number
        self._next = max(self._next, number + 1)
        return None

    def get(self, owner: str) -> int | None:
        """The owner's number, if it has one."""
        return self._numbers.get(owner)

    def allocate(self, owner: str) -> int:
        """The owner's number, a new one if it has none. One that was given back rests until all have had a turn.

        Raises ValueError when none is left.
        """
        existing = self._numbers.get(owner)
        if existing is not None:
            return existing
        for _ in range(self._most):
            if self._next > self._most:
                self._next = 1
            number = self._next
            self._next += 1
            if number not in self._owners:
                self._owners[number] = owner
                self._numbers[owner] = number
                return number
        raise ValueError(f"all {self._what} numbers are in use")

    def release(self, owner: str) -> None:
        """Take the owner's number back."""
        number = self._numbers.pop(owner, None)
        if number is not None:
            self._owners.pop(number, None)


class NetworkIds(Numbers):
    """Numbers of all networks of the cluster, by network name."""

    def __init__(self) -> None:
        super().__init__(names.MAX_NETWORK_ID, "network")

    def allocate(self, owner: str) -> NetworkId:
        """See ``Numbers``."""
        return NetworkId(super().allocate(owner))
