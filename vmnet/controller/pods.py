"""Pods of namespaces with a primary network: addresses, and the annotation that CNI ADD waits for."""

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from vmnet.controller import objects
from vmnet.controller.claims import failure, foreign
from vmnet.controller.cluster import Attachment, ClaimReference, Cluster
from vmnet.controller.ledger import Ledger, Owner, claim_owner, pod_owner
from vmnet.controller.waiting import WaitingRoom
from vmnet.ipam.errors import AddressConflict, AllocationError, Exhausted
from vmnet.ipam.network_pools import Allocation, NetworkPools
from vmnet.kube.api import CLAIMS, NODES, PODS, Kube, NotFound, Object, object_key
from vmnet.kube.events import Recorder
from vmnet.model import names, parts
from vmnet.model.network import Network, Role
from vmnet.model.parts import Parts

log = logging.getLogger(__name__)

ALLOCATION_FAILED: Final = "ErrorAllocatingPod"
"""Event reason (contract)."""
CLAIM_PATIENCE_SECONDS: Final = 5.0


def node_group(node: str) -> str:
    """What pods wait for, in the waiting room, that need a part of their network on a node. No network is called so."""
    return f"node {node}"


def entry(network: Network, allocation: Allocation) -> dict[str, Any]:
    """One entry of the pod-networks annotation; the singular forms only for single-stack networks."""
    network = network.around(allocation.addresses)
    gateways = [str(gateway) for item in allocation.addresses if (gateway := network.gateway_for(item.version))]
    found: dict[str, Any] = {
        "ip_addresses": [str(item) for item in allocation.addresses],
        "mac_address": allocation.mac,
        "gateway_ips": gateways,
        "role": network.role.value,
    }
    if len(allocation.addresses) == 1:
        found["ip_address"] = str(allocation.addresses[0])
        if gateways:
            found["gateway_ip"] = gateways[0]
    if not network.stretched and network.role is Role.SECONDARY:
        # No default route leads there.
        hops = {item.version: network.gateway_for(item.version) for item in allocation.addresses}
        found["routes"] = [
            {"dest": str(subnet), "nextHop": str(hop)}
            for subnet in network.subnets
            if (hop := hops.get(subnet.version))
        ]
    return found


class PodReconciler:
    """Keyed by ``<namespace>/<pod>``."""

    def __init__(
        self,
        kube: Kube,
        cluster: Cluster,
        ledger: Ledger,
        events: Recorder,
        waiting: WaitingRoom,
        again: Callable[[str], None] = lambda key: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._kube = kube
        self._cluster = cluster
        self._ledger = ledger
        self._events = events
        self._waiting = waiting
        self.again = again
        """Puts a key into this reconciler's queue."""
        self.place: Callable[[str], None] = lambda node: None
        """Called with a node that has got a part of a network, which is to be written on it."""
        self._now = now
        self._owners: dict[str, tuple[Owner, str]] = {}
        """Pod key → the owner of its own (not claimed) addresses, and the network they are of."""

    def load(self) -> None:
        """Remember which pods own addresses, so that they are given back when those pods go. After the ledger."""
        for found in self._cluster.attachments():
            for pod in self._cluster.pods(found.namespace):
                owner = pod_owner(pod)
                if self._ledger.get(owner, found.network.name) is not None:
                    self._owners[object_key(pod)] = (owner, found.network.name)

    async def reconcile(self, key: str) -> float | None:
        """Give one pod its addresses, or take them back."""
        pod = self._cluster.get(PODS, key)
        self._waiting.leave("pod", key)
        held = self._owners.get(key)
        if held is not None and (pod is None or not objects.alive(pod) or pod_owner(pod) != held[0]):
            del self._owners[key]
            self._ledger.release(*held)
        if pod is None or not objects.alive(pod) or objects.host_network(pod):
            return None
        namespace = objects.namespace_of(pod)
        if not self._cluster.labelled(namespace):
            return None
        attachment = self._cluster.primary(namespace)
        try:
            if attachment is None:
                if not objects.pod_networks(pod):
                    message = (
                        f"namespace {namespace} is labelled for a primary network, but has none yet; waiting for it"
                    )
                    await self._events.event(pod, ALLOCATION_FAILED, message, "Warning")
                return None
            pools = self._pools(pod, attachment.network)
            if pools is None:
                return None
            allocation = await self._allocate(pod, attachment, pools)
            if allocation is None:
                return await self._wait_for_claim(pod)
            await self._annotate(pod, attachment, allocation)
        except (ValueError, AllocationError) as error:
            network = attachment.network.name if attachment is not None else ""
            if isinstance(error, Exhausted | AddressConflict):
                self._waiting.enter(network, "pod", key, self.again)
            part = attachment is not None and not attachment.network.stretched
            where = f" on node {objects.node_of(pod)}" if part else ""
            await self._events.event(pod, ALLOCATION_FAILED, f"network {network}{where}: {error}", "Warning")
        return None

    async def _wait_for_claim(self, pod: Object) -> float | None:
        """Claim and pod come at the same moment; only a claim that is still not there after a while is worth a word."""
        age = (self._now() - datetime.fromisoformat(pod["metadata"]["creationTimestamp"])).total_seconds()
        if age < CLAIM_PATIENCE_SECONDS:
            return CLAIM_PATIENCE_SECONDS - max(0.0, age)
        message = "waiting for the IPAMClaim of this machine to be there and to have addresses"
        await self._events.event(pod, ALLOCATION_FAILED, message, "Warning")
        return None

    def _pools(self, pod: Object, network: Network) -> NetworkPools | None:
        """Where the pod's addresses come from; None until its node is known and has its part, in writing.

        Raises Exhausted.
        """
        if network.stretched:
            return self._ledger.pools(network)
        name = objects.node_of(pod)
        if not name:
            return None  # until it is bound: that is a change of the pod
        pools = self._ledger.node_pools(network)
        node = self._cluster.get(NODES, name)
        if node is not None:
            found = pools.place(name)
            # The agents must know by which node the address is reached, also after a restart of this process.
            if _has_in_writing(node, network.name, pools.parts(name)):
                return found
            self.place(name)
        self._waiting.enter(node_group(name), "pod", object_key(pod), self.again)
        return None

    async def _allocate(self, pod: Object, attachment: Attachment, pools: NetworkPools) -> Allocation | None:
        """What the pod shall have; None while its claim has nothing. Raises AllocationError, ValueError."""
        network = attachment.network
        reference = self._cluster.claim_reference(pod, network)
        present = objects.allocated(pod, attachment.key)
        if reference is not None:
            return await self._claimed(pod, attachment, reference)
        if objects.is_launcher(pod) and network.persistent and self._cluster.machine_of(pod) is None and not present:
            # Its machine, and so its claim, will be known in a moment.
            return None
        owner = pod_owner(pod)
        if present is not None:
            allocation = pools.reserve(owner, present.addresses, present.mac, partial=True)
        else:
            request = objects.pod_request(pod)
            if request.addresses:
                allocation = pools.reserve(owner, request.addresses, request.mac)
            else:
                allocation = pools.allocate(owner, request.mac)
        self._owners[object_key(pod)] = (owner, network.name)
        self._ledger.publish(network.name)
        return allocation

    async def _claimed(self, pod: Object, attachment: Attachment, reference: ClaimReference) -> Allocation | None:
        claim = self._cluster.get(CLAIMS, reference.key)
        if claim is not None and (claim.get("spec") or {}).get("network") != attachment.network.name:
            other = (claim.get("spec") or {}).get("network")
            raise ValueError(f"IPAMClaim {reference.key} is for network {other}")
        if claim is None:
            return None
        machine = self._cluster.machine_of(pod)
        if machine is not None:
            problem = foreign(claim, objects.machine_uids(machine))
            if problem is not None:
                raise ValueError(problem)
        failed = failure(claim)
        if failed is not None:
            raise ValueError(f"IPAMClaim {reference.key}: {failed}")
        # Only what the claim's status says is safe to use: it is there after a restart too.
        if not objects.claim_addresses(claim):
            return None
        found = self._ledger.pools(attachment.network).get(claim_owner(reference.key))
        request = self._cluster.claim_request(claim)
        if found is not None and request is not None and request.mac not in (None, found.mac):
            # The machine asks for another MAC than before; the claim's reconciler is about to see to it.
            return None
        return found

    async def _annotate(self, pod: Object, attachment: Attachment, allocation: Allocation) -> None:
        entries = objects.pod_networks(pod)
        wanted = entry(attachment.network, allocation)
        if entries.get(attachment.key) == wanted:
            return
        if attachment.key in entries:
            present = objects.allocated(pod, attachment.key)
            if present is not None and present.addresses == allocation.addresses and present.mac == allocation.mac:
                return
            if present is not None:
                raise ValueError(
                    f"annotation {names.POD_NETWORKS_ANNOTATION} names {', '.join(map(str, present.addresses))}, "
                    f"but {', '.join(map(str, allocation.addresses))} belong to the pod"
                )
        metadata = pod["metadata"]
        # The agent writes other keys of the same annotation: the version makes sure that neither undoes the other.
        body = {
            "metadata": {
                "resourceVersion": metadata["resourceVersion"],
                "annotations": {
                    names.POD_NETWORKS_ANNOTATION: json.dumps({**entries, attachment.key: wanted}, sort_keys=True)
                },
            }
        }
        try:
            await self._kube.patch(PODS, metadata["name"], body, metadata["namespace"])
        except NotFound:
            log.debug("pod %s went before it was annotated", object_key(pod))


def _has_in_writing(node: Object, network: str, held: Parts) -> bool:
    try:
        return parts.parts_of(objects.annotations(node)).get(network) == held
    except ValueError:
        return False  # the node's reconciler writes it anew
