"""The workshop's report: one entry for each step, as JSON and on the terminal."""

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape

OUTPUT_LIMIT: Final = 2000


class Result(StrEnum):
    """Of one step."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Entry:
    """One step as it went. ``command`` has its tokens replaced; ``detail`` says why it failed or was skipped."""

    step: str
    title: str
    command: str
    expectation: str
    result: Result
    detail: str = ""
    exit: int | None = None
    output: str = ""
    attempts: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Report:
    """``build/workshop/report.json``."""

    steps: list[Entry] = field(default_factory=list)
    duration_s: float = 0.0

    def count(self, result: Result) -> int:
        """How many steps ended so."""
        return sum(entry.result is result for entry in self.steps)

    @property
    def failed(self) -> bool:
        """Whether any step was not as expected."""
        return self.count(Result.FAILED) > 0

    def to_json(self) -> str:
        """The report as text."""
        body = {**{str(result): self.count(result) for result in Result}, **asdict(self)}
        return json.dumps(body, indent=2) + "\n"


def write(report: Report, path: Path) -> None:
    """Write the JSON report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.to_json())


_SIGNS = {Result.PASSED: "[green]✓[/]", Result.FAILED: "[red]✗[/]", Result.SKIPPED: "[yellow]-[/]"}


def show_entry(entry: Entry, console: Console) -> None:
    """Print one step when it has ended."""
    console.print(f"{_SIGNS[entry.result]} [bold]{entry.step}[/] {escape(entry.title)} [dim]({entry.seconds:.1f} s)[/]")
    console.print(f"    [cyan]{escape(entry.command)}[/]", soft_wrap=True)
    console.print(f"    expected: {escape(entry.expectation)}", soft_wrap=True)
    if entry.result is not Result.PASSED:
        console.print(f"    [yellow]{escape(entry.detail)}[/]", soft_wrap=True)
    lines = entry.output.strip().splitlines()
    for line in lines[-12:] if entry.result is Result.FAILED else lines[:3]:
        console.print(f"    [dim]│ {escape(line)}[/]", soft_wrap=True)


def show_summary(report: Report, path: Path, console: Console) -> None:
    """Print the last lines."""
    failed = [entry for entry in report.steps if entry.result is Result.FAILED]
    for entry in failed:
        console.print(f"[red]✗ {entry.step}[/] {escape(entry.title)}: {escape(entry.detail)}", soft_wrap=True)
    counts = ", ".join(f"{report.count(result)} {result}" for result in Result)
    verdict = "[red]FAILED[/]" if failed else "[green]passed[/]"
    console.print(f"{verdict} in {report.duration_s:.0f} s: {counts}; {path}", soft_wrap=True)
