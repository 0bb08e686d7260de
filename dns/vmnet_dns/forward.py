"""Asking the rest of the world: upstream servers over UDP, TCP when an answer is truncated, and a bounded cache.

Every UDP question goes out from a socket of its own (a random port) with a random id, and the socket is connected, so
that only the upstream's own datagrams arrive. Equal questions that are under way are asked once.
"""

import asyncio
import secrets
import socket
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from vmnet_dns import message
from vmnet_dns.message import OPT, Malformed, Query, Rcode, Type

TRY_SECONDS: Final = 1.2
"""One upstream, one try. Stub resolvers give up after 5 s: two upstreams get two tries within that."""
TOTAL_SECONDS: Final = 4.5
CACHE_ENTRIES: Final = 4096
CACHE_OCTETS: Final = 4 * 1024 * 1024
POSITIVE_MOST: Final = 300
"""Seconds. An answer is kept for its TTL, but no longer than this."""
NEGATIVE_MOST: Final = 30
STALE_MOST: Final = 86400
"""Seconds past its time for which an answer is kept, for when no upstream answers (RFC 8767 section 5)."""
STALE_TTL: Final = 30
"""What such an answer says, and how long it is given before the upstreams are asked again."""
STALE_SECONDS: Final = 1.8
"""So long the upstreams are waited for when there is such an answer (RFC 8767 section 5, client response timer)."""
UNDER_WAY: Final = 256
"""Questions under way at once for one network; more are answered SERVFAIL."""

OpenSocket = Callable[[int, bool], Awaitable[socket.socket]]
"""Make a non-blocking, unconnected socket: address family, and True for TCP."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """One recursive server."""

    address: IPv4Address | IPv6Address
    port: int = 53

    @property
    def family(self) -> int:
        """Address family for its socket."""
        return socket.AF_INET if isinstance(self.address, IPv4Address) else socket.AF_INET6

    def __str__(self) -> str:
        """``address:port``."""
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"


Routes = Mapping[bytes, Sequence[Upstream]]
"""Upstreams by domain (wire form); those of the longest one that a name is in are asked, of the root if none is."""


class Origin(StrEnum):
    """Where an answer of the world came from."""

    FORWARDED = "forwarded"
    CACHED = "cached"
    STALE = "stale"
    """Kept beyond its time, because no upstream answers."""


@dataclass(frozen=True, slots=True)
class Response:
    """What an upstream answered, without question and OPT; pointers within ``sections`` count from the header."""

    flags: int
    counts: tuple[int, int, int]
    sections: bytes
    ttls: tuple[tuple[int, int], ...]
    """Offset in ``sections`` and value of every TTL."""
    rcode: int
    keep: int
    """Seconds for which it may be kept; 0: not at all."""
    upstream: Upstream | None = None
    owners: frozenset[bytes] = frozenset()
    """Names that the records of the answer section stand at, in lower case."""

    def render(self, query: Query, limit: int, age: int = 0, *, stale: bool = False) -> bytes:
        """The answer to ``query``, ``age`` seconds after it came; truncated over ``limit`` octets."""
        sections = bytearray(self.sections)
        for offset, ttl in self.ttls:
            struct.pack_into("!I", sections, offset, STALE_TTL if stale else max(0, ttl - age))
        opt = OPT[:5] + bytes((self.rcode >> 4,)) + OPT[6:] if query.edns else b""
        if query.dnssec:
            opt = opt[:7] + struct.pack("!H", message.DO) + opt[9:]
        # Never AA: it was authoritative somewhere else. AD only with DNSSEC asked for (RFC 6840 section 5.7).
        flags = message.reply_flags(query.flags, self.rcode) | (self.flags & 0x20 if query.dnssec else 0)
        return message.compose_within(limit, query.id, flags, query.question, self.counts, bytes(sections), opt)

    def names(self, query: Query) -> list[bytes]:
        """Owners of the records of the answer section, in lower case. Raises Malformed."""
        return [owner.lower() for owner, _, _, _ in self._answers(query)]

    def flat(self, query: Query, age: int = 0, *, stale: bool = False) -> tuple[int, bytes]:
        """Aliases and records of the asked type, uncompressed; and how many. Types whose data hold other names are
        left out. Raises Malformed."""
        found = []
        for owner, kind, ttl, data in self._answers(query):
            if data is not None and kind in (Type.CNAME, query.type):
                found.append(message.record(owner, kind, STALE_TTL if stale else max(0, ttl - age), data))
        return len(found), b"".join(found)

    def _answers(self, query: Query) -> list[tuple[bytes, int, int, bytes | None]]:
        """Owner, type, TTL and data, None for data that cannot be taken out of the message."""
        wire = bytes(message.HEADER.size) + query.question + self.sections
        at = message.HEADER.size + len(query.question)
        found: list[tuple[bytes, int, int, bytes | None]] = []
        for number in range(self.counts[0]):
            owner, at = message.expand_name(wire, at)
            kind, _, _, length = message.RECORD.unpack_from(wire, at)
            at += message.RECORD.size
            data: bytes | None = wire[at : at + length]
            if kind in (Type.CNAME, Type.PTR, Type.NS):
                data, _ = message.expand_name(wire, at)
            elif kind == Type.MX and length > 2:
                data = wire[at : at + 2] + message.expand_name(wire, at + 2)[0]
            elif kind == Type.SRV and length > 6:
                data = wire[at : at + 6] + message.expand_name(wire, at + 6)[0]
            elif kind in _COMPRESSED:
                data = None
            found.append((owner, kind, self.ttls[number][1], data))
            at += length
        return found


_COMPRESSED: Final = frozenset({3, 4, 6, 7, 8, 9, 14, 17, 18, 21, 24, 26, 30, 35, 36})
"""Types whose data may hold compressed names besides those that are expanded (RFC 1035, RFC 3597 section 4)."""


@dataclass(frozen=True, slots=True)
class Found:
    """An answer of the world."""

    response: Response
    origin: Origin
    age: int = 0

    @property
    def rcode(self) -> int:
        """Its response code."""
        return self.response.rcode

    def render(self, query: Query, limit: int) -> bytes:
        """See ``Response.render``."""
        return self.response.render(query, limit, self.age, stale=self.origin is Origin.STALE)

    def flat(self, query: Query) -> tuple[int, bytes]:
        """See ``Response.flat``."""
        return self.response.flat(query, self.age, stale=self.origin is Origin.STALE)


@dataclass(slots=True)
class _Kept:
    stored: float
    response: Response
    rest_until: float = 0.0
    """Until then the upstreams are not asked again: they did not answer a moment ago."""


def encode_question(query: Query, number: int, *, edns: bool = True) -> bytes:
    """The question as we ask it: our id, recursion desired, our OPT; of the client's only DO and CD."""
    opt = b""
    if edns:
        opt = OPT[:7] + struct.pack("!H", message.DO if query.dnssec else 0) + OPT[9:]
    flags = message.RD | (query.flags & message.CD)
    return message.compose(number, flags, query.question, opt=opt)


def decode_response(wire: bytes, query: Query, number: int) -> Response | None:
    """None when it is truncated: ask over TCP. Raises Malformed for whatever is no answer to this question."""
    if len(wire) < message.HEADER.size:
        raise Malformed("shorter than a header")
    found, flags, questions, *counts = message.HEADER.unpack_from(wire)
    if found != number or not flags & message.QR or flags & message.OPCODE:
        raise Malformed("no answer to our question")
    rcode = flags & 0xF
    if questions == 0 and rcode in (Rcode.FORMERR, Rcode.NOTIMP):
        # Servers that do not know EDNS may answer with the header alone (RFC 6891 section 7).
        return Response(flags, (0, 0, 0), b"", (), rcode, 0)
    start = message.HEADER.size + len(query.question)
    question = wire[message.HEADER.size : start]
    if questions != 1 or question[:-4].lower() + question[-4:] != query.key:
        raise Malformed("another question")
    if flags & message.TC:
        return None
    at, end = start, start
    ttls: list[tuple[int, int]] = []
    kept = [0, 0, 0]
    soa: int | None = None
    for section, count in enumerate(counts):
        for _ in range(count):
            begin, at = at, message.skip_name(wire, at)
            if at + message.RECORD.size > len(wire):
                raise Malformed("a record is cut off")
            kind, _, ttl, length = message.RECORD.unpack_from(wire, at)
            after = at + message.RECORD.size + length
            if after > len(wire):
                raise Malformed("a record's data is cut off")
            if kind == Type.OPT:
                # OPT is between us and the upstream; what follows it is optional, so the message is cut before it.
                rcode |= (ttl >> 24) << 4
                return _response(wire, flags, rcode, start, begin, kept, ttls, soa)
            if ttl > 0x7FFFFFFF:
                ttl = 0  # RFC 2181 section 8
            ttls.append((at + 4 - start, ttl))
            if section == 1 and kind == Type.SOA and length >= 22:
                soa = min(ttl, struct.unpack_from("!I", wire, after - 4)[0])
            kept[section] += 1
            at = end = after
    return _response(wire, flags, rcode, start, end, kept, ttls, soa)


def _response(
    wire: bytes,
    flags: int,
    rcode: int,
    start: int,
    end: int,
    counts: list[int],
    ttls: list[tuple[int, int]],
    soa: int | None,
) -> Response:
    if counts[0] and rcode in (Rcode.NOERROR, Rcode.NXDOMAIN):
        keep = min(POSITIVE_MOST, *(ttl for _, ttl in ttls))
    elif soa is not None and rcode in (Rcode.NOERROR, Rcode.NXDOMAIN):
        keep = min(NEGATIVE_MOST, soa)
    else:
        keep = 0
    return Response(flags, (counts[0], counts[1], counts[2]), wire[start:end], tuple(ttls), rcode, keep)


class Forwarder:
    """Upstreams, cache and questions under way of one network."""

    def __init__(
        self,
        upstreams: Sequence[Upstream] | Routes,
        open_socket: OpenSocket,
        *,
        clock: Callable[[], float] | None = None,
        try_seconds: float = TRY_SECONDS,
        total_seconds: float = TOTAL_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        """``clock``: monotonic seconds; the event loop's when not given."""
        self._routes: dict[bytes, list[Upstream]] = {}
        self.route(upstreams if isinstance(upstreams, Mapping) else {_ROOT: upstreams})
        self._open = open_socket
        self._clock = clock or asyncio.get_running_loop().time
        self._try_seconds = try_seconds
        self._total_seconds = total_seconds
        self._stale_seconds = stale_seconds
        self._cache: OrderedDict[bytes, _Kept] = OrderedDict()
        self._octets = 0
        self._flights: dict[bytes, asyncio.Future[tuple[bool, Response | None]]] = {}
        """Questions under way; the result is whether the question was asked to its end, and the answer."""

    def route(self, routes: Routes) -> None:
        """Ask these upstreams from now on; what is kept stays."""
        self._routes = {domain: list(found) for domain, found in routes.items()}

    def cached(self, query: Query) -> Found | None:
        """The answer from the cache; a stale one while the upstreams have just been asked in vain."""
        key = _key(query)
        found = self._cache.get(key)
        if found is None:
            return None
        now = self._clock()
        age = int(now - found.stored)
        if age < found.response.keep:
            self._cache.move_to_end(key)
            return Found(found.response, Origin.CACHED, age)
        if age >= found.response.keep + STALE_MOST:
            self._forget(key)
            return None
        return Found(found.response, Origin.STALE) if now < found.rest_until else None

    async def ask(self, query: Query) -> Found | None:
        """An upstream's answer, or a stale one when none of them answered in time; None when there is none either."""
        key = _key(query)
        while (flight := self._flights.get(key)) is not None:
            finished, response = await asyncio.shield(flight)
            if finished:
                return self._result(key, response)
            # Whoever asked went away before the answer came: ask ourselves.
        upstreams = self.upstreams(query.name)
        if len(self._flights) >= UNDER_WAY or not upstreams:
            return self._result(key, None)
        flight = asyncio.get_running_loop().create_future()
        self._flights[key] = flight
        finished, response = False, None
        seconds = min(self._total_seconds, self._stale_seconds) if key in self._cache else self._total_seconds
        try:
            async with asyncio.timeout(seconds):
                response = await self._ask_all(upstreams, query)
            finished = True
        except TimeoutError:
            finished = True
        finally:
            del self._flights[key]
            flight.set_result((finished, response))
        if response is not None:
            self._remember(key, response)
        return self._result(key, response)

    def upstreams(self, name: bytes) -> list[Upstream]:
        """Who is asked about a name (wire form), the one that answered last time first."""
        return next((self._routes[domain] for domain in message.parents(name) if domain in self._routes), [])

    def _result(self, key: bytes, response: Response | None) -> Found | None:
        if response is not None and response.rcode in (Rcode.NOERROR, Rcode.NXDOMAIN):
            return Found(response, Origin.FORWARDED)
        kept, now = self._cache.get(key), self._clock()
        if kept is not None and now - kept.stored < kept.response.keep + STALE_MOST:
            kept.rest_until = now + STALE_TTL
            return Found(kept.response, Origin.STALE)
        return Found(response, Origin.FORWARDED) if response is not None else None

    async def _ask_all(self, upstreams: list[Upstream], query: Query) -> Response | None:
        """Two rounds over all upstreams, the one that answered last time first."""
        refused: Response | None = None
        for upstream in (*upstreams, *upstreams):
            try:
                async with asyncio.timeout(self._try_seconds):
                    response = await self._ask_one(upstream, query)
                if response is not None:
                    response = replace(response, upstream=upstream, owners=frozenset(response.names(query)))
            except (OSError, TimeoutError, asyncio.IncompleteReadError, Malformed):
                response = None
            if response is not None and response.rcode in (Rcode.NOERROR, Rcode.NXDOMAIN):
                if upstreams[0] != upstream:
                    upstreams.remove(upstream)
                    upstreams.insert(0, upstream)
                return response
            if response is not None:
                # SERVFAIL or REFUSED: another upstream may know better; if none does, this is the answer.
                if refused is not None:
                    return response
                refused = response
        return refused

    async def _ask_one(self, upstream: Upstream, query: Query) -> Response | None:
        response = await self._over_udp(upstream, query, edns=True)
        if response is not None and response.rcode in (Rcode.FORMERR, Rcode.NOTIMP, Rcode.BADVERS):
            response = await self._over_udp(upstream, query, edns=False)
        return response if response is not None else await self._over_tcp(upstream, query)

    async def _over_udp(self, upstream: Upstream, query: Query, *, edns: bool) -> Response | None:
        """None: truncated."""
        loop = asyncio.get_running_loop()
        number = secrets.randbelow(0x10000)
        with await self._open(upstream.family, False) as sock:
            await loop.sock_connect(sock, (str(upstream.address), upstream.port))
            await loop.sock_sendall(sock, encode_question(query, number, edns=edns))
            while True:
                wire = await loop.sock_recv(sock, 0xFFFF)
                try:
                    return decode_response(wire, query, number)
                except Malformed:
                    # A forgery or an answer to an older question must not end the wait for the true one.
                    continue

    async def _over_tcp(self, upstream: Upstream, query: Query) -> Response | None:
        loop = asyncio.get_running_loop()
        number = secrets.randbelow(0x10000)
        question = encode_question(query, number)
        with await self._open(upstream.family, True) as sock:
            await loop.sock_connect(sock, (str(upstream.address), upstream.port))
            await loop.sock_sendall(sock, struct.pack("!H", len(question)) + question)
            (length,) = struct.unpack("!H", await _exactly(sock, 2))
            return decode_response(await _exactly(sock, length), query, number)

    def _remember(self, key: bytes, response: Response) -> None:
        if response.keep <= 0:
            return
        self._forget(key)
        self._cache[key] = _Kept(self._clock(), response)
        self._octets += len(response.sections)
        while len(self._cache) > CACHE_ENTRIES or self._octets > CACHE_OCTETS:
            self._forget(next(iter(self._cache)))

    def _forget(self, key: bytes) -> None:
        found = self._cache.pop(key, None)
        if found is not None:
            self._octets -= len(found.response.sections)


_ROOT: Final = b"\x00"


def _key(query: Query) -> bytes:
    """Equal for queries that may share an answer."""
    return query.key + bytes((query.dnssec, bool(query.flags & message.CD)))


async def _exactly(sock: socket.socket, length: int) -> bytes:
    loop = asyncio.get_running_loop()
    found = bytearray()
    while len(found) < length:
        chunk = await loop.sock_recv(sock, length - len(found))
        if not chunk:
            raise asyncio.IncompleteReadError(bytes(found), length)
        found += chunk
    return bytes(found)
