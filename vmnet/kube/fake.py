"""A stateful API in memory, for tests: what the product's code can observe of a real one.

Kept: resourceVersions and conflicts, uids, generations, generateName, finalizers and deletionTimestamp, preconditions,
status as a subresource of its own, merge and JSON patches, label and field selectors, watches with replay and expiry.
Not kept: schemas, defaulting, admission, ownership of fields (an APPLY merges), garbage collection of dependents.
"""

import asyncio
import copy
import json
import random
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from vmnet.kube import api
from vmnet.kube.api import (
    CERTIFICATE_REQUESTS,
    AlreadyExists,
    Conflict,
    EventType,
    Expired,
    Handler,
    Informer,
    Invalid,
    Kube,
    KubeError,
    NotFound,
    Object,
    ObjectList,
    PatchType,
    Resource,
    Unavailable,
    WatchEvent,
    object_key,
)
from vmnet.kube.codec import encode_time

_WITHOUT_STATUS: Final = {api.EVENTS, api.LEASES, api.ENDPOINT_SLICES, api.NADS}
_ALPHABET: Final = "bcdfghjklmnpqrstvwxz2456789"
_SET_REQUIREMENT: Final = re.compile(r"^\s*(?P<key>[\w./-]+)\s+(?P<op>in|notin)\s+\((?P<values>[^)]*)\)\s*$")

Fail = Callable[[str, Resource, str], KubeError | None]
"""Called with (verb, resource, name) before every call; an error it returns is raised instead."""


@dataclass(frozen=True, slots=True)
class _Change:
    version: int
    type: EventType
    resource: Resource
    before: Object | None
    after: Object


class FakeKube(Kube):
    """Share one among the parts of a test; ``seed`` and ``vanish`` act as other components would."""

    def __init__(self, *, fail: Fail | None = None, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.fail = fail
        self.calls: list[tuple[str, str]] = []
        """(verb, path) of every call, oldest first."""
        self.unserved: set[Resource] = set()
        """Resources that answer 404, as if their CRD were not installed."""
        self._now = now
        self._version = 0
        self._objects: dict[Resource, dict[str, Object]] = {}
        self._history: list[_Change] = []
        self._oldest = 0
        self._wakers: set[asyncio.Event] = set()
        self._epoch = 0
        self._bookmark = 0
        self._random = random.Random(7)  # noqa: S311

    # What other components do.

    def seed(self, resource: Resource, item: Object) -> Object:
        """Store exactly this (status included), as another component would: creates or replaces."""
        body = copy.deepcopy(item)
        metadata = body.setdefault("metadata", {})
        before = self._of(resource).get(object_key(body))
        metadata.setdefault("uid", before["metadata"]["uid"] if before else self._uid())
        return copy.deepcopy(self._store(resource, body, before))

    def vanish(self, resource: Resource, name: str, namespace: str | None = None) -> None:
        """Remove an object at once, whatever its finalizers say."""
        self._remove(resource, self._existing(resource, name, namespace))

    def peek(self, resource: Resource, name: str, namespace: str | None = None) -> Object | None:
        """The stored object, or None; is no call."""
        found = self._of(resource).get(_key(resource, name, namespace))
        return copy.deepcopy(found) if found is not None else None

    def compact(self) -> None:
        """Forget the history: a watch from an older version is Expired. Running watches go on."""
        self._history.clear()
        self._oldest = self._version

    def end_watches(self) -> None:
        """End every watch as a server does at its time limit."""
        self._epoch += 1
        self._wake()

    def bookmark(self) -> None:
        """Send a bookmark on every watch."""
        self._bookmark += 1
        self._wake()

    # The API.

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        """One object."""
        self._call("get", resource, name, namespace)
        return copy.deepcopy(self._existing(resource, name, namespace))

    async def list(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> ObjectList:
        """All objects, by key."""
        self._call("list", resource, "", namespace)
        match = _selector(namespace, labels, fields)
        found = [copy.deepcopy(item) for _, item in sorted(self._of(resource).items()) if match(item)]
        return ObjectList(tuple(found), str(self._version))

    async def create(self, resource: Resource, body: Object, namespace: str | None = None) -> Object:
        """POST."""
        item = copy.deepcopy(body)
        metadata = item.setdefault("metadata", {})
        if namespace and resource.namespaced and metadata.setdefault("namespace", namespace) != namespace:
            raise Invalid("400: the namespace of the object does not match the request's")
        if resource.namespaced and not metadata.get("namespace"):
            raise Invalid("400: an empty namespace may not be set during creation")
        if not metadata.get("name"):
            if not metadata.get("generateName"):
                raise Invalid("422: metadata.name: Required value: name or generateName is required")
            metadata["name"] = metadata["generateName"] + "".join(self._random.choices(_ALPHABET, k=5))
        self._call("create", resource, metadata["name"], metadata.get("namespace"))
        if metadata.get("resourceVersion"):
            raise Invalid("400: resourceVersion should not be set on objects to be created")
        if object_key(item) in self._of(resource):
            raise AlreadyExists(
                f'409: {resource.plural} "{metadata["name"]}" already exists',
                {"kind": "Status", "code": 409, "reason": "AlreadyExists"},
            )
        if resource not in _WITHOUT_STATUS:
            item.pop("status", None)
        metadata.pop("deletionTimestamp", None)
        metadata["uid"] = self._uid()
        return copy.deepcopy(self._store(resource, item, None))

    async def replace(self, resource: Resource, body: Object, *, subresource: str | None = None) -> Object:
        """PUT."""
        metadata = body["metadata"]
        self._call("replace", resource, metadata["name"], metadata.get("namespace"))
        before = self._existing(resource, metadata["name"], metadata.get("namespace"))
        self._check(resource, before, metadata)
        return self._update(resource, before, copy.deepcopy(body), subresource)

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
        """PATCH. STRATEGIC acts like MERGE, APPLY like MERGE that creates."""
        self._call("patch", resource, name, namespace)
        wanted = copy.deepcopy(body)
        key = _key(resource, name, namespace)
        if type is PatchType.APPLY:
            if not field_manager:
                raise Invalid("400: PatchOptions: fieldManager: Required value: is required for apply patch")
            if key not in self._of(resource) and isinstance(wanted, dict):
                wanted.setdefault("metadata", {})["name"] = name
                return await self.create(resource, wanted, namespace)
        before = self._existing(resource, name, namespace)
        if type is PatchType.JSON:
            if not isinstance(wanted, list):
                raise Invalid("400: a JSON patch is a list of operations")
            after = _json_patch(copy.deepcopy(before), wanted)
        else:
            if not isinstance(wanted, dict):
                raise Invalid("400: a merge patch is an object")
            self._check(resource, before, wanted.get("metadata") or {})
            after = _merge(copy.deepcopy(before), wanted)
        return self._update(resource, before, after, subresource)

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        uid: str | None = None,
        grace_seconds: int | None = None,
    ) -> None:
        """DELETE: at once, or with finalizers a deletionTimestamp."""
        self._call("delete", resource, name, namespace)
        before = self._existing(resource, name, namespace)
        if uid is not None and before["metadata"]["uid"] != uid:
            raise Conflict(f"409: the uid in the precondition is {uid}, the object's is {before['metadata']['uid']}")
        if not before["metadata"].get("finalizers"):
            self._remove(resource, before)
        elif not before["metadata"].get("deletionTimestamp"):
            after = copy.deepcopy(before)
            after["metadata"]["deletionTimestamp"] = encode_time(self._now())
            after["metadata"]["deletionGracePeriodSeconds"] = grace_seconds or 0
            self._store(resource, after, before)

    async def watch(
        self,
        resource: Resource,
        resource_version: str,
        namespace: str | None = None,
        *,
        labels: str = "",
        fields: str = "",
    ) -> AsyncIterator[WatchEvent]:
        """Replay from ``resource_version``, then follow until ``end_watches`` or ``close``."""
        self._call("watch", resource, "", namespace)
        match = _selector(namespace, labels, fields)
        at = int(resource_version or self._version)
        if at < self._oldest:
            raise Expired(f"410: too old resource version: {at} ({self._oldest})")
        waker = asyncio.Event()
        self._wakers.add(waker)
        epoch, bookmark = self._epoch, self._bookmark
        try:
            while True:
                waker.clear()
                for change in [change for change in self._history if change.version > at]:
                    at = change.version
                    if change.resource == resource and (event := _seen(change, match)) is not None:
                        yield event
                if self._bookmark != bookmark:
                    bookmark, at = self._bookmark, self._version
                    marker = {"apiVersion": resource.api_version, "kind": resource.kind}
                    yield WatchEvent(EventType.BOOKMARK, marker | {"metadata": {"resourceVersion": str(at)}})
                if self._epoch != epoch:
                    return
                if self.fail is not None and (error := self.fail("watching", resource, "")) is not None:
                    raise error
                await waker.wait()
                if resource in self.unserved:
                    return
        finally:
            self._wakers.discard(waker)

    async def close(self) -> None:
        """End the watches; the objects stay."""
        self.end_watches()

    def interrupt(self) -> None:
        """Let running watches ask ``fail`` (verb ``watching``) whether they break."""
        self._wake()

    def _call(self, verb: str, resource: Resource, name: str, namespace: str | None) -> None:
        self.calls.append((verb, resource.path(namespace, name or None)))
        if self.fail is not None and (error := self.fail(verb, resource, name)) is not None:
            raise error
        if resource in self.unserved:
            raise NotFound("404: the server could not find the requested resource")

    def _of(self, resource: Resource) -> dict[str, Object]:
        return self._objects.setdefault(resource, {})

    def _existing(self, resource: Resource, name: str, namespace: str | None) -> Object:
        found = self._of(resource).get(_key(resource, name, namespace))
        if found is None:
            raise NotFound(f'404: {resource.plural} "{name}" not found')
        return found

    def _check(self, resource: Resource, before: Object, wanted: Object) -> None:
        version = wanted.get("resourceVersion")
        if version and version != before["metadata"]["resourceVersion"]:
            raise Conflict(f"409: {resource.plural} {wanted.get('name')}: the object has been modified")
        if wanted.get("uid") and wanted["uid"] != before["metadata"]["uid"]:
            raise Conflict(f"409: {resource.plural} {wanted.get('name')}: another object of that name")

    def _update(self, resource: Resource, before: Object, after: Object, subresource: str | None) -> Object:
        """Keep what this way of writing must not touch; store if anything changed."""
        old, new = before["metadata"], after.setdefault("metadata", {})
        for key in ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "generation"):
            if key in old:
                new[key] = old[key]
            else:
                new.pop(key, None)
        new["resourceVersion"] = old["resourceVersion"]
        if subresource == "status" or (subresource == "approval" and resource == CERTIFICATE_REQUESTS):
            if resource in _WITHOUT_STATUS:
                raise NotFound("404: the server could not find the requested resource")
            kept = {key: value for key, value in before.items() if key != "status"}
            after = kept | ({"status": after["status"]} if "status" in after else {})
        elif subresource is not None:
            raise NotFound(f"404: the fake has no subresource {subresource}")
        elif resource not in _WITHOUT_STATUS:
            after.pop("status", None)
            if "status" in before:
                after["status"] = before["status"]
        if new.get("deletionTimestamp") and not after["metadata"].get("finalizers"):
            self._remove(resource, after)
            return copy.deepcopy(after)
        if after == before:
            return copy.deepcopy(before)
        return copy.deepcopy(self._store(resource, copy.deepcopy(after), before))

    def _store(self, resource: Resource, item: Object, before: Object | None) -> Object:
        self._version += 1
        metadata = item["metadata"]
        item.setdefault("apiVersion", resource.api_version)
        item.setdefault("kind", resource.kind)
        metadata.setdefault("creationTimestamp", encode_time(self._now()))
        metadata["resourceVersion"] = str(self._version)
        old = before["metadata"].get("generation", 1) if before else 0
        same = before is not None and _desired(before) == _desired(item)
        metadata["generation"] = old if same else old + 1
        self._of(resource)[object_key(item)] = item
        kind = EventType.MODIFIED if before is not None else EventType.ADDED
        self._record(_Change(self._version, kind, resource, before, item))
        return item

    def _remove(self, resource: Resource, item: Object) -> None:
        self._version += 1
        before = self._of(resource).pop(object_key(item))
        last = copy.deepcopy(item)
        last["metadata"]["resourceVersion"] = str(self._version)
        self._record(_Change(self._version, EventType.DELETED, resource, before, last))

    def _record(self, change: _Change) -> None:
        self._history.append(change)
        self._wake()

    def _wake(self) -> None:
        for waker in self._wakers:
            waker.set()

    def _uid(self) -> str:
        digits = f"{self._random.getrandbits(128):032x}"
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def refuse(*verbs: str, resource: Resource | None = None, error: KubeError | None = None) -> Fail:
    """A ``fail`` hook: these verbs (all, when none is named) on this resource (or any) raise ``error``."""

    def fail(verb: str, asked: Resource, _: str) -> KubeError | None:
        if (not verbs or verb in verbs) and (resource is None or asked == resource):
            return error or Unavailable("503: refused by the test")
        return None

    return fail


def _key(resource: Resource, name: str, namespace: str | None) -> str:
    return f"{namespace}/{name}" if namespace and resource.namespaced else name


def _desired(item: Object) -> Object:
    return {key: value for key, value in item.items() if key not in ("metadata", "status")}


def _seen(change: _Change, match: Callable[[Object], bool]) -> WatchEvent | None:
    """The event that a watch with this selector gets: an object that enters or leaves it is added or deleted."""
    was = change.before is not None and match(change.before)
    now = change.type is not EventType.DELETED and match(change.after)
    if not was and not now:
        return None
    kind = EventType.MODIFIED if was and now else EventType.ADDED if now else EventType.DELETED
    return WatchEvent(kind, copy.deepcopy(change.after))


def _merge(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = target if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge(result.get(key), value)
    return result


def _json_patch(target: Any, operations: list[Any]) -> Any:
    """RFC 6902: add, remove, replace, test. Raises Invalid."""
    for operation in operations:
        path = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        if not path:
            raise Invalid("422: the fake patches no whole documents")
        parent: Any = target
        try:
            for part in path[:-1]:
                parent = parent[int(part)] if isinstance(parent, list) else parent[part]
            _operate(parent, path[-1], operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise Invalid(f"422: cannot {operation['op']} {operation['path']}: {error!r}") from error
    return target


def _operate(parent: Any, last: str, operation: Any) -> None:
    op, value = operation["op"], copy.deepcopy(operation.get("value"))
    key: Any = last
    if isinstance(parent, list):
        key = len(parent) if last == "-" else int(last)
    if op == "add" and isinstance(parent, list):
        if key > len(parent):
            raise IndexError(key)
        parent.insert(key, value)
    elif op == "add":
        parent[key] = value
    elif op == "remove":
        del parent[key]
    elif op == "replace":
        parent[key]  # must be there
        parent[key] = value
    elif op == "test":
        if json.dumps(parent[key], sort_keys=True) != json.dumps(value, sort_keys=True):
            raise ValueError(f"{parent[key]!r} is not {value!r}")
    else:
        raise ValueError(f"unknown operation {op!r}")


def _selector(namespace: str | None, labels: str, fields: str) -> Callable[[Object], bool]:
    """Whether an object is in the collection that namespace and selectors describe."""
    label_tests = [_label_test(part) for part in re.split(r",(?![^(]*\))", labels) if part.strip()]
    field_tests = [_field_test(part) for part in fields.split(",") if part.strip()]

    def match(item: Object) -> bool:
        metadata = item["metadata"]
        if namespace and metadata.get("namespace") != namespace:
            return False
        own = metadata.get("labels") or {}
        return all(test(own) for test in label_tests) and all(test(item) for test in field_tests)

    return match


def _label_test(text: str) -> Callable[[dict[str, str]], bool]:
    found = _SET_REQUIREMENT.match(text)
    if found:
        key, values = found["key"], {value.strip() for value in found["values"].split(",")}
        return (lambda own: own.get(key) in values) if found["op"] == "in" else (lambda own: own.get(key) not in values)
    if "!=" in text:
        left, right = (part.strip() for part in text.split("!=", 1))
        return lambda own: own.get(left) != right
    if "=" in text:
        left, right = (part.strip() for part in re.split("==?", text, maxsplit=1))
        return lambda own: own.get(left) == right
    name = text.strip()
    return (lambda own: name[1:].strip() not in own) if name.startswith("!") else (lambda own: name in own)


def _field_test(text: str) -> Callable[[Object], bool]:
    equal = "!=" not in text
    left, right = (part.strip() for part in re.split("!=|==?", text, maxsplit=1))

    def test(item: Object) -> bool:
        value: Any = item
        for part in left.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return (str(value if value is not None else "") == right) is equal

    return test


class FakeInformer(Informer):
    """An ``Informer`` whose store the test writes; it is in step unless the test clears ``synced``."""

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self.synced = asyncio.Event()
        self.synced.set()
        self.failure: KubeError | None = None
        self.held: dict[str, Object] = {}
        self._handlers: list[Handler] = []

    def add_handler(self, handler: Handler) -> None:
        """See the Protocol."""
        self._handlers.append(handler)

    def get(self, key: str) -> Object | None:
        """See the Protocol."""
        return self.held.get(key)

    def items(self) -> list[Object]:
        """See the Protocol."""
        return list(self.held.values())

    async def run(self) -> None:
        """Nothing comes by itself."""
        return

    def put(self, item: Object) -> None:
        """An object that is new, or changed."""
        self._tell(self.held.get(object_key(item)), item)

    def drop(self, key: str) -> None:
        """An object that is gone. Raises KeyError when it was not there."""
        self._tell(self.held[key], None)

    def _tell(self, before: Object | None, item: Object | None) -> None:
        if item is not None:
            self.held[object_key(item)] = item
        elif before is not None:
            del self.held[object_key(before)]
        for handler in self._handlers:
            handler(before, item)
