"""What one network can see: a view of names, and which parts of the name space it answers for.

``View.change`` is for names that come and go while the view is served: it touches these names and the answers that
were made of them, nothing else. ``View.updated`` makes another view.
"""

import struct
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Any, Final, Self

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


def denied_zones(subnets: Iterable[Subnet]) -> dict[bytes, "Zone"]:
    """Reverse zones of other networks' subnets: the world may know their names, but this network must not."""
    return {zone: Zone(zone) for subnet in subnets for zone in reverse_zones(subnet)}


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


@dataclass(slots=True)
class Ready:
    """Answers of a view that are kept: only ``answer`` puts them in."""

    by_question: dict[bytes, Any] = field(default_factory=dict)
    by_bytes: dict[bytes, Any] = field(default_factory=dict)
    """By the whole query but its id, in lower case: what is asked all the time is answered without being parsed."""
    by_name: dict[bytes, set[bytes]] = field(default_factory=dict)
    """Name → questions whose answers were made of it."""

    def forget(self, name: bytes) -> None:
        """The records of a name have changed."""
        for question in self.by_name.pop(name, ()):
            found = self.by_question.pop(question, None)
            for wire in found.wires if found is not None else ():
                self.by_bytes.pop(wire, None)

    def clear(self) -> None:
        """Forget all."""
        self.by_question.clear()
        self.by_bytes.clear()
        self.by_name.clear()


@dataclass(slots=True)
class View:
    """One network's names. Make it with ``make``, follow changes with ``change`` or ``updated``."""

    network: str
    domain: str
    subnets: tuple[Subnet, ...]
    zones: Mapping[bytes, Zone]
    denied: Mapping[bytes, Zone] = field(default_factory=dict)
    """Zones of others: what is in them and not in ``zones`` does not exist here, and nobody is asked."""
    records: set[Record] = field(default_factory=set)
    nodes: dict[bytes, Node] = field(default_factory=dict)
    serial: int = 1
    ready: Ready = field(default_factory=Ready, compare=False, repr=False)

    @classmethod
    def make(
        cls,
        network: str,
        *,
        domain: str = "cluster.local",
        subnets: Iterable[Subnet] = (),
        servers: Iterable[Address] = (),
        forwarded: Iterable[str] = (),
        denied: Mapping[bytes, Zone] | None = None,
        records: Iterable[Record] = (),
    ) -> Self:
        """``servers``: the addresses that this view is served on (NS glue).

        ``forwarded``: names below ``domain`` that this network may see although others own them, with all that is
        below them (cluster services every network may use). ``denied``: zones of others, which
        views may share (``denied_zones``). Raises ValueError for bad names.
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
        view = cls(network, domain, own, zones, denied if denied is not None else {})
        server = server_name(domain)
        fixed = address_records(server, servers)
        for zone in [apex, *(zone for subnet in own for zone in reverse_zones(subnet))]:
            fixed.append(Record(zone, Type.NS, encode_name(server)))
        nodes = _changed(view.nodes, set(fixed), set())
        for zone, found in zones.items():
            if found.forwarded:
                # Denying a parent would deny what is below it (RFC 8020).
                for parent in parents(zone)[1:]:
                    node = nodes.get(parent, Node())
                    nodes[parent] = Node(node.sets, node.below + 1)
        return replace(view, nodes=nodes).updated(records)

    def updated(self, records: Iterable[Record]) -> Self:
        """The view with exactly these records; itself when nothing changed."""
        wanted = set(records)
        added, removed = wanted - self.records, self.records - wanted
        if not added and not removed:
            return self
        nodes = _changed(self.nodes, added, removed)
        return replace(self, records=wanted, nodes=nodes, serial=_next(self.serial), ready=Ready())

    def change(self, added: Iterable[Record], removed: Iterable[Record] = ()) -> bool:
        """Take records out of this very view and put others in; False when that makes no difference.

        What is in both is there afterwards. The work is in proportion to the change, however many names there are.
        """
        wanted = set(added)
        gone = {item for item in removed if item in self.records} - wanted
        new = wanted - self.records
        if not gone and not new:
            return False
        _apply(self.nodes, new, gone)
        self.records -= gone
        self.records |= new
        for name in {parent for item in (*gone, *new) for parent in parents(item.owner)}:
            self.ready.forget(name)
        self.serial = _next(self.serial)
        return True

    def zone_of(self, name: bytes) -> Zone | None:
        """The longest zone that a name (lower case, wire form) is in; None: the rest of the world."""
        for parent in parents(name):
            zone = self.zones.get(parent)
            if zone is not None:
                return zone
        return next((self.denied[parent] for parent in parents(name) if parent in self.denied), None)

    def owns(self, name: bytes) -> bool:
        """Whether nobody but this view may say what a name (lower case, wire form) is."""
        zone = self.zone_of(name)
        return zone is not None and not zone.forwarded

    def start_of_authority(self, zone: Zone) -> bytes:
        """SOA record of a zone, as it stands in negative answers (RFC 2308 section 3)."""
        data = encode_name(server_name(self.domain)) + encode_name(f"hostmaster.{self.domain}")
        data += struct.pack("!5I", self.serial, 7200, 1800, 86400, NEGATIVE_TTL)
        return message.record(zone.apex, Type.SOA, NEGATIVE_TTL, data)


def server_name(domain: str) -> str:
    """Name of the responder itself."""
    return f"ns.dns.{domain}"


def _next(serial: int) -> int:
    """Serial numbers wrap round (RFC 1982); zero is avoided."""
    return serial % 0xFFFFFFFF + 1


def _changed(nodes: Mapping[bytes, Node], added: Set[Record], removed: Set[Record]) -> dict[bytes, Node]:
    """A copy in which the nodes of these records, and only those, are replaced."""
    result = dict(nodes)
    _apply(result, added, removed)
    return result


def _apply(nodes: dict[bytes, Node], added: Set[Record], removed: Set[Record]) -> None:
    for item in removed:
        _edit(nodes, item, -1)
    # Sorted: the order of records in an answer must not depend on hashes.
    for item in sorted(added, key=lambda item: (item.owner, item.type, item.data)):
        _edit(nodes, item, 1)


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
