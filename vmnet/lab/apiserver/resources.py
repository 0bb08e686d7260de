"""Which resources the API serves: the built-in kinds, and a registry that CustomResourceDefinitions and mounts extend.

The table of built-in kinds follows the discovery documents of kube-apiserver 1.36, in their order.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

ALL_VERBS: Final = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
_WITHOUT_COLLECTION: Final = ("create", "delete", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True, slots=True)
class ResourceInfo:
    """One resource in one version. ``group`` is empty for core kinds; ``verbs`` are those of the resource itself."""

    group: str
    version: str
    plural: str
    singular: str
    kind: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ALL_VERBS
    subresources: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        """``group/version``, or ``version`` for core kinds."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def list_kind(self) -> str:
        """Kind of a list of it."""
        return f"{self.kind}List"

    @property
    def qualified_name(self) -> str:
        """``plural.group``, or ``plural`` for core kinds: the resource's name in error messages."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def storage_key(self) -> tuple[str, str]:
        """Versions of one resource share their objects: (group, plural). Both groups with events hold the same ones."""
        return ("" if self.group == "events.k8s.io" else self.group), self.plural


@dataclass(frozen=True, slots=True)
class SubresourceInfo:
    """One subresource. ``group`` and ``version`` are empty where they are those of the parent."""

    name: str
    kind: str
    group: str
    version: str
    verbs: tuple[str, ...]


_READ_WRITE: Final = ("get", "patch", "update")
_PROXY: Final = ("create", "delete", "get", "patch", "update")
_SUBRESOURCES: Final[dict[tuple[str, str], tuple[str, str, str, tuple[str, ...]]]] = {
    # (plural of the parent, or "" for any; subresource) -> kind (empty: the parent's), group, version, verbs
    ("", "status"): ("", "", "", _READ_WRITE),
    ("", "scale"): ("Scale", "autoscaling", "v1", _READ_WRITE),
    ("namespaces", "finalize"): ("", "", "", ("update",)),
    ("nodes", "proxy"): ("NodeProxyOptions", "", "", _PROXY),
    ("pods", "proxy"): ("PodProxyOptions", "", "", _PROXY),
    ("services", "proxy"): ("ServiceProxyOptions", "", "", _PROXY),
    ("pods", "attach"): ("PodAttachOptions", "", "", ("create", "get")),
    ("pods", "exec"): ("PodExecOptions", "", "", ("create", "get")),
    ("pods", "portforward"): ("PodPortForwardOptions", "", "", ("create", "get")),
    ("pods", "log"): ("", "", "", ("get",)),
    ("pods", "binding"): ("Binding", "", "", ("create",)),
    ("pods", "eviction"): ("Eviction", "policy", "v1", ("create",)),
    ("pods", "ephemeralcontainers"): ("", "", "", _READ_WRITE),
    ("pods", "resize"): ("", "", "", _READ_WRITE),
    ("serviceaccounts", "token"): ("TokenRequest", "authentication.k8s.io", "v1", ("create",)),
    ("certificatesigningrequests", "approval"): ("", "", "", _READ_WRITE),
}


def subresource(info: ResourceInfo, name: str) -> SubresourceInfo:
    """Kind and verbs of one of ``info.subresources``; an unknown one (of a mounted API) takes the parent's kind."""
    known = _SUBRESOURCES.get((info.plural, name)) if _is_builtin_group(info.group) else None
    kind, group, version, verbs = known or _SUBRESOURCES.get(("", name)) or ("", "", "", _PROXY)
    return SubresourceInfo(name, kind or info.kind, group, version, verbs)


def _is_builtin_group(group: str) -> bool:
    return "." not in group or group.endswith(".k8s.io")


def _resource(
    group: str,
    version: str,
    plural: str,
    kind: str,
    *,
    namespaced: bool = True,
    short: tuple[str, ...] = (),
    verbs: tuple[str, ...] = ALL_VERBS,
    sub: tuple[str, ...] = (),
    categories: tuple[str, ...] = (),
) -> ResourceInfo:
    return ResourceInfo(group, version, plural, kind.lower(), kind, namespaced, short, verbs, sub, categories)


BUILTIN: Final[tuple[ResourceInfo, ...]] = (
    _resource("", "v1", "bindings", "Binding", verbs=("create",)),
    _resource("", "v1", "componentstatuses", "ComponentStatus", namespaced=False, short=("cs",), verbs=("get", "list")),
    _resource("", "v1", "configmaps", "ConfigMap", short=("cm",)),
    _resource("", "v1", "endpoints", "Endpoints", short=("ep",)),
    _resource("", "v1", "events", "Event", short=("ev",)),
    _resource("", "v1", "limitranges", "LimitRange", short=("limits",)),
    _resource(
        "",
        "v1",
        "namespaces",
        "Namespace",
        namespaced=False,
        short=("ns",),
        verbs=_WITHOUT_COLLECTION,
        sub=("finalize", "status"),
    ),
    _resource("", "v1", "nodes", "Node", namespaced=False, short=("no",), sub=("proxy", "status")),
    _resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", short=("pvc",), sub=("status",)),
    _resource("", "v1", "persistentvolumes", "PersistentVolume", namespaced=False, short=("pv",), sub=("status",)),
    _resource(
        "",
        "v1",
        "pods",
        "Pod",
        short=("po",),
        sub=(
            "attach",
            "binding",
            "ephemeralcontainers",
            "eviction",
            "exec",
            "log",
            "portforward",
            "proxy",
            "resize",
            "status",
        ),
        categories=("all",),
    ),
    _resource("", "v1", "podtemplates", "PodTemplate"),
    _resource(
        "",
        "v1",
        "replicationcontrollers",
        "ReplicationController",
        short=("rc",),
        sub=("scale", "status"),
        categories=("all",),
    ),
    _resource("", "v1", "resourcequotas", "ResourceQuota", short=("quota",), sub=("status",)),
    _resource("", "v1", "secrets", "Secret"),
    _resource("", "v1", "serviceaccounts", "ServiceAccount", short=("sa",), sub=("token",)),
    _resource("", "v1", "services", "Service", short=("svc",), sub=("proxy", "status"), categories=("all",)),
    _resource(
        "apiregistration.k8s.io",
        "v1",
        "apiservices",
        "APIService",
        namespaced=False,
        sub=("status",),
        categories=("api-extensions",),
    ),
    _resource("apps", "v1", "controllerrevisions", "ControllerRevision"),
    _resource("apps", "v1", "daemonsets", "DaemonSet", short=("ds",), sub=("status",), categories=("all",)),
    _resource(
        "apps", "v1", "deployments", "Deployment", short=("deploy",), sub=("scale", "status"), categories=("all",)
    ),
    _resource("apps", "v1", "replicasets", "ReplicaSet", short=("rs",), sub=("scale", "status"), categories=("all",)),
    _resource(
        "apps", "v1", "statefulsets", "StatefulSet", short=("sts",), sub=("scale", "status"), categories=("all",)
    ),
    _resource("events.k8s.io", "v1", "events", "Event", short=("ev",)),
    _resource(
        "authentication.k8s.io", "v1", "selfsubjectreviews", "SelfSubjectReview", namespaced=False, verbs=("create",)
    ),
    _resource("authentication.k8s.io", "v1", "tokenreviews", "TokenReview", namespaced=False, verbs=("create",)),
    _resource("authorization.k8s.io", "v1", "localsubjectaccessreviews", "LocalSubjectAccessReview", verbs=("create",)),
    _resource(
        "authorization.k8s.io",
        "v1",
        "selfsubjectaccessreviews",
        "SelfSubjectAccessReview",
        namespaced=False,
        verbs=("create",),
    ),
    _resource(
        "authorization.k8s.io",
        "v1",
        "selfsubjectrulesreviews",
        "SelfSubjectRulesReview",
        namespaced=False,
        verbs=("create",),
    ),
    _resource(
        "authorization.k8s.io", "v1", "subjectaccessreviews", "SubjectAccessReview", namespaced=False, verbs=("create",)
    ),
    _resource(
        "autoscaling",
        "v2",
        "horizontalpodautoscalers",
        "HorizontalPodAutoscaler",
        short=("hpa",),
        sub=("status",),
        categories=("all",),
    ),
    _resource(
        "autoscaling",
        "v1",
        "horizontalpodautoscalers",
        "HorizontalPodAutoscaler",
        short=("hpa",),
        sub=("status",),
        categories=("all",),
    ),
    _resource("batch", "v1", "cronjobs", "CronJob", short=("cj",), sub=("status",), categories=("all",)),
    _resource("batch", "v1", "jobs", "Job", sub=("status",), categories=("all",)),
    _resource(
        "certificates.k8s.io",
        "v1",
        "certificatesigningrequests",
        "CertificateSigningRequest",
        namespaced=False,
        short=("csr",),
        sub=("approval", "status"),
    ),
    _resource("networking.k8s.io", "v1", "ingressclasses", "IngressClass", namespaced=False),
    _resource("networking.k8s.io", "v1", "ingresses", "Ingress", short=("ing",), sub=("status",)),
    _resource("networking.k8s.io", "v1", "ipaddresses", "IPAddress", namespaced=False, short=("ip",)),
    _resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", short=("netpol",)),
    _resource("networking.k8s.io", "v1", "servicecidrs", "ServiceCIDR", namespaced=False, sub=("status",)),
    _resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", short=("pdb",), sub=("status",)),
    _resource("rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False),
    _resource("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", namespaced=False),
    _resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding"),
    _resource("rbac.authorization.k8s.io", "v1", "roles", "Role"),
    _resource("storage.k8s.io", "v1", "csidrivers", "CSIDriver", namespaced=False),
    _resource("storage.k8s.io", "v1", "csinodes", "CSINode", namespaced=False),
    _resource("storage.k8s.io", "v1", "csistoragecapacities", "CSIStorageCapacity"),
    _resource("storage.k8s.io", "v1", "storageclasses", "StorageClass", namespaced=False, short=("sc",)),
    _resource("storage.k8s.io", "v1", "volumeattachments", "VolumeAttachment", namespaced=False, sub=("status",)),
    _resource(
        "storage.k8s.io", "v1", "volumeattributesclasses", "VolumeAttributesClass", namespaced=False, short=("vac",)
    ),
    _resource(
        "admissionregistration.k8s.io",
        "v1",
        "mutatingadmissionpolicies",
        "MutatingAdmissionPolicy",
        namespaced=False,
        categories=("api-extensions",),
    ),
    _resource(
        "admissionregistration.k8s.io",
        "v1",
        "mutatingadmissionpolicybindings",
        "MutatingAdmissionPolicyBinding",
        namespaced=False,
        categories=("api-extensions",),
    ),
    _resource(
        "admissionregistration.k8s.io",
        "v1",
        "mutatingwebhookconfigurations",
        "MutatingWebhookConfiguration",
        namespaced=False,
        categories=("api-extensions",),
    ),
    _resource(
        "admissionregistration.k8s.io",
        "v1",
        "validatingadmissionpolicies",
        "ValidatingAdmissionPolicy",
        namespaced=False,
        sub=("status",),
        categories=("api-extensions",),
    ),
    _resource(
        "admissionregistration.k8s.io",
        "v1",
        "validatingadmissionpolicybindings",
        "ValidatingAdmissionPolicyBinding",
        namespaced=False,
        categories=("api-extensions",),
    ),
    _resource(
        "admissionregistration.k8s.io",
        "v1",
        "validatingwebhookconfigurations",
        "ValidatingWebhookConfiguration",
        namespaced=False,
        categories=("api-extensions",),
    ),
    _resource(
        "apiextensions.k8s.io",
        "v1",
        "customresourcedefinitions",
        "CustomResourceDefinition",
        namespaced=False,
        short=("crd", "crds"),
        sub=("status",),
        categories=("api-extensions",),
    ),
    _resource("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", namespaced=False, short=("pc",)),
    _resource("coordination.k8s.io", "v1", "leases", "Lease"),
    _resource("node.k8s.io", "v1", "runtimeclasses", "RuntimeClass", namespaced=False),
    _resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
    _resource("resource.k8s.io", "v1", "deviceclasses", "DeviceClass", namespaced=False),
    _resource("resource.k8s.io", "v1", "resourceclaims", "ResourceClaim", sub=("status",)),
    _resource("resource.k8s.io", "v1", "resourceclaimtemplates", "ResourceClaimTemplate"),
    _resource("resource.k8s.io", "v1", "resourceslices", "ResourceSlice", namespaced=False),
    _resource("flowcontrol.apiserver.k8s.io", "v1", "flowschemas", "FlowSchema", namespaced=False, sub=("status",)),
    _resource(
        "flowcontrol.apiserver.k8s.io",
        "v1",
        "prioritylevelconfigurations",
        "PriorityLevelConfiguration",
        namespaced=False,
        sub=("status",),
    ),
)
"""Every built-in resource, in discovery order."""

Observer = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Entry:
    info: ResourceInfo
    definition: dict[str, Any] | None
    mounted: bool


_VERSION = re.compile(r"^v(\d+)(?:(alpha|beta)(\d+))?$")


def version_priority(version: str) -> tuple[int, int, int, str]:
    """Sort key that puts the preferred version first: v2, v1, v1beta2, v1beta1, v1alpha1, then others by name."""
    match = _VERSION.match(version)
    if match is None:
        return 3, 0, 0, version
    stage = {None: 0, "beta": 1, "alpha": 2}[match[2]]
    return stage, -int(match[1]), -int(match[3] or 0), version


class Registry:
    """The resources served now. Observers are called after every change, with no argument: they read it again."""

    def __init__(self, resources: Iterable[ResourceInfo] = BUILTIN) -> None:
        self._entries: dict[tuple[str, str, str], _Entry] = {}
        self._observers: list[Observer] = []
        self.generation = 0
        """Grows with every change: a key for caches of discovery and OpenAPI documents."""
        for info in resources:
            self._entries[info.group, info.version, info.plural] = _Entry(info, None, False)

    def lookup(self, group: str, version: str, plural: str) -> ResourceInfo | None:
        """The resource at ``/apis/<group>/<version>/…/<plural>``, if served."""
        entry = self._entries.get((group, version, plural))
        return entry.info if entry else None

    def definition(self, info: ResourceInfo) -> dict[str, Any] | None:
        """For a custom resource its entry of the CRD's ``spec.versions``; None for others. Do not change it."""
        entry = self._entries.get((info.group, info.version, info.plural))
        return entry.definition if entry else None

    def is_mounted(self, info: ResourceInfo) -> bool:
        """Whether a mounted handler, not the storage, answers for it."""
        entry = self._entries.get((info.group, info.version, info.plural))
        return entry is not None and entry.mounted

    def resources(self, group: str | None = None, version: str | None = None) -> list[ResourceInfo]:
        """All, or those of a group, or those of a group version; in the order they were added."""
        return [
            entry.info
            for entry in self._entries.values()
            if (group is None or entry.info.group == group) and (version is None or entry.info.version == version)
        ]

    def groups(self) -> dict[str, list[str]]:
        """Versions of every group (the core group is ``""``), the preferred first; groups in order of addition."""
        found: dict[str, list[str]] = {}
        for group, version, _ in self._entries:
            versions = found.setdefault(group, [])
            if version not in versions:
                versions.append(version)
        for versions in found.values():
            versions.sort(key=version_priority)
        return found

    def by_kind(self, group: str, kind: str) -> ResourceInfo | None:
        """The preferred version of a kind, as owner references and involved objects name it."""
        found = [
            entry.info for entry in self._entries.values() if entry.info.group == group and entry.info.kind == kind
        ]
        return min(found, key=lambda info: version_priority(info.version), default=None)

    def storage(self) -> list[ResourceInfo]:
        """One ResourceInfo (the preferred version) for every resource that holds objects."""
        found: dict[tuple[str, str], ResourceInfo] = {}
        for entry in self._entries.values():
            if entry.mounted or "list" not in entry.info.verbs or "create" not in entry.info.verbs:
                continue
            known = found.get(entry.info.storage_key)
            if known is None or version_priority(entry.info.version) < version_priority(known.version):
                found[entry.info.storage_key] = entry.info
        return list(found.values())

    def replace(self, group: str, plural: str, served: Iterable[tuple[ResourceInfo, dict[str, Any]]]) -> None:
        """Serve exactly these versions of a custom resource, each with its ``spec.versions`` entry; none removes it."""
        for key in [key for key in self._entries if key[0] == group and key[2] == plural]:
            del self._entries[key]
        for info, definition in served:
            self._entries[info.group, info.version, info.plural] = _Entry(info, definition, False)
        self._changed()

    def add(self, info: ResourceInfo, definition: dict[str, Any] | None = None, *, mounted: bool = False) -> None:
        """Serve one more resource; ``mounted`` when a handler of its own answers for it."""
        self._entries[info.group, info.version, info.plural] = _Entry(info, definition, mounted)
        self._changed()

    def remove(self, info: ResourceInfo) -> None:
        """Stop serving it; unknown ones are ignored."""
        if self._entries.pop((info.group, info.version, info.plural), None) is not None:
            self._changed()

    def observe(self, observer: Observer) -> None:
        """Call ``observer`` after every change."""
        self._observers.append(observer)

    def _changed(self) -> None:
        self.generation += 1
        for observer in self._observers:
            observer()
