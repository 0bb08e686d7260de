"""CustomResourceDefinitions at work: names are accepted, versions are served, instances go with their definition."""

import copy
from typing import Any, Final

from vmnet.lab.apiserver.chores import Chores
from vmnet.lab.apiserver.objects import CRD_FINALIZER, CRDS, Objects, Schema
from vmnet.lab.apiserver.requests import DeleteOptions
from vmnet.lab.apiserver.resources import ResourceInfo
from vmnet.lab.apiserver.schema import Structural
from vmnet.lab.apiserver.status import ApiError
from vmnet.lab.apiserver.storage import Change, ChangeType, Object, StorageKey

MANAGER: Final = "kube-apiserver"
NAMES_ACCEPTED: Final = "NamesAccepted"
ESTABLISHED: Final = "Established"
TERMINATING: Final = "Terminating"


def condition(obj: Object, kind: str) -> dict[str, Any]:
    """A condition of a definition; empty when it has none of that type."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return next((item for item in conditions if item["type"] == kind), {})


def resources_of(definition: Object) -> list[tuple[ResourceInfo, dict[str, Any]]]:
    """The resources a definition serves, each with its entry of ``spec.versions``."""
    spec = definition["spec"]
    names = (definition.get("status") or {}).get("acceptedNames") or spec["names"]
    found: list[tuple[ResourceInfo, dict[str, Any]]] = []
    for version in spec["versions"]:
        if not version.get("served"):
            continue
        subresources = version.get("subresources") or {}
        info = ResourceInfo(
            group=spec["group"],
            version=version["name"],
            plural=names["plural"],
            singular=names.get("singular") or names["kind"].lower(),
            kind=names["kind"],
            namespaced=spec.get("scope") == "Namespaced",
            short_names=tuple(names.get("shortNames") or ()),
            verbs=("delete", "deletecollection", "get", "list", "patch", "create", "update", "watch"),
            subresources=tuple(name for name in ("status", "scale") if name in subresources),
            categories=tuple(names.get("categories") or ()),
        )
        found.append((info, version))
    return found


class Definitions:
    """Follows CustomResourceDefinitions, and knows the schema of every custom resource."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._schemas: dict[tuple[str, str, str], Schema] = {}
        self._served: dict[str, tuple[StorageKey, Object]] = {}
        self.chores: Chores[str] = Chores("custom resource definitions", self._look)
        objects.store.observe(self._observe)

    def structural(self, info: ResourceInfo) -> Schema | None:
        """The schema of a custom resource."""
        definition = self._objects.registry.definition(info)
        if definition is None:
            return None
        key = (info.group, info.version, info.plural)
        found = self._schemas.get(key)
        if found is None:
            found = self._schemas[key] = Structural.from_crd(definition)
        return found

    def _observe(self, storage: StorageKey, change: Change) -> None:
        if storage == CRDS:
            self.chores.add(change.key[1])
        elif change.type is ChangeType.DELETED and storage[0]:
            name = f"{storage[1]}.{storage[0]}"
            if name in self._served:
                self.chores.add(name)

    def _info(self) -> ResourceInfo:
        info = self._objects.registry.lookup(*("apiextensions.k8s.io", "v1", "customresourcedefinitions"))
        if info is None:
            raise LookupError("customresourcedefinitions are not served")
        return info

    def _look(self, name: str) -> None:
        stored = self._objects.store.get(CRDS, ("", name))
        if stored is None:
            self._withdraw(name)
            return
        obj = stored.obj
        if "deletionTimestamp" in obj["metadata"]:
            self._end(name, obj)
            return
        if not condition(obj, NAMES_ACCEPTED) or condition(obj, NAMES_ACCEPTED)["status"] == "False":
            self._objects.change(self._info(), "", name, self._accept, "status", MANAGER)
            return
        if condition(obj, ESTABLISHED).get("status") != "True":
            self._objects.change(self._info(), "", name, self._establish, "status", MANAGER)
            return
        self._serve(name, obj)

    def _conflict(self, obj: Object) -> tuple[str, str] | None:
        """Reason and message when another definition of the group has one of its names."""
        group, own = obj["spec"]["group"], obj["metadata"]["name"]
        names = obj["spec"]["names"]
        taken: set[str] = set()
        kinds: set[str] = set()
        for stored in self._objects.store.items(CRDS):
            other = stored.obj
            if other["metadata"]["name"] == own or other["spec"]["group"] != group:
                continue
            accepted = (other.get("status") or {}).get("acceptedNames") or {}
            taken.update(filter(None, (accepted.get("plural"), accepted.get("singular"))))
            taken.update(accepted.get("shortNames") or ())
            kinds.update(filter(None, (accepted.get("kind"), accepted.get("listKind"))))
        checks = [
            ("PluralConflict", names["plural"], taken),
            ("SingularConflict", names.get("singular"), taken),
            *(("ShortNamesConflict", short, taken) for short in names.get("shortNames") or ()),
            ("KindConflict", names["kind"], kinds),
            ("ListKindConflict", names.get("listKind"), kinds),
        ]
        found = [(reason, f'"{value}" is already in use') for reason, value, used in checks if value in used]
        return found[-1] if found else None

    def _set(self, obj: Object, kind: str, status: bool, reason: str, message: str) -> None:
        conditions = [item for item in obj["status"].get("conditions") or () if item["type"] != kind]
        before = condition(obj, kind)
        value = "True" if status else "False"
        now = self._objects.timestamp()
        found = {
            "type": kind,
            "status": value,
            "lastTransitionTime": before["lastTransitionTime"] if before.get("status") == value else now,
            "reason": reason,
            "message": message,
        }
        order = (NAMES_ACCEPTED, ESTABLISHED, TERMINATING)
        conditions.append(found)
        conditions.sort(key=lambda item: order.index(item["type"]) if item["type"] in order else len(order))
        obj["status"]["conditions"] = conditions

    def _accept(self, obj: Object) -> Object:
        status = obj.setdefault("status", {})
        conflict = self._conflict(obj)
        if conflict is None:
            status["acceptedNames"] = dict(obj["spec"]["names"])
            self._set(obj, NAMES_ACCEPTED, True, "NoConflicts", "no conflicts found")
            self._set(obj, ESTABLISHED, False, "Installing", "the initial names have been accepted")
        else:
            status["acceptedNames"] = {"plural": obj["spec"]["names"]["plural"], "kind": ""}
            self._set(obj, NAMES_ACCEPTED, False, *conflict)
            self._set(obj, ESTABLISHED, False, "NotAccepted", "not all names are accepted")
        return obj

    def _establish(self, obj: Object) -> Object:
        self._set(obj, ESTABLISHED, True, "InitialNamesAccepted", "the initial names have been accepted")
        return obj

    def _serve(self, name: str, obj: Object) -> None:
        spec = obj["spec"]
        names = spec["names"]
        known = self._served.get(name)
        if known is not None and known[1] == spec:
            return
        accepted = obj["status"].get("acceptedNames")
        if accepted != names:
            self._objects.change(self._info(), "", name, self._accept, "status", MANAGER)
            return
        storage = (spec["group"], names["plural"])
        self._served[name] = (storage, spec)
        self._schemas = {key: value for key, value in self._schemas.items() if (key[0], key[2]) != storage}
        served = resources_of(obj)
        self._objects.registry.replace(spec["group"], names["plural"], served)
        if known is not None and served:
            # New defaults and pruned fields show on objects that were stored before.
            self._objects.store.rewrite(storage, lambda item: self._renewed(served, item))

    def _renewed(self, served: list[tuple[ResourceInfo, dict[str, Any]]], item: Object) -> Object:
        version = item["apiVersion"].rpartition("/")[2]
        info = next((info for info, _ in served if info.version == version), served[0][0])
        schema = self.structural(info)
        renewed = copy.deepcopy(item)
        if schema is not None:
            schema.default(renewed)
        return renewed

    def _withdraw(self, name: str) -> None:
        known = self._served.pop(name, None)
        if known is not None:
            storage = known[0]
            self._schemas = {key: value for key, value in self._schemas.items() if (key[0], key[2]) != storage}
            self._objects.registry.replace(*storage, [])
            self._objects.store.forget(storage)
        # A name that is free again may be what another definition waits for.
        for stored in self._objects.store.items(CRDS):
            if condition(stored.obj, NAMES_ACCEPTED).get("status") == "False":
                self.chores.add(stored.obj["metadata"]["name"])

    def _end(self, name: str, obj: Object) -> None:
        """Delete the instances of a definition that is going; let it go when there are none."""
        if CRD_FINALIZER not in (obj["metadata"].get("finalizers") or ()):
            return
        storage = (obj["spec"]["group"], obj["spec"]["names"]["plural"])
        info = next((item for item, _ in resources_of(obj)), None) if name in self._served else None
        remaining = False
        if info is not None:
            for stored in list(self._objects.store.items(storage)):
                metadata = stored.obj["metadata"]
                if "deletionTimestamp" not in metadata:
                    try:
                        self._objects.delete(
                            info,
                            metadata.get("namespace", ""),
                            metadata["name"],
                            DeleteOptions(propagation="Background"),
                        )
                    except ApiError as error:
                        if error.code != 404:
                            raise
            remaining = any(True for _ in self._objects.store.items(storage))
        if remaining:
            self._objects.change(self._info(), "", name, self._waiting, "status", MANAGER)
        else:
            self._objects.change(self._info(), "", name, _released)

    def _waiting(self, obj: Object) -> Object:
        message = "CustomResource deletion is in progress"
        self._set(obj, TERMINATING, True, "InstanceDeletionInProgress", message)
        return obj


def _released(obj: Object) -> Object:
    left = [item for item in obj["metadata"].get("finalizers") or () if item != CRD_FINALIZER]
    obj["metadata"].pop("finalizers", None)
    if left:
        obj["metadata"]["finalizers"] = left
    return obj
