"""Our own traffic probe, one static binary for guests, pods and hosts; compiled once for each version of its source."""

import hashlib
from pathlib import Path
from typing import Final

from vmnet.lab.guest import packages

SOURCE: Final = Path(__file__).with_name("probe.c")
_FLAGS: Final = ("-static", "-Os", "-s", "-Wall", "-Wextra")


def probe_binary() -> Path:
    """Path of the binary, compiled now if the cache lacks it. Raises LabError."""
    cache = packages.cache_directory()
    path = _cached(cache)
    if path.exists():
        return path
    with packages.locked(cache):
        return compiled(cache)


def _cached(cache: Path) -> Path:
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(_FLAGS).encode()).hexdigest()[:16]
    return cache / f"probe-{digest}"


def compiled(cache: Path) -> Path:
    """Like ``probe_binary``, with the cache locked already."""
    path = _cached(cache)
    if not path.exists():
        temporary = path.with_name(f".{path.name}")
        packages.run(["gcc", *_FLAGS, "-o", str(temporary), str(SOURCE), "-lresolv"])
        temporary.rename(path)
    return path
