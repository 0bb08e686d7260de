"""The JSONPath of printer columns: fields, indexes, wildcards and filters by comparison."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

Step = Callable[[Any], Iterable[Any]]

_FIELD: Final = re.compile(r"(?:\\.|[^.\[\]\\\s])+")
_FILTER: Final = re.compile(
    r"\?\(\s*@((?:\.[\w\-/\\.]+|\['[^']*'\])*)\s*(?:(==|!=|<=|>=|<|>)\s*(.+?)\s*)?\)\Z", re.DOTALL
)
_SLICE: Final = re.compile(r"(-?\d*):(-?\d*)\Z")


class PathError(ValueError):
    """The path is not understood."""


def _field(name: str) -> Step:
    def step(value: Any) -> Iterable[Any]:
        if isinstance(value, dict) and name in value:
            yield value[name]

    return step


def _every(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _deep(name: str) -> Step:
    def step(value: Any) -> Iterable[Any]:
        if isinstance(value, dict) and name in value:
            yield value[name]
        for item in _every(value):
            yield from step(item)

    return step


def _index(position: int) -> Step:
    def step(value: Any) -> Iterable[Any]:
        if isinstance(value, list) and -len(value) <= position < len(value):
            yield value[position]

    return step


def _slice(first: int | None, last: int | None) -> Step:
    def step(value: Any) -> Iterable[Any]:
        if isinstance(value, list):
            yield from value[first:last]

    return step


def _literal(text: str) -> Any:
    if len(text) >= 2 and text[0] in "'\"" and text[-1] == text[0]:
        return text[1:-1]
    try:
        return json.loads(text)
    except ValueError as error:
        raise PathError(f"unrecognized literal {text}") from error


_COMPARE: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "==": lambda left, right: bool(left == right),
    "!=": lambda left, right: bool(left != right),
    "<": lambda left, right: bool(left < right),
    ">": lambda left, right: bool(left > right),
    "<=": lambda left, right: bool(left <= right),
    ">=": lambda left, right: bool(left >= right),
}


def _filter(text: str) -> Step:
    match = _FILTER.match(text)
    if match is None:
        raise PathError(f"unrecognized filter {text}")
    inner = JsonPath(match[1] or "")
    compare = _COMPARE.get(match[2] or "")
    wanted = _literal(match[3]) if compare is not None else None

    def holds(item: Any) -> bool:
        found = inner.find(item)
        if compare is None or not found:
            return bool(found)
        try:
            return compare(found[0], wanted)
        except TypeError:
            return False

    return lambda value: (item for item in _every(value) if holds(item))


class JsonPath:
    """A parsed path, with or without its braces and leading ``$``."""

    def __init__(self, text: str) -> None:
        """Raises PathError."""
        path = text.strip()
        if path.startswith("{") and path.endswith("}"):
            path = path[1:-1].strip()
        self._steps = list(_parse(path.removeprefix("$")))

    def find(self, value: Any) -> list[Any]:
        """Every value at the path."""
        found = [value]
        for step in self._steps:
            found = [result for item in found for result in step(item)]
        return found


def _parse(path: str) -> Iterable[Step]:
    position = 0
    while position < len(path):
        if path.startswith("..", position):
            match = _FIELD.match(path, position + 2)
            if match is None:
                raise PathError(f"a name must follow .. in {path}")
            yield _deep(match.group().replace("\\", ""))
            position = match.end()
        elif path[position] == "[":
            end = _closing(path, position)
            yield _bracket(path[position + 1 : end].strip())
            position = end + 1
        else:
            position += path[position] == "."
            if position >= len(path) or path[position] == "[":
                continue
            match = _FIELD.match(path, position)
            if match is None:
                raise PathError(f"unexpected {path[position]!r} in {path}")
            name = match.group().replace("\\", "")
            yield _every if name == "*" else _field(name)
            position = match.end()


def _closing(path: str, opening: int) -> int:
    depth, quote = 0, ""
    for position in range(opening, len(path)):
        character = path[position]
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[]":
            depth += 1 if character == "[" else -1
            if depth == 0:
                return position
    raise PathError(f"unterminated array in {path}")


def _bracket(inside: str) -> Step:
    if inside == "*":
        return _every
    if inside.startswith("?"):
        return _filter(inside)
    if inside[:1] in ("'", '"'):
        return _field(inside[1:-1])
    match = _SLICE.match(inside)
    if match is not None:
        return _slice(int(match[1]) if match[1] else None, int(match[2]) if match[2] else None)
    try:
        return _index(int(inside))
    except ValueError as error:
        raise PathError(f"invalid array index {inside}") from error
