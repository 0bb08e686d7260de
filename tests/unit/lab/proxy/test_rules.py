"""The rules of service ports: which map entry leads where. That they work is shown by tests/netns/test_lab_proxy.py."""

import re
from dataclasses import replace

import pytest

from vmnet.lab.proxy.rules import ruleset
from vmnet.lab.proxy.services import Backend, ServicePort

PODS = ("10.244.0.0/16", "fd00:10:244::/48")
HERE, THERE = Backend("10.244.1.2", 8080, "n1"), Backend("10.244.2.2", 8080, "n2")
PORT = ServicePort(
    service="ns/web",
    port_name="http",
    version=4,
    protocol="tcp",
    port=80,
    cluster_address="10.96.0.7",
    node_port=30080,
    external_addresses=("172.30.0.200",),
    internal_local=False,
    external_local=False,
    backends=(HERE, THERE),
)


def elements(text: str, name: str) -> dict[str, str]:
    """Elements of a map of the IPv4 table."""
    found = re.search(rf"map {name} {{[^}}]*?elements = {{ (.*?) }}", text.split("table ip6")[0], re.DOTALL)
    return dict(item.split(" : ") for item in found.group(1).split(", ")) if found else {}


def chain(text: str, name: str) -> list[str]:
    found = re.search(rf"chain {name} {{\n(.*?)\n  }}", text, re.DOTALL)
    assert found, f"no chain {name} in {text}"
    return [line.strip() for line in found.group(1).splitlines()]


def target(verdict: str) -> str:
    return verdict.removeprefix("goto ")


def test_the_table_is_replaced_as_a_whole_and_no_other_is_named() -> None:
    text = ruleset([PORT], "n1", PODS)
    assert re.findall(r"^(?:table|delete table) (\S+ \S+)", text, re.MULTILINE) == [
        *("ip kube-proxy",) * 3,
        *("ip6 kube-proxy",) * 3,
    ]


def test_addresses_are_translated_where_every_kube_proxy_does_it() -> None:
    text = ruleset([PORT], "n1", PODS)
    assert "type nat hook prerouting priority dstnat;" in chain(text, "nat-prerouting")
    assert "type nat hook output priority -100;" in chain(text, "nat-output")


def test_a_cluster_address_leads_to_all_backends_without_masquerade() -> None:
    text = ruleset([PORT], "n1", PODS)
    rules = chain(text, target(elements(text, "service-addresses")["10.96.0.7 . tcp . 80"]))
    choices = "0 : 10.244.1.2 . 8080, 1 : 10.244.2.2 . 8080"
    assert rules[1:] == [f"meta l4proto tcp dnat ip to numgen random mod 2 map {{ {choices} }}"]
    assert not elements(text, "without-endpoint")


def test_outside_traffic_is_masqueraded_with_policy_cluster() -> None:
    text = ruleset([PORT], "n1", PODS)
    addresses, ports = elements(text, "service-addresses"), elements(text, "service-node-ports")
    assert ports["tcp . 30080"] == addresses["172.30.0.200 . tcp . 80"]
    rules = chain(text, target(ports["tcp . 30080"]))
    assert rules == ["jump mark-for-masquerade", addresses["10.96.0.7 . tcp . 80"]]


def test_outside_traffic_stays_on_the_node_and_keeps_its_source_with_policy_local() -> None:
    text = ruleset([replace(PORT, external_local=True)], "n1", PODS)
    rules = chain(text, target(elements(text, "service-node-ports")["tcp . 30080"]))
    assert rules[0].startswith("ip saddr 10.244.0.0/16 goto cluster-")
    local = chain(text, target(rules[-1]))
    assert local[-1] == "meta l4proto tcp dnat ip to numgen random mod 1 map { 0 : 10.244.1.2 . 8080 }"


def test_a_node_without_endpoint_drops_with_policy_local() -> None:
    text = ruleset([replace(PORT, external_local=True)], "n3", PODS)
    assert elements(text, "without-endpoint") == {"172.30.0.200 . tcp . 80": "drop"}
    assert elements(text, "without-endpoint-at-node") == {"tcp . 30080": "drop"}
    # Pods of the node, and the node, still get through.
    assert "tcp . 30080" in elements(text, "service-node-ports")


@pytest.mark.parametrize(("node", "verdict"), [("n1", "goto local-"), ("n3", "drop")])
def test_policy_local_inside_uses_the_nodes_own_backends_alone(node: str, verdict: str) -> None:
    text = ruleset([replace(PORT, internal_local=True)], node, PODS)
    found = elements(text, "service-addresses") | elements(text, "without-endpoint")
    assert found["10.96.0.7 . tcp . 80"].startswith(verdict)


def test_without_any_endpoint_clients_are_refused() -> None:
    text = ruleset([replace(PORT, backends=())], "n1", PODS)
    assert elements(text, "service-addresses") == {}
    assert set(elements(text, "without-endpoint").values()) == {"goto refuse"}
    assert elements(text, "without-endpoint-at-node") == {"tcp . 30080": "goto refuse"}


def test_a_backend_that_calls_its_own_service_is_masqueraded() -> None:
    assert "elements = { 10.244.1.2 . 10.244.1.2, 10.244.2.2 . 10.244.2.2 }" in ruleset([PORT], "n1", PODS)


def test_the_first_of_two_services_has_an_address_and_port_that_both_claim() -> None:
    other = replace(PORT, service="ns/zweb", cluster_address="10.96.0.8", backends=(THERE,))
    text = ruleset([PORT, other], "n1", PODS)
    alone = ruleset([PORT], "n1", PODS)
    key = "172.30.0.200 . tcp . 80"
    assert elements(text, "service-addresses")[key] == elements(alone, "service-addresses")[key]
