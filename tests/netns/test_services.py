"""Services on the real kernel: three nodes with agents, pods on two networks with one subnet, and a host outside."""

import asyncio
import json
import os
import re
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from vmnet.lab.init import COMPONENTS
from vmnet.lab.lab import Lab
from vmnet.model import addresses, names
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),  # many short programs one after another, on a machine that others use too
]

DRIVER = Path(__file__).with_name("services_node.py")
NODES = ("n1", "n2", "n3")
OUTSIDE = {4: "172.30.0.100", 6: "fd00:30::100"}
SUBNETS = (addresses.network("192.168.0.0/16"), addresses.network("fd20::/64"))
NETWORKS = {
    "blue": Network("blue_tenant", NetworkId(7), role=Role.PRIMARY, subnets=SUBNETS),
    "twin": Network("twin_tenant", NetworkId(8), role=Role.PRIMARY, subnets=SUBNETS),
}
PODS = {
    "near": ("blue", "n1", 11),
    "web-0": ("blue", "n1", 12),
    "web-1": ("blue", "n2", 13),
    "twin-0": ("twin", "n1", 12),
    "twin-1": ("twin", "n2", 11),
}
"""Name: namespace, node, number. No pod runs on n3."""
PORTS = (8080, 9090)
SECONDS = 30.0

SERVE = """
import socket, sys, threading
name, ports = sys.argv[1], map(int, sys.argv[2:])
def text(peer):
    return (name + " " + peer[0].removeprefix("::ffff:") + "\\n").encode()
def datagrams(found):
    while True:
        _, peer = found.recvfrom(2048)
        found.sendto(text(peer), peer)
def stream(found):
    while True:
        connection, peer = found.accept()
        threading.Thread(target=one, args=(connection, peer), daemon=True).start()
def one(connection, peer):
    with connection:
        while connection.recv(2048):
            connection.sendall(text(peer))
for port in ports:
    tcp = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=200)
    threading.Thread(target=stream, args=(tcp,)).start()
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    # Answers come from the address that was asked.
    udp.bind(("::", port))
    threading.Thread(target=datagrams, args=(udp,)).start()
print("ready", flush=True)
"""

ASK = """
import json, socket, sys, threading, time
wait, asked = float(sys.argv[1]), json.loads(sys.argv[2])
answers = [""] * len(asked)
def ask(index, kind, address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    until = time.monotonic() + wait
    with socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as found:
        try:
            found.settimeout(wait)
            found.connect((address, port))
            while not answers[index]:
                found.settimeout(max(0.01, until - time.monotonic() if kind == "tcp" else 0.5))
                found.send(b"who\\n")
                try:
                    answers[index] = found.recv(200).decode().strip()
                except TimeoutError:
                    if time.monotonic() >= until: raise
        except TimeoutError:
            answers[index] = "silence"
        except ConnectionRefusedError:
            answers[index] = "refused"
        except OSError as error:
            answers[index] = "refused" if error.errno in (111, 113, 101) else str(error)
threads = [threading.Thread(target=ask, args=(index, *item)) for index, item in enumerate(asked)]
for item in threads: item.start()
for item in threads: item.join()
print(json.dumps(answers))
"""

HOLD = """
import socket, sys, time
kind, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
found = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
found.settimeout(20 if kind == "tcp" else 0.2)
found.connect((address, port))
while True:
    try:
        found.send(b"who\\n")
        print(found.recv(200).decode().strip(), flush=True)
    except (TimeoutError, ConnectionRefusedError):
        if kind == "tcp": raise
    time.sleep(0.02)
"""

Object = dict[str, Any]
Question = tuple[str, str, int]


def pod(name: str) -> Object:
    namespace, node, host = PODS[name]
    address = addresses.address(f"192.168.0.{host}")
    entry = {"ip_addresses": [f"{address}/16", f"fd20::{host}/64"], "mac_address": addresses.mac_for(address)}
    return {
        "metadata": {
            "namespace": namespace,
            "name": name,
            "uid": f"uid-{name}",
            "annotations": {names.POD_NETWORKS_ANNOTATION: json.dumps({f"{namespace}/tenant": entry})},
        },
        "spec": {"nodeName": node, "containers": [{"name": "c"}]},
        "status": {"phase": "Running"},
    }


def nad(namespace: str) -> Object:
    annotations = {names.NETWORK_ID_ANNOTATION: str(NETWORKS[namespace].id)}
    metadata = {"namespace": namespace, "name": "tenant", "annotations": annotations}
    return {"metadata": metadata, "spec": {"config": NETWORKS[namespace].to_nad_config(f"{namespace}/tenant")}}


def node(name: str) -> Object:
    found = [{"type": "InternalIP", "address": address(name, 4)}]
    annotations = {names.NODE_NUMBER_ANNOTATION: name[1:]}
    return {"metadata": {"name": name, "annotations": annotations}, "status": {"addresses": found}}


def address(of: str, version: int) -> str:
    """Of a node, the outside host or a pod."""
    if of == "outside":
        return OUTSIDE[version]
    if of in NODES:
        return f"172.30.0.1{of[1:]}" if version == 4 else f"fd00:30::1{of[1:]}"
    host = PODS[of][2]
    return f"192.168.0.{host}" if version == 4 else f"fd20::{host}"


def service(name: str, number: int, namespace: str = "blue", *, ports: Any = None, **spec: Any) -> Object:
    """Of both families: 10.96.0.<number> and fd00:10:96::<number>."""
    status = {"loadBalancer": {"ingress": [{"ip": text} for text in spec.pop("balancer", ())]}}
    found = {"clusterIPs": [f"10.96.0.{number}", f"fd00:10:96::{number}"], **spec}
    ports = ports or [{"name": "http", "port": 80}, {"name": "datagram", "port": 80, "protocol": "UDP"}]
    return {"metadata": {"namespace": namespace, "name": name}, "spec": {**found, "ports": ports}, "status": status}


def slices(of: str, *pods: str, namespace: str = "blue", ports: Any = None, **conditions: dict[str, bool]) -> list[Any]:
    """The mirrors of a Service's EndpointSlices. ``conditions``: by pod, with _ for -; ready where nothing is said."""
    ports = ports or [{"name": "http", "port": 8080}, {"name": "datagram", "port": 8080, "protocol": "UDP"}]
    labels = {
        "endpointslice.kubernetes.io/managed-by": names.MIRROR_CONTROLLER,
        names.MIRRORED_SERVICE_LABEL: of,
    }
    return [
        [
            "endpoint_slices",
            {
                "metadata": {"namespace": namespace, "name": f"{of}-{version}", "labels": labels},
                "addressType": f"IPv{version}",
                "ports": ports,
                "endpoints": [
                    {
                        "addresses": [address(name, version)],
                        "nodeName": PODS[name][1],
                        "conditions": conditions.get(name.replace("-", "_"), {"ready": True}),
                    }
                    for name in pods
                ],
            },
        ]
        for version in (4, 6)
    ]


ENDING = {"ready": False, "serving": True, "terminating": True}


class Agent:
    """One node's agent, as a process that is told what the API says."""

    def __init__(self, lab: Lab, on: str) -> None:
        self.lab, self.on, self.count = lab, on, 0
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def start(self, world: dict[str, list[Object]]) -> None:
        self.count += 1
        name = f"services-{self.on}-{self.count}"
        path = self.lab.directory.path / f"{name}.sock"
        log = await self.lab.spawn(name, self.on, [sys.executable, str(DRIVER), self.on, str(path)])
        end = socket.socket(socket.AF_UNIX)  # its file is there before it listens
        await until(lambda: end.connect_ex(str(path)) == 0, lambda: f"{name} begins: {log.read_text()}")
        end.setblocking(False)
        self._streams = await asyncio.open_unix_connection(sock=end, limit=1 << 24)
        await self.do("start", world=world)

    async def stop(self) -> None:
        assert self._streams is not None
        self._streams[1].close()
        self._streams = None
        await self.lab.kill(f"services-{self.on}-{self.count}")

    async def do(self, what: str, **arguments: Any) -> Any:
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(json.dumps({"do": what, "with": arguments}).encode() + b"\n")
        await writer.drain()
        async with asyncio.timeout(120):
            reply = json.loads(await reader.readline())
        assert "error" not in reply, reply["error"]
        return reply["result"]


class Fabric:
    """The nodes, the world that their agents read, and who asks whom."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.agents = {name: Agent(lab, name) for name in NODES}
        self.world: dict[str, dict[str, Object]] = {}

    def remember(self, kind: str, item: Object) -> None:
        self.world.setdefault(kind, {})[_key(item)] = item

    async def put(self, *items: Any) -> None:
        """Services, and slices as ``slices`` returns them."""
        found = [item if isinstance(item, list) else ["services", item] for item in items]
        for kind, item in found:
            self.remember(kind, item)
        await asyncio.gather(*(agent.do("put", items=found) for agent in self.agents.values()))

    async def clean(self) -> None:
        """No Service, no slice."""
        for kind in ("endpoint_slices", "services"):
            keys = list(self.world.pop(kind, {}))
            await asyncio.gather(*(agent.do("drop", kind=kind, keys=keys) for agent in self.agents.values()))

    def listed(self) -> dict[str, list[Object]]:
        return {kind: list(items.values()) for kind, items in self.world.items()}

    def where(self, name: str) -> tuple[str, list[str]]:
        """The host that somebody is on, and what leads into its namespace."""
        return (PODS[name][1], ["ip", "netns", "exec", name]) if name in PODS else (name, [])

    async def ask(self, who: str, *asked: Question, wait: float = SECONDS) -> list[str]:
        """The answers: ``<pod> <client's address>``, ``refused`` or ``silence``."""
        on, enter = self.where(who)
        argv = [*enter, sys.executable, "-c", ASK, str(wait), json.dumps(asked)]
        done = await self.lab.exec(on, argv, timeout=wait + 60)
        assert done.exit == 0, done.stderr
        return list(json.loads(done.stdout))

    async def hold(self, who: str, kind: str, to: str, port: int) -> "Held":
        """A conversation that goes on and on."""
        name = f"hold-{secrets.token_hex(4)}"
        on, enter = self.where(who)
        log = await self.lab.spawn(name, on, [*enter, sys.executable, "-c", HOLD, kind, to, str(port)])
        held = Held(self.lab, name, log)
        await held.goes_on()
        return held

    async def run(self, on: str, *argv: str) -> str:
        done = await self.lab.exec(on, list(argv))
        assert done.exit == 0, done.stderr
        return done.stdout


class Held:
    def __init__(self, lab: Lab, name: str, log: Path) -> None:
        self.lab, self.name, self.log = lab, name, log

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    async def goes_on(self, answers: Callable[[str], bool] = lambda line: True) -> str:
        """Wait for a further answer that is as described."""
        before = len(self.lines())
        await until(lambda: any(map(answers, self.lines()[before:])), lambda: f"{self.name}: {self.lines()[-3:]}")
        return next(filter(answers, self.lines()[before:]))

    async def end(self) -> None:
        await self.lab.kill(self.name)


async def until(look: Callable[[], bool], what: Callable[[], str]) -> None:
    try:
        async with asyncio.timeout(90):
            while not look():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(what()) from None


def _key(item: Object) -> str:
    metadata = item["metadata"]
    return f"{metadata['namespace']}/{metadata['name']}" if "namespace" in metadata else str(metadata["name"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Fabric]:
    async with Lab(name=f"services-{os.getpid()}", nodes=len(NODES), without=COMPONENTS) as lab:
        fabric = Fabric(lab)
        for name in NODES:
            fabric.remember("nodes", node(name))
        for name in NETWORKS:
            fabric.remember("namespaces", {"metadata": {"name": name}})
            fabric.remember("nads", nad(name))
        for name in PODS:
            fabric.remember("pods", pod(name))
        fabric.remember(
            "service_cidrs",
            {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16", "fd00:10:96::/112"]}},
        )
        await asyncio.gather(*(agent.start(fabric.listed()) for agent in fabric.agents.values()))
        logs = []
        for name, (namespace, on, _) in PODS.items():
            await fabric.agents[on].do("attach", pod=f"{namespace}/{name}")
            argv = ["ip", "netns", "exec", name, sys.executable, "-c", SERVE, name, *map(str, PORTS)]
            logs.append(await lab.spawn(f"serve-{name}", on, argv))
        for log in logs:
            await until(lambda log=log: "ready" in log.read_text(), log.read_text)
        yield fabric


@pytest_asyncio.fixture(loop_scope="module")
async def fabric(running: Fabric) -> AsyncIterator[Fabric]:
    yield running
    await running.clean()


def both(kind: str, host: int, port: int = 80) -> list[Question]:
    """A cluster address of both families."""
    return [(kind, f"10.96.0.{host}", port), (kind, f"fd00:10:96::{host}", port)]


def everything(host: int) -> list[Question]:
    return [*both("tcp", host), *both("udp", host)]


def clients(who: str) -> list[str]:
    return [address(who, 4), address(who, 6)] * 2


async def test_a_cluster_address_leads_to_pods_of_this_node_and_of_others_and_keeps_the_client(fabric: Fabric) -> None:
    await fabric.put(
        service("here", 21),
        *slices("here", "web-0"),
        service("there", 22),
        *slices("there", "web-1"),
    )
    for number, backend in ((21, "web-0"), (22, "web-1")):
        expected = [f"{backend} {client}" for client in clients("near")]
        assert await fabric.ask("near", *everything(number)) == expected
    # From the other network, with the same addresses, neither is served.
    assert await fabric.ask("twin-0", *everything(21), *everything(22)) == ["refused"] * 8


async def test_a_pod_reaches_itself_by_its_own_service(fabric: Fabric) -> None:
    await fabric.put(service("own", 21), *slices("own", "web-0"))
    gateway = ["192.168.0.1", "fd20::1"]
    assert await fabric.ask("web-0", *everything(21)) == [f"web-0 {seen}" for seen in gateway * 2]


async def test_a_client_goes_where_it_went_before_until_it_has_been_away_for_too_long(fabric: Fabric) -> None:
    def sticky(name: str, number: int, seconds: int) -> Object:
        affinity = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}
        ports = [{"name": "http", "port": 80, "nodePort": 30000 + number}]
        return service(name, number, type="NodePort", ports=ports, **affinity)

    await fabric.put(sticky("long", 21, 3600), *slices("long", "web-0", "web-1"))
    for who, asked in (
        ("near", both("tcp", 21)),
        ("outside", [("tcp", address("n3", 4), 30021), ("tcp", address("n3", 6), 30021)]),
    ):
        for question in asked:
            # Not at once with the others: nobody knows yet where it goes.
            (first,) = await fabric.ask(who, question)
            assert who_answered(await fabric.ask(who, *[question] * 12)) == {first.split()[0]}, question
    # It stays so when a third comes, and nobody is sent to one that has gone.
    (first,) = who_answered(await fabric.ask("near", both("tcp", 21)[0]))
    await fabric.put(*slices("long", "web-0", "web-1", "near"))
    assert who_answered(await fabric.ask("near", *both("tcp", 21)[:1] * 12)) == {first}
    other = "web-1" if first == "web-0" else "web-0"
    await fabric.put(*slices("long", other))
    assert who_answered(await fabric.ask("near", *both("tcp", 21)[:1] * 12)) == {other}
    # A second of absence is too long: both serve, in time.
    await fabric.put(sticky("short", 22, 1), *slices("short", "web-0", "web-1"))
    seen: set[str] = set()
    async with asyncio.timeout(90):
        while len(seen) < 2:
            seen |= who_answered(await fabric.ask("near", both("tcp", 22)[0]))
            # Asking again would keep it there: only when the kernel has forgotten the client.
            while re.search(
                r"192\.168\.0\.11 expires \d+ms",
                await fabric.run(
                    "n1", "ip", "netns", "exec", "vmnet-7", "nft", "list", "table", "inet", "vmnet-services"
                ),
            ):
                await asyncio.sleep(0.1)
    assert seen == {"web-0", "web-1"}


NODE_PORTS = [
    {"name": "http", "port": 80, "nodePort": 30080},
    {"name": "datagram", "port": 80, "protocol": "UDP", "nodePort": 30080},
]


def node_ports(*nodes: str, port: int = 30080, kinds: tuple[str, ...] = ("tcp", "udp")) -> list[Question]:
    return [(kind, address(name, version), port) for name in nodes for kind in kinds for version in (4, 6)]


def who_answered(answers: list[str]) -> set[str]:
    return {answer.split()[0] for answer in answers}


async def test_who_nobody_serves_is_refused_wherever_it_asks(fabric: Fabric) -> None:
    external = ["172.30.0.200", "fd00:30::200"]
    await fabric.put(service("empty", 21, type="LoadBalancer", ports=NODE_PORTS, balancer=external))
    await led_by(fabric, "n2", *external)
    assert await fabric.ask("near", *everything(21)) == ["refused"] * 4
    assert (
        await fabric.ask("near", *[(kind, text, 80) for kind in ("tcp", "udp") for text in external]) == ["refused"] * 4
    )
    assert await fabric.ask("outside", *node_ports(*NODES)) == ["refused"] * 12
    assert (
        await fabric.ask("outside", *[(kind, text, 80) for kind in ("tcp", "udp") for text in external])
        == ["refused"] * 4
    )
    # Once somebody serves it, it is served; and one that does not get ready is not somebody.
    await fabric.put(*slices("empty", "web-0", "web-1", web_1={"ready": False}))
    assert who_answered(await fabric.ask("outside", *node_ports(*NODES))) == {"web-0"}
    assert who_answered(await fabric.ask("near", *everything(21))) == {"web-0"}


async def test_node_ports_on_every_node(fabric: Fabric) -> None:
    await fabric.put(service("web", 21, type="NodePort", ports=NODE_PORTS), *slices("web", "web-0", "web-1"))
    answers = await fabric.ask("outside", *node_ports(*NODES) * 3)
    assert who_answered(answers) == {"web-0", "web-1"}
    # Nobody but the network's router speaks to them: answers come back by the node that was asked.
    assert {answer.split()[1] for answer in answers} <= {
        text for number in (1, 2, 3) for text in (f"100.88.0.{number}", f"fd97::{number}")
    }
    # Processes of a node, and pods by the address of any node, their own one too.
    assert who_answered(await fabric.ask("n3", *node_ports(*NODES) * 4)) == {"web-0", "web-1"}
    for who in ("near", "web-0"):
        assert who_answered(await fabric.ask(who, *node_ports(*NODES) * 4)) == {"web-0", "web-1"}
    # The other network is outside.
    assert who_answered(await fabric.ask("twin-0", *node_ports(*NODES) * 4)) == {"web-0", "web-1"}
    assert await fabric.ask("outside", *node_ports("n1", port=30081), wait=5) == ["refused"] * 4


async def led_by(fabric: Fabric, to: str, *found: str) -> None:
    """The outside host finds these addresses behind a node, as a load balancer's speaker would have it."""
    for text in found:
        version = 6 if ":" in text else 4
        await fabric.run("outside", "ip", f"-{version}", "route", "replace", text, "via", address(to, version))


BALANCER = ["172.30.0.200", "fd00:30::200"]


def balanced(port: int = 80, found: list[str] = BALANCER) -> list[Question]:
    return [(kind, text, port) for kind in ("tcp", "udp") for text in found]


@pytest.mark.parametrize("allocated", [True, False])
async def test_load_balancer_and_external_addresses_with_and_without_a_node_port(
    fabric: Fabric, allocated: bool
) -> None:
    plain = [{key: value for key, value in port.items() if key != "nodePort"} for port in NODE_PORTS]
    external = ["172.30.0.250", "fd00:30::250"]
    await fabric.put(
        service(
            "web",
            21,
            type="LoadBalancer",
            allocateLoadBalancerNodePorts=allocated,
            ports=NODE_PORTS if allocated else plain,
            balancer=BALANCER,
            externalIPs=external,
        ),
        # Another one at the same address, with another port.
        service("more", 22, ports=[{"name": "http", "port": 81}], externalIPs=external),
        *slices("web", "web-0", "web-1"),
        *slices("more", "near"),
    )
    for name in NODES:
        await led_by(fabric, name, *BALANCER, *external)
        answers = await fabric.ask("outside", *[*balanced(), *balanced(80, external)] * 3)
        assert who_answered(answers) == {"web-0", "web-1"}, name
        more = await fabric.ask("outside", *[("tcp", text, 81) for text in external])
        assert who_answered(more) == {"near"}, name
    for who in ("near", "twin-0", "n3"):
        answers = await fabric.ask(who, *[*balanced(), *balanced(80, external)] * 3)
        assert who_answered(answers) == {"web-0", "web-1"}, who


async def test_who_may_use_a_load_balancer_s_address(fabric: Fabric) -> None:
    await led_by(fabric, "n3", *BALANCER, "172.30.0.250", "fd00:30::250")

    async def admit(*sources: str) -> None:
        await fabric.put(
            service(
                "web",
                21,
                type="LoadBalancer",
                ports=NODE_PORTS,
                balancer=BALANCER,
                externalIPs=["172.30.0.250", "fd00:30::250"],
                loadBalancerSourceRanges=list(sources),
                # Does not concern them: a load balancer's address means the Service as a whole.
                internalTrafficPolicy="Local",
            ),
            *slices("web", "web-1"),
        )

    await admit("172.30.0.96/28", "fd00:30::100/128")
    assert who_answered(await fabric.ask("outside", *balanced())) == {"web-1"}
    assert await fabric.ask("near", *balanced(), wait=2) == ["silence"] * 4
    # They are for the load balancer's addresses alone.
    external = balanced(80, ["172.30.0.250", "fd00:30::250"])
    for who in ("near", "outside"):
        assert who_answered(await fabric.ask(who, *external)) == {"web-1"}
    assert who_answered(await fabric.ask("outside", *node_ports("n3"))) == {"web-1"}
    await admit("192.168.0.8/29", "fd20::11/128")
    assert await fabric.ask("near", *balanced()) == [f"web-1 {client}" for client in clients("near")]
    assert await fabric.ask("web-0", *[("tcp", BALANCER[1], 80)], wait=2) == ["silence"]
    assert await fabric.ask("outside", *balanced(), wait=2) == ["silence"] * 4


async def test_external_traffic_policy_local(fabric: Fabric) -> None:
    def web(*pods: str, **conditions: Any) -> list[Any]:
        return [
            service("web", 21, type="LoadBalancer", ports=NODE_PORTS, balancer=BALANCER, externalTrafficPolicy="Local"),
            *slices("web", *pods, **conditions),
        ]

    # It makes n3 know the network.
    await fabric.put(service("else", 22, type="NodePort", ports=[{"port": 80, "nodePort": 30099}]))
    await fabric.put(*web("web-0", "web-1"))
    for on, backend in (("n1", "web-0"), ("n2", "web-1")):
        await led_by(fabric, on, *BALANCER)
        expected = [f"{backend} {client}" for client in clients("outside")]
        assert await fabric.ask("outside", *node_ports(on)) == expected
        assert await fabric.ask("outside", *balanced()) == expected
    await led_by(fabric, "n3", *BALANCER)
    assert await fabric.ask("outside", *node_ports("n3"), *balanced(), wait=2) == ["silence"] * 8
    # Pods and the nodes themselves could as well use the cluster address: they get every endpoint, from everywhere.
    assert who_answered(await fabric.ask("near", *[*balanced(), *node_ports("n1")] * 6)) == {"web-0", "web-1"}
    assert who_answered(await fabric.ask("twin-0", *balanced() * 6)) == {"web-0", "web-1"}
    assert who_answered(await fabric.ask("n3", *[*balanced(), *node_ports("n3")] * 6)) == {"web-0", "web-1"}
    # One that ends but serves is better than none on its node, whoever is ready on another one.
    await fabric.put(*web("web-0", "web-1", web_0=ENDING))
    assert who_answered(await fabric.ask("outside", *node_ports("n1") * 3)) == {"web-0"}
    assert who_answered(await fabric.ask("outside", *node_ports("n2") * 3)) == {"web-1"}
    assert who_answered(await fabric.ask("near", *everything(21) * 3)) == {"web-1"}
    await fabric.put(*web("web-1"))
    assert await fabric.ask("outside", *node_ports("n1"), wait=2) == ["silence"] * 4
    await fabric.put(*web())
    assert await fabric.ask("outside", *node_ports(*NODES)) == ["refused"] * 12


async def test_internal_traffic_policy_local(fabric: Fabric) -> None:
    web = service("web", 21, type="NodePort", ports=NODE_PORTS, internalTrafficPolicy="Local")
    await fabric.put(web, *slices("web", "web-0", "web-1"))
    assert await fabric.ask("near", *everything(21) * 3) == [f"web-0 {client}" for client in clients("near") * 3]
    assert who_answered(await fabric.ask("outside", *node_ports("n1") * 6)) == {"web-0", "web-1"}
    await fabric.put(*slices("web", "web-0", "web-1", web_0=ENDING))
    assert who_answered(await fabric.ask("near", *everything(21) * 2)) == {"web-0"}
    await fabric.put(*slices("web", "web-1"))
    # There is somebody, but not here: to be tried again, not to be given up.
    assert await fabric.ask("near", *everything(21), wait=2) == ["silence"] * 4
    assert who_answered(await fabric.ask("web-1", *everything(21))) == {"web-1"}
    await fabric.put(*slices("web"))
    assert await fabric.ask("near", *everything(21)) == ["refused"] * 4


async def test_cluster_addresses_that_nobody_has_are_refused(fabric: Fabric) -> None:
    await fabric.put(service("web", 21), *slices("web", "web-0"))
    assert await fabric.ask("near", *everything(99), *both("tcp", 21, 81)) == ["refused"] * 6


async def test_a_target_port_s_name_may_mean_another_number_in_each_pod(fabric: Fabric) -> None:
    old, new = slices("web", "web-0"), slices("web", "web-1", ports=[{"name": "http", "port": 9090}])
    for _, item in new:
        item["metadata"]["name"] += "-new"
    await fabric.put(service("web", 21, ports=[{"name": "http", "port": 80, "targetPort": "www"}]), *old, *new)
    assert who_answered(await fabric.ask("near", *both("tcp", 21) * 16)) == {"web-0", "web-1"}


async def test_a_headless_service_and_one_of_a_single_family(fabric: Fabric) -> None:
    headless = service("direct", 21, clusterIPs=["None"])
    await fabric.put(
        headless, *slices("direct", "web-0"), service("six", 22, clusterIPs=["fd00:10:96::22"]), *slices("six", "web-1")
    )
    assert await fabric.ask("near", *both("tcp", 21), *both("tcp", 22)) == [
        "refused",
        "refused",
        "refused",
        f"web-1 {address('near', 6)}",
    ]
    assert await fabric.agents["n1"].do("names", network="blue_tenant") == {
        "direct.blue.svc.cluster.local": ["192.168.0.12", "fd20::12"],
        "six.blue.svc.cluster.local": ["fd00:10:96::22"],
        "192-168-0-12.direct.blue.svc.cluster.local": ["192.168.0.12"],
        "fd20--12.direct.blue.svc.cluster.local": ["fd20::12"],
    }


async def test_networks_with_one_subnet_each_have_their_own_services(fabric: Fabric) -> None:
    ports = [{**port, "nodePort": 30090} for port in NODE_PORTS]
    await fabric.put(
        service("web", 21, type="LoadBalancer", ports=NODE_PORTS, balancer=BALANCER[:1]),
        *slices("web", "web-0", "web-1"),
        service("web", 31, "twin", type="LoadBalancer", ports=ports, balancer=["172.30.0.201"]),
        *slices("web", "twin-0", "twin-1", namespace="twin"),
    )
    await led_by(fabric, "n3", BALANCER[0], "172.30.0.201")
    for on in NODES:
        assert who_answered(await fabric.ask("outside", *node_ports(on) * 6)) == {"web-0", "web-1"}
        assert who_answered(await fabric.ask("outside", *node_ports(on, port=30090) * 6)) == {"twin-0", "twin-1"}
    assert who_answered(await fabric.ask("outside", *balanced(80, ["172.30.0.201"]) * 16)) == {"twin-0", "twin-1"}
    # The same two addresses ask, at the same time, each in its network.
    blue, twin = await asyncio.gather(
        fabric.ask("near", *everything(21) * 3), fabric.ask("twin-1", *everything(31) * 3)
    )
    assert who_answered(blue) == {"web-0", "web-1"}
    assert who_answered(twin) == {"twin-0", "twin-1"}
    assert await fabric.ask("near", *everything(31)) == ["refused"] * 4
    assert await fabric.ask("twin-1", *everything(21)) == ["refused"] * 4


async def test_connections_live_on_while_services_and_agents_come_and_go(fabric: Fabric) -> None:
    web = service("web", 21, type="NodePort", ports=NODE_PORTS)
    await fabric.put(web, *slices("web", "web-0"))
    held = [
        await fabric.hold("near", "tcp", "10.96.0.21", 80),
        await fabric.hold("near", "tcp", "fd00:10:96::21", 80),
        await fabric.hold("outside", "tcp", address("n2", 4), 30080),
        await fabric.hold("outside", "tcp", address("n3", 6), 30080),
    ]
    # The endpoint stays alive, but is no longer one of the Service's; others come.
    await fabric.put(*slices("web", "web-1"))
    for number in range(40, 60):
        await fabric.put(service(f"more-{number}", number), *slices(f"more-{number}", "web-1"))
    await fabric.put({**web, "spec": {**web["spec"], "sessionAffinity": "ClientIP"}})
    for item in held:
        await item.goes_on(lambda line: line.startswith("web-0 "))
    assert who_answered(await fabric.ask("near", *everything(21) * 2)) == {"web-1"}
    # Another agent takes over what is there, and writes nothing of it again.
    before = [await handles(fabric, name) for name in NODES]
    for agent in fabric.agents.values():
        await agent.stop()
    assert who_answered(await fabric.ask("near", *everything(21))) == {"web-1"}
    await asyncio.gather(*(agent.start(fabric.listed()) for agent in fabric.agents.values()))
    assert [await handles(fabric, name) for name in NODES] == before
    for item in held:
        await item.goes_on(lambda line: line.startswith("web-0 "))
        await item.end()
    # And it knows what is there.
    await fabric.put(*slices("web", "web-0"))
    assert who_answered(await fabric.ask("near", *everything(21) * 2)) == {"web-0"}


async def handles(fabric: Fabric, on: str) -> str:
    """What nft numbers: a table that was made anew has others."""
    inside = await fabric.run(on, "ip", "netns", "exec", "vmnet-7", "nft", "-a", "list", "chains")
    return inside + await fabric.run(on, "nft", "-a", "list", "chains")


async def test_datagrams_do_not_follow_an_endpoint_that_has_gone(fabric: Fabric) -> None:
    """A client that goes on and on keeps its entry in conntrack alive; only its deletion leads it elsewhere."""
    web = service("web", 21, type="NodePort", ports=NODE_PORTS)
    await fabric.put(web, *slices("web", "web-0"))
    held = [
        await fabric.hold("near", "udp", "10.96.0.21", 80),
        await fabric.hold("near", "udp", "fd00:10:96::21", 80),
        await fabric.hold("outside", "udp", address("n2", 4), 30080),
        await fabric.hold("outside", "udp", address("n3", 6), 30080),
    ]
    for item in held:
        assert (await item.goes_on()).startswith("web-0 ")
    await fabric.put(*slices("web", "web-1"))
    for item in held:
        await item.goes_on(lambda line: line.startswith("web-1 "))
    # Another endpoint moves nobody.
    await fabric.put(*slices("web", "web-0", "web-1"))
    for item in held:
        assert (await item.goes_on()).startswith("web-1 ")
        assert not any(line.startswith("web-0 ") for line in item.lines()[-1:])
    # While there is nobody the client is refused, and goes on; then it is served again. An agent that was away sees it.
    await fabric.put(*slices("web"))
    for agent in fabric.agents.values():
        await agent.stop()
    for item in slices("web", "web-0"):
        fabric.remember(*item)
    await asyncio.gather(*(agent.start(fabric.listed()) for agent in fabric.agents.values()))
    for item in held:
        await item.goes_on(lambda line: line.startswith("web-0 "))
        await item.end()


async def test_datagrams_to_a_node_port_go_along_when_another_network_gets_it(fabric: Fabric) -> None:
    """The node's own conntrack remembers the way into the network that had it."""
    await fabric.put(service("web", 21, type="NodePort", ports=NODE_PORTS), *slices("web", "web-0"))
    held = [await fabric.hold("outside", "udp", address("n2", version), 30080) for version in (4, 6)]
    for item in held:
        assert (await item.goes_on()).startswith("web-0 ")
    await fabric.put(
        service("web", 21),
        *slices("web", "web-0"),
        service("web", 31, "twin", type="NodePort", ports=NODE_PORTS),
        *slices("web", "twin-0", namespace="twin"),
    )
    for item in held:
        await item.goes_on(lambda line: line.startswith("twin-0 "))
        await item.end()
