"""Between the API's bytes and values: Status bodies to errors, watch lines to events, times to text. Pure."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from vmnet.kube.api import (
    AlreadyExists,
    Conflict,
    EventType,
    Expired,
    Forbidden,
    Invalid,
    KubeError,
    NotFound,
    Object,
    Resource,
    Unavailable,
    WatchEvent,
)

_BY_CODE: dict[int, type[KubeError]] = {
    400: Invalid,
    401: Forbidden,
    403: Forbidden,
    404: NotFound,
    405: Invalid,
    409: Conflict,
    410: Expired,
    413: Invalid,
    415: Invalid,
    422: Invalid,
    429: Unavailable,
}


def error_of(code: int, status: Mapping[str, Any] | None, text: str = "") -> KubeError:
    """The error that an HTTP code and its Status object (or, from a proxy, its plain ``text``) stand for."""
    kind = _BY_CODE.get(code, Unavailable if code >= 500 else KubeError)
    if kind is Conflict and status and status.get("reason") == "AlreadyExists":
        kind = AlreadyExists
    message = str((status or {}).get("message") or text.strip()[:500] or "no message")
    error = kind(f"{code}: {message}", status)
    error.code = code
    return error


def decode_error(code: int, body: bytes, retry_after: str | None = None) -> KubeError:
    """The error of a response: its body is a Status in JSON, or any text. ``retry_after``: the header's value."""
    try:
        status = json.loads(body)
    except ValueError:
        status = None
    if not isinstance(status, dict) or status.get("kind") != "Status":
        status = None
    error = error_of(code, status, body.decode(errors="replace"))
    if retry_after and retry_after.isdecimal():
        details = error.status.get("details")
        error.status["details"] = {"retryAfterSeconds": int(retry_after)} | (details if details else {})
    return error


def retry_after(error: KubeError) -> float:
    """Seconds for which the server asked to be left alone; 0 when it did not."""
    details = error.status.get("details")
    seconds = details.get("retryAfterSeconds") if isinstance(details, dict) else None
    return float(seconds) if isinstance(seconds, int | float) else 0.0


def decode_object(body: bytes) -> Object:
    """A response body that must be a JSON object. Raises Unavailable: whoever sent this was not the API."""
    try:
        value = json.loads(body)
    except ValueError as error:
        raise Unavailable(f"the answer is not JSON: {body[:80]!r}") from error
    if not isinstance(value, dict):
        raise Unavailable(f"the answer is not an object: {body[:80]!r}")
    return value


def named(item: Object, resource: Resource) -> Object:
    """List items come without ``apiVersion`` and ``kind``: fill them in."""
    item.setdefault("apiVersion", resource.api_version)
    item.setdefault("kind", resource.kind)
    return item


def decode_event(line: bytes, resource: Resource) -> WatchEvent:
    """One line of a watch. Raises the error that an ERROR event carries, Unavailable for what is no event at all."""
    value = decode_object(line)
    item = value.get("object")
    if not isinstance(item, dict):
        # Some proxies answer 200 and put a Status, or their own error, where events should be.
        if value.get("kind") == "Status":
            raise error_of(int(value.get("code") or 500), value)
        raise Unavailable(f"not a watch event: {line[:80]!r}")
    if value.get("type") == "ERROR":
        raise error_of(int(item.get("code") or 500), item)
    try:
        kind = EventType(str(value.get("type")))
    except ValueError as error:
        raise Unavailable(f"unknown watch event type {value.get('type')!r}") from error
    return WatchEvent(kind, named(item, resource))


def encode_time(moment: datetime) -> str:
    """``metav1.Time``: whole seconds, UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def encode_micro_time(moment: datetime) -> str:
    """``metav1.MicroTime``: microseconds, UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def decode_time(text: str) -> datetime:
    """Either of them. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
