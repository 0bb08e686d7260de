"""Attempts at one step: here with commands on the machine's kubectl, which needs no cluster for its version."""

import io
from collections.abc import Iterator
from typing import cast

import pytest
from rich.console import Console

from vmnet.kube.fake import FakeKube
from vmnet.lab.lab import Lab
from vmnet.lab.workshop.lookup import Lookup
from vmnet.lab.workshop.report import Result
from vmnet.lab.workshop.run import Workshop, kernel_has_sctp, output_of
from vmnet.lab.workshop.steps import Check, Outcome, Section, Shows, Step

VERSION = "kubectl version --client"


class Third:
    """Is content with the third outcome."""

    def __init__(self) -> None:
        self._left: Iterator[str] = iter(("first", "second", ""))

    def problem(self, outcome: Outcome, resolve: object) -> str:
        return next(self._left)

    def texts_of(self) -> tuple[str, ...]:
        return ()


@pytest.fixture
def workshop() -> Workshop:
    return Workshop(Lab("unused"), Lookup(FakeKube()), lambda _: None, Console(file=io.StringIO()))


async def test_a_step_is_tried_again_until_it_is_as_expected(workshop: Workshop) -> None:
    entry = await workshop.attempt("1.1", Step("t", VERSION, "e", cast(Check, Third()), within=60))
    assert (entry.result, entry.attempts, entry.exit) == (Result.PASSED, 3, 0)
    assert "Client Version" in entry.output


async def test_without_time_the_first_attempt_decides(workshop: Workshop) -> None:
    entry = await workshop.attempt("1.1", Step("t", VERSION, "e", cast(Check, Third())))
    assert (entry.result, entry.detail, entry.attempts) == (Result.FAILED, "first", 1)


async def test_what_is_not_known_and_what_cannot_be_run_are_failures(workshop: Workshop) -> None:
    entry = await workshop.attempt("1.1", Step("t", "kubectl get <udn:a/b>", "e", Shows()))
    assert entry.result is Result.FAILED
    assert "<udn:a/b> is not known" in entry.detail
    entry = await workshop.attempt("1.1", Step("t", "rm x", "e", Shows()))
    assert entry.result is Result.FAILED


async def test_sctp_is_left_out_where_the_kernel_has_none(workshop: Workshop) -> None:
    entry = await workshop.attempt("1.1", Step("t", VERSION, "e", Shows(), needs_sctp=True))
    assert entry.result is (Result.PASSED if kernel_has_sctp() else Result.SKIPPED)


async def test_a_failure_does_not_end_the_run(workshop: Workshop) -> None:
    steps = (Step("bad", VERSION, "e", Shows(("nothing like it",))), Step("good", VERSION, "e", Shows()))
    report = await workshop.run([Section(4, "s", steps)])
    assert [(entry.step, entry.result) for entry in report.steps] == [("4.1", Result.FAILED), ("4.2", Result.PASSED)]
    assert report.failed


def test_what_kubectl_says_about_containers_is_not_the_commands_output() -> None:
    outcome = Outcome(0, "blue-1", 'Defaulted container "a" out of: a, b\nreal\n')
    assert output_of(outcome) == "blue-1real\n"
