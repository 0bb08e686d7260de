"""eth0 of this node's pods that have a network of their own: which they are, and what passes the lock on them."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from vmnet.agent import facts, open_ports
from vmnet.agent.cluster import Cluster, Stores
from vmnet.kernel.api import Kernel
from vmnet.kube.api import Kube, Object, object_key
from vmnet.kube.events import Recorder
from vmnet.model import addresses, names
from vmnet.model.addresses import IPAddress
from vmnet.model.endpoint import NodeNetwork, PodReference
from vmnet.plan import lock
from vmnet.plan.lock import Lock, OpenPort
from vmnet.plan.state import Cgroup, NodeState
from vmnet.plan.table import Table

log = logging.getLogger(__name__)

REASON: Final = "OpenDefaultPortsMisread"
LOOK_SECONDS: Final = 2.0
"""So long may the kubelet's group be a new one before anybody notices: probes fail meanwhile."""


@dataclass(frozen=True, slots=True)
class Found:
    """A locked pod, and the container that its eth0 was made for (empty when an earlier agent locked it)."""

    key: str
    container: str
    lock: Lock


class DefaultInterfaces:
    """A ``TableSource``. ``kubelet``: path of its control group, None to look for it, empty to do without.

    ``on_node``: the node's tables are to be brought in step.
    """

    def __init__(
        self,
        kernel: Kernel,
        kube: Kube,
        stores: Stores,
        cluster: Cluster,
        node_name: str,
        on_node: Callable[[], None],
        kubelet: str | None = None,
    ) -> None:
        self._kernel = kernel
        self._stores = stores
        self._cluster = cluster
        self._node_name = node_name
        self._on_node = on_node
        self._kubelet_path = kubelet
        self._kubelet: Cgroup | None = None
        self._recorder = Recorder(kube, "vmnet-agent", host=node_name)
        self._found: dict[str, Found] = {}
        """By the pod's uid."""
        self._tables: tuple[Table, ...] | None = None
        self._misread: dict[str, str] = {}
        """What is wrong with pods' annotations, by the pods' keys."""
        self._untold: asyncio.Queue[str] = asyncio.Queue()
        stores.pods.add_handler(self._pod_changed)

    # Tables

    def network_tables(self, desired: NodeNetwork) -> tuple[Table, ...]:
        """None: eth0 is the node's business."""
        return ()

    def node_tables(self, rendered: Mapping[str, NodeNetwork]) -> tuple[Table, ...]:
        """One for the node, and one for the pods' veths."""
        if self._tables is None:
            self._tables = lock.tables((found.lock for _, found in sorted(self._found.items())), self._kubelet)
        return self._tables

    def demands(self, network: str) -> bool:
        """Never."""
        return False

    # Which pods

    async def lock(self, pod: PodReference, container: str, netns: str) -> None:
        """A pod is about to join its network: from the next look at ``node_tables`` on its eth0 is locked.

        Raises KernelError.
        """
        eth0 = await self._kernel.default_interface(netns)
        if eth0 is None or not eth0.addresses:
            self._found.pop(pod.uid, None)  # the network that it joins is its only one
            self._tables = None
            return
        key = f"{pod.namespace}/{pod.name}"
        if eth0.device is None:
            log.warning(
                "pod %s: eth0 has no veth; other pods that reach it past this node's stack are not kept off", key
            )
        self._put(key, container, Lock(pod.uid, eth0.device, eth0.mac, eth0.addresses, self._opened(key, pod.uid)))

    def unlock(self, container: str, uids: tuple[str, ...] = ()) -> bool:
        """A container is gone, and with it the ports of ``uids``. Whether tables change by that."""
        gone = [uid for uid, found in self._found.items() if uid in uids or found.container == container]
        for uid in gone:
            del self._found[uid]
            self._tables = None
        return bool(gone)

    def observed(self, state: NodeState) -> None:
        """A veth that is gone takes its lock along: its address may be another pod's by now."""
        for uid, found in list(self._found.items()):
            if found.lock.device is not None and found.lock.device not in state.links:
                del self._found[uid]
                self._tables = None

    async def adopt(self) -> None:
        """Find the pods that an earlier agent locked, and those that one locked which knew nothing of locks.

        Before the node's tables are first brought in step, or they would be taken for nobody's. Raises KernelError.
        """
        self._kubelet = await self._find_kubelet()
        state = await self._kernel.observe_node()
        for key, pod in self._local():
            uid = pod["metadata"]["uid"]
            told, mac = _told(pod)
            device = state.locked.get(names.port_interface(uid, names.DEFAULT_INTERFACE))
            if device is not None and device in state.links and told and mac is not None:
                self._put(key, "", Lock(uid, device, mac, told, self._opened(key, uid)))
                continue
            for address in sorted(told, key=str)[:1]:
                eth0 = await self._kernel.find_default_interface(address)
                if eth0 is None:
                    log.warning(
                        "pod %s: no interface with %s is found; only the node's own table guards it", key, address
                    )
                    self._put(key, "", Lock(uid, None, mac, told, self._opened(key, uid)))
                else:
                    found = Lock(uid, eth0.device, eth0.mac, eth0.addresses, self._opened(key, uid))
                    self._put(key, "", found)

    def _local(self) -> Iterator[tuple[str, Object]]:
        """Living pods of this node that have a primary network, and an address on it."""
        for pod in self._stores.pods.items():
            key = object_key(pod)
            if facts.node_of(pod) == self._node_name and self._cluster.endpoint(key) is not None:
                yield key, pod

    def _put(self, key: str, container: str, wanted: Lock) -> None:
        known = self._found.get(wanted.pod_uid)
        if known is not None and known.lock == wanted:
            self._found[wanted.pod_uid] = replace(known, container=container)
            return
        self._found[wanted.pod_uid] = Found(key, container, wanted)
        self._tables = None

    # What they open

    def _opened(self, key: str, uid: str) -> frozenset[OpenPort]:
        """What the annotation of exactly this pod opens: nothing while it is not understood."""
        pod = self._stores.pods.get(key)
        text = facts.annotations(pod).get(names.OPEN_PORTS_ANNOTATION) if pod is not None else None
        problem, found = "", frozenset[OpenPort]()
        if text is not None and pod is not None and facts.is_pod(pod, uid):
            try:
                found = open_ports.parse(text)
            except ValueError as error:
                problem = str(error)
        if problem and self._misread.get(key) != problem:
            log.warning("pod %s: %s", key, problem)
            self._misread[key] = problem
            self._untold.put_nowait(key)
        elif not problem:
            self._misread.pop(key, None)
        return found

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        if new is None:
            self._misread.pop(object_key(facts.subject(old, new)), None)
            return  # its container may live a while longer: DEL unlocks, or the end of its veth
        found = self._found.get(new["metadata"]["uid"])
        if found is None:
            return
        opened = self._opened(found.key, found.lock.pod_uid)
        if opened != found.lock.open:
            self._put(found.key, found.container, replace(found.lock, open=opened))
            self._on_node()

    async def tell(self) -> None:
        """Write events on pods whose annotation cannot be understood, until cancelled."""
        while True:
            key = await self._untold.get()
            pod, problem = self._stores.pods.get(key), self._misread.get(key)
            if pod is not None and problem is not None:
                about = {"apiVersion": "v1", "kind": "Pod", **pod}
                await self._recorder.event(
                    about,
                    REASON,
                    f"{problem}; no port is opened",
                    "Warning",
                    next_step="mend the annotation, docs/reference/annotations.md has its form; no new pod is needed",
                )

    # The kubelet

    async def follow_kubelet(self) -> None:
        """See when the kubelet's control group comes, goes or is another one, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            known = self._kubelet
            if known is not None and await self._kernel.kubelet(known.path) == known:
                continue
            self._kubelet = await self._find_kubelet()
            if self._kubelet != known:
                self._tables = None
                self._on_node()

    async def _find_kubelet(self) -> Cgroup | None:
        found = await self._kernel.kubelet(self._kubelet_path) if self._kubelet_path != "" else None
        if found is None and (self._kubelet is not None or self._tables is None):
            log.warning("no control group of the kubelet's own is found: every process of root may reach locked pods")
        elif found is not None and found != self._kubelet:
            log.info("the kubelet's control group is /%s", found.path)
        return found


def _told(pod: Object) -> tuple[frozenset[IPAddress], Any]:
    """A pod's addresses and MAC on the default network, as its ADD wrote them down or its status says."""
    try:
        entry = facts.allocation(pod, "default") or {}
        texts = entry.get("ip_addresses") or [item["ip"] for item in pod.get("status", {}).get("podIPs") or []]
        mac = addresses.parse_mac(entry["mac_address"]) if entry.get("mac_address") else None
        return frozenset(addresses.interface(text).ip for text in texts), mac
    except (KeyError, TypeError, ValueError) as error:
        log.warning("pod %s: what it has on the default network is not understood: %s", object_key(pod), error)
        return frozenset(), None
