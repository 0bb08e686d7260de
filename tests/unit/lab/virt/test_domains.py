"""What the guest's agent says, as the instance's status has it."""

from vmnet.lab.virt.domains import parse_facts

ADDRESSES = """\
1: lo    inet 127.0.0.1/8 scope host lo\\       valid_lft forever preferred_lft forever
2: eth0    inet6 fd20:1234::4/128 scope global \\       valid_lft forever preferred_lft forever
2: eth0    inet 192.168.0.4/16 scope global eth0\\       valid_lft forever preferred_lft forever
3: eth1    inet 10.9.0.4/24 scope global eth1\\       valid_lft forever preferred_lft forever
"""


def test_ipv4_comes_first() -> None:
    facts = parse_facts("\n".join(ADDRESSES.splitlines()[1:]), "Linux 6.1.0-56-cloud-amd64 #1 SMP Debian x86_64\n")
    assert facts.of(0) == ("eth0", ("192.168.0.4", "fd20:1234::4"))
    assert facts.of(1) == ("eth1", ("10.9.0.4",))
    assert facts.os["kernelRelease"] == "6.1.0-56-cloud-amd64"
    assert facts.os["kernelVersion"] == "#1 SMP Debian"
    assert facts.os["machine"] == "x86_64"


def test_a_guest_without_addresses() -> None:
    assert parse_facts("", "").of(0) == ("eth0", ())
