"""Paths, options and content negotiation."""

import pytest
from multidict import MultiDict

from vmnet.lab.apiserver.requests import DeleteOptions, ListOptions, Target, WriteOptions, negotiate, parse_path
from vmnet.lab.apiserver.status import ApiError


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/api/v1/pods", Target("", "v1", "pods")),
        ("/api/v1/pods/", Target("", "v1", "pods")),
        ("/api/v1/namespaces", Target("", "v1", "namespaces")),
        ("/api/v1/namespaces/a", Target("", "v1", "namespaces", name="a")),
        ("/api/v1/namespaces/a/status", Target("", "v1", "namespaces", name="a", subresource="status")),
        ("/api/v1/namespaces/a/pods/p/log", Target("", "v1", "pods", "a", "p", "log")),
        ("/api/v1/namespaces/a/services/s/proxy/x/y", Target("", "v1", "services", "a", "s", "proxy", "x/y")),
        ("/apis/apps/v1/namespaces/a/deployments/d/scale", Target("apps", "v1", "deployments", "a", "d", "scale")),
        ("/apis/x.y/v1/things/t", Target("x.y", "v1", "things", name="t")),
        ("/api/v1/watch/namespaces/a/pods/p", Target("", "v1", "pods", "a", "p", watch=True)),
        ("/api/v1", None),
        ("/apis/apps/v1", None),
        ("/version", None),
        ("/api//v1/pods", None),
        ("/api/v1/namespaces/a/configmaps/x%2Fy", None),
    ],
)
def test_paths_name_their_target(path: str, target: Target | None) -> None:
    assert parse_path(path) == target


@pytest.mark.parametrize(
    ("accept", "media", "form"),
    [
        ("", "json", ""),
        ("*/*", "json", ""),
        ("application/json;charset=utf-8", "json", ""),
        ("application/yaml", "yaml", ""),
        ("application/json;q=0.1,application/yaml;q=0.9", "yaml", ""),
        ("application/vnd.kubernetes.protobuf,application/json", "json", ""),
        ("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", "json", "Table"),
        ("application/json;as=Table;v=v9;g=meta.k8s.io,application/json", "json", ""),
        ("application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io", "json", "PartialObjectMetadata"),
    ],
)
def test_representations_are_negotiated(accept: str, media: str, form: str) -> None:
    found = negotiate(accept)
    assert (found.media, found.form) == (media, form)


@pytest.mark.parametrize("accept", ["text/html", "application/json;as=Table;v=v9;g=meta.k8s.io", "application/cbor"])
def test_what_cannot_be_produced_is_406(accept: str) -> None:
    with pytest.raises(ApiError) as caught:
        negotiate(accept)
    assert caught.value.code == 406


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"timeoutSeconds": "x"}, 400),
        ({"resourceVersionMatch": "Exact"}, 422),
        ({"resourceVersionMatch": "Exact", "resourceVersion": "0"}, 422),
        ({"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "resourceVersion": "1"}, 422),
        ({"watch": "1", "sendInitialEvents": "true"}, 422),
        ({"watch": "1", "resourceVersion": "5", "resourceVersionMatch": "NotOlderThan"}, 422),
    ],
)
def test_list_options_that_make_no_sense_are_refused(query: dict[str, str], code: int) -> None:
    with pytest.raises(ApiError) as caught:
        ListOptions.parse(query)
    assert caught.value.code == code


def test_any_value_of_watch_but_false_is_true() -> None:
    assert ListOptions.parse({"watch": "maybe"}).watch
    assert not ListOptions.parse({"watch": "false"}).watch


def test_the_field_manager_is_the_user_agent_up_to_its_version() -> None:
    found = WriteOptions.parse({}, "CreateOptions", dry_runs=["All"], user="u", agent="kubectl/v1.32 (linux)")
    assert (found.manager, found.dry_run, found.validation) == ("kubectl", True, "Warn")


def test_delete_options_come_from_body_and_query() -> None:
    query = MultiDict({"gracePeriodSeconds": "5", "propagationPolicy": "Orphan"})
    found = DeleteOptions.parse({"gracePeriodSeconds": 0, "preconditions": {"uid": "u"}}, query, [])
    assert (found.grace, found.propagation, found.uid) == (0, "Orphan", "u")
    with pytest.raises(ApiError) as caught:
        DeleteOptions.parse({"propagationPolicy": "Sideways"}, {}, [])
    assert caught.value.code == 422
