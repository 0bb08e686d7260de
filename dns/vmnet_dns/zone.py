"""What one network can see: a frozen view of names, and which parts of the name space it answers for.

A view is made anew when a name comes or goes; that copies two dicts and touches only the names that changed.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Final, Self

from vmnet_dns import message
from vmnet_dns.message import Type, encode_name, parents, reverse_name

Address = IPv4Address | IPv6Address
Subnet = IPv4Network | IPv6Network

TTL: Final = 30
"""Seconds. An address stays with its machine, so answers may live a while."""
NEGATIVE_TTL: Final = 5
"""Seconds. Short: a machine that starts must be found soon after somebody asked for it in vain."""

PRIVATE_SUBNETS: Final = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16",
        "fc00::/7", "fe80::/10",
    )
)  # fmt: skip
"""Reverse names that are never asked of the world (RFC 6303 section 4, RFC 6598): elsewhere they mean other machines,
and other networks of the cluster use them too."""


@dataclass(frozen=True, slots=True)
class Record:
    """One resource record: ``owner`` in wire form (``encode_name``), ``data`` uncompressed."""

    owner: bytes
    type: int
    data: bytes
    ttl: int = TTL


def address_records(name: str, addresses: Iterable[Address], ttl: int = TTL) -> list[Record]:
    """A and AAAA of a name. Raises ValueError for a bad name."""
    owner = encode_name(name)
    return [
        Record(owner, Type.A if isinstance(item, IPv4Address) else Type.AAAA, item.packed, ttl) for item in addresses
    ]


def pointer_records(name: str, addresses: Iterable[Address], ttl: int = TTL) -> list[Record]:
    """PTR of addresses to a name. Raises ValueError for a bad name."""
    target = encode_name(name)
    return [Record(reverse_name(item), Type.PTR, target, ttl) for item in addresses]


def service_record(name: str, port: int, target: str, *, priority: int = 0, weight: int = 0, ttl: int = TTL) -> Record:
    """SRV (RFC 2782), e.g. ``_http._tcp.web.red.svc.cluster.local``."""
    data = struct.pack("!HHH", priority, weight, port) + encode_name(target)
    return Record(encode_name(name), Type.SRV, data, ttl)


def alias_record(name: str, target: str, ttl: int = TTL) -> Record:
    """CNAME."""
    return Record(encode_name(name), Type.CNAME, encode_name(target), ttl)


def text_record(name: str, *texts: str, ttl: int = TTL) -> Record:
    """TXT; each text is at most 255 octets. Raises ValueError."""
    data = bytearray()
    for text in texts:
        octets = text.encode()
        if len(octets) > 255:
            raise ValueError("a text of a TXT record has at most 255 octets")
        data += bytes((len(octets),)) + octets
    return Record(encode_name(name), Type.TXT, bytes(data), ttl)


def reverse_zones(subnet: Subnet) -> list[bytes]:
    """Names of the reverse zones that cover a subnet exactly: several, when it ends within an octet or nibble."""
    step = 8 if subnet.version == 4 else 4
    aligned = -(-subnet.prefixlen // step) * step
    parts: Iterable[Subnet] = subnet.subnets(new_prefix=aligned)
    # For IPv4 one label is eight bits of reverse_pointer, for IPv6 four; what is after the prefix is cut off.
    cut = (subnet.max_prefixlen - aligned) // step
    zones = []
    for part in parts:
        labels = part.network_address.reverse_pointer.split(".")
        zones.append(encode_name(".".join(labels[cut:])))
    return zones


@dataclass(frozen=True, slots=True)
class Node:
    """One name: its records by type, and how many records are below it (a name with none of its own still exists)."""

    sets: Mapping[int, tuple[Record, ...]] = field(default_factory=dict)
    below: int = 0


@dataclass(frozen=True, slots=True)
class Zone:
    """A part of the name space that is decided here: answered from the view, or forwarded."""

    apex: bytes
    forwarded: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """One network's names. Make it with ``make``, follow changes with ``updated``."""

    network: str
    domain: str
    subnets: tuple[Subnet, ...]
    zones: Mapping[bytes, Zone]
    records: frozenset[Record] = frozenset()
    nodes: Mapping[bytes, Node] = field(default_factory=dict)
    serial: int = 1
    compiled: dict[bytes, object] = field(default_factory=dict, compare=False, repr=False)
    """Cache of ``answer``: only that module reads and writes it."""

    @classmethod
    def make(
        cls,
        network: str,
        *,
        domain: str = "cluster.local",
        subnets: Iterable[Subnet] = (),
        servers: Iterable[Address] = (),
        forwarded: Iterable[str] = (),
        records: Iterable[Record] = (),
    ) -> Self:
        """``servers``: the addresses that this view is served on (NS glue).

        ``forwarded``: names below ``domain`` that this network may see although others own them, with all that is
        below them (cluster services every network may use). Raises ValueError for bad names.
        """
        apex = encode_name(domain)
        zones = {}
        own = tuple(subnets)
        for subnet in PRIVATE_SUBNETS + own:
            for zone in reverse_zones(subnet):
                zones[zone] = Zone(zone)
        zones[apex] = Zone(apex)
        for name in forwarded:
            zone = encode_name(name)
            zones[zone] = Zone(zone, forwarded=True)
        view = cls(network, domain, own, zones)
        server = server_name(domain)
        fixed = address_records(server, servers)
        for zone in [apex, *(zone for subnet in own for zone in reverse_zones(subnet))]:
            fixed.append(Record(zone, Type.NS, encode_name(server)))
        nodes = _changed(view.nodes, frozenset(fixed), frozenset())
        for zone, found in zones.items():
            if found.forwarded:
                # Denying a parent would deny what is below it (RFC 8020).
                for parent in parents(zone)[1:]:
                    node = nodes.get(parent, Node())
                    nodes[parent] = Node(node.sets, node.below + 1)
        return replace(view, nodes=nodes).updated(records)

    def updated(self, records: Iterable[Record]) -> Self:
        """The view with exactly these records; itself when nothing changed."""
        wanted = frozenset(records)
        added, removed = wanted - self.records, self.records - wanted
        if not added and not removed:
            return self
        nodes = _changed(self.nodes, added, removed)
        # Serial numbers wrap round (RFC 1982); zero is avoided.
        serial = self.serial % 0xFFFFFFFF + 1
        return replace(self, records=wanted, nodes=nodes, serial=serial, compiled={})

    def zone_of(self, name: bytes) -> Zone | None:
        """The longest zone that a name (lower case, wire form) is in; None: the rest of the world."""
        for parent in parents(name):
            zone = self.zones.get(parent)
            if zone is not None:
                return zone
        return None

    def start_of_authority(self, zone: Zone) -> bytes:
        """SOA record of a zone, as it stands in negative answers (RFC 2308 section 3)."""
        data = encode_name(server_name(self.domain)) + encode_name(f"hostmaster.{self.domain}")
        data += struct.pack("!5I", self.serial, 7200, 1800, 86400, NEGATIVE_TTL)
        return message.record(zone.apex, Type.SOA, NEGATIVE_TTL, data)


def server_name(domain: str) -> str:
    """Name of the responder itself."""
    return f"ns.dns.{domain}"


def _changed(nodes: Mapping[bytes, Node], added: frozenset[Record], removed: frozenset[Record]) -> dict[bytes, Node]:
    """A copy in which the nodes of these records, and only those, are replaced."""
    result = dict(nodes)
    for item in removed:
        _edit(result, item, -1)
    # Sorted: the order of records in an answer must not depend on hashes.
    for item in sorted(added, key=lambda item: (item.owner, item.type, item.data)):
        _edit(result, item, 1)
    return result


def _edit(nodes: dict[bytes, Node], item: Record, by: int) -> None:
    node = nodes.get(item.owner, Node())
    sets = dict(node.sets)
    kept = tuple(known for known in sets.get(item.type, ()) if known != item)
    sets[item.type] = (*kept, item) if by > 0 else kept
    if not sets[item.type]:
        del sets[item.type]
    nodes[item.owner] = Node(sets, node.below)
    for name in parents(item.owner)[1:]:
        parent = nodes.get(name, Node())
        nodes[name] = Node(parent.sets, parent.below + by)
    for name in parents(item.owner):
        if not nodes[name].sets and not nodes[name].below:
            del nodes[name]
