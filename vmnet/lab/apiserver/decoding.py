"""Bodies to objects, as a typed server decodes them: duplicate keys are noticed, types checked, nulls dropped."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import yaml

from vmnet.lab.apiserver.shapes import ANY, Shape
from vmnet.lab.apiserver.status import ApiError, bad_request

_WRITTEN_NULL = frozenset(
    {
        ("Event", "eventTime"),
        ("Event", "firstTimestamp"),
        ("Event", "lastTimestamp"),
        ("Event", "deprecatedFirstTimestamp"),
        ("Event", "deprecatedLastTimestamp"),
        ("PodCondition", "lastProbeTime"),
        ("PodCondition", "lastTransitionTime"),
        ("NodeCondition", "lastHeartbeatTime"),
        ("NodeCondition", "lastTransitionTime"),
    }
)
"""Times that Go writes even when they are unset."""
_GO_TYPES = {"integer": "int32", "number": "float64", "string": "string", "boolean": "bool"}


class TypeMismatch(Exception):
    """A value whose JSON type does not fit its field; the message is what Go's decoder says."""


class _Duplicates:
    """Collects the paths of keys that stand twice in one object."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def hook(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            names = [name for name, _ in pairs if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
            return _Marked(made, names)
        return made


class _Marked(dict[str, Any]):
    def __init__(self, values: dict[str, Any], duplicated: list[str]) -> None:
        super().__init__(values)
        self.duplicated = duplicated


def _collect(value: Any, path: str, found: list[str]) -> None:
    if isinstance(value, dict):
        if isinstance(value, _Marked):
            found.extend(f"{path}{name}" for name in value.duplicated)
        for name, item in value.items():
            _collect(item, f"{path}{name}.", found)
    elif isinstance(value, list):
        for position, item in enumerate(value):
            _collect(item, f"{path.removesuffix('.')}[{position}].", found)


def parse_json(content: bytes) -> tuple[Any, list[str]]:
    """A JSON document and the paths of its duplicate fields. Raises ValueError."""
    duplicates = _Duplicates()
    value = json.loads(content, object_pairs_hook=duplicates.hook)
    found: list[str] = []
    _collect(value, "", found)
    return value, found


class _Loader(yaml.SafeLoader):
    """YAML as Go reads it for Kubernetes: times stay strings."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, expression) for tag, expression in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(content: bytes) -> Any:
    """A YAML document as JSON values. Raises ValueError."""
    try:
        return yaml.load(content, Loader=_Loader)  # noqa: S506 — derived from SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def go_json_error(error: ValueError, content: bytes) -> str:
    """What Go's decoder says of malformed JSON."""
    if isinstance(error, json.JSONDecodeError):
        text = error.doc if isinstance(error.doc, str) else content.decode(errors="replace")
        if error.pos >= len(text.rstrip()):
            return "unexpected end of JSON input"
        character = text[error.pos]
        if error.msg == "Extra data":
            return f"invalid character '{character}' after top-level value"
        return f"invalid character '{character}' looking for beginning of value"
    return str(error)


def _json_name(value: Any) -> str:
    match value:
        case bool():
            return "bool"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _go_type(shape: Shape) -> str:
    if shape.type == "object":
        if shape.values is not None:
            return f"map[string]{_go_type(shape.values)}"
        return shape.go_name or "map[string]interface {}"
    if shape.type == "array":
        return f"[]{_go_type(shape.items or ANY)}"
    if shape.type == "integer" and shape.format:
        return shape.format
    return _GO_TYPES.get(shape.type, "interface {}")


class Decoder:
    """Fits values to a shape: ``unknown`` gathers fields that it does not declare."""

    def __init__(self) -> None:
        self.unknown: list[str] = []

    def object(self, value: dict[str, Any], shape: Shape) -> dict[str, Any]:
        """A new object without nulls, unknown fields and empty optional collections. Raises TypeMismatch."""
        return self._fit_object(value, shape, "", shape.go_name, "")

    def _mismatch(self, value: Any, shape: Shape, owner: str, path: str) -> TypeMismatch:
        where = f"Go struct field {owner}.{path}" if owner else "Go value"
        return TypeMismatch(f"json: cannot unmarshal {_json_name(value)} into {where} of type {_go_type(shape)}")

    def _fit(self, value: Any, shape: Shape, path: str, owner: str, field: str) -> Any:
        match shape.type:
            case "object":
                if not isinstance(value, dict):
                    raise self._mismatch(value, shape, owner, field)
                return self._fit_object(value, shape, path, owner, field)
            case "array":
                if not isinstance(value, list):
                    raise self._mismatch(value, shape, owner, field)
                items = shape.items or ANY
                return [
                    self._fit(item, items, f"{path}[{position}]", owner, field) if item is not None else item
                    for position, item in enumerate(value)
                ]
            case "string":
                if not isinstance(value, str):
                    raise self._mismatch(value, shape, owner, field)
                return _time(value, shape) if shape.format == "date-time" else value
            case "integer":
                if isinstance(value, float) and value.is_integer():
                    return int(value)
                if isinstance(value, bool) or not isinstance(value, int):
                    raise self._mismatch(value, shape, owner, field)
            case "number":
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise self._mismatch(value, shape, owner, field)
            case "boolean":
                if not isinstance(value, bool):
                    raise self._mismatch(value, shape, owner, field)
        if shape.go_name == "Quantity" and isinstance(value, int | float):
            return str(value)
        return value

    def _fit_object(self, value: dict[str, Any], shape: Shape, path: str, owner: str, field: str) -> dict[str, Any]:
        if shape.open and not shape.properties:
            return value
        found: dict[str, Any] = {}
        prefix = f"{path}." if path else ""
        for name, item in value.items():
            child = shape.properties.get(name)
            inner_owner, inner_field = (shape.go_name or owner), f"{field}.{name}" if field else name
            if child is None:
                if shape.values is not None:
                    child, inner_owner, inner_field = shape.values, owner, field
                elif shape.open:
                    found[name] = item
                    continue
                else:
                    self.unknown.append(f"{prefix}{name}")
                    continue
            if item is None:
                if (shape.go_name, name) in _WRITTEN_NULL:
                    found[name] = None
                continue
            fitted = self._fit(item, child, f"{prefix}{name}", inner_owner, inner_field)
            if _is_unset(fitted, child) and name not in shape.required and shape.values is None:
                continue
            found[name] = fitted
        return found


def _is_unset(value: Any, shape: Shape) -> bool:
    """Whether Go leaves the value out (omitempty): empty lists and maps, but not empty structs."""
    if isinstance(value, list):
        return not value
    return isinstance(value, dict) and not value and shape.values is not None


_MICRO = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)$")
_SECONDS = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$")


def _time(value: str, shape: Shape) -> str:
    if shape.go_name == "MicroTime":
        layout, pattern = "2006-01-02T15:04:05.000000Z07:00", _MICRO
    else:
        layout, pattern = "2006-01-02T15:04:05Z07:00", _SECONDS
    if not pattern.match(value):
        raise TypeMismatch(_time_error(value, layout))
    if value.endswith("Z") and (shape.go_name == "MicroTime" or "." not in value):
        return value
    parsed = datetime.fromisoformat(value).astimezone(UTC)
    text = parsed.strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{parsed.microsecond:06d}Z" if shape.go_name == "MicroTime" else f"{text}Z"


def _time_error(value: str, layout: str) -> str:
    seconds = re.match(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", value)
    if seconds is None:
        rest, wanted = value, "2006"
    else:
        rest = value[seconds.end() :]
        wanted = ".000000" if "." in layout else "Z07:00"
        if "." in layout and re.match(r"^\.\d{6}\d", rest):
            rest, wanted = rest[7:], "Z07:00"
    return f'parsing time "{value}" as "{layout}": cannot parse "{rest}" as "{wanted}"'


def cannot_handle(kind: str, version: str, message: str, actual: str = "") -> ApiError:
    """400: the body is no object of the kind."""
    return bad_request(f'{actual or kind} in version "{version}" cannot be handled as a {kind}: {message}')
