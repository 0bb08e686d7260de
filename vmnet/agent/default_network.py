"""The default network of the cluster as its nodes tell it: where this node's networks must not lead."""

from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network

from vmnet.agent.cluster import Stores
from vmnet.kube.api import Object
from vmnet.model.endpoint import NodeNetwork
from vmnet.plan import default_network
from vmnet.plan.table import Table


class DefaultNetwork:
    """A ``TableSource``: ``spec.podCIDRs`` of all nodes. A cluster whose default network does not use them has none.

    ``changed`` is called when the subnets are others than before.
    """

    def __init__(self, stores: Stores, changed: Callable[[], None]) -> None:
        self._stores = stores
        self._changed = changed
        stores.nodes.add_handler(self._node_changed)

    def network_tables(self, desired: NodeNetwork) -> tuple[Table, ...]:
        """None: what is decided here the node knows."""
        return ()

    def node_tables(self, rendered: Mapping[str, NodeNetwork]) -> tuple[Table, ...]:
        """One, while a network is here."""
        subnets = {subnet for node in self._stores.nodes.items() for subnet in pod_subnets(node)}
        return (default_network.table(subnets),) if rendered and subnets else ()

    def demands(self, network: str) -> bool:
        """Never: without a network there is nothing to keep away."""
        return False

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        if pod_subnets(old or {}) != pod_subnets(new or {}):
            self._changed()


def pod_subnets(node: Object) -> tuple[IPv4Network | IPv6Network, ...]:
    """``spec.podCIDRs``, or the older ``spec.podCIDR``."""
    spec = node.get("spec") or {}
    texts = spec.get("podCIDRs") or [text for text in [spec.get("podCIDR")] if text]
    return tuple(ip_network(text) for text in texts)
