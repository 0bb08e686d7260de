"""Conntrack's entries for UDP whose destination was translated: read and deleted, over netlink.

Datagrams have no end that conntrack could see: whoever goes on sending keeps its entry, wherever that leads. Numbers
are those of linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_common.h.
"""

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from vmnet.model.addresses import IPAddress
from vmnet.plan.state import Datagrams

NETLINK_NETFILTER: Final = 12
_GET: Final = 0x0101
_DELETE: Final = 0x0102
"""NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE."""
_REQUEST: Final = 0x1
_ACK: Final = 0x4
_DUMP: Final = 0x300
_ERROR: Final = 0x2
_DONE: Final = 0x3
_TYPE: Final = 0x3FFF
"""NLA_TYPE_MASK: without the flags of nesting and byte order."""
_NESTED: Final = 0x8000
_TUPLE_ORIG: Final = 1
_TUPLE_REPLY: Final = 2
_STATUS: Final = 3
_TUPLE_IP: Final = 1
_TUPLE_PROTO: Final = 2
_PROTO_NUMBER: Final = 1
_PROTO_SOURCE: Final = 2
_PROTO_DESTINATION: Final = 3
_DESTINATION_TRANSLATED: Final = 1 << 5
"""IPS_DST_NAT."""
_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_TIMEOUT: Final = 10.0
_RECEIVE: Final = 1 << 18
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)

Attributes = dict[int, bytes]


def read() -> frozenset[Datagrams]:
    """Those of the calling thread's namespace. Raises OSError."""
    found: set[Datagrams] = set()
    with _open() as opened:
        for family in _FAMILIES:
            opened.send(_message(_GET, _REQUEST | _DUMP, family, b""))
            for body in _replies(opened):
                entry = decode(body)
                if entry is not None:
                    found.add(entry)
    return frozenset(found)


def delete(entries: Iterable[Datagrams]) -> int:
    """Delete them in the calling thread's namespace; returns how many were still there. Raises OSError."""
    count = 0
    with _open() as opened:
        for entry in entries:
            family = socket.AF_INET if entry.asked.version == 4 else socket.AF_INET6
            opened.send(_message(_DELETE, _REQUEST | _ACK, family, _nested(_TUPLE_ORIG, entry.key)))
            try:
                list(_replies(opened))
            except FileNotFoundError:
                continue  # it ended meanwhile
            count += 1
    return count


def decode(body: bytes) -> Datagrams | None:
    """The entry of a message (without its netlink header); None when it is another protocol's, or not translated."""
    found = _attributes(body[4:])
    key = found.get(_TUPLE_ORIG)
    status = int.from_bytes(found.get(_STATUS, b"\0"), "big")
    if key is None or _TUPLE_REPLY not in found or not status & _DESTINATION_TRANSLATED:
        return None
    asked, reply = _ends(key), _ends(found[_TUPLE_REPLY])
    if asked is None or reply is None:
        return None
    _, (address, port) = asked
    (backend, backend_port), _ = reply
    return Datagrams(address, port, backend, backend_port, key)


def _ends(found: bytes) -> tuple[tuple[IPAddress, int], tuple[IPAddress, int]] | None:
    """Source and destination of a tuple; None when it is not UDP's."""
    parts = _attributes(found)
    protocol, addresses = _attributes(parts[_TUPLE_PROTO]), _attributes(parts[_TUPLE_IP])
    if protocol.get(_PROTO_NUMBER) != bytes((socket.IPPROTO_UDP,)):
        return None
    # CTA_IP_V4_SRC and _DST are 1 and 2, CTA_IP_V6_SRC and _DST 3 and 4.
    source, destination = (addresses[kind] for kind in sorted(addresses))
    ports = (int.from_bytes(protocol[kind], "big") for kind in (_PROTO_SOURCE, _PROTO_DESTINATION))
    return (_address(source), next(ports)), (_address(destination), next(ports))


def _address(packed: bytes) -> IPAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _attributes(data: bytes) -> Attributes:
    found: Attributes = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE] = data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]
    return found


def _nested(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind | _NESTED) + data


def _message(kind: int, flags: int, family: int, attributes: bytes) -> bytes:
    body = struct.pack("!BBH", family, 0, 0) + attributes
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body


def _open() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    opened.settimeout(_TIMEOUT)
    return opened


def _replies(opened: socket.socket) -> Iterator[bytes]:
    """Bodies of the messages that answer one request. Raises OSError with what the kernel says."""
    while True:
        data = opened.recv(_RECEIVE)
        while len(data) >= _HEADER.size:
            length, kind, *_ = _HEADER.unpack_from(data)
            body = data[_HEADER.size : length]
            data = data[(length + 3) & ~3 :]
            if kind == _DONE:
                return
            if kind != _ERROR:
                yield body
                continue
            number = -struct.unpack_from("=i", body)[0]
            if number == 0:
                return
            raise OSError(number, os.strerror(number))  # which is FileNotFoundError for ENOENT
