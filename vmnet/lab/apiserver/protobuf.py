"""Protobuf request bodies of typed clients, decoded to JSON objects.

The body is ``k8s\\0`` and a ``runtime.Unknown``; the field numbers of the built-in kinds are in
``data/protobuf.json.gz``. Answers are JSON: such clients accept it.
"""

import base64
import functools
import gzip
import importlib.resources
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

MAGIC: Final = b"k8s\0"
_VARINT: Final = 0
_FIXED64: Final = 1
_LENGTH: Final = 2
_FIXED32: Final = 5

Message = dict[str, list[Any]]


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    content = importlib.resources.files("vmnet.lab.apiserver").joinpath("data/protobuf.json.gz").read_bytes()
    found: dict[str, dict[str, Any]] = json.loads(gzip.decompress(content))
    return found


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(content) or shift > 63:
            raise ValueError("truncated or overlong number")
        byte = content[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value & (2**64 - 1), position
        shift += 7


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values: integers as they are on the wire, everything else as bytes. Raises ValueError."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(content, position)
            yield number, value
            continue
        if wire == _LENGTH:
            size, position = _varint(content, position)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} of field {number}")
        if position + size > len(content):
            raise ValueError(f"field {number} is cut short")
        yield number, content[position : position + size]
        position += size


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a string or message belongs")
    return value


def _signed(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("a string or message where a number belongs")
    return value - 2**64 if value >= 2**63 else value


def _time(content: bytes, *, micro: bool) -> str | None:
    parts = {number: _signed(value) for number, value in _fields(content)}
    if not parts:
        return None
    moment = datetime.fromtimestamp(0, UTC) + timedelta(seconds=parts.get(1, 0), microseconds=parts.get(2, 0) // 1000)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ" if micro else "%Y-%m-%dT%H:%M:%SZ")


def _duration(content: bytes) -> str:
    nanoseconds = next((_signed(value) for number, value in _fields(content) if number == 1), 0)
    return f"{nanoseconds / 1e9:g}s"


def _int_or_string(content: bytes) -> int | str:
    parts = dict(_fields(content))
    return _bytes(parts.get(3, b"")).decode() if parts.get(1) else _signed(parts.get(2, 0))


def _raw(content: bytes) -> Any:
    raw = next((_bytes(value) for number, value in _fields(content) if number == 1), b"")
    return json.loads(raw) if raw else None


def _value(kind: str, value: int | bytes) -> Any:
    match kind:
        case "i":
            return _signed(value)
        case "b":
            return bool(value)
        case "s":
            return _bytes(value).decode()
        case "y":
            return base64.b64encode(_bytes(value)).decode()
        case "T" | "M":
            return _time(_bytes(value), micro=kind == "M")
        case "D":
            return _duration(_bytes(value))
        case "I":
            return _int_or_string(_bytes(value))
        case "Q":
            return next((_bytes(part).decode() for number, part in _fields(_bytes(value)) if number == 1), "0")
        case "R" | "F":
            return _raw(_bytes(value))
    if kind.startswith("*["):
        return [_value(kind[2:], part) for number, part in _fields(_bytes(value)) if number == 1]
    return _message(kind, _bytes(value))


def _entry(kind: str, content: bytes) -> tuple[str, Any]:
    parts = dict(_fields(content))
    empty: int | bytes = 0 if kind in ("i", "b") else b""
    return _bytes(parts.get(1, b"")).decode(), _value(kind, parts.get(2, empty))


def _message(name: str, content: bytes) -> dict[str, Any]:
    table: Message = _tables()["messages"][name]
    found: dict[str, Any] = {}
    for number, value in _fields(content):
        known = table.get(str(number))
        if known is None:
            continue  # a field that is newer than the table
        field, kind, *keeps_zero = known
        if kind.startswith("["):
            inner = kind[1:]
            packed = inner == "i" and isinstance(value, bytes)
            items = _packed(_bytes(value)) if packed else [_value(inner, value)]
            found.setdefault(field, []).extend(items)
        elif kind.startswith("{"):
            key, item = _entry(kind[1:], _bytes(value))
            found.setdefault(field, {})[key] = item
        elif not field:
            found.update(_value(kind, value))
        else:
            item = _value(kind, value)
            if item is not None and (keeps_zero or item not in ("", 0, False)):
                found[field] = item
    return found


def _packed(content: bytes) -> list[int]:
    found, position = [], 0
    while position < len(content):
        value, position = _varint(content, position)
        found.append(_signed(value))
    return found


def decode(content: bytes) -> dict[str, Any]:
    """A body as a JSON object, without zero values that its kind omits. Raises ValueError, KeyError (unknown kind)."""
    if not content.startswith(MAGIC):
        raise ValueError("the body does not begin with the protobuf prefix")
    envelope = dict(_fields(content[len(MAGIC) :]))
    identity = dict(_fields(_bytes(envelope.get(1, b""))))
    version, kind = (_bytes(identity.get(number, b"")).decode() for number in (1, 2))
    if envelope.get(3):
        raise ValueError("the content is compressed")
    kinds = _tables()["kinds"]
    message = kinds.get(f"{version}/{kind}") or kinds.get(f"v1/{kind}" if kind.endswith("Options") else "")
    if message is None:
        raise KeyError(f"{version}, Kind={kind}")
    return {"apiVersion": version, "kind": kind, **_message(message, _bytes(envelope.get(2, b"")))}
