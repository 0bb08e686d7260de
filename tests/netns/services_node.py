"""One node's agent of a services test, as a program: ``python services_node.py NODE SOCKET``.

It runs inside a lab's node, with the product's cluster index, service tables and kernel seam; only the API is a dict.
Each connection to SOCKET brings JSON lines, one step each, and gets a line for each: ``{"result"}`` or ``{"error"}``.
A new process is a new agent, which adopts what the one before it has left.
"""

import asyncio
import json
import subprocess
import sys
import traceback
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import dns.name

from vmnet.agent import service_records
from vmnet.agent.cluster import Cluster, Stores
from vmnet.agent.datagrams import Datagrams
from vmnet.agent.networks import Networks
from vmnet.agent.service_tables import ServiceTables
from vmnet.kernel.linux import LinuxKernel
from vmnet.kube.api import Object
from vmnet.kube.fake import FakeInformer
from vmnet.model.endpoint import PortState
from vmnet.plan.network import PodInterface
from vmnet_dns.message import Type

KINDS = ("pods", "nodes", "namespaces", "nads", "machines", "services", "endpoint_slices", "policies", "service_cidrs")


def make_pod(name: str) -> None:
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)


class Driver:
    def __init__(self, node: str) -> None:
        self.kernel = LinuxKernel()
        self.stores = {kind: FakeInformer(kind) for kind in KINDS}
        stores = Stores(**{kind: cast(Any, store) for kind, store in self.stores.items()})
        self.changed: set[str] = set()
        self.cluster = Cluster(stores, on_network=self.changed.add, on_machine=lambda machine: None)
        self.services = ServiceTables(stores, self.cluster, on_network=self.changed.add, on_node=lambda: None)
        datagrams = Datagrams(self.kernel, self.services.datagrams, self.services.ways)
        self.networks = Networks(
            self.kernel,
            self.cluster,
            node,
            (datagrams,),
            lambda endpoint: None,
            (self.services,),
            default_services=self.services.default_addresses,
            on_node_tables=datagrams.follow_node,
        )

    async def start(self, world: dict[str, list[Object]]) -> None:
        """As an agent that starts: everything is listed, then what is there is taken over."""
        for kind in KINDS:
            for item in world.get(kind, ()):
                self.stores[kind].put(item)
        await self.networks.adopt()
        await self.render()

    async def render(self) -> None:
        while self.changed:
            await self.networks.render(self.changed.pop())
        await self.networks.bring_node_tables()

    async def put(self, items: list[list[Any]]) -> None:
        """Events of the API, each a kind and an object, and what follows from them."""
        for kind, item in items:
            self.stores[kind].put(item)
        await self.render()

    async def drop(self, kind: str, keys: list[str]) -> None:
        for key in keys:
            self.stores[kind].drop(key)
        await self.render()

    async def names(self, network: str) -> dict[str, list[str]]:
        """Names in the network's DNS, with their addresses."""
        found: dict[str, list[str]] = {}
        named = self.services.named(network)
        for record in (item for service in named for item in service_records.records(service, "cluster.local")):
            if record.type in (Type.A, Type.AAAA):
                name = dns.name.from_wire(record.owner, 0)[0].to_text(omit_final_dot=True)
                found.setdefault(name, []).append(str(ip_address(record.data)))
        return found

    async def attach(self, pod: str) -> None:
        endpoint = self.cluster.endpoint(pod)
        assert endpoint is not None, pod
        found = self.cluster.attachment_of(endpoint.network)
        assert found is not None
        name = endpoint.pod.name
        make_pod(name)
        inside = PodInterface(f"/run/netns/{name}", f"container-{name}")
        await self.networks.attach(found.network, endpoint, PortState.ACTIVE, inside)
        await self.render()


async def main(node: str, path: Path) -> None:
    driver = Driver(node)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            step = json.loads(line)
            try:
                reply = {"result": await getattr(driver, step["do"])(**step["with"])}
            except Exception:
                reply = {"error": traceback.format_exc()}
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, path, limit=1 << 24)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
