import pytest

from vmnet.lab.bench import cards
from vmnet.lab.bench.cards import Delivery

TEXT = """\
tcpdump: data link type LINUX_SLL2
listening on any, link-type LINUX_SLL2 (Linux cooked v2), snapshot length 262144 bytes
1795531347.747000100 p3f2a Out IP 192.168.0.9.4444 > 192.168.0.4.7007: UDP, length 16
1795531347.748000100 vxlan-l2 Out IP 192.168.0.9.4444 > 192.168.0.4.7007: UDP, length 16
1795531347.749500100 p77bc Out IP 192.168.0.9.4445 > 192.168.0.3.7007: UDP, length 16
3 packets captured
0 packets dropped by kernel
"""


def test_lines_of_tcpdump_tell_when_a_probe_left_by_which_port() -> None:
    found = cards.deliveries(TEXT)
    assert [(item.interface, item.address) for item in found] == [
        ("p3f2a", "192.168.0.4"),
        ("vxlan-l2", "192.168.0.4"),
        ("p77bc", "192.168.0.3"),
    ]
    assert [item.interface for item in cards.at_ports(found, "192.168.0.4", {"p3f2a", "p77bc"})] == ["p3f2a"]


def test_what_reaches_the_source_after_its_guest_stopped_reaches_nobody() -> None:
    source = [Delivery(at, "p1", "a") for at in (10.000, 10.001, 10.002)]
    target = [Delivery(at, "p2", "a") for at in (10.052, 10.053)]
    assert cards.gap(source, target, 10.0015) == pytest.approx(51.0)
    assert cards.gap(source, target, 9.0) is None
    assert cards.gap(source, [], 10.0015) is None


def test_the_longest_time_between_two() -> None:
    assert cards.longest([Delivery(at, "p1", "a") for at in (1.0, 1.004, 1.005)]) == pytest.approx(4.0)
    assert cards.longest([]) is None
