"""Our own C programs (the traffic probe, the benchmarks' meter), each one static binary, compiled once per version."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmnet.lab.guest import packages

SOURCE: Final = Path(__file__).with_name("probe.c")
_LIBRARIES: Final = ("-lresolv",)
_FLAGS: Final = ("-static", "-Os", "-s", "-Wall", "-Wextra")


def probe_binary() -> Path:
    """Path of the probe, compiled now if the cache lacks it. Raises LabError."""
    return binary(SOURCE, _LIBRARIES)


def binary(source: Path, libraries: Sequence[str] = ()) -> Path:
    """Path of the program made of one C file, compiled now if the cache lacks it. Raises LabError."""
    cache = packages.cache_directory()
    path = _cached(cache, source, libraries)
    if path.exists():
        return path
    with packages.locked(cache):
        return compiled(cache, source, libraries)


def compiled(cache: Path, source: Path = SOURCE, libraries: Sequence[str] = _LIBRARIES) -> Path:
    """Like ``binary``, with the cache locked already."""
    path = _cached(cache, source, libraries)
    if not path.exists():
        temporary = path.with_name(f".{path.name}")
        packages.run(["gcc", *_FLAGS, "-o", str(temporary), str(source), *libraries])
        temporary.rename(path)
    return path


def _cached(cache: Path, source: Path, libraries: Sequence[str]) -> Path:
    recipe = " ".join((*_FLAGS, *libraries)).encode()
    digest = hashlib.sha256(source.read_bytes() + recipe).hexdigest()[:16]
    return cache / f"{source.stem}-{digest}"
