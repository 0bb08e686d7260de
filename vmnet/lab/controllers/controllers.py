"""All stand-ins at work: which change concerns which of them, and the queues between."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from vmnet.kube.api import (
    ENDPOINT_SLICES,
    NAMESPACES,
    NODES,
    PODS,
    SERVICES,
    Kube,
    KubeError,
    Object,
    object_key,
)
from vmnet.kube.events import Recorder
from vmnet.kube.watch import ListWatch
from vmnet.lab.controllers import scheduler
from vmnet.lab.controllers.accounts import Accounts
from vmnet.lab.controllers.cluster import (
    DEPLOYMENTS,
    REPLICA_SETS,
    SERVICE_ACCOUNTS,
    STATEFUL_SETS,
    WATCHED,
    in_namespace,
    owner_key,
)
from vmnet.lab.controllers.deployments import Deployments
from vmnet.lab.controllers.endpoints import SERVICE_NAME, Address, Endpoints
from vmnet.lab.controllers.matching import selects_plainly
from vmnet.lab.controllers.placement import is_finished
from vmnet.lab.controllers.replica_sets import ReplicaSets
from vmnet.lab.controllers.scheduler import Scheduler
from vmnet.lab.controllers.stateful_sets import StatefulSets
from vmnet.runtime.queue import KeyedQueue, work
from vmnet.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

_WORKERS: Final = 4
Reconcile = Callable[[str], Awaitable[float | None]]


class Controllers:
    """Runs them until cancelled. Belongs to one event loop."""

    def __init__(self, kube: Kube, load_balancer_pools: Sequence[Sequence[Address]] = ()) -> None:
        self.informers = {resource: ListWatch(kube, resource) for resource in WATCHED}
        self._scheduler = Scheduler(kube, self.informers, Recorder(kube, scheduler.NAME))
        parts: dict[str, tuple[Reconcile, int]] = {
            # Two pods that are placed at the same time would not see each other.
            "pod": (self._scheduler.reconcile, 1),
            "namespace": (Accounts(kube, self.informers).reconcile, _WORKERS),
            "service": (Endpoints(kube, self.informers, load_balancer_pools).reconcile, _WORKERS),
            "replicaset": (
                ReplicaSets(kube, self.informers, Recorder(kube, "replicaset-controller")).reconcile,
                _WORKERS,
            ),
            "deployment": (
                Deployments(kube, self.informers, Recorder(kube, "deployment-controller")).reconcile,
                _WORKERS,
            ),
            "statefulset": (
                StatefulSets(kube, self.informers, Recorder(kube, "statefulset-controller")).reconcile,
                _WORKERS,
            ),
        }
        self._parts = parts
        self.queues = {kind: KeyedQueue() for kind in parts}
        self.ready = asyncio.Event()
        """Set once everything has been listed and the queues are served."""

    async def run(self) -> None:
        """Watch and reconcile."""
        for resource, handler in (
            (PODS, self._pod_changed),
            (NODES, self._node_changed),
            (NAMESPACES, self._namespace_changed),
            (SERVICE_ACCOUNTS, self._account_changed),
            (SERVICES, self._queued("service")),
            (ENDPOINT_SLICES, self._slice_changed),
            (DEPLOYMENTS, self._queued("deployment")),
            (REPLICA_SETS, self._replica_set_changed),
            (STATEFUL_SETS, self._queued("statefulset")),
        ):
            self.informers[resource].add_handler(handler)
        async with TaskScope() as scope:
            for resource, informer in self.informers.items():
                scope.service(informer.run(), f"watch {resource.plural}")
            for informer in self.informers.values():
                await informer.synced.wait()
            for kind, (reconcile, workers) in self._parts.items():
                scope.service(
                    work(self.queues[kind], reconcile, workers, kind, expected=(KubeError,)),
                    f"reconcile {kind}",
                )
            self.ready.set()
            log.info("watching %s", ", ".join(resource.plural for resource in WATCHED))
            await asyncio.Event().wait()

    def _queued(self, kind: str) -> Callable[[Object | None, Object | None], None]:
        def handler(old: Object | None, new: Object | None) -> None:
            for item in _either(old, new):
                self.queues[kind].add(object_key(item))

        return handler

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        for item in _either(old, new):
            key = object_key(item)
            if new is not None and not new["spec"].get("nodeName"):
                self.queues["pod"].add(key)
            for resource, kind in ((REPLICA_SETS, "replicaset"), (STATEFUL_SETS, "statefulset")):
                parent = owner_key(item, resource.kind)
                if parent is not None:
                    self.queues[kind].add(parent)
        for pod in filter(None, (old, new)):
            namespace = pod["metadata"]["namespace"]
            for service in in_namespace(self.informers[SERVICES].items(), namespace):
                if selects_plainly(service["spec"].get("selector"), pod["metadata"].get("labels")):
                    self.queues["service"].add(object_key(service))
        if old is None or new is None or _footprint(old) != _footprint(new):
            self._look_again()

    def _look_again(self) -> None:
        for key in list(self._scheduler.unplaced):
            self.queues["pod"].add(key)

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        if old is not None and new is not None and _placement(old) == _placement(new):
            return
        self._look_again()

    def _namespace_changed(self, old: Object | None, new: Object | None) -> None:
        if new is not None:
            self.queues["namespace"].add(object_key(new))
            self._look_again()

    def _account_changed(self, old: Object | None, new: Object | None) -> None:
        if new is None and old is not None and old["metadata"]["name"] == "default":
            self.queues["namespace"].add(old["metadata"]["namespace"])

    def _slice_changed(self, old: Object | None, new: Object | None) -> None:
        for item in _either(old, new):
            service = (item["metadata"].get("labels") or {}).get(SERVICE_NAME)
            if service:
                self.queues["service"].add(f"{item['metadata']['namespace']}/{service}")

    def _replica_set_changed(self, old: Object | None, new: Object | None) -> None:
        for item in _either(old, new):
            self.queues["replicaset"].add(object_key(item))
            parent = owner_key(item, DEPLOYMENTS.kind)
            if parent is not None:
                self.queues["deployment"].add(parent)


def _either(old: Object | None, new: Object | None) -> Iterable[Object]:
    found = new if new is not None else old
    return () if found is None else (found,)


def _footprint(pod: Object) -> tuple[object, ...]:
    """What a pod takes from its node, and what others may want to be near to or away from."""
    return pod["metadata"].get("labels"), pod["spec"].get("nodeName"), is_finished(pod)


def _placement(node: Object) -> tuple[object, ...]:
    """What placement and addresses depend on: a node's heartbeat must not wake everybody."""
    status = node.get("status") or {}
    ready = [item["status"] for item in status.get("conditions") or () if item["type"] == "Ready"]
    return (
        node["metadata"].get("labels"),
        node["metadata"].get("deletionTimestamp"),
        node.get("spec"),
        status.get("allocatable"),
        status.get("addresses"),
        ready,
    )
