from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_interface, ip_network

from vmnet.model import names
from vmnet.model.endpoint import Endpoint, LocalPort, Node, NodeNetwork, PodReference, PortState, RemoteEndpoint
from vmnet.model.names import InterfaceName, MacAddress, NamespaceName, NetworkId
from vmnet.model.network import Network, Role, Topology
from vmnet.plan import firewall, node, ops
from vmnet.plan import network as planner
from vmnet.plan.network import PodInterface
from vmnet.plan.state import FdbEntry, LinkState, NetworkState, NodeState

NETWORK = Network(name="n", id=NetworkId(7), subnets=(ip_network("192.168.0.0/16"), ip_network("fd20::/64")))
HERE, THERE = Node("n1", ip_address("172.30.0.11"), 1), Node("n2", ip_address("172.30.0.12"), 2)


def endpoint(host: int, where: str) -> Endpoint:
    return Endpoint(
        PodReference("ns", f"p{host}", f"uid-{host}-{where}"),
        "n",
        where,
        MacAddress(f"0a:58:c0:a8:00:{host:02x}"),
        (ip_interface(f"192.168.0.{host}/16"), ip_interface(f"fd20::{host}/64")),
    )


LOCAL, REMOTE = endpoint(11, "n1"), endpoint(12, "n2")
DESIRED = NodeNetwork(
    network=NETWORK,
    node=HERE,
    mtu=1450,
    join=node.allocate_join(NodeState(), NETWORK.id),
    ports=(LocalPort(LOCAL),),
    remotes=(RemoteEndpoint(REMOTE, THERE.address),),
    peers=(THERE.address,),
    routers=(THERE,),
)
POD = PodInterface("/run/netns/pod", "container")


def rendered() -> NetworkState:
    """What the kernel has once DESIRED is there."""

    def link(name: str, kind: str, *addresses: str, master: str | None = None) -> LinkState:
        found = frozenset(ip_interface(text) for text in addresses)
        up = LinkState(InterfaceName(name), MacAddress(""), 1450, up=True, kind=kind, addresses=found)
        return replace(up, master=InterfaceName(master) if master else None)

    join = DESIRED.join
    links = (
        link("br0", "bridge", "192.168.0.1/16", "fd20::1/64", "fe80::1/64"),
        link("vx0", "vxlan", master="br0"),
        link("rt0", "vxlan", "100.88.0.1/16", "fd97::1/64"),
        link("up0", "veth", str(join.network_ipv4), str(join.network_ipv6)),
        link(LOCAL.port, "veth", master="br0"),
    )
    return NetworkState(
        namespace=NETWORK.namespace,
        links={item.name: item for item in links},
        neighbours={address: item.mac for item in (LOCAL, REMOTE) for address in item.all_addresses},
        fdb=frozenset(
            {
                FdbEntry(LOCAL.mac, LOCAL.port, None, asserted=True),
                FdbEntry(REMOTE.mac, names.VXLAN_L2, THERE.address, asserted=True),
            }
        ),
        floods=frozenset({THERE.address}),
        routers={address.ip: THERE.router_mac for address in THERE.transit},
        tunnels={THERE.router_mac: THERE.address},
        default_routes=frozenset({4, 6}),
        chains=frozenset({"port_in", "port_out", "vx_in", "vx_out", *firewall.chains_of(LOCAL.port)}),
    )


def position(found: tuple[ops.Op, ...], kind: type, **values: object) -> int:
    return next(
        index
        for index, op in enumerate(found)
        if isinstance(op, kind) and all(getattr(op, key) == value for key, value in values.items())
    )


def test_nothing_to_do_when_it_is_there() -> None:
    assert planner.plan(DESIRED, rendered()) == ()


def test_the_tables_are_loaded_before_the_fabric_comes_up() -> None:
    found = planner.plan(replace(DESIRED, ports=()), None)
    assert isinstance(found[0], ops.CreateNamespace)
    assert position(found, ops.LoadFirewall) < position(found, ops.AttachToBridge, interface=names.VXLAN_L2)
    assert position(found, ops.CreateVxlan) < position(found, ops.LoadFirewall)


def test_a_port_is_bound_before_it_comes_up() -> None:
    found = planner.attach(DESIRED, LocalPort(LOCAL, PortState.STANDBY), POD, replace(rendered(), links={}))
    load, up = position(found, ops.LoadFirewall), position(found, ops.AttachToBridge)
    assert position(found, ops.CreatePort) < load < up
    script = found[load]
    assert isinstance(script, ops.LoadFirewall)
    assert f'standby {{ "{LOCAL.port}" }}' in script.script


def test_a_machine_that_starts_here_has_not_moved_away() -> None:
    moved = replace(rendered(), links={}, sets={"moved": frozenset({(LOCAL.mac,)})})
    active = [op for op in planner.attach(DESIRED, LocalPort(LOCAL), POD, moved) if isinstance(op, ops.LoadFirewall)]
    assert "delete element netdev vmnet moved" in active[-1].script
    standby = planner.attach(DESIRED, LocalPort(LOCAL, PortState.STANDBY), POD, moved)
    assert not any("moved" in op.script for op in standby if isinstance(op, ops.LoadFirewall))


def test_a_repeated_add_replaces_the_old_port() -> None:
    found = planner.attach(DESIRED, LocalPort(LOCAL), POD, rendered())
    assert position(found, ops.DeleteLink, interface=LOCAL.port) < position(found, ops.CreatePort)


def test_the_api_does_not_rewrite_the_place_of_a_machine_that_migrates() -> None:
    elsewhere = FdbEntry(REMOTE.mac, names.VXLAN_L2, IPv4Address("172.30.0.13"))
    state = replace(rendered(), fdb=frozenset({elsewhere, *(e for e in rendered().fdb if e.mac == LOCAL.mac)}))
    unsettled = replace(DESIRED, remotes=(RemoteEndpoint(REMOTE, THERE.address, settled=False),))
    assert planner.plan(unsettled, state) == ()
    assert planner.plan(DESIRED, state) == (
        ops.SetFdb(NETWORK.namespace, names.VXLAN_L2, REMOTE.mac, THERE.address),
    ), "once it is over, the API's word counts again"


def test_a_standby_port_leaves_the_entry_of_the_source_alone() -> None:
    twin = replace(REMOTE, node="n1", pod=PodReference("ns", "p12", "uid-12-n1"))
    desired = replace(DESIRED, ports=(LocalPort(LOCAL), LocalPort(twin, PortState.STANDBY)))
    state = rendered()
    state = replace(
        state,
        links={**state.links, twin.port: replace(state.links[LOCAL.port], name=twin.port)},
        chains=state.chains | set(firewall.chains_of(twin.port)),
        sets={"standby": frozenset({(str(twin.port),)})},
    )
    assert planner.plan(desired, state) == ()
    opened = replace(state, sets={**state.sets, "open": frozenset({(str(twin.port),)})})
    assert planner.plan(desired, opened) == (ops.SetFdb(NETWORK.namespace, twin.port, twin.mac),)


def test_what_is_no_longer_wanted_goes() -> None:
    found = planner.plan(replace(DESIRED, ports=(), remotes=(), peers=()), rendered())
    assert ops.DeleteLink(NETWORK.namespace, LOCAL.port) in found
    assert ops.RemoveFlood(NETWORK.namespace, names.VXLAN_L2, THERE.address) in found
    assert ops.RemoveFdb(NETWORK.namespace, names.VXLAN_L2, REMOTE.mac, THERE.address) in found
    assert {op.address for op in found if isinstance(op, ops.RemoveNeighbour)} == set(rendered().neighbours)


def test_a_port_that_lost_its_chains_is_bound_again() -> None:
    state = replace(rendered(), chains=frozenset({"port_in", "port_out", "vx_in", "vx_out"}))
    assert planner.plan(DESIRED, state) == (
        ops.LoadFirewall(NETWORK.namespace, firewall.port_script(LocalPort(LOCAL))),
    )


def over_rt0(found: tuple[ops.Op, ...]) -> tuple[ops.Op, ...]:
    return tuple(op for op in found if names.VXLAN_L3 in (getattr(op, "interface", ""), getattr(op, "name", "")))


def test_routers_meet_by_static_entries_alone() -> None:
    found = over_rt0(planner.plan(replace(DESIRED, ports=()), None))
    create = found[0]
    assert isinstance(create, ops.CreateVxlan)
    assert (create.vni, create.mac, create.learning) == (NETWORK.l3_vni, HERE.router_mac, False)
    # Entries vanish when a device goes down, so they come after it is up; and it is no port of the bridge.
    assert found[1:] == (
        ops.SetUp(NETWORK.namespace, names.VXLAN_L3),
        *(ops.AddAddress(NETWORK.namespace, names.VXLAN_L3, address) for address in HERE.transit),
        ops.SetTunnel(NETWORK.namespace, names.VXLAN_L3, THERE.router_mac, THERE.address),
        *(ops.SetNeighbour(NETWORK.namespace, names.VXLAN_L3, a.ip, THERE.router_mac) for a in THERE.transit),
    )


def test_there_is_no_router_to_router_segment_without_need_or_number() -> None:
    for desired in (
        replace(DESIRED, node=replace(HERE, number=None)),
        replace(DESIRED, network=replace(NETWORK, role=Role.SECONDARY)),
    ):
        assert over_rt0(planner.plan(desired, None)) == ()


def test_a_router_that_has_another_place_is_followed() -> None:
    moved = replace(THERE, address=ip_address("172.30.0.22"), number=9)
    found = planner.plan(replace(DESIRED, routers=(moved,)), rendered())
    assert ops.SetTunnel(NETWORK.namespace, names.VXLAN_L3, THERE.router_mac, moved.address) in found
    assert {op.address for op in found if isinstance(op, ops.SetNeighbour)} == {item.ip for item in moved.transit}
    assert {op.address for op in found if isinstance(op, ops.RemoveNeighbour)} == {item.ip for item in THERE.transit}
    assert len(found) == 5


def test_a_router_that_left_is_forgotten() -> None:
    found = planner.plan(replace(DESIRED, routers=()), rendered())
    assert set(found) == {
        *(ops.RemoveNeighbour(NETWORK.namespace, names.VXLAN_L3, item.ip) for item in THERE.transit),
        ops.RemoveTunnel(NETWORK.namespace, names.VXLAN_L3, THERE.router_mac, THERE.address),
    }


def test_a_node_that_got_another_number_has_its_addresses_alone() -> None:
    node_of_another_number = replace(HERE, number=5)
    found = planner.plan(replace(DESIRED, node=node_of_another_number), rendered())
    assert [op.address for op in found if isinstance(op, ops.AddAddress)] == list(node_of_another_number.transit)
    assert [op.address for op in found if isinstance(op, ops.RemoveAddress)] == list(HERE.transit)


ROUTED = Network(
    name="n",
    id=NetworkId(7),
    topology=Topology.LAYER3,
    subnets=(ip_network("103.103.0.0/16"), ip_network("fd20::/48")),
    host_prefixes=(24, 64),
)
PARTS = {
    "n1": (ip_network("103.103.1.0/24"), ip_network("fd20:0:0:1::/64")),
    "n2": (ip_network("103.103.2.0/24"), ip_network("fd20:0:0:2::/64")),
}
ROUTED_DESIRED = replace(
    DESIRED,
    network=ROUTED.at(PARTS["n1"]),
    ports=(),
    routers=(replace(THERE, subnets=(("n", PARTS["n2"]), ("other", (ip_network("10.0.0.0/24"),)))),),
)


def test_a_layer3_network_has_a_segment_of_its_own_and_routes_to_the_others() -> None:
    found = planner.plan(ROUTED_DESIRED, None)
    assert not any(names.VXLAN_L2 in (getattr(op, "interface", ""), getattr(op, "name", "")) for op in found)
    assert not any("vx_in" in op.script for op in found if isinstance(op, ops.LoadFirewall))
    assert not any(isinstance(op, ops.AddFlood | ops.SetFdb) for op in found), "nothing is replicated to other nodes"
    assert [str(op.address) for op in found if isinstance(op, ops.AddAddress) and op.interface == names.BRIDGE] == [
        "103.103.1.1/24",
        "fd20:0:0:1::1/64",
        "fe80::1/64",
    ]
    assert {op.destination: op.gateway for op in found if isinstance(op, ops.SetRoute)} == {
        ip_network("103.103.0.0/16"): None,
        ip_network("fd20::/48"): None,
        PARTS["n2"][0]: ip_address("100.88.0.2"),
        PARTS["n2"][1]: ip_address("fd97::2"),
    }
    assert position(found, ops.SetUp, interface=names.VXLAN_L3) < position(found, ops.SetRoute)


def test_the_gateway_of_a_layer3_network_has_the_same_mac_everywhere() -> None:
    macs = {ROUTED.at(parts).gateway_mac for parts in (*PARTS.values(), ())}
    assert len(macs) == 1


def test_routes_follow_the_nodes_parts() -> None:
    state = replace(
        rendered(),
        routes={
            ip_network("103.103.0.0/16"): None,
            ip_network("fd20::/48"): None,
            PARTS["n2"][0]: ip_address("100.88.0.9"),
            ip_network("103.103.9.0/24"): ip_address("100.88.0.2"),
        },
    )
    found = [op for op in planner.plan(ROUTED_DESIRED, state) if isinstance(op, ops.SetRoute | ops.RemoveRoute)]
    assert found == [
        ops.RemoveRoute(NETWORK.namespace, names.VXLAN_L3, ip_network("103.103.9.0/24"), ip_address("100.88.0.2")),
        ops.SetRoute(NETWORK.namespace, names.VXLAN_L3, PARTS["n2"][0], ip_address("100.88.0.2")),
        ops.SetRoute(NETWORK.namespace, names.VXLAN_L3, PARTS["n2"][1], ip_address("fd97::2")),
    ]


def test_a_node_without_a_part_reaches_the_others() -> None:
    """For a NodePort: no endpoint is there."""
    found = planner.plan(replace(ROUTED_DESIRED, network=ROUTED), None)
    assert [str(op.address) for op in found if isinstance(op, ops.AddAddress) and op.interface == names.BRIDGE] == [
        "fe80::1/64"
    ]
    assert sum(isinstance(op, ops.SetRoute) for op in found) == 4


def test_a_node_with_another_part_gives_up_the_former_one() -> None:
    state = rendered()
    bridge = replace(state.links[names.BRIDGE], addresses=frozenset({ip_interface("103.103.7.1/24")}))
    found = planner.plan(ROUTED_DESIRED, replace(state, links={**state.links, names.BRIDGE: bridge}))
    assert ops.RemoveAddress(NETWORK.namespace, names.BRIDGE, ip_interface("103.103.7.1/24")) in found


def test_a_secondary_layer3_network_is_reached_by_routes_and_leads_nowhere_else() -> None:
    secondary = replace(ROUTED_DESIRED, network=replace(ROUTED_DESIRED.network, role=Role.SECONDARY))
    found = planner.plan(secondary, None)
    assert not any(isinstance(op, ops.CreateJoin | ops.AddDefaultRoute) for op in found)
    assert sum(isinstance(op, ops.SetRoute) for op in found) == 4
    endpoint = replace(
        LOCAL,
        interface=InterfaceName("net1"),
        addresses=(ip_interface("103.103.1.9/24"), ip_interface("fd20:0:0:1::9/64")),
    )
    configure = planner.attach(secondary, LocalPort(endpoint), POD, rendered())[-1]
    assert isinstance(configure, ops.ConfigurePod)
    assert configure.gateways == ()
    assert configure.routes == (
        (ip_network("103.103.0.0/16"), ip_address("103.103.1.1")),
        (ip_network("fd20::/48"), ip_address("fd20:0:0:1::1")),
    )


# Networks without a router

SWITCHED = replace(NETWORK, role=Role.SECONDARY)
SWITCHED_DESIRED = replace(DESIRED, network=SWITCHED, routers=())


def test_a_switched_network_has_neither_gateway_nor_join_nor_translation() -> None:
    found = planner.plan(SWITCHED_DESIRED, None)
    assert not any(isinstance(op, ops.CreateJoin | ops.AddDefaultRoute | ops.AddAddress) for op in found)
    assert [op.name for op in found if isinstance(op, ops.CreateVxlan)] == [names.VXLAN_L2]
    sysctls = {key: value for op in found if isinstance(op, ops.SetSysctls) for key, value in op.values}
    assert (sysctls["net/ipv4/ip_forward"], sysctls["net/ipv6/conf/all/forwarding"]) == ("0", "0")
    (script,) = (op.script for op in found if isinstance(op, ops.LoadFirewall))
    assert "table inet" not in script
    assert "snat" not in script
    assert "udp dport { 67, 547 } drop" in script, "each node answers its own machines"


def test_a_switched_network_that_is_there_needs_nothing() -> None:
    state = rendered()
    links = {
        name: replace(link, addresses=frozenset())
        for name, link in state.links.items()
        if name not in (names.UPLINK, names.VXLAN_L3)
    }
    state = replace(state, links=links, default_routes=frozenset(), routers={}, tunnels={})
    assert planner.plan(SWITCHED_DESIRED, state) == ()


def test_a_secondary_interface_leaves_the_pod_s_default_routes_alone() -> None:
    endpoint = replace(LOCAL, interface=InterfaceName("net1"))
    found = planner.attach(SWITCHED_DESIRED, LocalPort(endpoint), POD, NetworkState(NETWORK.namespace))
    configure = found[-1]
    assert isinstance(configure, ops.ConfigurePod)
    assert (configure.gateways, configure.default_addresses, configure.routes) == ((), (), ())
    (created,) = (op for op in found if isinstance(op, ops.CreatePort))
    assert created.alias == "container/net1"
    link = LinkState(created.port, MacAddress(""), 1450, up=True, alias=created.alias)
    assert planner.owner_of(link) == ("container", "net1")


def test_without_ipam_a_port_is_bound_to_its_mac() -> None:
    bare = replace(SWITCHED_DESIRED, network=replace(SWITCHED, subnets=()))
    (script,) = (op.script for op in planner.plan(bare, None) if isinstance(op, ops.LoadFirewall))
    assert "iifname . ether saddr @bind goto bound4" in script
    assert "@bind4" not in script
    assert "udp sport 67 drop" in script, "a DHCP server is nobody's to be, with or without IPAM"
    assert "udp dport { 67, 547 } drop" not in script, "but asking one elsewhere is everybody's"
    port = replace(LOCAL, addresses=())
    rules = firewall.port_script(LocalPort(port))
    assert f'add element netdev vmnet bind {{ "{port.port}" . {port.mac} }}' in rules
    assert "bind4" not in rules


LOCALNET = replace(
    SWITCHED_DESIRED,
    network=replace(SWITCHED, topology=Topology.LOCALNET, physical="physnet", vlan=100),
    remotes=(),
    peers=(),
    bridge=InterfaceName("phys0"),
    bridge_mtu=9000,
)


def test_a_localnet_network_leads_into_the_node_s_bridge() -> None:
    found = planner.plan(LOCALNET, None)
    assert not any(isinstance(op, ops.CreateVxlan) for op in found)
    assert (
        ops.CreateLocalnet(NETWORK.namespace, InterfaceName("vml7"), names.VXLAN_L2, InterfaceName("phys0"), 9000, 100)
        in found
    )
    assert ops.AttachToBridge(NETWORK.namespace, names.VXLAN_L2, names.BRIDGE, neigh_suppress=False) in found
    assert not any(op.hairpin for op in found if isinstance(op, ops.AttachToBridge)), "the way out gives nothing back"
    (opened_port,) = (
        op
        for op in planner.attach(LOCALNET, LocalPort(LOCAL), POD, NetworkState(NETWORK.namespace))
        if isinstance(op, ops.AttachToBridge)
    )
    assert not opened_port.hairpin, "there are no services to come back from"
    created = position(found, ops.CreateLocalnet)
    secured = position(found, ops.LoadFirewall)
    opened = position(found, ops.AttachToBridge, interface=names.VXLAN_L2)
    assert created < secured < opened


def test_what_operations_take_away_is_counted_by_kind() -> None:
    namespace, port = NamespaceName("vmnet-7"), InterfaceName("p1")
    script = 'add element netdev vmnet bind { "p1" }\ndelete element netdev vmnet bind4 { "p1" . a, "p2" . b }\n'
    found: list[ops.Op] = [
        ops.DeleteLink(namespace, port),
        ops.LoadFirewall(namespace, script),
        ops.LoadFirewall(namespace, "add table inet vmnet-x\ndelete table inet vmnet-x\n"),
        ops.LoadFirewall(namespace, "add table inet vmnet-x\ndelete table inet vmnet-x\nadd table inet vmnet-x\n"),
    ]
    assert planner.removed(found) == {"link": 1, "element": 2, "table": 1}
