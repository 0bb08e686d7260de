from dataclasses import replace
from ipaddress import ip_address, ip_network

from vmnet.model.endpoint import Home, Node, NodeNetwork
from vmnet.model.names import NetworkId
from vmnet.model.network import Network
from vmnet.plan import edge, node, ops
from vmnet.plan.state import NetworkState, NodeState

NETWORK = Network("n", NetworkId(7), subnets=(ip_network("192.168.0.0/16"), ip_network("fd20::/64")), persistent=True)
N1, N2 = Node("n1", ip_address("172.30.0.11"), 1), Node("n2", ip_address("172.30.0.12"), 2)
DESIRED = NodeNetwork(
    network=NETWORK,
    node=N2,
    mtu=1450,
    join=node.allocate_join(NodeState(), NETWORK.id),
    homes=(Home(ip_address("192.168.0.5"), N1), Home(ip_address("fd20::5"), N1)),
)


def test_the_middle_of_an_unknown_connection_is_marked_with_its_machine_s_home() -> None:
    (table,) = edge.tables(DESIRED)
    assert table.sets["home4"].elements == {"192.168.0.5": "0x1000001"}
    assert table.sets["home6"].elements == {"fd20::5": "0x1000001"}
    assert table.sets["inside4"].elements == {"192.168.0.0/16", "100.88.0.0/16"}
    middle, marked = table.chains["prerouting"].rules
    assert middle == "ct state new tcp flags & (syn | rst) == 0x0 jump middle"
    assert marked == "ct mark & 0xff000000 == 0x1000000 jump marked"
    assert "ip daddr != @inside4 ct mark set ip saddr map @home4" in table.chains["middle"].rules
    assert table.chains["marked"].rules == (
        "ip saddr @own4 meta mark set ct mark",
        "ip6 saddr @own6 meta mark set ct mark",
    )


def test_marks_of_earlier_homes_are_honoured_where_no_machine_is_at_home() -> None:
    (table,) = edge.tables(replace(DESIRED, homes=()))
    assert table.sets["home4"].elements == {}
    assert any("meta mark set ct mark" in rule for rule in table.chains["marked"].rules)


def test_a_network_whose_machines_do_not_keep_their_addresses_has_no_table() -> None:
    assert edge.tables(replace(DESIRED, network=replace(NETWORK, persistent=False))) == ()


def test_every_home_has_one_way_and_keeps_it() -> None:
    state = NetworkState(NETWORK.namespace)
    (route,) = edge.routes(DESIRED, state)
    assert route == ops.SetHomeRoute(
        NETWORK.namespace, "rt0", 0x1000001, (ip_address("100.88.0.1"), ip_address("fd97::1"))
    )
    assert list(edge.routes(DESIRED, replace(state, homes=frozenset({0x1000001})))) == []
    assert list(edge.routes(replace(DESIRED, homes=()), replace(state, homes=frozenset({0x1000001})))) == []


def test_an_earlier_home_has_one_too() -> None:
    state = NetworkState(NETWORK.namespace, homes=frozenset({0x1000001}))
    (route,) = edge.routes(replace(DESIRED, former=(replace(N2, number=3), N1)), state)
    assert route == ops.SetHomeRoute(
        NETWORK.namespace, "rt0", 0x1000003, (ip_address("100.88.0.3"), ip_address("fd97::3"))
    )


def test_a_node_without_a_number_is_nobody_s_home() -> None:
    nameless = replace(DESIRED, homes=(Home(ip_address("192.168.0.5"), replace(N1, number=None)),))
    assert edge.tables(nameless)[0].sets["home4"].elements == {}
    assert list(edge.routes(nameless, NetworkState(NETWORK.namespace))) == []
