"""Garbage collection: dependents follow their owners, in the foreground or the background, or are orphaned."""

from collections import defaultdict
from typing import Any, Final

from vmnet.lab.apiserver.chores import Chores
from vmnet.lab.apiserver.objects import FOREGROUND, ORPHAN, Objects
from vmnet.lab.apiserver.requests import DeleteOptions
from vmnet.lab.apiserver.resources import ResourceInfo
from vmnet.lab.apiserver.status import ApiError
from vmnet.lab.apiserver.storage import Change, ChangeType, Key, Object, StorageKey

Reference = tuple[StorageKey, Key]

_BACKGROUND: Final = "Background"
_FOREGROUND: Final = "Foreground"


class Collector:
    """Watches every object; keeps who refers to whom by uid."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._where: dict[str, Reference] = {}
        """Place of the live object with a uid."""
        self._dependents: defaultdict[str, set[Reference]] = defaultdict(set)
        """Objects that name a uid as owner."""
        self._owners: dict[Reference, tuple[str, ...]] = {}
        self.chores: Chores[Reference] = Chores("garbage collection", self._look)
        objects.store.observe(self._observe)

    def _observe(self, storage: StorageKey, change: Change) -> None:
        reference = (storage, change.key)
        metadata = change.current.obj["metadata"]
        uid = metadata["uid"]
        gone = change.type is ChangeType.DELETED
        owners = () if gone else tuple(item["uid"] for item in metadata.get("ownerReferences") or ())
        before = self._owners.get(reference, ())
        for owner in before:
            if owner not in owners:
                self._dependents[owner].discard(reference)
                if not self._dependents[owner]:
                    del self._dependents[owner]
        for owner in owners:
            self._dependents[owner].add(reference)
        if owners:
            self._owners[reference] = owners
        else:
            self._owners.pop(reference, None)
        if gone:
            self._where.pop(uid, None)
            for dependent in self._dependents.get(uid, ()):
                self.chores.add(dependent)
        else:
            self._where[uid] = reference
            deleting = "deletionTimestamp" in metadata
            if owners or (deleting and {FOREGROUND, ORPHAN} & set(metadata.get("finalizers") or ())):
                self.chores.add(reference)
        # An owner may be waiting for this one.
        for owner in {*before, *owners}:
            place = self._where.get(owner)
            if place is not None and self._is_waiting(place):
                self.chores.add(place)

    def _object(self, reference: Reference) -> Object | None:
        stored = self._objects.store.get(*reference)
        return stored.obj if stored else None

    def _is_waiting(self, reference: Reference) -> bool:
        obj = self._object(reference)
        if obj is None:
            return False
        metadata = obj["metadata"]
        return "deletionTimestamp" in metadata and FOREGROUND in (metadata.get("finalizers") or ())

    def _info(self, storage: StorageKey) -> ResourceInfo | None:
        return next((info for info in self._objects.registry.storage() if info.storage_key == storage), None)

    def _look(self, reference: Reference) -> None:
        obj = self._object(reference)
        info = self._info(reference[0])
        if obj is None or info is None:
            return
        metadata = obj["metadata"]
        finalizers = metadata.get("finalizers") or ()
        if "deletionTimestamp" in metadata:
            if ORPHAN in finalizers:
                self._orphan(info, reference, metadata["uid"])
            elif FOREGROUND in finalizers:
                self._foreground(info, reference, metadata["uid"])
            return
        if metadata.get("ownerReferences"):
            self._judge(info, reference, obj)

    def _orphan(self, info: ResourceInfo, reference: Reference, uid: str) -> None:
        for dependent in list(self._dependents.get(uid, ())):
            found = self._info(dependent[0])
            if found is not None:
                self._objects.change(found, *dependent[1], lambda item: _without_owners(item, {uid}))
        self._objects.change(info, *reference[1], lambda item: _without_finalizer(item, ORPHAN))

    def _foreground(self, info: ResourceInfo, reference: Reference, uid: str) -> None:
        blocked = False
        for dependent in list(self._dependents.get(uid, ())):
            obj = self._object(dependent)
            if obj is None:
                continue
            blocking = any(
                item["uid"] == uid and item.get("blockOwnerDeletion") for item in obj["metadata"]["ownerReferences"]
            )
            if "deletionTimestamp" not in obj["metadata"]:
                found = self._info(dependent[0])
                if found is not None:
                    self._judge(found, dependent, obj)
            blocked = blocked or (blocking and self._object(dependent) is not None)
        if not blocked:
            self._objects.change(info, *reference[1], lambda item: _without_finalizer(item, FOREGROUND))

    def _judge(self, info: ResourceInfo, reference: Reference, obj: Object) -> None:
        """Delete an object whose owners are all gone, or are all waiting for it to go."""
        namespace = obj["metadata"].get("namespace", "")
        solid, dangling, waiting = False, set(), False
        for item in obj["metadata"]["ownerReferences"]:
            place = self._where.get(item["uid"])
            if place is None:
                if self._is_known(item):
                    dangling.add(item["uid"])
                else:
                    solid = True
            elif place[1][0] not in ("", namespace):
                dangling.add(item["uid"])
            elif self._is_waiting(place):
                waiting = True
            else:
                solid = True
        uid = obj["metadata"]["uid"]
        if solid:
            if dangling:
                self._objects.change(info, *reference[1], lambda item: _without_owners(item, dangling))
        elif waiting and self._dependents.get(uid):
            self._delete(info, reference, uid, _FOREGROUND)
        elif waiting or dangling:
            self._delete(info, reference, uid, "")

    def _is_known(self, reference: dict[str, Any]) -> bool:
        """Whether the owner's kind is one the API holds; owners of other kinds are taken to exist."""
        group, _, _ = str(reference.get("apiVersion", "")).rpartition("/")
        info = self._objects.registry.by_kind(group, str(reference.get("kind", "")))
        return info is not None and not self._objects.registry.is_mounted(info)

    def _delete(self, info: ResourceInfo, reference: Reference, uid: str, propagation: str) -> None:
        try:
            self._objects.delete(info, *reference[1], DeleteOptions(propagation=propagation or _BACKGROUND, uid=uid))
        except ApiError as error:
            if error.code not in (404, 409):
                raise


def _without_owners(obj: Object, uids: set[str]) -> Object:
    metadata = obj["metadata"]
    left = [item for item in metadata.get("ownerReferences") or () if item["uid"] not in uids]
    metadata.pop("ownerReferences", None)
    if left:
        metadata["ownerReferences"] = left
    return obj


def _without_finalizer(obj: Object, finalizer: str) -> Object:
    metadata = obj["metadata"]
    left = [item for item in metadata.get("finalizers") or () if item != finalizer]
    metadata.pop("finalizers", None)
    if left:
        metadata["finalizers"] = left
    return obj
