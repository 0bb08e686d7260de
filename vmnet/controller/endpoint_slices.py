"""EndpointSlices with the network's addresses, mirrored from those that tell of the default network's.

A pod on a user-defined network cannot be reached by the address that Kubernetes knows it by. Every EndpointSlice of a
Service in such a namespace gets a mirror that only the agents read: it lacks the label by which kube-proxy would.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

from vmnet.controller import objects
from vmnet.controller.cluster import Attachment, Cluster
from vmnet.kube.api import ENDPOINT_SLICES, PODS, AlreadyExists, Kube, NotFound, Object, object_key
from vmnet.model import addresses, names

log = logging.getLogger(__name__)

SERVICE_LABEL: Final = "kubernetes.io/service-name"
MANAGED_BY_LABEL: Final = "endpointslice.kubernetes.io/managed-by"
_FAMILY: Final = {"IPv4": 4, "IPv6": 6}
_OURS: Final = {SERVICE_LABEL, MANAGED_BY_LABEL, names.MIRRORED_SERVICE_LABEL}


def is_mirror(item: Object) -> bool:
    """Whether this controller made the slice, whatever somebody has done to its labels or annotations since."""
    return (
        objects.labels(item).get(MANAGED_BY_LABEL) == names.MIRROR_CONTROLLER
        or names.SOURCE_SLICE_ANNOTATION in objects.annotations(item)
        or _owner(item) is not None
    )


def service_of(item: Object) -> str:
    """The Service that a slice, mirrored or not, belongs to; empty for a slice of nobody's."""
    labels = objects.labels(item)
    return str(labels.get(names.MIRRORED_SERVICE_LABEL) or labels.get(SERVICE_LABEL) or "")


def source_key(mirror: Object) -> str:
    """Key of the slice that a mirror shows: its owner, which nobody edits by mistake."""
    name = _owner(mirror) or objects.annotations(mirror).get(names.SOURCE_SLICE_ANNOTATION, "")
    return f"{objects.namespace_of(mirror)}/{name}"


def _owner(item: Object) -> str | None:
    """Name of the slice that a slice belongs to: only mirrors belong to one."""
    owners = item["metadata"].get("ownerReferences") or []
    return next((str(owner["name"]) for owner in owners if owner.get("kind") == ENDPOINT_SLICES.kind), None)


def mirror_name(source: Object) -> str:
    """``<service>-<12 hex digits of SHA-256 of the source's name>``; a name can have 253 characters."""
    digest = hashlib.sha256(str(source["metadata"]["name"]).encode()).hexdigest()[:12]
    return f"{service_of(source)}-{digest}"


def mirrored(source: Object, attachment: Attachment, pods: Mapping[str, Object]) -> Object:
    """The mirror of a slice. ``pods``: by ``<namespace>/<name>``.

    A pod without an address of the slice's family on the network is left out, and so is an endpoint that is no pod
    and not in the network. Both pods of a migrating machine have one address: one endpoint, ready if either is.
    """
    family = _FAMILY.get(str(source.get("addressType")), 0)
    found: dict[str, dict[str, Any]] = {}
    for endpoint in source.get("endpoints") or []:
        for address in _addresses(endpoint, source, attachment, pods, family):
            before = found.get(address)
            if before is None or (_ready(endpoint) and not _ready(before)):
                found[address] = {**copy.deepcopy(endpoint), "addresses": [address]}
    metadata = source["metadata"]
    labels = {key: value for key, value in objects.labels(source).items() if key not in _OURS}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": mirror_name(source),
            "namespace": metadata["namespace"],
            "labels": {
                **labels,
                MANAGED_BY_LABEL: names.MIRROR_CONTROLLER,
                names.MIRRORED_SERVICE_LABEL: service_of(source),
            },
            "annotations": {
                names.SOURCE_SLICE_ANNOTATION: metadata["name"],
                names.SLICE_NETWORK_ANNOTATION: attachment.network.name,
            },
            "ownerReferences": [
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "name": metadata["name"],
                    "uid": metadata["uid"],
                    "controller": True,
                }
            ],
        },
        "addressType": source["addressType"],
        "endpoints": [found[address] for address in sorted(found)],
        "ports": copy.deepcopy(source.get("ports") or []),
    }


class EndpointSliceReconciler:
    """Keyed by ``<namespace>/<name>`` of the slice that is mirrored."""

    def __init__(self, kube: Kube, cluster: Cluster) -> None:
        self._kube = kube
        self._cluster = cluster

    async def reconcile(self, key: str) -> float | None:
        """Bring the mirror of one slice in step, or take it away."""
        source = self._cluster.get(ENDPOINT_SLICES, key)
        namespace = key.partition("/")[0]
        attachment = self._cluster.primary(namespace) if source is not None and service_of(source) else None
        wanted = None
        if source is not None and attachment is not None and not is_mirror(source) and not objects.deleting(source):
            pods = {object_key(pod): pod for pod in self._cluster.pods(namespace)}
            wanted = mirrored(source, attachment, pods)
        present = [item for item in self._cluster.slices(namespace) if is_mirror(item) and source_key(item) == key]
        for item in present:
            if wanted is None or item["metadata"]["name"] != wanted["metadata"]["name"]:
                await self._delete(item)
        if wanted is not None:
            held = self._cluster.get(ENDPOINT_SLICES, f"{namespace}/{wanted['metadata']['name']}")
            await self._write(wanted, held)
        return None

    async def _write(self, wanted: Object, held: Object | None) -> None:
        namespace = wanted["metadata"]["namespace"]
        if held is None:
            try:
                await self._kube.create(ENDPOINT_SLICES, wanted, namespace)
            except AlreadyExists:
                log.debug("%s was made before this watch saw it", object_key(wanted))
            return
        if held.get("addressType") != wanted["addressType"]:
            # Immutable; the deletion brings the key back.
            await self._delete(held)
        elif not _shows(held, wanted):
            version = held["metadata"]["resourceVersion"]
            await self._kube.replace(
                ENDPOINT_SLICES, {**wanted, "metadata": {**wanted["metadata"], "resourceVersion": version}}
            )

    async def _delete(self, item: Object) -> None:
        metadata = item["metadata"]
        try:
            await self._kube.delete(ENDPOINT_SLICES, metadata["name"], metadata["namespace"], uid=metadata["uid"])
        except NotFound:
            log.debug("%s is gone already", object_key(item))


def _addresses(
    endpoint: Mapping[str, Any], source: Object, attachment: Attachment, pods: Mapping[str, Object], family: int
) -> Iterable[str]:
    """The network's addresses of one endpoint, of the slice's family."""
    reference = endpoint.get("targetRef") or {}
    if reference.get("kind") == PODS.kind:
        pod = pods.get(f"{reference.get('namespace') or objects.namespace_of(source)}/{reference.get('name')}")
        if pod is None or objects.host_network(pod):
            return
        try:
            allocated = objects.allocated(pod, attachment.key)
        except (ValueError, json.JSONDecodeError) as error:
            log.warning("pod %s is left out of %s: %s", object_key(pod), object_key(source), error)
            return
        yield from (str(item.ip) for item in (allocated.addresses if allocated else ()) if item.version == family)
        return
    for text in endpoint.get("addresses") or []:
        try:
            address = addresses.address(text)
        except ValueError:
            continue
        if address.version == family and any(address in subnet for subnet in attachment.network.subnets):
            yield str(address)


def _ready(endpoint: Mapping[str, Any]) -> bool:
    """Absent means ready (discovery.k8s.io/v1, EndpointConditions)."""
    return (endpoint.get("conditions") or {}).get("ready") is not False


def _shows(held: Object, wanted: Object) -> bool:
    """Whether what is there says what is wanted; annotations that others add may stay, labels not: they select."""
    if objects.labels(held) != wanted["metadata"]["labels"]:
        return False
    present = objects.annotations(held)
    if any(present.get(key) != value for key, value in wanted["metadata"]["annotations"].items()):
        return False
    owners = [item.get("uid") for item in held["metadata"].get("ownerReferences") or []]
    if owners != [item["uid"] for item in wanted["metadata"]["ownerReferences"]]:
        return False
    return all((held.get(part) or []) == wanted[part] for part in ("endpoints", "ports"))
