"""Error answers: a ``Status`` object with the reason, details and causes that clients branch on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vmnet.lab.apiserver.resources import ResourceInfo


@dataclass(frozen=True, slots=True)
class Cause:
    """One entry of ``details.causes``: ``reason`` as FieldValueInvalid, ``message`` without the field's name."""

    reason: str
    message: str
    field: str

    def as_json(self) -> dict[str, str]:
        """As it stands in a Status."""
        found = {"reason": self.reason, "message": self.message, "field": self.field}
        return {key: value for key, value in found.items() if value}


class ApiError(Exception):
    """An answer that is an error. ``status`` is the Status object; ``headers`` go with it."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        details: dict[str, Any] | None = None,
        *,
        metadata: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.headers = headers or {}
        self.status: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": metadata or {},
            "status": "Failure",
            "message": message,
        }
        if reason:
            self.status["reason"] = reason
        if details is not None:
            self.status["details"] = details
        self.status["code"] = code


class PlainNotFound(Exception):
    """The bare ``404 page not found`` of an unknown group or path."""


def details(info: ResourceInfo, name: str = "", **more: object) -> dict[str, Any]:
    """Details that name a resource (plural)."""
    found: dict[str, Any] = {}
    if name:
        found["name"] = name
    if info.group:
        found["group"] = info.group
    found["kind"] = info.plural
    found.update(more)
    return found


def kind_details(info: ResourceInfo, name: str, causes: Sequence[Cause] = ()) -> dict[str, Any]:
    """Details that name a kind, as validation errors do."""
    found: dict[str, Any] = {}
    if name:
        found["name"] = name
    if info.group:
        found["group"] = info.group
    found["kind"] = info.kind
    if causes:
        found["causes"] = [cause.as_json() for cause in causes]
    return found


def qualified_kind(info: ResourceInfo) -> str:
    """``Kind.group``, or ``Kind`` for core kinds: how validation errors name an object's type."""
    return f"{info.kind}.{info.group}" if info.group else info.kind


def bad_request(message: str) -> ApiError:
    """400."""
    return ApiError(400, "BadRequest", message)


def internal(message: str) -> ApiError:
    """500 with no reason: what the real server answers where an error reached it untyped."""
    return ApiError(500, "", message)


def unknown_resource() -> ApiError:
    """404 for a resource or version that is not served in a group that is."""
    return ApiError(404, "NotFound", "the server could not find the requested resource", {})


def not_found(info: ResourceInfo, name: str) -> ApiError:
    """404 for an object."""
    return ApiError(404, "NotFound", f'{info.qualified_name} "{name}" not found', details(info, name))


def already_exists(info: ResourceInfo, name: str, *, being_deleted: bool = False) -> ApiError:
    """409 for a name that is taken."""
    prefix = "object is being deleted: " if being_deleted else ""
    message = f'{prefix}{info.qualified_name} "{name}" already exists'
    return ApiError(409, "AlreadyExists", message, details(info, name))


def conflict(info: ResourceInfo, name: str, message: str = "") -> ApiError:
    """409 for a stale resourceVersion, or for what ``message`` says."""
    message = message or "the object has been modified; please apply your changes to the latest version and try again"
    text = f'Operation cannot be fulfilled on {info.qualified_name} "{name}": {message}'
    return ApiError(409, "Conflict", text, details(info, name))


def precondition_failed(info: ResourceInfo, name: str, message: str) -> ApiError:
    """409 for a delete precondition: it names the kind, not the resource."""
    text = f'Operation cannot be fulfilled on {qualified_kind(info)} "{name}": {message}'
    return ApiError(409, "Conflict", text, kind_details(info, name))


def forbidden(info: ResourceInfo, name: str, message: str, **more: object) -> ApiError:
    """403 for an object or collection."""
    subject = f'{info.qualified_name} "{name}"' if name else info.qualified_name
    return ApiError(403, "Forbidden", f"{subject} is forbidden: {message}", details(info, name, **more))


def method_not_allowed() -> ApiError:
    """405."""
    message = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", message, {})


def cause_text(causes: Sequence[Cause]) -> str:
    """Causes as one line: bare when there is one, in brackets when there are several."""
    unique = list(dict.fromkeys(f"{cause.field}: {cause.message}" for cause in causes))
    return unique[0] if len(unique) == 1 else f"[{', '.join(unique)}]"


def invalid(info: ResourceInfo, name: str, causes: Sequence[Cause]) -> ApiError:
    """422 with one cause per error."""
    message = f'{qualified_kind(info)} "{name}" is invalid: {cause_text(causes)}'
    return ApiError(422, "Invalid", message, kind_details(info, name, causes))


def invalid_options(kind: str, causes: Sequence[Cause]) -> ApiError:
    """422 for request options (CreateOptions, ListOptions, …)."""
    message = f'{kind}.meta.k8s.io "" is invalid: {cause_text(causes)}'
    found = {"group": "meta.k8s.io", "kind": kind, "causes": [cause.as_json() for cause in causes]}
    return ApiError(422, "Invalid", message, found)


def invalid_patch(obj: object, message: str) -> ApiError:
    """422 for a patch whose result is not an object of the kind."""
    text = f"Invalid value: {json.dumps(json.dumps(obj, separators=(',', ':'), ensure_ascii=False))}: {message}"
    causes = [Cause("FieldValueInvalid", text, "patch").as_json()]
    return ApiError(422, "Invalid", f' "" is invalid: patch: {text}', {"causes": causes})


def too_large_version(wanted: int, current: int) -> ApiError:
    """504 for a resourceVersion that is not reached in time."""
    found = {
        "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
        "retryAfterSeconds": 1,
    }
    message = f"Timeout: Too large resource version: {wanted}, current: {current}"
    return ApiError(504, "Timeout", message, found, headers={"Retry-After": "1"})


def success(info: ResourceInfo | None = None, name: str = "", uid: str = "", code: int | None = None) -> dict[str, Any]:
    """A Status that says Success."""
    found: dict[str, Any] = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
    if info is not None:
        found["details"] = details(info, name, uid=uid)
    if code is not None:
        found["code"] = code
    return found


def required(field: str, message: str = "") -> Cause:
    """A value is missing."""
    return Cause("FieldValueRequired", f"Required value: {message}" if message else "Required value", field)


def invalid_value(field: str, value: object, message: str) -> Cause:
    """A value is wrong."""
    return Cause("FieldValueInvalid", f"Invalid value: {show(value)}: {message}", field)


def unsupported(field: str, value: object, supported: Sequence[str]) -> Cause:
    """A value is not of the allowed ones."""
    allowed = ", ".join(json.dumps(item) for item in supported)
    return Cause("FieldValueNotSupported", f"Unsupported value: {show(value)}: supported values: {allowed}", field)


def not_allowed(field: str, message: str) -> Cause:
    """A value is forbidden here."""
    return Cause("FieldValueForbidden", f"Forbidden: {message}", field)


def duplicate(field: str, value: object) -> Cause:
    """A value stands twice."""
    return Cause("FieldValueDuplicate", f"Duplicate value: {show(value)}", field)


def show(value: object) -> str:
    """A value as messages show it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
