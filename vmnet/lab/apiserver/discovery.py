"""Discovery documents: which groups, versions and resources there are, as one aggregated document or one per group."""

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

from vmnet.lab.apiserver.resources import BUILTIN, Registry, ResourceInfo, subresource

JSON: Final = "application/json"
_AGGREGATED: Final = "application/json;g=apidiscovery.k8s.io;v={};as=APIGroupDiscoveryList"
_BUILTIN_GROUPS: Final = frozenset(info.group for info in BUILTIN)

Document = tuple[bytes, str, str | None]
"""Content, Content-Type and entity tag (without quotes; None where the server sends none)."""


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _wants_aggregated(accept: str) -> str | None:
    """The version of the aggregated document asked for, if it is."""
    for clause in accept.split(","):
        media, *pairs = (part.strip() for part in clause.split(";"))
        parameters = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if media != JSON:
            continue
        if parameters.get("as") == "APIGroupDiscoveryList" and parameters.get("v") in ("v2", "v2beta1"):
            return parameters["v"]
        if "as" not in parameters:
            return None
    return None


def _is_custom(info: ResourceInfo) -> bool:
    return info.group not in _BUILTIN_GROUPS


def _aggregated_resource(info: ResourceInfo) -> dict[str, Any]:
    own = {"group": info.group, "version": info.version} if _is_custom(info) else {"group": "", "version": ""}
    found: dict[str, Any] = {
        "resource": info.plural,
        "responseKind": {**own, "kind": info.kind},
        "scope": "Namespaced" if info.namespaced else "Cluster",
        "singularResource": info.singular,
        "verbs": list(info.verbs),
    }
    if info.short_names:
        found["shortNames"] = list(info.short_names)
    if info.categories:
        found["categories"] = list(info.categories)
    if info.subresources:
        found["subresources"] = [_aggregated_subresource(info, name, own) for name in info.subresources]
    return found


def _aggregated_subresource(info: ResourceInfo, name: str, own: dict[str, str]) -> dict[str, Any]:
    found = subresource(info, name)
    kind = {**own, "kind": found.kind}
    if found.group or found.version:
        kind = {"group": found.group, "version": found.version, "kind": found.kind}
    return {"subresource": name, "responseKind": kind, "verbs": list(found.verbs)}


def _aggregated(registry: Registry, groups: Sequence[str], version: str) -> Document:
    items = []
    served = registry.groups()
    for group in groups:
        versions = [
            {
                "version": name,
                "resources": [_aggregated_resource(info) for info in registry.resources(group, name)],
                "freshness": "Current",
            }
            for name in served[group]
        ]
        items.append({"metadata": {"name": group} if group else {}, "versions": versions})
    content = _encode(
        {
            "kind": "APIGroupDiscoveryList",
            "apiVersion": f"apidiscovery.k8s.io/{version}",
            "metadata": {},
            "items": items,
        }
    )
    return content, _AGGREGATED.format(version), hashlib.sha512(content).hexdigest().upper()


def core_document(registry: Registry, accept: str) -> Document:
    """``/api``."""
    version = _wants_aggregated(accept)
    if version is not None:
        return _aggregated(registry, [""], version)
    addresses = [{"clientCIDR": "0.0.0.0/0", "serverAddress": ""}]
    return _encode({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": addresses}), JSON, None


def _group(name: str, versions: Sequence[str]) -> dict[str, Any]:
    listed = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def groups_document(registry: Registry, accept: str) -> Document:
    """``/apis``."""
    groups = {name: versions for name, versions in registry.groups().items() if name}
    version = _wants_aggregated(accept)
    if version is not None:
        return _aggregated(registry, list(groups), version)
    listed = [_group(name, versions) for name, versions in groups.items()]
    return _encode({"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}), JSON, None


def group_versions(registry: Registry, group: str, accept: str = "") -> Document:
    """``/apis/<group>``. Raises KeyError for a group that is not served."""
    found = {"kind": "APIGroup", "apiVersion": "v1", **_group(group, registry.groups()[group])}
    return _encode(found), JSON, None


def _storage_hash(info: ResourceInfo) -> str:
    """As the server derives it: clients compare it to notice that objects are stored in another version."""
    digest = hashlib.sha256(f"{info.group}/{info.version}/{info.kind}".encode()).digest()
    return base64.b64encode(digest[:8]).decode()


def _listed(info: ResourceInfo) -> list[dict[str, Any]]:
    own: dict[str, Any] = {
        "name": info.plural,
        "singularName": info.singular,
        "namespaced": info.namespaced,
        "kind": info.kind,
        "verbs": list(info.verbs),
    }
    if info.short_names:
        own["shortNames"] = list(info.short_names)
    if info.categories:
        own["categories"] = list(info.categories)
    if "watch" in info.verbs:
        own["storageVersionHash"] = _storage_hash(info)
    found = [own]
    for name in info.subresources:
        item = subresource(info, name)
        entry: dict[str, Any] = {
            "name": f"{info.plural}/{name}",
            "singularName": "",
            "namespaced": info.namespaced,
        }
        if item.group or item.version:
            entry.update(group=item.group, version=item.version)
        found.append({**entry, "kind": item.kind, "verbs": list(item.verbs)})
    return found


def resource_list(registry: Registry, group: str, version: str, accept: str = "") -> Document:
    """``/api/v1`` and ``/apis/<group>/<version>``."""
    head: dict[str, Any] = {"kind": "APIResourceList"}
    if group:
        head["apiVersion"] = "v1"
    resources = [entry for info in registry.resources(group, version) for entry in _listed(info)]
    head["groupVersion"] = f"{group}/{version}" if group else version
    return _encode({**head, "resources": resources}), JSON, None
