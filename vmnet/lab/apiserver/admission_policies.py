"""ValidatingAdmissionPolicies: which of them a write meets, and what their expressions say of it.

As recorded from the real server, but a policy is in force at once, ``status.typeChecking`` is not written, parameters
are found by name alone, and the variable ``authorizer`` is not there.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmnet.lab.apiserver import selectors
from vmnet.lab.apiserver.admission import CONDITION_NAMES, GROUP, Asked, conditions_met, review_request, ruled
from vmnet.lab.apiserver.cel import CompileError, EvaluationError, Expression, compiled
from vmnet.lab.apiserver.resources import Registry, ResourceInfo
from vmnet.lab.apiserver.status import ApiError, Cause, invalid_value, required, unsupported
from vmnet.lab.apiserver.storage import Object, Store

POLICIES: Final = (GROUP, "validatingadmissionpolicies")
BINDINGS: Final = (GROUP, "validatingadmissionpolicybindings")
_NAMESPACES: Final = ("", "namespaces")
_NAMES: Final = frozenset({"object", "oldObject", "request", "namespaceObject", "params", "variables"})
_OBJECTS: Final = ("object", "oldObject", "variables")
_VARIABLE: Final = re.compile(r"\bvariables\.(\w+)")
_CODES: Final = {"Unauthorized": 401, "Forbidden": 403, "Invalid": 422, "RequestEntityTooLarge": 413}
_ACTIONS: Final = ("Audit", "Deny", "Warn")


@dataclass(frozen=True, slots=True)
class _Met:
    """A policy that a write meets by one of its bindings."""

    policy: Object
    binding: Object

    @property
    def names(self) -> str:
        policy, binding = self.policy["metadata"]["name"], self.binding["metadata"]["name"]
        return f"ValidatingAdmissionPolicy '{policy}' with binding '{binding}'"


class AdmissionPolicies:
    """Evaluates the policies of a store."""

    def __init__(self, store: Store, registry: Registry) -> None:
        self._store = store
        self._registry = registry

    def meet(self, asked: Asked) -> "list[_Met]":
        """Policies that may have something to say of a write, by all that is known without the object."""
        if asked.info.group == GROUP or not self._store.collection(POLICIES).objects:
            return []
        found = []
        variables: dict[str, Any] | None = None
        for met in self._bound():
            if not _constrained(met, asked.info, asked.operation, asked.subresource):
                continue
            if variables is None:
                variables = {"request": review_request(asked, None, None)}
            if self._spoken_for(met.policy, variables):
                found.append(met)
        return found

    def check(
        self, met: Iterable[_Met], asked: Asked, obj: Object | None, old: Object | None, warnings: list[str]
    ) -> None:
        """Evaluate policies that ``meet`` has found. Raises ApiError where one denies."""
        for item in met:
            if not self._selected(item.policy["spec"].get("matchConstraints") or {}, asked, obj, old):
                continue
            if not self._selected(item.binding["spec"].get("matchResources") or {}, asked, obj, old):
                continue
            for message, reason in self._denials(item, asked, obj, old):
                actions = item.binding["spec"].get("validationActions") or ()
                text = f"{item.names} denied request: {message}"
                if "Warn" in actions:
                    warnings.append(f"Validation failed for {item.names}: {message}")
                if "Deny" in actions:
                    raise _denied(asked, text, reason)

    def _bound(self) -> Iterator[_Met]:
        for stored in sorted(self._store.items(BINDINGS), key=lambda item: str(item.obj["metadata"]["name"])):
            policy = self._store.get(POLICIES, ("", str(stored.obj["spec"].get("policyName"))))
            if policy is not None:
                yield _Met(policy.obj, stored.obj)

    def _spoken_for(self, policy: Object, variables: Mapping[str, Any]) -> bool:
        """False where a condition on the request alone says that the policy does not apply."""
        for condition in policy["spec"].get("matchConditions") or ():
            expression = _expression(condition["expression"])
            if any(expression.uses(name) for name in (*_OBJECTS, "params", "namespaceObject")):
                continue
            try:
                if expression.evaluate({**dict.fromkeys(_NAMES), **variables}) is not True:
                    return False
            except EvaluationError:
                continue
        return True

    def _selected(self, constraints: Mapping[str, Any], asked: Asked, obj: Object | None, old: Object | None) -> bool:
        wanted = selectors.from_object(constraints.get("objectSelector") or {})
        if not any(selectors.matches_labels(wanted, item) for item in (obj, old) if item is not None):
            return False
        place = self._place(asked, obj, old)
        of_namespace = selectors.from_object(constraints.get("namespaceSelector") or {})
        return place is None or selectors.matches_labels(of_namespace, place)

    def _place(self, asked: Asked, obj: Object | None, old: Object | None) -> Object | None:
        """The namespace that a write is in, or is about; None for cluster-scoped objects."""
        if asked.info.storage_key == _NAMESPACES:
            return obj or old
        if not asked.info.namespaced:
            return None
        stored = self._store.get(_NAMESPACES, ("", asked.namespace))
        return stored.obj if stored is not None else {"metadata": {}}

    def _denials(self, met: _Met, asked: Asked, obj: Object | None, old: Object | None) -> Iterator[tuple[str, str]]:
        """Message and reason of each validation that fails."""
        spec = met.policy["spec"]
        fails = spec.get("failurePolicy") != "Ignore"
        try:
            params = self._params(met, asked)
        except LookupError as error:
            if fails:
                yield f"failed to configure binding: {error}", "Invalid"
            return
        variables = {
            "object": obj,
            "oldObject": old,
            "request": review_request(asked, obj, old),
            "namespaceObject": self._place(asked, obj, old),
            "params": params,
        }
        evaluate = _Evaluation(spec.get("variables") or (), variables)
        try:
            if not conditions_met(spec.get("matchConditions") or (), evaluate):
                return
        except EvaluationError as error:
            if fails:
                yield str(error), "Invalid"
            return
        for validation in spec.get("validations") or ():
            reason = validation.get("reason") or "Invalid"
            try:
                holds = evaluate(validation["expression"]) is True
            except EvaluationError as error:
                if fails:
                    yield f"expression '{validation['expression']}' resulted in error: {error}", reason
                continue
            if not holds:
                yield _message(validation, evaluate), reason

    def _params(self, met: _Met, asked: Asked) -> Object | None:
        """The object that a binding names as parameters. Raises LookupError."""
        kind, reference = met.policy["spec"].get("paramKind"), met.binding["spec"].get("paramRef")
        if not kind or not reference:
            return None
        group = str(kind["apiVersion"]).rpartition("/")[0]
        info = self._registry.by_kind(group, str(kind["kind"]))
        name = str(reference.get("name") or "")
        if info is None or not name:
            raise LookupError(f"no parameters of kind {kind['kind']}")
        namespace = (reference.get("namespace") or asked.namespace) if info.namespaced else ""
        stored = self._store.get(info.storage_key, (namespace, name))
        if stored is None and reference.get("parameterNotFoundAction") != "Allow":
            raise LookupError(f'no params found for policy binding with `Deny` parameterNotFoundAction: "{name}"')
        return stored.obj if stored is not None else None


class _Evaluation:
    """Evaluates expressions over one write; composed variables are worked out when they are first used."""

    def __init__(self, composed: Iterable[Mapping[str, str]], variables: Mapping[str, Any]) -> None:
        self._composed = {item["name"]: item["expression"] for item in composed}
        self._variables = dict(variables)
        self._known: dict[str, Any] = {}

    def __call__(self, source: str) -> Any:
        """Raises EvaluationError."""
        for name in dict.fromkeys(_VARIABLE.findall(source)):
            if name not in self._known and name in self._composed:
                self._known[name] = self(self._composed[name])
        return _expression(source).evaluate({**self._variables, "variables": self._known})


def _expression(source: str) -> Expression:
    return compiled(source, _NAMES)


def _message(validation: Mapping[str, Any], evaluate: Callable[[str], Any]) -> str:
    source = validation.get("messageExpression")
    if source:
        try:
            found = evaluate(source)
        except EvaluationError:
            found = ""
        if isinstance(found, str) and found.strip() and "\n" not in found:
            return found
    message = validation.get("message")
    return str(message).strip() if message else f"failed expression: {str(validation['expression']).strip()}"


def _constrained(met: _Met, info: ResourceInfo, operation: str, subresource: str) -> bool:
    constraints = met.policy["spec"].get("matchConstraints") or {}
    narrower = met.binding["spec"].get("matchResources") or {}
    for place, needs_rules in ((constraints, True), (narrower, False)):
        rules = place.get("resourceRules") or ()
        if (rules or needs_rules) and not ruled(rules, info, operation, subresource):
            return False
        if ruled(place.get("excludeResourceRules") or (), info, operation, subresource):
            return False
    return True


def _denied(asked: Asked, text: str, reason: str) -> ApiError:
    info = asked.info
    subject = f'{info.qualified_name} "{asked.name}"' if asked.name else info.qualified_name
    found: Object = {"name": asked.name, "group": info.group, "kind": info.plural}
    found = {key: value for key, value in found.items() if value} | {"causes": [{"message": text}]}
    return ApiError(_CODES.get(reason, 422), reason, f"{subject} is forbidden: {text}", found)


# What is wrong with a policy or binding itself


def policy_causes(obj: Object) -> list[Cause]:
    """Causes for a ValidatingAdmissionPolicy: what is missing, and expressions that do not compile."""
    spec = obj.get("spec") or {}
    causes: list[Cause] = []
    if not (spec.get("matchConstraints") or {}).get("resourceRules"):
        causes.append(required("spec.matchConstraints.resourceRules"))
    if not spec.get("validations") and not spec.get("auditAnnotations"):
        text = "validations or auditAnnotations must be specified"
        causes.append(Cause("FieldValueRequired", f"Required value: {text}", "spec.validations"))
    if spec.get("failurePolicy") not in ("Fail", "Ignore"):
        causes.append(unsupported("spec.failurePolicy", spec.get("failurePolicy"), ["Fail", "Ignore"]))
    composed = [str(item.get("name")) for item in spec.get("variables") or ()]
    for position, item in enumerate(spec.get("variables") or ()):
        causes += _uncompiled(item.get("expression"), f"spec.variables[{position}].expression", composed[:position])
    for position, item in enumerate(spec.get("matchConditions") or ()):
        causes += _uncompiled(item.get("expression"), f"spec.matchConditions[{position}].expression", composed)
    for position, item in enumerate(spec.get("validations") or ()):
        causes += _uncompiled(item.get("expression"), f"spec.validations[{position}].expression", composed)
        if item.get("messageExpression"):
            field = f"spec.validations[{position}].messageExpression"
            causes += _uncompiled(item["messageExpression"], field, composed)
        if item.get("reason") and item["reason"] not in _CODES:
            causes.append(unsupported(f"spec.validations[{position}].reason", item["reason"], sorted(_CODES)))
    return causes


def condition_causes(conditions: Iterable[Mapping[str, Any]], field: str) -> list[Cause]:
    """Causes for the ``matchConditions`` of a webhook: they know neither parameters nor variables."""
    causes: list[Cause] = []
    for position, item in enumerate(conditions):
        causes += _uncompiled(item.get("expression"), f"{field}[{position}].expression", (), CONDITION_NAMES)
    return causes


def _uncompiled(source: Any, field: str, composed: Iterable[str], known: frozenset[str] = _NAMES) -> list[Cause]:
    if not source:
        return [required(field)]
    try:
        Expression(str(source), known)
    except CompileError as error:
        return [invalid_value(field, source, f"compilation failed: {error}")]
    unknown = [name for name in _VARIABLE.findall(str(source)) if name not in composed]
    if unknown:
        return [invalid_value(field, source, f"compilation failed: ERROR: <input>: undefined field '{unknown[0]}'")]
    return []


def binding_causes(obj: Object) -> list[Cause]:
    """Causes for a ValidatingAdmissionPolicyBinding."""
    spec = obj.get("spec") or {}
    causes: list[Cause] = []
    if not spec.get("policyName"):
        causes.append(required("spec.policyName"))
    actions = spec.get("validationActions") or []
    if not actions:
        causes.append(required("spec.validationActions"))
    for position, action in enumerate(actions):
        if action not in _ACTIONS:
            causes.append(unsupported(f"spec.validationActions[{position}]", action, list(_ACTIONS)))
    if {"Deny", "Warn"} <= set(actions):
        text = (
            "must not contain both Deny and Warn (repeating the same validation failure information in the API "
            "response and headers serves no purpose)"
        )
        causes.append(invalid_value("spec.validationActions", actions, text))
    return causes
