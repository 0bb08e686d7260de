"""The workshop as a reader of it runs it: every step shows what it must, and the report has all of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmnet.lab.workshop.scenario import SECTIONS

PATIENCE = 1500
REPORT = Path(__file__).parents[2] / "build" / "workshop" / "report.json"
"""Where ``make workshop`` leaves it too."""


@pytest.mark.timeout(PATIENCE + 60)
def test_every_step_of_the_workshop_shows_what_it_must() -> None:
    REPORT.unlink(missing_ok=True)
    words = ("lab", "workshop", "--name", f"workshop-{os.getpid()}", "--report", str(REPORT))
    done = subprocess.run(
        [sys.executable, "-m", "vmnet.cmd", *words], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert REPORT.exists(), done.stderr[-4000:]
    report = json.loads(REPORT.read_text())
    failed = [
        f"{item['step']} {item['title']}: {item['detail']}" for item in report["steps"] if item["result"] == "failed"
    ]
    assert failed == []
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(report["steps"]) == sum(len(section.steps) for section in SECTIONS)
    assert report["passed"] + report["skipped"] == len(report["steps"])
    skipped = [item for item in report["steps"] if item["result"] == "skipped"]
    assert all("SCTP" in item["detail"] for item in skipped)
    for item in report["steps"]:
        assert item["command"]
        assert item["expectation"]
        assert item["result"] == "skipped" or not re.search(r"<[a-z0-9]+:[a-z]", item["command"])
