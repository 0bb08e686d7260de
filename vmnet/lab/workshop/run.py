"""Runs the workshop on a lab: step after step, each until it shows what it must or its time is over."""

import asyncio
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from vmnet.kube.client import KubeClient
from vmnet.lab.errors import LabError
from vmnet.lab.lab import Lab
from vmnet.lab.workshop import commands, report
from vmnet.lab.workshop.lookup import Lookup, Unknown, replace
from vmnet.lab.workshop.report import OUTPUT_LIMIT, Entry, Report, Result
from vmnet.lab.workshop.scenario import SECTIONS
from vmnet.lab.workshop.steps import Outcome, Section, Step

PAUSE: Final = 0.3
"""Between two attempts at a step."""
_SCTP: Final = 132


async def run(lab: Lab, *, path: Path, only: Sequence[int], step: Callable[[str], None], console: Console) -> int:
    """Run on a lab that is up, print and write the report; 1 when a step was not as expected."""
    kube = await KubeClient.connect(lab.kubeconfig, user_agent="vmnet-lab-workshop")
    try:
        found = await Workshop(lab, Lookup(kube), step, console).run(chosen(SECTIONS, only))
    finally:
        await kube.close()
    await asyncio.to_thread(report.write, found, path)
    report.show_summary(found, path, console)
    return 1 if found.failed else 0


def chosen(sections: Sequence[Section], only: Sequence[int]) -> list[Section]:
    """The sections with these numbers and what they come after; all when no number is given. Raises LabError."""
    known = {section.number: section for section in sections}
    wanted = set(only or known)
    unknown = wanted - set(known)
    if unknown:
        raise LabError(f"the workshop has no section {min(unknown)}", f"it has {min(known)} to {max(known)}")
    while True:
        more = {number for section in wanted for number in known[section].after} - wanted
        if not more:
            return [section for section in sections if section.number in wanted]
        wanted |= more


class Workshop:
    """One run. ``step`` is told what happens now."""

    def __init__(self, lab: Lab, lookup: Lookup, step: Callable[[str], None], console: Console) -> None:
        self._lab = lab
        self._lookup = lookup
        self._step = step
        self._console = console
        self._sctp = kernel_has_sctp()

    async def run(self, sections: Sequence[Section]) -> Report:
        """All steps; one that fails does not end the run."""
        started = time.monotonic()
        found = Report()
        for section in sections:
            self._console.rule(f"{section.number}. {section.title}", align="left")
            for number, step in enumerate(section.steps, 1):
                name = f"{section.number}.{number}"
                self._step(f"{name} {step.title}")
                entry = await self.attempt(name, step)
                report.show_entry(entry, self._console)
                found.steps.append(entry)
        found.duration_s = round(time.monotonic() - started, 1)
        return found

    async def attempt(self, name: str, step: Step) -> Entry:
        """One step, repeated until it is as expected or ``within`` has passed."""
        if step.needs_sctp and not self._sctp:
            why = "this kernel has no SCTP"
            return Entry(name, step.title, step.command, step.expectation, Result.SKIPPED, why)
        started = time.monotonic()
        attempts = 0
        while True:
            attempts += 1
            command, outcome, problem = await self._once(step)
            seconds = round(time.monotonic() - started, 2)
            if not problem or seconds >= step.within:
                break
            await asyncio.sleep(PAUSE)
        return Entry(
            name,
            step.title,
            command,
            step.expectation,
            Result.FAILED if problem else Result.PASSED,
            problem,
            outcome.exit if outcome is not None else None,
            output_of(outcome)[-OUTPUT_LIMIT:] if outcome is not None else "",
            attempts,
            seconds,
        )

    async def _once(self, step: Step) -> tuple[str, Outcome | None, str]:
        try:
            values = await self._lookup.values(step.command, *step.check.texts_of())
        except Unknown as error:
            return step.command, None, str(error)
        command = replace(step.command, values)
        try:
            outcome = await commands.run(self._lab, command)
        except LabError as error:
            return command, None, str(error)
        return command, outcome, step.check.problem(outcome, lambda text: replace(text, values))


def output_of(outcome: Outcome) -> str:
    """Both outputs, without what kubectl says about containers."""
    errors = re.sub(r"^Defaulted container .*\n", "", outcome.stderr, flags=re.MULTILINE)
    return outcome.stdout + errors


def kernel_has_sctp() -> bool:
    """Whether such a socket can be made."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, _SCTP).close()
    except OSError:
        return False
    return True
