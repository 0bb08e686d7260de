"""Nodes: a number for each, which its routers' transit addresses follow from, its parts of Layer3 networks, and the
taint that keeps pods away until its agent is ready."""

import logging
from collections.abc import Mapping
from typing import Final

from vmnet import metrics
from vmnet.controller import objects, specs
from vmnet.controller.cluster import Cluster
from vmnet.controller.identifiers import Numbers
from vmnet.controller.ledger import Ledger
from vmnet.kube.api import CUDNS, NODES, UDNS, Kube, NotFound, Object, object_key
from vmnet.kube.events import Recorder
from vmnet.model import names, parts
from vmnet.model.parts import Parts

log = logging.getLogger(__name__)

NUMBERING_FAILED: Final = "ErrorNumberingNode"
"""Event reason on the Node."""


class NodeReconciler:
    """Keyed by node name. The only one who writes on Nodes, so that one write carries all that there is to say."""

    def __init__(self, kube: Kube, cluster: Cluster, ledger: Ledger, events: Recorder, namespace: str) -> None:
        """``namespace``: where the agents' pods are."""
        self._namespace = namespace
        self._kube = kube
        self._cluster = cluster
        self._ledger = ledger
        self._events = events
        self._numbers = Numbers(parts.MAX_NUMBER, "node")
        self._looked_at: set[str] = set()
        """Nodes on which nothing of former times is left."""

    def load(self) -> None:
        """Take over the numbers that are written down. Before the first ``reconcile``."""
        # Of two nodes with one number the older keeps it: more routers use it.
        for node in sorted(self._cluster.items(NODES), key=objects.seniority):
            self._adopt(node)

    async def reconcile(self, key: str) -> float | None:
        """Write down a node's number and parts; take back those of a node that is gone."""
        node = self._cluster.get(NODES, key)
        if node is None:
            self._looked_at.discard(key)
            self._numbers.release(key)
            self._ledger.leave(key)
            return None
        self._ledger.stay(key)
        if self._numbers.get(key) is None:
            self._adopt(node)
        try:
            number = self._numbers.allocate(key)
        except ValueError as error:
            step = "a number is free again when a Node that is gone for good is deleted: kubectl get nodes"
            await self._events.event(node, NUMBERING_FAILED, str(error), "Warning", next_step=step)
            return None
        wanted: dict[str, str | None] = {}
        if parts.number_of(objects.annotations(node)) != number:
            wanted[names.NODE_NUMBER_ANNOTATION] = str(number)
        written = _written(node)
        held = self._held(key, written or {})
        if held != written:
            wanted[names.NODE_SUBNETS_ANNOTATION] = parts.encode_parts(held) if held else None
        taints = (node.get("spec") or {}).get("taints") or []
        kept = [taint for taint in taints if taint.get("key") != names.NODE_TAINT]
        admitted = len(kept) < len(taints) and self._agent_is_ready(key)
        if not wanted and not admitted:
            self._looked_at.add(key)
            return None
        metadata = node["metadata"]
        body: Object = {"metadata": {"resourceVersion": metadata["resourceVersion"], "annotations": wanted}}
        if admitted:
            # Nobody else's taint is lost: the write fails when the node has changed meanwhile.
            body["spec"] = {"taints": kept}
            log.info("node %s: its agent is ready, so pods may come", key)
        try:
            await self._kube.patch(NODES, metadata["name"], body)
        except NotFound:
            log.debug("node %s went before it was written on", key)
        else:
            if key not in self._looked_at:
                # Of networks that went while no controller looked.
                metrics.LEFT_OVERS.labels("annotation").inc(len((written or {}).keys() - held.keys()))
            self._looked_at.add(key)
        return None

    def _agent_is_ready(self, node: str) -> bool:
        return any(
            objects.is_agent(pod) and objects.node_of(pod) == node and objects.ready(pod)
            for pod in self._cluster.pods(self._namespace)
        )

    def _held(self, key: str, written: Mapping[str, Parts]) -> dict[str, Parts]:
        """Parts of all networks that there are; what nobody has asked about since this process began stays as it is."""
        held = {name: found for name, found in written.items() if not self._ledger.knows(name)}
        held |= self._ledger.parts(key)
        if not held:
            return {}
        known = {found.network.name for found in self._cluster.attachments()}
        known |= {specs.network_name(item) for resource in (UDNS, CUDNS) for item in self._cluster.items(resource)}
        return {name: found for name, found in held.items() if name in known}

    def _adopt(self, node: Object) -> None:
        number = parts.number_of(objects.annotations(node))
        if number is None:
            return
        holder = self._numbers.adopt(object_key(node), number)
        if holder is not None:
            log.warning("node %s has the number %d of node %s: it gets another", object_key(node), number, holder)


def _written(node: Object) -> dict[str, Parts] | None:
    """The parts that a node's annotation tells; None when it cannot be read."""
    try:
        return parts.parts_of(objects.annotations(node))
    except ValueError as error:
        log.warning("node %s: %s", object_key(node), error)
        return None
