"""One family of a Layer3 network: which node has which part of its ranges."""

from ipaddress import IPv4Network, IPv6Network

from vmnet.ipam.errors import AddressConflict, ConflictKind, Exhausted, OutOfRange
from vmnet.model.addresses import IPNetwork


class PartPool:
    """Parts of equal length within a range; a further range comes into use when those before it are used up.

    Parts are taken in rising order; one that was given back is reused only when all have had a turn.
    """

    def __init__(self) -> None:
        self._ranges: list[_Range] = []
        self._owners: dict[IPNetwork, str] = {}
        self._parts: dict[str, IPNetwork] = {}

    @property
    def total(self) -> int:
        """How many nodes can have a part."""
        return sum(item.count for item in self._ranges)

    @property
    def capacity(self) -> int:
        """Addresses that workloads can have when every part is given to a node."""
        return sum(item.count * item.room for item in self._ranges)

    def get(self, node: str) -> IPNetwork | None:
        """The node's part, if it has one."""
        return self._parts.get(node)

    def extend(self, subnet: IPNetwork, prefix: int) -> None:
        """Add a range whose parts have that prefix length. One that is there already is no change."""
        if all(item.subnet != subnet for item in self._ranges):
            self._ranges.append(_Range(subnet, prefix))

    def allocate(self, node: str) -> IPNetwork:
        """The node's part, a new one if it has none. Raises Exhausted."""
        existing = self._parts.get(node)
        if existing is not None:
            return existing
        for item in self._ranges:
            for _ in range(item.count):
                part = item.following()
                if part not in self._owners:
                    self._owners[part] = node
                    self._parts[node] = part
                    return part
        listed = ", ".join(str(item.subnet) for item in self._ranges)
        raise Exhausted(f"no part of {listed} is left for node {node}: all {self.total} are given to nodes")

    def adopt(self, node: str, part: IPNetwork) -> None:
        """Note a part that is written down. Raises OutOfRange, AddressConflict."""
        held = next((item for item in self._ranges if item.holds(part)), None)
        if held is None:
            raise OutOfRange(f"{part} is no part of this network")
        holder = self._owners.get(part, node)
        if holder != node:
            raise AddressConflict(ConflictKind.IP, str(part), f"node {holder}")
        before = self._parts.get(node, part)
        if before != part:
            raise OutOfRange(f"{part}: node {node} has {before} already")
        self._owners[part] = node
        self._parts[node] = part
        held.passed(part)

    def release(self, node: str) -> bool:
        """Take the node's part back; False when it has none."""
        part = self._parts.pop(node, None)
        if part is None:
            return False
        del self._owners[part]
        return True


class _Range:
    """One range, as parts of equal length."""

    def __init__(self, subnet: IPNetwork, prefix: int) -> None:
        self.subnet = subnet
        self.prefix = prefix
        self.count = 1 << (prefix - subnet.prefixlen)
        self._size = 1 << (subnet.max_prefixlen - prefix)
        # Network and broadcast (IPv4) or subnet-router anycast (IPv6), gateway, management address.
        self.room = self._size - (4 if subnet.version == 4 else 3)
        self._next = 0

    def following(self) -> IPNetwork:
        """The part after the one that was given last, round and round."""
        index, self._next = self._next, (self._next + 1) % self.count
        first = int(self.subnet.network_address) + index * self._size
        return IPv4Network((first, self.prefix)) if self.subnet.version == 4 else IPv6Network((first, self.prefix))

    def holds(self, part: IPNetwork) -> bool:
        """Whether it is one of the parts."""
        return part.prefixlen == self.prefix and part.version == self.subnet.version and self._index(part) is not None

    def passed(self, part: IPNetwork) -> None:
        """A part was given by somebody else: go on after it."""
        index = self._index(part)
        if index is not None and index >= self._next:
            self._next = (index + 1) % self.count

    def _index(self, part: IPNetwork) -> int | None:
        index, rest = divmod(int(part.network_address) - int(self.subnet.network_address), self._size)
        return index if rest == 0 and 0 <= index < self.count else None
