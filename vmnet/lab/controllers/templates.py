"""Pods and revisions from pod templates. Pure."""

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from vmnet.kube.api import Object, Resource
from vmnet.lab.controllers.cluster import owner_reference

_ALPHABET: Final = "bcdfghjklmnpqrstvwxz2456789"
HASH_LABEL: Final = "pod-template-hash"
REVISION_LABEL: Final = "controller-revision-hash"


def template_hash(template: Mapping[str, Any]) -> str:
    """Ten characters that change when the template does; labels that a controller added do not count."""
    clean = copy.deepcopy(dict(template))
    labels = (clean.get("metadata") or {}).get("labels") or {}
    labels.pop(HASH_LABEL, None)
    number = int.from_bytes(hashlib.sha256(json.dumps(clean, sort_keys=True).encode()).digest()[:8])
    letters = []
    for _ in range(10):
        number, rest = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[rest])
    return "".join(letters)


def pod_from(template: Mapping[str, Any], parent: Object, resource: Resource) -> Object:
    """A pod (named by ``generateName``) that ``parent`` controls."""
    written = template.get("metadata") or {}
    metadata: Object = {
        "generateName": f"{parent['metadata']['name']}-",
        "namespace": parent["metadata"]["namespace"],
        "labels": dict(written.get("labels") or {}),
        "ownerReferences": [owner_reference(parent, resource)],
    }
    for name in ("annotations", "finalizers"):
        if written.get(name):
            metadata[name] = copy.deepcopy(written[name])
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": copy.deepcopy(template["spec"])}


def scaled(value: int | str, total: int, *, up: bool) -> int:
    """A number, or a percentage of ``total`` rounded up or down."""
    if isinstance(value, int):
        return value
    share = total * int(value.rstrip("%"))
    return -(-share // 100) if up else share // 100
