"""What the stand-ins watch, and lookups over it."""

from collections.abc import Iterable, Mapping
from typing import Final

from vmnet.kube.api import (
    ENDPOINT_SLICES,
    NAMESPACES,
    NODES,
    PODS,
    SERVICES,
    Informer,
    Object,
    Resource,
)
from vmnet.kube.conditions import find_condition

SERVICE_ACCOUNTS: Final = Resource("", "v1", "serviceaccounts", "ServiceAccount")
DEPLOYMENTS: Final = Resource("apps", "v1", "deployments", "Deployment")
REPLICA_SETS: Final = Resource("apps", "v1", "replicasets", "ReplicaSet")
STATEFUL_SETS: Final = Resource("apps", "v1", "statefulsets", "StatefulSet")
WATCHED: Final = (
    *(NODES, PODS, NAMESPACES, SERVICES, ENDPOINT_SLICES),
    *(SERVICE_ACCOUNTS, DEPLOYMENTS, REPLICA_SETS, STATEFUL_SETS),
)

Informers = Mapping[Resource, Informer]


def in_namespace(items: Iterable[Object], namespace: str) -> list[Object]:
    """Those of one namespace."""
    return [item for item in items if item["metadata"].get("namespace") == namespace]


def owner(item: Object, kind: str) -> Object | None:
    """The owner reference of its controller, if that is of ``kind``."""
    for reference in item["metadata"].get("ownerReferences") or ():
        if reference.get("controller"):
            return reference if reference["kind"] == kind else None
    return None


def owner_key(item: Object, kind: str) -> str | None:
    """``namespace/name`` of its controller of ``kind``."""
    found = owner(item, kind)
    return None if found is None else f"{item['metadata']['namespace']}/{found['name']}"


def owner_reference(item: Object, resource: Resource) -> Object:
    """A reference that makes ``item`` the controller of another object."""
    metadata = item["metadata"]
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def is_terminating(item: Object) -> bool:
    """Whether it is being deleted."""
    return "deletionTimestamp" in item["metadata"]


def is_ready(pod: Object) -> bool:
    """Whether its Ready condition is true."""
    found = find_condition((pod.get("status") or {}).get("conditions"), "Ready")
    return found is not None and found["status"] == "True"
