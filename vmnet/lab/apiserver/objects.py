"""The semantics of the API: create, update, patch and delete, in the order a real server takes its steps.

Everything here is synchronous: a request is atomic, and no lock is needed.
"""

import copy
import dataclasses
import json
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from vmnet.lab.apiserver import (
    admission,
    core_defaults,
    core_validation,
    decoding,
    events,
    ownership,
    patches,
    server_side_apply,
    shapes,
)
from vmnet.lab.apiserver.requests import DeleteOptions, WriteOptions
from vmnet.lab.apiserver.resources import Registry, ResourceInfo
from vmnet.lab.apiserver.shapes import Shape, Shapes
from vmnet.lab.apiserver.status import (
    ApiError,
    Cause,
    already_exists,
    bad_request,
    conflict,
    details,
    forbidden,
    internal,
    invalid,
    invalid_patch,
    invalid_value,
    not_found,
    precondition_failed,
)
from vmnet.lab.apiserver.storage import Object, Store, Stored

NAMESPACES: Final = ("", "namespaces")
PODS: Final = ("", "pods")
NODES: Final = ("", "nodes")
SERVICES: Final = ("", "services")
CRDS: Final = ("apiextensions.k8s.io", "customresourcedefinitions")
LEASES: Final = ("coordination.k8s.io", "leases")

IMMORTAL_NAMESPACES: Final = ("default", "kube-system", "kube-public")
CRD_FINALIZER: Final = "customresourcecleanup.apiextensions.k8s.io"
CONTROLLER: Final = "kube-controller-manager"
"""Field manager of what the server changes on its own."""
FOREGROUND: Final = "foregroundDeletion"
ORPHAN: Final = "orphan"

_RETURN_DELETED: Final = frozenset(
    {
        PODS,
        SERVICES,
        NAMESPACES,
        ("", "serviceaccounts"),
        ("", "podtemplates"),
        ("", "persistentvolumes"),
        ("", "persistentvolumeclaims"),
        ("", "resourcequotas"),
        ("storage.k8s.io", "storageclasses"),
        ("storage.k8s.io", "csidrivers"),
        ("storage.k8s.io", "csinodes"),
        ("storage.k8s.io", "volumeattachments"),
    }
)
_CREATE_ON_UPDATE: Final = frozenset(
    {
        LEASES,
        SERVICES,
        ("", "endpoints"),
        ("", "events"),
        ("", "limitranges"),
        *(
            ("rbac.authorization.k8s.io", plural)
            for plural in ("roles", "rolebindings", "clusterroles", "clusterrolebindings")
        ),
    }
)
_CONDITIONAL: Final = frozenset(
    {
        LEASES,
        CRDS,
        ("policy", "poddisruptionbudgets"),
        ("apiregistration.k8s.io", "apiservices"),
        ("admissionregistration.k8s.io", "mutatingwebhookconfigurations"),
        ("admissionregistration.k8s.io", "validatingwebhookconfigurations"),
        ("networking.k8s.io", "servicecidrs"),
        ("networking.k8s.io", "ipaddresses"),
    }
)
"""Built-in kinds whose PUT must name a resourceVersion (custom resources must as well)."""
_GENERATIONS: Final = frozenset(
    {
        PODS,
        CRDS,
        *(("apps", plural) for plural in ("deployments", "replicasets", "statefulsets", "daemonsets")),
        ("", "replicationcontrollers"),
        ("batch", "jobs"),
        ("batch", "cronjobs"),
        ("policy", "poddisruptionbudgets"),
        ("networking.k8s.io", "networkpolicies"),
        ("networking.k8s.io", "ingresses"),
        ("networking.k8s.io", "ingressclasses"),
        ("discovery.k8s.io", "endpointslices"),
        ("admissionregistration.k8s.io", "mutatingwebhookconfigurations"),
        ("admissionregistration.k8s.io", "validatingwebhookconfigurations"),
        ("admissionregistration.k8s.io", "validatingadmissionpolicies"),
        ("admissionregistration.k8s.io", "validatingadmissionpolicybindings"),
    }
)
_FIRST_STATUS: Final[dict[tuple[str, str], Object]] = {
    NAMESPACES: {"phase": "Active"},
    SERVICES: {"loadBalancer": {}},
    ("", "persistentvolumeclaims"): {"phase": "Pending"},
    ("", "persistentvolumes"): {"phase": "Pending"},
    ("", "replicationcontrollers"): {"replicas": 0},
    ("apps", "replicasets"): {"replicas": 0},
    ("apps", "statefulsets"): {"replicas": 0, "availableReplicas": 0},
    ("apps", "daemonsets"): {
        "currentNumberScheduled": 0,
        "numberMisscheduled": 0,
        "desiredNumberScheduled": 0,
        "numberReady": 0,
    },
    ("policy", "poddisruptionbudgets"): {
        "disruptionsAllowed": 0,
        "currentHealthy": 0,
        "desiredHealthy": 0,
        "expectedPods": 0,
    },
    CRDS: {"conditions": None, "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": None},
}
_KEEPS_STATUS: Final = frozenset({NODES, ("apiregistration.k8s.io", "apiservices")})

_SCHEME: Final = 'in scheme "k8s.io/kubernetes/pkg/api/legacyscheme/scheme.go:30"'
_ALPHABET: Final = "bcdfghjklmnpqrstvwxz2456789"
_MAX_GENERATED: Final = 63


class Schema(Protocol):
    """What is needed of a custom resource's structural schema (``schema.Structural``)."""

    def prune(self, obj: Any) -> list[str]:
        """Remove unknown fields from ``obj``; their paths."""
        ...

    def default(self, obj: Any) -> None:
        """Fill in defaults."""
        ...

    def validate(self, obj: Any, old: Any = None) -> list[Any]:
        """Causes (``reason``, ``message``, ``field``)."""
        ...


class Addresses(Protocol):
    """Cluster addresses and node ports of Services (``service_addresses``)."""

    def assign(self, service: Object, old: Object | None, *, dry_run: bool) -> list[Cause]:
        """Fill in the addresses of a Service that is about to be stored."""
        ...

    def release(self, service: Object) -> None:
        """Give back the addresses of a Service that is gone."""
        ...


def _timestamp(now: datetime) -> str:
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


def creates_on_update(info: ResourceInfo) -> bool:
    """Whether a PUT of an object that is not there makes it."""
    return info.storage_key in _CREATE_ON_UPDATE


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a delete did: the object as it is, or was, and whether it is gone."""

    obj: Object
    gone: bool


@dataclass(slots=True)
class Objects:
    """The API's objects. Reads and writes go through here; ``store`` only holds the result."""

    store: Store
    registry: Registry
    structural: Callable[[ResourceInfo], Schema | None]
    """The schema of a custom resource; None for built-in kinds."""
    addresses: Addresses | None = None
    check_definition: Callable[[Object, Object | None], list[Cause]] = lambda _new, _old: []
    """Causes for a CustomResourceDefinition that is wrong."""
    now: Callable[[], datetime] = utc_now
    shapes: Shapes = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = Shapes(self.registry)

    # Reading

    def get(self, info: ResourceInfo, namespace: str, name: str) -> Stored:
        """One object. Raises ApiError (404)."""
        stored = self.store.get(info.storage_key, (namespace, name))
        if stored is None:
            raise not_found(info, name)
        return stored

    def is_custom(self, info: ResourceInfo) -> bool:
        """Whether a CustomResourceDefinition defines it."""
        return self.registry.definition(info) is not None

    def timestamp(self) -> str:
        """Now, as metadata shows times."""
        return _timestamp(self.now())

    # Creating

    def create(self, info: ResourceInfo, namespace: str, body: Any, options: WriteOptions) -> Object:
        """POST. Returns the stored object in the version of ``info``. Raises ApiError."""
        obj = self._fitted(info, self._checked(info, namespace, "", body), options)
        if obj["metadata"].get("resourceVersion") not in (None, "", "0"):
            raise internal("resourceVersion should not be set on objects to be created")
        return self._create(info, namespace, obj, options, None)

    def _create(
        self,
        info: ResourceInfo,
        namespace: str,
        obj: Object,
        options: WriteOptions,
        entries: ownership.Entries | None,
    ) -> Object:
        """``entries``: field ownership that an apply has worked out already."""
        metadata = self._new_metadata(info, namespace, obj)
        obj["metadata"] = metadata
        name = metadata.get("name", "")
        if info.namespaced:
            self._require_namespace(info, namespace, name)
        if self.is_custom(info):
            self._require_definition(info, name)
        if entries is None:
            entries = self._entries_after(info, None, obj, options, "")
        self._prepare_create(info, obj)
        if options.mutations:
            obj = admission.applied(obj, options.mutations)
            metadata = obj["metadata"]
        causes = core_validation.metadata(info, obj)
        causes += self._validate(info, obj, None)
        if causes:
            raise invalid(self._judged(info), name, causes)
        existing = self.store.get(info.storage_key, (namespace, name))
        if existing is not None:
            raise already_exists(info, name, being_deleted="deletionTimestamp" in existing.obj["metadata"])
        if info.storage_key == SERVICES and self.addresses is not None:
            causes = self.addresses.assign(obj, None, dry_run=options.dry_run)
            if causes:
                raise invalid(info, name, causes)
        managed = ownership.write_entries(entries)
        if managed:
            metadata["managedFields"] = managed
        obj = _arranged(obj)
        if options.dry_run:
            return self._at(info, obj)
        return self._at(info, self.store.put(info.storage_key, self._to_storage(obj)).obj)

    def _new_metadata(self, info: ResourceInfo, namespace: str, obj: Object) -> Object:
        metadata = dict(obj.get("metadata") or {})
        for name in (
            "resourceVersion",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "selfLink",
            "managedFields",
            "creationTimestamp",
            "uid",
        ):
            metadata.pop(name, None)
        if self.is_custom(info) or info.storage_key in _GENERATIONS:
            metadata["generation"] = 1
        if info.namespaced:
            metadata["namespace"] = namespace
        else:
            metadata.pop("namespace", None)
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = self._generated(info, namespace, metadata["generateName"])
        found: Object = {}
        for name in ("name", "generateName", "namespace"):
            if metadata.get(name):
                found[name] = metadata.pop(name)
        found["uid"] = str(uuid.uuid4())
        if "generation" in metadata:
            found["generation"] = metadata.pop("generation")
        found["creationTimestamp"] = self.timestamp()
        found.update(metadata)
        return found

    def _generated(self, info: ResourceInfo, namespace: str, prefix: str) -> str:
        for _ in range(8):
            suffix = "".join(secrets.choice(_ALPHABET) for _ in range(5))
            name = prefix[: _MAX_GENERATED - 5] + suffix
            if self.store.get(info.storage_key, (namespace, name)) is None:
                return name
        return prefix[: _MAX_GENERATED - 5] + "".join(secrets.choice(_ALPHABET) for _ in range(5))

    def _require_namespace(self, info: ResourceInfo, namespace: str, name: str) -> None:
        stored = self.store.get(NAMESPACES, ("", namespace))
        if stored is None:
            namespaces = self.registry.lookup("", "v1", "namespaces")
            raise not_found(namespaces or info, namespace)
        if "deletionTimestamp" in stored.obj["metadata"]:
            causes = [
                {
                    "reason": "NamespaceTerminating",
                    "message": f"namespace {namespace} is being terminated",
                    "field": "metadata.namespace",
                }
            ]
            message = f"unable to create new content in namespace {namespace} because it is being terminated"
            raise forbidden(info, name, message, causes=causes)

    def _require_definition(self, info: ResourceInfo, name: str) -> None:
        stored = self.store.get(CRDS, ("", f"{info.plural}.{info.group}"))
        if stored is not None and "deletionTimestamp" in stored.obj["metadata"]:
            raise forbidden(info, name, "create not allowed while custom resource definition is terminating")

    def _prepare_create(self, info: ResourceInfo, obj: Object) -> None:
        storage = info.storage_key
        if "status" in info.subresources and storage not in _KEEPS_STATUS:
            if self.is_custom(info):
                obj.pop("status", None)
            else:
                obj["status"] = copy.deepcopy(_FIRST_STATUS.get(storage, {}))
        if storage == PODS:
            core_defaults.admit_pod(obj)
            obj["status"] = {"phase": "Pending", "qosClass": core_defaults.quality_of_service(obj["spec"])}
        elif storage == CRDS:
            versions = (obj.get("spec") or {}).get("versions") or ()
            obj["status"]["storedVersions"] = [item.get("name", "") for item in versions if item.get("storage")]
        elif storage == NAMESPACES:
            finalizers = (obj.get("spec") or {}).get("finalizers") or []
            obj["spec"] = {"finalizers": [*finalizers, *(["kubernetes"] if "kubernetes" not in finalizers else [])]}

    # Updating

    def update(
        self,
        info: ResourceInfo,
        namespace: str,
        name: str,
        body: Any,
        options: WriteOptions,
        subresource: str = "",
    ) -> tuple[Object, bool]:
        """PUT. The stored object, and whether it was created. Raises ApiError."""
        obj = self._fitted(info, self._checked(info, namespace, name, body), options)
        if not obj["metadata"].get("name"):
            raise bad_request(f"the name of the object ({name} based on URL) was undeterminable: name must be provided")
        stored = self.store.get(info.storage_key, (namespace, name))
        if stored is None:
            if subresource or info.storage_key not in _CREATE_ON_UPDATE:
                raise not_found(info, name)
            return self._create(info, namespace, obj, options, None), True
        version = obj["metadata"].get("resourceVersion")
        conditional = self.is_custom(info) or info.storage_key in _CONDITIONAL
        if not version and conditional:
            cause = invalid_value("metadata.resourceVersion", 0, "must be specified for an update")
            raise ApiError(
                422,
                "Invalid",
                f'{info.qualified_name} "{name}" is invalid: {cause.field}: {cause.message}',
                details(info, name, causes=[cause.as_json()]),
            )
        return self._update(info, stored, obj, options, subresource), False

    def _update(
        self,
        info: ResourceInfo,
        stored: Stored,
        obj: Object,
        options: WriteOptions,
        subresource: str,
        entries: ownership.Entries | None = None,
    ) -> Object:
        """Replace ``stored`` by ``obj``, a fitted object of ``info``'s version; ``entries`` as in ``_create``."""
        old = self._from_storage(info, stored)
        name = old["metadata"]["name"]
        self._check_versions(info, stored, obj)
        metadata = self._kept_metadata(old, obj)
        obj = {**obj, "metadata": metadata}
        obj = self._reset(info, obj, old, subresource)
        metadata = obj["metadata"]
        if entries is None:
            entries = self._entries_after(info, old, obj, options, subresource)
        managed = ownership.write_entries(entries)
        metadata.pop("managedFields", None)
        if managed:
            metadata["managedFields"] = managed
        if info.storage_key == SERVICES and self.addresses is not None and not subresource:
            causes = self.addresses.assign(obj, old, dry_run=options.dry_run)
            if causes:
                raise invalid(info, name, causes)
        if options.mutations:
            obj = admission.applied(obj, options.mutations)
        self._next_generation(info, obj, old, subresource)
        causes = core_validation.metadata_update(obj, old)
        if not causes:
            # Names do not change, so only what may have changed is judged again.
            causes = [cause for cause in core_validation.metadata(info, obj) if cause.field != "metadata.name"]
            causes += self._validate(info, obj, old) if subresource in ("", "status", "scale") else []
        if causes:
            raise invalid(self._judged(info), name, causes)
        obj = _arranged(obj)
        if _same(obj, old):
            return self._at(info, stored.obj)
        if options.dry_run:
            return self._at(info, obj)
        if self._is_finished(info, obj):
            self._remove(info, stored, None)
            return self._at(info, obj)
        return self._at(info, self.store.put(info.storage_key, self._to_storage(obj)).obj)

    def _check_versions(self, info: ResourceInfo, stored: Stored, obj: Object) -> None:
        metadata, old = obj["metadata"], stored.obj["metadata"]
        uid, version = metadata.get("uid"), metadata.get("resourceVersion")
        name = old["name"]
        if uid and uid != old["uid"]:
            group = f"{info.group}/" if info.group else ""
            namespace = f"{old['namespace']}/" if "namespace" in old else ""
            raise conflict(
                info,
                name,
                f"StorageError: invalid object, Code: 4, Key: /registry/{group}{info.plural}/{namespace}{name}, "
                f"ResourceVersion: 0, AdditionalErrorMsg: Precondition failed: UID in precondition: {uid}, "
                f"UID in object meta: {old['uid']}",
            )
        if version and version != "0":
            if not version.isdigit():
                raise internal(f'strconv.ParseUint: parsing "{version}": invalid syntax')
            if int(version) != stored.version:
                raise conflict(info, name)

    def _kept_metadata(self, old: Object, obj: Object) -> Object:
        """The new metadata, with what only the server sets taken from the old object."""
        before = old["metadata"]
        metadata = dict(obj["metadata"])
        metadata.pop("selfLink", None)
        metadata.setdefault("uid", before["uid"])
        for name in ("namespace", "generateName", "creationTimestamp", "generation"):
            metadata.pop(name, None)
            if name in before:
                metadata[name] = before[name]
        for name in ("deletionTimestamp", "deletionGracePeriodSeconds"):
            metadata.pop(name, None)
            if name in before:
                metadata[name] = before[name]
        metadata["resourceVersion"] = before["resourceVersion"]
        order = ("name", "generateName", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp")
        found = {name: metadata.pop(name) for name in order if name in metadata}
        found.update(metadata)
        return found

    def _reset(self, info: ResourceInfo, obj: Object, old: Object, subresource: str) -> Object:
        """Put back what this endpoint may not change."""
        obj = dict(obj)
        if subresource == "":
            if "status" in info.subresources:
                obj.pop("status", None)
                if "status" in old:
                    obj["status"] = old["status"]
            if info.storage_key == NAMESPACES:
                obj["spec"] = old.get("spec", {})
        elif subresource == "status":
            status = obj.get("status")
            if self.is_custom(info):
                metadata = dict(old["metadata"])
                metadata.pop("managedFields", None)
                if "managedFields" in obj["metadata"]:
                    metadata["managedFields"] = obj["metadata"]["managedFields"]
                obj = {**old, "metadata": metadata}
            else:
                kept = {name: value for name, value in old.items() if name not in ("metadata", "status")}
                obj = {**kept, "metadata": obj["metadata"]}
                if info.storage_key == PODS:
                    owners = old["metadata"].get("ownerReferences")
                    obj["metadata"].pop("ownerReferences", None)
                    if owners:
                        obj["metadata"]["ownerReferences"] = owners
            obj.pop("status", None)
            if status is not None:
                obj["status"] = status
        elif subresource == "finalize":
            obj = {**old, "metadata": obj["metadata"], "spec": obj.get("spec", {})}
        return obj

    def _next_generation(self, info: ResourceInfo, obj: Object, old: Object, subresource: str) -> None:
        custom = self.is_custom(info)
        if not custom and info.storage_key not in _GENERATIONS:
            return
        if subresource == "status":
            return
        if custom:
            ignored = {"metadata", "apiVersion", "kind"} | ({"status"} if "status" in info.subresources else set())
        else:
            ignored = {"metadata", "apiVersion", "kind", "status"}

        def body(value: Object) -> Object:
            return {name: item for name, item in value.items() if name not in ignored}

        if body(obj) != body(old):
            metadata = dict(obj["metadata"])
            metadata["generation"] = int(old["metadata"].get("generation", 0)) + 1
            obj["metadata"] = metadata

    def _is_finished(self, info: ResourceInfo, obj: Object) -> bool:
        """Whether a terminating object has nothing left to wait for."""
        metadata = obj["metadata"]
        if "deletionTimestamp" not in metadata or metadata.get("finalizers"):
            return False
        if info.storage_key == NAMESPACES:
            return not (obj.get("spec") or {}).get("finalizers")
        return not metadata.get("deletionGracePeriodSeconds")

    def _validate(self, info: ResourceInfo, obj: Object, old: Object | None) -> list[Cause]:
        if info.group == "events.k8s.io":
            return core_validation.new_event(obj, old)
        schema = self.structural(info)
        if schema is not None:
            return [Cause(cause.reason, cause.message, cause.field) for cause in schema.validate(obj, old)]
        if info.storage_key == CRDS:
            return self.check_definition(obj, old)
        storage = info.storage_key
        return core_validation.created(storage, obj) if old is None else core_validation.changed(storage, obj, old)

    def replace(
        self, info: ResourceInfo, stored: Stored, obj: Object, options: WriteOptions, subresource: str
    ) -> Object:
        """Replace an object by a changed copy of it, as an update through a subresource. Raises ApiError."""
        return self._update(info, stored, self._fitted(info, obj, options), options, subresource)

    # Patching

    def patch(
        self,
        info: ResourceInfo,
        namespace: str,
        name: str,
        media_type: str,
        patch: Any,
        options: WriteOptions,
        subresource: str = "",
    ) -> tuple[Object, bool]:
        """PATCH. The stored object, and whether it was created (by an apply). Raises ApiError."""
        stored = self.store.get(info.storage_key, (namespace, name))
        if media_type == patches.APPLY_PATCH:
            return self._apply(info, namespace, name, stored, patch, options, subresource)
        if stored is None:
            raise not_found(info, name)
        current = self._from_storage(info, stored)
        if media_type == patches.JSON_PATCH:
            result = patches.json_patch(current, patch)
        elif media_type == patches.MERGE_PATCH:
            result = patches.merge(current, patches.require_object(patch))
        else:
            result = patches.strategic(current, patches.require_object(patch), self.shapes.of(info))
        if not isinstance(result, dict):
            raise invalid_patch(result, f"json: cannot unmarshal {type(result).__name__} into Go value of type object")
        obj = self._patched(info, namespace, name, current, result, options)
        return self._update(info, stored, obj, options, subresource), False

    def _patched(
        self,
        info: ResourceInfo,
        namespace: str,
        name: str,
        current: Object,
        result: Object,
        options: WriteOptions,
    ) -> Object:
        if result.get("kind") != info.kind or result.get("apiVersion") != info.api_version:
            version = result.get("apiVersion", "")
            message = f'no kind "{result.get("kind")}" is registered for version "{version}" {_SCHEME}'
            if result.get("apiVersion") == info.api_version:
                message = f"unable to convert {result.get('kind')} to {info.kind}"
            raise invalid_patch(result, message)
        metadata = result.get("metadata")
        if not isinstance(metadata, dict):
            result = {**result, "metadata": {"name": name}}
            metadata = result["metadata"]
        if metadata.get("name") != name:
            wrong = metadata.get("name", "")
            raise bad_request(f"the name of the object ({wrong}) does not match the name on the URL ({name})")
        if info.namespaced and metadata.get("namespace") != namespace:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
        uid = metadata.get("uid")
        if uid and uid != current["metadata"]["uid"]:
            cause = invalid_value("metadata.uid", uid, "field is immutable")
            raise invalid(info, name, [cause, cause])
        return self._fitted(info, result, options, patch=True)

    def _apply(
        self,
        info: ResourceInfo,
        namespace: str,
        name: str,
        stored: Stored | None,
        config: Any,
        options: WriteOptions,
        subresource: str,
    ) -> tuple[Object, bool]:
        if not isinstance(config, dict):
            raise bad_request("error decoding YAML: the patch must be an object")
        if config.get("kind") != info.kind or config.get("apiVersion") != info.api_version:
            version = str(config.get("apiVersion") or "")
            _, slash, short = version.rpartition("/")
            shown = version if slash else f"/{short}"
            raise bad_request(f"invalid object type: {shown}, Kind={config.get('kind') or ''}")
        metadata = dict(config.get("metadata") or {})
        if metadata.get("managedFields"):
            raise bad_request("metadata.managedFields must be nil")
        if metadata.get("name", name) != name:
            raise bad_request(
                f"the name of the object ({metadata['name']}) does not match the name on the URL ({name})"
            )
        if metadata.get("namespace", namespace) != namespace and info.namespaced:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
        shape = self.shapes.of(info)
        shown_group = f"{info.group}/{info.version}" if info.group else f"/{info.version}"
        label = f"{metadata.get('namespace', '')}/{metadata.get('name', name)}; {shown_group}, Kind={info.kind}"
        config = _without_nulls({**config, "metadata": {**metadata, "name": name}})
        server_side_apply.check(config, shape, label)
        if stored is None and subresource:
            raise not_found(info, name)
        version = metadata.pop("resourceVersion", None)
        if version and stored is not None and str(stored.version) != version:
            raise conflict(info, name)
        if version and stored is None:
            raise conflict(info, name)
        config["metadata"].pop("resourceVersion", None)
        if stored is None:
            live = {} if self.is_custom(info) else shapes.empty(shape)
            live |= {"apiVersion": info.api_version, "kind": info.kind}
            entries: ownership.Entries = {}
        else:
            live = self._from_storage(info, stored)
            entries = ownership.read_entries(live["metadata"].get("managedFields"))
        applied = self._applied(info, live, config, shape, entries, options, subresource)
        if stored is None:
            obj = self._fitted(info, copy.deepcopy(applied.obj), options)
            return self._create(info, namespace, obj, options, applied.entries), True
        obj = self._fitted(info, copy.deepcopy(applied.obj), options)
        return self._update(info, stored, obj, options, subresource, applied.entries), False

    def _applied(
        self,
        info: ResourceInfo,
        live: Object,
        config: Object,
        shape: Shape,
        entries: ownership.Entries,
        options: WriteOptions,
        subresource: str,
    ) -> server_side_apply.Applied:
        now = self.timestamp()
        ignored = self._ignored(info, subresource)
        if not entries and live.get("metadata", {}).get("uid"):
            first = ownership.Manager("before-first-apply", "Update", info.api_version)
            empty = {} if self.is_custom(info) else shapes.empty(shape)
            bare = {**live, "metadata": {k: v for k, v in live["metadata"].items() if k != "managedFields"}}
            entries = ownership.updated({}, empty, bare, shape, manager=first, ignored=(), now=now)
        manager = ownership.Manager(options.manager, "Apply", "", subresource)

        def attempt(force: bool) -> server_side_apply.Applied:
            return server_side_apply.apply(
                live,
                config,
                shape,
                entries,
                manager=manager,
                api_version=info.api_version,
                ignored=ignored,
                force=force,
                now=now,
            )

        try:
            applied = attempt(options.force)
        except server_side_apply.Conflicts as conflicts:
            if options.manager != server_side_apply.KUBECTL:
                raise conflicts.error() from None
            allowed = server_side_apply.allowed_by_last_applied(live, shape)
            left = {who: paths - allowed for who, paths in conflicts.conflicts.items() if paths - allowed}
            if left:
                raise server_side_apply.Conflicts(left, conflicts.entries).error() from None
            applied = attempt(force=True)
        if options.manager == server_side_apply.KUBECTL:
            annotations = applied.obj.get("metadata", {}).get("annotations") or {}
            if server_side_apply.LAST_APPLIED in annotations:
                # The annotation goes on telling client-side apply what was applied last.
                text = json.dumps(config, separators=(",", ":"), sort_keys=True, ensure_ascii=False) + "\n"
                metadata = {
                    **applied.obj["metadata"],
                    "annotations": {**annotations, server_side_apply.LAST_APPLIED: text},
                }
                applied = server_side_apply.Applied({**applied.obj, "metadata": metadata}, applied.entries, True)
        return applied

    # Deleting

    def delete(self, info: ResourceInfo, namespace: str, name: str, options: DeleteOptions) -> Deleted:
        """DELETE. Raises ApiError."""
        stored = self.get(info, namespace, name)
        metadata = stored.obj["metadata"]
        if options.uid and options.uid != metadata["uid"]:
            raise precondition_failed(
                info,
                name,
                f"the UID in the precondition ({options.uid}) does not match the UID in record ({metadata['uid']}). "
                "The object might have been deleted and then recreated",
            )
        if options.resource_version and options.resource_version != metadata["resourceVersion"]:
            raise precondition_failed(
                info,
                name,
                f"the ResourceVersion in the precondition ({options.resource_version}) does not match the "
                f"ResourceVersion in record ({metadata['resourceVersion']}). The object might have been modified",
            )
        storage = info.storage_key
        if storage == NAMESPACES and name in IMMORTAL_NAMESPACES:
            raise forbidden(info, name, "this namespace may not be deleted")
        obj = self._marked(info, stored, options)
        finished = self._is_finished(info, obj)
        if storage == NAMESPACES and "deletionTimestamp" not in metadata:
            # The first delete only marks it, even when no finalizer is left.
            finished = False
        if options.dry_run:
            return Deleted(self._at(info, obj), finished)
        if finished:
            if storage == PODS and obj is not stored.obj:
                # Watchers see a pod that is about to go before it goes.
                stored = self.store.put(storage, obj)
            removed = self._remove(info, stored, None)
            return Deleted(self._at(info, removed or obj), True)
        if obj is stored.obj:
            return Deleted(self._at(info, obj), False)
        return Deleted(self._at(info, self.store.put(storage, obj).obj), False)

    def _marked(self, info: ResourceInfo, stored: Stored, options: DeleteOptions) -> Object:
        """The object as deletion leaves it before anything has finished; the very same one if nothing changes."""
        storage = info.storage_key
        obj = stored.obj
        before = obj["metadata"]
        metadata = dict(before)
        finalizers = list(metadata.get("finalizers") or ())
        if options.propagation in ("Orphan", "Foreground", "Background"):
            finalizers = [item for item in finalizers if item not in (ORPHAN, FOREGROUND)]
            if options.propagation == "Orphan":
                finalizers.append(ORPHAN)
            elif options.propagation == "Foreground":
                finalizers.append(FOREGROUND)
        if storage == CRDS and "deletionTimestamp" not in before and CRD_FINALIZER not in finalizers:
            finalizers.append(CRD_FINALIZER)
        metadata.pop("finalizers", None)
        now = self.now()
        grace = self._grace(info, obj, options)
        if "deletionTimestamp" not in metadata:
            metadata["deletionTimestamp"] = _timestamp(datetime.fromtimestamp(now.timestamp() + grace, UTC))
            if storage not in (NAMESPACES, CRDS):
                metadata["deletionGracePeriodSeconds"] = grace
            if storage != CRDS and metadata.get("generation"):
                metadata["generation"] += 1
        elif storage == PODS and grace < int(metadata.get("deletionGracePeriodSeconds", 0)):
            first = datetime.fromisoformat(metadata["deletionTimestamp"]).timestamp()
            first -= int(metadata.get("deletionGracePeriodSeconds", 0))
            metadata["deletionTimestamp"] = _timestamp(datetime.fromtimestamp(first + grace, UTC))
            metadata["deletionGracePeriodSeconds"] = grace
        if finalizers:
            metadata["finalizers"] = finalizers
        if metadata == before:
            return obj
        marked = {**obj, "metadata": _arranged_metadata(metadata)}
        if storage == NAMESPACES:
            marked["status"] = {**(obj.get("status") or {}), "phase": "Terminating"}
        elif storage == CRDS and "deletionTimestamp" not in before:
            message = "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon"
            condition = {
                "type": "Terminating",
                "status": "True",
                "lastTransitionTime": _timestamp(now),
                "reason": "InstanceDeletionPending",
                "message": message,
            }
            status = obj.get("status") or {}
            marked["status"] = {**status, "conditions": [*(status.get("conditions") or ()), condition]}
        return marked

    def _grace(self, info: ResourceInfo, obj: Object, options: DeleteOptions) -> int:
        """Seconds an object may take to end: only bound, running pods have any."""
        if info.storage_key != PODS:
            return 0
        spec = obj.get("spec") or {}
        if not spec.get("nodeName") or (obj.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
            return 0
        if options.grace is not None:
            return max(options.grace, 0) if options.grace != -1 else 1
        return int(spec.get("terminationGracePeriodSeconds", 30))

    def _remove(self, info: ResourceInfo, stored: Stored, last: Object | None) -> Object | None:
        metadata = stored.obj["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        removed = self.store.remove(info.storage_key, key, last)
        if info.storage_key == SERVICES and self.addresses is not None:
            self.addresses.release(stored.obj)
        return removed.obj if removed else None

    def returns_deleted(self, info: ResourceInfo) -> bool:
        """Whether DELETE answers with the object although it is gone."""
        return info.storage_key in _RETURN_DELETED

    # Writes by the server itself

    def change(
        self,
        info: ResourceInfo,
        namespace: str,
        name: str,
        change: Callable[[Object], Object | None],
        subresource: str | None = "",
        manager: str = CONTROLLER,
    ) -> bool:
        """Let the server itself replace an object: ``change`` gets a copy; None leaves it. False if it is not there.

        Nothing is validated; a terminating object that has nothing left to wait for goes. Without a ``subresource``
        (None) nobody becomes the owner of what changed.
        """
        stored = self.store.get(info.storage_key, (namespace, name))
        if stored is None:
            return False
        obj = change(copy.deepcopy(stored.obj))
        if obj is None or obj == stored.obj:
            return True
        if self._is_finished(info, obj):
            self._remove(info, stored, None)
            return True
        if subresource is None:
            self.store.put(info.storage_key, obj)
            return True
        options = WriteOptions(manager=manager, user=manager)
        obj["metadata"].pop("managedFields", None)
        managed = ownership.write_entries(self._entries_after(info, stored.obj, obj, options, subresource, ignored=()))
        if managed:
            obj["metadata"]["managedFields"] = managed
        self.store.put(info.storage_key, obj)
        return True

    # Bodies

    def _checked(self, info: ResourceInfo, namespace: str, name: str, body: Any) -> Object:
        """A request body that names the right kind, name and namespace."""
        if body is None:
            body = {}
        if not isinstance(body, dict):
            raise bad_request("the body is no object")
        kind, version = body.get("kind") or info.kind, body.get("apiVersion") or info.api_version
        if kind != info.kind or version != info.api_version:
            raise self._wrong_kind(info, str(kind), str(version), str((body.get("metadata") or {}).get("name", "")))
        metadata = body.get("metadata")
        if metadata is None:
            metadata = {}
        if not isinstance(metadata, dict):
            raise decoding.cannot_handle(
                info.kind,
                info.version,
                f"json: cannot unmarshal {type(metadata).__name__} into Go struct field {info.kind}.metadata "
                "of type v1.ObjectMeta",
            )
        found_name = metadata.get("name")
        if name and isinstance(found_name, str) and found_name and found_name != name:
            raise bad_request(f"the name of the object ({found_name}) does not match the name on the URL ({name})")
        found_namespace = metadata.get("namespace")
        if info.namespaced:
            if found_namespace and found_namespace != namespace:
                raise bad_request(
                    "the namespace of the provided object does not match the namespace sent on the request"
                )
            metadata = {**metadata, "namespace": namespace}
        elif found_namespace:
            raise bad_request("namespace is not allowed on cluster-scoped resources")
        return {**body, "kind": info.kind, "apiVersion": info.api_version, "metadata": metadata}

    def _wrong_kind(self, info: ResourceInfo, kind: str, version: str, name: str) -> ApiError:
        group, _, short = version.rpartition("/")
        known = next((item for item in self.registry.resources(group, short) if item.kind == kind), None)
        if self.is_custom(info):
            if version != info.api_version:
                return bad_request(
                    f"the API version in the data ({version}) does not match the expected API version "
                    f"({info.api_version})"
                )
            named = dataclasses.replace(info, kind=kind)
            return invalid(named, name, [invalid_value("kind", kind, f"must be {info.kind}")])
        if known is None or self.is_custom(known):
            return decoding.cannot_handle(
                info.kind, short, f'no kind "{kind}" is registered for version "{version}" {_SCHEME}', kind
            )
        package, own = group.split(".")[0] or "core", info.group.split(".")[0] or "core"
        return decoding.cannot_handle(
            info.kind,
            short,
            f"converting ({package if group else ''}{'' if not group else '.'}{short}.{kind}) to ({own}.{info.kind}): "
            "unknown conversion",
            kind,
        )

    def _fitted(self, info: ResourceInfo, body: Object, options: WriteOptions, *, patch: bool = False) -> Object:
        """An object with types checked, unknown fields dropped (or refused) and defaults filled in."""
        decoder = decoding.Decoder()
        schema = self.structural(info)
        try:
            if schema is not None:
                obj = copy.deepcopy(body)
                obj["metadata"] = decoder.object(obj.get("metadata") or {}, shapes.meta())
                decoder.unknown = [f"metadata.{name}" for name in decoder.unknown]
            else:
                shape = self.shapes.of(info)
                obj = decoder.object(copy.deepcopy(body) if shape.open else body, shape)
        except decoding.TypeMismatch as error:
            if patch:
                raise invalid_patch(body, str(error)) from None
            raise decoding.cannot_handle(info.kind, info.version, str(error)) from None
        unknown = decoder.unknown
        if schema is not None:
            unknown = sorted({*unknown, *schema.prune(obj)})
            schema.default(obj)
        else:
            if info.group == "events.k8s.io" and info.plural == "events":
                obj = events.to_core(obj)
            core_defaults.fill(info.storage_key, obj)
            if info.group == "events.k8s.io" and info.plural == "events":
                obj = events.to_new(obj)
        messages = [f'unknown field "{name}"' for name in unknown]
        if messages and options.validation == "Strict":
            text = f"strict decoding error: {', '.join(messages)}"
            if patch:
                raise invalid_patch(body, text)
            raise decoding.cannot_handle(info.kind, info.version, text)
        if options.validation == "Warn":
            options.warnings.extend(messages)
        obj["kind"], obj["apiVersion"] = info.kind, info.api_version
        obj.setdefault("metadata", {})
        return obj

    # Field ownership

    def _ignored(self, info: ResourceInfo, subresource: str) -> tuple[ownership.Path, ...]:
        if subresource == "status":
            return (("f:spec",),)
        if subresource == "" and "status" in info.subresources:
            return (("f:status",),)
        return ()

    def _entries_after(
        self,
        info: ResourceInfo,
        old: Object | None,
        obj: Object,
        options: WriteOptions,
        subresource: str,
        ignored: tuple[ownership.Path, ...] | None = None,
    ) -> ownership.Entries:
        if ignored is None:
            ignored = self._ignored(info, subresource)
        shape = self.shapes.of(info)
        manager = ownership.Manager(options.manager, "Update", info.api_version, subresource)
        now = self.timestamp()
        if old is None:
            empty: Object = {} if self.is_custom(info) else shapes.empty(shape)
            return ownership.updated({}, empty, obj, shape, manager=manager, ignored=ignored, now=now)
        live = old["metadata"].get("managedFields")
        sent = obj["metadata"].get("managedFields")
        if sent == [{}] and not subresource:
            return {}
        entries = ownership.read_entries(live if subresource or not sent else sent)
        if not entries:
            entries = ownership.read_entries(live)
        if not entries:
            return {}
        return ownership.updated(
            entries,
            _unmanaged(old),
            _unmanaged(obj),
            shape,
            manager=manager,
            ignored=ignored,
            now=now,
        )

    def _judged(self, info: ResourceInfo) -> ResourceInfo:
        """The resource as validation names it: events of both groups are judged as core ones."""
        if info.group == "events.k8s.io":
            return self.registry.lookup("", "v1", "events") or info
        return info

    # Versions

    def _at(self, info: ResourceInfo, obj: Object) -> Object:
        if obj.get("apiVersion") == info.api_version:
            return obj
        if info.group == "events.k8s.io":
            return events.to_new(obj)
        return {**obj, "apiVersion": info.api_version}

    def _from_storage(self, info: ResourceInfo, stored: Stored) -> Object:
        return stored.at(info.api_version)

    def _to_storage(self, obj: Object) -> Object:
        return events.to_core(obj) if obj["apiVersion"] == events.NEW_VERSION else obj


def _unmanaged(obj: Object) -> Object:
    return {**obj, "metadata": {name: value for name, value in obj["metadata"].items() if name != "managedFields"}}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


_METADATA_ORDER: Final = (
    "name",
    "generateName",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "labels",
    "annotations",
    "ownerReferences",
    "finalizers",
    "managedFields",
)


def _arranged_metadata(metadata: Mapping[str, Any]) -> Object:
    return {name: metadata[name] for name in _METADATA_ORDER if name in metadata}


def _arranged(obj: Object) -> Object:
    """The object with its fields in the order the real server writes them."""
    rest = {name: value for name, value in obj.items() if name not in ("kind", "apiVersion", "metadata")}
    return {
        "kind": obj["kind"],
        "apiVersion": obj["apiVersion"],
        "metadata": _arranged_metadata(obj["metadata"]),
        **rest,
    }


def _same(new: Object, old: Object) -> bool:
    """Whether a write changes nothing but times in managedFields."""

    def timeless(obj: Object) -> Object:
        metadata = dict(obj["metadata"])
        if "managedFields" in metadata:
            metadata["managedFields"] = [
                {name: value for name, value in entry.items() if name != "time"} for entry in metadata["managedFields"]
            ]
        return {**obj, "metadata": metadata}

    return new == old or timeless(new) == timeless(old)
