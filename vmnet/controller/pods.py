"""Pods on user-defined networks: addresses, and the annotation that CNI ADD waits for."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from vmnet.controller import objects
from vmnet.controller.claims import failure, foreign
from vmnet.controller.cluster import Attachment, ClaimReference, Cluster
from vmnet.controller.ledger import Ledger, Owner, claim_owner, workload_owner
from vmnet.controller.waiting import WaitingRoom
from vmnet.ipam.errors import AddressConflict, AllocationError, Exhausted, Immovable
from vmnet.ipam.network_pools import Allocation, NetworkPools
from vmnet.kube.api import CLAIMS, NADS, NODES, PODS, Kube, NotFound, Object, object_key
from vmnet.kube.events import Recorder
from vmnet.model import names, parts
from vmnet.model.network import Network, Role
from vmnet.model.parts import Parts
from vmnet.model.selection import Selection, selections

log = logging.getLogger(__name__)

ALLOCATION_FAILED: Final = "ErrorAllocatingPod"
"""Event reason (contract)."""
_NEXT_STEP: Final = "docs/troubleshooting.md#a-pod-does-not-start says what to do; it is tried again by itself"
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
        "role": network.role.value,
    }
    if gateways or network.role is Role.PRIMARY:
        found["gateway_ips"] = gateways
    if len(allocation.addresses) == 1:
        found["ip_address"] = str(allocation.addresses[0])
        if gateways:
            found["gateway_ip"] = gateways[0]
    if network.pod_routes:
        found["routes"] = [{"dest": str(subnet), "nextHop": str(hop)} for subnet, hop in network.pod_routes]
    return found


@dataclass(slots=True)
class _Held:
    """What one pod holds that no claim does: network → the owner that the ledger knows."""

    uid: str
    owners: dict[str, Owner] = field(default_factory=dict)


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
        self._held: dict[str, _Held] = {}
        """By pod key."""
        self._shares: Counter[tuple[str, Owner]] = Counter()
        """Network and owner → how many pods hold it: those of a migrating machine share theirs."""

    def load(self) -> None:
        """Remember which pods own addresses, so that they are given back when those pods go. After the ledger."""
        for found in self._cluster.attachments():
            for pod in self._cluster.attached(found.key):
                owner = workload_owner(pod, found.network)
                if self._ledger.get(owner, found.network.name) is not None:
                    self._hold(pod, found.network, owner)

    async def reconcile(self, key: str) -> float | None:
        """Give one pod its addresses, or take them back."""
        pod = self._cluster.get(PODS, key)
        self._waiting.leave("pod", key)
        held = self._held.get(key)
        if held is not None and (pod is None or not objects.alive(pod) or pod["metadata"].get("uid") != held.uid):
            self._give_back(key, held)
        if pod is None or not objects.alive(pod) or objects.host_network(pod):
            return None
        again: list[float] = []
        entries: dict[str, dict[str, Any]] = {}
        for attachment in await self._wanted(pod):
            try:
                pools = self._pools(pod, attachment.network)
                if pools is None:
                    continue
                allocation = await self._allocate(pod, attachment, pools)
                if allocation is None:
                    again += await self._wait_for_claim(pod) if attachment.key not in _entries(pod) else []
                elif not _settled(pod, attachment, allocation):
                    entries[attachment.key] = entry(attachment.network, allocation)
            except (ValueError, AllocationError) as error:
                if isinstance(error, Exhausted | AddressConflict | Immovable):
                    self._waiting.enter(attachment.network.name, "pod", key, self.again)
                where = "" if attachment.network.stretched else f" on node {objects.node_of(pod)}"
                await self._tell(pod, f"network {attachment.network.name}{where}: {error}")
        if entries:
            await self._annotate(pod, entries)
        return min(again, default=None)

    async def _wanted(self, pod: Object) -> list[Attachment]:
        """The attachments the pod shall have; what it cannot have is told."""
        namespace = objects.namespace_of(pod)
        found: list[Attachment] = []
        if self._cluster.labelled(namespace):
            primary = self._cluster.primary(namespace)
            if primary is not None:
                found.append(primary)
            elif not _has_primary(pod):
                await self._tell(
                    pod,
                    f"namespace {namespace} is labelled for a primary network, but has none yet; waiting for it",
                    "make a UserDefinedNetwork there, or a ClusterUserDefinedNetwork that selects the namespace",
                )
        try:
            selected = selections(pod["metadata"])
        except ValueError as error:
            await self._tell(pod, str(error))
            return found
        for selection in selected:
            attachment = self._cluster.attachment(selection.key)
            problem = self._refusal(pod, selection, attachment, {item.network.name for item in found})
            if problem is not None:
                await self._tell(pod, problem)
            elif attachment is not None:
                found.append(attachment)
        return found

    def _refusal(
        self, pod: Object, selection: Selection, attachment: Attachment | None, networks: set[str]
    ) -> str | None:
        """Why the pod cannot have what it asks for; None when it can, or when that is not ours to give."""
        if not selection.usable_from(objects.namespace_of(pod)):
            return f"NetworkAttachmentDefinition {selection.key} belongs to another namespace"
        if attachment is None:
            known = self._cluster.get(NADS, selection.key) is not None
            return None if known else f"NetworkAttachmentDefinition {selection.key} does not exist; waiting for it"
        if attachment.network.role is Role.PRIMARY:
            return f"network {attachment.network.name} is a primary network, which pods have without asking for it"
        if attachment.network.name in networks:
            return f"network {attachment.network.name} is asked for twice"
        if attachment.deleting and attachment.key not in _entries(pod):
            return f"NetworkAttachmentDefinition {selection.key} is being deleted"
        return None

    def _hold(self, pod: Object, network: Network, owner: Owner) -> None:
        held = self._held.setdefault(object_key(pod), _Held(str(pod["metadata"].get("uid"))))
        if network.name not in held.owners:
            held.owners[network.name] = owner
            self._shares[network.name, owner] += 1

    def _give_back(self, key: str, held: _Held) -> None:
        """The pod is gone. What it shared with another pod of its machine stays with that."""
        del self._held[key]
        for network, owner in held.owners.items():
            self._shares[network, owner] -= 1
            if not self._shares[network, owner]:
                del self._shares[network, owner]
                self._ledger.release(owner, network)

    async def _tell(self, pod: Object, message: str, step: str = _NEXT_STEP) -> None:
        await self._events.event(pod, ALLOCATION_FAILED, message, "Warning", next_step=step)

    async def _wait_for_claim(self, pod: Object) -> list[float]:
        """Claim and pod come at the same moment; only a claim that is still not there after a while is worth a word."""
        age = (self._now() - datetime.fromisoformat(pod["metadata"]["creationTimestamp"])).total_seconds()
        if age < CLAIM_PATIENCE_SECONDS:
            return [CLAIM_PATIENCE_SECONDS - max(0.0, age)]
        step = f"its conditions say why: kubectl describe ipamclaims -n {pod['metadata']['namespace']}"
        await self._tell(pod, "waiting for the IPAMClaim of this machine to be there and to have addresses", step)
        return []

    def _pools(self, pod: Object, network: Network) -> NetworkPools | None:
        """Where the pod's addresses come from; None until its node is known and has its part, in writing.

        Raises Exhausted, Immovable.
        """
        if network.stretched:
            return self._ledger.pools(network)
        name = objects.node_of(pod)
        if not name:
            return None  # until it is bound: that is a change of the pod
        self._check_machine(pod, network)
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

    def _check_machine(self, pod: Object, network: Network) -> None:
        """A machine whose addresses are bound to its node has one pod at a time. Raises Immovable."""
        machine = self._cluster.machine_of(pod)
        if machine is None or self._ledger.get(workload_owner(pod, network), network.name) is not None:
            return
        for other in self._cluster.launchers(machine):
            if objects.alive(other) and self._ledger.get(workload_owner(other, network), network.name) is not None:
                raise Immovable(f"the machine runs in pod {object_key(other)}: on a Layer3 network it cannot move")

    async def _allocate(self, pod: Object, attachment: Attachment, pools: NetworkPools) -> Allocation | None:
        """What the pod shall have; None while its claim has nothing. Raises AllocationError, ValueError."""
        network = attachment.network
        reference = self._cluster.claim_reference(pod, attachment)
        present = objects.allocated(pod, attachment.key, addressed=bool(network.subnets))
        if reference is not None:
            return await self._claimed(pod, attachment, reference)
        if objects.is_launcher(pod) and network.persistent and self._cluster.machine_of(pod) is None and not present:
            # Its machine, and so its claim, will be known in a moment.
            return None
        owner = workload_owner(pod, network)
        if present is not None:
            allocation = pools.reserve(owner, present.addresses, present.mac, partial=True)
        else:
            request = self._cluster.request(pod, attachment)
            if request.addresses:
                allocation = pools.reserve(owner, request.addresses, request.mac)
            else:
                allocation = pools.allocate(owner, request.mac)
        self._hold(pod, network, owner)
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
        if machine is not None or objects.machine_key(claim) is not None:
            if machine is None and objects.is_launcher(pod):
                # Its machine will be known in a moment. The claim may still be that of a former one of the same name.
                return None
            # A pod that is no machine's must not help itself to what a machine has.
            problem = foreign(claim, objects.machine_uids(machine) if machine is not None else set())
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

    async def _annotate(self, pod: Object, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        metadata = pod["metadata"]
        # The agent writes other keys of the same annotation: the version makes sure that neither undoes the other.
        entries = json.dumps({**objects.pod_networks(pod), **wanted}, sort_keys=True)
        body = {
            "metadata": {
                "resourceVersion": metadata["resourceVersion"],
                "annotations": {names.POD_NETWORKS_ANNOTATION: entries},
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


def _settled(pod: Object, attachment: Attachment, allocation: Allocation) -> bool:
    """Whether the pod has it in writing. Raises ValueError where other addresses are written: a pod keeps its own."""
    present = objects.allocated(pod, attachment.key, addressed=bool(attachment.network.subnets))
    if present is None:
        return False
    if present.addresses == allocation.addresses and present.mac == allocation.mac:
        return True
    raise ValueError(
        f"annotation {names.POD_NETWORKS_ANNOTATION} names {_text(present)}, but {_text(allocation)} belong to the pod"
    )


def _text(found: objects.Allocated | Allocation) -> str:
    return ", ".join(map(str, found.addresses or [found.mac]))


def _entries(pod: Object) -> Mapping[str, Any]:
    """Entries of the pod-networks annotation; those that cannot be read are told where they are needed."""
    try:
        return objects.pod_networks(pod)
    except ValueError:
        return {}


def _has_primary(pod: Object) -> bool:
    """Whether the pod got its addresses while its primary network was there."""
    entries = _entries(pod).values()
    return any(isinstance(item, dict) and item.get("role") == Role.PRIMARY.value for item in entries)
