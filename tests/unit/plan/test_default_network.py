"""The table that keeps networks away from the default one; that it does is shown by the workshop."""

from ipaddress import ip_network

from vmnet.plan import default_network

SUBNETS = [ip_network("10.244.1.0/24"), ip_network("10.244.2.0/24"), ip_network("fd00:10:244:1::/64")]


def test_each_family_has_its_subnets() -> None:
    table = default_network.table(SUBNETS)
    assert table.identity == "inet vmnet-default"
    assert table.sets["pods4"].texts() == {"10.244.1.0/24", "10.244.2.0/24"}
    assert table.sets["pods6"].texts() == {"fd00:10:244:1::/64"}


def test_what_the_node_has_translated_goes_on() -> None:
    rules = default_network.table(SUBNETS).chains["forward"].rules
    assert len(rules) == 2
    assert all(rule.startswith('iifname "vmj*" ct status & dnat == 0 ') and rule.endswith(" drop") for rule in rules)


def test_a_new_node_changes_elements_alone() -> None:
    script = default_network.table(SUBNETS).change(default_network.table(SUBNETS[1:]))
    assert "add element inet vmnet-default pods4 { 10.244.1.0/24 }" in script
    assert "delete table" not in script
