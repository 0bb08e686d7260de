"""The patches: JSON patch (RFC 6902), JSON merge patch (RFC 7386) and strategic merge patch. All are pure."""

import copy
from collections.abc import Callable
from typing import Any, Final

from vmnet.lab.apiserver.shapes import ANY, Shape
from vmnet.lab.apiserver.status import ApiError, bad_request

JSON_PATCH: Final = "application/json-patch+json"
MERGE_PATCH: Final = "application/merge-patch+json"
STRATEGIC_PATCH: Final = "application/strategic-merge-patch+json"
APPLY_PATCH: Final = "application/apply-patch+yaml"


def _rejected() -> ApiError:
    return ApiError(422, "Invalid", "the server rejected our request due to an error in our request", {})


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386. Neither argument is changed; the result shares structure with both."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge(result.get(name), value)
    return result


def _pointer(path: Any) -> list[str]:
    if not isinstance(path, str) or (path and not path.startswith("/")):
        raise _rejected()
    return [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]


def _index(items: list[Any], step: str, *, adding: bool = False) -> int:
    if adding and step == "-":
        return len(items)
    if not step.isdigit() or int(step) > len(items) - (0 if adding else 1):
        raise _rejected()
    return int(step)


def _find(document: Any, path: list[str]) -> Any:
    for token in path:
        if isinstance(document, list):
            document = document[_index(document, token)]
        elif isinstance(document, dict) and token in document:
            document = document[token]
        else:
            raise _rejected()
    return document


def _add(document: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    parent = _find(document, path[:-1])
    if isinstance(parent, list):
        parent.insert(_index(parent, path[-1], adding=True), value)
    elif isinstance(parent, dict):
        parent[path[-1]] = value
    else:
        raise _rejected()
    return document


def _remove(document: Any, path: list[str]) -> Any:
    if not path:
        raise _rejected()
    parent = _find(document, path[:-1])
    if isinstance(parent, list):
        return parent.pop(_index(parent, path[-1]))
    if isinstance(parent, dict) and path[-1] in parent:
        return parent.pop(path[-1])
    raise _rejected()


def json_patch(document: Any, operations: Any) -> Any:
    """RFC 6902. Raises ApiError: 400 for what is no patch, 422 for one that does not apply."""
    if not isinstance(operations, list):
        name = "object" if isinstance(operations, dict) else _json_type(operations)
        raise bad_request(
            f"error decoding patch: json: cannot unmarshal {name} into Go value of type []handlers.jsonPatchOp"
        )
    document = copy.deepcopy(document)
    for operation in operations:
        if not isinstance(operation, dict):
            raise _rejected()
        path = _pointer(operation.get("path"))
        match operation.get("op"):
            case "add":
                document = _add(document, path, copy.deepcopy(_value(operation)))
            case "remove":
                _remove(document, path)
            case "replace":
                _find(document, path)
                if path:
                    parent = _find(document, path[:-1])
                    if isinstance(parent, list):
                        parent[_index(parent, path[-1])] = copy.deepcopy(_value(operation))
                    else:
                        parent[path[-1]] = copy.deepcopy(_value(operation))
                else:
                    document = copy.deepcopy(_value(operation))
            case "move":
                moved = _remove(document, _pointer(operation.get("from")))
                document = _add(document, path, moved)
            case "copy":
                document = _add(document, path, copy.deepcopy(_find(document, _pointer(operation.get("from")))))
            case "test":
                try:
                    found = _find(document, path)
                except ApiError:
                    found = None
                if found != operation.get("value"):
                    raise _rejected()
            case _:
                raise _rejected()
    return document


def _value(operation: dict[str, Any]) -> Any:
    if "value" not in operation:
        raise _rejected()
    return operation["value"]


def _json_type(value: Any) -> str:
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


def require_object(patch: Any) -> dict[str, Any]:
    """A merge or strategic patch must be an object (null counts as an empty one). Raises ApiError (400)."""
    if patch is None:
        return {}
    if not isinstance(patch, dict):
        raise bad_request(
            f"error decoding patch: json: cannot unmarshal {_json_type(patch)} into Go value of type "
            "map[string]interface {}"
        )
    return patch


_DIRECTIVE: Final = "$patch"
_RETAIN_KEYS: Final = "$retainKeys"
_ORDER: Final = "$setElementOrder/"
_DELETE_PRIMITIVES: Final = "$deleteFromPrimitiveList/"


def strategic(target: Any, patch: dict[str, Any], shape: Shape) -> Any:
    """Strategic merge: lists merge by key where the schema says so. Raises ApiError (400) for bad directives."""
    base = dict(target) if isinstance(target, dict) else {}
    directive = patch.get(_DIRECTIVE)
    if directive == "replace":
        return _clean({name: value for name, value in patch.items() if name != _DIRECTIVE})
    if directive == "delete":
        return {}
    if directive not in (None, "merge"):
        raise bad_request(f"Unknown patch type found: {directive}")
    if _RETAIN_KEYS in patch:
        keep = set(patch[_RETAIN_KEYS])
        base = {name: value for name, value in base.items() if name in keep}
    for name, value in patch.items():
        if name in (_DIRECTIVE, _RETAIN_KEYS):
            continue
        if name.startswith(_DELETE_PRIMITIVES):
            field = name.removeprefix(_DELETE_PRIMITIVES)
            if isinstance(base.get(field), list):
                base[field] = [item for item in base[field] if item not in value]
            continue
        if name.startswith(_ORDER):
            continue
        child = shape.child(name)
        if value is None:
            base.pop(name, None)
        elif isinstance(value, dict) and not _replaced(child):
            base[name] = strategic(base.get(name), value, child)
        elif isinstance(value, list) and "merge" in child.strategies:
            base[name] = _merge_list(base.get(name) or [], value, child, patch.get(_ORDER + name))
        else:
            base[name] = _clean(value)
    for name, order in patch.items():
        # An order without its list (kubectl sends that when only elements of the live list moved).
        field = name.removeprefix(_ORDER)
        if name.startswith(_ORDER) and field not in patch and isinstance(base.get(field), list):
            base[field] = _ordered(base[field], [], order, shape.child(field))
    return base


def _replaced(shape: Shape) -> bool:
    return "replace" in shape.strategies


def _clean(value: Any) -> Any:
    """A value without directives and nulls, where there is nothing to merge it into."""
    if isinstance(value, dict):
        if value.get(_DIRECTIVE) == "delete":
            return {}
        return {
            name: _clean(item)
            for name, item in value.items()
            if item is not None and not name.startswith("$") and name != _DIRECTIVE
        }
    if isinstance(value, list):
        return [
            _clean(item)
            for item in value
            if not (isinstance(item, dict) and item.get(_DIRECTIVE) in ("delete", "replace") and len(item) <= 2)
        ]
    return value


def _merge_list(target: list[Any], patch: list[Any], shape: Shape, order: list[Any] | None) -> list[Any]:
    if not shape.merge_key:
        result = list(target)
        result.extend(item for item in patch if item not in result)
        return _ordered(result, patch, order, shape)
    key = shape.merge_key
    if any(isinstance(item, dict) and item.get(_DIRECTIVE) == "replace" for item in patch):
        return [_clean(item) for item in patch if not (isinstance(item, dict) and item.get(_DIRECTIVE) == "replace")]
    result = list(target)
    items = shape.items or ANY
    for item in patch:
        if not isinstance(item, dict) or key not in item:
            raise bad_request(f"map: {item} does not contain declared merge key: {key}")
        position = next(
            (i for i, found in enumerate(result) if isinstance(found, dict) and found.get(key) == item[key]), None
        )
        if item.get(_DIRECTIVE) == "delete":
            result = [found for found in result if not (isinstance(found, dict) and found.get(key) == item[key])]
        elif position is None:
            result.append(strategic({}, item, items))
        else:
            result[position] = strategic(result[position], item, items)
    return _ordered(result, patch, order, shape)


def _ordered(result: list[Any], patch: list[Any], order: list[Any] | None, shape: Shape) -> list[Any]:
    """Put elements named by ``$setElementOrder`` in that order; the others keep their place relative to the front."""
    if not order:
        return result
    identify: Callable[[Any], Any]
    if shape.merge_key:
        key = shape.merge_key

        def identify(item: Any) -> Any:
            return item.get(key) if isinstance(item, dict) else item
    else:

        def identify(item: Any) -> Any:
            return item

    rank = {identify(item): position for position, item in enumerate(order)}
    named = sorted((item for item in result if identify(item) in rank), key=lambda item: rank[identify(item)])
    merged: list[Any] = []
    queue = iter(named)
    for item in result:
        merged.append(next(queue) if identify(item) in rank else item)
    return merged
