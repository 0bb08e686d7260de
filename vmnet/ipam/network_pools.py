"""One network's addresses and MACs: what each owner has."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface
from typing import Final

from vmnet.ipam.errors import AddressConflict, ConflictKind, Exhausted, OutOfRange, WrongFamily
from vmnet.ipam.pool import Pool
from vmnet.model import addresses, names
from vmnet.model.addresses import IPAddress, IPInterface
from vmnet.model.names import MacAddress
from vmnet.model.network import Network

INFRASTRUCTURE: Final = "the network's gateway"
"""Owner of the gateway's MAC."""
ROUTERS: Final = "the nodes' routers"
"""Owner of every MAC that a node's router may have."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """What one owner has: IPv4 first, and the prefix lengths of their subnets."""

    ips: tuple[IPAddress, ...]
    lengths: tuple[int, ...]
    mac: MacAddress

    @property
    def addresses(self) -> tuple[IPInterface, ...]:
        """The addresses with their prefix lengths; made when they are asked for, which costs more than to allocate."""
        return tuple([_interface(ip, length) for ip, length in zip(self.ips, self.lengths, strict=True)])


def _interface(ip: IPAddress, length: int) -> IPInterface:
    # From numbers: parsing text takes three times as long.
    return IPv4Interface((int(ip), length)) if ip.version == 4 else IPv6Interface((int(ip), length))


class NetworkPools:
    """Allocation of one network. Owners are free text, shown in conflict errors."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._pools: dict[int, Pool] = {}
        for subnet in network.segments:
            own = [
                *(address for address in (*network.gateways, *network.management_addresses) if address in subnet),
                *(pool for pool in network.infrastructure_subnets if pool.version == subnet.version),
            ]
            reserved = [pool for pool in network.reserved_subnets if pool.version == subnet.version]
            self._pools[subnet.version] = Pool(subnet, infrastructure=own, reserved=reserved)
        self._pools = dict(sorted(self._pools.items()))
        self._lengths = tuple([pool.subnet.prefixlen for pool in self._pools.values()])
        self._allocations: dict[str, Allocation] = {}
        self._macs: dict[MacAddress, str] = {network.gateway_mac: INFRASTRUCTURE}

    @property
    def families(self) -> tuple[int, ...]:
        """Families of the network's subnets, IPv4 first."""
        return tuple(self._pools)

    def used(self, family: int) -> int:
        """Addresses of one family that somebody has."""
        return self._pools[family].used

    def capacity(self, family: int) -> int:
        """Addresses of one family that workloads can have."""
        return self._pools[family].capacity

    def owners(self) -> Iterable[str]:
        """Everybody who has something."""
        return self._allocations.keys()

    def get(self, owner: str) -> Allocation | None:
        """What ``owner`` has."""
        return self._allocations.get(owner)

    def allocate(self, owner: str, mac: MacAddress | None = None) -> Allocation:
        """One address of each family and a MAC; what ``owner`` has already is returned unchanged.

        Without ``mac`` it is derived from the address, or, on a network without subnets, from the owner. Raises
        Exhausted, AddressConflict (MAC).
        """
        existing = self._allocations.get(owner)
        if existing is not None:
            return existing
        if mac is not None:
            self._check_mac(mac, owner)
        elif not self._pools:
            mac = self.spare_mac(owner)
        passed_over: list[tuple[Pool, IPAddress]] = []
        taken: list[IPAddress] = []
        try:
            for pool in self._pools.values():
                address = pool.allocate(owner)
                if mac is None:
                    mac = addresses.mac_for(address)
                    # It follows from the first family's address: pass over one whose MAC somebody asked for by name.
                    while mac in self._macs:
                        passed_over.append((pool, address))
                        address = pool.allocate(owner)
                        mac = addresses.mac_for(address)
                taken.append(address)
        except Exhausted:
            for pool, address in zip(self._pools.values(), taken, strict=False):
                pool.release(address)
            raise
        finally:
            for pool, address in passed_over:
                pool.release(address)
        if mac is None:
            raise OutOfRange(f"network {self.network.name} has no subnet to derive a MAC address from")
        return self._record(owner, Allocation(tuple(taken), self._lengths, mac))

    def reserve(
        self,
        owner: str,
        wanted: Iterable[IPAddress | IPInterface],
        mac: MacAddress | None = None,
        *,
        partial: bool = False,
    ) -> Allocation:
        """Exactly these addresses and this MAC for ``owner``, all or nothing; what ``owner`` had before is given back.

        Without ``mac`` it is derived. ``partial`` allows addresses of fewer families than the network has (what is
        already written down must be honoured). Raises WrongFamily, OutOfRange, AddressConflict.
        """
        by_family: dict[int, IPAddress] = {}
        for item in wanted:
            address = item.ip if isinstance(item, IPv4Interface | IPv6Interface) else item
            if address.version not in self._pools:
                raise WrongFamily(f"address {address}: network {self.network.name} has no IPv{address.version} subnet")
            if address.version in by_family:
                raise WrongFamily(
                    f"more than one IPv{address.version} address: {by_family[address.version]}, {address}"
                )
            by_family[address.version] = address
        missing = [family for family in self._pools if family not in by_family]
        if (not by_family and self._pools) or (missing and not partial):
            lacking = ", ".join(f"IPv{family}" for family in missing)
            raise WrongFamily(f"no {lacking} address: network {self.network.name} needs one of each of its families")
        families = tuple(sorted(by_family))
        ips = tuple([by_family[family] for family in families])
        if mac is None and not ips:
            raise OutOfRange(f"network {self.network.name} has no subnet to derive a MAC address from")
        wanted_mac = mac if mac is not None else addresses.mac_for(ips[0])
        before = self._allocations.get(owner)
        if before is not None and before.ips == ips and before.mac == wanted_mac:
            return before
        pools = [self._pools[family] for family in families]
        for pool, address in zip(pools, ips, strict=True):
            pool.check(address, owner)
        self._check_mac(wanted_mac, owner)
        if before is not None:
            self.release(owner)
        for pool, address in zip(pools, ips, strict=True):
            pool.note(address, owner)
        lengths = self._lengths if not missing else tuple([pool.subnet.prefixlen for pool in pools])
        return self._record(owner, Allocation(ips, lengths, wanted_mac))

    def release(self, owner: str) -> bool:
        """Take back all that ``owner`` has; False when that is nothing."""
        allocation = self._allocations.pop(owner, None)
        if allocation is None:
            return False
        for address in allocation.ips:
            self._pools[address.version].release(address)
        del self._macs[allocation.mac]
        return True

    def mac_owner(self, mac: MacAddress) -> str | None:
        """Who has a MAC."""
        return self._macs.get(mac)

    def _check_mac(self, mac: MacAddress, owner: str) -> None:
        if mac.startswith(names.ROUTER_MAC_PREFIX):
            raise AddressConflict(ConflictKind.MAC, mac, ROUTERS)
        holder = self._macs.get(mac)
        if holder is not None and holder != owner:
            raise AddressConflict(ConflictKind.MAC, mac, holder)

    def spare_mac(self, owner: str, own: MacAddress | None = None) -> MacAddress:
        """A MAC that nobody has, or nobody but ``own``'s holder; from the owner's name, so the same again."""
        attempt = 0
        while True:
            digest = hashlib.sha256(f"{self.network.name} {owner} {attempt}".encode()).digest()
            mac = MacAddress("0a:58:" + digest[:4].hex(":"))
            if mac == own or mac not in self._macs:
                return mac
            attempt += 1

    def _record(self, owner: str, allocation: Allocation) -> Allocation:
        self._allocations[owner] = allocation
        self._macs[allocation.mac] = owner
        return allocation
