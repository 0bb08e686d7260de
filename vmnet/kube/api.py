"""What the product needs of the Kubernetes API. ``client`` is the real one, ``fake`` the stateful stand-in for tests.

Objects are plain JSON dicts: typed models are slow and raise on sparse objects.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

Object = dict[str, Any]
"""One Kubernetes object, as JSON."""


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind in one version. ``group`` is empty for core kinds."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """``group/version``, or ``version`` for core kinds."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """URL path, e.g. ``/api/v1/namespaces/red/pods/red-0/status``."""
        parts = ["", "apis", self.group, self.version] if self.group else ["", "api", self.version]
        if namespace and self.namespaced:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part]
        return "/".join(parts)


PODS = Resource("", "v1", "pods", "Pod")
NODES = Resource("", "v1", "nodes", "Node", namespaced=False)
NAMESPACES = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
EVENTS = Resource("", "v1", "events", "Event")
SECRETS = Resource("", "v1", "secrets", "Secret")
SERVICES = Resource("", "v1", "services", "Service")
POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")
SERVICE_CIDRS = Resource("networking.k8s.io", "v1", "servicecidrs", "ServiceCIDR", namespaced=False)
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")
ENDPOINT_SLICES = Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice")
UDNS = Resource("k8s.ovn.org", "v1", "userdefinednetworks", "UserDefinedNetwork")
CUDNS = Resource("k8s.ovn.org", "v1", "clusteruserdefinednetworks", "ClusterUserDefinedNetwork", namespaced=False)
NADS = Resource("k8s.cni.cncf.io", "v1", "network-attachment-definitions", "NetworkAttachmentDefinition")
CLAIMS = Resource("k8s.cni.cncf.io", "v1alpha1", "ipamclaims", "IPAMClaim")
CERTIFICATE_REQUESTS = Resource(
    "certificates.k8s.io", "v1", "certificatesigningrequests", "CertificateSigningRequest", namespaced=False
)
MUTATING_WEBHOOKS = Resource(
    "admissionregistration.k8s.io",
    "v1",
    "mutatingwebhookconfigurations",
    "MutatingWebhookConfiguration",
    namespaced=False,
)
VALIDATING_WEBHOOKS = Resource(
    "admissionregistration.k8s.io",
    "v1",
    "validatingwebhookconfigurations",
    "ValidatingWebhookConfiguration",
    namespaced=False,
)
VMS = Resource("kubevirt.io", "v1", "virtualmachines", "VirtualMachine")
VMIS = Resource("kubevirt.io", "v1", "virtualmachineinstances", "VirtualMachineInstance")
VMIMS = Resource("kubevirt.io", "v1", "virtualmachineinstancemigrations", "VirtualMachineInstanceMigration")


class PatchType(StrEnum):
    """Content types of PATCH bodies."""

    JSON = "application/json-patch+json"
    MERGE = "application/merge-patch+json"
    STRATEGIC = "application/strategic-merge-patch+json"
    APPLY = "application/apply-patch+yaml"


class KubeError(Exception):
    """Base: the API answered with an error Status, or did not answer. ``code`` is the HTTP status, 0 without one."""

    code = 0

    def __init__(self, message: str, status: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = dict(status or {})


class Unavailable(KubeError):
    """Retryable: refused, reset, timed out, 429, 5xx."""


class NotFound(KubeError):
    """404."""

    code = 404


class Conflict(KubeError):
    """409: stale resourceVersion or failed precondition. Read again and retry."""

    code = 409


class AlreadyExists(Conflict):
    """409 with reason AlreadyExists."""


class Expired(KubeError):
    """410: the resourceVersion or continue token is too old. List again."""

    code = 410


class Invalid(KubeError):
    """400 or 422: the object is wrong; ``status.details.causes`` name the fields. Terminal."""

    code = 422


class Forbidden(KubeError):
    """401 or 403. Terminal until an administrator acts."""

    code = 403


@dataclass(frozen=True, slots=True)
class ObjectList:
    """One complete list (all pages)."""

    items: tuple[Object, ...]
    resource_version: str


class EventType(StrEnum):
    """Types of watch events that reach the caller (ERROR is raised, BOOKMARK carries only metadata)."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One event of a watch stream."""

    type: EventType
    object: Object


class Kube(Protocol):
    """The API. Every call has its own timeout and raises only ``KubeError``s (and CancelledError)."""

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        """One object."""
        ...

    async def list(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> ObjectList:
        """All objects, paged underneath; ``labels`` / ``fields`` are selectors."""
        ...

    async def create(self, resource: Resource, body: Object, namespace: str | None = None) -> Object:
        """POST. Raises AlreadyExists."""
        ...

    async def replace(self, resource: Resource, body: Object, *, subresource: str | None = None) -> Object:
        """PUT of ``body`` at its own name and namespace; its resourceVersion makes it conditional."""
        ...

    async def patch(
        self,
        resource: Resource,
        name: str,
        body: object,
        namespace: str | None = None,
        *,
        type: PatchType = PatchType.MERGE,
        subresource: str | None = None,
        field_manager: str | None = None,
        force: bool = False,
    ) -> Object:
        """PATCH; ``body`` is JSON-serializable. APPLY needs ``field_manager``; ``force`` takes over conflicts."""
        ...

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        uid: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        """DELETE, with ``uid`` as precondition. Raises NotFound."""
        ...

    def watch(
        self,
        resource: Resource,
        resource_version: str,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
    ) -> AsyncIterator[WatchEvent]:
        """One watch connection from ``resource_version`` on; ends at the server's EOF; raises Expired, Unavailable."""
        ...

    async def close(self) -> None:
        """Give up all connections."""
        ...


Handler = Callable[[Object | None, Object | None], None]
"""Called with (old, new) when an informer's store changes: (None, new) added, (old, None) deleted. Must not block."""


def object_key(item: Object) -> str:
    """``namespace/name``, or ``name`` for cluster-scoped objects."""
    metadata = item["metadata"]
    namespace = metadata.get("namespace")
    return f"{namespace}/{metadata['name']}" if namespace else str(metadata["name"])


class Informer(Protocol):
    """A list-watch that keeps a store current for ever (``vmnet.kube.watch.ListWatch``)."""

    resource: Resource
    synced: asyncio.Event
    """Set once the first list is in the store and its handlers have run."""
    failure: KubeError | None
    """Why the store may be behind; None while a watch is healthy."""

    def add_handler(self, handler: Handler) -> None:
        """Call ``handler`` on every change; objects already in the store are delivered at once."""
        ...

    def get(self, key: str) -> Object | None:
        """From the store, by ``object_key``. Do not change it."""
        ...

    def items(self) -> Iterable[Object]:
        """All objects of the store. Do not change them."""
        ...

    async def run(self) -> None:
        """List, watch, recover, until cancelled."""
        ...
