"""The report of ``vmnet status``, for people and for programs. Pure."""

import json
from collections.abc import Iterator
from typing import Any, Final

from vmnet.inspect.verdicts import Grade, Line, Verdict

CLAIMS_SHOWN: Final = 20
"""Of those that are well; what is not well is always shown."""


def text(verdict: Verdict) -> str:
    """For people: every object a line, then each finding with its next step."""
    return "\n".join(_lines(verdict))


def _lines(verdict: Verdict) -> Iterator[str]:
    width = max((len(line.about) for _, lines in verdict.sections() for line in lines), default=0)
    for name, lines in verdict.sections():
        if not lines:
            continue
        shown, hidden = _shown(name, lines)
        yield f"{name.upper()}"
        for line in shown:
            yield f"  {_SIGNS[line.grade]:<8} {line.about:<{width}}  {line.says}"
        if hidden:
            yield f"  {_SIGNS[Grade.OK]:<8} {hidden} more"
    yield ""
    for finding in verdict.findings:
        yield f"{_SIGNS[finding.grade]}: {finding.about}: {finding.says}"
        yield f"  → {finding.next_step}"
    if verdict.grade in (Grade.OK, Grade.WARNING):
        yield "All is well." if not verdict.findings else "Nothing is broken."


def _shown(name: str, lines: tuple[Line, ...]) -> tuple[list[Line], int]:
    if name != "claims" or len(lines) <= CLAIMS_SHOWN:
        return list(lines), 0
    bad = [line for line in lines if line.grade is not Grade.OK]
    good = [line for line in lines if line.grade is Grade.OK]
    kept = max(CLAIMS_SHOWN - len(bad), 0)
    return bad + good[:kept], len(good) - min(kept, len(good))


_SIGNS: Final = {Grade.OK: "ok", Grade.WARNING: "warning", Grade.UNKNOWN: "unknown", Grade.BROKEN: "broken"}


def as_json(verdict: Verdict) -> dict[str, Any]:
    """For programs: ``verdict`` is ok, warning, unknown or broken; each section a list of objects with ``grade``."""
    sections = {
        name: [{"about": line.about, "grade": line.grade.value, "says": line.says, **line.details} for line in lines]
        for name, lines in verdict.sections()
    }
    findings = [
        {"grade": item.grade.value, "about": item.about, "says": item.says, "nextStep": item.next_step}
        for item in verdict.findings
    ]
    return {
        "verdict": verdict.grade.value,
        "checked": verdict.checked.isoformat(),
        "findings": findings,
        **sections,
    }


def json_text(verdict: Verdict) -> str:
    """``as_json`` as text."""
    return json.dumps(as_json(verdict), indent=2)
