from pathlib import Path

import pytest

from vmnet.kernel.exchange import exchange


def test_two_files_trade_places(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("1")
    second.write_text("2")
    inodes = first.stat().st_ino, second.stat().st_ino
    exchange(first, second)
    assert (first.read_text(), second.read_text()) == ("2", "1")
    assert (second.stat().st_ino, first.stat().st_ino) == inodes


def test_one_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("1")
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "first", tmp_path / "second")
    assert (tmp_path / "first").read_text() == "1"
