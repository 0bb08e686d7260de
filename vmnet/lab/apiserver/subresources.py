"""Subresources that are more than a view of their object, and reviews: scale, binding, eviction, tokens, access."""

import copy
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from vmnet.lab.apiserver import selectors
from vmnet.lab.apiserver.authentication import AUDIENCE, Tokens, User, bound_to
from vmnet.lab.apiserver.authorization import Attributes, Authorizer
from vmnet.lab.apiserver.objects import NODES, PODS, Objects
from vmnet.lab.apiserver.requests import DeleteOptions, WriteOptions
from vmnet.lab.apiserver.resources import ResourceInfo
from vmnet.lab.apiserver.status import (
    ApiError,
    Cause,
    bad_request,
    conflict,
    details,
    invalid,
    invalid_value,
    not_found,
    success,
)
from vmnet.lab.apiserver.storage import Object

_MIN_TOKEN_SECONDS: Final = 600
_DEFAULT_TOKEN_SECONDS: Final = 3600


def _find(obj: Any, path: str) -> Any:
    for name in path.strip(".").split("."):
        if not isinstance(obj, Mapping):
            return None
        obj = obj.get(name)
    return obj


def _put(obj: Object, path: str, value: Any) -> None:
    names = path.strip(".").split(".")
    for name in names[:-1]:
        child = obj.get(name)
        obj[name] = dict(child) if isinstance(child, dict) else {}
        obj = obj[name]
    obj[names[-1]] = value


class Scales:
    """The ``scale`` subresource of workloads and of custom resources that declare one."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def _paths(self, info: ResourceInfo) -> tuple[str, str, str]:
        definition = self._objects.registry.definition(info)
        if definition is None:
            return ".spec.replicas", ".status.replicas", ""
        scale = definition["subresources"]["scale"]
        return scale["specReplicasPath"], scale["statusReplicasPath"], scale.get("labelSelectorPath", "")

    def of(self, info: ResourceInfo, obj: Object) -> Object:
        """An object's Scale."""
        spec_path, status_path, selector_path = self._paths(info)
        metadata = {
            name: obj["metadata"][name]
            for name in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
            if name in obj["metadata"]
        }
        status: Object = {"replicas": _find(obj, status_path) or 0}
        if self._objects.is_custom(info):
            selector = _find(obj, selector_path) if selector_path else ""
        else:
            wanted = (obj.get("spec") or {}).get("selector")
            if info.plural == "replicationcontrollers":
                wanted = {"matchLabels": wanted}
            selector = selectors.format_labels(wanted)
        if selector:
            status["selector"] = selector
        replicas = _find(obj, spec_path)
        return {
            "kind": "Scale",
            "apiVersion": "autoscaling/v1",
            "metadata": metadata,
            "spec": {"replicas": replicas} if replicas else {},
            "status": status,
        }

    def write(self, info: ResourceInfo, namespace: str, name: str, scale: Any, options: WriteOptions) -> Object:
        """Set the replicas from a Scale. Raises ApiError."""
        stored = self._objects.get(info, namespace, name)
        if not isinstance(scale, dict):
            raise bad_request("the object provided is unrecognized (must be of type Scale)")
        replicas = (scale.get("spec") or {}).get("replicas", 0)
        if isinstance(replicas, bool) or not isinstance(replicas, int):
            raise bad_request(
                'Scale in version "v1" cannot be handled as a Scale: json: cannot unmarshal string into Go struct '
                "field ScaleSpec.spec.replicas of type int32"
            )
        current = stored.at(info.api_version)
        obj = copy.deepcopy(current)
        spec_path = self._paths(info)[0]
        _put(obj, spec_path, replicas)
        version = (scale.get("metadata") or {}).get("resourceVersion")
        if version:
            obj["metadata"]["resourceVersion"] = version
        else:
            obj["metadata"].pop("resourceVersion", None)
        if replicas < 0 and not self._objects.is_custom(info):
            cause = invalid_value("spec.replicas", replicas, "must be greater than or equal to 0")
            raise invalid(info, name, [cause])
        return self.of(info, self._objects.replace(info, stored, obj, options, "scale"))


class Pods:
    """``binding`` and ``eviction`` of pods."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def bind(self, info: ResourceInfo, namespace: str, name: str, binding: Any, *, dry_run: bool) -> Object:
        """Bind a pod to a node. Raises ApiError."""
        stored = self._objects.get(info, namespace, name)
        target = (binding or {}).get("target") or {}
        node = target.get("name", "")
        if target.get("kind") not in (None, "", "Node"):
            cause = Cause(
                "FieldValueNotSupported",
                f'Unsupported value: "{target["kind"]}": supported values: "Node", "<empty>"',
                "target.kind",
            )
            raise invalid(info, name, [cause])
        if not node:
            raise invalid(info, name, [Cause("FieldValueRequired", "Required value", "target.name")])
        metadata = stored.obj["metadata"]
        uid = (binding.get("metadata") or {}).get("uid")
        if uid and uid != metadata["uid"]:
            raise conflict(
                info,
                name,
                f"Precondition failed: UID in precondition: {uid}, UID in object meta: {metadata['uid']}",
            )
        spec = stored.obj.get("spec") or {}
        if "deletionTimestamp" in metadata:
            raise _binding_conflict(name, f"pod {name} is being deleted, cannot be assigned to a host")
        if spec.get("nodeName"):
            raise _binding_conflict(name, f'pod {name} is already assigned to node "{spec["nodeName"]}"')
        if spec.get("schedulingGates"):
            raise _binding_conflict(name, f"pod {name} has non-empty .spec.schedulingGates")
        annotations = (binding.get("metadata") or {}).get("annotations") or {}
        now = self._objects.timestamp()

        def change(obj: Object) -> Object:
            obj["spec"]["nodeName"] = node
            if annotations:
                obj["metadata"]["annotations"] = {**(obj["metadata"].get("annotations") or {}), **annotations}
            status = obj.setdefault("status", {})
            others = [item for item in status.get("conditions") or () if item["type"] != "PodScheduled"]
            scheduled = {
                "type": "PodScheduled",
                "status": "True",
                "lastProbeTime": None,
                "lastTransitionTime": now,
            }
            status["conditions"] = [*others, scheduled]
            return obj

        if not dry_run:
            self._objects.change(info, namespace, name, change, None)
        return success(code=201)

    def evict(self, info: ResourceInfo, namespace: str, name: str, eviction: Any, *, dry_run: bool) -> Object:
        """Delete a pod unless a PodDisruptionBudget forbids it (429). Raises ApiError."""
        stored = self._objects.get(info, namespace, name)
        options = (eviction or {}).get("deleteOptions") or {}
        phase = (stored.obj.get("status") or {}).get("phase")
        budgets = [
            item.obj
            for item in self._objects.store.items(("policy", "poddisruptionbudgets"), namespace)
            if _selects(item.obj, stored.obj)
        ]
        if budgets and phase not in ("Succeeded", "Failed") and "deletionTimestamp" not in stored.obj["metadata"]:
            if len(budgets) > 1:
                raise ApiError(
                    500,
                    "InternalError",
                    "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
                )
            self._disrupt(budgets[0], dry_run=dry_run)
        parsed = DeleteOptions.parse(options, {}, ["All"] if dry_run else [])
        self._objects.delete(info, namespace, name, parsed)
        return success(code=201)

    def _disrupt(self, budget: Object, *, dry_run: bool) -> None:
        status = budget.get("status") or {}
        name = budget["metadata"]["name"]
        if int(status.get("disruptionsAllowed", 0)) <= 0:
            needed, healthy = status.get("desiredHealthy", 0), status.get("currentHealthy", 0)
            message = f"The disruption budget {name} needs {needed} healthy pods and has {healthy} currently"
            raise ApiError(
                429,
                "TooManyRequests",
                "Cannot evict pod as it would violate the pod's disruption budget.",
                {"causes": [{"reason": "DisruptionBudget", "message": message}]},
            )
        info = self._objects.registry.by_kind("policy", "PodDisruptionBudget")
        if info is None or dry_run:
            return

        def change(obj: Object) -> Object:
            obj["status"]["disruptionsAllowed"] = int(obj["status"].get("disruptionsAllowed", 0)) - 1
            return obj

        self._objects.change(info, budget["metadata"]["namespace"], name, change, None)


def _selects(budget: Object, pod: Object) -> bool:
    selector = (budget.get("spec") or {}).get("selector")
    return selector is not None and selectors.matches_labels(selectors.from_object(selector), pod)


def _binding_conflict(name: str, message: str) -> ApiError:
    text = f'Operation cannot be fulfilled on pods/binding "{name}": {message}'
    return ApiError(409, "Conflict", text, {"name": name, "kind": "pods/binding"})


def request_token(
    objects: Objects, tokens: Tokens, info: ResourceInfo, namespace: str, name: str, body: Any, *, dry_run: bool
) -> Object:
    """TokenRequest for a service account. Raises ApiError."""
    account = objects.get(info, namespace, name).obj["metadata"]
    spec = (body or {}).get("spec") or {}
    seconds = spec.get("expirationSeconds") or _DEFAULT_TOKEN_SECONDS
    if seconds < _MIN_TOKEN_SECONDS:
        cause = invalid_value("spec.expirationSeconds", seconds, "may not specify a duration less than 10 minutes")
        message = f'TokenRequest.authentication.k8s.io "" is invalid: {cause.field}: {cause.message}'
        found = {"group": "authentication.k8s.io", "kind": "TokenRequest", "causes": [cause.as_json()]}
        raise ApiError(422, "Invalid", message, found)
    bound = spec.get("boundObjectRef")
    extra = _bound(objects, namespace, bound) if bound else ()
    audiences = tuple(spec.get("audiences") or (AUDIENCE,))
    now = objects.now()
    expires = datetime.fromtimestamp(now.timestamp() + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    token = "" if dry_run else tokens.issue(namespace, name, account["uid"], audiences, seconds, extra)
    return {
        "kind": "TokenRequest",
        "apiVersion": "authentication.k8s.io/v1",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": account["uid"],
            "creationTimestamp": objects.timestamp(),
        },
        "spec": {"audiences": list(audiences), "expirationSeconds": seconds, "boundObjectRef": bound or None},
        "status": {"token": token, "expirationTimestamp": expires},
    }


def _bound(objects: Objects, namespace: str, bound: Any) -> tuple[tuple[str, str], ...]:
    """What a token tells of the Pod or Node that it is bound to. Raises ApiError (404)."""
    kind, name = str(bound.get("kind", "")), str(bound.get("name", ""))
    places = {"Pod": ("pods", PODS, namespace), "Node": ("nodes", NODES, "")}
    if kind not in places:
        return ()
    plural, storage, where = places[kind]
    info = objects.registry.lookup("", "v1", plural)
    stored = objects.store.get(storage, (where, name))
    if stored is None:
        if info is None:
            raise LookupError(plural)
        raise not_found(info, name)
    node = objects.store.get(NODES, ("", (stored.obj.get("spec") or {}).get("nodeName", "")))
    return bound_to(kind, stored.obj["metadata"], node.obj["metadata"] if node else None)


def _reviewed(spec: Any) -> Attributes:
    """What an access review asks for."""
    resource, path = spec.get("resourceAttributes"), spec.get("nonResourceAttributes")
    if resource is None:
        return Attributes(str(path.get("verb", "")), path=str(path.get("path", "")))
    fields = ("verb", "group", "resource", "subresource", "namespace", "name")
    return Attributes(**{name: str(resource.get(name) or "") for name in fields})


def review(info: ResourceInfo, body: Any, user: User, tokens: Tokens, authorizer: Authorizer, now: str) -> Object:
    """The kinds that are answered and not kept: access, token and self reviews. Raises ApiError."""
    body = body or {}
    spec = body.get("spec") or {}
    found: Object = {"kind": info.kind, "apiVersion": info.api_version, "metadata": {}, "spec": spec}
    match info.kind:
        case "SelfSubjectAccessReview" | "SubjectAccessReview" | "LocalSubjectAccessReview":
            if ("resourceAttributes" in spec) == ("nonResourceAttributes" in spec):
                cause = invalid_value(
                    "spec.resourceAttributes",
                    None,
                    "exactly one of nonResourceAttributes or resourceAttributes must be specified",
                )
                message = f'.{info.group} "" is invalid: {cause.field}: {cause.message}'
                causes = [cause.as_json()]
                raise ApiError(422, "Invalid", message, {"group": info.group, "causes": causes})
            if info.kind != "SelfSubjectAccessReview":
                user = User(str(spec.get("user") or ""), groups=tuple(spec.get("groups") or ()))
            decision = authorizer.decide(user, _reviewed(spec))
            found["status"] = {"allowed": decision.allowed}
            if decision.reason:
                found["status"]["reason"] = decision.reason
        case "SelfSubjectRulesReview":
            found["spec"] = {}
            rules = [dict(rule) for rule in authorizer.rules(user, str(spec.get("namespace") or ""))]
            found["status"] = {
                "resourceRules": [rule for rule in rules if "resources" in rule],
                "nonResourceRules": [rule for rule in rules if "nonResourceURLs" in rule],
                "incomplete": False,
            }
        case "SelfSubjectReview":
            del found["spec"]
            found["metadata"] = {"creationTimestamp": now}
            found["status"] = {"userInfo": user.as_json()}
        case "TokenReview":
            known = tokens.lookup(str(spec.get("token", "")))
            if known is None:
                found["status"] = {"user": {}, "error": "invalid bearer token"}
            else:
                found["status"] = {
                    "authenticated": True,
                    "user": known[0].as_json(),
                    "audiences": list(known[1]),
                }
        case _:
            raise ApiError(404, "NotFound", "the server could not find the requested resource", details(info))
    return found
