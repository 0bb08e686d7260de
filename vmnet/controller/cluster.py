"""The cluster as the informers show it, indexed the way the reconcilers ask."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from vmnet.controller import objects
from vmnet.kube.api import (
    CLAIMS,
    CUDNS,
    ENDPOINT_SLICES,
    NADS,
    NAMESPACES,
    NODES,
    PODS,
    UDNS,
    VMIMS,
    VMIS,
    VMS,
    Informer,
    Object,
    Resource,
    object_key,
)
from vmnet.model import names
from vmnet.model.network import Network, Role, from_nad
from vmnet.model.selection import selections

log = logging.getLogger(__name__)

WATCHED: Final = (NAMESPACES, NODES, UDNS, CUDNS, NADS, CLAIMS, PODS, ENDPOINT_SLICES, VMS, VMIS, VMIMS)
"""What the controller watches. The kinds of KubeVirt may be absent."""


class Index:
    """Keys of an informer's objects, grouped."""

    def __init__(self, informer: Informer, groups: Callable[[Object], Iterable[str]]) -> None:
        self._informer = informer
        self._groups = groups
        # Insertion-ordered: lists built from an index come out the same way each time.
        self._keys: defaultdict[str, dict[str, None]] = defaultdict(dict)
        informer.add_handler(self._changed)

    def __getitem__(self, group: str) -> Iterator[Object]:
        for key in tuple(self._keys.get(group, ())):
            item = self._informer.get(key)
            if item is not None:
                yield item

    def _changed(self, old: Object | None, new: Object | None) -> None:
        if old is not None:
            for group in self._groups(old):
                found = self._keys.get(group)
                if found is not None:
                    found.pop(object_key(old), None)
                    if not found:
                        del self._keys[group]
        if new is not None:
            for group in self._groups(new):
                self._keys[group][object_key(new)] = None


@dataclass(frozen=True, slots=True)
class Attachment:
    """A NAD of ours. ``key`` is ``<namespace>/<nad>``, the key of the pod-networks annotation."""

    key: str
    namespace: str
    network: Network
    deleting: bool


@dataclass(frozen=True, slots=True)
class ClaimReference:
    """The claim that a VM pod takes its addresses from. ``network`` is the name in the VM spec, if it is known."""

    key: str
    network: str | None = None


class Cluster:
    """Everything that is known. Read only; never awaits, so one reading is consistent with itself."""

    def __init__(self, informers: Mapping[Resource, Informer]) -> None:
        self.informers = informers
        self._attachments: dict[str, Attachment] = {}
        # This handler comes first: whoever reacts to a NAD finds it parsed.
        informers[NADS].add_handler(self._nad_changed)
        self._nads = Index(informers[NADS], lambda item: (objects.namespace_of(item),))
        self._pods = Index(informers[PODS], lambda item: (objects.namespace_of(item),))
        self._slices = Index(informers[ENDPOINT_SLICES], lambda item: (objects.namespace_of(item),))
        self._launchers = Index(informers[PODS], _created_by)
        self._claimants = Index(informers[PODS], _claimed)
        self._attached = Index(informers[PODS], _attached)
        self._askers = Index(informers[PODS], _asked)
        self._claims = Index(informers[CLAIMS], lambda item: (f"network {(item.get('spec') or {}).get('network')}",))

    @property
    def synced(self) -> bool:
        """True once every kind was listed."""
        return all(informer.synced.is_set() for informer in self.informers.values())

    def get(self, resource: Resource, key: str) -> Object | None:
        """One object, as last seen."""
        return self.informers[resource].get(key)

    def items(self, resource: Resource) -> tuple[Object, ...]:
        """All objects of a kind."""
        return tuple(self.informers[resource].items())

    def attachment(self, key: str) -> Attachment | None:
        """Our NAD of that key."""
        return self._attachments.get(key)

    def attachments(self, namespace: str | None = None, *, network: str | None = None) -> Iterator[Attachment]:
        """Our NADs, of one namespace or of one network."""
        candidates: Iterable[Attachment | None]
        if namespace is None:
            candidates = tuple(self._attachments.values())
        else:
            candidates = (self._attachments.get(object_key(nad)) for nad in self._nads[namespace])
        for found in candidates:
            if found is not None and network in (None, found.network.name):
                yield found

    def primary(self, namespace: str) -> Attachment | None:
        """The namespace's primary network, None where there is none (any more)."""
        for nad in self._nads[namespace]:
            found = self._attachments.get(object_key(nad))
            if found is not None and found.network.role is Role.PRIMARY and not found.deleting:
                return found
        return None

    def labelled(self, namespace: str) -> bool:
        """Whether the namespace was made for a primary user-defined network."""
        item = self.get(NAMESPACES, namespace)
        return item is not None and names.PRIMARY_NETWORK_LABEL in objects.labels(item)

    def nads(self, namespace: str) -> Iterator[Object]:
        """All NADs of a namespace, ours or not."""
        return self._nads[namespace]

    def pods(self, namespace: str) -> Iterator[Object]:
        """All pods of a namespace."""
        return self._pods[namespace]

    def slices(self, namespace: str) -> Iterator[Object]:
        """All EndpointSlices of a namespace, mirrors included."""
        return self._slices[namespace]

    def launchers(self, vmi: Object) -> list[Object]:
        """The pods of one VMI, oldest first, finished ones included."""
        found = self._launchers[str(vmi["metadata"].get("uid"))]
        return sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp") or ""))

    def claims(self, network: str) -> Iterator[Object]:
        """The claims on a network."""
        return self._claims[f"network {network}"]

    def attached(self, attachment: str) -> Iterator[Object]:
        """Pods that have something by this NAD, of whatever namespace."""
        return self._attached[attachment]

    def askers(self, attachment: str) -> Iterator[Object]:
        """Pods that ask for this NAD by annotation."""
        return self._askers[attachment]

    def uses(self, pod: Object, attachment: str) -> bool:
        """Whether a pod, living or not, has something by this NAD, or may have."""
        return not {attachment, _unreadable(attachment.partition("/")[0])}.isdisjoint(_attached(pod))

    def users(self, attachment: str) -> list[Object]:
        """Living pods that have addresses by this NAD."""
        # What cannot be read cannot be excluded, so it counts.
        unreadable = self._attached[_unreadable(attachment.partition("/")[0])]
        return [pod for pod in (*self._attached[attachment], *unreadable) if objects.alive(pod)]

    def machine_of(self, pod: Object) -> Object | None:
        """The VMI of a launcher pod."""
        if not objects.is_launcher(pod):
            return None
        owner = objects.owner_reference(pod, controller=False)
        if owner is None or owner.get("kind") != objects.VMI_KIND:
            return None
        vmi = self.get(VMIS, f"{objects.namespace_of(pod)}/{owner['name']}")
        if vmi is None:
            return None
        uid = vmi["metadata"].get("uid")
        return vmi if uid in (owner.get("uid"), objects.labels(pod).get(names.CREATED_BY_LABEL)) else None

    def claim_reference(self, pod: Object, attachment: Attachment) -> ClaimReference | None:
        """The claim whose addresses the pod takes on a network; None for pods that own their addresses.

        A webhook writes it on the pod; without one it follows from the VMI. Raises ValueError for unreadable requests.
        """
        request = self.request(pod, attachment)
        namespace = objects.namespace_of(pod)
        if request.claim:
            return ClaimReference(f"{namespace}/{request.claim}")
        if not attachment.network.persistent or not objects.is_launcher(pod):
            return None
        vmi = self.machine_of(pod)
        name = objects.network_name_of(vmi, _name_of(attachment)) if vmi is not None else None
        if vmi is None or name is None:
            return None
        return ClaimReference(f"{namespace}/{names.claim_name(vmi['metadata']['name'], name)}", name)

    def request(self, pod: Object, attachment: Attachment) -> objects.Request:
        """What a pod asks for on a network. Raises ValueError for unreadable requests."""
        if attachment.network.role is Role.PRIMARY:
            return objects.pod_request(pod)
        return objects.secondary_request(pod, attachment.key) or objects.Request()

    def claimants(self, claim: str) -> Iterator[Object]:
        """Living pods that refer by name to a claim, which may be gone."""
        return (pod for pod in self._claimants[claim] if objects.alive(pod))

    def claim_users(self, claim: Object) -> list[Object]:
        """Living pods that take their addresses from a claim, oldest first."""
        key = object_key(claim)
        machine = self.claim_machine(claim)
        candidates = {object_key(pod): pod for pod in self._claimants[key]}
        if machine is not None:
            candidates |= {object_key(pod): pod for pod in self.launchers(machine)}
        found = []
        for pod in candidates.values():
            if objects.alive(pod) and self._claimed_by(pod, claim) is not None:
                found.append(pod)
        return sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp") or ""))

    def _claimed_by(self, pod: Object, claim: Object) -> Attachment | None:
        """The attachment for which a pod refers to a claim."""
        for attachment in self.wanted(pod):
            if attachment.network.name != (claim.get("spec") or {}).get("network"):
                continue
            try:
                reference = self.claim_reference(pod, attachment)
            except ValueError:
                continue
            if reference is not None and reference.key == object_key(claim):
                return attachment
        return None

    def wanted(self, pod: Object) -> list[Attachment]:
        """The attachments a pod shall have that exist: its namespace's primary network, and those that it asks for."""
        found = [self.primary(objects.namespace_of(pod))]
        try:
            found += [self._attachments.get(selection.key) for selection in selections(pod["metadata"])]
        except ValueError:
            log.debug("pod %s: its request for networks cannot be read", object_key(pod))
        return [attachment for attachment in found if attachment is not None]

    def claims_of(self, pod: Object) -> tuple[str, ...]:
        """Keys of the claims that a pod refers to by name."""
        return _claimed(pod)

    def claim_machine(self, claim: Object) -> Object | None:
        """The VMI, or the VM while it is stopped, that owns a claim."""
        key = objects.machine_key(claim)
        reference = objects.owner_reference(claim, controller=False)
        if key is None or reference is None:
            return None
        uid = reference.get("uid")
        vmi, vm = self.get(VMIS, key), self.get(VMS, key)
        if vmi is not None and uid in objects.machine_uids(vmi):
            return vmi
        return vm if vm is not None and vm["metadata"].get("uid") == uid else None

    def claim_request(self, claim: Object) -> objects.Request | None:
        """What the user of a claim asks for; None while it has no user. Raises ValueError for unreadable requests."""
        machine = self.claim_machine(claim)
        if machine is not None:
            for network in objects.machine_networks(machine):
                if claim["metadata"]["name"] == names.claim_name(machine["metadata"]["name"], network):
                    return objects.machine_request(machine, network)
            return objects.Request()
        for pod in self.claim_users(claim):
            attachment = self._claimed_by(pod, claim)
            if attachment is not None:
                return self.request(pod, attachment)
        return None

    def _nad_changed(self, old: Object | None, new: Object | None) -> None:
        if new is None:
            if old is not None:
                self._attachments.pop(object_key(old), None)
            return
        key = object_key(new)
        try:
            network = from_nad(new)
        except (ValueError, KeyError) as error:
            log.warning("NetworkAttachmentDefinition %s cannot be read: %s", key, error)
            network = None
        if network is None:
            self._attachments.pop(key, None)
        else:
            self._attachments[key] = Attachment(key, objects.namespace_of(new), network, objects.deleting(new))


def _created_by(pod: Object) -> tuple[str, ...]:
    uid = objects.labels(pod).get(names.CREATED_BY_LABEL)
    return (uid,) if uid else ()


def _claimed(pod: Object) -> tuple[str, ...]:
    found: list[str | None] = []
    try:
        found.append(objects.pod_request(pod).claim)
    except ValueError:
        log.debug("pod %s: its static request cannot be read", object_key(pod))
    try:
        found += [selection.claim for selection in selections(pod["metadata"])]
    except ValueError:
        log.debug("pod %s: its request for networks cannot be read", object_key(pod))
    return tuple(f"{objects.namespace_of(pod)}/{claim}" for claim in found if claim)


def _attached(pod: Object) -> tuple[str, ...]:
    try:
        return tuple(objects.pod_networks(pod))
    except ValueError:
        return (_unreadable(objects.namespace_of(pod)),)


def _asked(pod: Object) -> tuple[str, ...]:
    try:
        return tuple(selection.key for selection in selections(pod["metadata"]))
    except ValueError:
        return ()


def _unreadable(namespace: str) -> str:
    """Group of the pods of a namespace whose annotation nobody can read."""
    return f"unreadable in {namespace}"


def _name_of(attachment: Attachment) -> str | None:
    """How the spec of a machine names the network: by its NAD, or as the pod's own (None)."""
    return None if attachment.network.role is Role.PRIMARY else attachment.key
