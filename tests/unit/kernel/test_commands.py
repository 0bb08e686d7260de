from ipaddress import ip_address, ip_interface, ip_network

from vmnet.kernel import commands
from vmnet.kernel.commands import Batch, Call, Step, render
from vmnet.model import names
from vmnet.model.names import InterfaceName, MacAddress, NamespaceName
from vmnet.plan import ops

NAMESPACE = NamespaceName("vmnet-7")
MAC = MacAddress("0a:58:c0:a8:00:05")


def lines(op: ops.Op) -> list[str]:
    return [line for step in commands.render(op) if isinstance(step, Step) for line in (*step.may_fail, *step.lines)]


def test_fdb_entries_do_not_age_and_can_be_moved() -> None:
    remote = lines(ops.SetFdb(NAMESPACE, InterfaceName("vx0"), MAC, ip_address("172.30.0.12")))
    assert remote == [
        f"fdb replace {MAC} dev vx0 master dynamic extern_learn",
        f"fdb replace {MAC} dev vx0 self dst 172.30.0.12 dynamic extern_learn",
    ]
    assert all("permanent" not in line for line in remote)


def test_the_vtep_is_made_in_the_node_and_moved() -> None:
    op = ops.CreateVxlan(NAMESPACE, InterfaceName("vx0"), 7, ip_address("172.30.0.11"), 1450)
    steps = commands.render(op)
    assert [step.netns for step in steps if isinstance(step, Step)] == [None, None, "/run/netns/vmnet-7"]
    made, moved, inside = lines(op)[1:]
    assert made.endswith("id 7 local 172.30.0.11 dstport 4789 learning")
    assert moved.endswith("netns /run/netns/vmnet-7 name vx0")
    assert inside == "link set dev vx0 addrgenmode none"


def test_a_neighbour_that_is_not_there_does_not_end_a_batch() -> None:
    made, deleted = lines(ops.RemoveNeighbour(NAMESPACE, InterfaceName("br0"), ip_address("192.168.0.5")))
    assert made.startswith("neigh replace 192.168.0.5 ")
    assert deleted == "neigh del 192.168.0.5 dev br0"


def test_steps_of_one_program_and_namespace_go_together() -> None:
    one = ops.SetUp(NAMESPACE, InterfaceName("br0"))
    two = ops.SetUp(NAMESPACE, InterfaceName("up0"))
    other = ops.SetUp(None, InterfaceName("vmj7"))
    first, second, third = (commands.render(op)[0] for op in (one, two, other))
    assert isinstance(first, Step)
    assert isinstance(second, Step)
    assert isinstance(third, Step)
    batch = Batch.of(first, one)
    assert batch.takes(second)
    assert not batch.takes(third)
    batch.add(second, two)
    assert (batch.step.netns, batch.argv()) == ("/run/netns/vmnet-7", ["ip", "-batch", "-"])
    assert batch.script() == "link set dev br0 up\nlink set dev up0 up\n"
    assert batch.blame('Cannot find device "up0"\nCommand failed -:2\n') == (two, 'Cannot find device "up0"')


def test_replies_of_eth0_leave_by_eth0() -> None:
    op = ops.ConfigurePod(
        "/run/netns/pod",
        InterfaceName("ovn-udn1"),
        InterfaceName("eth0"),
        (ip_interface("192.168.0.5/16"),),
        (ip_address("192.168.0.1"),),
        ((ip_interface("10.244.1.2/24"), ip_address("10.244.1.1")),),
    )
    found = lines(op)
    assert "rule add from 10.244.1.2 lookup 100" in found
    assert "route replace 0.0.0.0/0 via 10.244.1.1 dev eth0 table 100" in found
    assert found.index("route del 0.0.0.0/0 dev eth0") < found.index(
        "route replace 0.0.0.0/0 via 192.168.0.1 dev ovn-udn1"
    )


def test_what_may_be_missing_goes_along_and_is_not_blamed() -> None:
    """One run: the lines that go first may fail, the others may not."""
    op = ops.SetUp(NAMESPACE, InterfaceName("br0"))
    batch = Batch.of(Step(("ip", "-batch", "-"), None, ("rule add b",), may_fail=("rule del a", "rule del b")), op)
    assert batch.argv() == ["ip", "-force", "-batch", "-"]
    assert batch.script() == "rule del a\nrule del b\nrule add b\n"
    missing = (
        "RTNETLINK answers: No such file\nCommand failed -:1\nRTNETLINK answers: No such file\nCommand failed -:2\n"
    )
    assert batch.blame(missing) is None
    assert batch.blame(f"{missing}RTNETLINK answers: File exists\nCommand failed -:3\n") == (
        op,
        "RTNETLINK answers: File exists",
    )
    assert batch.blame("ip: no memory\n") == (op, "ip: no memory"), "the program itself"
    assert not batch.takes(Step(("ip", "-batch", "-"), None, ("rule add c",)))


def test_what_the_programs_say_is_told_apart() -> None:
    assert commands.is_gone('Cannot find device "br0"')
    assert commands.is_unsupported("RTNETLINK answers: Operation not supported")
    assert not commands.is_gone("RTNETLINK answers: File exists")


def test_what_a_secondary_network_leads_to_is_a_route_by_its_interface() -> None:
    op = ops.ConfigurePod(
        "/run/netns/pod",
        InterfaceName("net1"),
        InterfaceName("eth0"),
        (ip_interface("203.203.4.5/24"),),
        (),
        routes=((ip_network("203.203.0.0/16"), ip_address("203.203.4.1")),),
    )
    found = lines(op)
    assert found[-1] == "route replace 203.203.0.0/16 via 203.203.4.1 dev net1"
    assert not any("eth0" in line or "route del" in line for line in found)


def test_a_secondary_interface_takes_no_route_of_eth0() -> None:
    net1, eth0 = InterfaceName("net1"), InterfaceName("eth0")
    op = ops.ConfigurePod("/run/netns/pod", net1, eth0, (ip_interface("10.0.0.5/24"),), ())
    assert lines(op) == ["link set dev net1 up", "addr replace 10.0.0.5/24 dev net1"]
    bare = ops.ConfigurePod("/run/netns/pod", net1, eth0, (), ())
    assert lines(bare) == ["link set dev net1 up"]


def test_a_localnet_port_is_untagged_in_its_vlan_before_it_comes_up() -> None:
    op = ops.CreateLocalnet(NAMESPACE, InterfaceName("vml7"), InterfaceName("vx0"), InterfaceName("phys0"), 1500, 100)
    found = lines(op)
    assert found[0] == "link del dev vml7"
    assert found[1].endswith("peer name vx0-new mtu 1500 netns /run/netns/vmnet-7")
    assert "link set dev vml7 master phys0" in found
    assert found[4:] == [
        "vlan del dev vml7 vid 1",
        "vlan add dev vml7 vid 100 pvid untagged",
        "link set dev vml7 up",
        "link set dev vx0-new addrgenmode none",
        "link set dev vx0-new name vx0",
    ], "the name comes last"
    plain = ops.CreateLocalnet(NAMESPACE, InterfaceName("vml7"), InterfaceName("vx0"), InterfaceName("phys0"), 1500)
    assert not any(line.startswith("vlan") for line in lines(plain))


def test_only_a_pod_s_port_gives_frames_back() -> None:
    """Two bridges that do it to each other make a loop."""
    port = lines(ops.AttachToBridge(NAMESPACE, InterfaceName("p0"), InterfaceName("br0"), hairpin=True))
    assert any("neigh_suppress off hairpin on" in line for line in port)
    for suppress, said in ((True, "on"), (False, "off")):
        fabric = lines(ops.AttachToBridge(NAMESPACE, InterfaceName("vx0"), InterfaceName("br0"), suppress))
        assert any(f"neigh_suppress {said} hairpin off" in line for line in fabric)


def test_a_gateway_that_nobody_told_is_taken_from_the_pods_own_route() -> None:
    """Before that route is deleted, and only then: a program more for each pod."""
    address, hop = ip_interface("10.9.0.5/32"), ip_address("169.254.1.1")
    told, untold = (
        render(
            ops.ConfigurePod(
                "/run/netns/pod",
                names.PRIMARY_INTERFACE,
                names.DEFAULT_INTERFACE,
                (ip_interface("10.20.0.5/16"),),
                (ip_address("10.20.0.1"),),
                ((address, via),),
            )
        )
        for via in (hop, None)
    )
    assert [isinstance(step, Call) for step in told] == [True, False]
    assert [isinstance(step, Call) for step in untold] == [True, True, False]
    assert any("table 100" in line for step in told if isinstance(step, Step) for line in step.lines)
