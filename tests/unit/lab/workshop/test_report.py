"""The report as programs read it."""

import json
from pathlib import Path

from rich.console import Console

from vmnet.lab.workshop.report import Entry, Report, Result, show_entry, show_summary, write


def entry(step: str, result: Result, detail: str = "") -> Entry:
    return Entry(step, f"title [{step}]", "kubectl get [pods]", "blue-0", result, detail, 0, "output\n", 1, 0.2)


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "build" / "report.json"
    report = Report([entry("1.1", Result.PASSED), entry("1.2", Result.FAILED, "exit status 1")], 3.5)
    write(report, path)
    body = json.loads(path.read_text())
    assert (body["passed"], body["failed"], body["skipped"], body["duration_s"]) == (1, 1, 0, 3.5)
    assert body["steps"][1]["result"] == "failed"
    assert set(body["steps"][0]) >= {"step", "command", "expectation", "result", "output"}
    assert report.failed


def test_what_was_left_out_is_no_failure() -> None:
    assert not Report([entry("1.1", Result.SKIPPED), entry("1.2", Result.PASSED)]).failed


def test_the_terminal_shows_commands_as_they_are_typed() -> None:
    console = Console(record=True, width=200)
    failed = entry("1.2", Result.FAILED, "exit status 1")
    show_entry(failed, console)
    show_summary(Report([failed]), Path("build/report.json"), console)
    text = console.export_text()
    for part in ("title [1.2]", "kubectl get [pods]", "expected: blue-0", "exit status 1", "FAILED", "1 failed"):
        assert part in text
