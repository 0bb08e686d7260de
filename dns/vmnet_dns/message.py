"""DNS messages on the wire (RFC 1035 section 4, RFC 6891): parsing what comes in, composing what goes out. Pure."""

import struct
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Final

HEADER: Final = struct.Struct("!6H")
RECORD: Final = struct.Struct("!HHIH")
"""Type, class, TTL and length of the data, after the owner's name."""

QR: Final = 0x8000
AA: Final = 0x0400
TC: Final = 0x0200
RD: Final = 0x0100
RA: Final = 0x0080
CD: Final = 0x0010
OPCODE: Final = 0x7800
DO: Final = 0x8000
"""In the extended flags of OPT (RFC 3225)."""

CLASS_IN: Final = 1
OWNER: Final = b"\xc0\x0c"
"""Compression pointer to the question's name, which stands at offset 12."""
UDP_MINIMUM: Final = 512
UDP_MAXIMUM: Final = 1232
"""What crosses an IPv6 path of minimum MTU unfragmented; larger answers are truncated."""
OPT: Final = b"\x00" + struct.pack("!HHIH", 41, UDP_MAXIMUM, 0, 0)
"""Our OPT record: version 0, no flags, no options."""


class Type(IntEnum):
    """Record and question types that are treated specially (IANA)."""

    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    HINFO = 13
    MX = 15
    TXT = 16
    AAAA = 28
    SRV = 33
    NAPTR = 35
    OPT = 41
    DS = 43
    DNSKEY = 48
    SVCB = 64
    HTTPS = 65
    TKEY = 249
    TSIG = 250
    IXFR = 251
    AXFR = 252
    MAILB = 253
    MAILA = 254
    ANY = 255


class Rcode(IntEnum):
    """Response codes (RFC 1035, 6891)."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16


def type_name(number: int) -> str:
    """Label for counters: a type we know, else ``other`` (clients choose the number, so it must be bounded)."""
    try:
        return Type(number).name
    except ValueError:
        return "other"


def rcode_name(number: int) -> str:
    """Label for counters: bounded like ``type_name``."""
    try:
        return Rcode(number).name
    except ValueError:
        return "other"


class Malformed(Exception):
    """A message that cannot be parsed; ``rcode`` None: it deserves no answer."""

    def __init__(self, reason: str, rcode: Rcode | None = Rcode.FORMERR) -> None:
        super().__init__(reason)
        self.rcode = rcode


def encode_name(text: str) -> bytes:
    """Wire form, lower case, uncompressed. Raises ValueError for empty or over-long labels and names."""
    wire = bytearray()
    stripped = text.rstrip(".")
    for label in stripped.split(".") if stripped else ():
        octets = label.encode("ascii")
        if not 1 <= len(octets) <= 63:
            raise ValueError(f"{text!r}: a label has 1 to 63 characters")
        wire.append(len(octets))
        wire += octets.lower()
    wire.append(0)
    if len(wire) > 255:
        raise ValueError(f"{text!r}: a name has at most 255 octets")
    return bytes(wire)


def decode_name(wire: bytes) -> str:
    """Text of an uncompressed name, with a final dot; bytes that are no letters come out escaped."""
    labels, at = [], 0
    while wire[at]:
        label = wire[at + 1 : at + 1 + wire[at]]
        labels.append(
            "".join(chr(octet) if 0x21 <= octet <= 0x7E and octet != 0x2E else f"\\{octet:03d}" for octet in label)
        )
        at += 1 + wire[at]
    return ".".join(labels) + "."


def parents(name: bytes) -> list[bytes]:
    """The name itself, its parent and so on up to the root; all in wire form."""
    found, at = [name], 0
    while name[at]:
        at += 1 + name[at]
        found.append(name[at:])
    return found


def reverse_name(address: IPv4Address | IPv6Address) -> bytes:
    """Owner of the PTR record."""
    return encode_name(address.reverse_pointer)


def skip_name(message: bytes, at: int) -> int:
    """Offset after a possibly compressed name. Raises Malformed."""
    while True:
        if at >= len(message):
            raise Malformed("a name runs over the end")
        length = message[at]
        if length == 0:
            return at + 1
        if length >= 0xC0:
            if at + 2 > len(message):
                raise Malformed("a compression pointer runs over the end")
            return at + 2
        if length > 63:
            raise Malformed("unknown label type")
        at += 1 + length


def expand_name(message: bytes, at: int) -> tuple[bytes, int]:
    """A possibly compressed name in full, and the offset after it. Raises Malformed, for loops too."""
    after: int | None = None
    found = bytearray()
    lowest = at
    while True:
        if at >= len(message):
            raise Malformed("a name runs over the end")
        length = message[at]
        if length == 0:
            return bytes(found) + b"\x00", at + 1 if after is None else after
        if length >= 0xC0:
            if at + 2 > len(message):
                raise Malformed("a compression pointer runs over the end")
            after = at + 2 if after is None else after
            at = (length & 0x3F) << 8 | message[at + 1]
            if at >= lowest:
                # Only names that stand before may be pointed to (RFC 1035 section 4.1.4).
                raise Malformed("a compression pointer that points forward")
            lowest = at
            continue
        if length > 63 or len(found) + length > 253:
            raise Malformed("a name that is too long")
        found += message[at : at + 1 + length]
        at += 1 + length


@dataclass(frozen=True, slots=True)
class Query:
    """A well-formed query. ``question`` is raw: the name in the client's own case, type, class."""

    id: int
    flags: int
    question: bytes
    type: int
    klass: int
    edns: bool = False
    size: int = UDP_MINIMUM
    version: int = 0
    dnssec: bool = False

    @property
    def name(self) -> bytes:
        """The name, lower case, wire form."""
        return self.question[:-4].lower()

    @property
    def key(self) -> bytes:
        """The question with its name in lower case: equal for equal questions."""
        # Type and class are not folded: type 65 would become 97.
        return self.question[:-4].lower() + self.question[-4:]


def parse_query(message: bytes) -> Query:
    """Raises Malformed, with the rcode to answer or None."""
    if len(message) < HEADER.size:
        raise Malformed("shorter than a header", None)
    number, flags, questions, answers, authorities, additionals = HEADER.unpack_from(message)
    if flags & QR:
        raise Malformed("an answer, not a query", None)
    if flags & OPCODE:
        raise Malformed("not a standard query", Rcode.NOTIMP)
    if questions != 1 or answers or authorities:
        raise Malformed("a query has one question and no records but additional ones")
    at = HEADER.size
    while True:
        if at >= len(message):
            raise Malformed("the name runs over the end")
        length = message[at]
        if length > 63:
            raise Malformed("a question has no compression")
        at += 1 + length
        if length == 0:
            break
    if at - HEADER.size > 255:
        raise Malformed("the name is too long")
    if at + 4 > len(message):
        raise Malformed("the question is cut off")
    question = message[HEADER.size : at + 4]
    kind, klass = struct.unpack("!HH", question[-4:])
    at += 4
    edns: tuple[int, int, bool] | None = None
    for _ in range(additionals):
        start, at = at, skip_name(message, at)
        if at + RECORD.size > len(message):
            raise Malformed("a record is cut off")
        record, size, ttl, length = RECORD.unpack_from(message, at)
        at += RECORD.size + length
        if at > len(message):
            raise Malformed("a record's data is cut off")
        if record == Type.OPT:
            if edns is not None or message[start] != 0:
                raise Malformed("one OPT record, owned by the root")
            edns = size, (ttl >> 16) & 0xFF, bool(ttl & DO)
    if at != len(message):
        raise Malformed("bytes after the message")
    if edns is None:
        return Query(number, flags, question, kind, klass)
    return Query(number, flags, question, kind, klass, True, max(UDP_MINIMUM, edns[0]), edns[1], edns[2])


def compose(
    number: int,
    flags: int,
    question: bytes,
    counts: tuple[int, int, int] = (0, 0, 0),
    sections: bytes = b"",
    opt: bytes = b"",
) -> bytes:
    """One message; ``counts`` are the answer, authority and additional records in ``sections`` (OPT not counted)."""
    head = HEADER.pack(number, flags, 1 if question else 0, counts[0], counts[1], counts[2] + (1 if opt else 0))
    return head + question + sections + opt


def compose_within(
    limit: int,
    number: int,
    flags: int,
    question: bytes,
    counts: tuple[int, int, int],
    sections: bytes,
    opt: bytes = b"",
) -> bytes:
    """Like ``compose``, with as many records as ``limit`` octets hold, and TC where what is left out was needed.

    Additional records are not (RFC 2181 section 9). Resolvers that know no TCP live on what is there.
    """
    room = limit - HEADER.size - len(question) - len(opt)
    if len(sections) <= room:
        return compose(number, flags, question, counts, sections, opt)
    kept, at = [0, 0, 0], 0
    for section, count in enumerate(counts):
        for _ in range(count):
            after = skip_name(sections, at)
            after += RECORD.size + RECORD.unpack_from(sections, after)[3]
            if after > room:
                cut = flags | TC if section < 2 else flags
                return compose(number, cut, question, (kept[0], kept[1], kept[2]), sections[:at], opt)
            kept[section] += 1
            at = after
    return compose(number, flags, question, (kept[0], kept[1], kept[2]), sections[:at], opt)


def reply_flags(query_flags: int, rcode: int, *, authoritative: bool = False) -> int:
    """Header flags of an answer: RD and CD copied, RA set (the rest of the world is forwarded)."""
    return QR | RA | (AA if authoritative else 0) | (query_flags & (OPCODE | RD | CD)) | (rcode & 0xF)


def refusal(message: bytes, rcode: Rcode) -> bytes:
    """Answer to a query that could not be parsed: the header alone, its id and opcode kept."""
    number, flags = struct.unpack_from("!HH", message)
    return compose(number, reply_flags(flags, rcode), b"")


def record(owner: bytes, kind: int, ttl: int, data: bytes) -> bytes:
    """One resource record of class IN; ``owner`` and names in ``data`` in wire form."""
    return owner + RECORD.pack(kind, CLASS_IN, ttl, len(data)) + data
