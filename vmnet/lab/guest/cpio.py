"""The kernel's initramfs format: cpio "newc" (Documentation/driver-api/early-userspace/buffer-format.rst)."""

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

TRAILER: Final = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, directory, symbolic link or device of the archive. ``path`` has no leading slash."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)

    @classmethod
    def directory(cls, path: str) -> "Entry":
        """A directory with mode 0755."""
        return cls(path, stat.S_IFDIR | 0o755)

    @classmethod
    def file(cls, path: str, data: bytes, permissions: int = 0o644) -> "Entry":
        """A regular file."""
        return cls(path, stat.S_IFREG | permissions, data)

    @classmethod
    def link(cls, path: str, target: str) -> "Entry":
        """A symbolic link."""
        return cls(path, stat.S_IFLNK | 0o777, target.encode())

    @classmethod
    def character_device(cls, path: str, major: int, minor: int) -> "Entry":
        """A character device, for root alone."""
        return cls(path, stat.S_IFCHR | 0o600, device=(major, minor))


def _padding(length: int) -> bytes:
    return bytes(-length % 4)


def _record(number: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    fields = (
        number,
        entry.mode,
        0,  # owner: root
        0,
        2 if stat.S_ISDIR(entry.mode) else 1,
        0,  # time: none, so that equal content gives equal archives
        len(entry.data),
        0,
        0,
        *entry.device,
        len(name),
        0,
    )
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + name
    return head + _padding(len(head)) + entry.data + _padding(len(entry.data))


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive; parent directories that are not among the entries are added. Equal entries give equal bytes."""
    wanted: dict[str, Entry] = {}
    for entry in entries:
        parts = entry.path.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            wanted.setdefault(parent, Entry.directory(parent))
        wanted[entry.path] = entry
    # Sorted, a directory comes before what is in it.
    records = [_record(number, wanted[path]) for number, path in enumerate(sorted(wanted), start=1)]
    records.append(_record(0, Entry(TRAILER, 0)))
    body = b"".join(records)
    return body + bytes(-len(body) % 512)
