"""``make fuzz-dns``: damaged and made-up messages against everything of the responder that reads bytes.

Whatever comes in, nothing may be raised but ``Malformed`` where that is promised; what is sent has the query's id, is
an answer, and is no longer than it may be. Inputs follow from the seed alone, so that a failure can be had again.
"""

import argparse
import json
import multiprocessing
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final

from vmnet_dns import message
from vmnet_dns.answer import Answer, Outcome, Transport, answer, keep_bytes, refuse_stranger
from vmnet_dns.forward import decode_response
from vmnet_dns.message import Malformed, Query, encode_name
from vmnet_dns.zone import View, address_records, alias_record, pointer_records, service_record, text_record

BLUE: Final = "blue.red.vm.cluster.local"
SUBNET: Final = ip_network("10.0.0.0/8")
_TYPES: Final = (1, 2, 5, 6, 12, 16, 28, 33, 41, 65, 97, 250, 251, 252, 255, 0, 65535)
_NAMES: Final = (
    BLUE, "web.red.svc.cluster.local", "_http._tcp.web.red.svc.cluster.local", "out.red.svc.cluster.local",
    "alias.red.svc.cluster.local", "5.0.0.10.in-addr.arpa", "nobody.cluster.local", "cluster.local", "example.org", ".",
    "many.red.svc.cluster.local", "svc.cluster.local",
)  # fmt: skip


def view() -> View:
    """A network with a name of every kind."""
    return View.make(
        "fuzz",
        subnets=[SUBNET],
        servers=[ip_address("10.0.0.1")],
        forwarded=["kubernetes.default.svc.cluster.local"],
        records=[
            *address_records(BLUE, [ip_address("10.0.0.5"), ip_address("fd00::5")]),
            *pointer_records(BLUE, [ip_address("10.0.0.5")]),
            *address_records("web.red.svc.cluster.local", [ip_address("10.96.0.5")]),
            *address_records("many.red.svc.cluster.local", [ip_address(f"10.1.0.{last}") for last in range(200)]),
            service_record("_http._tcp.web.red.svc.cluster.local", 80, "web.red.svc.cluster.local"),
            alias_record("alias.red.svc.cluster.local", "web.red.svc.cluster.local"),
            alias_record("out.red.svc.cluster.local", "example.org"),
            text_record("dns-version.cluster.local", "1.1.0"),
        ],
    )


def queries(rng: random.Random) -> list[bytes]:
    """Well-formed ones, to be damaged."""
    found = []
    for name in _NAMES:
        for kind in _TYPES:
            opt = b""
            if rng.random() < 0.7:
                data = bytes(rng.randrange(256) for _ in range(rng.choice((0, 0, 8, 12))))
                size, extended = rng.choice((0, 512, 1232, 4096)), rng.choice((0, 0x8000, 0x10000))
                opt = b"\x00" + struct.pack("!HHIH", 41, size, extended, len(data)) + data
            question = encode_name(name) + struct.pack("!HH", kind, rng.choice((1, 1, 1, 3, 255)))
            found.append(message.compose(rng.randrange(65536), rng.choice((0, 0x100, 0x110)), question, opt=opt))
    return found


def responses(rng: random.Random) -> list[bytes]:
    """Answers to the question of ``asked``, some with compressed names, to be damaged."""
    question = asked().question
    pointed = b"\xc0\x0c"
    rows = [
        message.record(pointed, 1, 60, b"\xc0\x00\x02\x01"),
        message.record(pointed, 5, 60, b"\x03www\xc0\x0c"),
        message.record(pointed, 33, 60, b"\x00\x01\x00\x02\x00\x50\x03www\xc0\x0c"),
        message.record(pointed, 15, 60, b"\x00\x0a\x04mail\xc0\x0c"),
        message.record(pointed, 6, 60, b"\x02ns\xc0\x0c\x01x\xc0\x0c" + bytes(20)),
        message.record(b"\x00", 41, 0x8000, b""),
    ]
    found = []
    for _ in range(50):
        chosen = [rng.choice(rows) for _ in range(rng.randrange(6))]
        counts = rng.randrange(len(chosen) + 1), 0, 0
        counts = counts[0], rng.randrange(len(chosen) - counts[0] + 1), 0
        counts = counts[0], counts[1], len(chosen) - counts[0] - counts[1]
        head = message.HEADER.pack(1, rng.choice((0x8180, 0x8183, 0x8380)), 1, *counts)
        found.append(head + question + b"".join(chosen))
    return found


def asked() -> Query:
    """What the world was asked."""
    return message.parse_query(message.compose(1, 0x100, encode_name("example.org") + b"\x00\x01\x00\x01"))


def damaged(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """One of them, or two put together, with octets changed, left out, put in or cut off; rarely mere noise."""
    if rng.random() < 0.01:
        return rng.randbytes(rng.randrange(600))
    wire = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        action, at = rng.randrange(6), rng.randrange(len(wire) + 1)
        if action == 0:
            wire[at : at + 1] = bytes((rng.randrange(256),))
        elif action == 1:
            del wire[at : at + rng.randrange(1, 9)]
        elif action == 2:
            wire[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif action == 3:
            # Where lengths and pointers are, extremes do the most.
            wire[at : at + 1] = bytes((rng.choice((0, 1, 63, 64, 127, 128, 191, 192, 255)),))
        elif action == 4:
            del wire[at:]
        else:
            other = rng.choice(seeds)
            wire[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(wire)


def try_query(of: View, wire: bytes, transport: Transport) -> str:
    """Answer it; returns what became of it. Raises AssertionError, or whatever should not have been raised."""
    found = answer(of, wire, transport=transport)
    check(wire, found, transport)
    if transport is Transport.UDP:
        keep_bytes(of, wire, found)
        kept = of.ready.by_bytes.get(wire[2:].lower())
        if kept is not None and wire.endswith(kept[2]):
            # What the bytes alone lead to is what reading them leads to.
            if wire[:2] + kept[0] + wire[12 : kept[1]] + kept[3] != found.wire:
                raise AssertionError("kept for other bytes")
            return "kept"
    check(wire, refuse_stranger(wire), transport)
    return str(found.outcome)


def check(wire: bytes, found: Answer, transport: Transport) -> None:
    """An answer is one: its id, its QR bit, its size, and records that can be read. Raises AssertionError."""
    if found.wire is None:
        return
    told = found.wire
    limit = 0xFFFF if transport is Transport.TCP else message.UDP_MAXIMUM
    if told[:2] != wire[:2] or not told[2] & 0x80 or len(told) > limit or wire[2] & 0x80:
        raise AssertionError("no answer to this query")
    _, _, questions, *counts = message.HEADER.unpack_from(told)
    at = message.HEADER.size
    for _ in range(questions):
        at = message.skip_name(told, at) + 4
    for _ in range(sum(counts)):
        at = message.expand_name(told, at)[1]
        at += message.RECORD.size + message.RECORD.unpack_from(told, at)[3]
    if at != len(told):
        raise AssertionError("octets that are no record")
    if found.outcome is Outcome.MALFORMED and len(told) > message.HEADER.size + 300:
        raise AssertionError("much ado about noise")


def try_response(query: Query, wire: bytes) -> str:
    """Read it as an upstream's answer."""
    try:
        found = decode_response(wire, query, 1)
        if found is None:
            return "truncated"
        if len(found.render(query, 512)) > 512:
            raise AssertionError("longer than asked for")
        found.names(query)
        found.flat(query)
    except Malformed:
        return "refused"
    return "taken"


def run(inputs: int, seed: int, tell: Callable[[int], None] = lambda done: None) -> Counter[str]:
    """``inputs`` messages; how many of them came to what. Raises AssertionError naming seed and octets."""
    rng = random.Random(seed)  # noqa: S311 - to be had again, not to be secret
    of, query, asks, answers = view(), asked(), queries(rng), responses(rng)
    counts: Counter[str] = Counter()
    for number in range(inputs):
        of_world = number % 4 == 3
        wire = damaged(answers if of_world else asks, rng)
        try:
            if of_world:
                counts[f"response {try_response(query, wire)}"] += 1
            else:
                transport = Transport.TCP if number % 4 == 2 else Transport.UDP
                counts[f"query {try_query(of, wire, transport)}"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, input {number}, {wire.hex()}: {error!r}") from error
        if number % 10_000 == 9_999:
            tell(number + 1)
    return counts


def _part(job: tuple[int, int]) -> Counter[str]:
    return run(*job)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="fuzz-dns", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000_000, help="%(default)s")
    parser.add_argument("--seed", type=int, default=1, help="%(default)s")
    parser.add_argument("--processes", type=int, default=2, help="%(default)s")
    parser.add_argument("--report", type=Path, default=Path("build/bench/dns_fuzz.json"), help="%(default)s")
    arguments = parser.parse_args()
    parts = 100
    began, counts = time.monotonic(), Counter[str]()
    jobs = [(arguments.inputs // parts, arguments.seed * 1000 + part) for part in range(parts)]
    with multiprocessing.Pool(arguments.processes) as pool:
        for done, found in enumerate(pool.imap_unordered(_part, jobs), 1):
            counts += found
            print(f"\r==> {done} % ", end="", file=sys.stderr, flush=True)
    report: dict[str, Any] = {
        "inputs": counts.total(),
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - began),
        "became": dict(counts),
    }
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
