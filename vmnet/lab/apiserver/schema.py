"""Structural schemas of custom resources: pruning, defaulting and validation with an API server's own causes.

Order of the checks, their wording, and which of them keep CEL rules from running follow kube-apiserver 1.36.
"""

import base64
import binascii
import copy
import ipaddress
import json
import re
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import cel as library

from vmnet.lab.apiserver import cel
from vmnet.lab.apiserver.status import Cause, duplicate, invalid_value, required, show, unsupported

_ABSENT: Final = object()
_BLOCKING: Final = frozenset(
    {
        *("FieldValueNotSupported", "FieldValueRequired", "FieldValueTooLong", "FieldValueTooMany"),
        "FieldValueTypeInvalid",
    }
)
NOT_CHECKED: Final = Cause(
    "FieldValueInvalid",
    "Invalid value: null: some validation rules were not checked because the object was invalid; "
    "correct the existing errors to complete validation",
    "<nil>",
)
"""Stands last where errors kept CEL rules from running."""
OBJECT_META: Final = frozenset(
    {
        *("annotations", "creationTimestamp", "deletionGracePeriodSeconds", "deletionTimestamp", "finalizers"),
        *("generateName", "generation", "labels", "managedFields", "name", "namespace", "ownerReferences"),
        *("resourceVersion", "selfLink", "uid"),
    }
)
"""Fields of ObjectMeta."""

# Regular expressions

_POSIX: Final = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "digit": "0-9",
    "lower": "a-z",
    "upper": "A-Z",
    "space": r"\t\n\v\f\r ",
    "xdigit": "0-9A-Fa-f",
    "word": "0-9A-Za-z_",
    "punct": r"!-/:-@\[-`{-~",
}


def go_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression of Go's syntax. Raises ValueError."""
    parts: list[str] = []
    index, in_class = 0, False
    while index < len(pattern):
        character = pattern[index]
        step = 1
        if character == "\\" and index + 1 < len(pattern):
            character, step = (r"\Z" if pattern[index + 1] == "z" else pattern[index : index + 2]), 2
        elif in_class and pattern.startswith("[:", index) and ":]" in pattern[index:]:
            end = pattern.index(":]", index)
            character, step = _POSIX.get(pattern[index + 2 : end], ""), end + 2 - index
        elif in_class:
            character, in_class = (r"\[" if character == "[" else character), character != "]"
        elif character == "[":
            in_class = True
            head = re.match(r"\[\^?\]?", pattern[index:])
            character = head.group() if head else "["
            step = len(character)  # a bracket that stands first is a member of its class
        elif character == "$":
            character = r"\Z"  # Go's $ does not match before a final newline
        parts.append(character)
        index += step
    try:
        return re.compile("".join(parts))
    except re.error as error:
        raise ValueError(f"error parsing regexp: {error}: `{pattern}`") from error


# Formats

_DATE_TIME: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:?\d\d)?")
_DURATION: Final = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|μs|ms|s|m|h|d|w)")
_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_HOST: Final = re.compile(r"(?=.{1,255}\Z)([a-zA-Z0-9_]([-a-zA-Z0-9_]{0,61}[a-zA-Z0-9_])?)(\.[a-zA-Z0-9_-]{1,63})*\.?")


def _attempt(call: Callable[[str], object], text: str) -> bool:
    try:
        return call(text) is not False
    except (ValueError, binascii.Error):
        return False


def _date_time(text: str) -> datetime:
    if not _DATE_TIME.fullmatch(text):
        raise ValueError(text)
    found = datetime.fromisoformat(text.upper().replace(" ", "T"))
    return found if found.tzinfo else found.replace(tzinfo=UTC)


_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> timedelta:
    """A Go duration such as ``1h30m``. Raises ValueError."""
    parts = _DURATION.findall(text)
    if not parts or "".join(parts) != text:
        raise ValueError(f"{text!r} is no duration")
    sign = -1 if text.startswith("-") else 1
    seconds = 0.0
    for part in parts:
        number = re.match(r"[+-]?([\d.]+)(.+)", part)
        if number is not None:
            seconds += float(number[1]) * {**_UNITS, "w": 604800}[number[2]]
    return timedelta(seconds=sign * seconds)


def _address(version: int) -> Callable[[str], object]:
    return lambda text: ipaddress.ip_address(text).version == version


def _cidr(text: str) -> object:
    address, _, bits = text.partition("/")
    return bits.isdigit() and ipaddress.ip_interface(f"{address}/{bits}")


_FORMATS: Final[dict[str, Callable[[str], object]]] = {
    "ipv4": _address(4),
    "ipv6": _address(6),
    "cidr": _cidr,
    "date-time": _date_time,
    "date": date.fromisoformat,
    "duration": parse_duration,
    "byte": lambda text: base64.b64decode(text, validate=True) is not None,
    "mac": lambda text: (
        re.fullmatch(r"[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}([:-][0-9A-Fa-f]{2}){0,14}", text) is not None
    ),
    "email": lambda text: re.fullmatch(r"[^@\s]+@[^@\s]+", text) is not None,
    "hostname": lambda text: _HOST.fullmatch(text) is not None,
    "uri": lambda text: bool(urllib.parse.urlsplit(text).scheme) or text.startswith("/"),
    "uuid": lambda text: re.fullmatch(r"[0-9a-fA-F-]+", text) is not None and uuid.UUID(text) is not None,
    "k8s-short-name": lambda text: len(text) <= 63 and _LABEL.fullmatch(text) is not None,
    "k8s-long-name": lambda text: len(text) <= 253 and all(_LABEL.fullmatch(part) for part in text.split(".")),
}

# Nodes


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of ``x-kubernetes-validations``."""

    expression: cel.Expression
    message: str
    message_expression: cel.Expression | None
    reason: str
    field_path: str
    optional_old: bool

    @property
    def is_transition(self) -> bool:
        """Whether it compares with the value before."""
        return self.expression.uses("oldSelf")


@dataclass(slots=True, eq=False)
class Node:
    """One node of a schema. Absent constraints are None."""

    type: str = ""
    format: str = ""
    nullable: bool = False
    properties: "dict[str, Node]" = field(default_factory=dict)
    values: "Node | None" = None
    """Schema of a map's values."""
    any_values: bool = False
    """``additionalProperties: true``."""
    items: "Node | None" = None
    required: tuple[str, ...] = ()
    preserve: bool = False
    embedded: bool = False
    int_or_string: bool = False
    list_type: str = ""
    list_keys: tuple[str, ...] = ()
    default: Any = _ABSENT
    enum: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: bool = False
    exclusive_maximum: bool = False
    multiple_of: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    pattern: re.Pattern[str] | None = None
    pattern_text: str = ""
    min_items: int | None = None
    max_items: int | None = None
    min_properties: int | None = None
    max_properties: int | None = None
    all_of: "tuple[Node, ...]" = ()
    any_of: "tuple[Node, ...]" = ()
    one_of: "tuple[Node, ...]" = ()
    not_: "Node | None" = None
    rules: tuple[Rule, ...] = ()
    has_rules: bool = False
    """Whether it, or anything below it, has rules."""

    def child(self, name: str) -> "Node | None":
        """The schema of a field or map value; None where it is unspecified."""
        return self.properties.get(name) or self.values


def _rule(written: Mapping[str, Any]) -> Rule:
    text = written.get("messageExpression")
    names = frozenset({"self", "oldSelf"})
    return Rule(
        cel.compiled(written["rule"], names),
        str(written.get("message") or "").strip(),
        cel.compiled(text, names) if text else None,
        written.get("reason") or "FieldValueInvalid",
        written.get("fieldPath") or "",
        bool(written.get("optionalOldSelf")),
    )


def node(written: Mapping[str, Any]) -> Node:
    """Compile a JSON schema. Raises ``cel.CompileError`` for a bad rule and ValueError for a bad pattern."""
    extra = written.get("additionalProperties")
    items = written.get("items")
    made = Node(
        type=written.get("type") or "",
        format=written.get("format") or "",
        nullable=bool(written.get("nullable")),
        properties={name: node(child) for name, child in (written.get("properties") or {}).items()},
        values=node(extra) if isinstance(extra, Mapping) else None,
        any_values=extra is True,
        items=node(items) if isinstance(items, Mapping) else None,
        required=tuple(written.get("required") or ()),
        preserve=bool(written.get("x-kubernetes-preserve-unknown-fields")),
        embedded=bool(written.get("x-kubernetes-embedded-resource")),
        int_or_string=bool(written.get("x-kubernetes-int-or-string")),
        list_type=written.get("x-kubernetes-list-type") or "",
        list_keys=tuple(written.get("x-kubernetes-list-map-keys") or ()),
        default=written.get("default", _ABSENT),
        enum=tuple(written["enum"]) if written.get("enum") is not None else None,
        minimum=written.get("minimum"),
        maximum=written.get("maximum"),
        exclusive_minimum=bool(written.get("exclusiveMinimum")),
        exclusive_maximum=bool(written.get("exclusiveMaximum")),
        multiple_of=written.get("multipleOf"),
        min_length=written.get("minLength"),
        max_length=written.get("maxLength"),
        pattern=go_pattern(written["pattern"]) if written.get("pattern") else None,
        pattern_text=written.get("pattern") or "",
        min_items=written.get("minItems"),
        max_items=written.get("maxItems"),
        min_properties=written.get("minProperties"),
        max_properties=written.get("maxProperties"),
        all_of=tuple(node(item) for item in written.get("allOf") or ()),
        any_of=tuple(node(item) for item in written.get("anyOf") or ()),
        one_of=tuple(node(item) for item in written.get("oneOf") or ()),
        not_=node(written["not"]) if isinstance(written.get("not"), Mapping) else None,
        rules=tuple(_rule(item) for item in written.get("x-kubernetes-validations") or ()),
    )
    below = [*made.properties.values(), *filter(None, (made.values, made.items))]
    made.has_rules = bool(made.rules) or any(child.has_rules for child in below)
    return made


# Pruning and defaults


def _is_dropped_null(value: Any, child: Node | None) -> bool:
    return value is None and child is not None and not child.nullable


def _prune(value: Any, schema: Node, path: str, found: list[str], *, root: bool = False) -> None:
    if isinstance(value, dict):
        for name in list(value):
            where = f"{path}.{name}" if path else name
            if schema.embedded or root:
                if name in ("apiVersion", "kind"):
                    continue
                if name == "metadata":
                    if not root and isinstance(value[name], dict):
                        _prune_meta(value[name], where, found)
                    continue
            child = schema.child(name)
            if child is not None:
                _prune(value[name], child, where, found)
            elif not schema.preserve and not schema.any_values:
                found.append(where)
                del value[name]
    elif isinstance(value, list) and schema.items is not None:
        for position, item in enumerate(value):
            _prune(item, schema.items, f"{path}[{position}]", found)


def _prune_meta(meta: dict[str, Any], path: str, found: list[str]) -> None:
    for name in list(meta):
        if name not in OBJECT_META:
            found.append(f"{path}.{name}")
            del meta[name]


def _default(value: Any, schema: Node, *, root: bool = False) -> None:
    if isinstance(value, dict):
        for name, child in schema.properties.items():
            if root and name in ("apiVersion", "kind", "metadata"):
                continue
            if child.default is not _ABSENT and (name not in value or _is_dropped_null(value[name], child)):
                value[name] = copy.deepcopy(child.default)
        for name in list(value):
            known = schema.child(name)
            if known is None:
                continue
            if _is_dropped_null(value[name], known):
                if known.default is _ABSENT:
                    del value[name]
                else:
                    value[name] = copy.deepcopy(known.default)
            else:
                _default(value[name], known)
    elif isinstance(value, list) and schema.items is not None:
        for item in value:
            _default(item, schema.items)


# Validation


def _json_type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _fits(value: Any, wanted: str) -> bool:
    actual = _json_type(value)
    if wanted == "number":
        return actual in ("integer", "number")
    if wanted == "integer":
        return actual == "integer" or (actual == "number" and float(value).is_integer())
    return actual == wanted


def _number(value: float) -> str:
    """As Go's %v prints it."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e21 else repr(value)


def _wrong(value: Any, path: str, text: str) -> Cause:
    return invalid_value(path or "<nil>", value, f"{path} in body {text}")


def _type_error(path: str, wanted: str, shown: str) -> Cause:
    quoted = show(shown)
    message = f"Invalid value: {quoted}: {path} in body must be of type {wanted}: {quoted}"
    return Cause("FieldValueTypeInvalid", message, path or "<nil>")


def _too_many(value: Any, path: str, limit: int) -> Cause:
    return Cause("FieldValueTooMany", f"Too many: {len(value)}: must have at most {limit} items", path)


def _composite(path: str, text: str) -> Cause:
    return Cause("FieldValueInvalid", f'Invalid value: "": "{path}" {text}', "<nil>")


class _Validator:
    """The checks of JSON schema. ``old`` is the value before, which need not be right where it did not change."""

    def __init__(self) -> None:
        self.matches = 0

    def causes(self, value: Any, schema: Node, path: str, old: Any = _ABSENT) -> list[Cause]:
        """Every error in ``value``."""
        if old is not _ABSENT and _equal(value, old):
            return []
        found: list[Cause] = []
        if value is None and schema.nullable:
            return found
        self._type(value, schema, path, found)
        self._combined(value, schema, path, found)
        if isinstance(value, str):
            self._string(value, schema, path, found)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            self._numeric(value, schema, path, found)
        elif isinstance(value, list):
            self._list(value, schema, path, old, found)
        if schema.enum is not None and not any(_equal(value, item) for item in schema.enum):
            allowed = [item if isinstance(item, str) else show(item) for item in schema.enum]
            found.append(unsupported(path or "<nil>", value, allowed))
        if isinstance(value, dict):
            self._object(value, schema, path, old, found)
        return found

    def _type(self, value: Any, schema: Node, path: str, found: list[Cause]) -> None:
        if schema.int_or_string:
            if not isinstance(value, str) and not _fits(value, "integer"):
                found.append(_type_error(path, "integer,string", _json_type(value)))
        elif schema.type and not _fits(value, schema.type):
            found.append(_type_error(path, schema.type, _json_type(value)))
            if schema.type == "integer" and isinstance(value, float):
                form = schema.format or "default"
                text = f"Checked value must be of type integer ({form} format) in {path}"
                found.append(Cause("FieldValueInvalid", f'Invalid value: "": {text}', "<nil>"))
        else:
            self.matches += 1

    def _combined(self, value: Any, schema: Node, path: str, found: list[Cause]) -> None:
        if schema.any_of:
            best, _, valid = self._alternatives(value, schema.any_of, path)
            if not valid:
                found.append(_composite(path, "must validate at least one schema (anyOf)"))
                found.extend(best)
        if schema.one_of:
            best, _, valid = self._alternatives(value, schema.one_of, path)
            if valid != 1:
                text = f"Found {valid} valid alternatives" if valid else "Found none valid"
                found.append(_composite(path, f"must validate one and only one schema (oneOf). {text}"))
                if not valid:
                    found.extend(best)
        if schema.all_of:
            errors = [_Validator().causes(value, item, path) for item in schema.all_of]
            wrong = [item for item in errors if item]
            for item in wrong:
                found.extend(item)
            if wrong:
                none = ". None validated" if len(wrong) == len(errors) else ""
                found.append(_composite(path, f"must validate all the schemas (allOf){none}"))
        if schema.not_ is not None and not _Validator().causes(value, schema.not_, path):
            found.append(_composite(path, "must not validate the schema (not)"))

    def _alternatives(self, value: Any, schemas: Sequence[Node], path: str) -> tuple[list[Cause], int, int]:
        """Errors of the alternative that came closest, how close, and how many were valid."""
        best: list[Cause] = []
        most, valid = -1, 0
        for item in schemas:
            inner = _Validator()
            errors = inner.causes(value, item, path)
            if not errors:
                valid += 1
            elif inner.matches > most:
                best, most = errors, inner.matches
        return best, most, valid

    def _string(self, value: str, schema: Node, path: str, found: list[Cause]) -> None:
        length = len(value)
        if schema.max_length is not None and length > schema.max_length:
            text = f"Too long: may not be more than {schema.max_length} bytes"
            found.append(Cause("FieldValueTooLong", text, path))
        elif schema.min_length is not None and length < schema.min_length:
            found.append(_wrong(value, path, f"should be at least {schema.min_length} chars long"))
        elif schema.pattern is not None and not schema.pattern.search(value):
            found.append(_wrong(value, path, f"should match '{schema.pattern_text}'"))
        check = _FORMATS.get(schema.format)
        if check is not None and schema.type in ("string", "") and not _attempt(check, value):
            found.append(_type_error(path, schema.format, value))

    def _numeric(self, value: float, schema: Node, path: str, found: list[Cause]) -> None:
        shown: float = int(value) if isinstance(value, float) and value.is_integer() else value
        if schema.multiple_of is not None:
            if isinstance(value, int) and int(schema.multiple_of) <= 0:
                # The server checks whole numbers with a whole factor, which a fraction is not.
                text = f"factor MultipleOf declared for {path} must be positive: {int(schema.multiple_of)}"
                found.append(invalid_value(path, int(schema.multiple_of), text))
            else:
                factor = value / schema.multiple_of
                if abs(factor - round(factor)) > 1e-9:
                    found.append(_wrong(shown, path, f"should be a multiple of {_number(schema.multiple_of)}"))
        if schema.maximum is not None:
            limit = _number(schema.maximum)
            if schema.exclusive_maximum and value >= schema.maximum:
                found.append(_wrong(shown, path, f"should be less than {limit}"))
            elif not schema.exclusive_maximum and value > schema.maximum:
                found.append(_wrong(shown, path, f"should be less than or equal to {limit}"))
        if schema.minimum is not None:
            limit = _number(schema.minimum)
            if schema.exclusive_minimum and value <= schema.minimum:
                found.append(_wrong(shown, path, f"should be greater than {limit}"))
            elif not schema.exclusive_minimum and value < schema.minimum:
                found.append(_wrong(shown, path, f"should be greater than or equal to {limit}"))
        bits = {"int32": 31, "int64": 63}.get(schema.format)
        if bits is not None and schema.type == "integer" and not -(2**bits) <= value < 2**bits:
            text = f"Checked value must be of type integer with format {schema.format} in {path}"
            found.append(Cause("FieldValueInvalid", f'Invalid value: "": {text}', "<nil>"))

    def _list(self, value: list[Any], schema: Node, path: str, old: Any, found: list[Cause]) -> None:
        if schema.items is not None:
            for position, item in enumerate(value):
                before = _counterpart(schema, item, old)
                found.extend(self.causes(item, schema.items, f"{path}[{position}]", before))
        if schema.min_items is not None and len(value) < schema.min_items:
            found.append(_wrong(len(value), path, f"should have at least {schema.min_items} items"))
        if schema.max_items is not None and len(value) > schema.max_items:
            found.append(_too_many(value, path, schema.max_items))

    def _object(self, value: dict[str, Any], schema: Node, path: str, old: Any, found: list[Cause]) -> None:
        count = len(value)
        if schema.max_properties is not None and count > schema.max_properties:
            found.append(_too_many(value, path, schema.max_properties))
        if schema.min_properties is not None and count < schema.min_properties:
            found.append(_wrong(count, path, f"should have at least {schema.min_properties} properties"))
        before = old if isinstance(old, dict) else {}
        prefix = f"{path}." if path else ""
        if schema.embedded:
            found.extend(required(f"{prefix}{name}") for name in ("apiVersion", "kind") if not value.get(name))
        for name in schema.required:
            if name not in value:
                found.append(required(f"{prefix}{name}"))
            else:
                self.matches += 1
        for name, item in value.items():
            child = schema.child(name)
            if child is not None:
                found.extend(self.causes(item, child, f"{prefix}{name}", before.get(name, _ABSENT)))


def _equal(left: Any, right: Any) -> bool:
    """Equality of JSON values: true is not 1."""
    if isinstance(left, bool) != isinstance(right, bool):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(item, right[name]) for name, item in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_equal(*pair) for pair in zip(left, right, strict=True))
    return bool(left == right)


def _keys(schema: Node, item: Any) -> str | None:
    if not isinstance(item, dict):
        return None
    return json.dumps({name: item[name] for name in schema.list_keys if name in item}, sort_keys=True)


def _counterpart(schema: Node, item: Any, old: Any) -> Any:
    """The element of the list before that ``item`` continues, in a list whose elements have keys."""
    if schema.list_type != "map" or not isinstance(old, list):
        return _ABSENT
    wanted = _keys(schema, item)
    return next((before for before in old if wanted is not None and _keys(schema, before) == wanted), _ABSENT)


def _duplicates(value: Any, schema: Node, path: str) -> Iterator[Cause]:
    """Elements that stand twice in lists of type set and map."""
    if isinstance(value, list):
        seen: list[Any] = []
        for position, item in enumerate(value):
            where = f"{path}[{position}]"
            if schema.list_type in ("set", "map"):
                key = item
                if schema.list_type == "map":
                    names = sorted(schema.list_keys)
                    key = {name: item[name] for name in names if name in item} if isinstance(item, dict) else item
                if any(_equal(key, known) for known in seen):
                    yield duplicate(where, key)
                seen.append(key)
            if schema.items is not None:
                yield from _duplicates(item, schema.items, where)
    elif isinstance(value, dict):
        for name, item in value.items():
            child = schema.child(name)
            if child is not None:
                where = f"{path}[{name}]" if name not in schema.properties else f"{path}.{name}" if path else name
                yield from _duplicates(item, child, where)


# CEL

_KEYWORDS: Final = frozenset(
    {
        *("true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function", "if"),
        *("import", "let", "loop", "package", "namespace", "return", "var", "void", "while"),
    }
)
_IDENTIFIER: Final = re.compile(r"[A-Za-z_.\-/][A-Za-z0-9_.\-/]*")


def _escaped(name: str) -> str | None:
    """The name of a field in rules; None for one that they cannot reach."""
    if not _IDENTIFIER.fullmatch(name):
        return None
    if name in _KEYWORDS:
        return f"__{name}__"
    text = name.replace("__", "__underscores__").replace(".", "__dot__").replace("-", "__dash__")
    return text.replace("/", "__slash__")


def _convert(value: Any, schema: Node | None, *, root: bool = False) -> Any:
    """A JSON value as rules see it: typed by the schema, with field names that CEL can spell."""
    if schema is None or value is None:
        return value
    if isinstance(value, dict):
        if schema.values is not None:
            return {name: _convert(item, schema.values) for name, item in value.items()}
        found = {}
        if root or schema.embedded:
            found = {name: value[name] for name in ("apiVersion", "kind") if name in value}
            meta = value.get("metadata") or {}
            found["metadata"] = {name: meta[name] for name in ("name", "generateName") if name in meta}
        for name, child in schema.properties.items():
            spelled = _escaped(name)
            if name in value and spelled is not None and spelled not in found:
                found[spelled] = _convert(value[name], child)
        return found
    if isinstance(value, list):
        return [_convert(item, schema.items) for item in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        if schema.type == "number":
            return float(value)
        if schema.type == "integer" and isinstance(value, float) and value.is_integer():
            return int(value)
        return value
    if isinstance(value, str) and schema.type == "string" and schema.format in _TYPED_FORMATS:
        try:
            return _TYPED_FORMATS[schema.format](value)
        except (ValueError, binascii.Error):
            return value
    return value


_TYPED_FORMATS: Final[dict[str, Callable[[str], Any]]] = {
    "date-time": _date_time,
    "date": lambda text: datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC),
    "duration": parse_duration,
    "byte": lambda text: base64.b64decode(text, validate=True),
}


def _shown(value: Any) -> str:
    return "" if isinstance(value, dict | list) else f"{show(value)}: "


def _rule_cause(rule: Rule, value: Any, path: str, detail: str) -> Cause:
    where = f"{path}{rule.field_path}" if path else rule.field_path.removeprefix(".")
    match rule.reason:
        case "FieldValueForbidden":
            return Cause(rule.reason, f"Forbidden: {detail}", where)
        case "FieldValueRequired":
            return Cause(rule.reason, f"Required value: {detail}", where)
        case "FieldValueDuplicate":
            return Cause(rule.reason, f"Duplicate value: {_shown(value).removesuffix(': ')}", where)
    return Cause("FieldValueInvalid", f"Invalid value: {_shown(value)}{detail}", where or "<nil>")


def _broken(value: Any, schema: Node, path: str, old: Any, *, root: bool = False) -> Iterator[Cause]:
    """The rules that do not hold: those of this node, then those below it."""
    if not schema.has_rules or value is None:
        return
    if schema.rules:
        variables: dict[str, Any] | None = None
        unchanged = old is not _ABSENT and _equal(value, old)
        for rule in schema.rules:
            transition = rule.is_transition
            if transition and old is _ABSENT and not rule.optional_old:
                continue
            if unchanged and not transition:
                continue
            if variables is None:
                variables = {"self": _convert(value, schema, root=root)}
            bound = dict(variables)
            if transition:
                before = _ABSENT if old is _ABSENT else _convert(old, schema, root=root)
                if rule.optional_old:
                    absent = before is _ABSENT
                    bound["oldSelf"] = library.OptionalValue.none() if absent else library.OptionalValue.of(before)
                else:
                    bound["oldSelf"] = before
            detail = rule.message or f"failed rule: {rule.expression.source.strip()}"
            try:
                if rule.expression.evaluate(bound) is True:
                    continue
            except cel.EvaluationError as error:
                kind = show(schema.type or _json_type(value))
                text = f"Invalid value: {kind}: {error} evaluating rule: {detail}"
                yield Cause("FieldValueInvalid", text, path or "<nil>")
                continue
            yield _rule_cause(rule, value, path, _message(rule, bound) or detail)
    if isinstance(value, dict):
        before_fields = old if isinstance(old, dict) else {}
        for name, item in value.items():
            child = schema.child(name)
            if child is not None:
                where = f"{path}[{name}]" if name not in schema.properties else f"{path}.{name}" if path else name
                yield from _broken(item, child, where, before_fields.get(name, _ABSENT))
    elif isinstance(value, list) and schema.items is not None:
        for position, item in enumerate(value):
            yield from _broken(item, schema.items, f"{path}[{position}]", _counterpart(schema, item, old))


def _message(rule: Rule, variables: Mapping[str, Any]) -> str:
    """What ``messageExpression`` says; empty where it says nothing usable."""
    if rule.message_expression is None:
        return ""
    try:
        text = rule.message_expression.evaluate(variables)
    except cel.EvaluationError:
        return ""
    return text.strip() if isinstance(text, str) and "\n" not in text else ""


def _at(obj: Any, path: str) -> Any:
    for name in path.removeprefix(".").split("."):
        if not isinstance(obj, dict) or name not in obj:
            return None
        obj = obj[name]
    return obj


class Structural:
    """The schema of one version of a custom resource. Objects are JSON dicts and are changed in place."""

    def __init__(self, root: Node, scale: Mapping[str, str] | None = None) -> None:
        self.root = root
        self._scale = dict(scale or {})

    @classmethod
    def from_crd(cls, version: Mapping[str, Any]) -> "Structural":
        """From an entry of ``spec.versions``. Raises as ``node``."""
        written = (version.get("schema") or {}).get("openAPIV3Schema")
        root = node(written) if written else Node(type="object", preserve=True)
        return cls(root, (version.get("subresources") or {}).get("scale"))

    def prune(self, obj: Any) -> list[str]:
        """Remove unknown fields; their paths, as ``spec.rules[0].colour``."""
        found: list[str] = []
        _prune(obj, self.root, "", found, root=True)
        return found

    def default(self, obj: Any) -> None:
        """Fill in defaults; nulls of fields that are not nullable go, or become the default."""
        _default(obj, self.root, root=True)

    def validate(self, obj: Any, old: Any = None) -> list[Cause]:
        """Causes, in the server's order; empty when ``obj`` is right. Fields that equal those of ``old`` are let be."""
        before = _ABSENT if old is None else old
        found = _Validator().causes(obj, self.root, "", before)
        for name in ("specReplicasPath", "statusReplicasPath"):
            count = _at(obj, self._scale[name]) if self._scale.get(name) else None
            if isinstance(count, int) and count < 0:
                found.append(invalid_value(self._scale[name], count, "should be a non-negative integer"))
        found.extend(_duplicates(obj, self.root, ""))
        if any(cause.reason in _BLOCKING for cause in found):
            found.append(NOT_CHECKED)
        else:
            found.extend(_broken(obj, self.root, "", before, root=True))
        return found
