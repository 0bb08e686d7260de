"""What a request asks for: its resource, verb and options, and the representation it accepts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote

from vmnet.lab.apiserver.status import (
    ApiError,
    Cause,
    bad_request,
    invalid_options,
    not_allowed,
    required,
    unsupported,
)

_NAMESPACE_SUBRESOURCES: Final = ("status", "finalize")


@dataclass(frozen=True, slots=True)
class Target:
    """The path of a resource request. ``rest`` is what follows a subresource (``proxy/…``)."""

    group: str
    version: str
    plural: str
    namespace: str = ""
    name: str = ""
    subresource: str = ""
    rest: str = ""
    watch: bool = False


def parse_path(raw: str) -> Target | None:
    """The target of ``/api/v1/…`` or ``/apis/<group>/<version>/…``; None if the path names no resource."""
    parts = [unquote(part) for part in raw.strip("/").split("/")]
    if any("/" in part for part in parts) or "" in parts:
        return None
    if parts[0] == "api" and len(parts) >= 3:
        group, version, rest = "", parts[1], parts[2:]
    elif parts[0] == "apis" and len(parts) >= 4:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return None
    watch = rest[0] == "watch" and len(rest) > 1
    if watch:
        rest = rest[1:]
    namespace = ""
    if rest[0] == "namespaces" and len(rest) >= 3 and not (group == "" and rest[2] in _NAMESPACE_SUBRESOURCES):
        namespace, rest = rest[1], rest[2:]
    plural = rest[0]
    name = rest[1] if len(rest) > 1 else ""
    subresource = rest[2] if len(rest) > 2 else ""
    return Target(group, version, plural, namespace, name, subresource, "/".join(rest[3:]), watch)


def _boolean(query: Mapping[str, str], name: str) -> bool:
    """Go's conversion: present and neither false nor 0 is true."""
    return name in query and query[name].lower() not in ("false", "0")


def _integer(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is None or text == "":
        return None
    try:
        return int(text)
    except ValueError:
        raise bad_request(f'strconv.ParseInt: parsing "{text}": invalid syntax') from None


@dataclass(frozen=True, slots=True)
class ListOptions:
    """Options of list, watch and deletecollection."""

    labels: str = ""
    fields: str = ""
    watch: bool = False
    bookmarks: bool = False
    resource_version: str = ""
    match: str = ""
    timeout: int | None = None
    limit: int = 0
    continuation: str = ""
    send_initial_events: bool | None = None

    @classmethod
    def parse(cls, query: Mapping[str, str], *, watch: bool = False) -> "ListOptions":
        """Raises ApiError: 400 for unparsable numbers, 422 for combinations that make no sense."""
        send = _boolean(query, "sendInitialEvents") if "sendInitialEvents" in query else None
        options = cls(
            labels=query.get("labelSelector", ""),
            fields=query.get("fieldSelector", ""),
            watch=watch or _boolean(query, "watch"),
            bookmarks=_boolean(query, "allowWatchBookmarks"),
            resource_version=query.get("resourceVersion", ""),
            match=query.get("resourceVersionMatch", ""),
            timeout=_integer(query, "timeoutSeconds"),
            limit=max(_integer(query, "limit") or 0, 0),
            continuation=query.get("continue", ""),
            send_initial_events=send,
        )
        options._validate()
        return options

    def _validate(self) -> None:
        causes: list[Cause] = []
        field_name = "resourceVersionMatch"
        if self.watch:
            if self.send_initial_events is None:
                if self.match:
                    message = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided"
                    causes.append(not_allowed(field_name, message))
            elif self.match != "NotOlderThan":
                message = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
                causes.append(not_allowed(field_name, message))
                if self.match:
                    causes.append(unsupported(field_name, self.match, ["NotOlderThan"]))
        else:
            if self.match:
                if not self.resource_version:
                    message = "resourceVersionMatch is forbidden unless resourceVersion is provided"
                    causes.append(not_allowed(field_name, message))
                elif self.continuation:
                    causes.append(
                        not_allowed(field_name, "resourceVersionMatch is forbidden when continue is provided")
                    )
                if self.match not in ("Exact", "NotOlderThan"):
                    causes.append(unsupported(field_name, self.match, ["Exact", "NotOlderThan", ""]))
                elif self.match == "Exact" and self.resource_version == "0":
                    message = 'resourceVersionMatch "exact" is forbidden for resourceVersion "0"'
                    causes.append(not_allowed(field_name, message))
            if self.send_initial_events is not None:
                causes.append(not_allowed("sendInitialEvents", "sendInitialEvents is forbidden for list"))
        if causes:
            raise invalid_options("ListOptions", causes)


@dataclass(slots=True)
class WriteOptions:
    """Options of create, update and patch. ``warnings`` gathers what the answer's Warning headers will say."""

    dry_run: bool = False
    manager: str = ""
    validation: str = "Warn"
    force: bool = False
    user: str = ""
    warnings: list[str] = field(default_factory=list)
    mutations: list[Any] = field(default_factory=list)
    """Operations of RFC 6902 that admission webhooks want carried out on the object; nobody owns what they write."""

    @classmethod
    def parse(
        cls, query: Mapping[str, str], kind: str, *, dry_runs: list[str], user: str, agent: str, apply: bool = False
    ) -> "WriteOptions":
        """``kind``: CreateOptions, UpdateOptions or PatchOptions, for messages. Raises ApiError (422)."""
        causes: list[Cause] = []
        if any(item != "All" for item in dry_runs):
            causes.append(unsupported("dryRun", dry_runs, ["All"]))
        manager = query.get("fieldManager", "")
        if len(manager.encode()) > 128:
            causes.append(Cause("FieldValueTooLong", "Too long: may not be more than 128 bytes", "fieldManager"))
        validation = query.get("fieldValidation", "")
        if validation not in ("", "Ignore", "Strict", "Warn"):
            causes.append(unsupported("fieldValidation", validation, ["", "Ignore", "Strict", "Warn"]))
        if apply and not manager:
            causes.append(required("fieldManager", "is required for apply patch"))
        if "force" in query and not apply and kind == "PatchOptions":
            causes.append(not_allowed("force", "may not be specified for non-apply patch"))
        if causes:
            raise invalid_options(kind, causes)
        return cls(
            dry_run=bool(dry_runs),
            manager=manager or agent.split("/", 1)[0][:128],
            validation=validation or "Warn",
            force=_boolean(query, "force"),
            user=user,
        )


PROPAGATION: Final = ("Foreground", "Background", "Orphan")


@dataclass(frozen=True, slots=True)
class DeleteOptions:
    """Options of delete, from the body and the query."""

    grace: int | None = None
    propagation: str = ""
    uid: str = ""
    resource_version: str = ""
    dry_run: bool = False

    @classmethod
    def parse(cls, body: Mapping[str, object] | None, query: Mapping[str, str], dry_runs: list[str]) -> "DeleteOptions":
        """Raises ApiError (422)."""
        body = body or {}
        in_body = body.get("dryRun")
        dry = [*dry_runs, *(in_body if isinstance(in_body, list) else [])]
        preconditions = body.get("preconditions")
        conditions = preconditions if isinstance(preconditions, Mapping) else {}
        propagation = str(body.get("propagationPolicy") or query.get("propagationPolicy") or "")
        causes: list[Cause] = []
        orphan = body.get("orphanDependents")
        if orphan is None and "orphanDependents" in query:
            orphan = _boolean(query, "orphanDependents")
        if orphan is not None and propagation:
            message = "orphanDependents and deletionPropagation cannot be both set"
            causes.append(Cause("FieldValueInvalid", f'Invalid value: "{propagation}": {message}', "propagationPolicy"))
        elif propagation and propagation not in PROPAGATION:
            causes.append(unsupported("propagationPolicy", propagation, [*PROPAGATION, "nil"]))
        if any(item != "All" for item in dry):
            causes.append(unsupported("dryRun", dry, ["All"]))
        if causes:
            raise invalid_options("DeleteOptions", causes)
        grace = body.get("gracePeriodSeconds")
        if not isinstance(grace, int):
            grace = _integer(query, "gracePeriodSeconds")
        if orphan is not None:
            propagation = "Orphan" if orphan else "Background"
        return cls(
            grace=grace,
            propagation=propagation,
            uid=str(conditions.get("uid") or ""),
            resource_version=str(conditions.get("resourceVersion") or ""),
            dry_run=bool(dry),
        )


@dataclass(frozen=True, slots=True)
class Representation:
    """How to answer: ``media`` is ``json`` or ``yaml``; ``form`` empty, ``Table`` or ``PartialObjectMetadata``."""

    media: str = "json"
    form: str = ""
    version: str = "v1"

    @property
    def content_type(self) -> str:
        """The Content-Type of the answer."""
        return "application/yaml" if self.media == "yaml" else "application/json"


_MEDIA: Final = {
    "application/json": "json",
    "application/*": "json",
    "*/*": "json",
    "application/yaml": "yaml",
    # Typed clients ask for protobuf first and take JSON as well; what only asks for protobuf gets JSON too.
    "application/vnd.kubernetes.protobuf": "json",
}
_FORMS: Final = {
    "Table": "Table",
    "PartialObjectMetadata": "PartialObjectMetadata",
    "PartialObjectMetadataList": "PartialObjectMetadata",
}
_OFFERED: Final = "application/json, application/yaml, application/vnd.kubernetes.protobuf"


def negotiate(accept: str) -> Representation:
    """Choose a representation. Raises ApiError (406)."""
    if not accept:
        return Representation()
    clauses: list[tuple[float, int, str, dict[str, str]]] = []
    for position, clause in enumerate(accept.split(",")):
        media, *pairs = (part.strip() for part in clause.split(";"))
        parameters = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        try:
            quality = float(parameters.get("q", "1"))
        except ValueError:
            quality = 0.0
        clauses.append((-quality, position, media, parameters))
    known = False
    for _, _, media, parameters in sorted(clauses, key=lambda clause: clause[:2]):
        kind = _MEDIA.get(media)
        if kind is None:
            continue
        known = True
        wanted = parameters.get("as")
        if wanted is None:
            return Representation(kind)
        if wanted in _FORMS and parameters.get("g") == "meta.k8s.io" and parameters.get("v") in ("v1", "v1beta1"):
            return Representation(kind, _FORMS[wanted], parameters["v"])
    if known:
        raise ApiError(406, "NotAcceptable", f"only the following media types are accepted: {_OFFERED}")
    message = f"406: Not Acceptable\n\nAvailable representations: {_OFFERED}"
    raise ApiError(406, "NotAcceptable", message, {})
