"""CNI requests of this node: a pod's interface on its namespace's primary network, from ADD to DEL."""

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from vmnet.agent import facts
from vmnet.agent.cluster import Cluster
from vmnet.agent.cut_over import CutOvers
from vmnet.agent.networks import Networks, NotReady
from vmnet.cni import call, result
from vmnet.cni.call import Answer
from vmnet.cni.errors import CniError, Code
from vmnet.cni.request import Command, Request
from vmnet.cni.result import ResultAddress, ResultInterface
from vmnet.kernel.api import KernelError
from vmnet.kube.api import PODS, Kube, KubeError, NotFound
from vmnet.model import names
from vmnet.model.addresses import IPAddress, IPInterface, address, interface
from vmnet.model.endpoint import Endpoint, PodReference, PortState
from vmnet.model.network import Network
from vmnet.plan.network import PodInterface

log = logging.getLogger(__name__)

ALLOCATION_TIMEOUT: Final = 60.0
"""Seconds that ADD waits for the controller's annotation before it tells the runtime to try again."""


class Attachments:
    """Answers CNI requests. ``ready`` says why no ADD can be served now, None when it can."""

    def __init__(
        self,
        kube: Kube,
        cluster: Cluster,
        networks: Networks,
        cut_overs: CutOvers,
        synced: asyncio.Event,
    ) -> None:
        self._kube = kube
        self._cluster = cluster
        self._networks = networks
        self._cut_overs = cut_overs
        self._synced = synced

    async def handle(self, request: Request) -> Answer:
        """One request. Raises CniError."""
        if request.command is Command.DEL:
            return await self._delete(request)
        if request.command is Command.STATUS:
            if not self._synced.is_set():
                raise CniError(Code.NOT_AVAILABLE, "the agent has not read the cluster's state yet")
            return call.success()
        try:
            async with asyncio.timeout(ALLOCATION_TIMEOUT):
                await self._synced.wait()
        except TimeoutError:
            raise CniError(Code.TRY_AGAIN_LATER, "the agent cannot read the cluster's state: is the API up?") from None
        if request.command is Command.GC:
            await self._networks.keep_only({item.container_id for item in request.valid_attachments})
            return call.success()
        if request.command is Command.CHECK:
            return await self._check(request)
        return await self._add(request)

    async def _add(self, request: Request) -> Answer:
        pod = request.pod
        if pod is None or not await self._wanted(pod):
            return call.success(dict(request.previous_result or {"cniVersion": request.version}))
        key = f"{pod.namespace}/{pod.name}"
        endpoint = await self._endpoint(pod)
        found = self._cluster.primary(pod.namespace)
        if found is None:
            raise CniError(Code.TRY_AGAIN_LATER, f"pod {key}: its network went away")
        network = found.network.around(endpoint.addresses)
        # A machine on a Layer3 network does not move: each of its pods has addresses of its own.
        live = self._cluster.is_live(endpoint) or not network.stretched
        state = PortState.ACTIVE if live else PortState.STANDBY
        try:
            inside = PodInterface(
                request.netns, request.container_id, _default_addresses(request.previous_result or {})
            )
            mtu = await self._networks.attach(network, endpoint, state, inside)
            await self._cut_overs.stage(network, mtu, endpoint, state)
        except NotReady as error:
            raise CniError(Code.TRY_AGAIN_LATER, f"pod {key}: {error}") from error
        except KernelError as error:
            raise CniError(Code.INTERNAL, f"pod {key} on network {network.name}: {error}", repr(error.op)) from error
        answer = result.extend(
            request.previous_result, _interface(network, endpoint, request.netns, mtu), request.version
        )
        await self._tell(endpoint, found.key, answer)
        return call.success(answer)

    async def _wanted(self, pod: PodReference) -> bool:
        """Whether the pod belongs on a primary network: its namespace is labelled for one."""
        if self._cluster.namespace_known(pod.namespace):
            return self._cluster.network_expected(pod.namespace)
        # The pod may be older than the watch of its brand-new namespace.
        await self._cluster.wait_for_namespace(pod.namespace, ALLOCATION_TIMEOUT)
        return self._cluster.network_expected(pod.namespace)

    async def _endpoint(self, pod: PodReference) -> Endpoint:
        key = f"{pod.namespace}/{pod.name}"
        try:
            async with asyncio.timeout(ALLOCATION_TIMEOUT):
                return await self._cluster.wait_for_endpoint(key, pod.uid or None)
        except TimeoutError:
            if self._cluster.primary(pod.namespace) is None:
                why = f"namespace {pod.namespace} is labelled for a primary network that does not exist yet"
            else:
                why = f"annotation {names.POD_NETWORKS_ANNOTATION} is not there: see the pod's events"
            raise CniError(Code.TRY_AGAIN_LATER, f"pod {key}: {why}") from None

    async def _delete(self, request: Request) -> Answer:
        """Always succeeds: a later GC, or the next look at the network, finds what is left."""
        try:
            await self._networks.detach(request.container_id)
        except (KernelError, NotReady) as error:
            log.warning("DEL of container %s: %s", request.container_id, error)
        return call.success()

    async def _check(self, request: Request) -> Answer:
        pod = request.pod
        if pod is None or not await self._wanted(pod):
            return call.success()
        endpoint = await self._endpoint(pod)
        problem = await self._networks.check(endpoint, request.netns)
        if problem:
            raise CniError(Code.CHECK_FAILED, f"pod {pod.namespace}/{pod.name}: {problem}")
        return call.success()

    async def _tell(self, endpoint: Endpoint, attachment: str, answer: dict[str, Any]) -> None:
        """Write network-status (KubeVirt reads the interface from it) and the default network's addresses on the pod.

        Where Multus runs, it overwrites network-status with the same facts.
        """
        default = [item["address"] for item in answer["ips"] if _is_default(item, answer["interfaces"])]
        annotations = {names.NETWORK_STATUS_ANNOTATION: network_status(endpoint, attachment, answer, default)}
        item = self._cluster.pod(f"{endpoint.pod.namespace}/{endpoint.pod.name}")
        allocated = facts.annotations(item).get(names.POD_NETWORKS_ANNOTATION) if item else None
        if allocated and default:
            entries = json.loads(allocated)
            entries["default"] = _default_entry(default, answer)
            annotations[names.POD_NETWORKS_ANNOTATION] = json.dumps(entries, sort_keys=True)
        try:
            await self._kube.patch(
                PODS,
                endpoint.pod.name,
                {"metadata": {"annotations": annotations, "uid": endpoint.pod.uid}},
                endpoint.pod.namespace,
            )
        except NotFound:
            raise CniError(
                Code.UNKNOWN_CONTAINER, f"pod {endpoint.pod.namespace}/{endpoint.pod.name} is gone"
            ) from None
        except KubeError as error:
            raise CniError(Code.TRY_AGAIN_LATER, f"cannot write {names.NETWORK_STATUS_ANNOTATION}: {error}") from error


def network_status(endpoint: Endpoint, attachment: str, answer: dict[str, Any], default: list[str]) -> str:
    """``k8s.v1.cni.cncf.io/network-status``: eth0 first, then the primary interface with ``"default": true``."""
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
    entries.append(
        {
            "name": attachment,
            "interface": str(endpoint.interface),
            "ips": [str(item.ip) for item in endpoint.addresses],
            "mac": str(endpoint.mac),
            "default": True,
            "dns": {},
        }
    )
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


def _interface(network: Network, endpoint: Endpoint, netns: str, mtu: int) -> ResultInterface:
    return ResultInterface(
        name=str(endpoint.interface),
        mac=str(endpoint.mac),
        sandbox=netns,
        mtu=mtu,
        addresses=tuple(ResultAddress(found, network.gateway_for(found.version)) for found in endpoint.addresses),
    )
