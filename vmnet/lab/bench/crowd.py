"""Many endpoints of one network that no node has to run: pods of nodes which are only in the API."""

import asyncio
from collections.abc import Callable
from typing import Final

from vmnet.kube.api import NODES, PODS, Kube, Object
from vmnet.lab.errors import LabError
from vmnet.model import names

A_NODE: Final = 500
"""Pods of one node."""
_AT_ONCE: Final = 20
_SECONDS: Final = 900.0


async def make(kube: Kube, namespace: str, count: int, tell: Callable[[str], None]) -> None:
    """So many pods of the namespace's primary network, each with its addresses. Raises LabError: some got none."""
    nodes = -(-count // A_NODE)
    for number in range(nodes):
        node: Object = {"metadata": {"name": f"crowd-{number}"}, "spec": {}}
        await kube.create(NODES, node)
        address = {"type": "InternalIP", "address": f"172.31.{number // 250}.{number % 250 + 1}"}
        await kube.patch(NODES, f"crowd-{number}", {"status": {"addresses": [address]}}, subresource="status")
    gate = asyncio.Semaphore(_AT_ONCE)

    async def pod(number: int) -> None:
        body: Object = {
            "metadata": {"name": f"crowd-{number}", "namespace": namespace, "labels": {"crowd": "yes"}},
            "spec": {"nodeName": f"crowd-{number // A_NODE}", "containers": [{"name": "main", "image": "any"}]},
        }
        async with gate:
            await kube.create(PODS, body, namespace)

    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(pod(number))
    try:
        async with asyncio.timeout(_SECONDS):
            while (done := await _allocated(kube, namespace)) < count:
                tell(f"{done} of {count} endpoints have addresses")
                await asyncio.sleep(5)
    except TimeoutError:
        raise LabError(f"{done} of {count} endpoints have addresses after {_SECONDS:.0f} s") from None


async def _allocated(kube: Kube, namespace: str) -> int:
    pods = (await kube.list(PODS, namespace, labels="crowd=yes")).items
    return sum(names.POD_NETWORKS_ANNOTATION in pod["metadata"].get("annotations", {}) for pod in pods)
