"""DHCPv6 messages between client and server (RFC 8415)."""

import struct
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv6Address
from typing import Final

from vmnet.wire import domains
from vmnet.wire.malformed import Malformed

SERVER_PORT: Final = 547  # RFC 8415 section 7.2
CLIENT_PORT: Final = 546
ALL_SERVERS: Final = IPv6Address("ff02::1:2")  # RFC 8415 section 7.1
MAX_DUID: Final = 130  # RFC 8415 section 11.1: 128 octets behind the type
MOST_PREFERRED: Final = 255  # RFC 8415 section 18.2.1: the client need not wait for other servers

_IA_ADDRESS: Final = struct.Struct("!16sII")
_IA: Final = struct.Struct("!III")
_FQDN_SERVER_UPDATES: Final = 0x01  # RFC 4704 section 4.1, S
_FQDN_OVERRIDE: Final = 0x02  # RFC 4704 section 4.1, O


class MessageType(IntEnum):
    """RFC 8415 section 7.3."""

    SOLICIT = 1
    ADVERTISE = 2
    REQUEST = 3
    CONFIRM = 4
    RENEW = 5
    REBIND = 6
    REPLY = 7
    RELEASE = 8
    DECLINE = 9
    RECONFIGURE = 10
    INFORMATION_REQUEST = 11


_RELAY: Final = (12, 13)  # RELAY-FORW and RELAY-REPL have another header (RFC 8415 section 9)


class Option(IntEnum):
    """The options this package reads or writes."""

    CLIENT_ID = 1  # RFC 8415 section 21.2
    SERVER_ID = 2  # section 21.3
    IA_NA = 3  # section 21.4
    IA_TA = 4  # section 21.5
    IA_ADDRESS = 5  # section 21.6
    REQUESTED = 6  # section 21.7
    PREFERENCE = 7  # section 21.8
    STATUS = 13  # section 21.13
    RAPID_COMMIT = 14  # section 21.14
    DNS = 23  # RFC 3646 section 3
    SEARCH = 24  # RFC 3646 section 4
    IA_PD = 25  # RFC 8415 section 21.21
    FQDN = 39  # RFC 4704 section 4


class StatusCode(IntEnum):
    """RFC 8415 section 21.13."""

    SUCCESS = 0
    UNSPECIFIED = 1
    NO_ADDRESSES = 2
    NO_BINDING = 3
    NOT_ON_LINK = 4
    USE_MULTICAST = 5
    NO_PREFIX = 6


@dataclass(frozen=True, slots=True)
class Status:
    """How it went; ``code`` may be one that ``StatusCode`` does not list."""

    code: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class Assigned:
    """One address with its lifetimes in seconds."""

    address: IPv6Address
    preferred: int
    valid: int


@dataclass(frozen=True, slots=True)
class Association:
    """An identity association: ``kind`` is IA_NA, IA_TA or IA_PD. Delegated prefixes inside an IA_PD are not read."""

    kind: Option
    identifier: int
    renew: int = 0
    rebind: int = 0
    addresses: tuple[Assigned, ...] = ()
    status: Status | None = None


@dataclass(frozen=True, slots=True)
class Fqdn:
    """Client FQDN (RFC 4704): who keeps the AAAA record, and the name (partial when it has no dot)."""

    name: str
    server_updates: bool = False
    override: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """One message; ``transaction`` has 24 bits, ``client`` and ``server`` are DUIDs."""

    type: MessageType
    transaction: int
    client: bytes | None = None
    server: bytes | None = None
    associations: tuple[Association, ...] = ()
    rapid_commit: bool = False
    requested: tuple[int, ...] = ()
    preference: int | None = None
    status: Status | None = None
    dns: tuple[IPv6Address, ...] = ()
    search: tuple[str, ...] = ()
    fqdn: Fqdn | None = None


def encode(message: Message) -> bytes:
    """The UDP payload. Raises ValueError for names that DNS cannot carry."""
    parts = [bytes([message.type]) + message.transaction.to_bytes(3, "big")]
    if message.client is not None:
        parts.append(_option(Option.CLIENT_ID, message.client))
    if message.server is not None:
        parts.append(_option(Option.SERVER_ID, message.server))
    parts += [_encode_association(association) for association in message.associations]
    if message.rapid_commit:
        parts.append(_option(Option.RAPID_COMMIT, b""))
    if message.requested:
        parts.append(_option(Option.REQUESTED, struct.pack(f"!{len(message.requested)}H", *message.requested)))
    if message.preference is not None:
        parts.append(_option(Option.PREFERENCE, bytes([message.preference])))
    if message.status is not None:
        parts.append(_encode_status(message.status))
    if message.dns:
        parts.append(_option(Option.DNS, b"".join(server.packed for server in message.dns)))
    if message.search:
        parts.append(_option(Option.SEARCH, domains.encode_names(message.search)))
    if message.fqdn is not None:
        flags = _FQDN_SERVER_UPDATES * message.fqdn.server_updates | _FQDN_OVERRIDE * message.fqdn.override
        name = domains.encode_name(message.fqdn.name)
        if "." not in message.fqdn.name:
            name = name[:-1]  # RFC 4704 section 4.2: a partial name has no root label
        parts.append(_option(Option.FQDN, bytes([flags]) + name))
    return b"".join(parts)


def decode(data: bytes) -> Message:
    """The message in a UDP payload. Raises Malformed; relayed messages are refused as such."""
    if len(data) < 4:
        raise Malformed(f"DHCPv6 message of {len(data)} octets")
    if data[0] in _RELAY:
        raise Malformed("relayed message: no relay stands between a port and its node")
    try:
        kind = MessageType(data[0])
    except ValueError:
        raise Malformed(f"DHCPv6 message type {data[0]}") from None
    client: bytes | None = None
    server: bytes | None = None
    associations: list[Association] = []
    rapid_commit = False
    requested: tuple[int, ...] = ()
    preference: int | None = None
    status: Status | None = None
    dns: tuple[IPv6Address, ...] = ()
    search: tuple[str, ...] = ()
    fqdn: Fqdn | None = None
    once: set[int] = set()
    for code, value in _options(data[4:]):
        if code in (Option.IA_NA, Option.IA_TA, Option.IA_PD):
            associations.append(_decode_association(Option(code), value))
            continue
        if code in _SINGLE:
            if code in once:
                raise Malformed(f"option {code} twice")
            once.add(code)
        match code:
            case Option.CLIENT_ID:
                client = _duid(value)
            case Option.SERVER_ID:
                server = _duid(value)
            case Option.RAPID_COMMIT:
                _expect(value, 0, code)
                rapid_commit = True
            case Option.REQUESTED:
                if len(value) % 2:
                    raise Malformed("option request option of an odd size")
                requested = struct.unpack(f"!{len(value) // 2}H", value)
            case Option.PREFERENCE:
                _expect(value, 1, code)
                preference = value[0]
            case Option.STATUS:
                status = _decode_status(value)
            case Option.DNS:
                if not value or len(value) % 16:
                    raise Malformed("DNS option of the wrong size")
                dns = tuple(IPv6Address(value[offset : offset + 16]) for offset in range(0, len(value), 16))
            case Option.SEARCH:
                search = domains.decode_names(value)
            case Option.FQDN:
                fqdn = _decode_fqdn(value)
    return Message(
        type=kind,
        transaction=int.from_bytes(data[1:4], "big"),
        client=client,
        server=server,
        associations=tuple(associations),
        rapid_commit=rapid_commit,
        requested=requested,
        preference=preference,
        status=status,
        dns=dns,
        search=search,
        fqdn=fqdn,
    )


# Options that a message carries once (RFC 8415 section 21.1).
_SINGLE: Final = frozenset(Option) - {Option.IA_NA, Option.IA_TA, Option.IA_PD, Option.IA_ADDRESS}


def _options(data: bytes) -> tuple[tuple[int, bytes], ...]:
    options: list[tuple[int, bytes]] = []
    offset = 0
    while offset < len(data):
        if offset + 4 > len(data):
            raise Malformed("DHCPv6 option ends early")
        code, size = struct.unpack_from("!HH", data, offset)
        value = data[offset + 4 : offset + 4 + size]
        if len(value) != size:
            raise Malformed(f"DHCPv6 option {code} ends early")
        options.append((code, value))
        offset += 4 + size
    return tuple(options)


def _option(code: Option, value: bytes) -> bytes:
    return struct.pack("!HH", code, len(value)) + value


def _encode_association(association: Association) -> bytes:
    if association.kind == Option.IA_TA:
        head = association.identifier.to_bytes(4, "big")
    else:
        head = _IA.pack(association.identifier, association.renew, association.rebind)
    inner = b"".join(
        _option(Option.IA_ADDRESS, _IA_ADDRESS.pack(item.address.packed, item.preferred, item.valid))
        for item in association.addresses
    )
    if association.status is not None:
        inner += _encode_status(association.status)
    return _option(association.kind, head + inner)


def _decode_association(kind: Option, value: bytes) -> Association:
    size = 4 if kind == Option.IA_TA else _IA.size
    if len(value) < size:
        raise Malformed(f"identity association of {len(value)} octets")
    identifier, renew, rebind = (*struct.unpack_from("!I", value), 0, 0) if size == 4 else _IA.unpack_from(value)
    if renew > rebind > 0:
        raise Malformed("T1 is greater than T2")  # RFC 8415 section 21.4
    addresses: list[Assigned] = []
    status: Status | None = None
    for code, inner in _options(value[size:]):
        if code == Option.IA_ADDRESS:
            if len(inner) < _IA_ADDRESS.size:
                raise Malformed(f"IA address of {len(inner)} octets")
            packed, preferred, valid = _IA_ADDRESS.unpack_from(inner)
            if preferred > valid:
                raise Malformed("preferred lifetime is longer than the valid one")  # RFC 8415 section 21.6
            _options(inner[_IA_ADDRESS.size :])
            addresses.append(Assigned(IPv6Address(packed), preferred, valid))
        elif code == Option.STATUS:
            status = _decode_status(inner)
    return Association(kind, identifier, renew, rebind, tuple(addresses), status)


def _encode_status(status: Status) -> bytes:
    return _option(Option.STATUS, status.code.to_bytes(2, "big") + status.text.encode())


def _decode_status(value: bytes) -> Status:
    if len(value) < 2:
        raise Malformed("status code ends early")
    return Status(int.from_bytes(value[:2], "big"), value[2:].decode(errors="replace"))


def _decode_fqdn(value: bytes) -> Fqdn:
    if not value:
        raise Malformed("client FQDN ends early")
    name = value[1:]
    # A partial name lacks its root label, and a client that leaves the name to the server sends none at all.
    names = domains.decode_names(name if name.endswith(b"\0") else name + b"\0")
    if len(names) != 1:
        raise Malformed("client FQDN with more than one name")
    return Fqdn(names[0], bool(value[0] & _FQDN_SERVER_UPDATES), bool(value[0] & _FQDN_OVERRIDE))


def _duid(value: bytes) -> bytes:
    if not 3 <= len(value) <= MAX_DUID:
        raise Malformed(f"DUID of {len(value)} octets")
    return value


def _expect(value: bytes, size: int, code: int) -> None:
    if len(value) != size:
        raise Malformed(f"option {code} has {len(value)} octets, not {size}")
