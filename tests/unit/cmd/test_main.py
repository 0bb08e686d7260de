"""The vmnet command: help that teaches, lazy subcommands, errors that say what to do."""

import argparse
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from vmnet.cmd import main as command
from vmnet.kube.api import Forbidden, KubeError, Unavailable
from vmnet.lab.errors import LabError


def module(run: object) -> types.ModuleType:
    made = types.ModuleType("vmnet_test_command")
    made.add_arguments = lambda parser: parser.add_argument("--n", type=int, default=0)  # type: ignore[attr-defined]
    made.run = run  # type: ignore[attr-defined]
    return made


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Lets a test say what ``vmnet agent`` runs."""
    holder: dict[str, object] = {}
    monkeypatch.setattr(command.importlib, "import_module", lambda _: module(holder["run"]))
    return holder


def test_the_exit_status_is_the_commands(chosen: dict[str, object]) -> None:
    async def run(arguments: argparse.Namespace) -> int:
        return int(arguments.n)

    chosen["run"] = run
    assert command.main(["agent", "--n", "7"]) == 7


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LabError("lab 'x' is not up", "vmnet lab up"), ["lab 'x' is not up", "→ vmnet lab up"]),
        (Unavailable("connection refused: https://127.0.0.1:1"), ["connection refused", "--kubeconfig"]),
        (Forbidden("pods is forbidden"), ["pods is forbidden", "role"]),
        (PermissionError(1, "Operation not permitted"), ["Operation not permitted", "root"]),
        (ExceptionGroup("tasks", [LabError("inner", "do this")]), ["inner", "do this"]),
        (ExceptionGroup("tasks", [ValueError("odd")]), ["ValueError: odd", "VMNET_LOG_LEVEL"]),
        (KubeError("no usable Kubernetes configuration"), ["no usable"]),
    ],
)
def test_an_error_is_told_without_a_traceback(
    chosen: dict[str, object], capsys: pytest.CaptureFixture[str], error: Exception, words: list[str]
) -> None:
    async def run(_: argparse.Namespace) -> int:
        raise error

    chosen["run"] = run
    assert command.main(["agent"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert shown.startswith("vmnet agent: ")
    for word in words:
        assert word in shown


def test_a_fault_in_the_program_keeps_its_traceback(chosen: dict[str, object]) -> None:
    async def run(_: argparse.Namespace) -> int:
        raise ZeroDivisionError

    chosen["run"] = run
    with pytest.raises(ZeroDivisionError):
        command.main(["agent"])


def test_ctrl_c_is_130(chosen: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    async def run(_: argparse.Namespace) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        import asyncio

        await asyncio.sleep(30)
        return 0

    chosen["run"] = run
    assert command.main(["agent"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_help_lists_every_command_and_imports_none() -> None:
    script = (
        "import sys\n"
        "from vmnet.cmd.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('vmnet.agent', 'vmnet.lab.', 'pyroute2', 'scapy', 'rich')\n"
        "print(sorted(m for m in sys.modules if m.startswith(heavy)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    for item in command.COMMANDS:
        assert item.name in shown
    assert shown.strip().endswith("['vmnet.lab.errors']")


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["fly"])
    assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_every_command_of_the_table_can_be_imported() -> None:
    root = Path(command.__file__).parents[2]
    actions = {"dns": ["query", "network", "name"], "lab": ["down"], "migration": ["list"], "config": ["show"]}
    for item in command.COMMANDS:
        if (root / (item.module.replace(".", "/") + ".py")).exists():
            top, _ = command.parser(item.name)
            assert top.parse_known_args([item.name, *actions.get(item.name, [])])
