from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from vmnet.plan.table import Chain, Elements, Table, removal

TABLE = Table(
    "inet",
    "vmnet-x",
    {
        "ports": Elements("type inet_service : verdict;", {"80": "goto one", "81": "goto one"}),
        "seen": Elements("type ipv4_addr; flags dynamic;", None),
    },
    {"one": Chain(("accept",)), "forward": Chain(("tcp dport vmap @ports",), "type filter hook forward priority 0;")},
)


def test_an_equal_table_needs_no_script_whatever_the_order_of_its_elements() -> None:
    turned = replace(
        TABLE, sets={**TABLE.sets, "ports": Elements(TABLE.sets["ports"].header, {"81": "goto one", "80": "goto one"})}
    )
    assert turned.digest == TABLE.digest
    assert turned.change(TABLE) == ""


def test_a_changed_value_is_deleted_before_it_is_added() -> None:
    ports = Elements(TABLE.sets["ports"].header, {"80": "goto two", "81": "goto one"})
    after = replace(TABLE, sets={**TABLE.sets, "ports": ports}, chains={**TABLE.chains, "two": Chain(("drop",))})
    assert after.change(TABLE).splitlines() == [
        f"add chain inet vmnet-x state_{after.digest}",
        "add chain inet vmnet-x two",
        "delete element inet vmnet-x ports { 80 : goto one }",
        "add element inet vmnet-x ports { 80 : goto two }",
        "add rule inet vmnet-x two drop",
        f"delete chain inet vmnet-x state_{TABLE.digest}",
    ]


def test_a_chain_goes_after_what_names_it() -> None:
    after = replace(
        TABLE, sets={"seen": TABLE.sets["seen"]}, chains={"forward": replace(TABLE.chains["forward"], rules=())}
    )
    assert after.change(TABLE).splitlines() == [
        f"add chain inet vmnet-x state_{after.digest}",
        "flush chain inet vmnet-x forward",
        "flush chain inet vmnet-x one",
        "delete map inet vmnet-x ports",
        "delete chain inet vmnet-x one",
        f"delete chain inet vmnet-x state_{TABLE.digest}",
    ]


def test_what_keeps_its_name_but_not_its_declaration_is_made_anew() -> None:
    hook = replace(TABLE.chains["forward"], hook="type filter hook forward priority 10;")
    kind = Elements("type ipv6_addr; flags dynamic;", None)
    for after in (
        replace(TABLE, chains={**TABLE.chains, "forward": hook}),
        replace(TABLE, sets={**TABLE.sets, "seen": kind}),
    ):
        assert after.change(TABLE) == after.whole()


def test_the_whole_table_replaces_what_was_there_and_tells_its_digest() -> None:
    lines = TABLE.whole().splitlines()
    assert lines[:3] == ["add table inet vmnet-x", "delete table inet vmnet-x", "table inet vmnet-x {"]
    assert f"  chain state_{TABLE.digest} {{ }}" in lines
    assert removal(TABLE.identity).splitlines() == ["add table inet vmnet-x", "delete table inet vmnet-x"]


@given(
    st.dictionaries(st.integers(1, 20), st.sampled_from(["accept", "drop"])),
    st.dictionaries(st.integers(1, 20), st.sampled_from(["accept", "drop"])),
)
def test_a_change_names_exactly_the_elements_that_differ(before: dict[int, str], after: dict[int, str]) -> None:
    def table(found: dict[int, str]) -> Table:
        return Table(
            "inet", "vmnet-x", {"m": Elements("type inet_service : verdict;", {str(k): v for k, v in found.items()})}
        )

    held = {f"{key} : {value}" for key, value in before.items()}
    for line in table(after).change(table(before)).splitlines():
        verb, what, rest = line.split(" ", 2)
        if what == "element":
            named = set(rest.partition("{ ")[2].removesuffix(" }").split(", "))
            assert named <= held if verb == "delete" else not named & held
            held = held - named if verb == "delete" else held | named
    assert held == {f"{key} : {value}" for key, value in after.items()}
