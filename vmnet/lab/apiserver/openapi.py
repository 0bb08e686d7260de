"""OpenAPI v3 documents, one per group version, for ``kubectl explain``, ``apply`` and field validation.

Schemas of built-in kinds come from ``data/openapi.json.gz``; custom resources are rendered from their definitions.
Paths list only what clients read: the kind behind a path, and the ``fieldValidation`` parameter of writes.
"""

import functools
import gzip
import hashlib
import importlib.resources
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from vmnet.lab.apiserver import patches
from vmnet.lab.apiserver.resources import Registry, ResourceInfo

_PREFIX: Final = "#/components/schemas/"
_META: Final = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_LIST_META: Final = "io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta"
_METHODS: Final = {
    # verb of a resource -> method, action and whether it is at the path of one object
    "list": ("get", "list", False),
    "create": ("post", "post", False),
    "deletecollection": ("delete", "deletecollection", False),
    "get": ("get", "get", True),
    "update": ("put", "put", True),
    "patch": ("patch", "patch", True),
    "delete": ("delete", "delete", True),
}
_WRITES: Final = frozenset({"create", "update", "patch"})
_BODIES: Final = {
    "create": ("*/*",),
    "update": ("*/*",),
    "patch": (
        "application/apply-patch+yaml",
        "application/json-patch+json",
        "application/merge-patch+json",
        "application/strategic-merge-patch+json",
    ),
}

Schema = dict[str, Any]


@functools.cache
def _content() -> bytes:
    return importlib.resources.files("vmnet.lab.apiserver").joinpath("data/openapi.json.gz").read_bytes()


@functools.cache
def _data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(_content()))
    return found


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.hexdigest().upper()


def _references(value: object) -> Iterable[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name == "$ref" and isinstance(item, str):
                yield item.removeprefix(_PREFIX)
            else:
                yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def _with_references(schemas: dict[str, Schema]) -> dict[str, Schema]:
    known = _data()["schemas"]
    waiting = [name for schema in schemas.values() for name in _references(schema)]
    while waiting:
        name = waiting.pop()
        if name not in schemas:
            schemas[name] = known[name]
            waiting.extend(_references(known[name]))
    return dict(sorted(schemas.items()))


def _base(group: str, version: str) -> str:
    return f"/apis/{group}/{version}" if group else f"/api/{version}"


def _identity(info: ResourceInfo, kind: str) -> dict[str, str]:
    return {"group": info.group, "version": info.version, "kind": kind}


def _reference(name: str) -> Schema:
    return {"$ref": f"{_PREFIX}{name}"}


def _described(name: str, description: str) -> Schema:
    return {"description": description, "allOf": [_reference(name)]}


def _custom_name(info: ResourceInfo) -> str:
    return ".".join([*reversed(info.group.split(".")), info.version, info.kind])


def _custom_schema(info: ResourceInfo, definition: Mapping[str, Any]) -> Schema:
    written = (definition.get("schema") or {}).get("openAPIV3Schema")
    if not written or (written.get("x-kubernetes-preserve-unknown-fields") and not written.get("properties")):
        found: Schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    else:
        found = _published(written)
    meta = _data()["schemas"]["io.k8s.api.core.v1.ConfigMap"]["properties"]
    found["properties"] = {
        **(found.get("properties") or {}),
        "apiVersion": meta["apiVersion"],
        "kind": meta["kind"],
        "metadata": _described(_META, "Standard object's metadata. More info: https://git.k8s.io/community/"
                               "contributors/devel/sig-architecture/api-conventions.md#metadata"),
    }  # fmt: skip
    found["x-kubernetes-group-version-kind"] = [_identity(info, info.kind)]
    return found


def _published(written: Any) -> Any:
    """A schema without what only the server uses."""
    if isinstance(written, Mapping):
        return {name: _published(item) for name, item in written.items() if name != "x-kubernetes-validations"}
    return [_published(item) for item in written] if isinstance(written, list) else written


def _list_schema(info: ResourceInfo, name: str) -> Schema:
    meta = _data()["schemas"]["io.k8s.api.core.v1.ConfigMap"]["properties"]
    return {
        "description": f"{info.list_kind} is a list of {info.kind}",
        "type": "object",
        "required": ["items"],
        "properties": {
            "apiVersion": meta["apiVersion"],
            "items": {"description": f"List of {info.plural}.", "type": "array", "items": _reference(name)},
            "kind": meta["kind"],
            "metadata": _described(_LIST_META, "Standard list metadata."),
        },
        "x-kubernetes-group-version-kind": [_identity(info, info.list_kind)],
    }


def _parameter(name: str, description: str) -> Schema:
    schema = {"type": "string", "uniqueItems": True}
    return {"name": name, "in": "query", "description": description, "schema": schema}


_WRITE_PARAMETERS: Final = [
    _parameter("dryRun", "All: every stage is processed but nothing is stored."),
    _parameter("fieldManager", "Name of the actor that makes these changes."),
    _parameter("fieldValidation", "What to do about unknown or duplicate fields: Ignore, Warn or Strict."),
]


def _operation(info: ResourceInfo, verb: str, action: str, schema: Schema, *, custom: bool) -> Schema:
    found: Schema = {
        "operationId": f"{action}{''.join(part.title() for part in info.group.split('.'))}{info.version.title()}"
        f"{'Namespaced' if info.namespaced else ''}{info.kind}",
        "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": schema}}}},
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": _identity(info, info.kind),
    }
    if verb in _WRITES:
        found["parameters"] = list(_WRITE_PARAMETERS)
        if verb == "patch":
            found["parameters"].append(_parameter("force", "Apply: take fields over from other managers."))
        # kubectl looks here for whether it may send a strategic merge patch: custom resources do not take any.
        bodies = [media for media in _BODIES[verb] if not custom or media != patches.STRATEGIC_PATCH]
        found["requestBody"] = {"content": {media: {"schema": schema} for media in bodies}, "required": True}
    return found


def _paths(info: ResourceInfo, schema: Schema, listed: Schema, *, custom: bool) -> dict[str, Schema]:
    base = _base(info.group, info.version)
    collection = f"{base}/namespaces/{{namespace}}/{info.plural}" if info.namespaced else f"{base}/{info.plural}"
    named = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    within = [{"name": "namespace", "in": "path", "required": True, "schema": {"type": "string"}}]
    within = within if info.namespaced else []
    found: dict[str, Schema] = {}
    for verb, (method, action, single) in _METHODS.items():
        if verb in info.verbs:
            path = f"{collection}/{{name}}" if single else collection
            item = found.setdefault(path, {"parameters": [*(named if single else ()), *within]})
            item[method] = _operation(info, verb, action, listed if verb == "list" else schema, custom=custom)
    if info.namespaced and "list" in info.verbs:
        found[f"{base}/{info.plural}"] = {"get": _operation(info, "list", "list", listed, custom=custom)}
    if "status" in info.subresources:
        found[f"{collection}/{{name}}/status"] = {
            "parameters": [*named, *within],
            **{
                method: _operation(info, verb, method, schema, custom=custom)
                for verb, method in (("get", "get"), ("update", "put"), ("patch", "patch"))
            },
        }
    return found


def _render(registry: Registry, group: str, version: str) -> bytes:
    schemas: dict[str, Schema] = {}
    paths: dict[str, Schema] = {}
    kinds = _data()["kinds"]
    for info in registry.resources(group, version):
        definition = registry.definition(info)
        name = kinds.get(f"{group}/{version}/{info.kind}")
        if definition is None and name is not None:
            schemas[name] = _data()["schemas"][name]
        else:
            name = _custom_name(info)
            schemas[name] = _custom_schema(info, definition or {})
        list_name = kinds.get(f"{group}/{version}/{info.list_kind}")
        if list_name is not None:
            schemas[list_name] = _data()["schemas"][list_name]
        elif "list" in info.verbs:
            list_name = f"{name}List"
            schemas[list_name] = _list_schema(info, name)
        custom = definition is not None
        paths.update(_paths(info, _reference(name), _reference(list_name or name), custom=custom))
    found = {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "1.36"},
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": _with_references(schemas)},
    }
    return json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()


def _tag(registry: Registry, group: str, version: str) -> str:
    """A hash that changes when the document does, without rendering it."""
    parts = [f"{group}/{version}".encode()]
    custom = False
    for info in registry.resources(group, version):
        definition = registry.definition(info)
        parts.append(repr(info).encode())
        if definition is not None:
            custom = True
            parts.append(json.dumps(definition.get("schema"), sort_keys=True).encode())
    return _hash(*parts, b"" if custom else _content())


def index(registry: Registry) -> tuple[bytes, str, str | None]:
    """``/openapi/v3``: where the document of each group version is. Content, Content-Type, entity tag."""
    paths = {}
    for group, versions in registry.groups().items():
        for version in versions:
            key = _base(group, version).removeprefix("/")
            paths[key] = {"serverRelativeURL": f"/openapi/v3/{key}?hash={_tag(registry, group, version)}"}
    content = json.dumps({"paths": dict(sorted(paths.items()))}, separators=(",", ":")).encode()
    return content, "application/json", _hash(content)


def document(registry: Registry, group_version: str) -> tuple[bytes, str, str] | None:
    """``/openapi/v3/<group_version>`` (``api/v1``, ``apis/apps/v1``); None for what is not served."""
    parts = group_version.split("/")
    match parts:
        case ["api", version]:
            group = ""
        case ["apis", group, version]:
            pass
        case _:
            return None
    if version not in registry.groups().get(group, ()):
        return None
    tag = _tag(registry, group, version)
    return _rendered(registry, group, version, tag), "application/json", tag


_cache: dict[str, bytes] = {}
_CACHED: Final = 64


def _rendered(registry: Registry, group: str, version: str, tag: str) -> bytes:
    found = _cache.get(tag)
    if found is None:
        while len(_cache) >= _CACHED:
            del _cache[next(iter(_cache))]
        found = _cache[tag] = _render(registry, group, version)
    return found
