from datetime import UTC, datetime, timedelta

from vmnet.kube.conditions import find_condition, set_condition

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
LATER = NOON + timedelta(minutes=5)


def test_a_new_condition_is_appended() -> None:
    conditions, changed = set_condition(None, "Ready", True, "Done", "all is well", generation=3, now=NOON)
    assert changed
    assert conditions == [
        {
            "type": "Ready",
            "status": "True",
            "reason": "Done",
            "message": "all is well",
            "observedGeneration": 3,
            "lastTransitionTime": "2026-11-23T12:00:00Z",
        }
    ]


def test_the_same_again_is_no_change() -> None:
    before, _ = set_condition([], "Ready", True, "Done", "well", now=NOON)
    assert set_condition(before, "Ready", True, "Done", "well", now=LATER) == (before, False)


def test_another_message_keeps_the_transition_time_and_another_status_moves_it() -> None:
    before, _ = set_condition([{"type": "Other", "status": "True"}], "Ready", True, "Done", "well", now=NOON)
    reworded, changed = set_condition(before, "Ready", True, "Done", "very well", now=LATER)
    assert changed
    assert reworded[0] == {"type": "Other", "status": "True"}
    assert reworded[1]["lastTransitionTime"] == "2026-11-23T12:00:00Z"
    turned, _ = set_condition(reworded, "Ready", "Unknown", "Lost", "", now=LATER)
    assert turned[1]["lastTransitionTime"] == "2026-11-23T12:05:00Z"
    assert turned[1]["status"] == "Unknown"
    assert reworded[1]["status"] == "True"


def test_find() -> None:
    assert find_condition([{"type": "A"}, {"type": "B"}], "B") == {"type": "B"}
    assert find_condition(None, "B") is None
