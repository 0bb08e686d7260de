from typing import Any

import pytest

from vmnet.model import addresses
from vmnet.model.policy import (
    BlockPeer,
    Misread,
    Operator,
    PodPeer,
    Policy,
    PolicyPort,
    Protocol,
    Requirement,
    Rule,
    Selector,
    parse,
    selector,
)


def policy(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "red", "name": "p"}, "spec": spec}


def test_a_whole_policy() -> None:
    ingress = {
        "from": [
            {"podSelector": {"matchLabels": {"app": "web"}}},
            {"namespaceSelector": {"matchLabels": {"team": "a"}}},
            {"ipBlock": {"cidr": "10.0.0.5/8", "except": ["10.1.0.0/16"]}},
        ],
        "ports": [{"port": 80}, {"port": "dns", "protocol": "UDP"}, {"port": 1, "endPort": 9}, {"protocol": "SCTP"}],
    }
    found = parse(policy(podSelector={"matchLabels": {"a": "b"}}, ingress=[ingress], egress=[{}]))
    web = Selector((Requirement("app", Operator.IN, ("web",)),))
    team = Selector((Requirement("team", Operator.IN, ("a",)),))
    assert found == Policy(
        "red",
        Selector((Requirement("a", Operator.IN, ("b",)),)),
        ingress=(
            Rule(
                (
                    PodPeer(web),
                    PodPeer(Selector(), team),
                    BlockPeer(addresses.network("10.0.0.0/8"), (addresses.network("10.1.0.0/16"),)),
                ),
                (
                    PolicyPort(Protocol.TCP, 80, 80),
                    PolicyPort(Protocol.UDP, name="dns"),
                    PolicyPort(Protocol.TCP, 1, 9),
                    PolicyPort(Protocol.SCTP),
                ),
            ),
        ),
        egress=(Rule(),),
    )


@pytest.mark.parametrize(
    ("spec", "ingress", "egress"),
    [
        ({}, (), None),
        ({"ingress": [{}]}, (Rule(),), None),
        ({"egress": []}, (), None),
        ({"egress": [{}]}, (), (Rule(),)),
        ({"policyTypes": ["Egress"]}, None, ()),
        ({"policyTypes": ["Egress"], "ingress": [{}]}, None, ()),
        ({"policyTypes": ["Ingress"], "egress": [{}]}, (), None),
        ({"policyTypes": [], "egress": [{}]}, (), (Rule(),)),
        ({"policyTypes": ["Ingress", "Egress"]}, (), ()),
    ],
)
def test_directions_follow_the_types_or_else_the_sections(spec: dict[str, Any], ingress: Any, egress: Any) -> None:
    assert parse(policy(**spec)) == Policy("red", Selector(), ingress, egress)


@pytest.mark.parametrize(
    ("expression", "matching", "other"),
    [
        ({"operator": "In", "values": ["x", "y"]}, [{"k": "y"}], [{}, {"k": "z"}]),
        ({"operator": "NotIn", "values": ["x", "y"]}, [{}, {"k": "z"}], [{"k": "x"}]),
        ({"operator": "Exists"}, [{"k": ""}], [{}, {"other": "k"}]),
        ({"operator": "DoesNotExist"}, [{}, {"other": "k"}], [{"k": ""}]),
    ],
)
def test_operators(expression: dict[str, Any], matching: list[dict[str, str]], other: list[dict[str, str]]) -> None:
    found = selector({"matchExpressions": [{"key": "k", **expression}]}, "f")
    assert all(found.matches(labels) for labels in matching)
    assert not any(found.matches(labels) for labels in other)


def test_equal_selectors_look_alike_however_they_are_written() -> None:
    one = {
        "matchLabels": {"a": "1", "b": "2"},
        "matchExpressions": [{"key": "c", "operator": "In", "values": ["1", "2"]}],
    }
    other = {
        "matchExpressions": [
            {"key": "c", "operator": "In", "values": ["2", "1"]},
            {"key": "b", "operator": "In", "values": ["2"]},
        ],
        "matchLabels": {"a": "1"},
    }
    assert repr(selector(one, "f")) == repr(selector(other, "f"))


PEER = "spec.ingress[0].from[0]"
PORT = "spec.ingress[0].ports[0]"


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ({"from": [{}]}, PEER),
        ({"from": [{"hosts": {}}]}, f"{PEER}.hosts"),
        ({"from": {}}, "spec.ingress[0].from"),
        ({"to": []}, "spec.ingress[0].to"),
        ({"from": [{"podSelector": {"matchLabels": {"a": 1}}}]}, f"{PEER}.podSelector.matchLabels[a]"),
        (
            {"from": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}}]},
            f"{PEER}.podSelector.matchExpressions[0].operator",
        ),
        (
            {"from": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}]},
            f"{PEER}.podSelector.matchExpressions[0].values",
        ),
        (
            {"from": [{"podSelector": {"matchExpressions": [{"operator": "Exists"}]}}]},
            f"{PEER}.podSelector.matchExpressions[0].key",
        ),
        ({"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}, f"{PEER}.ipBlock"),
        ({"from": [{"ipBlock": {}}]}, f"{PEER}.ipBlock.cidr"),
        ({"from": [{"ipBlock": {"cidr": "10.0.0.0"}}]}, f"{PEER}.ipBlock.cidr"),
        ({"from": [{"ipBlock": {"cidr": "fe80::1%eth0/64"}}]}, f"{PEER}.ipBlock.cidr"),
        ({"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/99"]}}]}, f"{PEER}.ipBlock.except[0]"),
        ({"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}]}, f"{PEER}.ipBlock.except[0]"),
        ({"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["fd00::/16"]}}]}, f"{PEER}.ipBlock.except[0]"),
        ({"ports": [{"protocol": "ICMP"}]}, f"{PORT}.protocol"),
        ({"ports": [{"port": 0}]}, f"{PORT}.port"),
        ({"ports": [{"port": 65536}]}, f"{PORT}.port"),
        ({"ports": [{"port": True}]}, f"{PORT}.port"),
        ({"ports": [{"port": "80"}]}, f"{PORT}.port"),
        ({"ports": [{"port": "Web"}]}, f"{PORT}.port"),
        ({"ports": [{"endPort": 80}]}, f"{PORT}.endPort"),
        ({"ports": [{"port": "web", "endPort": 80}]}, f"{PORT}.endPort"),
        ({"ports": [{"port": 80, "endPort": 79}]}, f"{PORT}.endPort"),
        ("everyone", "spec.ingress[0]"),
    ],
)
def test_what_cannot_be_understood_is_named_and_opens_nothing(rule: Any, field: str) -> None:
    pods = {"matchLabels": {"a": "b"}}
    with pytest.raises(Misread) as caught:
        parse(policy(podSelector=pods, ingress=[rule, {}], egress=[{}]))
    assert str(caught.value).startswith(f"{field}: ")
    assert caught.value.closed == Policy("red", selector(pods, ""), (), ())


def test_only_the_directions_that_it_names_are_closed() -> None:
    with pytest.raises(Misread) as caught:
        parse(policy(policyTypes=["Egress"], egress=[{"to": [{}]}]))
    assert caught.value.closed == Policy("red", Selector(), None, ())


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"policyTypes": ["Sideways"]}, "spec.policyTypes[0]"),
        ({"policyTypes": "Egress"}, "spec.policyTypes"),
        ({"tier": 1}, "spec.tier"),
    ],
)
def test_without_known_directions_both_are_closed(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(Misread) as caught:
        parse(policy(**spec))
    assert str(caught.value).startswith(f"{field}: ")
    assert caught.value.closed == Policy("red", Selector(), (), ())


def test_without_a_selector_nobody_is_known_to_be_meant() -> None:
    with pytest.raises(Misread) as caught:
        parse(policy(podSelector={"matchNames": {}}))
    assert str(caught.value).startswith("spec.podSelector.matchNames: ")
    assert caught.value.closed is None
