"""Namespaces: those that every cluster has, and the end of those that are deleted."""

from typing import Any, Final

from vmnet.lab.apiserver.chores import Chores
from vmnet.lab.apiserver.objects import NAMESPACES, PODS, Objects
from vmnet.lab.apiserver.requests import DeleteOptions
from vmnet.lab.apiserver.resources import ResourceInfo
from vmnet.lab.apiserver.status import ApiError
from vmnet.lab.apiserver.storage import Change, ChangeType, Object, StorageKey

STANDARD: Final = ("default", "kube-system", "kube-public", "kube-node-lease")
_FINALIZER: Final = "kubernetes"


class Namespaces:
    """Empties namespaces that terminate, then lets them go."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._terminating: set[str] = set()
        self.chores: Chores[str] = Chores("namespace termination", self._look)
        objects.store.observe(self._observe)

    def _observe(self, storage: StorageKey, change: Change) -> None:
        if storage == NAMESPACES:
            name = change.key[1]
            if change.type is ChangeType.DELETED:
                self._terminating.discard(name)
            elif "deletionTimestamp" in change.current.obj["metadata"] and name not in self._terminating:
                self._terminating.add(name)
                self.chores.add(name)
        elif change.key[0] in self._terminating:
            self.chores.add(change.key[0])

    def _look(self, name: str) -> None:
        stored = self._objects.store.get(NAMESPACES, ("", name))
        info = self._objects.registry.lookup("", "v1", "namespaces")
        if stored is None or info is None or "deletionTimestamp" not in stored.obj["metadata"]:
            return
        if _FINALIZER not in (stored.obj.get("spec") or {}).get("finalizers", ()):
            # Somebody took the finalizer away: what is inside is not the collector's business any more.
            return
        remaining = self._empty(name)
        if remaining or (stored.obj.get("status") or {}).get("conditions"):
            conditions = _conditions(remaining, self._objects.timestamp())
            self._objects.change(info, "", name, lambda obj: _with_conditions(obj, conditions), "status")
        if not remaining:
            self._objects.change(info, "", name, _finalized)

    def _empty(self, namespace: str) -> list[tuple[ResourceInfo, list[Object]]]:
        """Delete everything in a namespace; what is still there."""
        found: list[tuple[ResourceInfo, list[Object]]] = []
        store = self._objects.store
        for info in self._objects.registry.storage():
            if not info.namespaced:
                continue
            for stored in list(store.items(info.storage_key, namespace)):
                metadata = stored.obj["metadata"]
                if "deletionTimestamp" in metadata and (info.storage_key == PODS or metadata.get("finalizers")):
                    continue
                try:
                    self._objects.delete(info, namespace, metadata["name"], DeleteOptions(propagation="Background"))
                except ApiError as error:
                    if error.code != 404:
                        raise
            left = [stored.obj for stored in store.items(info.storage_key, namespace)]
            if left:
                found.append((info, left))
        return found


def _finalized(obj: Object) -> Object:
    spec = dict(obj.get("spec") or {})
    left = [item for item in spec.get("finalizers") or () if item != _FINALIZER]
    spec.pop("finalizers", None)
    if left:
        spec["finalizers"] = left
    obj["spec"] = spec
    return obj


def _condition(kind: str, status: bool, reason: str, message: str, now: str) -> dict[str, Any]:
    return {
        "type": kind,
        "status": "True" if status else "False",
        "lastTransitionTime": now,
        "reason": reason,
        "message": message,
    }


def _conditions(remaining: list[tuple[ResourceInfo, list[Object]]], now: str) -> list[dict[str, Any]]:
    counts = ", ".join(f"{info.qualified_name}. has {len(left)} resource instances" for info, left in remaining)
    finalizers: dict[str, int] = {}
    for _, left in remaining:
        for obj in left:
            for finalizer in obj["metadata"].get("finalizers") or ():
                finalizers[finalizer] = finalizers.get(finalizer, 0) + 1
    found = [
        _condition(
            "NamespaceDeletionDiscoveryFailure",
            False,
            "ResourcesDiscovered",
            "All resources successfully discovered",
            now,
        ),
        _condition(
            "NamespaceDeletionGroupVersionParsingFailure",
            False,
            "ParsedGroupVersions",
            "All legacy kube types successfully parsed",
            now,
        ),
        _condition(
            "NamespaceDeletionContentFailure",
            False,
            "ContentDeleted",
            "All content successfully deleted, may be waiting on finalization",
            now,
        ),
        _condition(
            "NamespaceContentRemaining",
            bool(remaining),
            "SomeResourcesRemain" if remaining else "ContentRemoved",
            f"Some resources are remaining: {counts}" if remaining else "All content successfully removed",
            now,
        ),
    ]
    if finalizers:
        text = ", ".join(f"{name} in {count} resource instances" for name, count in sorted(finalizers.items()))
        message = f"Some content in the namespace has finalizers remaining: {text}"
        found.append(_condition("NamespaceFinalizersRemaining", True, "SomeFinalizersRemain", message, now))
    else:
        message = "All content-preserving finalizers finished"
        found.append(_condition("NamespaceFinalizersRemaining", False, "ContentHasNoFinalizers", message, now))
    return found


def _with_conditions(obj: Object, conditions: list[dict[str, Any]]) -> Object:
    known = {item["type"]: item for item in (obj.get("status") or {}).get("conditions") or ()}
    for condition in conditions:
        before = known.get(condition["type"])
        if before is not None and before["status"] == condition["status"]:
            condition["lastTransitionTime"] = before["lastTransitionTime"]
    obj["status"] = {**(obj.get("status") or {}), "conditions": conditions}
    return obj
