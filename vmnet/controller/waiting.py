"""Who waits for an address of which network."""

from collections import defaultdict
from collections.abc import Callable


class WaitingRoom:
    """Keys of reconcilers that could not go on because a network had nothing for them; all are called again when
    something of that network comes free."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, dict[tuple[str, str], Callable[[str], None]]] = defaultdict(dict)

    def enter(self, network: str, kind: str, key: str, call: Callable[[str], None]) -> None:
        """Wait for ``network``; ``call`` gets ``key``."""
        self._waiting[network][kind, key] = call

    def leave(self, kind: str, key: str) -> None:
        """Wait no longer."""
        for waiting in self._waiting.values():
            waiting.pop((kind, key), None)

    def call(self, network: str) -> None:
        """Something came free."""
        for (_, key), call in self._waiting.pop(network, {}).items():
            call(key)
