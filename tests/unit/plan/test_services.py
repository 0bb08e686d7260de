from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

from vmnet.model.endpoint import Endpoint, LocalPort, Node, NodeNetwork, PodReference
from vmnet.model.names import MacAddress, NetworkId
from vmnet.model.network import Network
from vmnet.model.service import Backend, Service, ServicePort
from vmnet.plan import node as node_plan
from vmnet.plan import services
from vmnet.plan.state import NodeState
from vmnet.plan.table import Table

NETWORK = Network("n", NetworkId(7), subnets=(ip_network("192.168.0.0/16"), ip_network("fd20::/64")))
N1 = Node("n1", ip_address("172.30.0.11"), 1)
POD = Endpoint(
    PodReference("red", "web-0", "uid"), "n", "n1", MacAddress("0a:58:c0:a8:00:05"), (ip_interface("192.168.0.5/16"),)
)
DESIRED = NodeNetwork(
    network=NETWORK,
    node=N1,
    mtu=1450,
    join=node_plan.allocate_join(NodeState(), NETWORK.id),
    ports=(LocalPort(POD),),
)
HERE, THERE = Backend(ip_address("192.168.0.5"), 8080, "n1"), Backend(ip_address("192.168.0.6"), 8080, "n2")
SIX = Backend(ip_address("fd20::6"), 8080, "n2")
WEB = Service(
    "red",
    "web",
    (ip_address("10.96.0.7"), ip_address("fd00:96::7")),
    (ServicePort("http", "tcp", 80, 30080, (HERE, THERE, SIX)),),
)


def table(*found: Service, refused: tuple[str, ...] = ()) -> Table:
    (made,) = services.network_tables(DESIRED, found, map(ip_address, refused))
    return made


def elements(made: Table, name: str) -> dict[str, str]:
    found = made.sets[name].elements
    assert isinstance(found, dict)
    return found


def chain(made: Table, verdict: str) -> tuple[str, ...]:
    return made.chains[verdict.removeprefix("goto ")].rules


def test_a_cluster_address_leads_to_a_choice_of_its_family_s_backends() -> None:
    made = table(WEB)
    assert made.bridged
    assert chain(made, elements(made, "inside4")["10.96.0.7 . tcp . 80"]) == (
        "meta l4proto tcp dnat ip to numgen random mod 2 map { 0 : 192.168.0.5 . 8080, 1 : 192.168.0.6 . 8080 }",
    )
    assert chain(made, elements(made, "inside6")["fd00:96::7 . tcp . 80"]) == (
        "meta l4proto tcp dnat ip6 to [fd20::6]:8080",
    )


def test_a_pod_that_is_its_own_backend_gets_the_gateway_s_address() -> None:
    made = table(WEB)
    assert made.sets["hairpins4"].elements == {"192.168.0.5 . 192.168.0.5"}, "only this node's"
    assert any("@hairpins4 snat ip to 192.168.0.1" in rule for rule in made.chains["postrouting"].rules)


def test_what_enters_gets_this_node_s_transit_address_and_every_backend() -> None:
    made = table(WEB)
    assert chain(made, elements(made, "entering4")["tcp . 30080"])[-1].count("192.168.0.") == 2
    (transit,) = [rule for rule in made.chains["postrouting"].rules if "100.88.0.1" in rule]
    assert transit.startswith('iifname "up0" oifname != "up0" ct status dnat meta mark != 0x10')


def test_external_policy_local_has_this_node_s_backends_and_keeps_the_client() -> None:
    made = table(replace(WEB, external_local=True))
    mark, choice = chain(made, elements(made, "entering4")["tcp . 30080"])
    assert mark == "meta mark set 0x10"
    assert chain(made, choice) == ("meta l4proto tcp dnat ip to 192.168.0.5:8080",)
    assert elements(made, "entering6")["tcp . 30080"] == "drop", "no backend of the family here"
    # Whom the policy is not for: pods and nodes, who could use the cluster address.
    assert elements(made, "through4")["tcp . 30080"] == elements(made, "inside4")["10.96.0.7 . tcp . 80"]
    assert elements(made, "through6")["tcp . 30080"] == elements(made, "inside6")["fd00:96::7 . tcp . 80"]
    through, entering = (
        next(i for i, rule in enumerate(made.chains["prerouting"].rules) if rule.endswith(f"vmap @{name}4"))
        for name in ("through", "entering")
    )
    assert through < entering


def test_internal_policy_local_has_this_node_s_backends_and_is_for_the_cluster_address_alone() -> None:
    made = table(replace(WEB, internal_local=True, external=(ip_address("172.30.0.200"), ip_address("fd00:30::200"))))
    inside4, inside6 = elements(made, "inside4"), elements(made, "inside6")
    assert chain(made, inside4["10.96.0.7 . tcp . 80"]) == ("meta l4proto tcp dnat ip to 192.168.0.5:8080",)
    assert inside6["fd00:96::7 . tcp . 80"] == "drop", "others have one: to be tried again"
    assert "192.168.0.6" in chain(made, inside4["172.30.0.200 . tcp . 80"])[0]
    assert "fd20::6" in chain(made, inside6["fd00:30::200 . tcp . 80"])[0]


def test_a_policy_local_takes_one_that_ends_before_it_goes_without() -> None:
    port = replace(WEB.ports[0], backends=(THERE,), ending=(HERE,))
    made = table(replace(WEB, ports=(port,), internal_local=True, external_local=True))
    here = ("meta l4proto tcp dnat ip to 192.168.0.5:8080",)
    assert chain(made, elements(made, "inside4")["10.96.0.7 . tcp . 80"]) == here
    assert chain(made, chain(made, elements(made, "entering4")["tcp . 30080"])[1]) == here
    assert chain(made, elements(made, "through4")["tcp . 30080"]) == ("meta l4proto tcp dnat ip to 192.168.0.6:8080",)


def test_a_service_without_backends_is_refused_and_so_is_another_network_s() -> None:
    empty = replace(WEB, ports=(replace(WEB.ports[0], backends=()),), external=(ip_address("172.30.0.200"),))
    made = table(empty, refused=("10.96.0.9", "fd00:96::9"))
    assert made.sets["unanswered4"].elements == {"10.96.0.7 . tcp . 80", "172.30.0.200 . tcp . 80"}
    assert made.sets["closed4"].elements == {"tcp . 30080"}
    assert elements(made, "entering4") == {}
    assert any("@closed4" in rule and rule.endswith("reject") for rule in made.chains["input"].rules)
    assert made.sets["refused4"].elements == {"10.96.0.9"}
    assert made.sets["refused6"].elements == {"fd00:96::9"}
    assert elements(made, "inside4") == {}
    assert not made.bridged


def test_a_client_with_affinity_goes_where_it_went_before() -> None:
    made = table(replace(WEB, affinity_seconds=60))
    first, second, choice = chain(made, elements(made, "inside4")["10.96.0.7 . tcp . 80"])
    assert first.startswith("ip saddr @k")
    assert second.startswith("ip saddr @k")
    assert choice.startswith("numgen random mod 2 vmap")
    target = made.chains[first.rpartition(" ")[2]].rules
    assert target[0].startswith("update @k")
    sets = [item for name, item in made.sets.items() if name.startswith("k")]
    assert len(sets) == 3
    assert all("timeout 60s;" in item.header and item.elements is None for item in sets)


def test_a_pod_may_ask_for_the_external_address_too() -> None:
    made = table(replace(WEB, external=(ip_address("172.30.0.200"),)))
    inside = elements(made, "inside4")
    assert inside["172.30.0.200 . tcp . 80"] == inside["10.96.0.7 . tcp . 80"]


def test_the_node_sends_node_ports_and_external_addresses_to_the_join() -> None:
    balancer, other = ip_address("172.30.0.200"), ip_address("172.30.0.250")
    # Ranges that overlap are one: a set of intervals would refuse them.
    sources = (ip_network("172.30.0.0/24"), ip_network("172.30.0.64/26"))
    exposed = replace(WEB, external=(balancer, other), balancers=(balancer,), sources=sources)
    (made,) = services.node_tables({"n": (DESIRED.join, (exposed,))})
    join = DESIRED.join.network_ipv4.ip
    assert elements(made, "ports4") == {"tcp . 30080": str(join)}
    assert elements(made, "ports6") == {"tcp . 30080": str(DESIRED.join.network_ipv6.ip)}
    assert elements(made, "external4") == {
        "172.30.0.200 . tcp . 80": f"{join} . 30080",
        "172.30.0.250 . tcp . 80": f"{join} . 30080",
    }
    assert made.sets["limited4"].elements == {"172.30.0.200 . tcp . 80"}
    assert made.sets["admitted4"].elements == {"172.30.0.200 . tcp . 80 . 172.30.0.0/24"}


def test_a_load_balancer_s_ranges_hold_within_the_network_too() -> None:
    balancer, other = ip_address("172.30.0.200"), ip_address("172.30.0.250")
    limited = replace(WEB, external=(balancer, other), balancers=(balancer,), sources=(ip_network("192.168.0.0/28"),))
    made = table(limited)
    inside = elements(made, "inside4")
    everybody = inside["10.96.0.7 . tcp . 80"]
    assert chain(made, inside["172.30.0.200 . tcp . 80"]) == (f"ip saddr {{ 192.168.0.0/28 }} {everybody}", "drop")
    assert inside["172.30.0.250 . tcp . 80"] == everybody


def test_an_external_address_without_a_node_port_has_an_entrance_that_others_do_not_move() -> None:
    def bare(name: str, port: int) -> Service:
        return Service("red", name, WEB.addresses, (ServicePort("", "tcp", port, None, (HERE,)),), (outer,))

    outer = ip_address("172.30.0.250")
    one, more = bare("one", 80), [bare(f"more-{number}", 100 + number) for number in range(400)]
    alone, together = services.entrances([one]), services.entrances([WEB, *more, one])
    key = ("red", "one", "tcp", 80)
    assert alone[key] == together[key]
    assert len(set(together.values())) == len(together) == 402
    assert together["red", "web", "tcp", 80] == 30080
    made, (node,) = table(one), services.node_tables({"n": (DESIRED.join, (one,))})
    assert elements(node, "external4") == {"172.30.0.250 . tcp . 80": f"{DESIRED.join.network_ipv4.ip} . {alone[key]}"}
    assert elements(node, "ports4") == {}
    assert chain(made, elements(made, "entering4")[f"tcp . {alone[key]}"])[0].endswith("192.168.0.5:8080")


def test_of_two_that_claim_one_external_address_and_port_the_first_one_has_it() -> None:
    outer = (ip_address("172.30.0.250"),)
    first, second = replace(WEB, external=outer), replace(WEB, name="zoo", external=outer)
    second = replace(second, ports=(replace(WEB.ports[0], node_port=30081),))
    (made,) = services.node_tables({"n": (DESIRED.join, (first, second))})
    assert elements(made, "external4")["172.30.0.250 . tcp . 80"].endswith(" . 30080")


def test_pods_and_the_node_enter_as_the_join_s_own_end() -> None:
    (made,) = services.node_tables({"n": (DESIRED.join, (WEB,))}, [ip_network("10.244.1.0/24")])
    inner, outer = DESIRED.join.network_ipv4.ip, DESIRED.join.node_ipv4.ip
    assert elements(made, "ends4") == {str(inner): str(outer)}
    assert made.sets["hairpins4"].elements == {f"{inner} . {inner}"}
    rules = [rule for rule in made.chains["postrouting"].rules if "snat ip to ip daddr map @ends4" in rule]
    assert len(rules) == 3
    assert any("10.244.1.0/24" in rule for rule in rules)


def test_of_the_cluster_s_ranges_only_shared_addresses_are_asked_for_outside() -> None:
    (made,) = services.network_tables(
        DESIRED, (), (), ranges=map(ip_network, ("10.96.0.0/16", "10.96.8.0/24")), shared=(ip_address("10.96.0.1"),)
    )
    (rule,) = [rule for rule in made.chains["leaving"].rules if "10.96.0.0/16" in rule]
    assert rule == "ip daddr { 10.96.0.0/16 } ip daddr != { 10.96.0.1 } reject"
    assert made.chains["forward"].rules == ('oifname "up0" goto leaving',)


def test_nothing_exposed_is_an_empty_table() -> None:
    (made,) = services.node_tables({})
    assert all(not item.texts() for item in made.sets.values())


def test_a_node_without_a_number_takes_nothing_in_under_an_address_it_lacks() -> None:
    (made,) = services.network_tables(replace(DESIRED, node=replace(N1, number=None)), (WEB,), ())
    assert not any("100.88." in rule for rule in made.chains["postrouting"].rules)


def test_the_network_s_responder_answers_in_place_of_the_cluster_s_dns() -> None:
    (made,) = services.network_tables(DESIRED, (), (), (ip_address("10.96.0.10"), ip_address("fd00:96::a")))
    rules = made.chains["prerouting"].rules
    for protocol, server, gateway in (("ip", "10.96.0.10", "192.168.0.1"), ("ip6", "fd00:96::a", "fd20::1")):
        (rule,) = [item for item in rules if server in item]
        assert rule.endswith(f"meta l4proto {{ tcp, udp }} th dport 53 dnat {protocol} to {gateway}")


def test_a_headless_service_is_for_dns_alone() -> None:
    headless = replace(WEB, addresses=())
    made = table(headless)
    assert not any("numgen" in rule for item in made.chains.values() for rule in item.rules)


def test_who_may_answer_datagrams_by_whatever_they_are_asked_for() -> None:
    outer = ip_address("172.30.0.200")
    ports = (
        ServicePort("dns", "udp", 53, 30053, (HERE,)),
        ServicePort("more", "udp", 54, None, (THERE, SIX), (HERE,)),
        ServicePort("web", "tcp", 80, 30080, (HERE,)),
    )
    service = replace(WEB, ports=ports, external=(outer,))
    door = services.entrances([service])["red", "web", "udp", 54]
    join4, join6 = DESIRED.join.network_ipv4.ip, DESIRED.join.network_ipv6.ip
    here, there, six = ((item.address, item.port) for item in (HERE, THERE, SIX))
    assert services.datagram_backends(DESIRED, [service]) == {
        (WEB.addresses[0], 53): {here},
        (WEB.addresses[1], 53): frozenset(),
        (outer, 53): {here},
        (join4, 30053): {here},
        (join6, 30053): frozenset(),
        # One that ends here is there for a policy Local.
        (WEB.addresses[0], 54): {here, there},
        (WEB.addresses[1], 54): {six},
        (outer, 54): {here, there},
        (join4, door): {here, there},
        (join6, door): {six},
    }
