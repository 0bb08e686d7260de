"""What the lab's components asked the API for: nothing that they may not, and, the agents, everything that they may.

The controller's roles have a test of their own (``tests/contract/test_deploy_roles.py``).
"""

import re
from pathlib import Path
from typing import Any

import pytest

from vmnet.lab import container, manifests
from vmnet.lab.apiserver.audit import read, used
from vmnet.lab.init import AGENT as AGENT_MANIFEST
from vmnet.lab.init import CONTROLLER as CONTROLLER_MANIFEST
from vmnet.model import names

pytestmark = pytest.mark.asyncio(loop_scope="session")
SYSTEM = "vmnet-system"
AGENT = f"system:serviceaccount:{SYSTEM}:vmnet-agent"
OURS = (AGENT, f"system:serviceaccount:{SYSTEM}:vmnet-controller")


CAPABILITIES = {  # linux/capability.h
    "NET_BIND_SERVICE": 10,
    "NET_ADMIN": 12,
    "NET_RAW": 13,
    "SYS_CHROOT": 18,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
}


@pytest.mark.parametrize("manifest", [AGENT_MANIFEST, CONTROLLER_MANIFEST], ids=lambda path: str(path.parent.name))
async def test_processes_have_what_their_manifests_say_and_no_more(world: Any, manifest: Path) -> None:
    context = container.context_of(*container.container_of(manifest))
    kept = sum(1 << CAPABILITIES[name] for name in container.capabilities_of(context))
    processes = [
        process
        for process in (await world.lab.status())["processes"]
        if process["name"].split("-")[0] == manifest.parent.name
    ]
    assert processes
    for process in processes:
        seen = (await world.lab.exec("fabric", ["cat", f"/proc/{process['pid']}/status"])).stdout
        status = dict(re.findall(r"^(\w+):\s+(.*)$", seen, re.MULTILINE))
        assert {int(user) for user in status["Uid"].split()} == {context["runAsUser"]}
        assert {int(status[name], 16) for name in ("CapBnd", "CapEff", "CapPrm")} == {kept}
        assert (int(status["CapInh"], 16), int(status["CapAmb"], 16)) == (0, 0)
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        mounts = (await world.lab.exec("fabric", ["cat", f"/proc/{process['pid']}/mountinfo"])).stdout
        writable = {line.split()[4]: "rw" in line.split()[5].split(",") for line in mounts.splitlines()}
        assert not writable["/"]
        assert not writable["/proc/sys"]
        assert writable["/tmp"]


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


async def test_a_node_whose_agent_is_ready_loses_the_taint_that_it_was_born_with(world: Any) -> None:
    await world.lab.kubectl("taint", "node", "n2", f"{names.NODE_TAINT}=true:NoSchedule")

    async def gone() -> bool:
        taints = (await world.get("node", "n2"))["spec"].get("taints") or []
        return names.NODE_TAINT not in [taint["key"] for taint in taints]

    await world.until("the controller takes the taint away", gone)
