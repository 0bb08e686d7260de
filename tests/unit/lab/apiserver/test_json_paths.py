"""The JSONPath of printer columns."""

from typing import Any

import pytest

from vmnet.lab.apiserver.json_paths import JsonPath, PathError

OBJECT = {
    "spec": {"a.b": 1, "list": [1, 2, 3], "on": True, "deep": {"x": {"name": "in"}}},
    "status": {"conditions": [{"type": "A", "n": 1}, {"type": "B", "n": 2}, {"n": 3}]},
}


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (".spec.on", [True]),
        ("{.spec.on}", [True]),
        ("$.spec.on", [True]),
        (r".spec.a\.b", [1]),
        (".spec['a.b']", [1]),
        (".spec.list[0]", [1]),
        (".spec.list[-1]", [3]),
        (".spec.list[7]", []),
        (".spec.list[*]", [1, 2, 3]),
        (".spec.list[1:]", [2, 3]),
        ("..name", ["in"]),
        (".status.conditions[?(@.type=='B')].n", [2]),
        ('.status.conditions[?(@.type == "A")].n', [1]),
        (".status.conditions[?(@.n>1)].n", [2, 3]),
        (".status.conditions[?(@.type)].n", [1, 2]),
        (".status.conditions[?(@.type!='A')].n", [2]),
        (".none.at.all", []),
    ],
)
def test_find(path: str, found: list[Any]) -> None:
    assert JsonPath(path).find(OBJECT) == found


@pytest.mark.parametrize("path", ["[", ".a[x]", ".a[?(b)]", "..", ".a[?(@.b==c)]"])
def test_not_understood(path: str) -> None:
    with pytest.raises(PathError):
        JsonPath(path)
