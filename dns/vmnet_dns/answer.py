"""From a view and a query to an answer. Pure; microseconds for a question that was asked before."""

import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, cast

from vmnet_dns import message
from vmnet_dns.message import OPT, Malformed, Query, Rcode, Type
from vmnet_dns.zone import Node, Record, View

COMPILED_LIMIT: Final = 16_384
"""Distinct questions of a view whose answers are kept ready. Only names that exist take part: a client cannot fill it
with names that it makes up."""
_ALIAS_LIMIT: Final = 8
_ONE_QUESTION: Final = b"\x00\x01\x00\x00\x00\x00\x00\x00"
_AND_ONE_OPT: Final = b"\x00\x01\x00\x00\x00\x00\x00\x01"
_FORWARDED_NEVER: Final = {Type.AXFR, Type.IXFR}


class Transport(StrEnum):
    """How the query came: over UDP answers are limited in size."""

    UDP = "udp"
    TCP = "tcp"


class Outcome(StrEnum):
    """What became of a query."""

    LOCAL = "local"
    FORWARD = "forward"
    """Not for this view to answer: ask the world."""
    REFUSED = "refused"
    MALFORMED = "malformed"
    """Answered with FORMERR or NOTIMP, or dropped."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``wire`` None: nothing is to be sent (now)."""

    wire: bytes | None
    outcome: Outcome
    type: int = 0
    rcode: int = Rcode.NOERROR
    query: Query | None = None
    """The parsed query, when it is to be forwarded."""


@dataclass(frozen=True, slots=True)
class _Compiled:
    rcode: int
    type: int
    counts: tuple[int, int, int]
    sections: bytes


def answer(view: View, query: bytes, *, transport: Transport = Transport.UDP) -> Answer:
    """Answer one query. Never raises, whatever the bytes are."""
    found = _ready(view, query, transport)
    if found is not None:
        return found
    try:
        parsed = message.parse_query(query)
    except Malformed as error:
        wire = message.refusal(query, error.rcode) if error.rcode is not None else None
        return Answer(wire, Outcome.MALFORMED, 0, error.rcode or Rcode.NOERROR)
    if parsed.version > 0:
        return _bare(parsed, Rcode.BADVERS, Outcome.LOCAL)
    if parsed.klass != message.CLASS_IN or parsed.type in _FORWARDED_NEVER:
        return _bare(parsed, Rcode.REFUSED, Outcome.REFUSED)
    if parsed.type in (Type.MAILA, Type.MAILB):
        return _bare(parsed, Rcode.NOTIMP, Outcome.LOCAL)
    if parsed.type in (Type.OPT, Type.TSIG, Type.TKEY, 0):
        return _bare(parsed, Rcode.FORMERR, Outcome.MALFORMED)
    compiled, exists = _resolve(view, parsed)
    if compiled is None:
        return Answer(None, Outcome.FORWARD, parsed.type, query=parsed)
    if exists and len(view.compiled) < COMPILED_LIMIT:
        view.compiled[parsed.key] = compiled
    return _finish(compiled, parsed.id, parsed.flags, parsed.question, parsed.edns, _limit(parsed.size, transport))


def _ready(view: View, query: bytes, transport: Transport) -> Answer | None:
    """The kept answer, found by the question's bytes alone. A key is there only if it parsed well before."""
    counts = query[4:12]
    if len(query) < 17 or query[2] & 0xFE:
        return None
    if counts == _ONE_QUESTION:
        question, edns, size = query[12:], False, message.UDP_MINIMUM
    elif counts == _AND_ONE_OPT and query[-11:-8] == b"\x00\x00\x29" and query[-5] == 0 and query[-2:] == b"\x00\x00":
        question, edns, size = query[12:-11], True, (query[-8] << 8) | query[-7]
    else:
        return None
    compiled = cast(_Compiled | None, view.compiled.get(question[:-4].lower() + question[-4:]))
    if compiled is None:
        return None
    number, flags = struct.unpack_from("!HH", query)
    return _finish(compiled, number, flags, question, edns, _limit(size, transport))


def _limit(size: int, transport: Transport) -> int:
    if transport is Transport.TCP:
        return 0xFFFF
    return min(max(size, message.UDP_MINIMUM), message.UDP_MAXIMUM)


def _finish(compiled: _Compiled, number: int, flags: int, question: bytes, edns: bool, limit: int) -> Answer:
    """The client's id, flags and spelling of the name around the compiled sections."""
    reply = message.reply_flags(flags, compiled.rcode, authoritative=True)
    opt = OPT if edns else b""
    wire = message.compose(number, reply, question, compiled.counts, compiled.sections, opt)
    if len(wire) > limit:
        wire = message.compose(number, reply | message.TC, question, opt=opt)
    return Answer(wire, Outcome.LOCAL, compiled.type, compiled.rcode)


def _bare(query: Query, rcode: Rcode, outcome: Outcome) -> Answer:
    """An answer without records; codes above 15 have their upper bits in OPT (RFC 6891 section 6.1.3)."""
    opt = b""
    if query.edns:
        opt = OPT[:5] + bytes((rcode >> 4,)) + OPT[6:]
    flags = message.reply_flags(query.flags, rcode)
    return Answer(message.compose(query.id, flags, query.question, opt=opt), outcome, query.type, rcode)


def refuse(query: Query) -> Answer:
    """REFUSED: this question is not answered here."""
    return _bare(query, Rcode.REFUSED, Outcome.REFUSED)


def refuse_stranger(query: bytes) -> Answer:
    """REFUSED to whoever may not ask here at all; malformed queries get nothing."""
    try:
        return refuse(message.parse_query(query))
    except Malformed:
        return Answer(None, Outcome.MALFORMED)


def fail(query: Query) -> bytes:
    """SERVFAIL: no upstream answered."""
    wire = _bare(query, Rcode.SERVFAIL, Outcome.LOCAL).wire
    return wire if wire is not None else b""


def _resolve(view: View, query: Query) -> tuple[_Compiled | None, bool]:
    """The answer from this view, and whether the name exists; None when it is to be forwarded."""
    name = query.name
    node = view.nodes.get(name)
    zone = view.zone_of(name)
    if (zone is None or zone.forwarded) and (node is None or not node.sets):
        # A name that is there only because a record of ours is below it (``arpa``) is not ours to deny.
        return None, False
    if node is None:
        return _negative(view, name, Rcode.NXDOMAIN, query.type), False
    if query.type == Type.SOA and zone is not None and zone.apex == name:
        return _Compiled(Rcode.NOERROR, query.type, (1, 0, 0), view.start_of_authority(zone)), True
    answers: list[bytes] = []
    used: set[bytes] = set()
    owner, target = message.OWNER, name
    chosen: tuple[Record, ...] = ()
    while True:
        used.add(target)
        chosen = _choose(node, query.type)
        alias = node.sets.get(Type.CNAME, ())
        if chosen or not alias or len(used) > _ALIAS_LIMIT:
            break
        answers.append(message.record(owner, Type.CNAME, alias[0].ttl, alias[0].data))
        owner = target = alias[0].data
        next_node = view.nodes.get(target)
        if next_node is None or target in used:
            break
        node = next_node
    answers += [message.record(owner, item.type, item.ttl, item.data) for item in chosen]
    if not answers:
        return _negative(view, name, Rcode.NOERROR, query.type), True
    additional = _additional(view, chosen)
    counts = len(answers), 0, len(additional)
    return _Compiled(Rcode.NOERROR, query.type, counts, b"".join([*answers, *additional])), True


def _choose(node: Node, kind: int) -> tuple[Record, ...]:
    """Records of the type; of ANY one set only (RFC 8482 section 4.1)."""
    if kind == Type.ANY:
        return next(iter(node.sets.values()), ())
    return node.sets.get(kind, ())


def _additional(view: View, chosen: tuple[Record, ...]) -> list[bytes]:
    """Addresses of the hosts that SRV and NS records name."""
    found: dict[bytes, None] = {}
    for item in chosen:
        if item.type not in (Type.SRV, Type.NS):
            continue
        target = item.data[6:] if item.type == Type.SRV else item.data
        node = view.nodes.get(target, Node())
        for kind in (Type.A, Type.AAAA):
            for address in node.sets.get(kind, ()):
                found[message.record(target, kind, address.ttl, address.data)] = None
    return list(found)


def _negative(view: View, name: bytes, rcode: Rcode, kind: int) -> _Compiled:
    """NXDOMAIN or NODATA with the zone's SOA, so that resolvers remember it for NEGATIVE_TTL and no longer."""
    zone = view.zone_of(name)
    if zone is None or zone.forwarded:
        return _Compiled(rcode, kind, (0, 0, 0), b"")
    return _Compiled(rcode, kind, (0, 1, 0), view.start_of_authority(zone))
