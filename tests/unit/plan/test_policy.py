"""Which tables policies become. What they admit is tried on the real kernel, in tests/netns/test_policy.py."""

from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from vmnet.model import addresses
from vmnet.model.endpoint import Endpoint, PodReference
from vmnet.model.policy import Protocol, parse
from vmnet.plan.policy import Member, NetworkPolicies
from vmnet.plan.table import Table

LABELS: Mapping[str, str] = {"app": "web"}


def endpoint(host: int, namespace: str = "red", uid: str = "") -> Endpoint:
    name, interface = f"pod-{host}", addresses.interface(f"10.0.0.{host}/24")
    mac = addresses.mac_for(interface.ip)
    both = (interface, addresses.interface(f"fd00::{host}/64"))
    return Endpoint(PodReference(namespace, name, uid or f"uid-{host}"), "n", "n1", mac, both)


def member(
    host: int, namespace: str = "red", labels: Mapping[str, str] = LABELS, ports: Mapping[str, int] | None = None
) -> Member:
    found = endpoint(host, namespace)
    named = frozenset((name, Protocol.TCP, number) for name, number in (ports or {}).items())
    return Member(found.pod, dict(labels), found.all_addresses, named)


def read(namespace: str = "red", **spec: Any) -> Any:
    return parse({"metadata": {"namespace": namespace}, "spec": spec})


DENY = {"policyTypes": ["Ingress", "Egress"]}
FROM_WEB = {"ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": 80}]}]}


def network(*members: Member) -> NetworkPolicies:
    found = NetworkPolicies()
    for name in ("red", "blue"):
        found.put_namespace(name, {"team": name})
    for item in members:
        found.put_member(item)
    return found


def elements(table: Table, name: str) -> frozenset[str]:
    return table.sets[name].texts()


def chain(table: Table, endpoint: Endpoint, direction: str = "in") -> tuple[str, ...]:
    """Rules that an endpoint's first address leads to."""
    verdicts = table.sets[f"{direction}4"].elements
    assert isinstance(verdicts, Mapping)
    return table.chains[verdicts[str(endpoint.addresses[0].ip)].removeprefix("jump ")].rules


def test_without_an_isolated_port_of_this_node_there_is_no_table() -> None:
    policies = network(member(1), member(2, "blue"))
    assert policies.tables([endpoint(1)]) == ()
    policies.put_policy("deny", read(**DENY))
    assert policies.tables([endpoint(2, "blue")]) == ()
    assert len(policies.tables([endpoint(1)])) == 2
    policies.put_policy("all", read(ingress=[{}], egress=[{}]))
    assert policies.tables([endpoint(1)]) == (), "another policy admits everything"


def test_default_deny_isolates_every_address_of_a_port_and_its_copies_of_broadcasts() -> None:
    policies = network(member(1), member(2, "blue"))
    policies.put_policy("deny", read(**DENY))
    judged, many = policies.tables([endpoint(1), endpoint(2, "blue")])
    assert (judged.identity, judged.bridged, many.identity) == ("inet vmnet-policy", True, "bridge vmnet-policy")
    for direction in ("in", "out"):
        verdicts = {version: judged.sets[f"{direction}{version}"].elements for version in "46"}
        assert set(verdicts["4"] or ()) == {"10.0.0.1"}
        assert set(verdicts["6"] or ()) == {"fd00::1", str(endpoint(1).all_addresses[2])}
        assert chain(judged, endpoint(1), direction) == ("drop",)
    assert elements(judged, "self4") == {"10.0.0.1 . 10.0.0.1"}
    assert elements(many, "secluded") == {f'"{endpoint(1).port}"'}


def test_a_selector_s_peers_are_one_set_however_many_policies_name_it() -> None:
    policies = network(member(1), member(2), member(3, labels={}), member(4, "blue"))
    policies.put_policy("one", read(**FROM_WEB))
    policies.put_policy("two", read(podSelector={"matchLabels": {"app": "web"}}, **FROM_WEB))
    policies.put_policy("egress", read(podSelector={}, egress=[{"to": FROM_WEB["ingress"][0]["from"]}]))
    judged, _ = policies.tables([endpoint(1), endpoint(3)])
    (peers,) = [name for name in judged.sets if name.startswith("peers4")]
    assert elements(judged, peers) == {"10.0.0.1", "10.0.0.2"}, "the policy's own namespace alone"
    other = peers.replace("4", "6", 1)
    admit = "meta l4proto . th dport { tcp . 80 } return"
    assert chain(judged, endpoint(1)) == (f"ip saddr @{peers} {admit}", f"ip6 saddr @{other} {admit}", "drop")
    assert chain(judged, endpoint(1), "out") == (f"ip daddr @{peers} return", f"ip6 daddr @{other} return", "drop")


def test_the_number_of_rules_does_not_depend_on_pods() -> None:
    def rules(pods: int) -> int:
        policies = network(*(member(host) for host in range(1, pods + 1)))
        policies.put_policy("one", read(**FROM_WEB))
        judged = policies.tables([endpoint(host) for host in range(1, pods + 1)])[0]
        return sum(len(found.rules) for found in judged.chains.values())

    assert rules(2) == rules(200)


def test_a_label_edit_is_an_element() -> None:
    policies = network(*(member(host) for host in range(1, 50)))
    policies.put_policy("one", read(podSelector={"matchLabels": {"role": "db"}}, **FROM_WEB))
    policies.put_member(member(1, labels={"role": "db"}))
    local = [endpoint(1), endpoint(2)]
    before, _ = policies.tables(local)
    assert policies.put_member(member(9, labels={"app": "gone"}))
    after, _ = policies.tables(local)
    changed = [line for line in after.change(before).splitlines() if "state_" not in line]
    assert [line.split(" ")[:2] for line in changed] == [["delete", "element"]] * 2
    assert all("10.0.0.9 " in line or "fd00::9" in line for line in changed)
    assert not policies.put_member(member(9, labels={"app": "gone"}))
    assert not policies.put_member(member(9, labels={"app": "other"})), "no selector tells them apart"


def test_a_changed_policy_is_another_chain_with_the_same_peers() -> None:
    """What is on its way meets the old rules or the new ones."""
    policies = network(member(1), member(2))
    policies.put_policy("one", read(**FROM_WEB))
    before, _ = policies.tables([endpoint(1)])
    ingress = [{**FROM_WEB["ingress"][0], "ports": [{"port": 81}]}]
    assert policies.put_policy("one", read(ingress=ingress))
    after, _ = policies.tables([endpoint(1)])
    assert set(before.sets) == set(after.sets)
    new, gone = set(after.chains) - set(before.chains), set(before.chains) - set(after.chains)
    assert len(new) == len(gone) == 1
    script = after.change(before).splitlines()
    assert not [line for line in script if line.startswith("flush") and not line.endswith(next(iter(gone)))]


def test_named_ports_are_those_of_the_destination() -> None:
    policies = network(
        member(1, ports={"web": 8080}), member(2, ports={"web": 9090, "dns": 53}), member(3, "blue", ports={"web": 1})
    )
    peers = [{"podSelector": {}}]
    policies.put_policy("in", read(ingress=[{"from": peers, "ports": [{"port": "web"}]}]))
    policies.put_policy("out", read(egress=[{"ports": [{"port": "web"}, {"port": "none", "protocol": "UDP"}]}]))
    judged, _ = policies.tables([endpoint(1)])
    named = {name: elements(judged, name) for name in judged.sets if name.startswith("named4")}
    assert sorted(map(sorted, named.values())) == [
        [],
        ["10.0.0.1 . tcp . 8080", "10.0.0.2 . tcp . 9090", "10.0.0.3 . tcp . 1"],
    ]
    assert any(
        rule.startswith("ip daddr . meta l4proto . th dport @named4") for rule in chain(judged, endpoint(1), "out")
    )


def test_what_would_overlap_is_one_interval() -> None:
    blocks = [
        {"ipBlock": {"cidr": "10.0.0.0/24", "except": ["10.0.0.0/25", "10.0.0.128/26"]}},
        {"ipBlock": {"cidr": "10.0.0.224/27"}},
        {"ipBlock": {"cidr": "10.1.0.0/16", "except": ["10.1.0.0/16"]}},
        {"ipBlock": {"cidr": "::/0"}},
    ]
    ports = [
        {"port": 80, "endPort": 90},
        {"port": 85, "endPort": 99},
        {"port": 100},
        {"port": 7, "protocol": "SCTP"},
        {"port": "web", "protocol": "UDP"},
        {"protocol": "UDP"},
    ]
    policies = network(member(1))
    policies.put_policy("in", read(ingress=[{"from": blocks, "ports": ports}]))
    judged, _ = policies.tables([endpoint(1)])
    numbers = "meta l4proto . th dport { sctp . 7, tcp . 80-100 } return"
    assert chain(judged, endpoint(1)) == (
        "ip saddr { 10.0.0.192/26 } meta l4proto { udp } return",
        f"ip saddr {{ 10.0.0.192/26 }} {numbers}",
        "ip6 saddr { ::/0 } meta l4proto { udp } return",
        f"ip6 saddr {{ ::/0 }} {numbers}",
        "drop",
    )


def test_namespaces_are_found_by_labels_and_name_and_not_before_they_are_known() -> None:
    policies = network(member(1), member(2, "blue"), member(3, "green"))
    everywhere = {"namespaceSelector": {}}
    named = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "green"}}}
    others = {"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "NotIn", "values": ["blue"]}]}}
    for name, peer in (("everywhere", everywhere), ("named", named), ("others", others)):
        policies.put_policy(name, read(podSelector={"matchLabels": LABELS}, ingress=[{"from": [peer]}]))

    def found() -> list[list[str]]:
        judged = policies.tables([endpoint(1)])[0]
        return sorted(sorted(elements(judged, name)) for name in judged.sets if name.startswith("peers4"))

    assert found() == [[], ["10.0.0.1"], ["10.0.0.1", "10.0.0.2"]]
    assert policies.put_namespace("green", {})
    assert found() == [["10.0.0.1", "10.0.0.2", "10.0.0.3"], ["10.0.0.1", "10.0.0.3"], ["10.0.0.3"]]
    assert policies.put_namespace("green", {"team": "blue"})
    assert found() == [["10.0.0.1"], ["10.0.0.1", "10.0.0.2", "10.0.0.3"], ["10.0.0.3"]]
    assert policies.drop_namespace("green")
    assert found() == [[], ["10.0.0.1"], ["10.0.0.1", "10.0.0.2"]]


def test_a_port_whose_pod_is_not_known_is_closed() -> None:
    policies = network(member(1), member(2))
    assert policies.tables([endpoint(9)]) == (), "there is nothing to isolate anybody from"
    policies.put_policy("deny", read("blue", **DENY))
    for unknown in (endpoint(9), endpoint(1, uid="of-its-predecessor")):
        judged, many = policies.tables([unknown, endpoint(2)])
        assert chain(judged, unknown) == chain(judged, unknown, "out") == ("drop",)
        assert elements(many, "secluded") == {f'"{unknown.port}"'}
        assert "10.0.0.2" not in (judged.sets["in4"].elements or ())


def test_pods_of_a_machine_that_migrates_share_their_address() -> None:
    source, target = endpoint(1), endpoint(1, uid="target")
    other = Member(PodReference("red", "target", "target"), LABELS, target.all_addresses)
    policies = network(member(1), other, member(2, labels={"app": "db"}))
    policies.put_policy("db", read(podSelector={"matchLabels": {"app": "db"}}, **FROM_WEB))
    peers = next(name for name in policies.tables([endpoint(2)])[0].sets if name.startswith("peers4"))
    assert policies.drop_member(source.pod.namespace, source.pod.name)
    assert elements(policies.tables([endpoint(2)])[0], peers) == {"10.0.0.1"}
    assert policies.drop_member("red", "target")
    assert elements(policies.tables([endpoint(2)])[0], peers) == frozenset()


def test_a_change_tells_whether_tables_may_differ() -> None:
    policies = network(member(1), member(2, "blue"))
    assert not policies.put_policy("deny", read(**DENY)), "nobody has asked for tables yet"
    assert policies.tables([endpoint(1)])
    assert policies.put_policy("deny", read(**FROM_WEB))
    assert not policies.put_policy("deny", read(**FROM_WEB))
    assert not policies.put_policy("deny", read("blue", **DENY)), "no port of that namespace is here"
    policies.tables([endpoint(1)])
    assert policies.put_member(member(5))
    assert not policies.put_member(member(6, "blue"))
    assert policies.drop_policy("red", "deny")
    assert not policies.drop_policy("red", "deny")
    assert policies.tables([endpoint(1)]) == ()
    assert policies.put_policy("deny", read(**DENY)), "whoever had no table must learn of the first policy"


SPECS = st.sampled_from(
    [
        DENY,
        FROM_WEB,
        {"podSelector": {"matchLabels": LABELS}, **FROM_WEB},
        {"egress": [{"to": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}], "ports": [{"port": "web"}]}]},
        {"ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": LABELS}}]}]},
    ]
)
SPACES = st.sampled_from(["red", "blue"])
CHANGES = st.one_of(
    st.tuples(st.just("policy"), SPACES, st.sampled_from("ab"), st.one_of(st.none(), SPECS)),
    st.tuples(
        st.just("pod"),
        st.integers(1, 5),
        SPACES,
        st.one_of(st.none(), st.sampled_from([{}, LABELS])),
        st.dictionaries(st.just("web"), st.integers(1, 2)),
    ),
    st.tuples(st.just("namespace"), SPACES, st.one_of(st.none(), st.sampled_from([{}, {"team": "a"}]))),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(CHANGES, max_size=30))
def test_changes_lead_where_a_fresh_look_leads(changes: list[tuple[Any, ...]]) -> None:
    """And what a change says makes no difference makes none."""
    followed, world = NetworkPolicies(), dict[tuple[Any, ...], tuple[Any, ...]]()
    local = [endpoint(host, "red") for host in (1, 2, 3)]
    shown = followed.tables(local)
    for change in changes:
        world[change[:3] if change[0] == "policy" else change[:2]] = change
        different = False
        if change[0] == "pod":
            # A pod has one place at a time.
            for space in ("red", "blue"):
                different |= followed.drop_member(space, f"pod-{change[1]}") if space != change[2] else False
        different |= _tell(followed, change)
        now = followed.tables(local)
        assert different or [table.digest for table in now] == [table.digest for table in shown]
        shown = now
    fresh = NetworkPolicies()
    for change in world.values():
        _tell(fresh, change)
    assert [table.digest for table in fresh.tables(local)] == [table.digest for table in shown]


def _tell(policies: NetworkPolicies, change: tuple[Any, ...]) -> bool:
    match change:
        case "policy", space, name, None:
            return policies.drop_policy(space, name)
        case "policy", space, name, spec:
            return policies.put_policy(name, read(space, **spec))
        case "pod", host, space, None, _:
            return policies.drop_member(space, f"pod-{host}")
        case "pod", host, space, labels, ports:
            return policies.put_member(member(host, space, labels, ports))
        case "namespace", space, None:
            return policies.drop_namespace(space)
        case _, space, labels:
            return policies.put_namespace(space, labels)
    raise AssertionError(change)
