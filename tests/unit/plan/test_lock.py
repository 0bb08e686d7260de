"""The tables of the lock as text; what they do to packets, tests/netns/test_lock.py shows."""

from dataclasses import replace

import pytest

from vmnet.model import addresses
from vmnet.model.names import InterfaceName, MacAddress
from vmnet.plan import lock
from vmnet.plan.lock import Lock, OpenPort, Protocol
from vmnet.plan.state import Cgroup
from vmnet.plan.table import device_of

KUBELET = Cgroup("system.slice/kubelet.service", 4711)
OWN = frozenset(addresses.address(text) for text in ("10.244.1.5", "fd00:10:244:1::5"))
POD = Lock("uid-a", InterfaceName("veth.a@1"), MacAddress("02:00:00:00:00:05"), OWN)


def test_a_node_without_such_pods_has_no_tables() -> None:
    assert lock.tables((), KUBELET) == ()


def test_an_opening_changes_elements_and_not_rules() -> None:
    opened = replace(POD, open=frozenset({OpenPort(Protocol.TCP, 80)}))
    closed, changed = lock.tables((POD,), KUBELET), lock.tables((opened,), KUBELET)
    assert [table.identity for table in closed] == ["inet vmnet-lock", lock.identity_of("uid-a")]
    for before, after in zip(closed, changed, strict=True):
        lines = after.change(before).splitlines()
        assert {line.split(" ")[1] for line in lines} == {"chain", "element"}, lines
        assert [line for line in lines if line.startswith("add rule")] == []


def test_icmp_opens_echo_but_no_port() -> None:
    opened = replace(POD, open=frozenset({OpenPort(Protocol.ICMP)}))
    node, own = lock.tables((opened,), KUBELET)
    assert node.sets["icmp4"].elements == {"10.244.1.5"}
    assert not node.sets["open4"].elements
    assert not own.sets["open"].elements
    assert any("echo-request" in rule for rule in own.chains["to4"].rules)
    assert not any("echo-request" in rule for rule in lock.pod_table(POD).chains["to4"].rules)


def test_another_directory_of_the_same_path_makes_another_table() -> None:
    first, again = lock.node_table((POD,), KUBELET), lock.node_table((POD,), replace(KUBELET, inode=4712))
    assert 'socket cgroupv2 level 2 "system.slice/kubelet.service"' in first.whole()
    assert first.digest != again.digest
    assert "flush chain inet vmnet-lock local" in again.change(first)


def test_without_a_group_of_its_own_the_kubelet_is_root() -> None:
    assert "meta skuid 0 " in lock.node_table((POD,), None).whole()
    assert "skuid" not in lock.node_table((POD,), KUBELET).whole()


def test_the_table_of_a_veth_tells_which_one() -> None:
    text = lock.pod_table(POD).whole()
    chains = [line.split()[4] for line in text.splitlines() if line.startswith("add chain ")]
    assert [found for chain in chains if (found := device_of(chain))] == ["veth.a@1"]
    moved = replace(POD, device=InterfaceName("veth2"))
    assert lock.pod_table(moved).change(lock.pod_table(POD)).startswith("add table")
    with pytest.raises(ValueError, match="no veth"):
        lock.pod_table(replace(POD, device=None))
    assert [table.family for table in lock.tables((replace(POD, device=None),), None)] == ["inet"]


def test_eth0_speaks_for_its_own_addresses_alone() -> None:
    table = lock.pod_table(POD)
    assert table.chains["ingress"].rules[0] == "ether saddr != 02:00:00:00:00:05 drop"
    assert table.chains["from4"].rules[0] == "ip saddr != { 10.244.1.5 } drop"
    assert table.chains["from_arp"].rules[:2] == (
        "arp saddr ether != 02:00:00:00:00:05 drop",
        "arp saddr ip { 10.244.1.5, 0.0.0.0 } accept",
    )
    only6 = replace(POD, addresses=frozenset(item for item in OWN if item.version == 6))
    assert lock.pod_table(only6).chains["from4"].rules[0] == "drop"
