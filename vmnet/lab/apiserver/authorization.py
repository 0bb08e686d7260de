"""Who may do what: roles and their bindings (RBAC), as kube-apiserver evaluates them.

Members of ``system:masters`` may do everything. The roles that every cluster has are known without objects; ``view``,
``edit`` and ``admin`` take in what is labelled for them. That nobody may grant more than is their own is not enforced.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmnet.lab.apiserver import selectors
from vmnet.lab.apiserver.authentication import MASTERS, User
from vmnet.lab.apiserver.status import ApiError
from vmnet.lab.apiserver.storage import Change, Object, StorageKey, Store

GROUP: Final = "rbac.authorization.k8s.io"
_ACCOUNT: Final = "system:serviceaccount:"
_READ: Final = ("get", "list", "watch")
_WRITE: Final = ("create", "delete", "deletecollection", "patch", "update")

Rule = Mapping[str, Any]
"""A PolicyRule."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What is asked for. ``path`` is that of a request for no resource, which has none of the others but ``verb``."""

    verb: str
    group: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""

    @property
    def full_resource(self) -> str:
        """``pods`` or ``pods/status``."""
        return f"{self.resource}/{self.subresource}" if self.subresource else self.resource


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether it may be, and which binding says so."""

    allowed: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Grant:
    rule: Rule
    reason: str


def _rule(groups: Iterable[str], resources: Iterable[str], verbs: Iterable[str]) -> Rule:
    return {"apiGroups": list(groups), "resources": list(resources), "verbs": list(verbs)}


_EVERYTHING: Final = (_rule("*", "*", "*"), {"nonResourceURLs": ["*"], "verbs": ["*"]})
_WORKLOADS: Final = ("daemonsets", "deployments", "replicasets", "statefulsets", "deployments/scale")
_SEEN: Final = (
    _rule(
        [""],
        [
            *("configmaps", "endpoints", "persistentvolumeclaims", "pods", "pods/log", "pods/status", "services"),
            *("serviceaccounts", "events", "namespaces", "limitranges", "resourcequotas", "replicationcontrollers"),
        ],
        _READ,
    ),
    _rule(["apps"], _WORKLOADS, _READ),
    _rule(["batch"], ["cronjobs", "jobs"], _READ),
    _rule(["discovery.k8s.io"], ["endpointslices"], _READ),
    _rule(["networking.k8s.io"], ["ingresses", "networkpolicies"], _READ),
    _rule(["policy"], ["poddisruptionbudgets"], _READ),
)
_EDITED: Final = (
    _rule(
        [""],
        ["configmaps", "persistentvolumeclaims", "pods", "services", "serviceaccounts", "secrets", "events"],
        _WRITE,
    ),
    _rule([""], ["secrets"], _READ),
    _rule([""], ["pods/attach", "pods/exec", "pods/portforward", "pods/proxy"], ("get", "create")),
    _rule([""], ["pods/eviction", "serviceaccounts/token"], ("create",)),
    _rule(["apps"], _WORKLOADS, _WRITE),
    _rule(["batch"], ["cronjobs", "jobs"], _WRITE),
    _rule(["networking.k8s.io"], ["ingresses", "networkpolicies"], _WRITE),
    _rule(["policy"], ["poddisruptionbudgets"], _WRITE),
)
_GRANTED: Final = (_rule([GROUP], ["roles", "rolebindings"], (*_READ, *_WRITE)),)
_KNOWN_ROLES: Final[dict[str, tuple[Rule, ...]]] = {
    "cluster-admin": _EVERYTHING,
    "view": _SEEN,
    "edit": (*_SEEN, *_EDITED),
    "admin": (*_SEEN, *_EDITED, *_GRANTED),
}
_OF_EVERYBODY: Final[dict[str, tuple[tuple[str, Rule], ...]]] = {
    "system:authenticated": (
        (
            "system:basic-user",
            _rule(["authorization.k8s.io"], ["selfsubjectaccessreviews", "selfsubjectrulesreviews"], ["create"]),
        ),
        ("system:basic-user", _rule(["authentication.k8s.io"], ["selfsubjectreviews"], ["create"])),
        (
            "system:discovery",
            {
                "nonResourceURLs": [
                    *("/api", "/api/*", "/apis", "/apis/*", "/healthz", "/livez", "/openapi", "/openapi/*", "/readyz"),
                    *("/version", "/version/"),
                ],
                "verbs": ["get"],
            },
        ),
        (
            "system:public-info-viewer",
            {"nonResourceURLs": ["/healthz", "/livez", "/readyz", "/version", "/version/"], "verbs": ["get"]},
        ),
    ),
}


class Authorizer:
    """Evaluates the roles and bindings of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._grants: dict[tuple[str, tuple[str, ...], str], tuple[_Grant, ...]] = {}
        store.observe(self._changed)

    def _changed(self, storage: StorageKey, _: Change) -> None:
        if storage[0] == GROUP:
            self._grants.clear()

    def decide(self, user: User, asked: Attributes) -> Decision:
        """Whether ``user`` may do it."""
        if MASTERS in user.groups:
            return Decision(True)
        for grant in (*self._of(user, ""), *(self._of(user, asked.namespace) if asked.namespace else ())):
            if _covers(grant.rule, asked):
                return Decision(True, grant.reason)
        return Decision(False)

    def rules(self, user: User, namespace: str) -> list[Rule]:
        """All that a user may do in a namespace."""
        if MASTERS in user.groups:
            return list(_EVERYTHING)
        return [grant.rule for grant in (*self._of(user, ""), *(self._of(user, namespace) if namespace else ()))]

    def _of(self, user: User, namespace: str) -> tuple[_Grant, ...]:
        """What bindings of the cluster (no namespace) or of a namespace grant a user."""
        key = (user.name, user.groups, namespace)
        found = self._grants.get(key)
        if found is None:
            found = self._grants[key] = tuple(self._granted(user, namespace))
        return found

    def _granted(self, user: User, namespace: str) -> Iterator[_Grant]:
        if not namespace:
            for group in user.groups:
                for name, rule in _OF_EVERYBODY.get(group, ()):
                    reason = f'RBAC: allowed by ClusterRoleBinding "{name}" of ClusterRole "{name}" to Group "{group}"'
                    yield _Grant(rule, reason)
            bindings = self._store.items((GROUP, "clusterrolebindings"))
        else:
            bindings = self._store.items((GROUP, "rolebindings"), namespace)
        for stored in sorted(bindings, key=lambda item: str(item.obj["metadata"]["name"])):
            subject = next((item for item in stored.obj.get("subjects") or () if _is(item, user, namespace)), None)
            if subject is None:
                continue
            role = stored.obj["roleRef"]
            kind, name = stored.obj["kind"], stored.obj["metadata"]["name"]
            shown = f"{namespace}/{name}" if namespace else name
            reason = f'RBAC: allowed by {kind} "{shown}" of {role["kind"]} "{role["name"]}" to {_shown(subject)}'
            for rule in self._rules(role, namespace):
                yield _Grant(rule, reason)

    def _rules(self, role: Mapping[str, Any], namespace: str) -> list[Rule]:
        name = str(role["name"])
        if role["kind"] == "Role":
            stored = self._store.get((GROUP, "roles"), (namespace, name))
            return list((stored.obj.get("rules") if stored else None) or ())
        stored = self._store.get((GROUP, "clusterroles"), ("", name))
        if stored is None:
            label = f"{GROUP}/aggregate-to-{name}"
            labelled = self._labelled([{"matchLabels": {label: "true"}}])
            return [*_KNOWN_ROLES[name], *labelled] if name in _KNOWN_ROLES else []
        aggregated = (stored.obj.get("aggregationRule") or {}).get("clusterRoleSelectors")
        return self._labelled(aggregated) if aggregated else list(stored.obj.get("rules") or ())

    def _labelled(self, wanted: Iterable[Object]) -> list[Rule]:
        parsed = [selectors.from_object(item) for item in wanted]
        return [
            rule
            for stored in self._store.items((GROUP, "clusterroles"))
            if any(selectors.matches_labels(item, stored.obj) for item in parsed)
            for rule in stored.obj.get("rules") or ()
        ]


def _is(subject: Mapping[str, Any], user: User, namespace: str) -> bool:
    match subject["kind"]:
        case "User":
            return bool(subject["name"] == user.name)
        case "Group":
            return subject["name"] in user.groups
        case "ServiceAccount":
            return user.name == f"{_ACCOUNT}{subject.get('namespace') or namespace}:{subject['name']}"
    return False


def _shown(subject: Mapping[str, Any]) -> str:
    if subject["kind"] == "ServiceAccount":
        return f'ServiceAccount "{subject["name"]}/{subject.get("namespace", "")}"'
    return f'{subject["kind"]} "{subject["name"]}"'


def _covers(rule: Rule, asked: Attributes) -> bool:
    if not {asked.verb, "*"} & set(rule.get("verbs") or ()):
        return False
    if asked.path:
        return any(fnmatch.fnmatchcase(asked.path, pattern) for pattern in rule.get("nonResourceURLs") or ())
    named = {asked.full_resource, "*"} | ({f"*/{asked.subresource}"} if asked.subresource else set())
    only = rule.get("resourceNames")
    return (
        bool({asked.group, "*"} & set(rule.get("apiGroups") or ()))
        and bool(named & set(rule.get("resources") or ()))
        and (not only or asked.name in only)
    )


def refused(user: User, asked: Attributes) -> ApiError:
    """403, as the real server words it."""
    who = f'User "{user.name}" cannot'
    if asked.path:
        return ApiError(403, "Forbidden", f'forbidden: {who} {asked.verb} path "{asked.path}"', {})
    where = f'in the namespace "{asked.namespace}"' if asked.namespace else "at the cluster scope"
    qualified = f"{asked.resource}.{asked.group}" if asked.group else asked.resource
    subject = f'{qualified} "{asked.name}"' if asked.name else qualified
    what = f'resource "{asked.full_resource}" in API group "{asked.group}"'
    found = {"name": asked.name, "group": asked.group, "kind": asked.resource}
    return ApiError(
        403,
        "Forbidden",
        f"{subject} is forbidden: {who} {asked.verb} {what} {where}",
        {key: value for key, value in found.items() if value},
    )
