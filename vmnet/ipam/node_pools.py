"""One Layer3 network's addresses: each node has a part of it, and pools of its own over that."""

from collections.abc import Iterator
from dataclasses import replace

from vmnet.ipam.errors import Exhausted, WrongFamily
from vmnet.ipam.network_pools import Allocation, NetworkPools
from vmnet.ipam.part_pool import PartPool
from vmnet.model.addresses import IPNetwork
from vmnet.model.network import Network
from vmnet.model.parts import Parts


class NodePools:
    """Allocation of one network. A node has one part of each family, from its first workload on."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._parts: dict[int, PartPool] = {}
        self._pools: dict[str, NetworkPools] = {}
        self._places: dict[str, str] = {}
        """Owner → the node whose pools have its addresses."""
        self._gone: set[str] = set()
        self.extend(network)

    @property
    def families(self) -> tuple[int, ...]:
        """Families of the network's subnets, IPv4 first."""
        return tuple(self._parts)

    def used(self, family: int) -> int:
        """Addresses of one family that somebody has."""
        return sum(pools.used(family) for pools in self._pools.values() if family in pools.families)

    def capacity(self, family: int) -> int:
        """Addresses of one family that workloads can have, once every part is given to a node."""
        return self._parts[family].capacity

    def extend(self, network: Network) -> None:
        """Take in the subnets of a newer state of the network. None goes: a state may also be an older one."""
        known = dict(zip(self.network.subnets, self.network.host_prefixes, strict=True))
        known |= dict(zip(network.subnets, network.host_prefixes, strict=True))
        self.network = replace(network, subnets=tuple(known), host_prefixes=tuple(known.values()), parts=())
        for subnet, prefix in known.items():
            self._parts.setdefault(subnet.version, PartPool()).extend(subnet, prefix)
        self._parts = dict(sorted(self._parts.items()))

    def parts(self, node: str) -> Parts:
        """What a node has of the network, IPv4 first."""
        found = (pool.get(node) for pool in self._parts.values())
        return tuple(part for part in found if part is not None)

    def at(self, node: str) -> NetworkPools | None:
        """The pools of a node; None when it has no part."""
        parts, found = self.parts(node), self._pools.get(node)
        if not parts or (found is not None and found.network.parts == parts):
            return found
        made = _Local(self.network.at(parts), node, self._places)
        for owner in found.owners() if found is not None else ():
            held = found.get(owner) if found is not None else None
            if held is not None:
                made.reserve(owner, held.ips, held.mac, partial=True)
        self._pools[node] = made
        return made

    def place(self, node: str) -> NetworkPools:
        """The pools of a node; one that lacks a part, of one family or all, gets it. Raises Exhausted."""
        self._gone.discard(node)
        given: list[PartPool] = []
        for pool in self._parts.values():
            if pool.get(node) is None:
                try:
                    pool.allocate(node)
                except Exhausted:
                    for other in given:
                        other.release(node)
                    raise
                given.append(pool)
        found = self.at(node)
        if found is None:
            raise WrongFamily(f"network {self.network.name} has no subnets")
        return found

    def adopt(self, node: str, part: IPNetwork) -> None:
        """Note a part that is written down. Raises WrongFamily, OutOfRange, AddressConflict."""
        pool = self._parts.get(part.version)
        if pool is None:
            raise WrongFamily(f"part {part}: network {self.network.name} has no IPv{part.version} subnet")
        pool.adopt(node, part)

    def leave(self, node: str) -> bool:
        """The node is gone: take its part back as soon as nobody has an address in it. False when that is not yet."""
        if not self.parts(node):
            return False
        self._gone.add(node)
        return self._settle(node)

    def stay(self, node: str) -> None:
        """The node is there again."""
        self._gone.discard(node)

    def owners(self) -> Iterator[str]:
        """Everybody who has something."""
        yield from self._places

    def get(self, owner: str) -> Allocation | None:
        """What ``owner`` has, on whatever node."""
        node = self._places.get(owner)
        return self._pools[node].get(owner) if node is not None else None

    def release(self, owner: str) -> bool:
        """Take back all that ``owner`` has; False when that is nothing."""
        node = self._places.get(owner)
        if node is None:
            return False
        self._pools[node].release(owner)
        self._settle(node)
        return True

    def _settle(self, node: str) -> bool:
        pools = self._pools.get(node)
        if node not in self._gone or (pools is not None and any(pools.owners())):
            return False
        self._gone.discard(node)
        self._pools.pop(node, None)
        for pool in self._parts.values():
            pool.release(node)
        return True


class _Local(NetworkPools):
    """The pools of one node, which notes in ``places`` who has something there."""

    def __init__(self, network: Network, node: str, places: dict[str, str]) -> None:
        super().__init__(network)
        self._node = node
        self._places = places

    def release(self, owner: str) -> bool:
        """See ``NetworkPools``."""
        released = super().release(owner)
        if released:
            del self._places[owner]
        return released

    def _record(self, owner: str, allocation: Allocation) -> Allocation:
        self._places[owner] = self._node
        return super()._record(owner, allocation)
