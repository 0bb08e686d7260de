"""A network namespace's conntrack, by raw netlink (ctnetlink): read, written and read back, deleted.

Entries are written in order to be found by the next packet, so each write is verified: the kernel may give a translated
entry another port than was asked for, and a packet may make an entry of its own between a deletion and a write.
Functions run inside the namespace (``namespaces.Workers``) and block for as long as the kernel takes.
"""

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from vmnet.model.addresses import IPAddress
from vmnet.model.connection import (
    ASSURED,
    CONFIRMED,
    PROTOCOLS,
    SEEN_REPLY,
    TCP,
    UDP,
    Connection,
    Flow,
    Outcome,
    TcpState,
)
from vmnet.plan.state import Datagrams

# linux/netlink.h
NETLINK_NETFILTER: Final = 12
_REQUEST, _ACK, _DUMP, _EXCLUSIVE, _CREATE = 0x1, 0x4, 0x300, 0x200, 0x400
_NOOP, _ERROR, _DONE = 1, 2, 3
_NESTED: Final = 0x8000
_TYPE_MASK: Final = 0x3FFF
# linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
_SUBSYSTEM: Final = 1 << 8
_NEW, _GET, _DELETE = 0, 1, 2
_ORIGINAL, _REPLY, _STATUS, _PROTOCOL_STATE, _NAT_SOURCE, _TIMEOUT, _MARK = 1, 2, 3, 4, 6, 7, 8
_NAT_DESTINATION, _ZONE, _MARK_MASK, _LABELS, _FILTER = 13, 18, 21, 22, 25
_TUPLE_ADDRESSES, _TUPLE_PROTOCOL = 1, 2
_V4_SOURCE, _V4_DESTINATION, _V6_SOURCE, _V6_DESTINATION = 1, 2, 3, 4
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_TCP: Final = 1
_TCP_STATE, _TCP_SCALE_ORIGINAL, _TCP_SCALE_REPLY, _TCP_FLAGS_ORIGINAL, _TCP_FLAGS_REPLY = 1, 2, 3, 4, 5
_NAT_V4_FROM, _NAT_V4_TO, _NAT_PORTS, _NAT_V6_FROM, _NAT_V6_TO = 1, 2, 3, 4, 5
_NAT_PORT_FROM, _NAT_PORT_TO = 1, 2
_FILTER_ORIGINAL, _FILTER_REPLY = 1, 2
_FILTER_SOURCE: Final = 1
_KEPT_FLAGS: Final = 0x03
"""TCP flags that outlast a move: window scaling and selective acknowledgement."""
_LIBERAL: Final = 0x08
"""A node that has not seen the sequence numbers so far must not call what comes next invalid, and not translate it."""

_HEADER: Final = struct.Struct("=IHHII")
_FAMILY: Final = struct.Struct("!BBH")
_ATTRIBUTE: Final = struct.Struct("=HH")
_TIMEOUT_SECONDS: Final = 5.0
_RECEIVE: Final = 1 << 18
_ATTEMPTS: Final = 4
_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}

Attributes = dict[int, bytes]


class Conntrack:
    """A netlink socket of the calling thread's network namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.settimeout(_TIMEOUT_SECONDS)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> "Conntrack":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def of(self, addresses: Iterable[IPAddress]) -> tuple[Connection, ...]:
        """TCP and UDP connections that these addresses began, or answer in. Raises OSError."""
        found: dict[Flow, Connection] = {}
        wanted = frozenset(addresses)
        for address in wanted:
            # Of IPv6 the kernel's filter (5.8 … 6.18) shows those that are *not* of the address.
            for body in (_filter(address, _ORIGINAL), _filter(address, _REPLY)) if address.version == 4 else ():
                found |= {item.original: item for item in self._dump(4, body) if _concerns(item, wanted)}
        if any(address.version == 6 for address in wanted):
            found |= {item.original: item for item in self._dump(6, b"") if _concerns(item, wanted)}
        return tuple(found.values())

    def all(self) -> Iterator[Connection]:
        """Every TCP and UDP connection. Raises OSError."""
        for version in _FAMILIES:
            yield from self._dump(version, b"")

    def get(self, flow: Flow) -> Connection | None:
        """The connection that packets of a flow belong to, whichever direction it is. Raises OSError."""
        try:
            payloads = self._request(_GET, 0, flow.source.version, _flow(_ORIGINAL, flow))
        except FileNotFoundError:
            return None
        return next((found for found in map(decode, payloads) if found is not None), None)

    def put(self, connection: Connection) -> Outcome:
        """See to it that an entry is there. Raises OSError for what no other attempt would help.

        An entry that the kernel has made by itself is better knowledge, but where this one translates: packets that
        came before it may have made a plain one, or one that leads elsewhere.
        """
        for _ in range(_ATTEMPTS):
            try:
                self._request(_NEW, _ACK | _CREATE | _EXCLUSIVE, connection.original.source.version, encode(connection))
            except FileExistsError:
                found = self.get(connection.original) or self.get(connection.reply)
                if found is None:
                    continue  # it has ended meanwhile
                outcome = self._compare(found, connection)
                if outcome is not None:
                    return outcome
                self.delete(found.original)
                continue
            found = self.get(connection.original)
            if found is not None and (found.original, found.reply) == (connection.original, connection.reply):
                return Outcome.PLACED
            if found is not None:
                self.delete(found.original)
        return Outcome.REFUSED

    def _compare(self, found: Connection, wanted: Connection) -> Outcome | None:
        """What it means that this entry is there already; None when it must go."""
        if found.original == wanted.original and found.reply == wanted.reply:
            if found.mark != wanted.mark or found.timeout < wanted.timeout:
                self._refresh(wanted)
            return Outcome.PLACED
        if not wanted.translated or found.original not in (wanted.original, wanted.reply, wanted.reply.reversed()):
            return Outcome.KNOWN
        return None

    def _refresh(self, wanted: Connection) -> None:
        body = b"".join(
            (
                _flow(_ORIGINAL, wanted.original),
                _attribute(_TIMEOUT, struct.pack("!I", wanted.timeout)),
                _attribute(_MARK, struct.pack("!I", wanted.mark)),
            )
        )
        self._request(_NEW, _ACK, wanted.original.source.version, body)

    def delete(self, flow: Flow) -> bool:
        """Forget the connection of a flow. False when there is none. Raises OSError."""
        try:
            self._request(_DELETE, _ACK, flow.source.version, _flow(_ORIGINAL, flow))
        except FileNotFoundError:
            return False
        return True

    def delete_marked(self, mark: int) -> None:
        """Forget every connection with this mark. Raises OSError."""
        body = _attribute(_MARK, struct.pack("!I", mark)) + _attribute(_MARK_MASK, struct.pack("!I", 0xFFFFFFFF))
        for version in _FAMILIES:
            self._request(_DELETE, _ACK, version, body)

    def _dump(self, version: int, body: bytes) -> Iterator[Connection]:
        for payload in self._request(_GET, _DUMP, version, body):
            found = decode(payload)
            if found is not None:
                yield found

    def _request(self, message: int, flags: int, version: int, body: bytes) -> list[bytes]:
        """Payloads of the answer. Raises OSError with the kernel's errno."""
        self._sequence += 1
        payload = _FAMILY.pack(_FAMILIES[version], 0, 0) + body
        header = _HEADER.pack(_HEADER.size + len(payload), _SUBSYSTEM | message, _REQUEST | flags, self._sequence, 0)
        self._socket.send(header + payload)
        found: list[bytes] = []
        while True:
            for kind, sequence, content in messages(self._socket.recv(_RECEIVE)):
                if sequence != self._sequence:
                    continue  # the rest of an answer that timed out
                if kind == _ERROR:
                    number = -struct.unpack_from("=i", content)[0]
                    if number:
                        raise OSError(number, f"conntrack: {os.strerror(number)}")
                    return found
                if kind == _DONE:
                    return found
                found.append(content)
                if not flags & (_DUMP | _ACK):
                    return found


# Functions for the worker


def lasting() -> frozenset[IPAddress]:
    """Both ends, before and after translation, of each connection that is translated, or TCP, and may still be used."""
    with Conntrack() as conntrack:
        return ends(conntrack.all())


def ends(connections: Iterable[Connection]) -> frozenset[IPAddress]:
    """The same, of these."""
    found: set[IPAddress] = set()
    for item in connections:
        if item.lasting and (item.original.protocol == TCP or item.translated):
            for flow in (item.original, item.reply):
                found |= {flow.source, flow.destination}
    return frozenset(found)


def datagrams() -> frozenset[Datagrams]:
    """All of UDP."""
    with Conntrack() as conntrack:
        return frozenset(
            Datagrams(
                item.original.destination,
                item.original.destination_port,
                item.reply.source,
                item.reply.source_port,
                item.original,
            )
            for item in conntrack.all()
            if item.original.protocol == UDP
        )


def of(addresses: Sequence[IPAddress]) -> tuple[Connection, ...]:
    """Connections of these addresses."""
    with Conntrack() as conntrack:
        return conntrack.of(addresses)


def put(connections: Sequence[Connection]) -> tuple[Outcome, ...]:
    """Write entries; one the kernel cannot take does not hinder the others."""
    found = []
    with Conntrack() as conntrack:
        for connection in connections:
            try:
                found.append(conntrack.put(connection))
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOBUFS, errno.ETIMEDOUT):
                    raise
                found.append(Outcome.REFUSED)
    return tuple(found)


def delete(flows: Sequence[Flow]) -> int:
    """Forget the connections of these flows; returns how many there were."""
    with Conntrack() as conntrack:
        return sum(conntrack.delete(flow) for flow in flows)


def delete_marked(mark: int) -> None:
    """Forget every connection with this mark."""
    with Conntrack() as conntrack:
        conntrack.delete_marked(mark)


def _concerns(connection: Connection, addresses: frozenset[IPAddress]) -> bool:
    return connection.original.source in addresses or connection.reply.source in addresses


# Codec


def encode(connection: Connection) -> bytes:
    """Attributes of a message that makes an entry.

    A translated entry is written with the reply that it would have without, and with what its destination becomes:
    written with its real reply it would match, and translate nothing.
    """
    original, reply = connection.original, connection.reply
    status = CONFIRMED | connection.status & (SEEN_REPLY | ASSURED)
    parts = [
        _flow(_ORIGINAL, original),
        _flow(_REPLY, original.reversed()),
        _attribute(_STATUS, struct.pack("!I", status)),
        _attribute(_TIMEOUT, struct.pack("!I", connection.timeout)),
        _attribute(_MARK, struct.pack("!I", connection.mark)),
    ]
    if connection.translated:
        parts.append(_translation(_NAT_DESTINATION, reply.source, reply.source_port))
        # Said too, or the kernel would choose another port where it finds this one taken, and tell nobody.
        parts.append(_translation(_NAT_SOURCE, reply.destination, reply.destination_port))
    if connection.tcp is not None:
        tcp = connection.tcp
        body = _attribute(_TCP_STATE, bytes((tcp.state,)))
        body += _attribute(_TCP_SCALE_ORIGINAL, bytes((tcp.scales[0],)))
        body += _attribute(_TCP_SCALE_REPLY, bytes((tcp.scales[1],)))
        for kind, flags in zip((_TCP_FLAGS_ORIGINAL, _TCP_FLAGS_REPLY), tcp.flags, strict=True):
            body += _attribute(kind, bytes((flags & _KEPT_FLAGS | _LIBERAL, _KEPT_FLAGS | _LIBERAL)))
        parts.append(_nested(_PROTOCOL_STATE, _nested(_TCP, body)))
    if connection.zone:
        parts.append(_attribute(_ZONE, struct.pack("!H", connection.zone)))
    if any(connection.labels):
        parts.append(_attribute(_LABELS, connection.labels))
    return b"".join(parts)


def decode(payload: bytes) -> Connection | None:
    """An entry from a message of the kernel; None when it is of another protocol or lacks what it must have."""
    try:
        found = attributes(payload[_FAMILY.size :])
        original, reply = _decode_flow(found[_ORIGINAL]), _decode_flow(found[_REPLY])
        if original is None or reply is None:
            return None
        return Connection(
            original,
            reply,
            status=_number(found, _STATUS),
            timeout=_number(found, _TIMEOUT),
            mark=_number(found, _MARK),
            tcp=_decode_tcp(found) if original.protocol == TCP else None,
            zone=int.from_bytes(found.get(_ZONE, b""), "big"),
            labels=found.get(_LABELS, b""),
        )
    except (KeyError, ValueError, struct.error):
        return None


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, sequence number and content of each netlink message in what one ``recv`` gave."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            return
        yield kind, sequence, data[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def attributes(data: bytes) -> Attributes:
    """Attributes by type. Raises ValueError when lengths do not fit."""
    found: Attributes = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size or offset + length > len(data):
            raise ValueError(f"attribute of {length} octets at {offset} of {len(data)}")
        found[kind & _TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def _number(found: Attributes, kind: int) -> int:
    return int.from_bytes(found.get(kind, b""), "big")


def _decode_flow(data: bytes) -> Flow | None:
    parts = attributes(data)
    addresses, protocol = attributes(parts[_TUPLE_ADDRESSES]), attributes(parts[_TUPLE_PROTOCOL])
    number = _number(protocol, _NUMBER)
    if number not in PROTOCOLS:
        return None
    source, destination = (
        (addresses[_V4_SOURCE], addresses[_V4_DESTINATION])
        if _V4_SOURCE in addresses
        else (addresses[_V6_SOURCE], addresses[_V6_DESTINATION])
    )
    return Flow(
        number,
        ipaddress.ip_address(source),
        _number(protocol, _SOURCE_PORT),
        ipaddress.ip_address(destination),
        _number(protocol, _DESTINATION_PORT),
    )


def _decode_tcp(found: Attributes) -> TcpState | None:
    outer = attributes(found.get(_PROTOCOL_STATE, b""))
    parts = attributes(outer.get(_TCP, b""))
    if _TCP_STATE not in parts:
        return None
    return TcpState(
        _number(parts, _TCP_STATE),
        (_number(parts, _TCP_SCALE_ORIGINAL), _number(parts, _TCP_SCALE_REPLY)),
        (parts.get(_TCP_FLAGS_ORIGINAL, b"\0")[0], parts.get(_TCP_FLAGS_REPLY, b"\0")[0]),
    )


def _filter(address: IPAddress, direction: int) -> bytes:
    kind = _V4_SOURCE if address.version == 4 else _V6_SOURCE
    flags = _FILTER_ORIGINAL if direction == _ORIGINAL else _FILTER_REPLY
    return _nested(direction, _nested(_TUPLE_ADDRESSES, _attribute(kind, address.packed))) + _nested(
        _FILTER, _attribute(flags, struct.pack("=I", _FILTER_SOURCE))
    )


def _flow(kind: int, flow: Flow) -> bytes:
    four = flow.source.version == 4
    source, destination = (_V4_SOURCE, _V4_DESTINATION) if four else (_V6_SOURCE, _V6_DESTINATION)
    addresses = _attribute(source, flow.source.packed) + _attribute(destination, flow.destination.packed)
    protocol = (
        _attribute(_NUMBER, bytes((flow.protocol,)))
        + _attribute(_SOURCE_PORT, struct.pack("!H", flow.source_port))
        + _attribute(_DESTINATION_PORT, struct.pack("!H", flow.destination_port))
    )
    return _nested(kind, _nested(_TUPLE_ADDRESSES, addresses) + _nested(_TUPLE_PROTOCOL, protocol))


def _translation(kind: int, address: IPAddress, port: int) -> bytes:
    first, last = (_NAT_V4_FROM, _NAT_V4_TO) if address.version == 4 else (_NAT_V6_FROM, _NAT_V6_TO)
    number = struct.pack("!H", port)
    ports = _attribute(_NAT_PORT_FROM, number) + _attribute(_NAT_PORT_TO, number)
    return _nested(
        kind, _attribute(first, address.packed) + _attribute(last, address.packed) + _nested(_NAT_PORTS, ports)
    )


def _nested(kind: int, data: bytes) -> bytes:
    return _attribute(kind | _NESTED, data)


def _attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4)
