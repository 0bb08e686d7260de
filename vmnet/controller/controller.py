"""The controller at work: which change concerns which reconciler, and the queues between them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Final

from vmnet import metrics
from vmnet.controller import objects
from vmnet.controller.claims import ClaimReconciler, MachineReconciler
from vmnet.controller.cluster import Cluster
from vmnet.controller.endpoint_slices import EndpointSliceReconciler, is_mirror, source_key
from vmnet.controller.ledger import Ledger
from vmnet.controller.migrations import MigrationReconciler
from vmnet.controller.networks import NetworkReconciler
from vmnet.controller.nodes import NodeReconciler
from vmnet.controller.pods import PodReconciler, node_group
from vmnet.controller.waiting import WaitingRoom
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
    Conflict,
    Kube,
    NotFound,
    Object,
    Resource,
    Unavailable,
    object_key,
)
from vmnet.kube.events import Recorder
from vmnet.model import names
from vmnet.model.selection import SHARED_NAMESPACE
from vmnet.runtime.queue import KeyedQueue, work

log = logging.getLogger(__name__)

_EXPECTED: Final = (Conflict, NotFound, Unavailable)
"""Write conflicts and an API that is away are every controller's daily life: no traceback."""
_WORKERS: Final = 4
_ALLOCATED: Final = (NODES, UDNS, CUDNS, NADS, CLAIMS, PODS)
"""Kinds that record what was given to whom."""
_CATCH_UP_SECONDS: Final = 0.05
_PATIENCE_SECONDS: Final = 1.0


class Controller:
    """Everything the leader does. ``run`` once; a process that lost its lease starts anew."""

    def __init__(
        self,
        kube: Kube,
        cluster: Cluster,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        namespace: str = names.SYSTEM_NAMESPACE,
    ) -> None:
        """``namespace``: where controllers and agents run."""
        self._namespace = namespace
        self.ready = asyncio.Event()
        """Set once every address and number that is written down is taken over."""
        self._kube = kube
        self.cluster = cluster
        self.ledger = Ledger(cluster)
        events = Recorder(kube, names.FIELD_MANAGER_CONTROLLER, now=now)
        self._waiting = waiting = WaitingRoom()
        self.ledger.released = waiting.call
        self.nodes = NodeReconciler(kube, cluster, self.ledger, events, namespace)
        self.networks = NetworkReconciler(kube, cluster, self.ledger, events, now)
        self.pods = PodReconciler(kube, cluster, self.ledger, events, waiting, now=now)
        self.machines = MachineReconciler(kube, cluster, events)
        self.claims = ClaimReconciler(kube, cluster, self.ledger, events, waiting, now=now)
        self.migrations = MigrationReconciler(kube, cluster, events, now)
        self.slices = EndpointSliceReconciler(kube, cluster)
        # Kind → its queue. Networks of both kinds and NADs share a reconciler; their queues keep their keys apart.
        self.queues: Mapping[str, KeyedQueue] = {
            kind: KeyedQueue()
            for kind in ("node", "udn", "cudn", "nad", "pod", "slice", "machine", "claim", "migration")
        }
        self.pods.again = self.queues["pod"].add
        self.pods.place = self.queues["node"].add
        self.claims.again = self.queues["claim"].add
        self.claims.filled = self._claim_filled
        self.networks.freed = self._namespace_freed

    async def run(self) -> None:
        """Wait for the informers, take over what is written down, reconcile until cancelled."""
        for informer in self.cluster.informers.values():
            await informer.synced.wait()
        await self.take_over()
        async with asyncio.TaskGroup() as group:
            for kind, reconcile in self.reconcilers().items():
                group.create_task(
                    work(
                        self.queues[kind],
                        reconcile,
                        _WORKERS,
                        kind,
                        observe=_observe,
                        expected=_EXPECTED,
                    ),
                    name=f"reconcile {kind}",
                )

    async def take_over(self) -> None:
        """Note all that is written down, once the informers have listed; from then on follow what changes."""
        for resource in _ALLOCATED:
            await self._catch_up(resource)
        self.nodes.load()
        self.networks.load()
        for attachment in self.cluster.attachments():
            self.ledger.open(attachment.network)
        self.claims.load()
        self.pods.load()
        for resource, handler in (
            (NODES, self._node_changed),
            (NAMESPACES, self._namespace_changed),
            (UDNS, self._udn_changed),
            (CUDNS, self._cudn_changed),
            (NADS, self._nad_changed),
            (CLAIMS, self._claim_changed),
            (VMS, self._vm_changed),
            (VMIS, self._vmi_changed),
            (VMIMS, self._vmim_changed),
            (PODS, self._pod_changed),
            (ENDPOINT_SLICES, self._slice_changed),
        ):
            self.cluster.informers[resource].add_handler(handler)
        self.ready.set()
        log.info("taken over %d attachments; reconciling", len(tuple(self.cluster.attachments())))

    async def _catch_up(self, resource: Resource) -> None:
        """Wait until the informer knows all that the leader before us may have written.

        A watch may be behind by any time; an address that was given a moment ago must not be given again.
        """
        while True:
            try:
                listed = await self._kube.list(resource)
            except NotFound:
                # Not served (any more): the informer deals with that.
                return
            except Unavailable as error:
                log.warning("%s: %s", resource.plural, error)
                await asyncio.sleep(_PATIENCE_SECONDS)
                continue
            behind = sum(not _reached(self.cluster.get(resource, object_key(item)), item) for item in listed.items)
            if not behind:
                return
            log.info("%s: %d objects are newer than the watch; waiting for it", resource.plural, behind)
            await asyncio.sleep(_CATCH_UP_SECONDS)

    @property
    def idle(self) -> bool:
        """True when no queue has anything to do right now."""
        return all(queue.idle for queue in self.queues.values())

    def reconcilers(self) -> dict[str, Callable[[str], Awaitable[float | None]]]:
        """Kind → what works on a key of its queue."""

        def network(resource: Resource) -> Callable[[str], Awaitable[float | None]]:
            return lambda key: self.networks.reconcile(resource, key)

        return {
            "node": self.nodes.reconcile,
            "udn": network(UDNS),
            "cudn": network(CUDNS),
            "nad": network(NADS),
            "pod": self.pods.reconcile,
            "machine": self.machines.reconcile,
            "claim": self.claims.reconcile,
            "migration": self.migrations.reconcile,
            "slice": self.slices.reconcile,
        }

    # -- which keys a change concerns

    def _namespace_changed(self, old: Object | None, new: Object | None) -> None:
        item = new or old
        if item is None:
            return
        if old is not None and new is not None:
            same_labels = objects.labels(old) == objects.labels(new)
            if same_labels and objects.deleting(old) == objects.deleting(new):
                return
        self._namespace_freed(str(item["metadata"]["name"]))
        for pod in self.cluster.pods(str(item["metadata"]["name"])):
            self.queues["pod"].add(object_key(pod))
        self._machines_of(str(item["metadata"]["name"]))

    def _namespace_freed(self, namespace: str) -> None:
        """The networks that may want this namespace."""
        for item in self.cluster.items(CUDNS):
            self.queues["cudn"].add(object_key(item))
        for item in self.cluster.items(UDNS):
            if objects.namespace_of(item) == namespace:
                self.queues["udn"].add(object_key(item))

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        item = new or old
        if item is None:
            return
        if old is None or new is None or objects.annotations(old) != objects.annotations(new):
            # Not the heartbeats of kubelet.
            self._add("node", item)
            self._waiting.call(node_group(object_key(item)))
        elif (old.get("spec") or {}).get("taints") != (new.get("spec") or {}).get("taints"):
            self._add("node", new)

    def _udn_changed(self, old: Object | None, new: Object | None) -> None:
        self._add("udn", new or old)
        if new is None:
            self._parts_freed()

    def _cudn_changed(self, old: Object | None, new: Object | None) -> None:
        self._add("cudn", new or old)
        if new is None:
            self._parts_freed()

    def _parts_freed(self) -> None:
        """A network that is gone leaves no parts on the nodes."""
        for node in self.cluster.items(NODES):
            if names.NODE_SUBNETS_ANNOTATION in objects.annotations(node):
                self._add("node", node)

    def _nad_changed(self, old: Object | None, new: Object | None) -> None:
        item = new or old
        if item is None:
            return
        namespace = objects.namespace_of(item)
        self._slices_of(namespace)
        reference = objects.owner_reference(item)
        if reference is not None and reference.get("kind") == UDNS.kind:
            self.queues["udn"].add(f"{namespace}/{reference['name']}")
        elif reference is not None and reference.get("kind") == CUDNS.kind:
            self.queues["cudn"].add(str(reference["name"]))
        if new is None:
            self._namespace_freed(namespace)
            self._parts_freed()
        elif objects.deleting(new):
            self._add("nad", new)
        for pod in (*self.cluster.pods(namespace), *self.cluster.askers(object_key(item))):
            self.queues["pod"].add(object_key(pod))
        # What is in the shared namespace concerns machines and claims of all others.
        concerned = None if namespace == SHARED_NAMESPACE else namespace
        for claim in self.cluster.items(CLAIMS):
            if concerned in (None, objects.namespace_of(claim)):
                self._add("claim", claim)
        self._machines_of(concerned)

    def _machines_of(self, namespace: str | None) -> None:
        for resource in (VMS, VMIS):
            for item in self.cluster.items(resource):
                if namespace in (None, objects.namespace_of(item)):
                    self._add("machine", item)

    def _claim_changed(self, old: Object | None, new: Object | None) -> None:
        item = new or old
        if item is None:
            return
        self._add("claim", item)
        key = objects.machine_key(item)
        if key is not None:
            self.queues["machine"].add(key)
        self._claim_filled(object_key(item))

    def _claim_filled(self, key: str) -> None:
        """The pods that may wait for a claim."""
        claim = self.cluster.get(CLAIMS, key)
        if claim is not None:
            for pod in self.cluster.claim_users(claim):
                self._add("pod", pod)

    def _vm_changed(self, old: Object | None, new: Object | None) -> None:
        item = new or old
        self._add("machine", item)
        self._claims_of(item)

    def _vmi_changed(self, old: Object | None, new: Object | None) -> None:
        item = new or old
        self._add("machine", item)
        self._add("migration", item)
        self._claims_of(item)
        if item is not None and old is None:
            # Pods that came before their VMI was seen.
            for pod in self.cluster.launchers(item):
                self.queues["pod"].add(object_key(pod))

    def _claims_of(self, machine: Object | None) -> None:
        if machine is None:
            return
        for network in objects.machine_networks(machine):
            name = names.claim_name(machine["metadata"]["name"], network)
            self.queues["claim"].add(f"{objects.namespace_of(machine)}/{name}")

    def _vmim_changed(self, old: Object | None, new: Object | None) -> None:
        item = new or old
        name = ((item or {}).get("spec") or {}).get("vmiName")
        if item is not None and name:
            self.queues["migration"].add(f"{objects.namespace_of(item)}/{name}")

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        item = new or old
        if item is None:
            return
        self._add("pod", item)
        if (node := objects.node_of(item)) and self._namespace == objects.namespace_of(item) and objects.is_agent(item):
            self.queues["node"].add(node)
        if old is None or new is None or _renetworked(old, new):
            self._slices_of(objects.namespace_of(item), str(item["metadata"]["name"]))
        if self.networks.blocked and (old is None or new is None or not objects.alive(new) or _renetworked(old, new)):
            for (resource, key), waiting in tuple(self.networks.blocked.items()):
                if any(self.cluster.uses(pod, nad) for pod in (old, new) if pod is not None for nad in waiting):
                    self.queues[_QUEUE_OF[resource]].add(key)
        vmi = self.cluster.machine_of(item)
        if vmi is not None:
            self._add("migration", vmi)
            self._claims_of(vmi)
        else:
            for claim in self.cluster.claims_of(item):
                self.queues["claim"].add(claim)

    def _slice_changed(self, old: Object | None, new: Object | None) -> None:
        # Of a mirror that somebody has edited its former state may tell whose it is.
        for item in (old, new):
            if item is not None:
                self.queues["slice"].add(source_key(item) if is_mirror(item) else object_key(item))

    def _slices_of(self, namespace: str, pod: str | None = None) -> None:
        """The slices of a namespace, or those of them that name a pod."""
        for item in self.cluster.slices(namespace):
            named = ((endpoint.get("targetRef") or {}).get("name") for endpoint in item.get("endpoints") or [])
            if not is_mirror(item) and (pod is None or pod in named):
                self._add("slice", item)

    def _add(self, kind: str, item: Object | None) -> None:
        if item is not None:
            self.queues[kind].add(object_key(item))


_QUEUE_OF: Final = {UDNS: "udn", CUDNS: "cudn", NADS: "nad"}


def _renetworked(old: Object, new: Object) -> bool:
    """Whether what a pod has on its networks changed."""
    key = names.POD_NETWORKS_ANNOTATION
    return objects.annotations(old).get(key) != objects.annotations(new).get(key)


def _observe(kind: str, result: str, seconds: float) -> None:
    metrics.RECONCILES.labels(kind, result).observe(seconds)


def _reached(known: Object | None, listed: Object) -> bool:
    """Whether what the watch has told is as new as what was listed. Versions are ordered numbers (Kubernetes 1.35)."""
    if known is None:
        return False
    return int(known["metadata"]["resourceVersion"]) >= int(listed["metadata"]["resourceVersion"])
