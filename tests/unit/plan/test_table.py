from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnet.plan.table import MOST_MARKS, Chain, Elements, Table, removal

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
        f"delete chain inet vmnet-x state_{TABLE.digest}",
        f"add chain inet vmnet-x state_{after.digest}",
        "add chain inet vmnet-x two",
        "delete element inet vmnet-x ports { 80 : goto one }",
        "add element inet vmnet-x ports { 80 : goto two }",
        "add rule inet vmnet-x two drop",
    ]


def test_a_change_that_only_adds_deletes_nothing_and_the_next_that_deletes_takes_all_former_digests() -> None:
    ports = Elements(TABLE.sets["ports"].header, {**(TABLE.sets["ports"].elements or {}), "82": "goto two"})  # type: ignore[dict-item]
    more = replace(TABLE, sets={**TABLE.sets, "ports": ports}, chains={**TABLE.chains, "two": Chain(("drop",))})
    assert more.change(TABLE).splitlines() == [
        f"add chain inet vmnet-x state_{more.digest}",
        "add chain inet vmnet-x two",
        "add element inet vmnet-x ports { 82 : goto two }",
        "add rule inet vmnet-x two drop",
    ]
    marks = more.marks(TABLE, (TABLE.digest,))
    assert marks == (TABLE.digest, more.digest)
    assert more.marks(more, marks) == marks
    back = TABLE.change(more, marks).splitlines()
    assert back[:3] == [
        f"delete chain inet vmnet-x state_{TABLE.digest}",
        f"delete chain inet vmnet-x state_{more.digest}",
        f"add chain inet vmnet-x state_{TABLE.digest}",
    ]
    assert TABLE.marks(more, marks) == (TABLE.digest,)
    assert more.marks(None, marks) == (more.digest,)


def test_former_digests_are_bounded() -> None:
    marks, before = (TABLE.digest,), TABLE
    for number in range(2 * MOST_MARKS):
        ports = {**(before.sets["ports"].elements or {}), str(number + 100): "goto one"}  # type: ignore[dict-item]
        after = replace(before, sets={**before.sets, "ports": Elements(before.sets["ports"].header, ports)})
        gone = [line for line in after.change(before, marks).splitlines() if line.startswith("delete ")]
        assert len(gone) == (0 if len(marks) <= MOST_MARKS else len(marks))
        before, marks = after, after.marks(before, marks)
        assert marks[-1] == after.digest
        assert len(marks) <= MOST_MARKS + 1


@pytest.mark.parametrize(
    ("before", "after", "extended"),
    [
        (frozenset({"1"}), frozenset({"1", "2"}), True),
        (frozenset({"1", "2"}), frozenset({"1"}), False),
        ({"1": "a"}, {"1": "a", "2": "b"}, True),
        ({"1": "a"}, {"1": "b", "2": "b"}, False),
        ({"1": "a"}, frozenset({"1"}), False),
        (None, None, True),
    ],
)
def test_a_set_extends_another_that_it_has_all_elements_of(before: Any, after: Any, extended: bool) -> None:
    assert Elements("type mark;", after).extends(Elements("type mark;", before)) is extended


def test_a_chain_goes_after_what_names_it() -> None:
    after = replace(
        TABLE, sets={"seen": TABLE.sets["seen"]}, chains={"forward": replace(TABLE.chains["forward"], rules=())}
    )
    assert after.change(TABLE).splitlines() == [
        f"delete chain inet vmnet-x state_{TABLE.digest}",
        f"add chain inet vmnet-x state_{after.digest}",
        "flush chain inet vmnet-x forward",
        "flush chain inet vmnet-x one",
        "delete map inet vmnet-x ports",
        "delete chain inet vmnet-x one",
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
    assert lines[:3] == ["add table inet vmnet-x", "delete table inet vmnet-x", "add table inet vmnet-x"]
    assert lines[-1] == f"add chain inet vmnet-x state_{TABLE.digest}"
    assert TABLE.fresh().splitlines() == ["create table inet vmnet-x", *lines[3:]]
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
