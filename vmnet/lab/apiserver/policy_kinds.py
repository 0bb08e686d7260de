"""Defaults and validation of the kinds that say who may do what: roles, bindings, webhooks, admission policies."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from vmnet.lab.apiserver.admission_policies import binding_causes, condition_causes, policy_causes
from vmnet.lab.apiserver.status import Cause, invalid_value, required, unsupported

Object = dict[str, Any]

_RBAC: Final = "rbac.authorization.k8s.io"
_ADMISSION: Final = "admissionregistration.k8s.io"


def _match_resources(found: Object) -> None:
    for name in ("namespaceSelector", "objectSelector"):
        found.setdefault(name, {})
    found.setdefault("matchPolicy", "Equivalent")
    for kind in ("resourceRules", "excludeResourceRules"):
        for rule in found.get(kind) or ():
            rule.setdefault("scope", "*")


def _policy(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    spec.setdefault("failurePolicy", "Fail")
    if spec.get("matchConstraints") is not None:
        _match_resources(spec["matchConstraints"])


def _policy_binding(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    if spec.get("matchResources") is not None:
        _match_resources(spec["matchResources"])


def _hooks(obj: Object) -> None:
    for hook in obj.get("webhooks") or ():
        for name, value in (("failurePolicy", "Fail"), ("matchPolicy", "Equivalent"), ("timeoutSeconds", 10)):
            hook.setdefault(name, value)
        for name in ("namespaceSelector", "objectSelector"):
            hook.setdefault(name, {})
        if obj["kind"].startswith("Mutating"):
            hook.setdefault("reinvocationPolicy", "Never")
        for rule in hook.get("rules") or ():
            rule.setdefault("scope", "*")
        service = (hook.get("clientConfig") or {}).get("service")
        if service is not None:
            service.setdefault("port", 443)


def _priority(obj: Object) -> None:
    obj.setdefault("preemptionPolicy", "PreemptLowerPriority")


DEFAULTS: Final[dict[tuple[str, str], Callable[[Object], None]]] = {
    (_ADMISSION, "validatingadmissionpolicies"): _policy,
    (_ADMISSION, "validatingadmissionpolicybindings"): _policy_binding,
    (_ADMISSION, "mutatingwebhookconfigurations"): _hooks,
    (_ADMISSION, "validatingwebhookconfigurations"): _hooks,
    ("scheduling.k8s.io", "priorityclasses"): _priority,
}


def _role(obj: Mapping[str, Any]) -> list[Cause]:
    causes: list[Cause] = []
    for position, rule in enumerate(obj.get("rules") or ()):
        field = f"rules[{position}]"
        if not rule.get("verbs"):
            causes.append(required(f"{field}.verbs", "verbs must contain at least one value"))
        urls = rule.get("nonResourceURLs")
        if urls:
            if obj["kind"] == "Role":
                text = "namespaced rules cannot apply to non-resource URLs"
                causes.append(invalid_value(f"{field}.nonResourceURLs", urls, text))
            if any(rule.get(name) for name in ("apiGroups", "resources", "resourceNames")):
                text = "rules cannot apply to both regular resources and non-resource URLs"
                causes.append(invalid_value(f"{field}.nonResourceURLs", urls, text))
            continue
        if not rule.get("apiGroups"):
            causes.append(required(f"{field}.apiGroups", "resource rules must supply at least one api group"))
        if not rule.get("resources"):
            causes.append(required(f"{field}.resources", "resource rules must supply at least one resource"))
    return causes


_SUBJECTS: Final = ("Group", "ServiceAccount", "User")


def _role_binding(obj: Mapping[str, Any]) -> list[Cause]:
    causes: list[Cause] = []
    reference = obj.get("roleRef") or {}
    kinds = ["ClusterRole"] if obj["kind"] == "ClusterRoleBinding" else ["ClusterRole", "Role"]
    if reference.get("apiGroup") != _RBAC:
        causes.append(unsupported("roleRef.apiGroup", reference.get("apiGroup"), [_RBAC]))
    if reference.get("kind") not in kinds:
        causes.append(unsupported("roleRef.kind", reference.get("kind"), kinds))
    if not reference.get("name"):
        causes.append(required("roleRef.name"))
    for position, subject in enumerate(obj.get("subjects") or ()):
        field = f"subjects[{position}]"
        if not subject.get("name"):
            causes.append(required(f"{field}.name"))
        if subject.get("kind") not in _SUBJECTS:
            causes.append(unsupported(f"{field}.kind", subject.get("kind"), list(_SUBJECTS)))
        elif subject["kind"] == "ServiceAccount" and not subject.get("namespace"):
            causes.append(required(f"{field}.namespace"))
    return causes


def _role_binding_change(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[Cause]:
    if new.get("roleRef") == old.get("roleRef"):
        return []
    return [invalid_value("roleRef", new.get("roleRef"), "cannot change roleRef")]


def _webhooks(obj: Mapping[str, Any]) -> list[Cause]:
    causes: list[Cause] = []
    for position, hook in enumerate(obj.get("webhooks") or ()):
        field = f"webhooks[{position}]"
        causes += condition_causes(hook.get("matchConditions") or (), f"{field}.matchConditions")
        if str(hook.get("name") or "").count(".") < 2:
            text = "should be a domain with at least three segments separated by dots"
            causes.append(invalid_value(f"{field}.name", hook.get("name") or "", text))
        if hook.get("sideEffects") not in ("None", "NoneOnDryRun"):
            causes.append(unsupported(f"{field}.sideEffects", hook.get("sideEffects"), ["None", "NoneOnDryRun"]))
        if not hook.get("admissionReviewVersions"):
            text = "must specify one of v1, v1beta1"
            causes.append(required(f"{field}.admissionReviewVersions", text))
        config = hook.get("clientConfig") or {}
        if bool(config.get("url")) == bool(config.get("service")):
            causes.append(required(f"{field}.clientConfig", "exactly one of url or service is required"))
        seconds = hook.get("timeoutSeconds")
        if seconds is not None and not 1 <= seconds <= 30:
            text = "the timeout value must be between 1 and 30 seconds"
            causes.append(invalid_value(f"{field}.timeoutSeconds", seconds, text))
    return causes


CREATE: Final[dict[tuple[str, str], Callable[[Any], list[Cause]]]] = {
    **{(_RBAC, plural): _role for plural in ("roles", "clusterroles")},
    **{(_RBAC, plural): _role_binding for plural in ("rolebindings", "clusterrolebindings")},
    (_ADMISSION, "validatingadmissionpolicies"): policy_causes,
    (_ADMISSION, "validatingadmissionpolicybindings"): binding_causes,
    (_ADMISSION, "mutatingwebhookconfigurations"): _webhooks,
    (_ADMISSION, "validatingwebhookconfigurations"): _webhooks,
}
UPDATE: Final[dict[tuple[str, str], Callable[[Any, Any], list[Cause]]]] = {
    (_RBAC, plural): _role_binding_change for plural in ("rolebindings", "clusterrolebindings")
}
