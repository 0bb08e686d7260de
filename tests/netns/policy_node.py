"""One node's agent of a policy test, as a program: reads a world and steps as JSON, answers with a JSON list.

It runs inside a lab's node, with the product's cluster index, policy tables and kernel seam; only the API is a dict.
Each run is a new agent, which adopts what the one before it has left.
"""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

from vmnet.agent.cluster import Cluster, Stores
from vmnet.agent.networks import Networks
from vmnet.agent.policy_tables import PolicyTables
from vmnet.kernel.linux import LinuxKernel
from vmnet.kube.api import Object
from vmnet.kube.fake import FakeInformer, FakeKube
from vmnet.model.endpoint import PortState
from vmnet.plan.network import PodInterface

KINDS = ("pods", "nodes", "namespaces", "nads", "machines", "services", "endpoint_slices", "policies")


def make_pod(name: str) -> None:
    if not Path(f"/run/netns/{name}").exists():
        subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)


class Driver:
    def __init__(self, node: str) -> None:
        self.node, self.kernel = node, LinuxKernel()
        self.stores = {kind: FakeInformer(kind) for kind in KINDS}
        stores = Stores(**{kind: cast(Any, store) for kind, store in self.stores.items()})
        self.changed: set[str] = set()
        self.cluster = Cluster(stores, on_network=self.changed.add, on_machine=lambda machine: None)
        self.policies = PolicyTables(FakeKube(), stores, self.cluster, node, self.changed.add)
        self.networks = Networks(self.kernel, self.cluster, node, (), lambda endpoint: None, (self.policies,))

    async def render(self) -> None:
        while self.changed:
            await self.networks.render(self.changed.pop())

    async def adopt(self) -> None:
        """As an agent that starts."""
        await self.networks.prepare_node()
        await self.networks.adopt()

    async def attach(self, pod: str) -> None:
        endpoint = self.cluster.endpoint(pod)
        assert endpoint is not None, pod
        found = self.cluster.attachment_of(endpoint.network)
        assert found is not None
        name = endpoint.pod.name
        make_pod(name)
        inside = PodInterface(f"/run/netns/{name}", f"container-{name}")
        await self.networks.attach(found.network, endpoint, PortState.ACTIVE, inside)

    async def put(self, kind: str, item: Object) -> float:
        """One event of the API, and what follows from it. Returns how long that took."""
        self.changed.clear()
        started = time.monotonic()
        self.stores[kind].put(item)
        await self.render()
        return time.monotonic() - started

    async def drop(self, kind: str, key: str) -> None:
        self.changed.clear()
        self.stores[kind].drop(key)
        await self.render()


async def main(node: str) -> None:
    driver = Driver(node)
    given = json.load(sys.stdin)
    for kind in KINDS:
        for item in given["world"].get(kind, ()):
            driver.stores[kind].put(item)
    results = []
    for step in given["steps"]:
        results.append(await getattr(driver, step["do"])(**step["with"]))
    await driver.kernel.close()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
