"""Conditions as ``kubectl wait`` needs them: of which generation each speaks."""

import ast
from datetime import UTC, datetime
from pathlib import Path

from vmnet.controller.statuses import Condition, merged

NOW = datetime(2026, 11, 24, tzinfo=UTC)
LATER = datetime(2026, 11, 25, tzinfo=UTC)
READY = Condition("NetworkReady", True, "Made", "it is there")
CONTROLLER = Path(__file__).parents[3] / "vmnet" / "controller"


def test_each_condition_says_of_which_generation_it_speaks() -> None:
    other = {"type": "Theirs", "status": "True"}
    item = {"metadata": {"generation": 3}, "status": {"conditions": [other]}}
    found = merged(item, [READY, Condition("NetworkCreated", False, "No", "why")], NOW)
    assert found is not None
    assert [(entry["type"], entry.get("observedGeneration")) for entry in found] == [
        ("Theirs", None),
        ("NetworkReady", 3),
        ("NetworkCreated", 3),
    ]
    item["status"] = {"conditions": found}
    assert merged(item, [READY], LATER) is None  # nothing to write
    item["metadata"] = {"generation": 4}
    (_, ready, created) = merged(item, [READY], LATER) or [{}, {}, {}]
    # The same word about a new generation is news, and no transition.
    assert (ready["observedGeneration"], ready["lastTransitionTime"]) == (4, found[1]["lastTransitionTime"])
    assert created["observedGeneration"] == 3


def test_nobody_writes_conditions_of_ours_another_way() -> None:
    """Requests for certificates have conditions of their own, which know no generations."""
    writers = set()
    for path in CONTROLLER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called in ("merged", "set_condition"):
                writers.add((path.name, called))
    assert writers == {("networks.py", "merged"), ("claims.py", "merged"), ("statuses.py", "set_condition")}
