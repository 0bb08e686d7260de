"""UserDefinedNetworks and ClusterUserDefinedNetworks: number, NetworkAttachmentDefinitions, conditions, finalizers."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from vmnet.controller import objects, specs
from vmnet.controller.cluster import Cluster
from vmnet.controller.identifiers import NetworkIds
from vmnet.controller.ledger import Ledger
from vmnet.controller.statuses import Condition, merged
from vmnet.kube.api import (
    CUDNS,
    NADS,
    NAMESPACES,
    UDNS,
    AlreadyExists,
    Forbidden,
    Invalid,
    Kube,
    NotFound,
    Object,
    Resource,
    object_key,
)
from vmnet.kube.events import Recorder
from vmnet.model import names
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role

log = logging.getLogger(__name__)

CREATED: Final = "NetworkCreated"
READY: Final = "NetworkReady"
ALLOCATION_SUCCEEDED: Final = "NetworkAllocationSucceeded"
LOOK_AGAIN_SECONDS: Final = 30.0
"""A network that could not be made everywhere is looked at again at least this often."""
_STRANGER: Final = "a NetworkAttachmentDefinition {} that does not belong to this network exists already"


@dataclass(slots=True)
class _Outcome:
    """What one pass over the namespaces of a network came to."""

    done: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """Namespace → why it does not have the network."""
    remarks: list[str] = field(default_factory=list)


class NetworkReconciler:
    """Both kinds; which one a key belongs to follows from the resource given to ``reconcile``."""

    def __init__(
        self,
        kube: Kube,
        cluster: Cluster,
        ledger: Ledger,
        events: Recorder,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._kube = kube
        self._cluster = cluster
        self._ledger = ledger
        self._events = events
        self._now = now
        self._ids = NetworkIds()
        self._clashes: dict[str, str] = {}
        self._primaries: dict[str, str] = {}
        """Namespace → network whose primary NAD this process has created or seen: ahead of the informer."""
        self.blocked: dict[tuple[Resource, str], set[str]] = {}
        """Networks that wait for the pods of these NADs to go."""
        self.freed: Callable[[str], None] = lambda namespace: None
        """Called with a namespace that may have another primary network now."""

    def load(self) -> None:
        """Take over numbers and primary networks that are written down. Before the first ``reconcile``."""
        for resource in (UDNS, CUDNS):
            for item in self._cluster.items(resource):
                self._adopt(specs.network_name(item), item)
        for nad in self._cluster.items(NADS):
            try:
                config = json.loads((nad.get("spec") or {}).get("config") or "{}")
            except json.JSONDecodeError:
                continue
            if isinstance(config, dict) and config.get("name"):
                self._adopt(str(config["name"]), nad)
        for found in self._cluster.attachments():
            if found.network.role is Role.PRIMARY and not found.deleting:
                self._primaries.setdefault(found.namespace, found.network.name)

    async def reconcile(self, resource: Resource, key: str) -> float | None:
        """Bring one network to what its object says; for a NAD, see that it does not outlive its network."""
        if resource is NADS:
            await self._release_orphan(key)
            return None
        item = self._cluster.get(resource, key)
        if item is None:
            self.blocked.pop((resource, key), None)
            return None
        if objects.deleting(item):
            await self._delete(resource, key, item)
            return None
        name = specs.network_name(item)
        try:
            number = self._ids.allocate(name)
            network = specs.to_network(item, number)
            if name in self._clashes:
                raise ValueError(self._clashes[name])
        except ValueError as error:
            await self._report(resource, item, created=False, message=str(error))
            return None
        item = await self._claim_number(resource, item, number)
        outcome = await self._spread(resource, item, network)
        blocked = await self._withdraw(item, set(self._targets(item)), outcome)
        self._block(resource, key, blocked)
        await self._report_outcome(resource, item, outcome)
        return LOOK_AGAIN_SECONDS if outcome.problems else None

    # -- number and finalizer

    def _adopt(self, name: str, item: Object) -> None:
        text = objects.annotations(item).get(names.NETWORK_ID_ANNOTATION, "")
        if not text.isdecimal() or not 1 <= int(text) <= names.MAX_NETWORK_ID:
            return
        holder = self._ids.adopt(name, int(text))
        if holder is not None:
            self._clashes[name] = f"network number {text} belongs to network {holder} already"

    async def _claim_number(self, resource: Resource, item: Object, number: NetworkId) -> Object:
        """Write number and finalizer before anything is built with them: a restart finds the same number."""
        finalizers = objects.finalizers(item)
        if names.NETWORK_PROTECTION_FINALIZER in finalizers and objects.annotations(item).get(
            names.NETWORK_ID_ANNOTATION
        ) == str(number):
            return item
        metadata = item["metadata"]
        if names.NETWORK_PROTECTION_FINALIZER not in finalizers:
            finalizers.append(names.NETWORK_PROTECTION_FINALIZER)
        body = {
            "metadata": {
                "resourceVersion": metadata["resourceVersion"],
                "finalizers": finalizers,
                "annotations": {names.NETWORK_ID_ANNOTATION: str(number)},
            }
        }
        return await self._kube.patch(resource, metadata["name"], body, metadata.get("namespace"))

    # -- NADs

    def _targets(self, item: Object) -> list[str]:
        """Namespaces that shall have the network, sorted."""
        if not specs.is_cluster(item):
            return [objects.namespace_of(item)]
        selector = (item.get("spec") or {}).get("namespaceSelector") or {}
        return sorted(
            str(namespace["metadata"]["name"])
            for namespace in self._cluster.items(NAMESPACES)
            if not _terminating(namespace) and objects.selects(selector, objects.labels(namespace))
        )

    async def _spread(self, resource: Resource, item: Object, network: Network) -> _Outcome:
        outcome = _Outcome()
        for namespace in self._targets(item):
            problem = self._stranger(item, namespace) or self._refusal(namespace, network)
            if problem is None:
                problem = await self._ensure(resource, item, namespace, network)
                if problem is not None and self._primaries.get(namespace) == network.name:
                    # Not told to the others, who would take turns at failing: they look again by themselves.
                    del self._primaries[namespace]
            if problem is None:
                outcome.done.append(namespace)
            else:
                outcome.problems[namespace] = problem
        return outcome

    def _stranger(self, item: Object, namespace: str) -> str | None:
        name = item["metadata"]["name"]
        existing = self._cluster.get(NADS, f"{namespace}/{name}")
        return None if existing is None or _owns(item, existing) else _STRANGER.format(name)

    def _refusal(self, namespace: str, network: Network) -> str | None:
        """Why this namespace cannot have the network; None and the namespace taken when it can."""
        if network.role is not Role.PRIMARY:
            return None
        if not self._cluster.labelled(namespace):
            return (
                f"namespace lacks the label {names.PRIMARY_NETWORK_LABEL}, which a primary network needs "
                "and which can only be set when the namespace is created"
            )
        for found in self._cluster.attachments(namespace):
            if found.network.role is Role.PRIMARY and found.network.name != network.name:
                return f"namespace has primary network {found.network.name} already"
        # No await between the look and the note: of two networks that want the namespace at once, one gets it.
        holder = self._primaries.setdefault(namespace, network.name)
        return None if holder == network.name else f"namespace has primary network {holder} already"

    async def _ensure(self, resource: Resource, item: Object, namespace: str, network: Network) -> str | None:
        """Make the NAD what it should be. Returns what is in the way, None when all is well."""
        name = item["metadata"]["name"]
        wanted = self._nad(resource, item, namespace, network)
        existing = self._cluster.get(NADS, f"{namespace}/{name}")
        if existing is None:
            try:
                await self._kube.create(NADS, wanted, namespace)
            except AlreadyExists:
                existing = await self._kube.get(NADS, name, namespace)
            except (Forbidden, Invalid) as error:
                return str(error)
            else:
                return None
        if not _owns(item, existing):
            return _STRANGER.format(name)
        if objects.deleting(existing):
            # Somebody deleted it by hand. Let it go at once, so that it can come back.
            await self._remove(existing)
            return await self._recreate(wanted, namespace)
        metadata = existing["metadata"]
        held = objects.finalizers(existing)
        if (
            (existing.get("spec") or {}).get("config") == wanted["spec"]["config"]
            and objects.annotations(existing).get(names.NETWORK_ID_ANNOTATION) == str(network.id)
            and names.NAD_LABEL in objects.labels(existing)
            and names.NETWORK_PROTECTION_FINALIZER in held
        ):
            return None
        if names.NETWORK_PROTECTION_FINALIZER not in held:
            held.append(names.NETWORK_PROTECTION_FINALIZER)
        body = {
            "metadata": {
                "resourceVersion": metadata["resourceVersion"],
                "labels": wanted["metadata"]["labels"],
                "annotations": wanted["metadata"]["annotations"],
                "finalizers": held,
            },
            "spec": wanted["spec"],
        }
        await self._kube.patch(NADS, name, body, namespace)
        return None

    async def _recreate(self, wanted: Object, namespace: str) -> str | None:
        try:
            await self._kube.create(NADS, wanted, namespace)
        except AlreadyExists:
            return f"NetworkAttachmentDefinition {wanted['metadata']['name']} is being deleted; made again after that"
        except (Forbidden, Invalid) as error:
            # The namespace goes, and the network with it.
            return str(error)
        return None

    def _nad(self, resource: Resource, item: Object, namespace: str, network: Network) -> Object:
        metadata = item["metadata"]
        return {
            "apiVersion": NADS.api_version,
            "kind": NADS.kind,
            "metadata": {
                "name": metadata["name"],
                "namespace": namespace,
                "labels": {names.NAD_LABEL: ""},
                "annotations": {names.NETWORK_ID_ANNOTATION: str(network.id)},
                "finalizers": [names.NETWORK_PROTECTION_FINALIZER],
                "ownerReferences": [
                    {
                        "apiVersion": resource.api_version,
                        "kind": resource.kind,
                        "name": metadata["name"],
                        "uid": metadata["uid"],
                        "controller": True,
                        "blockOwnerDeletion": True,
                    }
                ],
            },
            "spec": {"config": network.to_nad_config(f"{namespace}/{metadata['name']}")},
        }

    async def _withdraw(self, item: Object, keep: set[str], outcome: _Outcome) -> set[str]:
        """Remove the NADs of namespaces that shall not have the network (any more).

        Returns the NADs that living pods stand in the way of.
        """
        blocked: set[str] = set()
        for nad in self._owned(item):
            namespace = objects.namespace_of(nad)
            if namespace in keep:
                continue
            users = self._cluster.users(object_key(nad))
            if users:
                blocked.add(object_key(nad))
                outcome.remarks.append(f"kept in namespace {namespace}, where pods use it: {_pod_names(users)}")
                continue
            await self._remove(nad)
            self._freed(namespace, specs.network_name(item))
        return blocked

    def _owned(self, item: Object) -> list[Object]:
        return [nad for nad in self._cluster.items(NADS) if _owns(item, nad)]

    async def _remove(self, nad: Object) -> None:
        metadata = nad["metadata"]
        rest = [entry for entry in objects.finalizers(nad) if entry != names.NETWORK_PROTECTION_FINALIZER]
        try:
            if len(rest) != len(objects.finalizers(nad)):
                body = {"metadata": {"resourceVersion": metadata["resourceVersion"], "finalizers": rest or None}}
                await self._kube.patch(NADS, metadata["name"], body, metadata["namespace"])
            if not objects.deleting(nad):
                await self._kube.delete(NADS, metadata["name"], metadata["namespace"], uid=metadata["uid"])
        except NotFound:
            return

    def _freed(self, namespace: str, network: str) -> None:
        if self._primaries.get(namespace) == network:
            del self._primaries[namespace]
            self.freed(namespace)

    # -- deletion

    async def _release_orphan(self, key: str) -> None:
        """Let a NAD go whose network was deleted before this process had seen the NAD."""
        nad = self._cluster.get(NADS, key)
        if nad is None or not objects.deleting(nad) or names.NAD_LABEL not in objects.labels(nad):
            self.blocked.pop((NADS, key), None)
            return
        reference = objects.owner_reference(nad)
        resource = UDNS if reference is not None and reference.get("kind") == UDNS.kind else CUDNS
        if reference is not None:
            name = str(reference["name"])
            owner = self._cluster.get(resource, f"{objects.namespace_of(nad)}/{name}" if resource is UDNS else name)
            if owner is not None and _owns(owner, nad):
                return
        users = self._cluster.users(key)
        self._block(NADS, key, {key} if users else set())
        if not users:
            await self._remove(nad)

    async def _delete(self, resource: Resource, key: str, item: Object) -> None:
        finalizers = objects.finalizers(item)
        if names.NETWORK_PROTECTION_FINALIZER not in finalizers:
            return
        outcome = _Outcome()
        blocked = await self._withdraw(item, set(), outcome)
        self._block(resource, key, blocked)
        if blocked:
            users = [pod for nad in self._owned(item) for pod in self._cluster.users(object_key(nad))]
            message = f"cannot be deleted while pods use it: {_pod_names(users)}"
            await self._report(resource, item, created=False, message=message)
            return
        name = specs.network_name(item)
        metadata = item["metadata"]
        rest = [entry for entry in finalizers if entry != names.NETWORK_PROTECTION_FINALIZER]
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"], "finalizers": rest or None}}
        try:
            await self._kube.patch(resource, metadata["name"], body, metadata.get("namespace"))
        except NotFound:
            log.debug("network %s was gone already", name)
        self._ids.release(name)
        self._clashes.pop(name, None)
        self._ledger.forget(name)

    def _block(self, resource: Resource, key: str, attachments: set[str]) -> None:
        if attachments:
            self.blocked[resource, key] = attachments
        else:
            self.blocked.pop((resource, key), None)

    # -- conditions

    async def _report_outcome(self, resource: Resource, item: Object, outcome: _Outcome) -> None:
        cluster = specs.is_cluster(item)
        remarks = "".join(f"; {remark}" for remark in outcome.remarks)
        if outcome.problems:
            if cluster:
                told = "; ".join(f"namespace {ns}: {why}" for ns, why in sorted(outcome.problems.items()))
                created = f"; created in: {', '.join(outcome.done)}" if outcome.done else ""
                message = told + created + remarks
            else:
                message = next(iter(outcome.problems.values())) + remarks
            await self._report(resource, item, created=False, message=message)
            return
        message = "NetworkAttachmentDefinition has been created"
        if cluster:
            where = f"[{', '.join(outcome.done)}]"
            message += f" in following namespaces: {where}" if outcome.done else ": no namespace is selected yet"
        await self._report(resource, item, created=True, message=message + remarks)

    async def _report(self, resource: Resource, item: Object, *, created: bool, message: str) -> None:
        cluster = specs.is_cluster(item)
        trouble = "NetworkAttachmentDefinitionSyncError" if cluster else "SyncError"
        wanted = [
            Condition(CREATED, created, "NetworkAttachmentDefinitionCreated" if created else trouble, message),
            Condition(READY, created, "NetworkAttachmentDefinitionReady" if created else trouble, message),
        ]
        if created:
            text = "the network has its number and its address pools"
            wanted.append(Condition(ALLOCATION_SUCCEEDED, True, "NetworkAllocationSucceeded", text))
        elif specs.network_name(item) in self._clashes:
            wanted.append(Condition(ALLOCATION_SUCCEEDED, False, "InternalError", message))
            step = "delete one of the networks that are in each other's way, or make this one anew with other values"
            await self._events.event(item, "NetworkAllocationFailed", message, "Warning", next_step=step)
        changed = merged(item, wanted, self._now())
        if changed is None:
            return
        metadata = item["metadata"]
        body: dict[str, Any] = {"status": {"conditions": changed}}
        try:
            await self._kube.patch(resource, metadata["name"], body, metadata.get("namespace"), subresource="status")
        except NotFound:
            log.debug("network %s went before its status was written", metadata["name"])


def _terminating(namespace: Object) -> bool:
    return objects.deleting(namespace) or (namespace.get("status") or {}).get("phase") == "Terminating"


def _owns(item: Object, nad: Object) -> bool:
    reference = objects.owner_reference(nad)
    return reference is not None and reference.get("uid") == item["metadata"].get("uid")


def _pod_names(pods: list[Object]) -> str:
    return objects.shortened({object_key(pod) for pod in pods})
