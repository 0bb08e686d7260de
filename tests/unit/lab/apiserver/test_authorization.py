"""RBAC: bindings, roles, names, subresources, aggregation; and the answer to those who may not."""

from typing import Any

import pytest

from vmnet.lab.apiserver.authentication import User
from vmnet.lab.apiserver.authorization import GROUP, Attributes, Authorizer, refused
from vmnet.lab.apiserver.storage import Store

ROBOT = User("system:serviceaccount:a:robot", "", ("system:serviceaccounts", "system:authenticated"))
JANE = User("jane", "", ("lab-users", "system:authenticated"))
ADMIN = User("root", "", ("system:masters",))
ACCOUNT = {"kind": "ServiceAccount", "namespace": "a", "name": "robot"}


def role(store: Store, name: str, *rules: dict[str, Any], namespace: str = "", **more: Any) -> None:
    kind = "Role" if namespace else "ClusterRole"
    metadata = {"name": name, **({"namespace": namespace} if namespace else {}), "labels": more.pop("labels", {})}
    store.put((GROUP, f"{kind.lower()}s"), {"apiVersion": "", "kind": kind, "metadata": metadata, "rules": list(rules), **more})  # fmt: skip  # noqa: E501


def bind(store: Store, name: str, subject: dict[str, str], namespace: str = "", kind: str = "ClusterRole") -> None:
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    own = "RoleBinding" if namespace else "ClusterRoleBinding"
    body = {"apiVersion": "", "kind": own, "metadata": metadata, "roleRef": {"kind": kind, "name": name}}
    store.put((GROUP, f"{own.lower()}s"), {**body, "subjects": [subject]})


def rule(verbs: str, resources: str, group: str = "", *names: str) -> dict[str, Any]:
    found = {"apiGroups": [group], "resources": resources.split(), "verbs": verbs.split()}
    return {**found, "resourceNames": list(names)} if names else found


def test_nobody_may_anything_but_administrators() -> None:
    authorizer = Authorizer(Store())
    asked = Attributes("list", resource="pods")
    assert authorizer.decide(ADMIN, asked).allowed
    assert not authorizer.decide(JANE, asked).allowed


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        (Attributes("get", path="/apis"), True),
        (Attributes("get", path="/openapi/v3/api/v1"), True),
        (Attributes("get", path="/metrics"), False),
        (Attributes("create", "authorization.k8s.io", "selfsubjectaccessreviews"), True),
        (Attributes("create", "authentication.k8s.io", "tokenreviews"), False),
    ],
)
def test_what_everybody_who_is_known_may(asked: Attributes, allowed: bool) -> None:
    assert Authorizer(Store()).decide(JANE, asked).allowed == allowed


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        (Attributes("get", resource="pods", namespace="a", name="x"), True),
        (Attributes("get", resource="pods", subresource="log", namespace="a", name="x"), False),
        (Attributes("patch", resource="pods", subresource="status", namespace="a", name="x"), True),
        (Attributes("delete", resource="pods", namespace="a", name="x"), False),
        (Attributes("get", "apps", "pods", namespace="a", name="x"), False),
        (Attributes("get", resource="secrets", namespace="a", name="one"), True),
        (Attributes("get", resource="secrets", namespace="a", name="two"), False),
        (Attributes("get", resource="secrets", namespace="a"), False),
    ],
)
def test_a_rule_covers_what_it_names(asked: Attributes, allowed: bool) -> None:
    store = Store()
    role(store, "r", rule("get", "pods"), rule("patch", "pods/status"), rule("get", "secrets", "", "one"))
    bind(store, "r", ACCOUNT)
    decision = Authorizer(store).decide(ROBOT, asked)
    assert decision.allowed == allowed
    if allowed:
        assert decision.reason == (
            'RBAC: allowed by ClusterRoleBinding "r" of ClusterRole "r" to ServiceAccount "robot/a"'
        )
    assert not Authorizer(store).decide(JANE, asked).allowed


def test_a_binding_of_a_namespace_holds_there_alone_and_changes_at_once() -> None:
    store = Store()
    authorizer = Authorizer(store)
    role(store, "r", rule("list", "pods"), namespace="a")
    here, there = (Attributes("list", resource="pods", namespace=name) for name in ("a", "b"))
    assert not authorizer.decide(JANE, here).allowed
    bind(store, "r", {"kind": "Group", "name": "lab-users"}, namespace="a", kind="Role")
    assert authorizer.decide(JANE, here).allowed
    assert not authorizer.decide(JANE, there).allowed
    assert not authorizer.decide(JANE, Attributes("list", resource="pods")).allowed
    store.remove((GROUP, "rolebindings"), ("a", "r"))
    assert not authorizer.decide(JANE, here).allowed


def test_known_roles_take_in_what_is_labelled_for_them() -> None:
    store = Store()
    asked = Attributes("list", "k8s.ovn.org", "userdefinednetworks", namespace="a")
    bind(store, "view", {"kind": "User", "name": "jane"}, namespace="a")
    authorizer = Authorizer(store)
    assert authorizer.decide(JANE, Attributes("list", resource="pods", namespace="a")).allowed
    assert not authorizer.decide(JANE, asked).allowed
    role(store, "more", rule("list", "userdefinednetworks", "k8s.ovn.org"), labels={f"{GROUP}/aggregate-to-view": "true"})  # fmt: skip  # noqa: E501
    assert authorizer.decide(JANE, asked).allowed


def test_a_role_of_other_roles() -> None:
    store = Store()
    role(store, "one", rule("get", "nodes"), labels={"part": "yes"})
    role(store, "all", aggregationRule={"clusterRoleSelectors": [{"matchLabels": {"part": "yes"}}]})
    bind(store, "all", {"kind": "User", "name": "jane"})
    assert Authorizer(store).decide(JANE, Attributes("get", resource="nodes", name="n")).allowed


def test_the_real_servers_words() -> None:
    one = Attributes("patch", resource="pods", subresource="status", namespace="err", name="x")
    assert refused(JANE, one).status["message"] == (
        'pods "x" is forbidden: User "jane" cannot patch resource "pods/status" in API group "" in the namespace "err"'
    )
    assert refused(JANE, one).status["details"] == {"name": "x", "kind": "pods"}
    every = Attributes("list", "nothere.example.test", "things")
    assert refused(JANE, every).status["message"] == (
        'things.nothere.example.test is forbidden: User "jane" cannot list resource "things" in API group '
        '"nothere.example.test" at the cluster scope'
    )
    assert refused(JANE, Attributes("get", path="/metrics")).status["message"] == (
        'forbidden: User "jane" cannot get path "/metrics"'
    )
