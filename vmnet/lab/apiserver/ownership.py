"""Field ownership: sets of field paths, and ``metadata.managedFields`` as entries of them.

Follows structured-merge-diff: https://github.com/kubernetes-sigs/structured-merge-diff
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from vmnet.lab.apiserver.shapes import ANY, Shape

Path = tuple[str, ...]
"""Elements as FieldsV1 writes them: ``f:name``, ``k:{"name":"a"}``, ``v:"x"``."""
Paths = frozenset[Path]

_STRIPPED: Final[Paths] = frozenset(
    {
        ("f:apiVersion",),
        ("f:kind",),
        ("f:metadata",),
        *(
            ("f:metadata", f"f:{name}")
            for name in (
                "name",
                "namespace",
                "creationTimestamp",
                "selfLink",
                "uid",
                "clusterName",
                "generation",
                "managedFields",
                "resourceVersion",
            )
        ),
    }
)
"""Fields nobody owns."""

MAX_UPDATERS: Final = 10
"""Update entries kept apart; older ones are put together as ``ancient-changes``."""


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)


def element(item: Any, shape: Shape) -> str:
    """The path element of a list item: its keys, or its value in a set."""
    if shape.list_type == "map" and isinstance(item, Mapping):
        items = shape.items or ANY
        found: dict[str, Any] = {}
        for key in shape.keys:
            if key in item:
                found[key] = item[key]
            elif items.child(key).has_default:
                found[key] = items.child(key).default
        return f"k:{_text(found)}"
    return f"v:{_text(item)}"


def _is_leaf(shape: Shape, value: Any) -> bool:
    if isinstance(value, dict):
        return shape.atomic
    if isinstance(value, list):
        return shape.list_type == "atomic"
    return True


def paths_of(value: dict[str, Any], shape: Shape) -> Paths:
    """The fields an applied configuration names."""
    found: set[Path] = set()

    def visit(value: Any, shape: Shape, path: Path) -> None:
        if _is_leaf(shape, value):
            found.add(path)
        elif isinstance(value, dict):
            for name, item in value.items():
                inner = (*path, f"f:{name}")
                visit(item, shape.child(name), inner)
                if item is None or item == {} or name not in shape.properties:
                    found.add(inner)
        else:
            for item in value:
                inner = (*path, element(item, shape))
                visit(item, shape.items or ANY, inner)
                found.add(inner)

    visit(value, shape, ())
    found.discard(())
    return frozenset(found) - _STRIPPED


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two objects differ."""

    added: Paths
    modified: Paths
    removed: Paths

    @property
    def same(self) -> bool:
        """Whether they do not differ."""
        return not (self.added or self.modified or self.removed)


_MISSING: Final = object()


def compare(old: dict[str, Any], new: dict[str, Any], shape: Shape) -> Comparison:
    """Fields added, modified and removed from ``old`` to ``new``."""
    added: set[Path] = set()
    modified: set[Path] = set()
    removed: set[Path] = set()

    def descend(old: Any, new: Any, shape: Shape, path: Path) -> None:
        present = new if new is not _MISSING else old
        other = old if new is not _MISSING else _MISSING
        both = other is not _MISSING and other is not None and present is not None
        if (both and type(old) is not type(new)) or _is_leaf(shape, present) or (not present and not (both and other)):
            if old is _MISSING:
                added.add(path)
            elif new is _MISSING:
                removed.add(path)
            elif old != new:
                modified.add(path)
            return
        if isinstance(present, dict):
            before = old if isinstance(old, dict) else {}
            after = new if isinstance(new, dict) else {}
            for name in dict.fromkeys((*before, *after)):
                first, second = before.get(name, _MISSING), after.get(name, _MISSING)
                if first is not second:
                    descend(first, second, shape.child(name), (*path, f"f:{name}"))
        else:
            items = shape.items or ANY
            before_items = {element(item, shape): item for item in (old if isinstance(old, list) else ())}
            after_items = {element(item, shape): item for item in (new if isinstance(new, list) else ())}
            for key in dict.fromkeys((*before_items, *after_items)):
                descend(before_items.get(key, _MISSING), after_items.get(key, _MISSING), items, (*path, key))
        if old is _MISSING:
            added.add(path)
        elif new is _MISSING:
            removed.add(path)

    descend(old, new, shape, ())
    added.discard(())
    return Comparison(frozenset(added) - _STRIPPED, frozenset(modified) - _STRIPPED, frozenset(removed) - _STRIPPED)


def to_fields(paths: Iterable[Path]) -> dict[str, Any]:
    """FieldsV1 of a set of paths."""
    root: dict[str, Any] = {}
    members: set[Path] = set(paths)
    for path in sorted(members):
        node = root
        for part in path:
            node = node.setdefault(part, {})
    parents = {path[:depth] for path in members for depth in range(1, len(path))}
    for path in members & parents:
        node = root
        for part in path:
            node = node[part]
        node["."] = {}
    return _sorted(root)


def _sorted(node: dict[str, Any]) -> dict[str, Any]:
    return {name: _sorted(node[name]) for name in sorted(node)}


def from_fields(fields: Mapping[str, Any]) -> Paths:
    """The set of paths that FieldsV1 describes."""
    found: set[Path] = set()

    def visit(node: Mapping[str, Any], path: Path) -> None:
        if path and (not node or "." in node):
            found.add(path)
        for name, child in node.items():
            if name != ".":
                visit(child or {}, (*path, name))

    visit(fields, ())
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Manager:
    """Whose fields: entries that agree in this are one. ``api_version`` is empty for Apply entries."""

    name: str
    operation: str
    api_version: str
    subresource: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of managedFields."""

    manager: Manager
    api_version: str
    paths: Paths
    time: str | None = None


Entries = dict[Manager, Entry]


def read_entries(managed: Any) -> Entries:
    """``metadata.managedFields`` as entries; malformed ones are left out."""
    found: Entries = {}
    for item in managed or ():
        if not isinstance(item, dict) or not isinstance(item.get("fieldsV1"), dict):
            continue
        operation = str(item.get("operation") or "")
        version = str(item.get("apiVersion") or "")
        manager = Manager(
            str(item.get("manager") or ""),
            operation,
            "" if operation == "Apply" else version,
            str(item.get("subresource") or ""),
        )
        found[manager] = Entry(manager, version, from_fields(item["fieldsV1"]), item.get("time"))
    return found


def write_entries(entries: Entries) -> list[dict[str, Any]]:
    """``metadata.managedFields`` in the server's order."""
    found: list[dict[str, Any]] = []
    for entry in sorted(_capped(entries).values(), key=_order):
        if not entry.paths:
            continue
        item: dict[str, Any] = {
            "manager": entry.manager.name,
            "operation": entry.manager.operation,
            "apiVersion": entry.api_version,
        }
        if entry.time is not None:
            item["time"] = entry.time
        item["fieldsType"] = "FieldsV1"
        item["fieldsV1"] = to_fields(entry.paths)
        if entry.manager.subresource:
            item["subresource"] = entry.manager.subresource
        found.append(item)
    return found


def _order(entry: Entry) -> tuple[str, str, str, str, str]:
    manager = entry.manager
    return manager.operation, entry.time or "", manager.name, entry.api_version, manager.subresource


def _capped(entries: Entries) -> Entries:
    updaters = sorted(
        (entry for entry in entries.values() if entry.manager.operation == "Update" and not entry.manager.subresource),
        key=_order,
    )
    surplus = len(updaters) - MAX_UPDATERS
    if surplus <= 0:
        return entries
    found = dict(entries)
    for entry in updaters[: surplus + 1]:
        del found[entry.manager]
        bucket = Manager("ancient-changes", "Update", entry.api_version)
        known = found.get(bucket)
        paths = entry.paths | known.paths if known else entry.paths
        found[bucket] = Entry(bucket, entry.api_version, paths, entry.time)
    return found


def without(paths: Paths, ignored: Iterable[Path]) -> Paths:
    """The paths that lie under none of ``ignored``."""
    ignored = tuple(ignored)
    return frozenset(path for path in paths if not any(path[: len(item)] == item for item in ignored))


def take(
    entries: Entries, difference: Comparison, ignored: Iterable[Path], keep: Manager | None = None
) -> tuple[Entries, dict[Manager, Paths]]:
    """What is left to the others after a change, and what it took from whom. ``keep`` is not looked at."""
    ignored = tuple(ignored)
    changed = without(difference.modified | difference.added, ignored)
    removed = without(difference.removed, ignored)
    left: Entries = {}
    conflicts: dict[Manager, Paths] = {}
    for manager, entry in entries.items():
        if manager == keep:
            left[manager] = entry
            continue
        lost = entry.paths & changed
        if lost:
            conflicts[manager] = lost
        paths = entry.paths - changed - removed
        if paths:
            left[manager] = replace(entry, paths=paths)
    return left, conflicts


def updated(
    entries: Entries,
    old: dict[str, Any],
    new: dict[str, Any],
    shape: Shape,
    *,
    manager: Manager,
    ignored: Iterable[Path],
    now: str,
) -> Entries:
    """The entries after an update by ``manager``: it owns what it changed, nobody what it removed."""
    ignored = tuple(ignored)
    difference = compare(old, new, shape)
    left, _ = take(entries, difference, ignored)
    mine = without(difference.added | difference.modified, ignored)
    if mine:
        known = left.get(manager)
        left[manager] = Entry(manager, manager.api_version, mine | known.paths if known else mine, now)
    return left
