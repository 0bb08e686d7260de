"""What two agents say to each other while a machine goes from one's node to the other's: one JSON value a line.

The target asks (``Ask``); the source tells of the machine's connections as they come and change (``Told``), and says at
each look that it still does (``Told`` of nothing). When the guest runs on the target, that says so (``Arrived``); the
source tells what is left and gives up what only one node may have (``Done``). Either may close at any time.

On a connection of its own the target asks some times when the guest's last frame left the source (``When``); each
answer (``Left``) has the source's clock beside it. An agent that does not know the question closes.
"""

import ipaddress
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from vmnet.model.connection import TCP, Connection, Flow, TcpState
from vmnet.model.endpoint import MachineReference

LINE_LIMIT: Final = 1 << 17
"""Octets of a line at most."""
_BATCH: Final = 256
_NAME_LIMIT: Final = 512
_FIELDS: Final = 18


@dataclass(frozen=True, slots=True)
class Ask:
    """A machine is coming to the asking node; ``network``: the network whose connections are meant."""

    machine: MachineReference
    network: str


@dataclass(frozen=True, slots=True)
class Told:
    """Connections that are new, or not as they were told before."""

    connections: tuple[Connection, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrived:
    """The guest runs on the target."""


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing is left: ``handed_over`` connections to Services are the target's to translate now."""

    handed_over: int = 0


@dataclass(frozen=True, slots=True)
class When:
    """The machine has come to the asking node: when did it speak last at the other one?"""

    machine: MachineReference
    network: str


@dataclass(frozen=True, slots=True)
class Left:
    """``last``: when, None where nobody knows; ``now``: when this was said. Seconds since the epoch, by the source."""

    last: float | None
    now: float


Message = Ask | Told | Arrived | Done | When | Left


def encode(message: Message) -> Iterator[bytes]:
    """Lines, each with its end."""
    match message:
        case Ask(machine, network):
            yield _line({"ask": [machine.namespace, machine.name, network]})
        case Told(connections):
            for start in range(0, max(1, len(connections)), _BATCH):
                yield _line({"told": [_row(item) for item in connections[start : start + _BATCH]]})
        case Arrived():
            yield _line({"arrived": True})
        case Done(count):
            yield _line({"done": count})
        case When(machine, network):
            yield _line({"when": [machine.namespace, machine.name, network]})
        case Left(last, now):
            yield _line({"left": [last, now]})


def decode(line: bytes) -> Message:
    """One line. Raises ValueError for whatever ``encode`` does not write."""
    if len(line) > LINE_LIMIT:
        raise ValueError(f"a line of {len(line)} octets")
    try:
        found = json.loads(line)
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(found, dict) or len(found) != 1:
        raise ValueError("not a message")
    ((kind, body),) = found.items()
    if kind == "ask" and isinstance(body, list) and len(body) == 3 and all(_is_name(item) for item in body):
        return Ask(MachineReference(body[0], body[1]), body[2])
    if kind == "told" and isinstance(body, list) and len(body) <= _BATCH:
        return Told(tuple(_connection(row) for row in body))
    if kind == "arrived" and body is True:
        return Arrived()
    if kind == "done" and _is_number(body, 32):
        return Done(body)
    if kind == "when" and isinstance(body, list) and len(body) == 3 and all(_is_name(item) for item in body):
        return When(MachineReference(body[0], body[1]), body[2])
    if kind == "left" and isinstance(body, list) and len(body) == 2:
        last, now = body
        if (last is None or _is_time(last)) and _is_time(now):
            return Left(last, now)
    raise ValueError(f"not a message: {kind[:20]!r}")


def _line(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def _row(item: Connection) -> list[Any]:
    tcp = item.tcp or TcpState(0)
    row: list[Any] = [item.original.protocol]
    for flow in (item.original, item.reply):
        row += [str(flow.source), flow.source_port, str(flow.destination), flow.destination_port]
    return [*row, item.status, item.timeout, item.mark, tcp.state, *tcp.scales, *tcp.flags, item.labels.hex()]


def _connection(row: Any) -> Connection:
    if not isinstance(row, list) or len(row) != _FIELDS:
        raise ValueError("not a connection")
    protocol, *ends = row[:9]
    numbers, labels = row[9:17], row[17]
    if not _is_number(protocol, 8) or not isinstance(labels, str) or len(labels) > 32:
        raise ValueError("not a connection")
    widths = (32, 31, 32, 8, 8, 8, 8, 8)
    if not all(_is_number(number, width) for number, width in zip(numbers, widths, strict=True)):
        raise ValueError("not a connection's numbers")
    status, timeout, mark, state, *rest = numbers
    tcp = TcpState(state, (rest[0], rest[1]), (rest[2], rest[3])) if protocol == TCP else None
    return Connection(
        _flow(protocol, ends[:4]),
        _flow(protocol, ends[4:]),
        status,
        timeout,
        mark,
        tcp,
        labels=bytes.fromhex(labels),
    )


def _flow(protocol: int, parts: Iterable[Any]) -> Flow:
    source, source_port, destination, destination_port = parts
    if not (isinstance(source, str) and isinstance(destination, str)):
        raise ValueError("not an address")
    if not (_is_number(source_port, 16) and _is_number(destination_port, 16)):
        raise ValueError("not a port")
    first, last = ipaddress.ip_address(source), ipaddress.ip_address(destination)
    if first.version != last.version or "%" in source + destination:
        raise ValueError("not one family's addresses")
    return Flow(protocol, first, source_port, last, destination_port)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _NAME_LIMIT


def _is_time(value: Any) -> bool:
    return type(value) is float and 0 < value < 1 << 40


def _is_number(value: Any, bits: int) -> bool:
    return type(value) is int and 0 <= value < 1 << bits
