"""Shapes: what patches, field ownership and decoding need to know of a kind's schema.

Built-in kinds take theirs from ``builtin_types.json`` (the OpenAPI v3 documents of kube-apiserver 1.36 without their
prose) and ``policy_types.json`` (roles, webhooks, admission policies, certificate requests, in the same form); custom
resources from the CRD's schema. A kind without one is shapeless: its maps are merged, its lists replaced.
"""

import dataclasses
import functools
import importlib.resources
import json
from dataclasses import dataclass, field
from typing import Any, Final

from vmnet.lab.apiserver import events
from vmnet.lab.apiserver.resources import Registry, ResourceInfo

META: Final = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_FREE_FORM: Final = frozenset(
    {
        "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1",
        "io.k8s.apimachinery.pkg.runtime.RawExtension",
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON",
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrBool",
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrArray",
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrStringArray",
    }
)


@dataclass(slots=True, eq=False)
class Shape:
    """One node of a schema. ``type``: ``object``, ``array``, ``any`` or a scalar type of JSON schema."""

    type: str = "any"
    go_name: str = ""
    """Name of the Go struct, as decoding errors show it; empty for custom resources."""
    format: str = ""
    properties: "dict[str, Shape]" = field(default_factory=dict)
    values: "Shape | None" = None
    """Of a map: the shape of its values."""
    items: "Shape | None" = None
    """Of a list: the shape of its elements."""
    required: frozenset[str] = frozenset()
    list_type: str = "atomic"
    """``atomic``, ``set`` or ``map``."""
    keys: tuple[str, ...] = ()
    """Of a list of type ``map``: the fields that identify an element."""
    merge_key: str = ""
    """Strategic merge: the field that identifies an element; empty with ``merge`` for sets."""
    strategies: frozenset[str] = frozenset()
    """Strategic merge: ``merge``, ``replace``, ``retainKeys``."""
    atomic: bool = False
    """Of a map: owned as a whole."""
    open: bool = False
    """Unknown fields are kept and are not an error."""
    default: Any = None
    has_default: bool = False

    def child(self, name: str) -> "Shape":
        """The shape of a field or map value; shapeless where unknown."""
        return self.properties.get(name) or self.values or ANY

    def knows(self, name: str) -> bool:
        """Whether a field is declared (or may be anything)."""
        return name in self.properties or self.values is not None or self.open or self.type == "any"


ANY: Final = Shape()
"""Shapeless."""


@functools.cache
def _builtin() -> dict[str, Any]:
    found: dict[str, Any] = {"definitions": {}, "kinds": {}}
    for name in ("builtin_types.json", "policy_types.json"):
        read = json.loads(importlib.resources.files("vmnet.lab.apiserver").joinpath(name).read_text())
        for part, items in read.items():
            found[part] |= items
    return found


@functools.cache
def _definition(name: str) -> Shape:
    # The cache must hold the shape before its fields are read: JSONSchemaProps contains itself.
    shape = Shape()
    _definitions[name] = shape
    if name not in _FREE_FORM:
        _fill(shape, _builtin()["definitions"][name])
    shape.go_name = name.rsplit(".", 1)[1]
    return shape


_definitions: dict[str, Shape] = {}


def _resolve(schema: dict[str, Any]) -> Shape:
    reference = schema.get("$ref")
    if reference is None:
        shape = Shape()
        _fill(shape, schema)
        return shape
    base = _definitions.get(reference) or _definition(reference)
    decorations = {key for key in schema if key.startswith("x-kubernetes-")} | ({"default"} & schema.keys())
    if not decorations:
        return base
    shape = dataclasses.replace(base)
    _decorate(shape, schema)
    return shape


def _decorate(shape: Shape, schema: dict[str, Any]) -> None:
    strategy = schema.get("x-kubernetes-patch-strategy")
    if strategy:
        shape.strategies = frozenset(strategy.split(","))
    shape.merge_key = schema.get("x-kubernetes-patch-merge-key", shape.merge_key)
    list_type = schema.get("x-kubernetes-list-type")
    if list_type:
        shape.list_type = list_type
        shape.keys = tuple(schema.get("x-kubernetes-list-map-keys") or ())
    elif "merge" in shape.strategies and shape.type == "array":
        shape.list_type = "map" if shape.merge_key else "set"
        shape.keys = (shape.merge_key,) if shape.merge_key else ()
    if schema.get("x-kubernetes-map-type"):
        shape.atomic = schema["x-kubernetes-map-type"] == "atomic"
    if "default" in schema:
        shape.default, shape.has_default = schema["default"], True


def _fill(shape: Shape, schema: dict[str, Any]) -> None:
    if schema.get("x-any") or schema.get("x-kubernetes-int-or-string"):
        shape.type, shape.format = "any", schema.get("format", "int-or-string")
    else:
        shape.type = schema.get("type", "any")
        shape.format = schema.get("format", "")
    shape.required = frozenset(schema.get("required") or ())
    shape.open = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    if shape.type == "any" and schema.get("properties"):
        shape.type = "object"
    for name, child in (schema.get("properties") or {}).items():
        shape.properties[name] = _resolve(child)
    if schema.get("x-kubernetes-embedded-resource"):
        shape.properties = {
            **shape.properties,
            "apiVersion": Shape("string"),
            "kind": Shape("string"),
            "metadata": meta(),
        }
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        shape.values = _resolve(extra)
    elif extra:
        shape.values = ANY
    if "items" in schema:
        shape.items = _resolve(schema["items"])
    if shape.type == "object" and not shape.properties and shape.values is None:
        shape.open = True
    _decorate(shape, schema)


def meta() -> Shape:
    """The shape of ``metadata``."""
    return _definitions.get(META) or _definition(META)


@functools.cache
def builtin(group: str, version: str, kind: str) -> Shape | None:
    """The shape of a built-in kind, if its schema is known."""
    if group == "events.k8s.io" and kind == "Event":
        return _new_event(builtin("", "v1", kind))
    name = _builtin()["kinds"].get(f"{group}/{version}/{kind}")
    return _definition(name) if name else None


def _new_event(core: Shape | None) -> Shape | None:
    if core is None:
        return None
    properties = {events.renamed(name): child for name, child in core.properties.items()}
    return dataclasses.replace(core, properties=properties, required=frozenset())


def custom(definition: dict[str, Any]) -> Shape:
    """The shape of a custom resource, from its entry of ``spec.versions``."""
    schema = (definition.get("schema") or {}).get("openAPIV3Schema") or {
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": True,
    }
    shape = Shape()
    _fill(shape, schema)
    shape.type = "object"
    shape.properties = {
        **shape.properties,
        "apiVersion": Shape("string"),
        "kind": Shape("string"),
        "metadata": meta(),
    }
    return shape


class Shapes:
    """The shapes of everything a registry serves; those of custom resources are kept until the registry changes."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._custom: dict[tuple[str, str, str], Shape] = {}
        registry.observe(self._custom.clear)

    def of(self, info: ResourceInfo) -> Shape:
        """The shape of a resource's objects."""
        definition = self._registry.definition(info)
        if definition is None:
            return builtin(info.group, info.version, info.kind) or _SHAPELESS
        key = (info.group, info.version, info.plural)
        found = self._custom.get(key)
        if found is None:
            found = self._custom[key] = custom(definition)
        return found


_SHAPELESS: Final = Shape(
    "object",
    open=True,
    properties={"apiVersion": Shape("string"), "kind": Shape("string"), "metadata": meta()},
)


_ZERO_VALUES: Final[dict[str, dict[str, Any]]] = {
    "Event": {
        "eventTime": None,
        "firstTimestamp": None,
        "lastTimestamp": None,
        "reportingComponent": "",
        "reportingInstance": "",
        "deprecatedFirstTimestamp": None,
        "deprecatedLastTimestamp": None,
    }
}
"""Fields that Go always writes although they are neither structs nor needed."""


def empty(shape: Shape) -> dict[str, Any]:
    """The zero value of a built-in kind as its Go type serializes it: structs are there, needed lists null."""
    found: dict[str, Any] = {name: None for name in shape.required if shape.child(name).type == "array"}
    found |= _ZERO_VALUES.get(shape.go_name, {})
    for name, child in shape.properties.items():
        if child.has_default and child.default == {} and child.type == "object" and child.properties:
            found[name] = empty(child)
    return found
