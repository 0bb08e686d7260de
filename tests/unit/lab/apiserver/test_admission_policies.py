"""Admission policies: which writes they meet, and what they say (the recorded server's words: tests/contract)."""

from typing import Any

import pytest

from vmnet.lab.apiserver.admission import Asked
from vmnet.lab.apiserver.admission_policies import (
    BINDINGS,
    POLICIES,
    AdmissionPolicies,
    binding_causes,
    policy_causes,
)
from vmnet.lab.apiserver.authentication import User
from vmnet.lab.apiserver.resources import Registry
from vmnet.lab.apiserver.status import ApiError
from vmnet.lab.apiserver.storage import Store

REGISTRY = Registry()
RULE = {"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE", "UPDATE"]}
POD = {"metadata": {"name": "p", "namespace": "a", "labels": {"app": "x"}}, "spec": {"nodeName": "n1"}}


def policy(store: Store, expression: str = "false", name: str = "p", **spec: Any) -> None:
    """A policy and its binding."""
    actions = spec.pop("actions", ["Deny"])
    narrower = spec.pop("narrower", {})
    body = {"matchConstraints": {"resourceRules": [RULE]}, "validations": [{"expression": expression}], **spec}
    store.put(POLICIES, {"apiVersion": "", "kind": "P", "metadata": {"name": name}, "spec": body})
    bound = {"policyName": name, "validationActions": actions, **narrower}
    store.put(BINDINGS, {"apiVersion": "", "kind": "B", "metadata": {"name": name}, "spec": bound})


def asked(operation: str = "CREATE", plural: str = "pods", subresource: str = "", user: str = "jane") -> Asked:
    info = REGISTRY.lookup("", "v1", plural)
    assert info is not None
    return Asked(info, "a", "p", subresource, operation, User(user), dry_run=False, options={})


def verdict(store: Store, asked: Asked, obj: Any = POD, old: Any = None) -> tuple[str, list[str]]:
    """The denial's message (empty: none), and warnings."""
    policies = AdmissionPolicies(store, REGISTRY)
    warnings: list[str] = []
    try:
        policies.check(policies.meet(asked), asked, obj, old, warnings)
    except ApiError as error:
        return str(error.status["message"]), warnings
    return "", warnings


@pytest.mark.parametrize(
    ("asked", "denied"),
    [
        (asked(), True),
        (asked("UPDATE"), True),
        (asked("DELETE"), False),
        (asked(plural="services"), False),
        (asked("UPDATE", subresource="status"), False),
    ],
)
def test_a_policy_meets_what_its_rules_name(asked: Asked, denied: bool) -> None:
    store = Store()
    policy(store)
    assert bool(verdict(store, asked)[0]) == denied


@pytest.mark.parametrize(
    ("narrower", "denied"),
    [
        ({"matchResources": {"objectSelector": {"matchLabels": {"app": "x"}}}}, True),
        ({"matchResources": {"objectSelector": {"matchLabels": {"app": "y"}}}}, False),
        ({"matchResources": {"namespaceSelector": {"matchLabels": {"team": "one"}}}}, True),
        ({"matchResources": {"namespaceSelector": {"matchLabels": {"team": "two"}}}}, False),
        ({"matchResources": {"excludeResourceRules": [RULE]}}, False),
    ],
)
def test_a_binding_may_be_narrower(narrower: dict[str, Any], denied: bool) -> None:
    store = Store()
    metadata = {"name": "a", "labels": {"team": "one"}}
    store.put(("", "namespaces"), {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    policy(store, narrower=narrower)
    assert bool(verdict(store, asked())[0]) == denied


def test_a_condition_on_the_request_is_asked_without_the_object() -> None:
    store = Store()
    policy(store, matchConditions=[{"name": "c", "expression": "request.userInfo.username == 'bob'"}])
    policies = AdmissionPolicies(store, REGISTRY)
    assert policies.meet(asked()) == []
    assert len(policies.meet(asked(user="bob"))) == 1


def test_conditions_on_the_object() -> None:
    store = Store()
    policy(store, matchConditions=[{"name": "c", "expression": "object.spec.nodeName == 'n2'"}])
    assert verdict(store, asked())[0] == ""
    assert verdict(store, asked(), {**POD, "spec": {"nodeName": "n2"}})[0] != ""


def test_composed_variables_are_worked_out_when_they_are_used() -> None:
    variables = [
        {"name": "node", "expression": "object.spec.nodeName"},
        {"name": "twice", "expression": "variables.node + variables.node"},
        {"name": "broken", "expression": "object.nope"},
    ]
    store = Store()
    policy(store, "variables.twice == 'n1n1'", variables=variables)
    assert verdict(store, asked())[0] == ""


@pytest.mark.parametrize(
    ("validation", "says"),
    [
        ({"expression": "false"}, "failed expression: false"),
        ({"expression": "false", "message": "no"}, "no"),
        ({"expression": "false", "message": "no", "messageExpression": "'not ' + object.metadata.name"}, "not p"),
        ({"expression": "false", "message": "no", "messageExpression": "object.nope"}, "no"),
        ({"expression": "object.nope"}, "expression 'object.nope' resulted in error: no such key: nope"),
    ],
)
def test_what_a_denial_says(validation: dict[str, str], says: str) -> None:
    store = Store()
    policy(store, validations=[validation])
    where = "pods \"p\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'p' denied request: "
    assert verdict(store, asked())[0] == where + says


def test_what_cannot_be_evaluated_is_let_through_where_that_is_wanted() -> None:
    store = Store()
    policy(store, "object.nope", failurePolicy="Ignore")
    assert verdict(store, asked())[0] == ""


def test_a_warning_denies_nothing() -> None:
    store = Store()
    policy(store, actions=["Warn", "Audit"])
    warned = "Validation failed for ValidatingAdmissionPolicy 'p' with binding 'p': failed expression: false"
    assert verdict(store, asked()) == ("", [warned])


def test_parameters_by_name() -> None:
    store = Store()
    kind = {"paramKind": {"apiVersion": "v1", "kind": "ConfigMap"}}
    reference = {"paramRef": {"name": "limits", "namespace": "b"}}
    policy(store, "object.spec.nodeName == params.data.node", narrower=reference, **kind)
    assert "no params found" in verdict(store, asked())[0]
    limits = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "limits", "namespace": "b"}}
    store.put(("", "configmaps"), {**limits, "data": {"node": "n1"}})
    assert verdict(store, asked())[0] == ""


def test_what_is_wrong_with_a_policy_is_named() -> None:
    spec = {
        "failurePolicy": "Fail",
        "matchConstraints": {"resourceRules": [RULE]},
        "variables": [{"name": "one", "expression": "variables.two"}, {"name": "two", "expression": "1"}],
        "validations": [{"expression": "object ===", "reason": "Odd"}, {"expression": "nobody == 1"}],
    }
    fields = [cause.field for cause in policy_causes({"spec": spec})]
    assert fields == [
        "spec.variables[0].expression",
        "spec.validations[0].expression",
        "spec.validations[0].reason",
        "spec.validations[1].expression",
    ]
    assert [cause.field for cause in policy_causes({"spec": {"failurePolicy": "Fail"}})] == [
        "spec.matchConstraints.resourceRules",
        "spec.validations",
    ]


def test_what_is_wrong_with_a_binding_is_named() -> None:
    assert [cause.field for cause in binding_causes({"spec": {}})] == ["spec.policyName", "spec.validationActions"]
    both = {"policyName": "p", "validationActions": ["Deny", "Warn"]}
    assert [cause.field for cause in binding_causes({"spec": both})] == ["spec.validationActions"]
    odd = {"policyName": "p", "validationActions": ["Odd"]}
    assert [cause.field for cause in binding_causes({"spec": odd})] == ["spec.validationActions[0]"]
