"""Lists of domain names as DHCP and router advertisements carry them (RFC 1035 section 3.1 labels)."""

from collections.abc import Iterable
from typing import Final

from vmnet.wire.malformed import Malformed

MAX_LABEL: Final = 63  # RFC 1035 section 2.3.4
MAX_NAME: Final = 255  # RFC 1035 section 2.3.4
POINTER: Final = 0xC0  # RFC 1035 section 4.1.4
MAX_POINTER: Final = 0x3FFF


def encode_name(name: str) -> bytes:
    """One name, uncompressed, with its root label. Raises ValueError for a name that DNS cannot carry."""
    encoded = b"".join(bytes([len(label)]) + label for label in _labels(name)) + b"\0"
    if len(encoded) > MAX_NAME:
        raise ValueError(f"{name!r} is longer than {MAX_NAME} octets")
    return encoded


def encode_names(names: Iterable[str]) -> bytes:
    """Names one after the other, uncompressed (RFC 8415 section 10, RFC 8106 section 5.2). Raises ValueError."""
    return b"".join(encode_name(name) for name in names)


def encode_compressed(names: Iterable[str]) -> bytes:
    """Names with compression pointers into the list itself (RFC 3397 section 2). Raises ValueError."""
    out = bytearray()
    seen: dict[tuple[bytes, ...], int] = {}
    for name in names:
        encode_name(name)  # checks the length
        labels = tuple(_labels(name))
        for index, label in enumerate(labels):
            suffix = labels[index:]
            if suffix in seen:
                out += (POINTER << 8 | seen[suffix]).to_bytes(2, "big")
                break
            if len(out) <= MAX_POINTER:
                seen[suffix] = len(out)
            out += bytes([len(label)]) + label
        else:
            out += b"\0"
    return bytes(out)


def decode_names(data: bytes, *, compressed: bool = False, padded: bool = False) -> tuple[str, ...]:
    """The names of a list.

    ``compressed``: pointers are allowed, backwards only. ``padded``: empty names at the end are padding (RFC 8106
    section 5.2).
    """
    names: list[str] = []
    offset = 0
    while offset < len(data):
        if padded and data[offset] == 0:
            if any(data[offset:]):
                raise Malformed("domain list goes on after its padding")
            break
        name, offset = _decode_name(data, offset, compressed)
        names.append(name)
    return tuple(names)


def _decode_name(data: bytes, start: int, compressed: bool) -> tuple[str, int]:
    """One name and the offset behind it."""
    labels: list[str] = []
    length = 1
    offset = start
    end: int | None = None
    limit = start  # pointers must go further back each time, which also ends every loop
    while True:
        if offset >= len(data):
            raise Malformed("domain name ends early")
        size = data[offset]
        if size == 0:
            return ".".join(labels), offset + 1 if end is None else end
        if size & POINTER == POINTER and compressed:
            if offset + 2 > len(data):
                raise Malformed("compression pointer ends early")
            target = int.from_bytes(data[offset : offset + 2], "big") & MAX_POINTER
            if target >= limit:
                raise Malformed("compression pointer does not go back")
            end = offset + 2 if end is None else end
            offset = limit = target
            continue
        if size > MAX_LABEL:
            raise Malformed("domain label longer than 63 octets")
        label = data[offset + 1 : offset + 1 + size]
        length += size + 1
        if len(label) != size or length > MAX_NAME:
            raise Malformed("domain name ends early or is too long")
        if not label.isascii() or not label.decode("ascii").isprintable() or b"." in label:
            raise Malformed("domain label is not a host name's")
        labels.append(label.decode("ascii"))
        offset += size + 1


def _labels(name: str) -> list[bytes]:
    """Labels of a name; one trailing dot is allowed. Raises ValueError."""
    try:
        labels = name.removesuffix(".").encode("ascii").split(b".")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!r} is not ASCII") from error
    if not all(1 <= len(label) <= MAX_LABEL for label in labels):
        raise ValueError(f"{name!r} has an empty label or one of more than {MAX_LABEL} octets")
    return labels
