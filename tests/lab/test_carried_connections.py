"""Every kind of connection that needs conntrack, at once, over three migrations that end where the first began."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest

from vmnet.lab.demo import BLUE, RED
from vmnet.lab.guest.probe import probe_binary
from vmnet.model import names

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(500)]

NODES: Final = ("n1", "n2", "n3")
OUTSIDE: Final = {4: "172.30.0.100", 6: "fd00:30::100"}
PORTS: Final = {"datagrams": (7007, "UDP"), "sink": (7008, "TCP"), "source": (7009, "TCP")}
SECONDS: Final = "450"
STALL_MS: Final = 30000
"""What is left alone stands still for ever, or is reset; on a busy machine what was held is sent again late."""
RATE: Final = "8192"
WITNESS: Final = 7107
"""Where the outside host writes down who sends it datagrams, and sends them back."""
_WITNESS: Final = """\
import socket, sys
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(("::", int(sys.argv[1])))
seen = set()
print("ready", flush=True)
while True:
    data, peer = s.recvfrom(65536)
    if peer not in seen:
        seen.add(peer)
        print("from", peer[0], peer[1], flush=True)
    try:
        s.sendto(data, peer)
    except OSError as error:
        print("error", peer[0], error, flush=True)
"""


def backend(node: str) -> dict[str, Any]:
    """A pod with the far ends of streams, on one node."""
    command = [str(probe_binary()), "serve", "--rate", RATE]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": BLUE[0], "name": f"backend-{node}", "labels": {"app": "backend", "on": node}},
        "spec": {
            "containers": [{"name": "serve", "image": "probe", "command": command}],
            "nodeSelector": {"kubernetes.io/hostname": node},
            "tolerations": [{"operator": "Exists"}],
            "terminationGracePeriodSeconds": 1,
        },
    }


def service(name: str, selector: dict[str, str], **spec: Any) -> dict[str, Any]:
    """A dual-stack Service of probe's ports."""
    ports = [{"name": key, "port": port, "protocol": protocol} for key, (port, protocol) in PORTS.items()]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": BLUE[0], "name": name},
        "spec": {"selector": selector, "ports": ports, "ipFamilyPolicy": "RequireDualStack", **spec},
    }


def policy() -> dict[str, Any]:
    """Blue may be asked by red and from outside, and may ask backends and the outside: to red it may only answer."""
    outside = [{"ipBlock": {"cidr": cidr}} for cidr in ("172.30.0.0/16", "fd00:30::/32")]
    routers = [{"ipBlock": {"cidr": cidr}} for cidr in ("100.88.0.0/16", "fd97::/64")]
    red = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": RED[0]}}}
    backends = {"podSelector": {"matchLabels": {"app": "backend"}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": BLUE[0], "name": "answers-only"},
        "spec": {
            "podSelector": {"matchLabels": {names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [red, *outside, *routers]}],
            "egress": [{"to": [backends, *outside]}],
        },
    }


class Outside:
    """Streams that the outside host has begun."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.logs: dict[str, Any] = {}

    async def start(self, name: str, words: Iterable[str]) -> None:
        """Run probe there by these words."""
        command = [str(probe_binary()), "--json-lines", *words]
        self.logs[name] = await self.world.lab.spawn(name.replace(" ", "-"), "outside", command)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What it has said so far."""
        text = self.logs[name].read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def counts(self) -> dict[str, int]:
        """What each has got across."""
        found = {name: (self.lines(name) or [{}])[-1] for name in self.logs}
        return {name: int(last.get("bytes", last.get("received", 0))) for name, last in found.items()}

    async def finish(self) -> dict[str, dict[str, Any]]:
        """End them; what each saw."""
        for name in self.logs:
            await self.world.lab.kill(name.replace(" ", "-"), signal.SIGTERM)
        for name in self.logs:
            await self.world.lab.wait(name.replace(" ", "-"))
        return {name: self.lines(name)[-1] for name in self.logs}


async def addresses_of(world: Any, name: str) -> dict[int, str]:
    """Cluster addresses of a Service by family."""
    spec = (await world.get("service", "-n", BLUE[0], name))["spec"]
    return {6 if ":" in text else 4: text for text in spec["clusterIPs"]}


async def endpoints(world: Any, name: str, count: int) -> None:
    """Wait until a Service has so many addresses of the network, in both families."""

    async def mirrored() -> bool:
        label = f"{names.MIRRORED_SERVICE_LABEL}={name}"
        slices = (await world.get("endpointslices", "-n", BLUE[0], "-l", label))["items"]
        found = {text for item in slices for entry in item.get("endpoints") or [] for text in entry["addresses"]}
        return len(found) == 2 * count

    await world.until(f"Service {name} has {count} backends", mirrored)


@asynccontextmanager
async def surroundings(world: Any) -> AsyncIterator[dict[str, dict[int, str]]]:
    """Backends, Services and a policy; yields Services' addresses."""
    per_node = [service(f"{kind}-{node}", {"app": "backend", "on": node}) for node in NODES for kind in ("tcp", "udp")]
    machine = {"kubevirt.io": "virt-launcher"}
    exposed = [
        service("blue-cluster", machine, type="LoadBalancer"),
        service("blue-local", machine, type="NodePort", externalTrafficPolicy="Local"),
    ]
    objects = [*map(backend, NODES), *per_node, *exposed, policy()]
    try:
        await world.apply(*objects)
        for node in NODES:
            await world.lab.kubectl(
                "wait", "-n", BLUE[0], f"pod/backend-{node}", "--for=condition=Ready", "--timeout=60s"
            )
        for item in (*per_node, *exposed):
            await endpoints(world, item["metadata"]["name"], 1)
        yield {item["metadata"]["name"]: await addresses_of(world, item["metadata"]["name"]) for item in per_node}
    finally:
        for item in objects:
            await world.lab.kubectl(
                "delete", "-n", BLUE[0], item["kind"].lower(), item["metadata"]["name"], "--ignore-not-found"
            )


async def go_to(world: Any, node: str) -> dict[str, Any]:
    """Migrate blue to a node; returns the record."""
    others = [other for other in NODES if other != node]
    for other in others:
        await world.lab.kubectl("cordon", other)
    try:
        migration = await world.migrate()
        assert await world.migration_ends(migration) == "Succeeded"
    finally:
        for other in others:
            await world.lab.kubectl("uncordon", other)
    assert await world.node_of(BLUE) == node

    async def recorded() -> dict[str, Any]:
        annotations = (await world.get("vmi", "-n", *BLUE))["metadata"]["annotations"]
        found = json.loads(annotations.get(names.MIGRATION_RECORD_ANNOTATION, "{}"))
        return dict(found["cutOver"]) if found.get("to", {}).get("node") == node and found.get("cutOver") else {}

    return dict(await world.until("the migration is on record", recorded))


async def node_ports(world: Any, name: str) -> dict[str, int]:
    """Node ports by the names of the ports."""
    return {
        port["name"]: port["nodePort"] for port in (await world.get("service", "-n", BLUE[0], name))["spec"]["ports"]
    }


async def balanced(world: Any, name: str) -> dict[int, str]:
    """Addresses that the load balancer gave a Service, by family."""

    async def given() -> list[str]:
        status = (await world.get("service", "-n", BLUE[0], name)).get("status") or {}
        found = [item["ip"] for item in (status.get("loadBalancer") or {}).get("ingress") or []]
        return found if len(found) == len(OUTSIDE) else []

    found = await world.until(f"Service {name} has its load balancer's addresses", given)
    return {6 if ":" in text else 4: text for text in found}


async def test_all_that_conntrack_knows_comes_along(healthy: Any) -> None:
    world = healthy
    start = await world.node_of(BLUE)
    guest, red = await world.scenario.guest(*BLUE), await world.scenario.guest(*RED)
    blue = [text.split("/")[0] for text in await world.scenario.addresses(guest)]
    witness = await world.lab.spawn("witness", "outside", ["python3", "-c", _WITNESS, str(WITNESS)])
    hosts = {item["name"]: item for item in (await world.lab.status())["hosts"]}
    outside = Outside(world)
    async with surroundings(world) as services:
        asked = {
            f"udp over the edge {family}": ["udp", address, str(WITNESS), "20", SECONDS]
            for family, address in OUTSIDE.items()
        }
        asked |= {
            f"tcp over the edge {family}": ["send", address, "7008", SECONDS, RATE]
            for family, address in OUTSIDE.items()
        }
        for node in NODES:
            asked |= {
                f"tcp to {node} 4": ["send", services[f"tcp-{node}"][4], "7008", SECONDS, RATE],
                f"tcp to {node} 6": ["receive", services[f"tcp-{node}"][6], "7009", SECONDS],
                f"udp to {node} 4": ["udp", services[f"udp-{node}"][4], "7007", "20", SECONDS],
                f"udp to {node} 6": ["udp", services[f"udp-{node}"][6], "7007", "20", SECONDS],
            }
        answered = {f"from blue to red {address}": ["receive", address, "7009", SECONDS] for address in blue}
        answered |= {f"blue and red {address}": ["udp", address, "7007", "20", SECONDS] for address in blue}
        for kind, node in (("cluster", "n1"), ("local", start)):
            ports = await node_ports(world, f"blue-{kind}")
            for family, field in ((4, "ipv4"), (6, "ipv6")):
                host = hosts[node][field]
                source, datagrams = str(ports["source"]), str(ports["datagrams"])
                await outside.start(f"{kind} tcp {family}", ["receive", host, source, SECONDS])
                await outside.start(f"{kind} udp {family}", ["udp", host, datagrams, "20", SECONDS])
                # Now it is the outside that speaks, and the machine that only acknowledges.
                await outside.start(f"{kind} tcp sent {family}", ["send", host, str(ports["sink"]), SECONDS, RATE])
        for family, address in (await balanced(world, "blue-cluster")).items():
            await outside.start(f"balanced tcp {family}", ["receive", address, "7009", SECONDS])
            await outside.start(f"balanced tcp sent {family}", ["send", address, "7008", SECONDS, RATE])
            await outside.start(f"balanced udp {family}", ["udp", address, "7007", "20", SECONDS])
        async with world.streams(guest, asked) as own, world.streams(red, answered) as others:
            # From here on another choice would be another backend, in two of three cases.
            for name in services:
                body = json.dumps({"spec": {"selector": {"app": "backend", "on": None}}})
                await world.lab.kubectl("patch", "service", "-n", BLUE[0], name, "--type=merge", "-p", body)
            for name in services:
                await endpoints(world, name, len(NODES))
            records = []
            first = NODES.index(start)
            for step in (1, 2, 3):
                node = NODES[(first + step) % len(NODES)]
                records.append(await go_to(world, node))
                own.guest = await world.scenario.guest(*BLUE)
                await asyncio.gather(*(all_go_on(world, traffic) for traffic in (own, others, outside)))
            # What is new begins where the machine is.
            fresh = await own.guest.run(["probe", "send", services["tcp-n1"][4], "7008", "1"])
            assert json.loads(fresh.stdout)["bytes"] > 0
        results = {**own.results, **others.results, **await outside.finish()}
    await world.lab.kill("witness")
    for name, result in results.items():
        assert not result["errors"], (name, result)
        assert not result.get("resets"), (name, result)
        assert result["longest_gap_ms"] <= STALL_MS, (name, result)
    told = [line for line in witness.read_text().splitlines() if line.startswith("from")]
    assert len(told) == len(OUTSIDE), f"datagrams came from other ports after a migration: {told}"
    for record in records:
        # Which of the two, a busy machine decides: the last word of the source's agent may take more than two seconds.
        assert record["connections"]["way"] in ("streamed", "late"), record
        assert record["connections"]["carried"] >= len(asked) // 2, record


async def all_go_on(world: Any, traffic: Any) -> None:
    """Wait until each has got more across than now, twice; name those that have not."""
    for _ in range(2):
        before = await counts(traffic)
        stuck: list[str] = []

        async def more(before: dict[str, int] = before, stuck: list[str] = stuck) -> bool:
            now = await counts(traffic)
            stuck[:] = [name for name in now if now[name] <= before[name]]
            return not stuck

        try:
            await world.until("all streams get on", more, 60)
        except Exception as error:
            raise AssertionError(f"these do not get on: {stuck}") from error


async def counts(traffic: Any) -> dict[str, int]:
    """Of streams in a guest, or on the outside host."""
    found = traffic.counts()
    return dict(found if isinstance(found, dict) else await found)
