"""A step: a command as it is typed, and what it must show.

A command begins with ``kubectl`` (run on the machine, in the directory of the workshop's manifests), or with a host of
the lab and ``#``: ``outside# curl …``, ``n1# ip netns``. Tokens stand for what only the cluster knows, and are replaced
in commands and in checks: ``<udn:blue/blue-0>`` is that pod's address (see ``vmnet.lab.workshop.lookup``).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

NO_ANSWER: Final = frozenset({7, 28})
"""Exit statuses of curl: nobody accepts the connection, nothing came in time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did. On a terminal everything is in ``stdout``."""

    exit: int
    stdout: str
    stderr: str = ""


Resolve = Callable[[str], str]
"""Replaces the tokens of a text."""


class Check(Protocol):
    """Judges an outcome."""

    def problem(self, outcome: Outcome, resolve: Resolve) -> str:
        """Why it is not what was expected; empty when it is."""
        ...

    def texts_of(self) -> Sequence[str]:
        """Where it may have tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Shows:
    """Exit status 0, and in the output all of ``texts``, none of ``never``, and what the expression describes."""

    texts: Sequence[str] = ()
    never: Sequence[str] = ()
    matches: str = ""

    def problem(self, outcome: Outcome, resolve: Resolve) -> str:
        """See ``Check``."""
        if outcome.exit != 0:
            return f"exit status {outcome.exit}"
        for text in map(resolve, self.texts):
            if text not in outcome.stdout:
                return f"{text!r} is not shown"
        for text in map(resolve, self.never):
            if text in outcome.stdout:
                return f"{text!r} is shown"
        pattern = resolve(self.matches)
        if pattern and not re.search(pattern, outcome.stdout, re.MULTILINE):
            return f"nothing matches {pattern!r}"
        return ""

    def texts_of(self) -> Sequence[str]:
        """See ``Check``."""
        return (*self.texts, *self.never, self.matches)


@dataclass(frozen=True, slots=True)
class Words:
    """Exit status 0, and exactly these words, in any order."""

    words: Sequence[str]

    def problem(self, outcome: Outcome, resolve: Resolve) -> str:
        """See ``Check``."""
        if outcome.exit != 0:
            return f"exit status {outcome.exit}"
        expected = sorted(word for text in self.words for word in resolve(text).split())
        found = sorted(outcome.stdout.split())
        return "" if found == expected else f"expected {' '.join(expected) or 'nothing'}"

    def texts_of(self) -> Sequence[str]:
        """See ``Check``."""
        return self.words


@dataclass(frozen=True, slots=True)
class Exits:
    """One exit status."""

    status: int
    text: str = ""

    def problem(self, outcome: Outcome, resolve: Resolve) -> str:
        """See ``Check``."""
        if outcome.exit != self.status:
            return f"exit status {outcome.exit}, not {self.status}"
        text = resolve(self.text)
        return "" if text in outcome.stdout + outcome.stderr else f"{text!r} is not shown"

    def texts_of(self) -> Sequence[str]:
        """See ``Check``."""
        return (self.text,)


@dataclass(frozen=True, slots=True)
class Unreachable:
    """curl gets no answer. Any other failure is one: a pod that is not there proves nothing."""

    def problem(self, outcome: Outcome, resolve: Resolve) -> str:
        """See ``Check``."""
        if outcome.exit in NO_ANSWER:
            return ""
        return "it was answered" if outcome.exit == 0 else f"exit status {outcome.exit} is not curl's for no answer"

    def texts_of(self) -> Sequence[str]:
        """See ``Check``."""
        return ()


@dataclass(frozen=True, slots=True)
class Step:
    """``within``: seconds in which the outcome must have become the expected one; 0 for the first attempt."""

    title: str
    command: str
    expectation: str
    check: Check
    within: float = 0
    needs_sctp: bool = False
    """Left out, and reported so, where the kernel has no SCTP."""


@dataclass(frozen=True, slots=True)
class Section:
    """Steps under one number. ``after``: numbers of the sections whose objects it uses."""

    number: int
    title: str
    steps: Sequence[Step]
    after: Sequence[int] = ()


CURL: Final = "curl -sS -g --max-time 3"


def in_pod(pod: str, command: str, container: str = "") -> str:
    """Run a command in ``namespace/name``."""
    namespace, _, name = pod.partition("/")
    chosen = f" -c {container}" if container else ""
    return f"kubectl exec -n {namespace} {name}{chosen} -- {command}"


def reaches(pod: str, url: str, text: str, title: str, expectation: str = "", *, within: float = 15) -> Step:
    """A pod fetches a URL and sees ``text``."""
    return Step(title, in_pod(pod, f"{CURL} {url}"), expectation or f"answers {text}", Shows((text,)), within)


def misses(pod: str, url: str, title: str, *, within: float = 0) -> Step:
    """A pod gets no answer from a URL."""
    return Step(title, in_pod(pod, f"{CURL} {url}"), "no answer", Unreachable(), within)


def waits(title: str, command: str, expectation: str, *, seconds: int = 90) -> Step:
    """``kubectl wait`` and its like, which succeed or time out by themselves."""
    return Step(title, f"{command} --timeout={seconds}s", expectation, Shows())


def does(title: str, command: str, expectation: str = "succeeds") -> Step:
    """A command that changes something."""
    return Step(title, command, expectation, Shows())
