# ruff: noqa: E501
from ipaddress import ip_address

from vmnet.kernel import connections

TEXT = """\
ipv4     2 tcp      6 431999 ESTABLISHED src=192.168.0.5 dst=172.30.0.100 sport=5 dport=80 src=172.30.0.100 dst=100.65.0.6 sport=80 dport=5 [ASSURED] mark=0 zone=0 use=2
ipv4     2 tcp      6 9 TIME_WAIT src=192.168.0.6 dst=172.30.0.100 sport=6 dport=80 src=172.30.0.100 dst=100.65.0.6 sport=80 dport=6 [ASSURED] mark=0 zone=0 use=2
ipv4     2 udp      17 29 src=192.168.0.7 dst=172.30.0.100 sport=7 dport=53 [UNREPLIED] src=172.30.0.100 dst=100.65.0.6 sport=53 dport=7 mark=0 zone=0 use=2
ipv6     10 tcp      6 300 ESTABLISHED src=fd20:0000:0000:0000:0000:0000:0000:0005 dst=fd00:0030:0000:0000:0000:0000:0000:0100 sport=5 dport=80 [UNREPLIED] src=fd00:0030:0000:0000:0000:0000:0000:0100 dst=fd99:0000:0000:0000:0000:0000:0000:0006 sport=80 dport=5 mark=0 zone=0 use=2
"""


def test_only_established_tcp_counts_with_all_its_ends() -> None:
    expected = {"192.168.0.5", "172.30.0.100", "100.65.0.6", "fd20::5", "fd00:30::100", "fd99::6"}
    assert connections.parse(TEXT) == {ip_address(text) for text in expected}


def test_nothing_and_nonsense_are_nobody_s_connections() -> None:
    assert connections.parse("") == frozenset()
    assert connections.parse("ipv4 2 tcp\n\n") == frozenset()
