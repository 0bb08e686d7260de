"""CNI requests of this node: a pod's interfaces on its networks, from ADD to DEL."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmnet.agent import facts
from vmnet.agent.cluster import Cluster
from vmnet.agent.cut_over import CutOvers
from vmnet.agent.default_interfaces import DefaultInterfaces
from vmnet.agent.facts import Attachment
from vmnet.agent.multus import Multus
from vmnet.agent.networks import Networks, NotReady
from vmnet.agent.policy_tables import PolicyTables
from vmnet.cni import call, result
from vmnet.cni.call import Answer
from vmnet.cni.errors import CniError, Code
from vmnet.cni.request import Command, Request
from vmnet.cni.result import ResultAddress, ResultInterface, ResultRoute
from vmnet.kernel.api import KernelError
from vmnet.kube.api import PODS, Kube, KubeError, NotFound
from vmnet.model import names
from vmnet.model.addresses import IPAddress, IPInterface, address, interface
from vmnet.model.endpoint import Endpoint, PodReference, PortState
from vmnet.model.names import InterfaceName
from vmnet.model.network import Network, Role
from vmnet.model.selection import selections
from vmnet.plan.network import PodInterface
from vmnet.runtime.tasks import first_failure

log = logging.getLogger(__name__)

ALLOCATION_TIMEOUT: Final = 60.0
"""Seconds that ADD waits for the controller's annotation before it tells the runtime to try again."""
POLICIES_TIMEOUT: Final = 20.0
"""Seconds that ADD waits for the watch of NetworkPolicies to bring what the pod's namespace has."""


@dataclass(frozen=True, slots=True)
class Place:
    """One interface of a pod, and the NAD by which it has it."""

    endpoint: Endpoint
    attachment: Attachment

    @property
    def network(self) -> Network:
        """The network, as this node sees it."""
        return self.attachment.network.around(self.endpoint.addresses)

    @property
    def primary(self) -> bool:
        """Whether it holds the pod's default route."""
        return self.attachment.network.role is Role.PRIMARY


class Attachments:
    """Answers CNI requests."""

    def __init__(
        self,
        kube: Kube,
        cluster: Cluster,
        networks: Networks,
        cut_overs: CutOvers,
        policies: PolicyTables,
        synced: asyncio.Event,
        multus: Multus,
        defaults: DefaultInterfaces,
        not_ready: Callable[[], str | None] = lambda: None,
        broken: Callable[[], bool] = lambda: False,
    ) -> None:
        """``not_ready`` says why the node's datapath is not in place, None when it is; ``broken``, whether pods that
        are attached already may feel something."""
        self._kube = kube
        self._cluster = cluster
        self._networks = networks
        self._cut_overs = cut_overs
        self._policies = policies
        self._synced = synced
        self._multus = multus
        self._defaults = defaults
        self._not_ready = not_ready
        self._broken = broken

    async def handle(self, request: Request) -> Answer:
        """One request. Raises CniError."""
        if request.command is Command.DEL:
            return await self._delete(request)
        if request.command is Command.STATUS:
            if not self._synced.is_set():
                raise CniError(Code.NOT_AVAILABLE, "the agent has not read the cluster's state yet")
            reason = self._not_ready()
            if reason is not None:
                code = Code.LIMITED_CONNECTIVITY if self._broken() else Code.NOT_AVAILABLE
                raise CniError(code, "the node's datapath is not in place", reason)
            return call.success()
        try:
            async with asyncio.timeout(ALLOCATION_TIMEOUT):
                await self._synced.wait()
        except TimeoutError:
            raise CniError(Code.TRY_AGAIN_LATER, "the agent cannot read the cluster's state: is the API up?") from None
        if request.command is Command.GC:
            return await self._collect(request)
        if request.command is Command.CHECK:
            return await self._check(request)
        if request.attachment is not None:
            return await self._add_one(request, request.attachment)
        return await self._add(request)

    async def _add(self, request: Request) -> Answer:
        """The chain's ADD: the primary network, and, where no Multus is, the secondary ones that the pod asks for."""
        pod = request.pod
        passed_on = call.success(result.pass_on(request.previous_result or {}, request.version))
        if pod is None:
            return passed_on
        wanted = await self._attachments(pod)
        if not wanted:
            return passed_on
        places = await self._prepared(pod, wanted)
        answer = dict(request.previous_result or {})
        for place in places:
            answer = result.extend(answer, await self._attach(request, place), request.version)
        await self._tell(places, answer, alone=not await self._multus.present())
        return call.success(answer)

    async def _add_one(self, request: Request, attachment: str) -> Answer:
        """A meta-plugin's ADD: one interface, with a result of its own; what else the pod has is the chain's."""
        self._multus.called()
        pod = request.pod
        if pod is None:
            raise CniError(Code.INVALID_ENVIRONMENT, f"{attachment}: CNI_ARGS name no pod")
        found = self._cluster.attachment(attachment)
        if found is not None and found.network.role is Role.PRIMARY:
            raise CniError(Code.INVALID_CONFIG, f"{attachment} is a primary network, which pods need not ask for")
        place = await self._place(pod, attachment)
        endpoint = self._cluster.name_interface(place.endpoint, InterfaceName(request.ifname))
        place = Place(endpoint, place.attachment)
        return call.success(result.extend(None, await self._attach(request, place), request.version))

    async def _prepared(self, pod: PodReference, wanted: list[str | None]) -> list[Place]:
        """Where a pod goes, once all is known that its ports need. Raises CniError."""
        try:
            async with asyncio.TaskGroup() as tasks:
                if None in wanted:
                    tasks.create_task(self._isolation(pod))
                found = [tasks.create_task(self._place(pod, attachment)) for attachment in wanted]
        except BaseExceptionGroup as group:
            raise first_failure(group) from None
        return [task.result() for task in found]

    async def _isolation(self, pod: PodReference) -> None:
        """Know the policies that are older than the pod, lest its port come up without them. Raises CniError."""
        try:
            async with asyncio.timeout(POLICIES_TIMEOUT):
                await self._policies.wait_for_policies(pod.namespace)
        except (KubeError, TimeoutError) as error:
            raise CniError(
                Code.TRY_AGAIN_LATER, f"pod {pod.namespace}/{pod.name}: its NetworkPolicies are not known: {error!r}"
            ) from error

    async def _attachments(self, pod: PodReference) -> list[str | None]:
        """What the chain has to attach a pod to; None stands for the primary network of its namespace."""
        wanted: list[str | None] = [None] if await self._wanted(pod) else []
        if await self._multus.present():
            return wanted
        key = f"{pod.namespace}/{pod.name}"
        try:
            async with asyncio.timeout(ALLOCATION_TIMEOUT):
                item = await self._cluster.wait_for_pod(key, pod.uid or None)
        except TimeoutError:
            raise CniError(Code.TRY_AGAIN_LATER, f"pod {key}: the API has not shown this pod to the agent") from None
        try:
            selected = selections(item["metadata"])
        except ValueError as error:
            raise CniError(Code.INVALID_CONFIG, f"pod {key}: {error}") from None
        for selection in selected:
            if not selection.usable_from(pod.namespace):
                raise CniError(Code.INVALID_CONFIG, f"pod {key}: {selection.key} belongs to another namespace")
            found = self._cluster.attachment(selection.key)
            if found is None and self._cluster.known_attachment(selection.key):
                log.warning("pod %s: %s is not of this plugin's type, and there is no Multus", key, selection.key)
                continue
            if found is not None and found.network.role is Role.PRIMARY:
                raise CniError(
                    Code.INVALID_CONFIG,
                    f"pod {key}: {selection.key} is a primary network, which pods need not ask for",
                )
            wanted.append(selection.key)
        return wanted

    async def _attach(self, request: Request, place: Place) -> ResultInterface:
        """Give the pod one interface. Raises CniError."""
        endpoint, network = place.endpoint, place.network
        what = f"pod {endpoint.pod.namespace}/{endpoint.pod.name}"
        # A machine on a Layer3 network does not move: each of its pods has addresses of its own.
        live = self._cluster.is_live(endpoint) or not network.stretched
        state = PortState.ACTIVE if live else PortState.STANDBY
        default = _default_addresses(request.previous_result or {}) if place.primary else ()
        try:
            inside = PodInterface(request.netns, request.container_id, default)
            try:
                # Side by side: the pod begins when both are in place.
                async with asyncio.TaskGroup() as tasks:
                    if place.primary:
                        tasks.create_task(self._lock(endpoint.pod, inside))
                    attached = tasks.create_task(self._networks.attach(network, endpoint, state, inside))
            except BaseExceptionGroup as group:
                raise first_failure(group) from None
            mtu = attached.result()
            await self._cut_overs.stage(network, mtu, endpoint, state)
        except NotReady as error:
            raise CniError(Code.TRY_AGAIN_LATER, f"{what}: {error}") from error
        except KernelError as error:
            raise CniError(Code.INTERNAL, f"{what} on network {network.name}: {error}", repr(error.op)) from error
        return _interface(place, request.netns, mtu)

    async def _lock(self, pod: PodReference, inside: PodInterface) -> None:
        """Lock a pod's eth0. Raises KernelError."""
        await self._defaults.lock(pod, inside.container, inside.netns)
        await self._networks.bring_node_tables()

    async def _wanted(self, pod: PodReference) -> bool:
        """Whether the pod belongs on a primary network: its namespace is labelled for one."""
        if self._cluster.namespace_known(pod.namespace):
            return self._cluster.network_expected(pod.namespace)
        # The pod may be older than the watch of its brand-new namespace.
        await self._cluster.wait_for_namespace(pod.namespace, ALLOCATION_TIMEOUT)
        return self._cluster.network_expected(pod.namespace)

    async def _place(self, pod: PodReference, attachment: str | None) -> Place:
        """Where a pod goes, as soon as the controller has written its addresses. Raises CniError."""
        key = f"{pod.namespace}/{pod.name}"
        try:
            async with asyncio.timeout(ALLOCATION_TIMEOUT):
                endpoint = await self._cluster.wait_for_endpoint(key, pod.uid or None, attachment)
        except TimeoutError:
            raise CniError(Code.TRY_AGAIN_LATER, f"pod {key}: {self._why_not(pod.namespace, attachment)}") from None
        found = self._cluster.primary(pod.namespace) if attachment is None else self._cluster.attachment(attachment)
        if found is None:
            raise CniError(Code.TRY_AGAIN_LATER, f"pod {key}: its network went away")
        return Place(endpoint, found)

    def _why_not(self, namespace: str, attachment: str | None) -> str:
        if attachment is None and self._cluster.primary(namespace) is None:
            return f"namespace {namespace} is labelled for a primary network that does not exist yet"
        if attachment is not None and self._cluster.attachment(attachment) is None:
            return f"NetworkAttachmentDefinition {attachment} does not exist"
        where = f" for {attachment}" if attachment is not None else ""
        return f"annotation {names.POD_NETWORKS_ANNOTATION} has no entry{where}: see the pod's events"

    async def _delete(self, request: Request) -> Answer:
        """Always succeeds: a later GC, or the next look at the network, finds what is left.

        A meta-plugin takes its interface back; the chain's DEL ends everything that the container had.
        """
        try:
            only = request.ifname if request.attachment is not None else None
            gone = await self._networks.detach(request.container_id, only)
            if only is None:
                uids = tuple(item.pod.uid for item in gone if item.interface == names.PRIMARY_INTERFACE)
                if self._defaults.unlock(request.container_id, uids):
                    await self._networks.bring_node_tables()
        except (KernelError, NotReady) as error:
            log.warning("DEL of container %s: %s", request.container_id, error)
        return call.success()

    async def catch_up(self, directory: Path) -> None:
        """Carry out what containers asked for while no agent ran: each DEL that the shim has left in a file."""
        for path in await asyncio.to_thread(lambda: sorted(directory.glob("[!.]*"))):
            try:
                request = call.decode_call(await asyncio.to_thread(path.read_bytes)).request()
                if request.command is Command.DEL:
                    await self._delete(request)
            except (CniError, OSError) as error:
                log.warning("%s is no DEL that can be carried out: %s", path, error)
            await asyncio.to_thread(path.unlink, missing_ok=True)

    async def _collect(self, request: Request) -> Answer:
        """A meta-plugin knows the interfaces that it asked for; of the chain's list only the containers count."""
        found = self._cluster.attachment(request.attachment) if request.attachment is not None else None
        if request.attachment is not None and found is None:
            return call.success()
        valid = {(item.container_id, item.interface) for item in request.valid_attachments}
        containers = {item.container_id for item in request.valid_attachments}
        if found is not None:
            await self._networks.keep_only(lambda owner, name: (owner, name) in valid, found.network.name)
        else:
            await self._networks.keep_only(lambda owner, _: owner in containers)
        return call.success()

    async def _check(self, request: Request) -> Answer:
        pod = request.pod
        if pod is None:
            return call.success()
        wanted = [request.attachment] if request.attachment is not None else await self._attachments(pod)
        for attachment in wanted:
            place = await self._place(pod, attachment)
            endpoint = place.endpoint
            if request.attachment is not None:
                endpoint = self._cluster.name_interface(endpoint, InterfaceName(request.ifname))
            problem = await self._networks.check(endpoint, request.netns)
            if problem:
                raise CniError(Code.CHECK_FAILED, f"pod {pod.namespace}/{pod.name}: {problem}")
        return call.success()

    async def _tell(self, places: Sequence[Place], answer: dict[str, Any], *, alone: bool) -> None:
        """Write network-status (KubeVirt reads the interface from it), and a pod's addresses on the default network.

        Where this agent is not ``alone``, network-status is Multus' to write.
        """
        pod = places[0].endpoint.pod
        default = [item["address"] for item in answer["ips"] if _is_default(item, answer["interfaces"])]
        annotations: dict[str, str] = {}
        if alone:
            annotations[names.NETWORK_STATUS_ANNOTATION] = network_status(places, answer, default)
        item = self._cluster.pod(f"{pod.namespace}/{pod.name}")
        allocated = facts.annotations(item).get(names.POD_NETWORKS_ANNOTATION) if item else None
        if allocated and default and places[0].primary:
            entries = json.loads(allocated)
            entries["default"] = _default_entry(default, answer)
            annotations[names.POD_NETWORKS_ANNOTATION] = json.dumps(entries, sort_keys=True)
        if not annotations:
            return
        try:
            await self._kube.patch(
                PODS, pod.name, {"metadata": {"annotations": annotations, "uid": pod.uid}}, pod.namespace
            )
        except NotFound:
            raise CniError(Code.UNKNOWN_CONTAINER, f"pod {pod.namespace}/{pod.name} is gone") from None
        except KubeError as error:
            raise CniError(Code.TRY_AGAIN_LATER, f"cannot write {names.NETWORK_STATUS_ANNOTATION}: {error}") from error


def network_status(places: Iterable[Place], answer: dict[str, Any], default: list[str]) -> str:
    """``k8s.v1.cni.cncf.io/network-status``: eth0 first, then each interface as it was made.

    ``"default": true`` is said of the interface that holds the default route: the primary network's, or else eth0.
    """
    entries: list[dict[str, Any]] = []
    if default:
        entries.append(
            {
                "name": "default",
                "interface": str(names.DEFAULT_INTERFACE),
                "ips": [text.split("/")[0] for text in default],
                "mac": _default_mac(answer),
                "dns": {},
            }
        )
    for place in places:
        entry: dict[str, Any] = {
            "name": place.attachment.key,
            "interface": str(place.endpoint.interface),
            "ips": [str(item.ip) for item in place.endpoint.addresses],
            "mac": str(place.endpoint.mac),
            "dns": {},
        }
        entries.append({**entry, "default": True} if place.primary else entry)
    if default and not any(entry.get("default") for entry in entries):
        entries[0]["default"] = True
    return json.dumps(entries)


def _default_entry(addresses: list[str], answer: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "ip_addresses": addresses,
        "mac_address": _default_mac(answer),
        "role": "infrastructure-locked",
    }
    return {**entry, "ip_address": addresses[0]} if len(addresses) == 1 else entry


def _default_mac(answer: dict[str, Any]) -> str:
    for item in answer["interfaces"]:
        if item.get("name") == names.DEFAULT_INTERFACE and item.get("sandbox"):
            return str(item.get("mac", ""))
    return ""


def _default_addresses(previous: Mapping[str, Any]) -> tuple[tuple[IPInterface, IPAddress | None], ...]:
    """eth0's addresses in the previous plugin's result, each with its gateway."""
    interfaces = previous.get("interfaces") or []
    found: list[tuple[IPInterface, IPAddress | None]] = []
    for item in previous.get("ips") or []:
        if not interfaces or _is_default(item, interfaces):
            gateway = item.get("gateway")
            found.append((interface(item["address"]), address(gateway) if gateway else None))
    return tuple(found)


def _is_default(item: Mapping[str, Any], interfaces: list[dict[str, Any]]) -> bool:
    index = item.get("interface")
    return isinstance(index, int) and interfaces[index].get("name") == names.DEFAULT_INTERFACE


def _interface(place: Place, netns: str, mtu: int) -> ResultInterface:
    endpoint, network = place.endpoint, place.network
    return ResultInterface(
        name=str(endpoint.interface),
        mac=str(endpoint.mac),
        sandbox=netns,
        mtu=mtu,
        addresses=tuple(
            ResultAddress(found, network.gateway_for(found.version) if place.primary else None)
            for found in endpoint.addresses
        ),
        routes=tuple(ResultRoute(destination, hop) for destination, hop in network.pod_routes),
        primary=place.primary,
    )
