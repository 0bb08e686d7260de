"""Label and field selectors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmnet.lab.apiserver.resources import ResourceInfo
from vmnet.lab.apiserver.status import ApiError, bad_request

_TOKEN = re.compile(r"\s*(==|!=|[=,()!<>]|[^\s=,()!<>]+)")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition on one label: ``operator`` is ``in``, ``notin``, ``exists``, ``absent``, ``gt`` or ``lt``."""

    key: str
    operator: str
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether labels satisfy it."""
        value = labels.get(self.key)
        match self.operator:
            case "in":
                return value is not None and value in self.values
            case "notin":
                return value is None or value not in self.values
            case "exists":
                return value is not None
            case "absent":
                return value is None
        if value is None:
            return False
        try:
            number, bound = int(value), int(next(iter(self.values)))
        except ValueError:
            return False
        return number > bound if self.operator == "gt" else number < bound


LabelSelector = tuple[Requirement, ...]


def _tokens(text: str) -> list[str]:
    found, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            break
        found.append(match[1])
        position = match.end()
    return found


def parse_labels(text: str) -> LabelSelector:
    """Parse ``a=b,c!=d,e in (f,g),h notin (i),j,!k``. Raises ApiError (400)."""
    tokens = _tokens(text)
    if not tokens:
        return ()
    found: list[Requirement] = []
    position = 0

    def take() -> str:
        nonlocal position
        token = tokens[position] if position < len(tokens) else ""
        position += 1
        return token

    while True:
        key = take()
        if key == "!":
            found.append(Requirement(_identifier(take()), "absent"))
        else:
            found.append(_requirement(_identifier(key), take, lambda: tokens[position : position + 1]))
        separator = take()
        if not separator:
            return tuple(found)
        if separator != ",":
            raise _unparsable(f"found '{separator}', expected: ',' or 'end of string'")
        if position >= len(tokens):
            raise _unparsable("found '', expected: identifier after ','")


def _unparsable(message: str) -> ApiError:
    return bad_request(f"unable to parse requirement: {message}")


def _identifier(word: str) -> str:
    if not word or word in ("=", "==", "!=", "!", ",", "(", ")", "<", ">"):
        raise _unparsable(f"found '{word}', expected: identifier")
    return word


def _requirement(key: str, take: Callable[[], str], peek: Callable[[], list[str]]) -> Requirement:
    ahead = peek()
    if not ahead or ahead[0] == ",":
        return Requirement(key, "exists")
    operator = take()
    if operator in ("=", "==", "!="):
        ahead = peek()
        value = _identifier(take()) if ahead and ahead[0] != "," else ""
        return Requirement(key, "notin" if operator == "!=" else "in", frozenset({value}))
    if operator in ("in", "notin"):
        if take() != "(":
            raise _unparsable("expected: '('")
        values: set[str] = set()
        expect_value = True
        while (word := take()) != ")":
            if not word:
                raise _unparsable("found '', expected: ',' or ')'")
            if word == ",":
                if expect_value:
                    values.add("")
                expect_value = True
            else:
                values.add(_identifier(word))
                expect_value = False
        if expect_value:
            values.add("")
        return Requirement(key, operator, frozenset(values))
    if operator in ("<", ">"):
        return Requirement(key, "gt" if operator == ">" else "lt", frozenset({_identifier(take())}))
    raise _unparsable(f"found '{operator}', expected: in, notin, =, ==, !=, gt, lt")


def matches_labels(selector: LabelSelector, obj: Mapping[str, Any]) -> bool:
    """Whether an object's labels satisfy every requirement."""
    labels = obj["metadata"].get("labels") or {}
    return all(requirement.matches(labels) for requirement in selector)


def from_object(selector: Mapping[str, Any] | None) -> LabelSelector:
    """A ``LabelSelector`` of a spec (matchLabels, matchExpressions)."""
    if selector is None:
        return ()
    found = [Requirement(key, "in", frozenset({value})) for key, value in (selector.get("matchLabels") or {}).items()]
    operators = {"In": "in", "NotIn": "notin", "Exists": "exists", "DoesNotExist": "absent"}
    for expression in selector.get("matchExpressions") or ():
        values = frozenset(expression.get("values") or ())
        found.append(Requirement(expression["key"], operators[expression["operator"]], values))
    return tuple(found)


def format_labels(selector: Mapping[str, Any] | None) -> str:
    """A ``LabelSelector`` of a spec as text, as ``status.selector`` of a Scale."""
    if selector is None:
        return ""
    parts = [f"{key}={value}" for key, value in sorted((selector.get("matchLabels") or {}).items())]
    for expression in selector.get("matchExpressions") or ():
        key, values = expression["key"], ",".join(sorted(expression.get("values") or ()))
        match expression["operator"]:
            case "In":
                parts.append(f"{key} in ({values})")
            case "NotIn":
                parts.append(f"{key} notin ({values})")
            case "Exists":
                parts.append(key)
            case _:
                parts.append(f"!{key}")
    return ",".join(parts)


@dataclass(frozen=True, slots=True)
class FieldRequirement:
    """One condition on one field."""

    path: str
    value: str
    equal: bool


FieldSelector = tuple[FieldRequirement, ...]

_METADATA: Final = ("metadata.name", "metadata.namespace")
_INVOLVED: Final = ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")
_FIELDS: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    ("", "pods"): (
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "spec.hostNetwork",
        "status.phase",
        "status.podIP",
        "status.podIPs",
        "status.nominatedNodeName",
    ),
    ("", "nodes"): ("spec.unschedulable",),
    ("", "namespaces"): ("status.phase",),
    ("", "secrets"): ("type",),
    ("", "services"): ("spec.clusterIP", "spec.type"),
    ("", "replicationcontrollers"): ("status.replicas",),
    ("", "events"): (
        *(f"involvedObject.{name}" for name in _INVOLVED),
        "reason",
        "reportingComponent",
        "source",
        "type",
    ),
    ("events.k8s.io", "events"): (
        *(f"regarding.{name}" for name in _INVOLVED),
        "reason",
        "reportingController",
        "type",
    ),
    ("apps", "replicasets"): ("status.replicas",),
    ("batch", "jobs"): ("status.successful",),
    ("certificates.k8s.io", "certificatesigningrequests"): ("spec.signerName",),
    ("resource.k8s.io", "resourceslices"): ("spec.nodeName", "spec.driver"),
}


def parse_fields(text: str, info: ResourceInfo, selectable: tuple[str, ...] = ()) -> FieldSelector:
    """Parse ``a=b,c!=d``; ``selectable`` are a CRD's own fields. Raises ApiError (400)."""
    known = (*_METADATA, *(_FIELDS.get((info.group, info.plural)) or ()), *selectable)
    found: list[FieldRequirement] = []
    for part in _split(text):
        if "!=" in part:
            path, value = part.split("!=", 1)
            equal = False
        elif "=" in part:
            path, value = part.split("=", 1)
            value = value.removeprefix("=")
            equal = True
        else:
            raise bad_request(f"invalid selector: '{part}'; can't understand '{part}'")
        path = path.strip()
        if path not in known and path != "":
            raise bad_request(
                f'"{path}" is not a known field selector: only {", ".join(_quoted(name) for name in known)}'
            )
        found.append(FieldRequirement(path, _unescape(value), equal))
    return tuple(found)


def _quoted(text: str) -> str:
    return f'"{text}"'


def _split(text: str) -> list[str]:
    return [part for part in re.split(r"(?<!\\),", text) if part]


def _unescape(text: str) -> str:
    return text.replace("\\,", ",").replace("\\=", "=").replace("\\\\", "\\")


def field_value(obj: Mapping[str, Any], path: str) -> str:
    """A field as selectors compare it; the empty string where it is absent."""
    if path == "source":
        return str((obj.get("source") or {}).get("component") or obj.get("reportingComponent") or "")
    value: Any = obj
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return ""
        value = value.get(name)
        if value is None:
            return "false" if path in ("spec.unschedulable", "spec.hostNetwork") else ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def matches_fields(selector: FieldSelector, obj: Mapping[str, Any]) -> bool:
    """Whether an object's fields satisfy every requirement."""
    return all((field_value(obj, item.path) == item.value) == item.equal for item in selector)
