"""The lab's directory and how a dead lab is told from a living one."""

import os
import subprocess
from pathlib import Path

import pytest

from vmnet.lab import directory
from vmnet.lab.directory import LabDirectory, State
from vmnet.lab.errors import LabError


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(directory, "ROOT", tmp_path)
    return tmp_path


def state(pid: int, start: int) -> State:
    return State("x", pid, start, pid, start, 3, 1234)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "..", "a" * 33, "a\n"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(LabError):
        LabDirectory.of(name)


def test_state_is_kept() -> None:
    lab = LabDirectory.of("x")
    lab.create()
    assert lab.read_state() is None
    lab.write_state(state(1, 2))
    assert lab.read_state() == state(1, 2)
    lab.remove()
    assert not lab.path.exists()


def test_a_torn_state_is_none() -> None:
    lab = LabDirectory.of("x")
    lab.create()
    (lab.path / "state.json").write_text('{"name": "x"')
    assert lab.alive() is None
    (lab.path / "state.json").write_text('{"name": "x"}')
    assert lab.alive() is None


def test_a_process_that_runs_is_alive_and_a_reused_number_is_not() -> None:
    lab = LabDirectory.of("x")
    lab.create()
    start = directory.start_time(os.getpid())
    assert start is not None
    lab.write_state(state(os.getpid(), start))
    assert lab.alive() is not None
    lab.write_state(state(os.getpid(), start + 1))
    assert lab.alive() is None


def test_a_zombie_is_dead() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert directory.start_time(process.pid) is None
    process.wait()


def test_only_one_command_at_a_time() -> None:
    lab = LabDirectory.of("x")
    with lab.locked(), pytest.raises(LabError, match="another command"), lab.locked():
        pass
    with lab.locked():
        pass


def test_the_tail_of_a_log() -> None:
    lab = LabDirectory.of("x")
    lab.create()
    assert lab.log_tail("agent-n1") == ""
    lab.log("agent-n1").write_text("".join(f"line {i}\n" for i in range(100)))
    assert lab.log_tail("agent-n1", 2) == "line 98\nline 99"
