"""Sets of fields and who owns them."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vmnet.lab.apiserver import ownership, shapes

CONFIG_MAP = shapes.builtin("", "v1", "ConfigMap")
SERVICE = shapes.builtin("", "v1", "Service")
assert CONFIG_MAP is not None
assert SERVICE is not None

ELEMENTS = st.sampled_from(["f:a", "f:b", 'k:{"name":"x"}', 'v:"y"', "f:c"])
PATHS = st.frozensets(st.lists(ELEMENTS, min_size=1, max_size=4).map(tuple), max_size=12)


@given(PATHS)
def test_fields_v1_and_paths_say_the_same(paths: ownership.Paths) -> None:
    assert ownership.from_fields(ownership.to_fields(paths)) == paths


def test_items_of_keyed_lists_are_named_by_all_keys_with_defaults() -> None:
    config: dict[str, Any] = {"spec": {"ports": [{"name": "a", "port": 80}], "selector": {"x": "y"}}}
    assert ownership.to_fields(ownership.paths_of(config, SERVICE)) == {
        "f:spec": {
            "f:ports": {'k:{"port":80,"protocol":"TCP"}': {".": {}, "f:name": {}, "f:port": {}}},
            "f:selector": {},
        }
    }


def test_an_update_owns_what_it_changed_and_others_lose_it() -> None:
    first = ownership.Manager("first", "Update", "v1")
    second = ownership.Manager("second", "Update", "v1")
    old = {"metadata": {"name": "x"}, "data": {"a": "1", "b": "1"}}
    entries = ownership.updated({}, {"metadata": {}}, old, CONFIG_MAP, manager=first, ignored=(), now="t1")
    assert ownership.to_fields(entries[first].paths) == {"f:data": {".": {}, "f:a": {}, "f:b": {}}}
    new = {"metadata": {"name": "x"}, "data": {"a": "2", "c": "1"}}
    entries = ownership.updated(entries, old, new, CONFIG_MAP, manager=second, ignored=(), now="t2")
    assert ownership.to_fields(entries[first].paths) == {"f:data": {}}
    assert ownership.to_fields(entries[second].paths) == {"f:data": {"f:a": {}, "f:c": {}}}
    assert (entries[first].time, entries[second].time) == ("t1", "t2")


def test_an_update_that_changes_nothing_takes_nothing() -> None:
    manager = ownership.Manager("one", "Update", "v1")
    obj = {"metadata": {}, "data": {"a": "1"}}
    assert ownership.updated({}, obj, dict(obj), CONFIG_MAP, manager=manager, ignored=(), now="t") == {}


def test_entries_are_ordered_and_many_updaters_are_put_together() -> None:
    entries: ownership.Entries = {}
    for number in range(14):
        manager = ownership.Manager(f"m{number:02}", "Update", "v1")
        entries[manager] = ownership.Entry(manager, "v1", frozenset({("f:data", f"f:{number}")}), f"t{number:02}")
    applier = ownership.Manager("applier", "Apply", "")
    entries[applier] = ownership.Entry(applier, "v1", frozenset({("f:x",)}), "t99")
    written = ownership.write_entries(entries)
    assert [item["manager"] for item in written[:2]] == ["applier", "ancient-changes"]
    assert len(written) == 1 + ownership.MAX_UPDATERS
    assert len(ownership.from_fields(written[1]["fieldsV1"])) == 5
    assert ownership.read_entries(written).keys() >= {applier}
