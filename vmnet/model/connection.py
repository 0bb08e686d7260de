"""Connections as a node's conntrack remembers them: what has to come along when a machine goes to another node."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, Self

from vmnet.model.addresses import IPAddress

TCP: Final = 6
UDP: Final = 17
PROTOCOLS: Final = frozenset({TCP, UDP})

# Status bits (linux/netfilter/nf_conntrack_common.h).
SEEN_REPLY: Final = 1 << 1
ASSURED: Final = 1 << 2
CONFIRMED: Final = 1 << 3
SOURCE_TRANSLATED: Final = 1 << 4
DESTINATION_TRANSLATED: Final = 1 << 5

ESTABLISHED: Final = 3
"""TCP state (linux/netfilter/nf_conntrack_tcp.h)."""


@dataclass(frozen=True, slots=True)
class Flow:
    """One direction of a connection, as its packets are."""

    protocol: int
    source: IPAddress
    source_port: int
    destination: IPAddress
    destination_port: int

    def reversed(self) -> Self:
        """What answers it where nothing is translated."""
        return replace(
            self,
            source=self.destination,
            source_port=self.destination_port,
            destination=self.source,
            destination_port=self.source_port,
        )


@dataclass(frozen=True, slots=True)
class TcpState:
    """``state``: conntrack's number of it; window scales and flags of the original and of the reply direction."""

    state: int
    scales: tuple[int, int] = (0, 0)
    flags: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Connection:
    """An entry. ``original``: as the first packet was before translation; ``reply``: as answers are before theirs.

    ``timeout``: seconds for which the entry lasts without another packet; ``labels``: as the kernel keeps them.
    """

    original: Flow
    reply: Flow
    status: int
    timeout: int
    mark: int = 0
    tcp: TcpState | None = None
    zone: int = 0
    labels: bytes = b""

    @property
    def translated(self) -> bool:
        """Whether answers come otherwise than to the original's addresses and ports."""
        return self.reply != self.original.reversed()

    @property
    def lasting(self) -> bool:
        """Whether somebody may still be speaking: established TCP, or datagrams that went to and fro for a while."""
        if self.original.protocol == TCP:
            return self.tcp is not None and self.tcp.state == ESTABLISHED
        return bool(self.status & ASSURED)


class Outcome(StrEnum):
    """What came of an entry that was to be written."""

    PLACED = "placed"
    KNOWN = "known"
    """The kernel has an entry for it that is as good, or better: its own."""
    REFUSED = "refused"
