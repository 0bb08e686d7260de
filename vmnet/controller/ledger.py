"""Who has which address in every network: the allocators, filled from the API before the first address is given."""

import contextlib
import logging
from collections.abc import Callable
from typing import Final, NewType

from vmnet import metrics
from vmnet.controller import objects
from vmnet.controller.cluster import Attachment, Cluster
from vmnet.ipam.errors import AddressConflict, AllocationError
from vmnet.ipam.network_pools import Allocation, NetworkPools
from vmnet.ipam.node_pools import NodePools
from vmnet.kube.api import NODES, Object, object_key
from vmnet.model import names, parts
from vmnet.model.names import MacAddress
from vmnet.model.network import Network, Role
from vmnet.model.parts import Parts

log = logging.getLogger(__name__)

Owner = NewType("Owner", str)
_FAMILY: Final = {4: "ipv4", 6: "ipv6"}


def claim_owner(key: str) -> Owner:
    """A claim, by ``<namespace>/<name>``."""
    return Owner(f"claim {key}")


def pod_owner(pod: Object) -> Owner:
    """A pod that has no claim. A successor of the same name is somebody else."""
    return Owner(f"pod {object_key(pod)} ({pod['metadata'].get('uid')})")


def workload_owner(pod: Object, network: Network) -> Owner:
    """Who has a pod's unclaimed addresses: the pod, or on a secondary network the machine that it runs.

    The pods of a migrating machine are there at once, with one MAC; on a primary network its claim sees to that.
    """
    machine = objects.labels(pod).get(names.CREATED_BY_LABEL)
    if network.role is Role.PRIMARY or not network.stretched or not machine or not objects.is_launcher(pod):
        return pod_owner(pod)
    name = objects.annotations(pod).get(names.DOMAIN_ANNOTATION) or "machine"
    return Owner(f"machine {objects.namespace_of(pod)}/{name} ({machine})")


class Ledger:
    """The pools of all networks.

    A network's pools are made when it is first asked for, and are then filled at once, without awaiting, with every
    claim and every annotated node and pod that the informers know: nothing is given before that.
    """

    def __init__(self, cluster: Cluster, released: Callable[[str], None] = lambda network: None) -> None:
        self._cluster = cluster
        self._networks: dict[str, NetworkPools | NodePools] = {}
        self.released = released
        """Called with the network's name whenever addresses came free."""

    def open(self, network: Network) -> NetworkPools | NodePools:
        """What there is of a network, whatever its topology."""
        found = self._networks.get(network.name)
        if found is not None and _layout(found.network) != _layout(network):
            # Deleted and made anew under the same name, with other subnets.
            self.forget(network.name)
            found = None
        if found is None:
            found = NetworkPools(network) if network.stretched else NodePools(network)
            self._networks[network.name] = found
            self._load(found)
        elif isinstance(found, NodePools) and not set(network.subnets) <= set(found.network.subnets):
            found.extend(network)
            self.publish(network.name)
        return found

    def pools(self, network: Network) -> NetworkPools:
        """The pools of a network that has the same on all nodes. Raises ValueError for another one."""
        found = self.open(network)
        if not isinstance(found, NetworkPools):
            raise ValueError(f"network {network.name} has addresses by node")
        return found

    def node_pools(self, network: Network) -> NodePools:
        """The pools of a Layer3 network. Raises ValueError for another one."""
        found = self.open(network)
        if not isinstance(found, NodePools):
            raise ValueError(f"network {network.name} has the same addresses on all nodes")
        return found

    def get(self, owner: Owner, network: str) -> Allocation | None:
        """What an owner has in a network."""
        pools = self._networks.get(network)
        return pools.get(owner) if pools is not None else None

    def parts(self, node: str) -> dict[str, Parts]:
        """Layer3 network name → what a node has of it."""
        found = {name: pools.parts(node) for name, pools in self._networks.items() if isinstance(pools, NodePools)}
        return {name: held for name, held in found.items() if held}

    def knows(self, network: str) -> bool:
        """Whether a network's pools are made."""
        return network in self._networks

    def stay(self, node: str) -> None:
        """A node is there: what it has, it keeps."""
        for pools in self._networks.values():
            if isinstance(pools, NodePools):
                pools.stay(node)

    def leave(self, node: str) -> None:
        """A node is gone: others may have its parts."""
        for name, pools in self._networks.items():
            if isinstance(pools, NodePools) and pools.leave(node):
                self.released(name)

    def publish(self, network: str) -> None:
        """Bring the gauges of a network up to date."""
        pools = self._networks.get(network)
        if pools is None:
            return
        for family in pools.families:
            metrics.ADDRESSES_USED.labels(network, _FAMILY[family]).set(pools.used(family))
            metrics.ADDRESSES_CAPACITY.labels(network, _FAMILY[family]).set(pools.capacity(family))

    def release(self, owner: Owner, network: str | None = None) -> None:
        """Take back what an owner has, in one network or in all."""
        for name, pools in self._networks.items():
            if network in (None, name) and pools.release(owner):
                self.publish(name)
                self.released(name)

    def forget(self, network: str) -> None:
        """The network is gone."""
        pools = self._networks.pop(network, None)
        if pools is None:
            return
        for family in pools.families:
            metrics.ADDRESSES_USED.remove(network, _FAMILY[family])
            metrics.ADDRESSES_CAPACITY.remove(network, _FAMILY[family])

    def _load(self, pools: NetworkPools | NodePools) -> None:
        network = pools.network.name
        if isinstance(pools, NodePools):
            # Of two nodes with one part the older keeps it.
            for node in sorted(self._cluster.items(NODES), key=objects.seniority):
                self._load_parts(pools, node)
        else:
            for claim in self._cluster.claims(network):
                self._load_claim(pools, claim)
        for attachment in self._cluster.attachments(network=network):
            for pod in self._cluster.attached(attachment.key):
                if objects.alive(pod):
                    self._load_pod(pools, attachment, pod)
        if isinstance(pools, NetworkPools):
            for claim in self._cluster.claims(network):
                self._settle_mac(pools, claim)
        self.publish(network)

    def _load_parts(self, pools: NodePools, node: Object) -> None:
        try:
            for part in parts.parts_of(objects.annotations(node)).get(pools.network.name, ()):
                pools.adopt(object_key(node), part)
        except (ValueError, AllocationError) as error:
            log.error("node %s on network %s: %s", object_key(node), pools.network.name, error)

    def _load_claim(self, pools: NetworkPools, claim: Object) -> None:
        try:
            wanted = objects.claim_addresses(claim)
            if wanted:
                owner = claim_owner(object_key(claim))
                # A claim does not tell its MAC, and the one that follows from the address may be somebody else's.
                pools.reserve(owner, wanted, _unknown(owner), partial=True)
        except (ValueError, AllocationError) as error:
            log.error("claim %s of network %s: %s", object_key(claim), pools.network.name, error)

    def _settle_mac(self, pools: NetworkPools, claim: Object) -> None:
        """The MAC of a claim that no pod has told it of: as its machine asks, or as it follows from the address."""
        owner = claim_owner(object_key(claim))
        held = pools.get(owner)
        if held is None or held.mac != _unknown(owner):
            return
        choices: list[MacAddress | None] = [None, pools.spare_mac(owner)]
        try:
            request = self._cluster.claim_request(claim)
            choices[:0] = [request.mac] if request is not None and request.mac is not None else []
        except ValueError as error:
            log.error("claim %s of network %s: %s", object_key(claim), pools.network.name, error)
        for mac in choices:
            with contextlib.suppress(AddressConflict):
                pools.reserve(owner, held.ips, mac, partial=True)
                return

    def _load_pod(self, pools: NetworkPools | NodePools, attachment: Attachment, pod: Object) -> None:
        try:
            found = objects.allocated(pod, attachment.key, addressed=bool(pools.network.subnets))
            if found is None:
                return
            reference = self._cluster.claim_reference(pod, attachment)
            owner = claim_owner(reference.key) if reference is not None else workload_owner(pod, pools.network)
            held = pools.get(owner)
            if held is not None and set(held.ips) != {item.ip for item in found.addresses}:
                raise ValueError(f"its addresses are not those of {owner}")
            local = pools if isinstance(pools, NetworkPools) else _pools_of(pools, pod, found)
            # The pod knows a MAC that was asked for; a claim does not record it.
            local.reserve(owner, found.addresses, found.mac, partial=True)
        except (ValueError, AllocationError) as error:
            log.error("pod %s on network %s: %s", object_key(pod), pools.network.name, error)


def _unknown(owner: Owner) -> MacAddress:
    """Stands for a claim's MAC while a network's pools are filled: nobody else can have it."""
    return MacAddress(owner)


def _pools_of(pools: NodePools, pod: Object, found: objects.Allocated) -> NetworkPools:
    """The pools of a pod's node, with the parts that its addresses lie in. Raises AllocationError, ValueError."""
    node = objects.node_of(pod)
    for item in found.addresses:
        if not any(part.version == item.version for part in pools.parts(node)):
            # Its node's annotation has been spoiled; the pod remembers.
            pools.adopt(node, item.network)
    local = pools.at(node)
    if local is None:
        raise ValueError(f"node {node} has no part of the network")
    return local


def _layout(network: Network) -> tuple[object, ...]:
    if not network.stretched:
        # Subnets may be added, and the NADs of several namespaces are not written at one moment.
        return (network.topology, network.id)
    return (
        network.topology,
        network.subnets,
        network.reserved_subnets,
        network.infrastructure_subnets,
        network.default_gateways,
    )
