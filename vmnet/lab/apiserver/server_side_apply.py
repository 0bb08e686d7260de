"""Server-side apply: merge a configuration, give up what it no longer names, refuse to take from others."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from vmnet.lab.apiserver.ownership import (
    Comparison,
    Entries,
    Entry,
    Manager,
    Path,
    Paths,
    compare,
    element,
    paths_of,
    take,
    without,
)
from vmnet.lab.apiserver.shapes import ANY, Shape
from vmnet.lab.apiserver.status import ApiError, internal

LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
KUBECTL: Final = "kubectl"
"""The manager whose apply continues what client-side apply did."""


class Conflicts(Exception):
    """Others own, with other values, what the configuration sets."""

    def __init__(self, conflicts: dict[Manager, Paths], entries: Entries) -> None:
        super().__init__("apply conflicts")
        self.conflicts = conflicts
        self.entries = entries

    def paths(self) -> Paths:
        """All fields in conflict."""
        return frozenset().union(*self.conflicts.values())

    def error(self) -> ApiError:
        """409 with one cause per field."""
        causes: list[dict[str, str]] = []
        lines: list[tuple[str, list[str]]] = []
        for manager, paths in sorted(self.conflicts.items(), key=lambda item: _describe(item[0])):
            described = f"conflict with {_describe(manager)}"
            fields = sorted(field_path(path) for path in paths)
            lines.append((described, fields))
            causes.extend({"reason": "FieldManagerConflict", "message": described, "field": name} for name in fields)
        count = len(causes)
        if count == 1:
            message = f"Apply failed with 1 conflict: {lines[0][0]}: {lines[0][1][0]}"
        else:
            text = "\n".join(
                f"{'conflicts' if len(fields) > 1 else 'conflict'}{described.removeprefix('conflict')}:"
                + (" " + fields[0] if len(fields) == 1 else "".join(f"\n- {name}" for name in fields))
                for described, fields in lines
            )
            message = f"Apply failed with {count} conflicts: {text}"
        return ApiError(409, "Conflict", message, {"causes": causes})


def _describe(manager: Manager) -> str:
    text = f'"{manager.name}"'
    if manager.subresource:
        text += f' with subresource "{manager.subresource}"'
    if manager.operation == "Update":
        text += f" using {manager.api_version}"
    return text


def field_path(path: Path) -> str:
    """``.spec.ports[port=80,protocol="TCP"].name``."""
    text = ""
    for part in path:
        kind, rest = part[:2], part[2:]
        if kind == "f:":
            text += f".{rest}"
        elif kind == "k:":
            pairs = json.loads(rest)
            text += "[" + ",".join(f"{key}={json.dumps(value)}" for key, value in pairs.items()) + "]"
        else:
            text += f"[={rest}]"
    return text


@dataclass(frozen=True, slots=True)
class Applied:
    """The object after an apply (without managedFields of its own) and its new entries."""

    obj: dict[str, Any]
    entries: Entries
    changed: bool


def check(config: dict[str, Any], shape: Shape, label: str) -> None:
    """Refuse fields the schema does not declare and duplicate keys. ``label`` names the object.

    Raises ApiError (500), as the real server does for a patch that is not of its type.
    """
    errors: list[str] = []

    def visit(value: Any, shape: Shape, path: str) -> None:
        if isinstance(value, dict):
            if shape.type not in ("object", "any"):
                errors.append(f"{path}: expected {_expected(shape)}, got &{{{value}}}")
                return
            for name, item in value.items():
                if not shape.knows(name):
                    errors.append(f"{path}.{name}: field not declared in schema")
                else:
                    visit(item, shape.child(name), f"{path}.{name}")
        elif isinstance(value, list):
            if shape.type not in ("array", "any"):
                errors.append(f"{path}: expected {_expected(shape)}, got &{value}")
                return
            if shape.list_type == "atomic":
                return
            seen: set[str] = set()
            for item in value:
                if shape.list_type == "map" and not isinstance(item, dict):
                    errors.append(f"{path}: element: associative list with keys may not have non-map elements")
                    continue
                key = element(item, shape)
                if key in seen:
                    found = field_path((key,))
                    errors.append(f"{path}: duplicate entries for key {found}")
                seen.add(key)
                visit(item, shape.items or ANY, path + field_path((key,)))
        elif value is not None and shape.type == "object":
            errors.append(f"{path}: expected map, got &{{{value}}}")

    visit(config, shape, "")
    if errors:
        text = errors[0] if len(errors) == 1 else "errors:\n" + "\n".join(f"  {item}" for item in errors)
        raise internal(f"failed to create typed patch object ({label}): {text}")


def _expected(shape: Shape) -> str:
    return {"object": "map", "array": "list"}.get(shape.type, shape.type)


def merge(live: Any, config: Any, shape: Shape) -> Any:
    """The configuration laid over the live value: maps and keyed lists are joined, the rest is replaced."""
    if isinstance(config, dict):
        if shape.atomic or not isinstance(live, dict):
            return config
        result = dict(live)
        for name, value in config.items():
            result[name] = merge(live.get(name), value, shape.child(name))
        return result
    if isinstance(config, list):
        if shape.list_type == "atomic" or not isinstance(live, list):
            return config
        items = shape.items or ANY
        wanted = {element(item, shape): item for item in config}
        found = [
            merge(item, wanted.pop(key), items) if (key := element(item, shape)) in wanted else item for item in live
        ]
        found.extend(wanted.values())
        return found
    return config


def remove(value: Any, paths: Iterable[Path], shape: Shape) -> Any:
    """A copy without the values at ``paths``."""
    heads: dict[str, list[Path]] = {}
    gone: set[str] = set()
    for path in paths:
        if len(path) == 1:
            gone.add(path[0])
        heads.setdefault(path[0], []).append(path[1:])
    if isinstance(value, dict):
        result = {}
        for name, item in value.items():
            key = f"f:{name}"
            if key in gone:
                continue
            inner = [path for path in heads.get(key, ()) if path]
            result[name] = remove(item, inner, shape.child(name)) if inner else item
        return result
    if isinstance(value, list):
        kept = []
        for item in value:
            key = element(item, shape)
            if key in gone:
                continue
            inner = [path for path in heads.get(key, ()) if path]
            kept.append(remove(item, inner, shape.items or ANY) if inner else item)
        return kept
    return value


def _abandoned(before: Paths, entries: Entries) -> Paths:
    """Fields of ``before`` that nobody owns now, nor anything below them."""
    owned: set[Path] = set()
    for entry in entries.values():
        for path in entry.paths:
            owned.update(path[:depth] for depth in range(1, len(path) + 1))
    return frozenset(path for path in before if path not in owned)


def _without_managed(obj: dict[str, Any]) -> dict[str, Any]:
    metadata = {name: value for name, value in obj.get("metadata", {}).items() if name != "managedFields"}
    return {**obj, "metadata": metadata}


def apply(
    live: dict[str, Any],
    config: dict[str, Any],
    shape: Shape,
    entries: Entries,
    *,
    manager: Manager,
    api_version: str,
    ignored: Iterable[Path],
    force: bool,
    now: str,
) -> Applied:
    """Apply ``config``. Raises Conflicts unless ``force``."""
    ignored = tuple(ignored)
    live = _without_managed(live)
    previous = entries.get(manager)
    named = without(paths_of(config, shape), ignored)
    entries = dict(entries)
    entries[manager] = Entry(manager, api_version, named, previous.time if previous else None)
    merged = merge(live, config, shape)
    if previous is not None and previous.paths:
        merged = remove(merged, _abandoned(previous.paths, entries), shape)
    difference: Comparison = compare(live, merged, shape)
    left, conflicts = take(entries, difference, ignored, keep=manager)
    if conflicts and not force:
        raise Conflicts(conflicts, entries)
    if not named:
        left.pop(manager, None)
    changed = not difference.same or previous is None or previous.paths != named or bool(conflicts)
    if changed and named:
        # An apply that only takes note of what is there already has no time of its own.
        time = previous.time if difference.same and previous is not None else None if difference.same else now
        left[manager] = Entry(manager, api_version, named, time)
    return Applied(merged, left, changed)


def allowed_by_last_applied(live: dict[str, Any], shape: Shape) -> Paths:
    """Fields that client-side apply set and that still have the value it set: kubectl may take those over."""
    text = live.get("metadata", {}).get("annotations", {}).get(LAST_APPLIED)
    if not text:
        return frozenset()
    try:
        last = json.loads(text)
    except ValueError:
        return frozenset()
    if not isinstance(last, dict):
        return frozenset()
    named = paths_of(last, shape)
    difference = compare(live, merge(_without_managed(live), last, shape), shape)
    return named - difference.modified - difference.added
