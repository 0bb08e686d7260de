"""Every command of the documents, run on one lab as a reader would run it.

In a ``console`` block lines that begin with ``$`` are commands and the others what they show, where ``…`` stands for
anything; a command is repeated until it shows that. A ``yaml`` block whose first line is a comment with a file's name
is that file. ``sh`` blocks are test_shell_commands.py's.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from vmnet.lab import kubectl

DOCS = Path(__file__).parents[2] / "docs"
_FIRST = ("quick-start.md", "user-guide.md", "admin-guide.md", "troubleshooting.md")
_OTHERS = sorted(path.name for path in DOCS.glob("*.md") if "\n```console\n" in path.read_text())
PAGES = (*_FIRST, *(name for name in _OTHERS if name not in _FIRST))
"""All that have commands, in this order, on the same lab."""
PATIENCE = 180
NAME = f"docs-{os.getpid()}"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Command:
    """One command of a document, and what it must show; ``files`` are those that the text has named before it."""

    page: str
    line: int
    text: str
    shown: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def commands(page: str) -> Iterator[Command]:
    """The commands of a page, in order."""
    text, files = (DOCS / page).read_text(), dict[str, str]()
    for block in _BLOCK.finditer(text):
        kind, body = block.groups()
        first = text[: block.start(2)].count("\n") + 1
        if kind == "yaml" and (named := re.match(r"# ([\w.-]+\.yaml)\n", body)):
            files[named.group(1)] = body
        if kind != "console":
            continue
        found: list[Command] = []
        for number, line in enumerate(body.splitlines(), first):
            if line.startswith("$ "):
                found.append(Command(page, number, line[2:], files=dict(files)))
            elif found and found[-1].text.endswith("\\"):
                found[-1].text += "\n" + line
            else:
                found[-1].shown.append(line)
        yield from found


def pattern(line: str) -> re.Pattern[str]:
    """What one shown line matches: any run of blanks is like any other, for columns are as wide as they must be."""
    parts = [r"\s+".join(map(re.escape, part.split(" "))) for part in re.sub(r"\s+", " ", line).split("…")]
    return re.compile(".*".join(parts) + r"\s*$", re.MULTILINE)


def missing(command: Command, output: str) -> list[str]:
    """The lines that are not shown, in the document's order."""
    place, lost = 0, []
    for line in command.shown:
        if line.strip() in ("", "…"):
            continue
        found = pattern(line).search(output, place)
        if found is None:
            lost.append(line)
        else:
            place = found.end()
    return lost


def test_shown_lines_are_found_in_order_and_not_otherwise() -> None:
    command = Command("x", 1, "x", ["NAME   READY", "blue   … Running", "…", "green  Running"])
    assert missing(command, "NAME      READY  AGE\nblue 1/1 Running\nred\ngreen  Running") == ["NAME   READY"]
    assert missing(command, "NAME      READY\nblue 1/1 Running\nred\ngreen  Running\n") == []
    assert missing(command, "NAME READY\ngreen Running\nblue 1 Running\n") == ["green  Running"]


def test_every_page_has_commands() -> None:
    for page in PAGES:
        assert list(commands(page)), page


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A lab, and what a shell must know to talk to it."""
    programs = tmp_path_factory.mktemp("bin")
    vmnet = f"{sys.executable} -m vmnet.cmd"
    (programs / "vmnet").write_text(f'#!/bin/sh\nexec {vmnet} "$@"\n')
    (programs / "kubectl").symlink_to(kubectl.find())
    for program in programs.iterdir():
        program.chmod(0o755)
    lab = [sys.executable, "-m", "vmnet.cmd", "lab"]
    try:
        subprocess.run([*lab, "up", "--name", NAME], check=True, timeout=300, capture_output=True, text=True)
        shown = subprocess.run(
            [*lab, "status", "--name", NAME, "-o", "json"], check=True, timeout=60, capture_output=True, text=True
        )
        config = re.search(r'"kubeconfig": "([^"]+)"', shown.stdout)
        assert config is not None, shown.stdout
        yield {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "KUBECONFIG": config.group(1),
            "COLUMNS": "200",
        }
    finally:
        subprocess.run([*lab, "down", "--name", NAME], check=False, timeout=120, capture_output=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_every_command_shows_what_the_page_says(page: str, environment: dict[str, str], tmp_path: Path) -> None:
    for command in commands(page):
        for name, text in command.files.items():
            (tmp_path / name).write_text(text)
        deadline = time.monotonic() + PATIENCE
        while True:
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", command.text],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE + 60,
                check=False,
            )
            output = done.stdout + done.stderr
            lost = missing(command, output)
            if not lost and (done.returncode == 0 or command.shown):
                break
            assert time.monotonic() < deadline, f"{page}:{command.line}: {command.text}\n{output}\nnot shown: {lost}"
            time.sleep(0.5)
