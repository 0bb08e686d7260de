"""Supervised processes: real ones, in the test's own namespaces."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from vmnet.lab.directory import LabDirectory
from vmnet.lab.errors import LabError
from vmnet.lab.processes import Processes, Specification, Status


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[Processes]:
    directory = LabDirectory(tmp_path / "lab")
    directory.create()
    async with asyncio.TaskGroup() as group:
        table = Processes(directory, {}, group)
        yield table
        await table.stop_all()


def python(code: str, name: str = "p") -> Specification:
    return Specification(name, "fabric", (sys.executable, "-c", code))


async def test_output_goes_to_the_log_and_the_exit_is_noticed(processes: Processes) -> None:
    ended: list[Status] = []
    processes.observe(ended.append)
    started = await processes.start(python("print('hello'); raise SystemExit(3)"))
    status = await processes.wait("p", 20)
    assert (status.exit, status.failed, status.starts) == (3, True, 1)
    assert ended == [status]
    assert Path(started.log).read_text() == "hello\n"  # noqa: ASYNC240


async def test_what_a_deployment_runs_is_started_again_and_a_failure_in_the_end(processes: Processes) -> None:
    ended: list[Status] = []
    processes.observe(ended.append)
    await processes.start(replace(python("raise SystemExit(1)"), revived=2))
    async with asyncio.timeout(30):
        while not ended:
            await asyncio.sleep(0.02)
    assert [(status.exit, status.starts, status.failed) for status in ended] == [(1, 3, True)]


async def test_restart_ends_the_old_one_first(processes: Processes) -> None:
    first = await processes.start(python("import time; time.sleep(60)"))
    second = await processes.restart("p")
    assert second.pid != first.pid
    assert (second.exit, second.starts) == (None, 2)
    assert not Path(f"/proc/{first.pid}").exists()  # noqa: ASYNC240


async def test_a_process_that_ignores_sigterm_is_killed(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmnet.lab.processes.STOP_SECONDS", 0.2)
    await processes.start(python("import signal, time; signal.signal(15, 1); print('up', flush=True); time.sleep(60)"))
    log = Path(processes.statuses()[0].log)
    async with asyncio.timeout(20):
        while "up" not in log.read_text():  # noqa: ASYNC240 - a file has no event
            await asyncio.sleep(0.02)
    await processes.stop_all()
    status = await processes.wait("p", 20)
    assert (status.exit, status.failed) == (-signal.SIGKILL, False)


async def test_a_kill_that_was_asked_for_is_no_failure(processes: Processes) -> None:
    await processes.start(python("import time; time.sleep(60)"))
    processes.kill("p", signal.SIGKILL)
    status = await processes.wait("p", 20)
    assert (status.exit, status.failed) == (-signal.SIGKILL, False)
    with pytest.raises(LabError, match="has ended"):
        processes.kill("p", signal.SIGTERM)
    assert (await processes.restart("p")).starts == 2


async def test_names_are_checked(processes: Processes) -> None:
    with pytest.raises(LabError, match="no process"):
        await processes.restart("nobody")
    with pytest.raises(LabError, match="no host"):
        await processes.start(Specification("p", "n9", ("true",)))
    with pytest.raises(LabError, match="could not be started"):
        await processes.start(Specification("p", "fabric", ("/no/such/program",)))
    await processes.start(python("import time; time.sleep(60)"))
    with pytest.raises(LabError, match="already runs"):
        await processes.start(python("pass"))


async def test_run_returns_both_outputs(processes: Processes) -> None:
    code = "import sys; print(sys.stdin.read()); print('e', file=sys.stderr); sys.exit(2)"
    assert await processes.run("fabric", [sys.executable, "-c", code], 20, b"in") == (2, b"in\n", b"e\n")
    with pytest.raises(LabError, match="did not end"):
        await processes.run("fabric", ["sleep", "60"], 0.1)
