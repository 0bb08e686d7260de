from vmnet.lab.bench.migration import Row, Series, percentile, summary, table


def row(**changes: object) -> Row:
    values: dict[str, object] = {
        "source": "n1",
        "target": "n2",
        "pause": 50.0,
        "to_guest": 52.5,
        "from_guest": 51.25,
        "noise": 3.0,
        "card": 51.75,
        "card_noise": 1.5,
        "lost": 40,
        "duplicates": 0,
        "key": "frame",
        "blackout": 51.0,
        "silence": 50.5,
        "delivery": 0.8,
        "fdb_moves": 1,
        "misdelivered": 0,
        "accompanied": False,
    }
    return Row(**{**values, **changes})  # type: ignore[arg-type]


def test_what_a_migration_costs_is_the_longer_silence_without_qemu_s_pause_and_one_interval() -> None:
    assert row().excess == 1.5
    assert row(from_guest=60.0).excess == 9.0
    assert row(to_guest=50.2, from_guest=50.1).excess == 0.0, "a pause between two probes hides nothing else"
    assert row(pause=None).excess is None, "QEMU said nothing: there is no figure"


def test_noise_is_told_of_guests_that_stayed() -> None:
    assert row().idle == 2.0
    assert row(noise=None).idle is None


def test_at_the_card_counts_what_the_network_adds() -> None:
    assert row().at_card == 0.75
    assert row(card=50.5).at_card == 0.0
    assert row(card=None).at_card is None
    assert row().card_idle == 0.5


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile([float(number) for number in range(100)], 0.99) == 99.0
    assert percentile([float(number) for number in range(200)], 0.5) == 100.0


def test_a_summary_leaves_nothing_out() -> None:
    rows = [row(), row(to_guest=61.0, key="annotation", fdb_moves=2, noise=None, accompanied=True), row(duplicates=3)]
    found = summary(Series("plain", rows, resets=1))
    assert found["excess"] == {"p50": 1.5, "p99": 10.0, "max": 10.0}
    assert found["machine"] == {"p50": 2.0, "p99": 2.0, "max": 2.0}
    assert (found["duplicates"], found["resets"], found["accompanied"]) == (3, 1, 1)
    assert found["fdb_moves"] == {"1": 2, "2": 1}
    assert found["keys"] == {"annotation": 1, "frame": 2}
    assert [item["excess"] for item in found["rows"]] == [1.5, 10.0, 1.5]
    shown = "| 50.00 / 50.00 / 50.00 | 0.75 / 0.75 / 0.75 | 0.50 / 0.50 / 0.50 | 1.50 / 10.00 / 10.00 |"
    assert f"| plain | 3 (1 beside another) | 0 {shown}" in table([found])


def test_a_series_without_figures_says_so() -> None:
    assert "—" in table([summary(Series("plain", [row(pause=None)]))])
