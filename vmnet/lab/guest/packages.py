"""Files out of Debian packages that are never installed: ``apt-get download`` and ``dpkg -x`` into a cache."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vmnet.lab.errors import LabError

CACHE_VARIABLE: Final = "VMNET_LAB_CACHE"
DEFAULT_CACHE: Final = Path("/var/cache/vmnet-lab")
_DOWNLOAD_TIMEOUT: Final = 300
_NEXT_STEP: Final = "check the machine's package sources: apt-get update; apt-get download linux-image-cloud-amd64"


def cache_directory() -> Path:
    """``$VMNET_LAB_CACHE/guest``, by default ``/var/cache/vmnet-lab/guest``."""
    return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE) / "guest"


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Only one process at a time fills the cache; the others wait for what it makes."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(argv: list[str], directory: Path | None = None) -> str:
    """Standard output of a program. Raises LabError with its last words."""
    try:
        done = subprocess.run(
            argv,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_TIMEOUT,
            check=False,
            env={**os.environ, "LC_ALL": "C", "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{argv[0]}: {error}") from None
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise LabError(f"{' '.join(argv[:3])} failed: {words[-1]}", _NEXT_STEP)
    return done.stdout


def kernel_package() -> str:
    """The concrete package behind ``linux-image-cloud-amd64``. Raises LabError."""
    for line in run(["apt-cache", "depends", "linux-image-cloud-amd64"]).splitlines():
        kind, _, name = line.strip().partition(": ")
        if kind == "Depends" and name.startswith("linux-image-") and name.endswith("-cloud-amd64"):
            return name
    raise LabError("the package sources have no linux-image-cloud-amd64", _NEXT_STEP)


def extracted(package: str, cache: Path) -> Path:
    """Directory with the package's files; downloaded once. Called with the cache locked. Raises LabError."""
    found = sorted((cache / "packages").glob(f"{package}_*"))
    if found:
        return found[-1]
    (cache / "packages").mkdir(parents=True, exist_ok=True)
    # apt gives its rights away for a download, so the directory must be open to its user.
    with tempfile.TemporaryDirectory(prefix="vmnet-lab-") as text:
        work = Path(text)
        work.chmod(0o777)
        try:
            run(["apt-get", "download", package], work)
        except LabError:
            run(["apt-get", "update"])
            run(["apt-get", "download", package], work)
        archive = next(work.glob("*.deb"))
        target = cache / "packages" / archive.stem
        temporary = target.with_name(f".{target.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        run(["dpkg", "-x", str(archive), str(temporary)])
        temporary.rename(target)
    return target
