"""What the lab's components asked the API for: nothing that they may not, and, the agents, everything that they may.

The controller's roles have a test of their own (``tests/contract/test_deploy_roles.py``).
"""

from typing import Any

import pytest

from vmnet.lab import manifests
from vmnet.lab.apiserver.audit import read, used
from vmnet.model import names

pytestmark = pytest.mark.asyncio(loop_scope="session")
SYSTEM = "vmnet-system"
AGENT = f"system:serviceaccount:{SYSTEM}:vmnet-agent"
OURS = (AGENT, f"system:serviceaccount:{SYSTEM}:vmnet-controller")


async def test_agents_use_all_that_they_may_and_nobody_is_refused(healthy: Any) -> None:
    world = healthy
    spec = {"topology": "Layer2", "layer2": {"role": "Primary", "subnets": ["10.77.0.0/24"]}}
    network = {"apiVersion": "k8s.ovn.org/v1", "kind": "UserDefinedNetwork", "spec": spec}
    async with world.namespace("rights") as namespace:
        await world.apply({**network, "metadata": {"name": "net", "namespace": namespace}})
        container = {"name": "main", "image": "registry.k8s.io/e2e-test-images/agnhost:2.53", "args": ["pause"]}
        metadata = {"name": "one", "namespace": namespace, "annotations": {names.OPEN_PORTS_ANNOTATION: "["}}
        await world.apply(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container]}}
        )
        await world.lab.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/one", "--timeout=60s")
        seen: list[dict[str, Any]] = []

        async def told(count: int) -> bool:
            items = (await world.get("events", "-n", namespace))["items"]
            seen[:] = [item for item in items if item["source"].get("component") == "vmnet-agent"]
            return any(item["count"] >= count for item in seen)

        await world.until("the agent's event about an annotation that cannot be read", lambda: told(1))
        # What is wrong again is told again: the count of the same event rises.
        for value in ("", "["):
            annotation = f"{names.OPEN_PORTS_ANNOTATION}={value}"
            await world.lab.kubectl("annotate", "-n", namespace, "--overwrite", "pod/one", annotation)
        await world.until(f"the same event again: {seen}", lambda: told(2))
    lines = [line for line in read(world.lab.directory.audit) if line.user in OURS]
    assert [line for line in lines if not line.allowed] == []
    rights = set(manifests.rights("vmnet-agent"))
    asked = used((line for line in lines if line.user == AGENT), rights)
    excess, lack = sorted(rights - asked), sorted(asked - rights)
    assert not excess, f"granted, but not used: {excess}"
    assert not lack, f"used, but not granted by a rule of its own: {lack}"
