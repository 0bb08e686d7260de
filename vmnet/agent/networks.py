"""Renders on this node each network that a local endpoint needs: observe, plan, apply."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Final, Protocol

from vmnet.agent.cluster import Cluster
from vmnet.kernel.api import Kernel
from vmnet.model.endpoint import Endpoint, LocalPort, Node, NodeNetwork, PortState, RemoteEndpoint
from vmnet.model.names import InterfaceName, NetworkId
from vmnet.model.network import Network
from vmnet.plan import network as network_plan
from vmnet.plan import node as node_plan
from vmnet.plan import pod as pod_plan
from vmnet.plan.state import NetworkState, NodeState

log = logging.getLogger(__name__)

APPLY_TIMEOUT: Final = 60.0
"""Seconds for one network's operations; 10,000 endpoints take a few."""


class NetworkService(Protocol):
    """Something that runs inside a network's namespace while the network is on this node (DHCP and RA, DNS)."""

    async def follow(self, network: Network, mtu: int, local: Iterable[Endpoint], everywhere: Iterable[Endpoint]) -> None:
        """Serve a network's endpoints: those of this node, and all of them."""
        ...

    async def leave(self, network_id: NetworkId) -> None:
        """The network leaves this node."""
        ...


class NotReady(Exception):
    """The API does not know yet what is needed (this node's address, the network). Retryable."""


class Networks:
    """All networks of this node; one network is rendered by one task at a time."""

    def __init__(
        self, kernel: Kernel, cluster: Cluster, node_name: str, services: tuple[NetworkService, ...]
    ) -> None:
        self._kernel = kernel
        self._cluster = cluster
        self._node_name = node_name
        self._services = services
        self._locks: dict[str, asyncio.Lock] = {}
        self._attaching: dict[InterfaceName, LocalPort] = {}
        self._rendered: dict[str, Network] = {}

    def rendered(self) -> tuple[Network, ...]:
        """Networks that are on this node now."""
        return tuple(self._rendered.values())

    def this_node(self) -> Node:
        """This node as the fabric sees it. Raises NotReady."""
        node = self._cluster.node(self._node_name)
        if node is None:
            raise NotReady(f"node {self._node_name} has no InternalIP in the API yet")
        return node
