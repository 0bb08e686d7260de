from vmnet.lab.bench.dns_changes import KINDS, SINCE, measure, summary


def test_percentiles_are_of_what_was_measured() -> None:
    found = summary([float(value) for value in range(100, 0, -1)])
    assert found == {"number": 100, "p50_ms": 50.5, "p99_ms": 100.0, "max_ms": 100.0}


def test_an_agent_answers_for_machines_that_come_change_and_go() -> None:
    """Each change ends with the right answer, or the measurement does not end."""
    found = measure(20, 2)
    assert found["names"] == 20
    assert found["changes"].keys() == {f"{kind}, {since}" for kind in KINDS for since in SINCE}
    assert {item["number"] for item in found["changes"].values()} == {2}
