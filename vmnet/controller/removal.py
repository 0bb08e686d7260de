"""Takes what the controller has written out of a cluster that it no longer runs in, so that nothing waits for it.

What tenants wrote stays theirs: networks and claims, without the finalizers that nobody would ever clear.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from vmnet.controller import objects
from vmnet.controller.endpoint_slices import is_mirror
from vmnet.kube.api import (
    CLAIMS,
    CUDNS,
    ENDPOINT_SLICES,
    LEASES,
    MUTATING_WEBHOOKS,
    NADS,
    NODES,
    PODS,
    UDNS,
    VALIDATING_WEBHOOKS,
    Kube,
    NotFound,
    Object,
    Resource,
    object_key,
)
from vmnet.model import names
from vmnet.model.removal import Removal

LEASE: Final = "vmnet-controller"
WEBHOOKS: Final = "vmnet-pods"
_FINALIZERS: Final = {
    UDNS: names.NETWORK_PROTECTION_FINALIZER,
    CUDNS: names.NETWORK_PROTECTION_FINALIZER,
    NADS: names.NETWORK_PROTECTION_FINALIZER,
    CLAIMS: names.CLAIM_FINALIZER,
}


async def withdraw(kube: Kube, namespace: str, now: datetime | None = None) -> Removal:
    """``namespace``: where the leader's lease is. Nothing is touched while a controller leads. Raises KubeError."""
    holder = await _leader(kube, namespace, now or datetime.now(UTC))
    if holder:
        return Removal(left=(f"controller {holder} still leads: delete its Deployment first",))
    done, kept = [], []
    for resource in (MUTATING_WEBHOOKS, VALIDATING_WEBHOOKS):
        # Without anybody to ask, machines' pods could not be created.
        if await _delete(kube, resource, WEBHOOKS):
            done.append(f"{resource.kind} {WEBHOOKS} is deleted")
    for resource, finalizer in _FINALIZERS.items():
        items = await _items(kube, resource)
        freed = [item for item in items if await _let_go(kube, resource, item, finalizer)]
        if freed:
            done.append(f"finalizer {finalizer} is taken from {len(freed)} {resource.plural}")
        if items and resource is not NADS:
            kept.append(f"{len(items)} {resource.plural} stay, for they are not ours: {_named(items)}")
    done += await _forget_nodes(kube)
    mirrors = [item for item in await _items(kube, ENDPOINT_SLICES) if is_mirror(item)]
    for item in mirrors:
        await _delete(kube, ENDPOINT_SLICES, item["metadata"]["name"], item["metadata"]["namespace"])
    if mirrors:
        done.append(f"{len(mirrors)} mirrored EndpointSlices are deleted")
    attached = [pod for pod in await _items(kube, PODS) if objects.alive(pod) and _on_network(pod)]
    left = (f"{len(attached)} pods are on networks of their own until they are made anew: {_named(attached)}",)
    return Removal(tuple(done), left if attached else (), tuple(kept))


async def _leader(kube: Kube, namespace: str, now: datetime) -> str:
    try:
        spec = (await kube.get(LEASES, LEASE, namespace)).get("spec") or {}
        renewed = datetime.fromisoformat(str(spec.get("renewTime")))
    except (NotFound, ValueError):
        return ""
    alive = renewed + timedelta(seconds=int(spec.get("leaseDurationSeconds") or 0)) > now
    return str(spec.get("holderIdentity") or "") if alive else ""


async def _items(kube: Kube, resource: Resource) -> list[Object]:
    try:
        return list((await kube.list(resource)).items)
    except NotFound:
        return []  # its definition is gone, and all of its objects with it


async def _let_go(kube: Kube, resource: Resource, item: Object, finalizer: str) -> bool:
    held = objects.finalizers(item)
    if finalizer not in held:
        return False
    rest = [entry for entry in held if entry != finalizer] or None
    return await _patch(kube, resource, item, {"finalizers": rest})


async def _forget_nodes(kube: Kube) -> list[str]:
    ours = (names.NODE_NUMBER_ANNOTATION, names.NODE_SUBNETS_ANNOTATION)
    numbered = [node for node in await _items(kube, NODES) if objects.annotations(node).keys() & set(ours)]
    for node in numbered:
        await _patch(kube, NODES, node, {"annotations": dict.fromkeys(ours)})
    return [f"numbers and parts of {len(numbered)} nodes are forgotten"] if numbered else []


async def _patch(kube: Kube, resource: Resource, item: Object, change: dict[str, Any]) -> bool:
    metadata = item["metadata"]
    body = {"metadata": {"resourceVersion": metadata["resourceVersion"], **change}}
    try:
        await kube.patch(resource, metadata["name"], body, metadata.get("namespace"))
    except NotFound:
        return False
    return True


async def _delete(kube: Kube, resource: Resource, name: str, namespace: str | None = None) -> bool:
    try:
        await kube.delete(resource, name, namespace)
    except NotFound:
        return False
    return True


def _on_network(pod: Object) -> bool:
    try:
        return any("/" in key for key in objects.pod_networks(pod))
    except ValueError:
        return False


def _named(items: Iterable[Object]) -> str:
    return objects.shortened(sorted(object_key(item) for item in items))
