"""The archive writer against cpio itself."""

import subprocess
from pathlib import Path

from vmnet.lab.guest.cpio import Entry, archive


def entries() -> list[Entry]:
    return [
        Entry.file("bin/deep/tool", b"#!/bin/sh\n", 0o755),
        Entry.link("bin/alias", "/bin/deep/tool"),
        Entry.file("odd", b"12345"),
        Entry.directory("proc"),
    ]


def test_cpio_reads_it(tmp_path: Path) -> None:
    subprocess.run(["cpio", "-idm", "--quiet"], input=archive(entries()), cwd=tmp_path, check=True)
    assert (tmp_path / "bin/deep/tool").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "bin/deep/tool").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "bin/alias").readlink() == Path("/bin/deep/tool")
    assert (tmp_path / "odd").read_bytes() == b"12345"
    assert (tmp_path / "proc").is_dir()


def test_equal_content_gives_equal_bytes() -> None:
    assert archive(entries()) == archive(reversed(entries()))
