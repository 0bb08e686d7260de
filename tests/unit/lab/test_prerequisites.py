"""What is missing is named, with what to do, before anything is made."""

import shutil
from pathlib import Path

import pytest

from vmnet.lab import prerequisites
from vmnet.lab.errors import LabError
from vmnet.lab.prerequisites import Problem


def test_without_root_nothing_else_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prerequisites.os, "geteuid", lambda: 1000)
    (problem,) = prerequisites.find_problems()
    assert "root" in problem.what
    assert "root" in problem.remedy


def test_missing_programs_are_named_with_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which

    def which(name: str, path: str | None = None) -> str | None:
        return None if name == "qemu-system-x86_64" else real(name, path=path)

    monkeypatch.setattr(prerequisites.shutil, "which", which)
    found = [problem for problem in prerequisites.missing_programs() if problem.package == "qemu-system-x86"]
    assert len(found) == 1
    assert "qemu-system-x86_64" in found[0].what
    assert "--install" in found[0].remedy


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [Problem("a", "do this"), Problem("b", "do this"), Problem("c", "do that")]
    monkeypatch.setattr(prerequisites, "find_problems", lambda: problems)
    with pytest.raises(LabError) as caught:
        prerequisites.require()
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == ["- a", "- b", "- c"]
    assert caught.value.next_step == "do this; do that"


def test_every_program_of_the_table_comes_from_a_package_of_the_makefile() -> None:
    makefile = (Path(prerequisites.__file__).parents[2] / "Makefile").read_text()
    # libc, util-linux and gcc's headers are in every Debian; the rest must be asked for.
    for package in set(prerequisites.PACKAGES.values()):
        assert package in makefile, package
