"""Defaults and validation of roles, bindings and webhooks; that they are decoded strictly."""

import copy
from typing import Any

import pytest

from vmnet.lab import manifests
from vmnet.lab.apiserver import core_defaults, core_validation
from vmnet.lab.apiserver.shapes import Shape, builtin

RBAC = "rbac.authorization.k8s.io"
ADMISSION = "admissionregistration.k8s.io"
ROLE = {"kind": "Role", "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]}
BINDING = {
    "kind": "ClusterRoleBinding",
    "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": "r"},
    "subjects": [{"kind": "ServiceAccount", "name": "s", "namespace": "a"}],
}
HOOKS = {
    "kind": "MutatingWebhookConfiguration",
    "webhooks": [
        {
            "name": "a.b.c",
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
            "clientConfig": {"service": {"namespace": "a", "name": "s"}},
            "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}],
        }
    ],
}


def fields(group: str, plural: str, obj: Any) -> list[str]:
    return [cause.field for cause in core_validation.created((group, plural), obj)]


def changed(obj: Any, path: tuple[Any, ...], value: Any) -> Any:
    found = copy.deepcopy(obj)
    place = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return found


@pytest.mark.parametrize(
    ("group", "plural", "obj"),
    [
        (RBAC, "roles", ROLE),
        (RBAC, "clusterrolebindings", BINDING),
        (ADMISSION, "mutatingwebhookconfigurations", HOOKS),
    ],
)
def test_what_is_right_is_accepted(group: str, plural: str, obj: Any) -> None:
    assert fields(group, plural, obj) == []


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("rules", 0, "verbs"), [], "rules[0].verbs"),
        (("rules", 0, "apiGroups"), [], "rules[0].apiGroups"),
        (("rules", 0, "resources"), [], "rules[0].resources"),
    ],
)
def test_rules_of_roles(path: tuple[Any, ...], value: Any, field: str) -> None:
    assert fields(RBAC, "roles", changed(ROLE, path, value)) == [field]


def test_a_role_of_a_namespace_has_no_urls() -> None:
    urls = {"kind": "Role", "rules": [{"nonResourceURLs": ["/metrics"], "verbs": ["get"]}]}
    assert fields(RBAC, "roles", urls) == ["rules[0].nonResourceURLs"]
    assert fields(RBAC, "clusterroles", {**urls, "kind": "ClusterRole"}) == []


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("roleRef", "kind"), "Role", "roleRef.kind"),
        (("roleRef", "name"), "", "roleRef.name"),
        (("subjects", 0, "namespace"), "", "subjects[0].namespace"),
        (("subjects", 0, "kind"), "Pod", "subjects[0].kind"),
    ],
)
def test_bindings(path: tuple[Any, ...], value: Any, field: str) -> None:
    assert fields(RBAC, "clusterrolebindings", changed(BINDING, path, value)) == [field]


def test_a_binding_keeps_its_role() -> None:
    other = changed(BINDING, ("roleRef", "name"), "q")
    causes = core_validation.changed((RBAC, "clusterrolebindings"), other, BINDING)
    assert [cause.field for cause in causes] == ["roleRef"]


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("name",), "a.b", "webhooks[0].name"),
        (("sideEffects",), "Some", "webhooks[0].sideEffects"),
        (("timeoutSeconds",), 31, "webhooks[0].timeoutSeconds"),
        (("admissionReviewVersions",), [], "webhooks[0].admissionReviewVersions"),
        (("clientConfig",), {}, "webhooks[0].clientConfig"),
    ],
)
def test_webhooks(path: tuple[Any, ...], value: Any, field: str) -> None:
    found = fields(ADMISSION, "mutatingwebhookconfigurations", changed(HOOKS, ("webhooks", 0, *path), value))
    assert found == [field]


def test_defaults_of_webhooks_are_the_recorded_servers() -> None:
    found = copy.deepcopy(HOOKS)
    core_defaults.fill((ADMISSION, "mutatingwebhookconfigurations"), found)
    (hook,) = found["webhooks"]
    assert hook["rules"][0]["scope"] == "*"  # type: ignore[index]
    assert {name: hook[name] for name in ("failurePolicy", "matchPolicy", "reinvocationPolicy", "timeoutSeconds")} == {  # type: ignore[index]
        "failurePolicy": "Fail",
        "matchPolicy": "Equivalent",
        "reinvocationPolicy": "Never",
        "timeoutSeconds": 10,
    }
    assert (hook["namespaceSelector"], hook["objectSelector"]) == ({}, {})  # type: ignore[index]


def unknown(value: Any, shape: Shape, path: str) -> list[str]:
    """Fields of a value that its kind's schema does not declare."""
    if isinstance(value, dict):
        return [
            found
            for name, item in value.items()
            for found in (
                unknown(item, shape.child(name), f"{path}.{name}") if shape.knows(name) else [f"{path}.{name}"]
            )
        ]
    if isinstance(value, list) and shape.items is not None:
        return [found for item in value for found in unknown(item, shape.items, path)]
    return []


def test_every_kind_that_is_installed_has_a_schema_and_no_unknown_field() -> None:
    for item in manifests.documents(manifests.INSTALL.read_text()):
        group, _, version = item["apiVersion"].rpartition("/")
        shape = builtin(group, version, item["kind"])
        assert shape is not None, item["kind"]
        assert unknown(item, shape, item["kind"]) == []
    wrong = {"apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": {}, "rules": [{"verb": ["get"]}]}
    role = builtin(RBAC, "v1", "Role")
    assert role is not None
    assert unknown(wrong, role, "Role") == ["Role.rules.verb"]
