"""What this node knows of the cluster: an index over the informers' stores, by network and by machine."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Self

from vmnet.agent import facts
from vmnet.agent.facts import Attachment
from vmnet.kube.api import (
    ENDPOINT_SLICES,
    NADS,
    NAMESPACES,
    NODES,
    PODS,
    POLICIES,
    SERVICE_CIDRS,
    SERVICES,
    VMIS,
    Informer,
    Kube,
    Object,
    object_key,
)
from vmnet.kube.watch import ListWatch
from vmnet.model import names
from vmnet.model.addresses import IPNetwork
from vmnet.model.endpoint import Endpoint, MachineReference, Node
from vmnet.model.names import InterfaceName
from vmnet.model.network import Role

log = logging.getLogger(__name__)

TURN: Final = 50
"""Endpoints that a survey looks at before others have a turn: about a millisecond."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """An endpoint and what the API says of it; see the methods of ``Cluster`` of these names."""

    endpoint: Endpoint
    is_live: bool
    settled: bool
    """Of an endpoint that is no machine's: always."""
    came_from: Node | None


@dataclass(frozen=True, slots=True)
class Stores:
    """The informers an agent runs."""

    pods: Informer
    nodes: Informer
    namespaces: Informer
    nads: Informer
    machines: Informer
    """VirtualMachineInstances; empty where KubeVirt is not installed."""
    services: Informer
    endpoint_slices: Informer
    policies: Informer
    """NetworkPolicies."""
    service_cidrs: Informer | None = None
    """ServiceCIDRs; empty where the API has none (Kubernetes before 1.33)."""

    @classmethod
    def watching(cls, kube: Kube) -> Self:
        """The real ones, over one connection; nothing is asked before they run."""
        return cls(
            pods=ListWatch(kube, PODS),
            nodes=ListWatch(kube, NODES),
            namespaces=ListWatch(kube, NAMESPACES),
            nads=ListWatch(kube, NADS),
            machines=ListWatch(kube, VMIS, optional=True),
            services=ListWatch(kube, SERVICES),
            endpoint_slices=ListWatch(kube, ENDPOINT_SLICES),
            policies=ListWatch(kube, POLICIES),
            service_cidrs=ListWatch(kube, SERVICE_CIDRS, optional=True),
        )

    def all(self) -> tuple[Informer, ...]:
        """Every informer, to be run and waited for."""
        found = (
            self.pods,
            self.nodes,
            self.namespaces,
            self.nads,
            self.machines,
            self.services,
            self.endpoint_slices,
            self.policies,
            self.service_cidrs,
        )
        return tuple(informer for informer in found if informer is not None)


class Cluster:
    """Index of endpoints. Callbacks tell which network or machine to look at again; they carry no state."""

    def __init__(
        self,
        stores: Stores,
        *,
        on_network: Callable[[str], None],
        on_machine: Callable[[MachineReference], None],
        on_endpoints: Callable[[str, Mapping[str, Endpoint | None]], None] | None = None,
    ) -> None:
        """``on_endpoints``: called in place of ``on_network`` where only a pod has changed, with what it is there by
        its uid (None: nothing any more), so that who knows the others need not look at them again.
        """
        self._stores = stores
        self._on_network = on_network
        self._on_machine = on_machine
        self._on_endpoints = on_endpoints
        self._attachments: dict[str, Attachment] = {}
        self._missed: set[str] = set()
        """Attachments whose NADs are gone, or unreadable, while living pods have addresses by them."""
        self._endpoints: dict[str, dict[str, Endpoint]] = {}
        """Pod → attachment (NAD) → endpoint; the primary network's first, then as the pod asks for them."""
        self._by_network: dict[str, set[tuple[str, str]]] = {}
        self._by_node: dict[tuple[str, str], set[tuple[str, str]]] = {}
        """The same, by network and node."""
        self._surveys: list[set[str]] = []
        """Of each survey that is under way, the pods that have changed since it looked at them."""
        self._askers: dict[str, set[str]] = {}
        """Attachment → the pods that ask for it by annotation, whatever their namespace."""
        self._interfaces: dict[tuple[str, str], InterfaceName] = {}
        """Pod uid and attachment → the name its runtime gave, where that is not what the annotation says."""
        self._by_machine: dict[MachineReference, set[str]] = {}
        self._by_namespace: dict[str, set[str]] = {}
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._namespaces_awaited: dict[str, set[asyncio.Event]] = {}
        self._nodes: dict[str, Node] = {}
        stores.namespaces.add_handler(self._namespace_changed)
        stores.nads.add_handler(self._nad_changed)
        stores.nodes.add_handler(self._node_changed)
        stores.pods.add_handler(self._pod_changed)
        stores.machines.add_handler(self._vmi_changed)

    # Reading

    def network_expected(self, namespace: str) -> bool:
        """True when the namespace is labelled for a primary network: its pods must not start without one."""
        found = self._stores.namespaces.get(namespace)
        return found is not None and names.PRIMARY_NETWORK_LABEL in facts.labels(found)

    def namespace_known(self, namespace: str) -> bool:
        """Whether the store has the namespace at all."""
        return self._stores.namespaces.get(namespace) is not None

    def primary(self, namespace: str) -> Attachment | None:
        """Primary network of a namespace."""
        prefix = namespace + "/"
        for key, found in self._attachments.items():
            if key.startswith(prefix) and found.network.role is Role.PRIMARY:
                return found
        return None

    def attachment(self, key: str) -> Attachment | None:
        """Our NAD ``namespace/name``."""
        return self._attachments.get(key)

    def known_attachment(self, key: str) -> bool:
        """Whether a NAD of that key is there at all, ours or not."""
        return self._stores.nads.get(key) is not None

    def misses_attachment(self, node: str) -> bool:
        """Whether a living pod of a node has addresses by a NAD that is not there."""
        return any(
            facts.node_of(pod) == node and facts.alive(pod) and not facts.attached(pod) <= self._attachments.keys()
            for pod in self.pods()
        )

    def attachment_of(self, network: str) -> Attachment | None:
        """Any attachment of a network: they are equal but for their key."""
        return next((found for found in self._attachments.values() if found.network.name == network), None)

    def namespaces(self, network: str) -> frozenset[str]:
        """Namespaces whose primary network it is."""
        return frozenset(
            key.partition("/")[0]
            for key, found in self._attachments.items()
            if found.network.name == network and found.network.role is Role.PRIMARY
        )

    def networks(self) -> frozenset[str]:
        """Names of all networks that have a NAD."""
        return frozenset(found.network.name for found in self._attachments.values())

    def pod(self, key: str) -> Object | None:
        """A pod by ``namespace/name``."""
        return self._stores.pods.get(key)

    def pods(self) -> Iterator[Object]:
        """All pods."""
        yield from self._stores.pods.items()

    def node(self, name: str) -> Node | None:
        """A node by name."""
        return self._nodes.get(name)

    def nodes(self) -> tuple[Node, ...]:
        """All nodes that have an address."""
        return tuple(self._nodes.values())

    def endpoint(self, pod_key: str, attachment: str | None = None) -> Endpoint | None:
        """Endpoint of a living pod on an attachment (NAD), or else on its namespace's primary network."""
        found = self._endpoints.get(pod_key, {})
        if attachment is not None:
            return found.get(attachment)
        return next((item for item in found.values() if item.interface == names.PRIMARY_INTERFACE), None)

    def endpoints_of(self, pod_key: str) -> tuple[Endpoint, ...]:
        """Every endpoint of a living pod, the primary network's first."""
        return tuple(self._endpoints.get(pod_key, {}).values())

    def endpoints(self, network: str) -> tuple[Endpoint, ...]:
        """Every endpoint of a network, one per *living pod*: a migrating machine has two."""
        keys = sorted(self._by_network.get(network, ()))
        return tuple(self._endpoints[pod][attachment] for pod, attachment in keys)

    def members(self, network: str) -> Iterator[Endpoint]:
        """The same in no order: quick where there are many."""
        for pod, attachment in self._by_network.get(network, ()):
            yield self._endpoints[pod][attachment]

    def endpoints_on(self, node: str, network: str) -> tuple[Endpoint, ...]:
        """Those of ``endpoints`` that are on a node: quick where the network has many elsewhere."""
        keys = sorted(self._by_node.get((network, node), ()))
        return tuple(self._endpoints[pod][attachment] for pod, attachment in keys)

    async def survey(self, network: str) -> tuple[Sighting, ...]:
        """Every endpoint of a network as it is when this returns, in no order, gathered without holding up the event
        loop (to sort ten thousand takes one step of milliseconds)."""
        changed: set[str] = set()
        self._surveys.append(changed)
        try:
            found: dict[tuple[str, str], Sighting] = {}
            pending = deque(self._by_network.get(network, ()))
            while True:
                for _ in range(min(TURN, len(pending))):
                    self._sight(network, pending.popleft(), found)
                # Whoever has changed since is looked at (again), until nobody has: then all of it is true at once.
                for pod in changed:
                    pending.extend((pod, attachment) for attachment in self._attachments if (pod, attachment) in found)
                    pending.extend((pod, attachment) for attachment in self._endpoints.get(pod, ()))
                changed.clear()
                if not pending:
                    return tuple(found.values())
                await asyncio.sleep(0)
        finally:
            self._surveys.remove(changed)

    def _sight(self, network: str, key: tuple[str, str], found: dict[tuple[str, str], Sighting]) -> None:
        pod, attachment = key
        if key not in self._by_network.get(network, ()):
            found.pop(key, None)
            return
        endpoint = self._endpoints[pod][attachment]
        settled = endpoint.machine is None or self.settled(endpoint.machine)
        found[key] = Sighting(endpoint, self.is_live(endpoint), settled, self.came_from(endpoint))

    def _tell_surveys(self, pods: Iterable[str]) -> None:
        for changed in self._surveys:
            changed.update(pods)

    def subnets(self) -> frozenset[IPNetwork]:
        """Of all networks."""
        return frozenset(subnet for found in self._attachments.values() for subnet in found.network.subnets)

    def live_endpoints(self, network: str) -> tuple[Endpoint, ...]:
        """One endpoint per pod or machine: of a migrating machine only the pod that holds the guest."""
        return tuple(found for found in self.endpoints(network) if self.is_live(found))

    def is_live(self, endpoint: Endpoint) -> bool:
        """Whether this endpoint is the one of its machine that the API says runs the guest.

        One whose pod has just gone from the store is not: the pod that is left may be the one that it moved to.
        """
        if endpoint.machine is None:
            return True
        pods = self._by_machine.get(endpoint.machine, set())
        if len(pods) <= 1:
            return f"{endpoint.pod.namespace}/{endpoint.pod.name}" in pods
        live = facts.live_pod(self.machine_pods(endpoint.machine), self.machine(endpoint.machine))
        return live is not None and live["metadata"]["uid"] == endpoint.pod.uid

    def machine(self, reference: MachineReference) -> Object | None:
        """The VirtualMachineInstance."""
        return self._stores.machines.get(f"{reference.namespace}/{reference.name}")

    def machine_pods(self, reference: MachineReference) -> tuple[Object, ...]:
        """Every pod of a machine that the store holds, dead ones too."""
        found = (self._stores.pods.get(key) for key in sorted(self._by_machine.get(reference, ())))
        return tuple(pod for pod in found if pod is not None)

    def settled(self, reference: MachineReference) -> bool:
        """True when no migration of the machine is under way."""
        return facts.settled(self.machine_pods(reference), self.machine(reference))

    def certain(self, endpoint: Endpoint) -> bool:
        """True when the API's word on where this endpoint is may overrule what the kernel saw.

        Not while its machine migrates, and not while a watch is broken: the store may be older than the move.
        """
        if endpoint.machine is None:
            return True
        return self.up_to_date() and self.settled(endpoint.machine)

    def unrivalled(self, endpoint: Endpoint) -> bool:
        """True when the machine's guest is in this endpoint's pod, for no other can have it, as far as is known now."""
        if endpoint.machine is None or not self.up_to_date():
            return False
        pods = self.machine_pods(endpoint.machine)
        own = next((pod for pod in pods if pod["metadata"]["uid"] == endpoint.pod.uid), None)
        return own is not None and facts.unrivalled(own, pods)

    def up_to_date(self) -> bool:
        """False while a watch is broken that tells where machines are: the store may be older than a move."""
        return self._stores.pods.failure is None and self._stores.machines.failure is None

    def is_source(self, endpoint: Endpoint) -> bool:
        """Whether the machine's present migration leaves this endpoint's pod."""
        return endpoint.machine is not None and facts.is_source(endpoint.pod.name, self.machine(endpoint.machine))

    def came_from(self, endpoint: Endpoint) -> Node | None:
        """The node that an endpoint's machine is coming, or last came, to this pod from; None when it began here."""
        if endpoint.machine is None:
            return None
        pods, vmi = self.machine_pods(endpoint.machine), self.machine(endpoint.machine)
        own = next((pod for pod in pods if pod["metadata"]["uid"] == endpoint.pod.uid), None)
        name = facts.source_node(own, pods, vmi) if own is not None else ""
        return self.node(name) if name and name != endpoint.node else None

    async def wait_for_namespace(self, namespace: str, seconds: float) -> None:
        """Return when the store has the namespace, or after ``seconds``: a pod may be seen before its namespace."""
        found = asyncio.Event()
        self._namespaces_awaited.setdefault(namespace, set()).add(found)
        try:
            if not self.namespace_known(namespace):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(found.wait(), seconds)
        finally:
            self._namespaces_awaited[namespace].discard(found)
            if not self._namespaces_awaited[namespace]:
                del self._namespaces_awaited[namespace]

    async def wait_for_pod(self, pod_key: str, uid: str | None) -> Object:
        """Exactly this pod, as soon as the store has it. The caller sets the timeout."""
        while True:
            found = self.pod(pod_key)
            if found is not None and facts.is_pod(found, uid):
                return found
            await self.wait_for_change(pod_key)

    async def wait_for_endpoint(self, pod_key: str, uid: str | None, attachment: str | None = None) -> Endpoint:
        """The endpoint of exactly this pod on an attachment (None: the primary network), as soon as its addresses are
        written. The caller sets the timeout."""
        while True:
            pod = await self.wait_for_pod(pod_key, uid)
            found = self.endpoint(pod_key, attachment)
            if found is not None and found.pod.uid == pod["metadata"]["uid"]:
                return found
            await self.wait_for_change(pod_key)

    async def wait_for_change(self, pod_key: str) -> None:
        """Return at the next change of a pod or of its namespace's network."""
        changed = asyncio.Event()
        self._waiting.setdefault(pod_key, set()).add(changed)
        try:
            await changed.wait()
        finally:
            waiting = self._waiting.get(pod_key, set())
            waiting.discard(changed)
            if not waiting:
                self._waiting.pop(pod_key, None)

    def name_interface(self, endpoint: Endpoint, interface: InterfaceName) -> Endpoint:
        """A runtime has given this endpoint's interface a name of its own choice. Returns the endpoint as it is now."""
        pod_key = f"{endpoint.pod.namespace}/{endpoint.pod.name}"
        found = self._endpoints.get(pod_key, {})
        for attachment, other in found.items():
            if other == endpoint and other.interface != interface:
                self._interfaces[endpoint.pod.uid, attachment] = interface
                found[attachment] = replace(other, interface=interface)
                return found[attachment]
        return endpoint

    # Following

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        item = facts.subject(old, new)
        key = object_key(item)
        members = self._by_namespace.setdefault(item["metadata"]["namespace"], set())
        (members.add if new else members.discard)(key)
        for state, present in ((old, False), (new, True)):
            machine = facts.machine_of(state) if state else None
            if machine is not None:
                keys = self._by_machine.setdefault(machine, set())
                (keys.add if present else keys.discard)(key)
                if not keys:
                    del self._by_machine[machine]
                self._tell_surveys(self._by_machine.get(machine, ()))
                self._on_machine(machine)
        for state, present in ((old, False), (new, True)):
            for attachment in _asked(state):
                askers = self._askers.setdefault(attachment, set())
                (askers.add if present else askers.discard)(key)
                if not askers:
                    del self._askers[attachment]
        if old is not None and (new is None or old["metadata"]["uid"] != new["metadata"]["uid"]):
            gone = old["metadata"]["uid"]
            self._interfaces = {found: name for found, name in self._interfaces.items() if found[0] != gone}
        self._index(key, new)
        for waiting in self._waiting.get(key, ()):
            waiting.set()

    def _index(self, key: str, pod: Object | None) -> None:
        self._tell_surveys((key,))
        before = self._endpoints.pop(key, {})
        after = self._endpoints_in(key, pod) if pod is not None and facts.alive(pod) else {}
        if after:
            self._endpoints[key] = after
        for endpoints, present in ((before, False), (after, True)):
            for attachment, endpoint in endpoints.items():
                members = self._by_network.setdefault(endpoint.network, set())
                (members.add if present else members.discard)((key, attachment))
                if not members:
                    del self._by_network[endpoint.network]
                place = endpoint.network, endpoint.node
                here = self._by_node.setdefault(place, set())
                (here.add if present else here.discard)((key, attachment))
                if not here:
                    del self._by_node[place]
        for attachment in before.keys() - after.keys():
            self._drop_missed(attachment)
        machine = pod is not None and facts.machine_of(pod) is not None
        changed = {item.network for item in (*before.values(), *after.values())} if machine else set()
        for attachment in before.keys() | after.keys():
            old, new = before.get(attachment), after.get(attachment)
            changed |= {item.network for item in (old, new) if item is not None and old != new}
        for network in sorted(changed):
            if self._on_endpoints is None:
                self._on_network(network)
                continue
            found: dict[str, Endpoint | None] = {i.pod.uid: None for i in before.values() if i.network == network}
            found |= {item.pod.uid: item for item in after.values() if item.network == network}
            self._on_endpoints(network, found)

    def _endpoints_in(self, key: str, pod: Object) -> dict[str, Endpoint]:
        found: dict[str, Endpoint] = {}
        for attachment, interface in self._attachments_for(key, pod):
            name = self._interfaces.get((pod["metadata"]["uid"], attachment.key), interface)
            try:
                endpoint = facts.endpoint(pod, attachment, name)
            except ValueError as error:
                log.warning("pod %s: %s", key, error)
                continue
            if endpoint is not None:
                found[attachment.key] = endpoint
        return found

    def _attachments_for(self, key: str, pod: Object) -> Iterator[tuple[Attachment, InterfaceName]]:
        primary = self.primary(pod["metadata"]["namespace"])
        if primary is not None:
            yield primary, names.PRIMARY_INTERFACE
        try:
            wanted = facts.secondaries(pod)
        except ValueError as error:
            log.warning("pod %s: %s", key, error)
            return
        for selection in wanted:
            found = self._attachments.get(selection.key)
            if found is not None and found.network.role is Role.SECONDARY:
                yield found, selection.interface

    def _nad_changed(self, old: Object | None, new: Object | None) -> None:
        item = facts.subject(old, new)
        key = object_key(item)
        before = self._attachments.pop(key, None)
        if new is not None:
            try:
                after = facts.attachment(new)
            except ValueError as error:
                log.warning("NetworkAttachmentDefinition %s: %s", key, error)
                after = None
            if after is not None:
                self._attachments[key] = after
        self._missed.discard(key)
        if before is not None and key not in self._attachments and self._used(before):
            # The controller lets no NAD go that pods use: somebody's hand did, and it comes back. The pods stay.
            log.warning("NetworkAttachmentDefinition %s is gone, but pods use it", key)
            self._attachments[key] = before
            self._missed.add(key)
        if before == self._attachments.get(key):
            return
        for pod_key in self._by_namespace.get(item["metadata"]["namespace"], set()) | self._askers.get(key, set()):
            self._index(pod_key, self._stores.pods.get(pod_key))
            for waiting in self._waiting.get(pod_key, ()):
                waiting.set()
        for found in (before, self._attachments.get(key)):
            if found is not None:
                self._on_network(found.network.name)

    def _used(self, attachment: Attachment) -> bool:
        return any(key == attachment.key for _, key in self._by_network.get(attachment.network.name, ()))

    def _drop_missed(self, key: str) -> None:
        """The last pod on an attachment that is gone ends it."""
        found = self._attachments.get(key)
        if found is not None and key in self._missed and not self._used(found):
            del self._attachments[key]
            self._missed.discard(key)

    def _namespace_changed(self, old: Object | None, new: Object | None) -> None:
        for waiting in self._namespaces_awaited.get(facts.subject(old, new)["metadata"]["name"], ()):
            waiting.set()

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        item = facts.subject(old, new)
        name = item["metadata"]["name"]
        before = self._nodes.pop(name, None)
        if new is not None:
            with contextlib.suppress(ValueError):  # a node without a usable address cannot be a VTEP
                found = facts.node(new)
                if found is not None:
                    self._nodes[name] = found
        after = self._nodes.get(name)
        if before == after:
            return
        self._tell_surveys(self._endpoints)
        networks = set(self.networks())
        if before is not None and after is not None and replace(before, subnets=after.subnets) == after:
            networks &= {network for network, _ in set(before.subnets) ^ set(after.subnets)}
        for network in sorted(networks):
            self._on_network(network)

    def _vmi_changed(self, old: Object | None, new: Object | None) -> None:
        item = facts.subject(old, new)
        reference = MachineReference(item["metadata"]["namespace"], item["metadata"]["name"])
        self._tell_surveys(self._by_machine.get(reference, ()))
        self._on_machine(reference)
        if self._on_endpoints is not None and _interface_name(old) != _interface_name(new):
            # A pod may be seen before its machine, which alone says what the interface is called.
            for key in sorted(self._by_machine.get(reference, ())):
                for endpoint in self.endpoints_of(key):
                    self._on_endpoints(endpoint.network, {endpoint.pod.uid: endpoint})
        if _place(old) == _place(new):
            return
        for key in self._by_machine.get(reference, ()):
            for endpoint in self.endpoints_of(key):
                self._on_network(endpoint.network)


def _asked(pod: Object | None) -> frozenset[str]:
    """Attachments that a pod asks for; none where the request cannot be read, which ``_index`` tells."""
    try:
        return frozenset(found.key for found in facts.secondaries(pod)) if pod is not None else frozenset()
    except ValueError:
        return frozenset()


def _interface_name(vmi: Object | None) -> str | None:
    return facts.interface_on_pod_network(vmi) if vmi is not None else None


def _place(vmi: Object | None) -> tuple[object, object]:
    """The parts of a VMI that say where its guest runs."""
    status = (vmi or {}).get("status") or {}
    return status.get("nodeName"), status.get("migrationState")
