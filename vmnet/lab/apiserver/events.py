"""Events in their two groups: stored as core/v1, read and written as events.k8s.io/v1 too."""

from typing import Any, Final

NEW_VERSION: Final = "events.k8s.io/v1"

_RENAMED: Final = {
    "involvedObject": "regarding",
    "message": "note",
    "reportingComponent": "reportingController",
    "source": "deprecatedSource",
    "firstTimestamp": "deprecatedFirstTimestamp",
    "lastTimestamp": "deprecatedLastTimestamp",
    "count": "deprecatedCount",
}
_BACK: Final = {new: old for old, new in _RENAMED.items()}


def renamed(name: str) -> str:
    """What events.k8s.io/v1 calls a field of core/v1."""
    return _RENAMED.get(name, name)


def to_new(obj: dict[str, Any]) -> dict[str, Any]:
    """A core/v1 Event as events.k8s.io/v1."""
    found = {_RENAMED.get(name, name): value for name, value in obj.items()}
    found["apiVersion"] = NEW_VERSION
    return found


def to_core(obj: dict[str, Any]) -> dict[str, Any]:
    """An events.k8s.io/v1 Event as core/v1."""
    found = {_BACK.get(name, name): value for name, value in obj.items()}
    found["apiVersion"] = "v1"
    return found
