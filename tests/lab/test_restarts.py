"""Agent and controller are killed while machines run; what they made goes on, and their successors take it over."""

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from vmnet.lab.demo import BLUE, NETWORK
from vmnet.lab.errors import LabError
from vmnet.model import names
from vmnet.model.names import NetworkId

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

GREEN = (BLUE[0], "green")
STEADY = Path(__file__).with_name("steady.py").read_text()
RATE = 1000
PORTS = {"a": 7100, "b": 7200}
_ASK = (
    "import socket, sys; s = socket.socket(2, 2); s.settimeout(20);"
    "s.sendto(sys.argv[2].encode(), ('127.0.0.1', int(sys.argv[1]))); print(s.recv(64).decode())"
)
CONTROLLER_READY = "http://127.0.0.1:9411/readyz"


async def links(world: Any, node: str) -> dict[str, int]:
    """Interfaces of the network on a node, with their numbers: one that was made anew has another."""
    metadata = (await world.get("cudn", NETWORK))["metadata"]
    number = NetworkId(int(metadata["annotations"][names.NETWORK_ID_ANNOTATION]))
    result = await world.lab.exec(node, ["ip", "-j", "-n", names.network_namespace(number), "link", "show"])
    assert result.exit == 0, result.stderr
    return {item["ifname"]: item["ifindex"] for item in json.loads(result.stdout)}


async def test_connections_do_not_notice_that_the_agent_was_killed(healthy: Any) -> None:
    world = healthy
    node, before = await world.node_of(BLUE), await world.facts(BLUE)
    agent = f"agent-{node}"
    made = await links(world, node)
    said = len(world.log(agent))
    async with world.traffic() as traffic:
        await world.lab.kill(agent, signal.SIGKILL)
        await world.lab.wait(agent)
        await world.goes_on(traffic)
        await world.lab.restart(agent)
        url = await world.agent_url(node)
        await world.until("the next agent is ready", lambda: world.answers(f"{url}/readyz"))
        await world.goes_on(traffic)
    for name, result in traffic.results.items():
        assert not result["errors"], (name, result)
        assert not result.get("resets"), (name, result)
        assert result["longest_gap_ms"] < 1000, (name, result)
    (taken,) = re.findall(rf"node {node}: (\d+) networks taken over", world.log(agent)[said:])
    assert int(taken) >= 1
    assert await links(world, node) == made
    assert await world.facts(BLUE) == before

    # The successor serves a migration away from its node like its predecessor.
    async with world.traffic() as traffic:
        assert await world.migration_ends(await world.migrate()) == "Succeeded"
        await world.goes_on(traffic)
    assert not any(result.get("resets") or result["errors"] for result in traffic.results.values()), traffic.results
    assert await world.node_of(BLUE) != node
    assert await world.facts(BLUE) == before


async def test_a_machine_made_while_the_controller_is_away_gets_its_addresses_when_it_is_back(healthy: Any) -> None:
    world = healthy
    blue = await world.get("vm", "-n", *BLUE)
    await world.lab.kill("controller", signal.SIGKILL)
    await world.lab.wait("controller")
    try:
        await world.apply(
            {
                "apiVersion": "kubevirt.io/v1",
                "kind": "VirtualMachine",
                "metadata": {"namespace": GREEN[0], "name": GREEN[1]},
                "spec": {"runStrategy": "Always", "template": {"spec": blue["spec"]["template"]["spec"]}},
            }
        )

        async def instances() -> Any:
            found = (await world.get("vmi", "-n", GREEN[0]))["items"]
            return [item for item in found if item["metadata"]["name"] == GREEN[1]]

        await world.until("green has an instance", instances)
        # Nobody vouches for a machine's pod meanwhile; a pod that is no machine's is created as ever.
        assert not await world.launchers(GREEN)
        plain = {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": GREEN[0], "name": "plain"}}
        await world.apply({**plain, "spec": {"containers": [{"name": "main", "image": "agnhost"}]}})
        await world.lab.kubectl("delete", "pod", "-n", GREEN[0], "plain", "--wait=false")
        await world.lab.restart("controller")
        addresses = await world.until("green runs", lambda: _addresses(world), 150)
        (pod,) = await world.launchers(GREEN)
        assert pod["metadata"]["annotations"][names.PRIMARY_CLAIM_ANNOTATION] == f"{GREEN[1]}.happy"
        taken = await world.facts(BLUE)
        assert not set(addresses) & set(taken["addresses"])
        claim = await world.get("ipamclaim", "-n", GREEN[0], f"{GREEN[1]}.happy")
        assert sorted(text.split("/")[0] for text in claim["status"]["ips"]) == sorted(
            text.split("/")[0] for text in addresses
        )
        # Names are the agents' business: blue's, on whichever node, knows the newcomer.
        guest = await world.scenario.guest(*BLUE)
        assert (await guest.run(["probe", "resolve", "green", "A"])).stdout.split() == [addresses[0].split("/")[0]]
    finally:
        statuses = {item["name"]: item for item in (await world.lab.status())["processes"]}
        if statuses["controller"]["exit"] is not None:
            await world.lab.restart("controller")
        await world.lab.kubectl("delete", "vm", "-n", *GREEN, "--wait=true", "--timeout=90s")

    async def released() -> bool:
        claims = (await world.get("ipamclaims", "-n", GREEN[0]))["items"]
        return [item["metadata"]["name"] for item in claims] == ["blue.happy"]

    await world.until("green's claim goes with it", released)


async def _addresses(world: Any) -> list[str]:
    """Green's addresses once it runs."""
    if (await world.scenario.vmi(*GREEN, "{.status.phase}")) != "Running":
        return []
    return list(await world.scenario.addresses(await world.scenario.guest(*GREEN)))


class Steady:
    """Two pods on two nodes that send to each other, a thousand datagrams a second: a to b by IPv4, b to a by IPv6."""

    def __init__(self, world: Any, namespace: str) -> None:
        self.world = world
        self.namespace = namespace
        self.flows: dict[str, asyncio.Task[str]] = {}

    async def execute(self, pod: str, *words: str, timeout: float = 60) -> str:
        found: str = await self.world.lab.kubectl(
            "exec", "-n", self.namespace, pod, "--", "python3", "-c", *words, timeout=timeout
        )
        return found

    async def count(self, pod: str, word: str = "count") -> int:
        """How many datagrams have come to a pod."""
        return int(await self.execute(pod, _ASK, str(PORTS[pod] + 1), word))

    async def goes_on(self) -> None:
        """Wait until a second's datagrams more have come to both."""
        before = await self._counts()

        async def more() -> bool:
            return all(now >= then + RATE for now, then in zip(await self._counts(), before, strict=True))

        await self.world.until("datagrams come to both", more)

    async def _counts(self) -> list[int]:
        return await asyncio.gather(*(self.count(pod) for pod in PORTS))

    async def start(self) -> None:
        items = (await self.world.get("pods", "-n", self.namespace))["items"]
        addresses = {}
        for item in items:
            allocated = json.loads(item["metadata"]["annotations"][names.POD_NETWORKS_ANNOTATION])
            (entry,) = (found for nad, found in allocated.items() if nad.startswith(f"{self.namespace}/"))
            addresses[item["metadata"]["name"]] = [text.split("/")[0] for text in entry["ip_addresses"]]
        peers = {"a": ("b", addresses["b"][0]), "b": ("a", addresses["a"][1])}
        for pod, (peer, address) in peers.items():
            words = (STEADY, str(PORTS[pod]), address, str(PORTS[peer]), str(RATE))
            self.flows[pod] = asyncio.create_task(self.execute(pod, *words, timeout=280))
        await self.world.until("both have begun", self._begun)

    async def _begun(self) -> bool:
        for flow in self.flows.values():
            assert not flow.done(), flow.result()
        try:
            return all(count > 0 for count in await self._counts())
        except LabError:
            return False  # it is about to listen

    async def stop(self) -> dict[str, dict[str, Any]]:
        """End both; what each has seen."""
        await asyncio.gather(*(self.count(pod, "stop") for pod in PORTS))
        return {pod: json.loads(await flow) for pod, flow in self.flows.items()}


@asynccontextmanager
async def steady(world: Any) -> AsyncIterator[Steady]:
    async with world.namespace("steady") as namespace:
        layer2 = {"role": "Primary", "subnets": ["10.77.0.0/16", "fd77::/64"]}
        network = {
            "apiVersion": "k8s.ovn.org/v1",
            "kind": "UserDefinedNetwork",
            "metadata": {"namespace": namespace, "name": "net"},
            "spec": {"topology": "Layer2", "layer2": layer2},
        }
        await world.apply(network)
        await world.lab.kubectl("wait", "-n", namespace, "udn/net", "--for=condition=NetworkCreated", "--timeout=90s")
        await world.apply(*(plain(namespace, pod, node) for pod, node in (("a", "n1"), ("b", "n2"))))
        await world.lab.kubectl("wait", "-n", namespace, "pod/a", "pod/b", "--for=condition=Ready", "--timeout=120s")
        found = Steady(world, namespace)
        await found.start()
        try:
            yield found
        finally:
            for flow in found.flows.values():
                flow.cancel()
            await asyncio.gather(*found.flows.values(), return_exceptions=True)


def plain(namespace: str, name: str, node: str) -> dict[str, Any]:
    """A pod that waits."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "containers": [{"name": "main", "image": "agnhost"}],
            "nodeSelector": {"kubernetes.io/hostname": node},
            "terminationGracePeriodSeconds": 1,
        },
    }


async def test_not_one_datagram_of_a_thousand_a_second_is_lost_while_agents_and_controller_start_anew(
    world: Any,
) -> None:
    """What an upgrade does: every process ends and starts again, one after the other, politely or not."""
    async with steady(world) as flows:
        for process, number in (
            ("agent-n1", signal.SIGTERM),
            ("controller", signal.SIGTERM),
            ("agent-n2", signal.SIGKILL),
        ):
            await world.lab.kill(process, number)
            await world.lab.wait(process)
            if number == signal.SIGKILL:
                await flows.goes_on()  # with nobody there
            await world.lab.restart(process)
            node = process.removeprefix("agent-")
            url = CONTROLLER_READY if process == "controller" else f"{await world.agent_url(node)}/readyz"
            await world.until(f"the next {process} is ready", lambda url=url: world.answers(url))
        # The successors do not only leave alone what is there: a pod joins.
        await world.apply(plain(flows.namespace, "c", "n2"))
        await world.lab.kubectl("wait", "-n", flows.namespace, "pod/c", "--for=condition=Ready", "--timeout=120s")
        await flows.goes_on()
        seen = await flows.stop()
    for pod, result in seen.items():
        assert result["lost"] == 0, (pod, result)
        assert result["came"] > 5 * RATE, (pod, result)
