"""Label selectors, node selectors and tolerations, as they stand in objects. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

Labels = Mapping[str, str]


def _holds(expression: Mapping[str, Any], labels: Labels) -> bool:
    key: str = expression["key"]
    values: Sequence[str] = expression.get("values") or ()
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
        case "Gt" | "Lt":
            try:
                found, limit = int(labels[key]), int(values[0])
            except (KeyError, ValueError, IndexError):
                return False
            return found > limit if expression["operator"] == "Gt" else found < limit
    return False


def selects(selector: Mapping[str, Any] | None, labels: Labels | None) -> bool:
    """Whether a LabelSelector matches; none matches nothing, an empty one everything."""
    if selector is None:
        return False
    own = labels or {}
    if any(own.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_holds(item, own) for item in selector.get("matchExpressions") or ())


def selects_plainly(selector: Labels | None, labels: Labels | None) -> bool:
    """Whether a map of labels (of a Service) matches; an empty one matches nothing."""
    own = labels or {}
    return bool(selector) and all(own.get(key) == value for key, value in (selector or {}).items())


def selects_node(term: Mapping[str, Any], node: Mapping[str, Any]) -> bool:
    """Whether a NodeSelectorTerm matches; an empty one matches nothing."""
    expressions, fields = term.get("matchExpressions") or (), term.get("matchFields") or ()
    if not expressions and not fields:
        return False
    metadata = node["metadata"]
    labels = metadata.get("labels") or {}
    by_field = {"metadata.name": metadata["name"]}
    return all(_holds(item, labels) for item in expressions) and all(_holds(item, by_field) for item in fields)


def tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    """Whether a toleration covers a taint."""
    if toleration.get("effect") and toleration["effect"] != taint.get("effect"):
        return False
    if toleration.get("key") and toleration["key"] != taint["key"]:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return True
    return bool(toleration.get("key")) and toleration.get("value", "") == taint.get("value", "")
