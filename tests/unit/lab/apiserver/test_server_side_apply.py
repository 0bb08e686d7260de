"""Server-side apply as a pure function."""

from typing import Any

import pytest

from vmnet.lab.apiserver import ownership, server_side_apply, shapes
from vmnet.lab.apiserver.status import ApiError

CONFIG_MAP = shapes.builtin("", "v1", "ConfigMap")
SERVICE = shapes.builtin("", "v1", "Service")
assert CONFIG_MAP is not None
assert SERVICE is not None


def applier(name: str) -> ownership.Manager:
    return ownership.Manager(name, "Apply", "")


def apply(
    live: dict[str, Any],
    entries: ownership.Entries,
    name: str,
    data: dict[str, str],
    *,
    force: bool = False,
) -> server_side_apply.Applied:
    return server_side_apply.apply(
        live,
        {"metadata": {"name": "x"}, "data": data},
        CONFIG_MAP,
        entries,
        manager=applier(name),
        api_version="v1",
        ignored=(),
        force=force,
        now="now",
    )


def test_what_a_manager_no_longer_names_goes_unless_another_owns_it() -> None:
    first = apply({}, {}, "one", {"a": "1", "b": "1"})
    shared = apply(first.obj, first.entries, "two", {"a": "1"})
    found = apply(shared.obj, shared.entries, "one", {})
    assert found.obj["data"] == {"a": "1"}
    assert found.entries[applier("one")].paths == {("f:data",)}


def test_a_conflict_names_manager_and_field_and_force_takes_it() -> None:
    first = apply({}, {}, "one", {"a": "1"})
    with pytest.raises(server_side_apply.Conflicts) as caught:
        apply(first.obj, first.entries, "two", {"a": "2"})
    status = caught.value.error().status
    assert status["message"] == 'Apply failed with 1 conflict: conflict with "one": .data.a'
    assert status["details"]["causes"] == [
        {"reason": "FieldManagerConflict", "message": 'conflict with "one"', "field": ".data.a"}
    ]
    forced = apply(first.obj, first.entries, "two", {"a": "2"}, force=True)
    assert forced.obj["data"] == {"a": "2"}
    assert set(forced.entries) == {applier("two")}


def test_conflicts_with_updates_and_subresources_say_so() -> None:
    manager = ownership.Manager("scaler", "Update", "apps/v1", "scale")
    conflicts = server_side_apply.Conflicts(
        {manager: frozenset({("f:spec", "f:replicas")}), applier("a"): frozenset({("f:x",), ("f:y",)})}, {}
    )
    message = conflicts.error().status["message"]
    assert message == (
        'Apply failed with 3 conflicts: conflicts with "a":\n- .x\n- .y\n'
        'conflict with "scaler" with subresource "scale" using apps/v1: .spec.replicas'
    )


def test_an_unchanged_apply_changes_nothing() -> None:
    first = apply({}, {}, "one", {"a": "1"})
    again = apply(first.obj, first.entries, "one", {"a": "1"})
    assert not again.changed
    assert again.entries == first.entries


def test_keyed_lists_are_joined() -> None:
    live = {"spec": {"ports": [{"name": "a", "port": 80, "protocol": "TCP"}]}}
    config = {"spec": {"ports": [{"name": "b", "port": 81}]}}
    assert [port["name"] for port in server_side_apply.merge(live, config, SERVICE)["spec"]["ports"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dota": {}}, ".dota: field not declared in schema"),
        (
            {"spec": {"ports": [{"port": 81}, {"port": 81}]}},
            '.spec.ports: duplicate entries for key [port=81,protocol="TCP"]',
        ),
        ({"spec": {"ports": {"a": 1}}}, ".spec.ports: expected list, got &{{'a': 1}}"),
    ],
)
def test_configurations_that_are_not_of_the_type_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as caught:
        server_side_apply.check(config, SERVICE, "a/b; /v1, Kind=Service")
    assert caught.value.status["message"] == f"failed to create typed patch object (a/b; /v1, Kind=Service): {message}"


def test_kubectl_may_take_over_what_client_side_apply_set() -> None:
    live = {
        "metadata": {"annotations": {server_side_apply.LAST_APPLIED: '{"data":{"a":"1","b":"1"}}'}},
        "data": {"a": "1", "b": "changed"},
    }
    allowed = server_side_apply.allowed_by_last_applied(live, CONFIG_MAP)
    assert ("f:data", "f:a") in allowed
    assert ("f:data", "f:b") not in allowed
