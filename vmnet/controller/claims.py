"""IPAMClaims: made for virtual machines, filled with addresses, kept for the machine's life, released with it."""

import hashlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from vmnet import metrics
from vmnet.controller import migrations, objects
from vmnet.controller.cluster import Attachment, Cluster, Index
from vmnet.controller.ledger import Ledger, claim_owner
from vmnet.controller.statuses import Condition, merged
from vmnet.controller.waiting import WaitingRoom
from vmnet.ipam.errors import AddressConflict, AllocationError, ConflictKind, Exhausted
from vmnet.ipam.network_pools import Allocation
from vmnet.kube.api import (
    CLAIMS,
    VMIS,
    VMS,
    AlreadyExists,
    Kube,
    NotFound,
    Object,
    Resource,
    object_key,
)
from vmnet.kube.conditions import find_condition
from vmnet.kube.events import Recorder
from vmnet.model import names
from vmnet.model.network import Role
from vmnet.model.selection import SHARED_NAMESPACE

log = logging.getLogger(__name__)

IPS_ALLOCATED: Final = "IPsAllocated"
CLAIM_FAILED: Final = "ErrorClaimingAddresses"
"""Event reason on the VM or VMI."""
_LABEL_MAX: Final = 63


def vm_label(name: str) -> str:
    """Value of the claim's VM label: the name, or, where that is longer than a label may be, its start and a digest."""
    if len(name) <= _LABEL_MAX:
        return name
    return f"{name[:54]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def reason_of(error: Exception) -> str:
    """Reason of a False IPsAllocated condition (contract)."""
    match error:
        case AddressConflict(kind=ConflictKind.MAC):
            return "MACAddressConflict"
        case AddressConflict():
            return "IPAddressConflict"
        case Exhausted():
            return "SubnetExhausted"
        case _:
            return "InternalError"


class MachineReconciler:
    """Keyed by ``<namespace>/<name>`` of a VM or VMI, which share the name: makes and releases their claims."""

    def __init__(self, kube: Kube, cluster: Cluster, events: Recorder) -> None:
        self._kube = kube
        self._cluster = cluster
        self._events = events
        self._claims = Index(cluster.informers[CLAIMS], _machine_keys)

    async def reconcile(self, key: str) -> None:
        """Make the claim a machine needs, release those of machines that are gone."""
        vm, vmi = self._cluster.get(VMS, key), self._cluster.get(VMIS, key)
        for claim in tuple(self._claims[key]):
            if self._abandoned(claim, vm, vmi) and self._abandoned(claim, *await self._now_there(key)):
                await self._release(claim)
        owner = _claim_owner(vm, vmi)
        machine = vmi if vmi is not None else vm
        if owner is None or machine is None or (objects.deleting(owner[1]) and vmi is None):
            return
        namespace = objects.namespace_of(machine)
        for network, nad in objects.machine_networks(machine).items():
            if nad is not None:
                attachment = self._cluster.attachment(nad)
            else:
                attachment = self._cluster.primary(namespace) if self._cluster.labelled(namespace) else None
            if attachment is None or (attachment.network.role is Role.PRIMARY) is not (nad is None):
                continue
            if attachment.network.persistent and not attachment.deleting:
                await self._ensure(owner, machine, attachment, network)

    async def _now_there(self, key: str) -> tuple[Object | None, Object | None]:
        """VM and VMI as the API has them: each has a watch of its own, and one may be far behind the other.

        An instance that is not there now, and whose VM is gone, does not come any more.
        """
        namespace, _, name = key.partition("/")
        found: list[Object | None] = []
        for resource in (VMS, VMIS):
            try:
                found.append(await self._kube.get(resource, name, namespace))
            except NotFound:
                found.append(None)
        return found[0], found[1]

    def _abandoned(self, claim: Object, vm: Object | None, vmi: Object | None) -> bool:
        reference = objects.owner_reference(claim, controller=False)
        if reference is None or reference.get("kind") not in (objects.VM_KIND, objects.VMI_KIND):
            return False
        uid = reference.get("uid")
        if reference["kind"] == objects.VMI_KIND:
            return vmi is None or vmi["metadata"].get("uid") != uid
        if vm is not None and vm["metadata"].get("uid") == uid and not objects.deleting(vm):
            return False
        if vmi is None:
            return True
        # The VM is going. Its VMI still runs with these addresses until it is gone too.
        parent = objects.owner_reference(vmi)
        return parent is None or parent.get("uid") != uid

    async def _release(self, claim: Object) -> None:
        metadata = claim["metadata"]
        rest = [entry for entry in objects.finalizers(claim) if entry != names.CLAIM_FINALIZER]
        try:
            if len(rest) != len(objects.finalizers(claim)):
                body = {"metadata": {"resourceVersion": metadata["resourceVersion"], "finalizers": rest or None}}
                await self._kube.patch(CLAIMS, metadata["name"], body, metadata["namespace"])
            if not objects.deleting(claim):
                await self._kube.delete(CLAIMS, metadata["name"], metadata["namespace"], uid=metadata["uid"])
        except NotFound:
            return
        if not objects.deleting(claim):
            metrics.LEFT_OVERS.labels("claim").inc()

    async def _ensure(
        self, owner: tuple[Resource, Object], machine: Object, attachment: Attachment, network: str
    ) -> None:
        resource, item = owner
        metadata = item["metadata"]
        name = names.claim_name(metadata["name"], network)
        existing = self._cluster.get(CLAIMS, f"{metadata['namespace']}/{name}")
        if existing is None:
            body: Object = {
                "apiVersion": CLAIMS.api_version,
                "kind": CLAIMS.kind,
                "metadata": {
                    "name": name,
                    "namespace": metadata["namespace"],
                    "labels": {names.CLAIM_VM_LABEL: vm_label(metadata["name"])},
                    "finalizers": [names.CLAIM_FINALIZER],
                    "ownerReferences": [
                        {
                            "apiVersion": resource.api_version,
                            "kind": resource.kind,
                            "name": metadata["name"],
                            "uid": metadata["uid"],
                            "controller": True,
                            "blockOwnerDeletion": True,
                        }
                    ],
                },
                "spec": {"network": attachment.network.name, "interface": ""},
            }
            try:
                await self._kube.create(CLAIMS, body, metadata["namespace"])
            except AlreadyExists:
                # ipam-extensions or a former leader was faster.
                existing = await self._kube.get(CLAIMS, name, metadata["namespace"])
            else:
                return
        problem = foreign(existing, {str(metadata["uid"])})
        if problem is not None:
            step = f"delete the claim if nobody needs it: kubectl delete ipamclaim -n {metadata['namespace']} {name}"
            await self._events.event(machine, CLAIM_FAILED, problem, "Warning", next_step=step)


def foreign(claim: Object, owners: set[str]) -> str | None:
    """Why a claim cannot be used by the machine whose uids are ``owners``; None when it can."""
    reference = objects.owner_reference(claim, controller=False)
    # A claim that somebody made beforehand, without an owner, is meant to be used.
    if reference is None or reference.get("uid") in owners:
        return None
    return (
        f"IPAMClaim {object_key(claim)} belongs to {reference.get('kind')} {reference.get('name')}, not to this machine"
    )


def failure(claim: Object) -> str | None:
    """Why a claim has no addresses, as its condition says; None when it has, or nobody knows yet."""
    condition = find_condition((claim.get("status") or {}).get("conditions"), IPS_ALLOCATED)
    return str(condition.get("message")) if condition is not None and condition.get("status") == "False" else None


def _claim_owner(vm: Object | None, vmi: Object | None) -> tuple[Resource, Object] | None:
    """Whose the claim shall be: the VM, or a VMI that has none."""
    if vm is not None:
        return VMS, vm
    if vmi is None or objects.owner_reference(vmi) is not None:
        # A VMI whose VM is not seen yet, or no more: nothing to own a claim.
        return None
    return VMIS, vmi


def _holder(claim: Object) -> str:
    return str((objects.owner_reference(claim, controller=False) or claim["metadata"]).get("uid"))


def _machine_keys(claim: Object) -> tuple[str, ...]:
    key = objects.machine_key(claim)
    return (key,) if key is not None else ()


class ClaimReconciler:
    """Keyed by ``<namespace>/<claim>``: fills claims, whoever made them."""

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
        self.filled: Callable[[str], None] = lambda key: None
        """Called with the key of a claim whose addresses are reserved."""
        self._now = now
        self._holders: dict[str, str] = {}
        """Key → uid of whom the ledger's reservation was made for: the claim's owner, or the claim that has none."""

    def load(self) -> None:
        """Remember whose the reservations are that the ledger has taken over. After the ledger."""
        for claim in self._cluster.items(CLAIMS):
            if (claim.get("status") or {}).get("ips"):
                self._holders[object_key(claim)] = _holder(claim)

    async def reconcile(self, key: str) -> None:
        """Reserve or allocate what a claim stands for, and say so in its status."""
        claim = self._cluster.get(CLAIMS, key)
        self._waiting.leave("claim", key)
        if claim is None:
            # Somebody may have removed it by force: what a living pod has by it is nobody else's until that ends.
            if not any(self._cluster.claimants(key)):
                self._holders.pop(key, None)
                self._ledger.release(claim_owner(key))
            return
        if self._holders.get(key, _holder(claim)) != _holder(claim):
            # What a machine had goes with it; a successor of the same name may ask for something else.
            del self._holders[key]
            self._ledger.release(claim_owner(key))
        name = (claim.get("spec") or {}).get("network")
        namespaces = (objects.namespace_of(claim), SHARED_NAMESPACE)
        found = (item for place in namespaces for item in self._cluster.attachments(place, network=name))
        attachment = next(found, None)
        if attachment is None or not attachment.network.subnets or not attachment.network.stretched:
            # What a Layer3 network gives is bound to a node, and so is nothing for a machine to keep.
            return
        status: dict[str, Any] = {}
        unwritten = False
        try:
            allocation = self._fill(claim, key, attachment)
        except (ValueError, AllocationError) as error:
            if isinstance(error, Exhausted | AddressConflict):
                self._waiting.enter(attachment.network.name, "claim", key, self.again)
            condition = Condition(IPS_ALLOCATED, False, reason_of(error), str(error))
            if not (claim.get("status") or {}).get("ips"):
                # The schema requires the field.
                status["ips"] = []
                # It asked for something else before; whether that was written down, only a write can tell.
                unwritten = key in self._holders
        else:
            if allocation is None:
                return
            self._holders[key] = _holder(claim)
            condition = Condition(IPS_ALLOCATED, True, "SuccessfulAllocation", "the addresses belong to this claim")
            ips = [str(item) for item in allocation.addresses]
            if (claim.get("status") or {}).get("ips") != ips:
                status["ips"] = ips
            owner = self._owner_pod(claim)
            if owner and ((claim.get("status") or {}).get("ownerPod") or {}).get("name") != owner:
                status["ownerPod"] = {"name": owner}
            self.filled(key)
        self._ledger.publish(attachment.network.name)
        conditions = merged(claim, [condition], self._now())
        if conditions is not None or unwritten:
            status["conditions"] = conditions if conditions is not None else claim["status"]["conditions"]
        if set(status) - {"ips"} or status.get("ips"):
            await self._write(claim, status)
        if unwritten and self._holders.get(key) == _holder(claim):
            # The version that was written over had no addresses.
            del self._holders[key]
            self._ledger.release(claim_owner(key))

    def _fill(self, claim: Object, key: str, attachment: Attachment) -> Allocation | None:
        """Addresses of the claim; None while nobody asks for them. Never awaits. Raises AllocationError, ValueError."""
        pools = self._ledger.pools(attachment.network)
        owner = claim_owner(key)
        written = objects.claim_addresses(claim)
        request = self._cluster.claim_request(claim)
        if written:
            held = pools.get(owner)
            mac = request.mac if request is not None else None
            if mac is None and held is not None and set(held.ips) == {item.ip for item in written}:
                mac = held.mac
            return pools.reserve(owner, written, mac, partial=True)
        present = self._present(claim, attachment)
        if present is not None:
            return pools.reserve(owner, present.addresses, present.mac, partial=True)
        if request is None or objects.deleting(claim):
            return None
        if request.addresses:
            return pools.reserve(owner, request.addresses, request.mac)
        return pools.allocate(owner, request.mac)

    def _present(self, claim: Object, attachment: Attachment) -> objects.Allocated | None:
        """What the claim's machine runs with already: its former claim was removed by force. Raises ValueError."""
        reference = objects.owner_reference(claim, controller=False)
        for pod in self._cluster.claim_users(claim) if reference is not None else ():
            machine = self._cluster.machine_of(pod)
            if machine is not None and reference is not None and reference.get("uid") in objects.machine_uids(machine):
                for key in (item.key for item in self._cluster.wanted(pod) if item.network == attachment.network):
                    if (found := objects.allocated(pod, key)) is not None:
                        return found
        return None

    def _owner_pod(self, claim: Object) -> str | None:
        users = self._cluster.claim_users(claim)
        found = migrations.live_pod(users, self._cluster.claim_machine(claim))
        return str(found["metadata"]["name"]) if found is not None else None

    async def _write(self, claim: Object, status: dict[str, Any]) -> None:
        metadata = claim["metadata"]
        # The version: addresses must never be written over addresses that somebody else has just written.
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": status}
        try:
            await self._kube.patch(CLAIMS, metadata["name"], body, metadata["namespace"], subresource="status")
        except NotFound:
            log.debug("claim %s went before its status was written", object_key(claim))
