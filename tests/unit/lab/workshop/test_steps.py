"""What each kind of check takes for right."""

import pytest

from vmnet.lab.workshop.steps import (
    Check,
    Exits,
    Outcome,
    Shows,
    Unreachable,
    Words,
    in_pod,
    misses,
    reaches,
)


def resolve(text: str) -> str:
    return text.replace("<udn:blue/blue-0>", "103.103.1.5")


@pytest.mark.parametrize(
    ("check", "outcome", "good"),
    [
        (Shows(), Outcome(0, ""), True),
        (Shows(), Outcome(1, ""), False),
        (Shows(("<udn:blue/blue-0>/24",)), Outcome(0, "inet 103.103.1.5/24"), True),
        (Shows(("<udn:blue/blue-0>/24",)), Outcome(0, "inet 103.103.1.50/24"), False),
        (Shows(("a",), never=("b",)), Outcome(0, "ab"), False),
        (Shows(matches=r"^default via .* dev ovn-udn1"), Outcome(0, "x\ndefault via 1 dev ovn-udn1"), True),
        (Shows(matches=r"^default"), Outcome(0, "no default"), False),
        (Words(("<udn:blue/blue-0>", "b a")), Outcome(0, "a\nb 103.103.1.5\n"), True),
        (Words(("a",)), Outcome(0, "a a"), False),
        (Words(()), Outcome(0, "\n"), True),
        (Words(()), Outcome(1, ""), False),
        (Exits(7, "code 7"), Outcome(7, "", "exit code 7"), True),
        (Exits(7, "code 7"), Outcome(7, "", ""), False),
        (Exits(7), Outcome(0, ""), False),
        (Unreachable(), Outcome(28, ""), True),
        (Unreachable(), Outcome(7, ""), True),
        (Unreachable(), Outcome(0, "blue-0"), False),
        # kubectl's own failure: the pod is not there, so nothing was shown.
        (Unreachable(), Outcome(1, ""), False),
        (Unreachable(), Outcome(127, ""), False),
    ],
)
def test_checks(check: Check, outcome: Outcome, good: bool) -> None:
    problem = check.problem(outcome, resolve)
    assert (problem == "") is good, problem


def test_commands_in_pods_are_kubectls() -> None:
    assert in_pod("blue/blue-0", "ip a") == "kubectl exec -n blue blue-0 -- ip a"
    assert in_pod("blue/blue-0", "ip a", "web") == "kubectl exec -n blue blue-0 -c web -- ip a"


def test_isolation_must_hold_at_the_first_attempt_and_reachability_may_take_its_time() -> None:
    assert misses("blue/blue-0", "http://x", "t").within == 0
    assert reaches("blue/blue-0", "http://x", "y", "t").within > 0
