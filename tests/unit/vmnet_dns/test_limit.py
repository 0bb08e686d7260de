from vmnet_dns.limit import CLIENTS, ClientLimit


def test_a_burst_then_the_rate_per_client() -> None:
    limit = ClientLimit(rate=10, burst=5)
    assert [limit.allows("red", 0.0) for _ in range(6)] == [True] * 5 + [False]
    assert limit.allows("blue", 0.0)
    assert limit.allows("red", 0.11)
    assert not limit.allows("red", 0.11)
    assert [limit.allows("red", 100.0) for _ in range(6)] == [True] * 5 + [False]


def test_a_quiet_client_gets_twice_the_burst_at_most() -> None:
    limit = ClientLimit(rate=10, burst=5)
    assert limit.allows("red", 0.0)
    assert sum(limit.allows("red", 100.0) for _ in range(20)) == 9


def test_memory_is_bounded() -> None:
    limit = ClientLimit(rate=1, burst=1)
    for number in range(CLIENTS + 100):
        limit.allows(str(number), 0.0)
    assert len(limit.buckets) == CLIENTS
    assert limit.allows("0", 0.0)
    assert not limit.allows(str(CLIENTS + 99), 0.0)
