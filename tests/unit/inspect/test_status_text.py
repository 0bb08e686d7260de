"""The report as people and programs read it."""

import json
from datetime import UTC, datetime

from vmnet.inspect.status_text import CLAIMS_SHOWN, as_json, json_text, text
from vmnet.inspect.verdicts import Finding, Grade, Line, Verdict

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def verdict(*findings: Finding, claims: tuple[Line, ...] = ()) -> Verdict:
    """One node, and what was found."""
    grade = Grade.BROKEN if findings else Grade.OK
    return Verdict((), (Line("node n1", grade, "agent a, ready", {"agent": "a"}),), (), (), claims, findings, NOW)


def test_each_finding_is_followed_by_its_next_step() -> None:
    found = text(verdict(Finding(Grade.BROKEN, "node n1", "no agent runs there", "kubectl describe daemonset")))
    assert found.splitlines() == [
        "NODES",
        "  broken   node n1  agent a, ready",
        "",
        "broken: node n1: no agent runs there",
        "  → kubectl describe daemonset",
    ]
    assert text(verdict()).splitlines()[-1] == "All is well."


def test_claims_that_are_well_are_counted_and_those_that_are_not_shown() -> None:
    good = tuple(Line(f"claim red/{number}", Grade.OK, "addresses", {}) for number in range(50))
    bad = Line("claim red/bad", Grade.BROKEN, "no addresses", {})
    found = text(verdict(claims=(*good, bad)))
    assert "  broken   claim red/bad" in found
    assert f"ok       {51 - CLAIMS_SHOWN} more" in found


def test_programs_get_everything() -> None:
    finding = Finding(Grade.WARNING, "agents", "of different versions", "wait")
    found = json.loads(json_text(verdict(finding)))
    assert found == as_json(verdict(finding))
    assert found["verdict"] == "warning"
    assert found["findings"] == [
        {"grade": "warning", "about": "agents", "says": "of different versions", "nextStep": "wait"}
    ]
    assert found["nodes"][0] == {"about": "node n1", "grade": "broken", "says": "agent a, ready", "agent": "a"}
