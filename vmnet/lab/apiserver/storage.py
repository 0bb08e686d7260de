"""The objects, in memory: one growing resourceVersion, a bounded history per resource, and watchers.

Stored objects are never changed: a write puts a new dict in place. Every operation is synchronous, hence atomic.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from vmnet.lab.apiserver import events

Object = dict[str, Any]
StorageKey = tuple[str, str]
"""(group, plural)."""
Key = tuple[str, str]
"""(namespace or empty, name)."""

HISTORY: Final = 8192
"""Changes kept per resource for replay; older resourceVersions are expired (410)."""


class ChangeType(StrEnum):
    """What a write did."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"


def encode(obj: object) -> bytes:
    """Compact JSON."""
    return json.dumps(obj, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(slots=True, eq=False)
class Stored:
    """One version of one object. ``encoded`` keeps its JSON per API version, so that watchers share the bytes."""

    obj: Object
    version: int
    encoded: dict[str, bytes] = field(default_factory=dict)

    def encode(self, api_version: str) -> bytes:
        """Its JSON in a version of its group; versions differ only in ``apiVersion``."""
        found = self.encoded.get(api_version)
        if found is None:
            found = self.encoded[api_version] = encode(self.at(api_version))
        return found

    def at(self, api_version: str) -> Object:
        """The object in a version of its group. Do not change it."""
        own = self.obj["apiVersion"]
        if own == api_version:
            return self.obj
        if api_version == events.NEW_VERSION:
            return events.to_new(self.obj)
        return {**self.obj, "apiVersion": api_version}


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One write. ``current`` is the object after it (for DELETED: as it was last, under the new resourceVersion)."""

    version: int
    type: ChangeType
    key: Key
    current: Stored
    previous: Stored | None


class Expired(Exception):
    """The wanted resourceVersion is older than the history."""

    def __init__(self, wanted: int, oldest: int) -> None:
        super().__init__(f"too old resource version: {wanted} ({oldest})")
        self.wanted = wanted
        self.oldest = oldest


Listener = Callable[[Change], None]
StoreListener = Callable[[StorageKey, Change], None]


class Collection:
    """The objects of one resource."""

    def __init__(self, forgotten: int, history: int) -> None:
        self.objects: dict[Key, Stored] = {}
        self.history: deque[Change] = deque(maxlen=history)
        self.forgotten = forgotten
        """Changes up to this resourceVersion are no longer in the history."""
        self.listeners: dict[int, Listener] = {}

    def since(self, version: int) -> list[Change]:
        """Changes after ``version``, oldest first. Raises Expired."""
        if version < self.forgotten:
            raise Expired(version, self.forgotten)
        found: list[Change] = []
        for change in reversed(self.history):
            if change.version <= version:
                break
            found.append(change)
        found.reverse()
        return found

    def at(self, version: int) -> dict[Key, Stored]:
        """The objects as they were at ``version``. Raises Expired."""
        changes = self.since(version)
        if not changes:
            return self.objects
        objects = dict(self.objects)
        for change in reversed(changes):
            if change.previous is None:
                objects.pop(change.key, None)
            else:
                objects[change.key] = change.previous
        return objects


class Store:
    """All objects of the API."""

    def __init__(self, first_version: int = 1, history: int = HISTORY) -> None:
        self.version = first_version
        """The resourceVersion of the newest write."""
        self._history = history
        self._first = first_version
        self._collections: dict[StorageKey, Collection] = {}
        self._listeners: list[StoreListener] = []
        self._tokens = 0

    def collection(self, key: StorageKey) -> Collection:
        """The objects of one resource; made when first asked for."""
        found = self._collections.get(key)
        if found is None:
            found = self._collections[key] = Collection(self._first, self._history)
        return found

    def get(self, storage: StorageKey, key: Key) -> Stored | None:
        """One object."""
        return self.collection(storage).objects.get(key)

    def items(self, storage: StorageKey, namespace: str | None = None) -> Iterator[Stored]:
        """All objects of a resource, or those of a namespace; in no particular order."""
        for (found, _), stored in self.collection(storage).objects.items():
            if namespace is None or found == namespace:
                yield stored

    def keys(self) -> Iterable[StorageKey]:
        """Resources that hold, or held, objects."""
        return list(self._collections)

    def put(self, storage: StorageKey, obj: Object) -> Stored:
        """Store a new version of an object. It becomes the store's: do not change it afterwards."""
        collection = self.collection(storage)
        metadata = obj["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        previous = collection.objects.get(key)
        self.version += 1
        obj["metadata"] = {**metadata, "resourceVersion": str(self.version)}
        stored = Stored(obj, self.version)
        collection.objects[key] = stored
        type_ = ChangeType.ADDED if previous is None else ChangeType.MODIFIED
        self._record(storage, collection, Change(self.version, type_, key, stored, previous))
        return stored

    def remove(self, storage: StorageKey, key: Key, last: Object | None = None) -> Stored | None:
        """Remove an object; ``last`` replaces its final state in the event. None if it was not there."""
        collection = self.collection(storage)
        previous = collection.objects.pop(key, None)
        if previous is None:
            return None
        self.version += 1
        obj = dict(last or previous.obj)
        obj["metadata"] = {**obj["metadata"], "resourceVersion": str(self.version)}
        stored = Stored(obj, self.version)
        self._record(storage, collection, Change(self.version, ChangeType.DELETED, key, stored, previous))
        return stored

    def rewrite(self, storage: StorageKey, function: Callable[[Object], Object]) -> None:
        """Put every object of a resource through ``function``, as if it had always been so: nobody is told."""
        for stored in self.collection(storage).objects.values():
            stored.obj = function(stored.obj)
            stored.encoded.clear()

    def forget(self, storage: StorageKey) -> None:
        """Forget the history of a resource (after its CRD is gone)."""
        collection = self.collection(storage)
        collection.history.clear()
        collection.forgotten = self.version

    def compact(self) -> None:
        """Forget all history: every older resourceVersion is expired."""
        for key in self.keys():
            self.forget(key)

    def listen(self, storage: StorageKey, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` on every change of a resource, within the write; returns what ends it."""
        self._tokens += 1
        token = self._tokens
        listeners = self.collection(storage).listeners
        listeners[token] = listener

        def end() -> None:
            listeners.pop(token, None)

        return end

    def observe(self, listener: StoreListener) -> None:
        """Call ``listener`` on every change of any resource, within the write: it must not write itself."""
        self._listeners.append(listener)

    def _record(self, storage: StorageKey, collection: Collection, change: Change) -> None:
        history = collection.history
        if history.maxlen is not None and len(history) == history.maxlen:
            collection.forgotten = history[0].version
        history.append(change)
        for listener in list(collection.listeners.values()):
            listener(change)
        for observer in self._listeners:
            observer(storage, change)
