"""Label and field selectors."""

import pytest

from vmnet.lab.apiserver import selectors
from vmnet.lab.apiserver.resources import Registry, ResourceInfo
from vmnet.lab.apiserver.status import ApiError


def info(plural: str) -> ResourceInfo:
    found = Registry().lookup("", "v1", plural)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "matching"),
    [
        ("", ["a", "b", "none"]),
        ("tier=a", ["a"]),
        ("tier==a", ["a"]),
        ("tier!=a", ["b", "none"]),
        ("tier", ["a", "b"]),
        ("!tier", ["none"]),
        ("tier in (a, b),tier notin (b)", ["a"]),
        ("tier notin (a)", ["b", "none"]),
        ("size>3", ["b"]),
        ("size<3,tier", ["a"]),
        ("tier in ()", []),
        ("x.y/z=", ["a"]),
    ],
)
def test_label_selectors(text: str, matching: list[str]) -> None:
    objects = {
        "a": {"tier": "a", "size": "1", "x.y/z": ""},
        "b": {"tier": "b", "size": "12"},
        "none": None,
    }
    selector = selectors.parse_labels(text)
    found = [
        name for name, labels in objects.items() if selectors.matches_labels(selector, {"metadata": {"labels": labels}})
    ]
    assert found == matching


@pytest.mark.parametrize("text", ["a===b,,", "a=b,", ",a", "in (a)", "a in b", "a in (b", "a b"])
def test_malformed_label_selectors_are_refused(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        selectors.parse_labels(text)
    assert caught.value.code == 400


def test_label_selectors_of_specs_become_text() -> None:
    selector = {
        "matchLabels": {"b": "2", "a": "1"},
        "matchExpressions": [
            {"key": "c", "operator": "In", "values": ["y", "x"]},
            {"key": "d", "operator": "DoesNotExist"},
        ],
    }
    assert selectors.format_labels(selector) == "a=1,b=2,c in (x,y),!d"
    parsed = selectors.from_object(selector)
    assert selectors.matches_labels(parsed, {"metadata": {"labels": {"a": "1", "b": "2", "c": "x"}}})
    assert not selectors.matches_labels(parsed, {"metadata": {"labels": {"a": "1", "b": "2", "c": "x", "d": ""}}})


def test_field_selectors_of_pods() -> None:
    pod = {"metadata": {"name": "p"}, "spec": {"nodeName": "n1"}, "status": {"phase": "Running"}}
    for text, matches in [
        ("spec.nodeName=n1", True),
        ("spec.nodeName!=n1", False),
        ("spec.nodeName=", False),
        ("metadata.name=p,status.phase!=Succeeded", True),
        ("spec.hostNetwork=false", True),
    ]:
        assert selectors.matches_fields(selectors.parse_fields(text, info("pods")), pod) is matches, text


def test_unknown_fields_are_refused_by_name() -> None:
    with pytest.raises(ApiError) as caught:
        selectors.parse_fields("data.a=1", info("configmaps"))
    message = '"data.a" is not a known field selector: only "metadata.name", "metadata.namespace"'
    assert caught.value.status["message"] == message
    assert selectors.parse_fields("spec.x=1", info("configmaps"), ("spec.x",))
