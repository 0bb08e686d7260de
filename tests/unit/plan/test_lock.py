"""The tables of the lock as text; what they do to packets, tests/netns/test_lock.py shows."""

from dataclasses import replace

from vmnet.model import addresses, names
from vmnet.model.names import InterfaceName, MacAddress
from vmnet.plan import lock
from vmnet.plan.lock import Lock, OpenPort, Protocol
from vmnet.plan.state import Cgroup

KUBELET = Cgroup("system.slice/kubelet.service", 4711)
OWN = frozenset(addresses.address(text) for text in ("10.244.1.5", "fd00:10:244:1::5"))
POD = Lock("uid-a", InterfaceName("veth.a@1"), MacAddress("02:00:00:00:00:05"), OWN)


def test_a_node_without_such_pods_has_no_tables() -> None:
    assert lock.tables((), KUBELET) == ()


def test_an_opening_changes_elements_and_not_rules() -> None:
    opened = replace(POD, open=frozenset({OpenPort(Protocol.TCP, 80)}))
    closed, changed = lock.tables((POD,), KUBELET), lock.tables((opened,), KUBELET)
    assert [table.identity for table in closed] == [lock.NODE_TABLE, lock.VETH_TABLE]
    for before, after in zip(closed, changed, strict=True):
        lines = after.change(before).splitlines()
        assert {line.split(" ")[1] for line in lines} == {"chain", "element"}, lines
        assert [line for line in lines if line.startswith("add rule")] == []


def test_icmp_opens_echo_but_no_port() -> None:
    opened = replace(POD, open=frozenset({OpenPort(Protocol.ICMP)}))
    node, veths = lock.tables((opened,), KUBELET)
    assert node.sets["icmp4"].elements == {"10.244.1.5"}
    assert not node.sets["open4"].elements
    assert not veths.sets["open"].elements
    assert veths.sets["echoing"].elements == {'"veth.a@1"'}
    assert not lock.veth_table((POD,)).sets["echoing"].elements


def test_another_directory_of_the_same_path_makes_another_table() -> None:
    first, again = lock.node_table((POD,), KUBELET), lock.node_table((POD,), replace(KUBELET, inode=4712))
    assert 'socket cgroupv2 level 2 "system.slice/kubelet.service"' in first.whole()
    assert first.digest != again.digest
    assert "flush chain inet vmnet-lock local" in again.change(first)


def test_without_a_group_of_its_own_the_kubelet_is_root() -> None:
    assert "meta skuid 0 " in lock.node_table((POD,), None).whole()
    assert "skuid" not in lock.node_table((POD,), KUBELET).whole()


def test_chains_tell_which_veth_they_are_on() -> None:
    port = names.port_interface("uid-a", names.DEFAULT_INTERFACE)
    table = lock.veth_table((POD,))
    assert lock.devices(table.chains) == {port: "veth.a@1"}
    moved = lock.veth_table((replace(POD, device=InterfaceName("veth2")),))
    assert lock.devices(moved.chains) == {port: "veth2"}
    lines = moved.change(table).splitlines()
    inward, outward = lock.chains_of("uid-a", InterfaceName("veth.a@1"))
    for name in (inward, outward):
        # The kernel takes it away with the veth, or does not.
        made, flushed, deleted = (
            lines.index(f"{verb} chain {lock.VETH_TABLE} {name}") for verb in ("add", "flush", "delete")
        )
        assert made < flushed < deleted
    nowhere = replace(POD, device=None)
    assert [table.family for table in lock.tables((nowhere,), None)] == ["inet"]


def test_eth0_speaks_for_its_own_addresses_alone() -> None:
    table = lock.veth_table((POD,))
    inward, _ = lock.chains_of("uid-a", InterfaceName("veth.a@1"))
    assert table.chains[inward].rules[:2] == (
        "ether saddr != 02:00:00:00:00:05 drop",
        "ether type arp arp saddr ether != 02:00:00:00:00:05 drop",
    )
    assert table.sets["own4"].elements == {'"veth.a@1" . 10.244.1.5'}
    assert table.sets["own6"].elements == {'"veth.a@1" . fd00:10:244:1::5'}
    assert table.sets["links"].elements == {'"veth.a@1" . fe80::ff:fe00:5'}
    assert not table.sets["strangers"].elements
    stranger = lock.veth_table((replace(POD, mac=None),))
    assert not stranger.sets["links"].elements
    assert stranger.sets["strangers"].elements == {'"veth.a@1"'}


def test_a_pod_more_is_only_added() -> None:
    """What deletes or changes waits for every processor, and the pod would wait with it."""
    other = Lock("uid-b", InterfaceName("veth3"), MacAddress("02:00:00:00:00:06"), frozenset())
    lines = lock.veth_table((POD, other)).change(lock.veth_table((POD,))).splitlines()
    assert lines
    assert {line.split(" ")[0] for line in lines} == {"add"}
    made = [line.split(" ")[4] for line in lines if line.startswith("add chain ")]
    assert len(made) == len(set(made)), "a chain that is named twice is changed"


def test_who_asked_by_datagrams_is_remembered_for_each_pod() -> None:
    asked = replace(POD, open=frozenset({OpenPort(Protocol.UDP, 53), OpenPort(Protocol.TCP, 53)}))
    other = Lock("uid-b", InterfaceName("veth3"), None, OWN, frozenset({OpenPort(Protocol.TCP, 80)}))
    table = lock.veth_table((asked, other))
    port = names.port_interface("uid-a", names.DEFAULT_INTERFACE)
    assert {name for name in table.sets if name.startswith("asked")} == {f"asked4_{port}", f"asked6_{port}"}
    inward, outward = lock.chains_of("uid-a", InterfaceName("veth.a@1"))
    assert sum(f"@asked4_{port}" in rule for rule in table.chains[inward].rules) == 1
    assert sum(f"@asked4_{port}" in rule for rule in table.chains[outward].rules) == 1
