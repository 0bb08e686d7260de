"""Nodes: a number for each, from which the transit addresses of its routers follow."""

import logging
from typing import Final

from vmnet.controller import objects
from vmnet.controller.cluster import Cluster
from vmnet.controller.identifiers import Numbers
from vmnet.kube.api import NODES, Kube, NotFound, Object, object_key
from vmnet.kube.events import Recorder
from vmnet.model import names, parts

log = logging.getLogger(__name__)

NUMBERING_FAILED: Final = "ErrorNumberingNode"
"""Event reason on the Node."""


class NodeReconciler:
    """Keyed by node name."""

    def __init__(self, kube: Kube, cluster: Cluster, events: Recorder) -> None:
        self._kube = kube
        self._cluster = cluster
        self._events = events
        self._numbers = Numbers(parts.MAX_NUMBER, "node")

    def load(self) -> None:
        """Take over the numbers that are written down. Before the first ``reconcile``."""
        # Of two nodes with one number the older keeps it: more routers use it.
        for node in sorted(self._cluster.items(NODES), key=_age):
            self._adopt(node)

    async def reconcile(self, key: str) -> float | None:
        """See that a node has a number of its own, or that one which is gone has none."""
        node = self._cluster.get(NODES, key)
        if node is None:
            self._numbers.release(key)
            return None
        if self._numbers.get(key) is None:
            self._adopt(node)
        try:
            number = self._numbers.allocate(key)
        except ValueError as error:
            await self._events.event(node, NUMBERING_FAILED, str(error), "Warning")
            return None
        if parts.number_of(objects.annotations(node)) == number:
            return None
        metadata = node["metadata"]
        body = {
            "metadata": {
                "resourceVersion": metadata["resourceVersion"],
                "annotations": {names.NODE_NUMBER_ANNOTATION: str(number)},
            }
        }
        try:
            await self._kube.patch(NODES, metadata["name"], body)
        except NotFound:
            log.debug("node %s went before it was numbered", key)
        return None

    def _adopt(self, node: Object) -> None:
        number = parts.number_of(objects.annotations(node))
        if number is None:
            return
        holder = self._numbers.adopt(object_key(node), number)
        if holder is not None:
            log.warning("node %s has the number %d of node %s: it gets another", object_key(node), number, holder)


def _age(node: Object) -> tuple[str, str]:
    return str(node["metadata"].get("creationTimestamp") or ""), object_key(node)
