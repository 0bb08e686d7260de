from vmnet.lab.bench.dns_fuzz import run


def test_some_thousands_of_damaged_messages_do_no_harm() -> None:
    counts = run(20_000, seed=20261123)
    assert counts.total() == 20_000
    # Every way through was taken.
    assert {"query local", "query kept", "query forward", "query malformed", "query refused"} <= counts.keys()
    assert {"response taken", "response refused", "response truncated"} <= counts.keys()


def test_inputs_follow_from_the_seed() -> None:
    assert run(500, seed=1) == run(500, seed=1) != run(500, seed=2)
