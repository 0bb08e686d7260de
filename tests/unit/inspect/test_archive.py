"""An archive says what is in it and what is not, and there is never half of one."""

import contextlib
import json
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from vmnet.inspect.archive import MANIFEST, Archive
from vmnet.inspect.errors import InspectionError


def contents(path: Path) -> dict[str, bytes]:
    """Files by name, without the archive's own folder."""
    with tarfile.open(path) as tar:
        found = {}
        for member in tar.getmembers():
            file = tar.extractfile(member)
            assert file is not None
            folder, _, name = member.name.partition("/")
            assert folder == path.name.removesuffix(".tar.gz")
            found[name] = file.read()
        return found


def manifest(path: Path) -> dict[str, Any]:
    """Of an archive."""
    found: dict[str, Any] = json.loads(contents(path)[MANIFEST])
    return found


def test_the_manifest_lists_what_is_in_it_and_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with Archive(path, about={"by": "a test"}) as archive:
        archive.add("a/b.txt", "hällo\n", "echo")
        archive.add_json("c.json", {"x": 1}, "made")
        archive.miss("kubectl logs a", "refused", "logs/a.log")
        assert [entry.error for entry in archive.missed] == ["refused"]
    found = contents(path)
    assert found.keys() == {"a/b.txt", "c.json", MANIFEST}
    assert found["a/b.txt"].decode() == "hällo\n"
    said = manifest(path)
    assert said["by"] == "a test"
    assert {item["path"]: item["octets"] for item in said["files"]} == {"a/b.txt": 7, "c.json": len(found["c.json"])}
    assert said["failed"] == [
        {"path": "logs/a.log", "how": "kubectl logs a", "octets": 0, "cut": 0, "error": "refused"}
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [item.name for item in tmp_path.iterdir()] == ["a.tar.gz"]


def test_files_and_the_whole_are_bounded_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmnet.inspect.archive.FILE_LIMIT", 10)
    monkeypatch.setattr("vmnet.inspect.archive.TOTAL_LIMIT", 25)
    path = tmp_path / "a.tar.gz"
    with Archive(path) as archive:
        archive.add("begin", "0123456789abc", "how")
        archive.add("end", "0123456789abc", "how", end=True, cut=4)
        archive.add("rest", "0123456789", "how")
        archive.add("none", "0", "how")
    found, said = contents(path), manifest(path)
    assert (found["begin"], found["end"], found["rest"]) == (b"0123456789", b"3456789abc", b"01234")
    assert "none" not in found
    assert [item["cut"] for item in said["files"]] == [3, 7, 5]
    assert said["limits"] == {"octetsOfAFile": 10, "octetsOfAll": 25}
    assert said["failed"][0]["path"] == "none"


def test_what_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_text("precious")
    with pytest.raises(InspectionError, match=f"{path} exists already"):
        Archive(path)
    with Archive(path, force=True) as archive:
        archive.add("x", "y", "z")
    assert contents(path)["x"] == b"y"


def test_a_failure_leaves_nothing_behind_and_what_was_there_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_text("precious")
    archive = Archive(path, force=True)
    with contextlib.suppress(KeyboardInterrupt), archive:
        archive.add("x", "y", "z")
        raise KeyboardInterrupt
    assert path.read_text() == "precious"
    assert [item.name for item in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InspectionError, match="cannot be written"), Archive(tmp_path / "none" / "a.tar.gz"):
        pass
