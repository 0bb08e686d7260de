"""One subnet's addresses: who has which, and which is next."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address

from vmnet.ipam.errors import AddressConflict, ConflictKind, Exhausted, OutOfRange
from vmnet.model.addresses import IPAddress, IPNetwork


class Ranges:
    """Inclusive integer ranges, merged and sorted."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        merged: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            else:
                merged.append((first, last))
        self._first = [first for first, _ in merged]
        self._last = [last for _, last in merged]

    def end_of(self, value: int) -> int | None:
        """Last value of the range that holds ``value``, None when no range does."""
        index = bisect_right(self._first, value) - 1
        return self._last[index] if index >= 0 and value <= self._last[index] else None

    def size(self) -> int:
        """How many values the ranges hold."""
        return sum(last - first + 1 for first, last in zip(self._first, self._last, strict=True))


class Pool:
    """Addresses of one subnet.

    Addresses are first taken in rising order; one that was given back is reused only when no other is left, the one
    that has rested longest first. Every operation is O(1) amortized, whatever the subnet's size and fill.

    ``infrastructure`` addresses and ranges are never given; ``reserved`` ranges only to those who name the address.
    """

    def __init__(
        self,
        subnet: IPNetwork,
        *,
        infrastructure: Iterable[IPAddress | IPNetwork] = (),
        reserved: Iterable[IPNetwork] = (),
    ) -> None:
        self.subnet = subnet
        self._version = subnet.version
        self._base = int(subnet.network_address)
        self._last = int(subnet.broadcast_address)
        # The first address is the network (IPv4) or the subnet-router anycast address (RFC 4291 section 2.6.1).
        forbidden = [(self._base, self._base)]
        if isinstance(subnet, IPv4Network):
            forbidden.append((self._last, self._last))
        forbidden += [self._bounds(item) for item in infrastructure]
        held_back = [self._bounds(item) for item in reserved]
        self._forbidden = Ranges(forbidden)
        self._skipped = Ranges(forbidden + held_back)
        self._owners: dict[int, str] = {}
        self._resting: OrderedDict[int, None] = OrderedDict()
        self._next = self._base

    @property
    def used(self) -> int:
        """Addresses that somebody has."""
        return len(self._owners)

    @property
    def capacity(self) -> int:
        """Addresses that workloads can have, those of reserved ranges included."""
        return self._last - self._base + 1 - self._forbidden.size()

    def owner(self, address: IPAddress) -> str | None:
        """Who has an address."""
        return self._owners.get(int(address))

    def allocate(self, owner: str) -> IPAddress:
        """Give ``owner`` an address of our choice. Raises Exhausted."""
        while self._next <= self._last:
            value = self._next
            end = self._skipped.end_of(value)
            if end is not None:
                self._next = end + 1
                continue
            self._next += 1
            if value in self._owners or value in self._resting:
                continue
            return self._give(value, owner)
        if not self._resting:
            raise Exhausted(f"subnet {self.subnet} has no free address")
        value, _ = self._resting.popitem(last=False)
        return self._give(value, owner)

    def check(self, address: IPAddress, owner: str) -> None:
        """Whether ``owner`` may have this address. Raises OutOfRange or AddressConflict."""
        value = int(address)
        if address.version != self._version or not self._base <= value <= self._last:
            raise OutOfRange(f"address {address} is not in subnet {self.subnet}")
        if self._forbidden.end_of(value) is not None:
            raise OutOfRange(f"address {address} of subnet {self.subnet} is kept for the network itself")
        holder = self._owners.get(value)
        if holder is not None and holder != owner:
            raise AddressConflict(ConflictKind.IP, str(address), holder)

    def reserve(self, address: IPAddress, owner: str) -> None:
        """Give ``owner`` this address. Raises OutOfRange or AddressConflict; again for the same owner is no change."""
        self.check(address, owner)
        self.note(address, owner)

    def note(self, address: IPAddress, owner: str) -> None:
        """As ``reserve``, for what has just been checked."""
        value = int(address)
        self._resting.pop(value, None)
        self._owners[value] = owner

    def release(self, address: IPAddress) -> None:
        """Take an address back; unknown ones are ignored."""
        value = int(address)
        if self._owners.pop(value, None) is None:
            return
        if self._skipped.end_of(value) is None:
            self._resting[value] = None

    def _give(self, value: int, owner: str) -> IPAddress:
        self._owners[value] = owner
        return IPv4Address(value) if self._version == 4 else IPv6Address(value)

    def _bounds(self, item: IPAddress | IPNetwork) -> tuple[int, int]:
        if isinstance(item, IPv4Address | IPv6Address):
            return int(item), int(item)
        return int(item.network_address), int(item.broadcast_address)
