"""Network numbers: unique across all networks of the cluster, however they came to be."""

from vmnet.model import names
from vmnet.model.names import NetworkId


class NetworkIds:
    """Who has which number. Filled from the annotations of all networks and NADs before the first is given."""

    def __init__(self) -> None:
        self._networks: dict[int, str] = {}
        self._ids: dict[str, int] = {}
        self._next = 1

    def adopt(self, network: str, number: int) -> str | None:
        """Note a number that is written down. Returns the other network that has it already, None when all is well."""
        holder = self._networks.setdefault(number, network)
        if holder != network:
            return holder
        before = self._ids.setdefault(network, number)
        if before != number:
            # What is written on the network itself is what nodes already use.
            self._networks.pop(before, None)
            self._ids[network] = number
        self._next = max(self._next, number + 1)
        return None

    def allocate(self, network: str) -> NetworkId:
        """The network's number, a new one if it has none. One that was given back rests until all have had a turn."""
        existing = self._ids.get(network)
        if existing is not None:
            return NetworkId(existing)
        for _ in range(names.MAX_NETWORK_ID):
            if self._next > names.MAX_NETWORK_ID:
                self._next = 1
            number = self._next
            self._next += 1
            if number not in self._networks:
                self._networks[number] = network
                self._ids[network] = number
                return NetworkId(number)
        raise ValueError("all network numbers are in use")

    def release(self, network: str) -> None:
        """Take the network's number back."""
        number = self._ids.pop(network, None)
        if number is not None:
            self._networks.pop(number, None)
