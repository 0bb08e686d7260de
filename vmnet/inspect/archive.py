"""One gzipped tar with a manifest: what is in it, how each file was got, and what could not be had.

It is written beside its name and renamed at the end, so nobody finds half of one.
"""

import contextlib
import io
import json
import os
import tarfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from vmnet.inspect.errors import InspectionError

MANIFEST: Final = "MANIFEST.json"
FILE_LIMIT: Final = 4 << 20
"""Octets of one file; the end of a log is kept, the beginning of everything else."""
TOTAL_LIMIT: Final = 512 << 20
"""Octets of all files, before compression."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the manifest. ``error`` is empty for what could be had; ``path`` is empty for what is not here."""

    path: str
    how: str
    octets: int = 0
    cut: int = 0
    """Octets that were left out."""
    error: str = ""


class Archive:
    """``with Archive(path) as archive``; an exception inside leaves nothing behind."""

    def __init__(self, path: Path, *, force: bool = False, about: Mapping[str, Any] | None = None) -> None:
        """``force``: replace what is there. ``about``: more for the manifest. Raises InspectionError."""
        if path.exists() and not force:
            raise InspectionError(f"{path} exists already", "choose another name with -o, or replace it with --force")
        self.path = path
        self.entries: list[Entry] = []
        self._about = dict(about or {})
        self._total = 0
        self._root = path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
        self._aside = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> Self:
        try:
            # For its owner alone: it says much of a cluster, redacted or not.
            descriptor = os.open(self._aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            reason = f"{self.path} cannot be written: {error.strerror}"
            raise InspectionError(reason, "choose another place with -o") from error
        self._file = os.fdopen(descriptor, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w:gz")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        try:
            if error is None:
                self._write_manifest()
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
            if error is None:
                self._aside.replace(self.path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    self._aside.unlink()
        return False

    def add(self, path: str, content: str, how: str, *, end: bool = False, cut: int = 0) -> None:
        """Put a file in. ``end``: where it is too long, the end is kept. ``cut``: octets that are missing already."""
        octets = content.encode(errors="replace")
        left = min(FILE_LIMIT, TOTAL_LIMIT - self._total)
        if left <= 0:
            self.miss(how, f"left out: the archive has {TOTAL_LIMIT} octets already", path)
            return
        if len(octets) > left:
            cut += len(octets) - left
            octets = octets[-left:] if end else octets[:left]
        self._put(path, octets)
        self._total += len(octets)
        self.entries.append(Entry(path, how, len(octets), cut))

    def add_json(self, path: str, content: Any, how: str) -> None:
        """Put a JSON file in."""
        self.add(path, json.dumps(content, indent=1, default=str) + "\n", how)

    def miss(self, how: str, error: str, path: str = "") -> None:
        """Note what could not be had, and why."""
        self.entries.append(Entry(path, how, error=error))

    @property
    def missed(self) -> tuple[Entry, ...]:
        """What could not be had."""
        return tuple(entry for entry in self.entries if entry.error)

    def _write_manifest(self) -> None:
        body = {
            **self._about,
            "limits": {"octetsOfAFile": FILE_LIMIT, "octetsOfAll": TOTAL_LIMIT},
            "files": [asdict(entry) for entry in self.entries if not entry.error],
            "failed": [asdict(entry) for entry in self.missed],
        }
        self._put(MANIFEST, json.dumps(body, indent=1).encode() + b"\n")

    def _put(self, path: str, octets: bytes) -> None:
        member = tarfile.TarInfo(f"{self._root}/{path}")
        member.size, member.mode, member.mtime = len(octets), 0o600, int(time.time())
        self._tar.addfile(member, io.BytesIO(octets))
