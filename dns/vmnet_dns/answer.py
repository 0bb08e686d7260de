"""From a view and a query to an answer. Pure; microseconds for a question that was asked before."""

import struct
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, cast

from vmnet_dns import message
from vmnet_dns.message import OPT, Malformed, Query, Rcode, Type
from vmnet_dns.zone import Node, Record, View

COMPILED_LIMIT: Final = 16_384
"""Distinct questions of a view whose answers are kept ready. Only names that exist take part: a client cannot fill it
with names that it makes up."""
VARIANTS: Final = 16
"""Of one question: with and without EDNS, of several sizes, with several flags."""
_ALIAS_LIMIT: Final = 8
_SECURE_OPT: Final = OPT[:7] + struct.pack("!H", message.DO) + OPT[9:]
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
class Alias:
    """Aliases that lead out of the view: ``records`` (``count`` of them), and the question that they leave open."""

    count: int
    records: bytes
    target: Query


@dataclass(frozen=True, slots=True)
class Answer:
    """``wire`` None: nothing is to be sent (now)."""

    wire: bytes | None
    outcome: Outcome
    type: int = 0
    rcode: int = Rcode.NOERROR
    query: Query | None = None
    """The parsed query, when it is to be forwarded."""
    alias: Alias | None = None
    """What stands before the world's answer."""


@dataclass(slots=True)
class _Compiled:
    rcode: int
    type: int
    counts: tuple[int, int, int]
    sections: bytes
    names: tuple[bytes, ...] = ()
    """What the answer was made of."""
    wires: list[bytes] = field(default_factory=list)
    """Keys of ``Ready.by_bytes``."""


ByBytes = tuple[bytes, int, bytes, bytes, tuple[str, str, str]]
"""Header without id, end of the question, end of the query, what comes after the question; type, rcode, outcome.

The end of the query is compared as it is: types and classes must not be folded with the name.
"""


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
    resolved = view.ready.by_question.get(parsed.key)
    if resolved is None:
        resolved = _resolve(view, parsed)
        if resolved is None or isinstance(resolved, Alias):
            return Answer(None, Outcome.FORWARD, parsed.type, query=parsed, alias=resolved)
        if resolved.names:
            _keep(view, parsed.key, resolved)
    opt = _opt(parsed.dnssec) if parsed.edns else b""
    return _finish(resolved, parsed.id, parsed.flags, parsed.question, opt, _limit(parsed.size, transport))


def keep_bytes(view: View, query: bytes, found: Answer) -> None:
    """Keep the answer to a datagram under the datagram's own bytes, if these say nothing but the question."""
    split = _split(query)
    if found.wire is None or found.outcome is not Outcome.LOCAL or split is None or query[3] & 0x40:
        return
    question = split[0]
    compiled = view.ready.by_question.get(question[:-4].lower() + question[-4:])
    if compiled is None or len(compiled.wires) >= VARIANTS:
        return
    key, end, wire = query[2:].lower(), 12 + len(question), found.wire
    compiled.wires.append(key)
    labels = message.type_name(found.type), message.rcode_name(found.rcode), found.outcome.value
    kept: ByBytes = wire[2:12], end, query[end - 4 :], wire[end:], labels
    view.ready.by_bytes[key] = kept


def _keep(view: View, key: bytes, compiled: _Compiled) -> None:
    ready = view.ready
    if len(ready.by_question) >= COMPILED_LIMIT:
        ready.clear()
    ready.by_question[key] = compiled
    for name in compiled.names:
        ready.by_name.setdefault(name, set()).add(key)


def _split(query: bytes) -> tuple[bytes, bytes, int] | None:
    """Question, our OPT record or nothing, and the client's size, of a query that has nothing else in it."""
    counts = query[4:12]
    if len(query) < 17 or query[2] & 0xFE:
        return None
    if counts == _ONE_QUESTION:
        return query[12:], b"", message.UDP_MINIMUM
    if counts == _AND_ONE_OPT and query[-11:-8] == b"\x00\x00\x29" and query[-5] == 0 and query[-2:] == b"\x00\x00":
        return query[12:-11], _opt(bool(query[-4] & 0x80)), (query[-8] << 8) | query[-7]
    return None


def _ready(view: View, query: bytes, transport: Transport) -> Answer | None:
    """The kept answer, found by the question's bytes alone. A key is there only if it parsed well before."""
    split = _split(query)
    if split is None:
        return None
    question, opt, size = split
    compiled = cast(_Compiled | None, view.ready.by_question.get(question[:-4].lower() + question[-4:]))
    if compiled is None:
        return None
    number, flags = struct.unpack_from("!HH", query)
    return _finish(compiled, number, flags, question, opt, _limit(size, transport))


def _opt(dnssec: bool) -> bytes:
    """Our OPT record; DO comes back as it was sent (RFC 3225 section 3)."""
    return _SECURE_OPT if dnssec else OPT


def _limit(size: int, transport: Transport) -> int:
    if transport is Transport.TCP:
        return 0xFFFF
    return min(max(size, message.UDP_MINIMUM), message.UDP_MAXIMUM)


def _finish(compiled: _Compiled, number: int, flags: int, question: bytes, opt: bytes, limit: int) -> Answer:
    """The client's id, flags and spelling of the name around the compiled sections."""
    reply = message.reply_flags(flags, compiled.rcode, authoritative=True)
    wire = message.compose_within(limit, number, reply, question, compiled.counts, compiled.sections, opt)
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


def deny(query: Query) -> Answer:
    """NXDOMAIN: a name that this network may not know."""
    return _bare(query, Rcode.NXDOMAIN, Outcome.REFUSED)


def follow(query: Query, alias: Alias, rcode: int, count: int, records: bytes, limit: int) -> bytes:
    """The answer to ``query``: aliases of the view, then ``count`` records of the world in uncompressed form."""
    opt = _opt(query.dnssec) if query.edns else b""
    flags = message.reply_flags(query.flags, rcode, authoritative=True)
    counts = alias.count + count, 0, 0
    return message.compose_within(limit, query.id, flags, query.question, counts, alias.records + records, opt)


def fail(query: Query) -> bytes:
    """SERVFAIL: no upstream answered."""
    wire = _bare(query, Rcode.SERVFAIL, Outcome.LOCAL).wire
    return wire if wire is not None else b""


def _resolve(view: View, query: Query) -> _Compiled | Alias | None:
    """The answer from this view, with the names it was made of when it may be kept; None: it is to be forwarded."""
    name = query.name
    node = view.nodes.get(name)
    zone = view.zone_of(name)
    if (zone is None or zone.forwarded) and (node is None or not node.sets):
        # A name that is there only because a record of ours is below it (``arpa``) is not ours to deny.
        return None
    if node is None:
        return _negative(view, name, Rcode.NXDOMAIN, query.type)
    if query.type == Type.SOA and zone is not None and zone.apex == name:
        return _Compiled(Rcode.NOERROR, query.type, (1, 0, 0), view.start_of_authority(zone))
    answers: list[bytes] = []
    used: dict[bytes, None] = {}
    owner, target = message.OWNER, name
    chosen: tuple[Record, ...] = ()
    while True:
        used[target] = None
        chosen = _choose(node, query.type)
        alias = node.sets.get(Type.CNAME, ())
        if chosen or not alias or len(used) > _ALIAS_LIMIT:
            break
        answers.append(message.record(owner, Type.CNAME, alias[0].ttl, alias[0].data))
        owner = target = alias[0].data
        if target in used:
            break
        next_node = view.nodes.get(target)
        zone = view.zone_of(target)
        if (zone is None or zone.forwarded) and (next_node is None or not next_node.sets):
            question = replace(query, question=target + query.question[-4:])
            return Alias(len(answers), b"".join(answers), question)
        if next_node is None:
            # The code is that of the last name (RFC 6604 section 2).
            return _after(answers, _negative(view, target, Rcode.NXDOMAIN, query.type))
        node = next_node
    answers += [message.record(owner, item.type, item.ttl, item.data) for item in chosen]
    if not chosen:
        denied = _after(answers, _negative(view, target, Rcode.NOERROR, query.type))
        denied.names = tuple(used)
        return denied
    additional = _additional(view, chosen, used)
    counts = len(answers), 0, len(additional)
    return _Compiled(Rcode.NOERROR, query.type, counts, b"".join([*answers, *additional]), tuple(used))


def _after(aliases: list[bytes], negative: _Compiled) -> _Compiled:
    """Aliases, and the denial of what they lead to."""
    negative.counts = len(aliases), *negative.counts[1:]
    negative.sections = b"".join([*aliases, negative.sections])
    return negative


def _choose(node: Node, kind: int) -> tuple[Record, ...]:
    """Records of the type; of ANY one set only (RFC 8482 section 4.1)."""
    if kind == Type.ANY:
        return next(iter(node.sets.values()), ())
    return node.sets.get(kind, ())


def _additional(view: View, chosen: tuple[Record, ...], used: dict[bytes, None]) -> list[bytes]:
    """Addresses of the hosts that SRV and NS records name; these names are added to ``used``."""
    found: dict[bytes, None] = {}
    for item in chosen:
        if item.type not in (Type.SRV, Type.NS):
            continue
        target = item.data[6:] if item.type == Type.SRV else item.data
        used[target] = None
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
