"""The Node object and its Lease: this node exists, is ready, and is alive."""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from vmnet.kube.api import LEASES, NODES, AlreadyExists, Kube, KubeError, NotFound, Object, PatchType
from vmnet.lab.kubelet.network import Network, NetworkError
from vmnet.lab.kubelet.status import timestamp

log = logging.getLogger(__name__)

LEASE_NAMESPACE: Final = "kube-node-lease"
LEASE_SECONDS: Final = 40
HEARTBEAT: Final = 10.0
STATUS_INTERVAL: Final = 2.0
"""How often the network's readiness is asked."""
VERSION: Final = "v1.36.0"


def node_object(name: str, pod_subnets: Sequence[str] = ()) -> Object:
    """What registration creates. The subnets are the node controller's word in a cluster that has one."""
    labels = {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        # KubeVirt schedules guests on nodes that its handler has labelled so.
        "kubevirt.io/schedulable": "true",
    }
    spec = {"podCIDR": pod_subnets[0], "podCIDRs": list(pod_subnets)} if pod_subnets else {}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}, "spec": spec}


def node_status(
    name: str, addresses: Sequence[str], port: int, network_fault: str, now: float, before: Object
) -> Object:
    """``status``; conditions keep the time of their last change."""
    known = {item["type"]: item for item in before.get("conditions") or []}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024
    capacity = {
        "cpu": str(os.cpu_count() or 1),
        "memory": f"{pages}Ki",
        "pods": "110",
        "devices.kubevirt.io/kvm": "110",
    }
    ready = (
        ("False", "KubeletNotReady", f"container runtime network not ready: {network_fault}")
        if network_fault
        else ("True", "KubeletReady", "kubelet is posting ready status")
    )
    conditions = []
    for kind, (status, reason, message) in {
        "MemoryPressure": ("False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        "DiskPressure": ("False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        "PIDPressure": ("False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        "Ready": ready,
    }.items():
        same = known.get(kind, {}).get("status") == status
        conditions.append(
            {
                "type": kind,
                "status": status,
                "reason": reason,
                "message": message,
                "lastHeartbeatTime": timestamp(now),
                "lastTransitionTime": known[kind]["lastTransitionTime"] if same else timestamp(now),
            }
        )
    kernel = os.uname()
    return {
        "addresses": [
            *({"type": "InternalIP", "address": address} for address in addresses),
            {"type": "Hostname", "address": name},
        ],
        "capacity": capacity,
        "allocatable": capacity,
        "conditions": conditions,
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
        "nodeInfo": {
            "architecture": "amd64",
            "bootID": "",
            "containerRuntimeVersion": "lab://0.1",
            "kernelVersion": kernel.release,
            "kubeProxyVersion": VERSION,
            "kubeletVersion": VERSION,
            "machineID": name,
            "operatingSystem": "linux",
            "osImage": "vmnet lab",
            "systemUUID": name,
        },
    }


class NodeReporter:
    """Registers the node and keeps its status and lease fresh."""

    def __init__(
        self,
        kube: Kube,
        name: str,
        addresses: Sequence[str],
        port: int,
        network: Network,
        pod_subnets: Sequence[str] = (),
    ) -> None:
        self._kube = kube
        self._name = name
        self._addresses = tuple(addresses)
        self._port = port
        self._network = network
        self._pod_subnets = tuple(pod_subnets)
        self._status: Object = {}

    async def run(self) -> None:
        """For ever; an API that is away is tried again."""
        reported = leased = -HEARTBEAT
        fault: str | None = None
        while True:
            now = time.monotonic()
            try:
                current = await self._fault()
                if current != fault or now - reported >= HEARTBEAT:
                    await self._report(current)
                    fault, reported = current, now
                if now - leased >= HEARTBEAT:
                    await self._renew()
                    leased = now
            except KubeError as error:
                log.warning("node %s: %s", self._name, error)
            await asyncio.sleep(STATUS_INTERVAL)

    async def _fault(self) -> str:
        try:
            await self._network.status()
        except NetworkError as error:
            return str(error)
        return ""

    async def _report(self, fault: str) -> None:
        status = node_status(self._name, self._addresses, self._port, fault, time.time(), self._status)
        try:
            await self._patch(status)
        except NotFound:
            try:
                await self._kube.create(NODES, node_object(self._name, self._pod_subnets))
            except AlreadyExists:
                log.info("node %s: registered meanwhile", self._name)
            await self._patch(status)
        self._status = status

    async def _patch(self, status: Object) -> None:
        # Not a strategic merge: that joins addresses by their type, and one of two InternalIPs would be lost.
        await self._kube.patch(NODES, self._name, {"status": status}, type=PatchType.MERGE, subresource="status")

    async def _renew(self) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": self._name, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": now}
        try:
            await self._kube.patch(LEASES, self._name, {"spec": spec}, LEASE_NAMESPACE)
        except NotFound:
            body = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self._name, "namespace": LEASE_NAMESPACE},
                "spec": spec,
            }
            await self._kube.create(LEASES, body, LEASE_NAMESPACE)
