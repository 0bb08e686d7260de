"""CustomResourceDefinitions: what an API server refuses in one, worded as it does.

Checked are names, versions, immutability, structural form, defaults, list keys, CEL rules (names and syntax),
selectable fields and scale paths. Not estimated is what a rule may cost.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vmnet.lab.apiserver import cel, schema
from vmnet.lab.apiserver.status import Cause, duplicate, invalid_value, not_allowed, required, unsupported

_LABEL_1035: Final = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_TYPES: Final = ("array", "boolean", "integer", "number", "object", "string")
_DNS_1035: Final = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    "and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is "
    "'[a-z]([-a-z0-9]*[a-z0-9])?')"
)
_SIMPLE_PATH: Final = re.compile(r"(\.[A-Za-z_][A-Za-z0-9_-]*)+")

Json = Mapping[str, Any]


def validate(crd: Json, old: Json | None = None) -> list[Cause]:
    """Causes that speak against storing ``crd`` (defaults filled in); empty when it is right."""
    spec = crd.get("spec") or {}
    names = spec.get("names") or {}
    name = (crd.get("metadata") or {}).get("name", "")
    found: list[Cause] = []
    if name != f"{names.get('plural', '')}.{spec.get('group', '')}":
        found.append(invalid_value("metadata.name", name, 'must be spec.names.plural+"."+spec.group'))
    found.extend(_spec(spec, names))
    found.extend(_stored(crd, spec))
    if old is not None:
        found.extend(_immutable(spec, old.get("spec") or {}, old.get("status") or {}))
    return found


def _spec(spec: Json, names: Json) -> Iterator[Cause]:
    versions = spec.get("versions") or []
    if not spec.get("group"):
        yield required("spec.group")
    elif "." not in spec["group"]:
        yield invalid_value("spec.group", spec["group"], "should be a domain with at least one dot")
    if not spec.get("scope"):
        yield required("spec.scope")
    elif spec["scope"] not in ("Cluster", "Namespaced"):
        yield unsupported("spec.scope", spec["scope"], ("Cluster", "Namespaced"))
    preserving = bool(spec.get("preserveUnknownFields"))
    seen: set[str] = set()
    for position, version in enumerate(versions):
        where = f"spec.versions[{position}]"
        if version.get("name") in seen:
            yield duplicate(f"{where}.name", version.get("name"))
        seen.add(version.get("name", ""))
        if not _LABEL_1035.fullmatch(version.get("name") or ""):
            yield invalid_value(f"{where}.name", version.get("name") or "", _DNS_1035)
    for position, version in enumerate(versions):
        yield from _version(version, f"spec.versions[{position}]", preserving)
    if sum(1 for version in versions if version.get("storage")) != 1:
        yield invalid_value(
            "spec.versions", versions or None, "must have exactly one version marked as storage version"
        )
    if preserving:
        text = "cannot set to true, set x-kubernetes-preserve-unknown-fields to true in spec.versions[*].schema instead"
        if any('"default":' in json.dumps(version, separators=(",", ":")) for version in versions):
            wrong = "must be false in order to use defaults in the schema"
            yield invalid_value("spec.preserveUnknownFields", True, wrong)
        yield invalid_value("spec.preserveUnknownFields", True, text)
    yield from _names(names)


def _names(names: Json) -> Iterator[Cause]:
    for key in ("plural", "singular", "kind", "listKind"):
        value = names.get(key) or ""
        if not value:
            yield required(f"spec.names.{key}")
        elif not _LABEL_1035.fullmatch(value.lower() if key in ("kind", "listKind") else value):
            text = "may have mixed case, but should otherwise match: " if key in ("kind", "listKind") else ""
            yield invalid_value(f"spec.names.{key}", value, text + _DNS_1035)
    for key in ("shortNames", "categories"):
        for position, value in enumerate(names.get(key) or ()):
            if not _LABEL_1035.fullmatch(value):
                yield invalid_value(f"spec.names.{key}[{position}]", value, _DNS_1035)
    if names.get("kind") and names.get("kind") == names.get("listKind"):
        yield invalid_value("spec.names.listKind", names["listKind"], "kind and listKind may not be the same")


def _stored(crd: Json, spec: Json) -> Iterator[Cause]:
    stored = (crd.get("status") or {}).get("storedVersions")
    known = [version.get("name") for version in spec.get("versions") or ()]
    if not stored:
        if not known:
            yield invalid_value("status.storedVersions", None, "must have at least one stored version")
        return
    for position, name in enumerate(stored):
        if name not in known:
            text = "missing from spec.versions; v1beta1 was previously a storage version, and must remain in "
            text = text.replace("v1beta1", name) + (
                "spec.versions until a storage migration ensures no data remains persisted in "
                f"{name} and removes {name} from status.storedVersions"
            )
            yield invalid_value(f"status.storedVersions[{position}]", name, text)


def _immutable(spec: Json, old: Json, status: Json) -> Iterator[Cause]:
    conditions = status.get("conditions") or ()
    established = any(item["type"] == "Established" and item["status"] == "True" for item in conditions)
    pairs = [("spec.group", spec.get("group"), old.get("group"))]
    names, before = spec.get("names") or {}, old.get("names") or {}
    if established:
        pairs.append(("spec.scope", spec.get("scope"), old.get("scope")))
        pairs.append(("spec.names.kind", names.get("kind"), before.get("kind")))
    pairs.append(("spec.names.plural", names.get("plural"), before.get("plural")))
    for where, value, known in pairs:
        if value != known:
            yield invalid_value(where, value, "field is immutable")


def _version(version: Json, where: str, preserving: bool) -> Iterator[Cause]:
    root = (version.get("schema") or {}).get("openAPIV3Schema")
    path = f"{where}.schema.openAPIV3Schema"
    if not root:
        if not preserving:
            yield required(path)
            if version.get("selectableFields"):
                text = "may only be set when `version.schema.openAPIV3Schema` is not included"
                yield invalid_value(f"{where}.selectableFields", "", text)
        return
    if root.get("type") != "object":
        yield invalid_value(f"{path}.type", root.get("type") or "", 'must be "object" at the root')
    yield from _structural(root, path, root=True)
    for position, item in enumerate(version.get("selectableFields") or ()):
        text = item.get("jsonPath", "")
        if not _names_a_field(root, text):
            message = "is an invalid path: does not refer to a valid field"
            yield invalid_value(f"{where}.selectableFields[{position}].jsonPath", text, message)
    scale = (version.get("subresources") or {}).get("scale")
    if scale is not None:
        yield from _scale(scale, f"{where}.subresources.scale")
    for position, column in enumerate(version.get("additionalPrinterColumns") or ()):
        at = f"{where}.additionalPrinterColumns[{position}]"
        for key in ("name", "type", "jsonPath"):
            if not column.get(key):
                yield required(f"{at}.{key}")
        kinds = ("boolean", "date", "integer", "number", "string")
        if column.get("type") and column["type"] not in kinds:
            text = f"must be one of {','.join(kinds)}"
            yield invalid_value(f"{at}.type", column["type"], text)


def _scale(scale: Json, where: str) -> Iterator[Cause]:
    for key, start in (("specReplicasPath", ".spec."), ("statusReplicasPath", ".status.")):
        text = scale.get(key) or ""
        if not text:
            yield required(f"{where}.{key}")
        elif not _SIMPLE_PATH.fullmatch(text):
            yield invalid_value(f"{where}.{key}", text, "should be a simple json path")
        elif not text.startswith(start):
            yield invalid_value(f"{where}.{key}", text, f"should be a json path under {start.rstrip('.')}")


def _names_a_field(root: Json, text: str) -> bool:
    if not _SIMPLE_PATH.fullmatch(text):
        return False
    found: Any = root
    for part in text.removeprefix(".").split("."):
        found = (found.get("properties") or {}).get(part)
        if found is None:
            return False
    return found.get("type") in ("string", "boolean", "integer")


def _structural(written: Json, path: str, *, root: bool = False) -> Iterator[Cause]:
    kind = written.get("type")
    loose = written.get("x-kubernetes-int-or-string") or written.get("x-kubernetes-preserve-unknown-fields")
    if not kind and not loose:
        place = "specified object fields" if path.endswith("]") else "specified array items"
        yield required(f"{path}.type", f"must not be empty for {place}")
    elif kind and kind not in _TYPES:
        yield unsupported(f"{path}.type", kind, _TYPES)
    if kind and written.get("x-kubernetes-int-or-string"):
        yield not_allowed(f"{path}.type", "type must be empty if x-kubernetes-int-or-string is true")
    if written.get("properties") and written.get("additionalProperties") is not None:
        yield not_allowed(f"{path}.additionalProperties", "additionalProperties and properties are mutual exclusive")
    if written.get("uniqueItems"):
        text = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic"
        yield not_allowed(f"{path}.uniqueItems", text)
    if written.get("pattern"):
        try:
            schema.go_pattern(written["pattern"])
        except ValueError as error:
            text = f"must be a valid regular expression, but isn't: {error}"
            yield invalid_value(f"{path}.pattern", written["pattern"], text)
    yield from _list_type(written, path)
    yield from _rules(written, path)
    if "default" in written and not root:
        yield from _default(written, path)
    for name, child in (written.get("properties") or {}).items():
        yield from _structural(child, f"{path}.properties[{name}]")
    extra = written.get("additionalProperties")
    if isinstance(extra, Mapping):
        yield from _structural(extra, f"{path}.additionalProperties")
    items = written.get("items")
    if isinstance(items, Mapping):
        yield from _structural(items, f"{path}.items")
    elif kind == "array":
        yield required(f"{path}.items", "must be specified")


def _list_type(written: Json, path: str) -> Iterator[Cause]:
    kind, keys = written.get("x-kubernetes-list-type"), written.get("x-kubernetes-list-map-keys")
    if kind is None:
        if keys:
            text = "must be map if x-kubernetes-list-map-keys is non-empty"
            yield invalid_value(f"{path}.x-kubernetes-list-type", "", text)
        return
    if kind not in ("atomic", "set", "map"):
        yield unsupported(f"{path}.x-kubernetes-list-type", kind, ("atomic", "map", "set"))
    if written.get("type") != "array":
        yield invalid_value(
            f"{path}.type", written.get("type") or "", "must be array if x-kubernetes-list-type is specified"
        )
    if kind != "map":
        return
    if not keys:
        text = "must not be empty if x-kubernetes-list-type is map"
        yield required(f"{path}.x-kubernetes-list-map-keys", text)
        return
    items = written.get("items") or {}
    known = items.get("properties") or {}
    if not set(keys) <= known.keys():
        text = "entries must all be names of item properties"
        yield invalid_value(f"{path}.x-kubernetes-list-map-keys", list(keys), text)
        return
    mandatory = items.get("required") or ()
    for name in keys:
        if "default" not in known[name] and name not in mandatory:
            text = "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property"
            yield required(f"{path}.items.properties[{name}].default", text)


def _go_rule(rule: Json) -> str:
    """A rule as the server shows it: Go field names, and JSON that escapes what HTML would take for markup."""
    fields = ("rule", "message", "messageExpression", "reason", "fieldPath", "optionalOldSelf")
    absent = {"reason": None, "optionalOldSelf": None}
    shown = {f"{key[0].upper()}{key[1:]}": rule.get(key, absent.get(key, "")) for key in fields}
    text = json.dumps(shown, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rules(written: Json, path: str) -> Iterator[Cause]:
    for position, rule in enumerate(written.get("x-kubernetes-validations") or ()):
        where = f"{path}.x-kubernetes-validations[{position}]"
        text = rule.get("rule") or ""
        if not text.strip():
            yield required(f"{where}.rule", "rule is not specified")
            continue
        for key in ("rule", "messageExpression"):
            if not rule.get(key):
                continue
            try:
                cel.compiled(rule[key])
            except cel.CompileError as error:
                word = "compilation" if key == "rule" else "messageExpression compilation"
                message = f"Invalid value: {_go_rule(rule)}: {word} failed: {error}"
                yield Cause("FieldValueInvalid", message, f"{where}.{key}")
        reason = rule.get("reason")
        reasons = ("FieldValueRequired", "FieldValueInvalid", "FieldValueForbidden", "FieldValueDuplicate")
        if reason and reason not in reasons:
            yield unsupported(f"{where}.reason", reason, sorted(reasons))


def _default(written: Json, path: str) -> Iterator[Cause]:
    """Errors of a default in its own schema; paths are the schema's, not the object's."""
    try:
        root = schema.Node(type="object", properties={"default": schema.node(written)})
    except (ValueError, cel.CompileError):
        return  # reported where it stands
    holder = {"default": copy.deepcopy(written["default"])}
    check = schema.Structural(root)
    pruned = check.prune(holder)
    if pruned:
        text = f"must not have unknown fields: {', '.join(pruned)}"
        yield invalid_value(f"{path}.default", written["default"], text)
        return
    check.default(holder)
    for cause in check.validate(holder):
        if cause is not schema.NOT_CHECKED:
            yield Cause(cause.reason, cause.message.replace("default in body", "in body"), f"{path}.{cause.field}")
