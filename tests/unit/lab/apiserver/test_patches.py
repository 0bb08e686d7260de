"""The three patches."""

import copy
from typing import Any

import pytest

from vmnet.lab.apiserver import patches, shapes
from vmnet.lab.apiserver.status import ApiError

POD = shapes.builtin("", "v1", "Pod")
assert POD is not None


# RFC 7386, appendix A
@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch_follows_the_examples_of_its_rfc(target: Any, patch: Any, result: Any) -> None:
    before = copy.deepcopy(target)
    assert patches.merge(target, patch) == result
    assert target == before


# RFC 6902, appendix A
@pytest.mark.parametrize(
    ("document", "patch", "result"),
    [
        ({"foo": "bar"}, [{"op": "add", "path": "/baz", "value": "qux"}], {"foo": "bar", "baz": "qux"}),
        ({"foo": ["bar", "baz"]}, [{"op": "add", "path": "/foo/1", "value": "qux"}], {"foo": ["bar", "qux", "baz"]}),
        ({"foo": ["bar"]}, [{"op": "add", "path": "/foo/-", "value": ["abc"]}], {"foo": ["bar", ["abc"]]}),
        ({"baz": "qux", "foo": "bar"}, [{"op": "remove", "path": "/baz"}], {"foo": "bar"}),
        ({"foo": ["bar", "qux", "baz"]}, [{"op": "remove", "path": "/foo/1"}], {"foo": ["bar", "baz"]}),
        ({"baz": "qux"}, [{"op": "replace", "path": "/baz", "value": "boo"}], {"baz": "boo"}),
        (
            {"foo": {"bar": "baz", "waldo": "fred"}, "qux": {"corge": "grault"}},
            [{"op": "move", "from": "/foo/waldo", "path": "/qux/thud"}],
            {"foo": {"bar": "baz"}, "qux": {"corge": "grault", "thud": "fred"}},
        ),
        (
            {"foo": ["all", "cows"]},
            [{"op": "copy", "from": "/foo/0", "path": "/one"}],
            {"foo": ["all", "cows"], "one": "all"},
        ),
        ({"baz": "qux"}, [{"op": "test", "path": "/baz", "value": "qux"}], {"baz": "qux"}),
        ({"a/b": 1, "m~n": 2}, [{"op": "replace", "path": "/a~1b", "value": 3}], {"a/b": 3, "m~n": 2}),
        ({"a": 1}, [{"op": "test", "path": "/none", "value": None}], {"a": 1}),
    ],
)
def test_json_patch_follows_the_examples_of_its_rfc(document: Any, patch: Any, result: Any) -> None:
    before = copy.deepcopy(document)
    assert patches.json_patch(document, patch) == result
    assert document == before


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "replace", "path": "/none", "value": 1},
        {"op": "remove", "path": "/none"},
        {"op": "add", "path": "/none/x", "value": 1},
        {"op": "add", "path": "/list/9", "value": 1},
        {"op": "test", "path": "/a", "value": 2},
        {"op": "jump", "path": "/a"},
        {"op": "add", "path": "a", "value": 1},
        {"op": "add", "path": "/a"},
        {"op": "remove", "path": ""},
    ],
)
def test_json_patches_that_do_not_apply_are_422(operation: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        patches.json_patch({"a": 1, "list": []}, [operation])
    assert caught.value.code == 422


def pod(*containers: dict[str, Any]) -> dict[str, Any]:
    return {"spec": {"containers": list(containers)}}


@pytest.mark.parametrize(
    ("patch", "containers"),
    [
        ([{"name": "a", "image": "2"}], [{"name": "a", "image": "2"}, {"name": "b", "image": "1"}]),
        ([{"name": "c"}], [{"name": "a", "image": "1"}, {"name": "b", "image": "1"}, {"name": "c"}]),
        ([{"name": "a", "$patch": "delete"}], [{"name": "b", "image": "1"}]),
        ([{"$patch": "replace"}, {"name": "z"}], [{"name": "z"}]),
        ([{"name": "a", "image": None}], [{"name": "a"}, {"name": "b", "image": "1"}]),
    ],
)
def test_strategic_merge_joins_lists_by_their_key(patch: list[Any], containers: list[Any]) -> None:
    live = pod({"name": "a", "image": "1"}, {"name": "b", "image": "1"})
    found = patches.strategic(live, {"spec": {"containers": patch}}, POD)
    assert found == pod(*containers)
    assert live == pod({"name": "a", "image": "1"}, {"name": "b", "image": "1"})


def test_strategic_merge_obeys_the_order_and_directives() -> None:
    live = {"spec": {"containers": [{"name": "a"}, {"name": "b"}], "nodeSelector": {"x": "1"}, "tolerations": [1]}}
    patch = {
        "spec": {
            "$setElementOrder/containers": [{"name": "c"}, {"name": "b"}, {"name": "a"}],
            "containers": [{"name": "c"}],
            "nodeSelector": {"$patch": "replace", "y": "2"},
            "tolerations": [2],
        }
    }
    found = patches.strategic(live, patch, POD)["spec"]
    assert [item["name"] for item in found["containers"]] == ["c", "b", "a"]
    assert found["nodeSelector"] == {"y": "2"}
    assert found["tolerations"] == [2]


def test_strategic_merge_of_sets_and_primitive_deletions() -> None:
    live = {"metadata": {"finalizers": ["a/1", "b/2"]}}
    patch = {"metadata": {"$deleteFromPrimitiveList/finalizers": ["a/1"], "finalizers": ["c/3"]}}
    assert patches.strategic(live, patch, POD) == {"metadata": {"finalizers": ["b/2", "c/3"]}}


def test_conditions_merge_by_type() -> None:
    live = {"status": {"conditions": [{"type": "Ready", "status": "False"}, {"type": "Other", "status": "True"}]}}
    patch = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    found = patches.strategic(live, patch, POD)["status"]["conditions"]
    assert found == [{"type": "Ready", "status": "True"}, {"type": "Other", "status": "True"}]


def test_a_list_item_without_its_key_is_refused() -> None:
    with pytest.raises(ApiError) as caught:
        patches.strategic(pod(), {"spec": {"containers": [{"image": "x"}]}}, POD)
    assert caught.value.code == 400
