"""A real Prometheus, with the rules that are shipped, watches the lab.

Of ``for:`` nothing is left, so that an alert fires as soon as what it tells of is seen. ``make alerts`` breaks for real
what can be broken in minutes; the other alerts are fired by promtool alone (tests/contract/test_alerts.py).
"""

import asyncio
import copy
import json
import os
import re
import shlex
import shutil
import signal
import sys
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from vmnet.lab import kubectl, references
from vmnet.lab.demo import BLUE, RED
from vmnet.lab.errors import LabError
from vmnet.lab.topology import METRICS_PORT
from vmnet.model import names
from vmnet.model.names import NetworkId

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

RULES = yaml.safe_load(references.RULES.read_text())
ALERTS = {rule["alert"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
PROCESS: Final = "prometheus"
ADDRESS: Final = "127.0.0.1:9090"
WINDOW: Final = "1m"
"""``$__rate_interval``."""
IMAGE: Final = "registry.k8s.io/e2e-test-images/agnhost:2.53"
FULL: Final = "alerts-full"
GATEWAY: Final = "192.168.0.1"
CROWD: Final = 12
FIRED_FOR_REAL: Final = {
    "VmnetAgentDown",
    "VmnetAgentsMissing",
    "VmnetControllerDown",
    "VmnetControllerNotLeading",
    "VmnetControllerNotRedundant",
    "VmnetDnsFailing",
    "VmnetDnsLimited",
    "VmnetFileDescriptorsLow",
    "VmnetMalformedPackets",
    "VmnetMigrationFailed",
    "VmnetNetworkAddressesExhausted",
    "VmnetNetworkBroken",
    "VmnetNotReady",
    "VmnetPodAttachmentFailing",
    "VmnetPodAttachmentSlow",
    "VmnetRestarting",
}
_NAMES: Final = """
import os, socket, sys, time
asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for place in range(int(sys.argv[2])):
    parts = (b"n%d-%d" % (place, os.getpid()), b"example", b"org", b"")
    name = b"".join(bytes((len(part),)) + part for part in parts)
    head = place.to_bytes(2, "big") + bytes.fromhex("01000001000000000000")
    asker.sendto(head + name + bytes.fromhex("00010001"), (sys.argv[1], 53))
    time.sleep(0.0005)  # a socket's buffer has room for some hundred datagrams
"""
"""Asks for that many names of the world that nobody has asked for yet."""


_HOARD: Final = """
import signal, socket, sys
held = [socket.create_connection((sys.argv[1], int(sys.argv[2]))) for _ in range(int(sys.argv[3]))]
signal.pause()
"""


class Prometheus:
    """One that runs in the lab's fabric."""

    def __init__(self, world: Any, directory: Path) -> None:
        self._world = world
        self._directory = directory
        self.seen: set[str] = set()
        """Alerts that were waited for and fired."""

    def configure(self, targets: list[dict[str, Any]]) -> Path:
        """Write configuration and rules."""
        rules = copy.deepcopy(RULES)
        for group in rules["groups"]:
            for rule in group["rules"]:
                rule.pop("for", None)
        (self._directory / "rules.yaml").write_text(yaml.safe_dump(rules))
        jobs = [{"job_name": "vmnet-controller", "static_configs": [{"targets": ["127.0.0.1:9411"]}]}]
        # A job that is left out would be remembered for five minutes; one without targets is not.
        jobs.append({"job_name": "vmnet-agent", "static_configs": targets})
        path = self._directory / "prometheus.yaml"
        common = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        body = {
            "global": common,
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{**job, "honor_labels": True} for job in jobs],
        }
        path.write_text(yaml.safe_dump(body))
        return path

    async def get(self, path: str, **query: str) -> Any:
        """What the API answers, None while it does not."""
        url = f"http://{ADDRESS}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        result = await self._world.lab.exec("fabric", ["curl", "-sS", "--max-time", "20", url])
        if result.exit != 0 or not result.stdout.startswith("{"):
            return None  # it has not started yet
        body = json.loads(result.stdout)
        assert body["status"] == "success", (path, query, body)
        return body["data"]

    async def values(self, expression: str) -> list[float]:
        """The samples of an instant query that are numbers."""
        found = await self.get("query", query=expression)
        if found is None:
            return []
        values = [float(item["value"][1]) for item in found["result"]]
        return [value for value in values if value == value]

    async def firing(self) -> set[str]:
        """Alerts that fire now."""
        found = await self.get("query", query='count by (alertname) (ALERTS{alertstate="firing"})')
        return {item["metric"]["alertname"] for item in found["result"]} if found else set()

    async def fires(self, name: str, timeout: float = 60) -> None:
        """Wait for an alert."""

        async def seen() -> bool:
            return name in await self.firing()

        await self._world.until(f"{name} fires", seen, timeout)
        self.seen.add(name)


@asynccontextmanager
async def prometheus(world: Any) -> AsyncIterator[Prometheus]:
    """It scrapes all that there is; its targets have the labels that the monitors give them."""
    directory = world.lab.directory.path / PROCESS
    if directory.exists():
        shutil.rmtree(directory)  # what another one has seen is not for this one
    directory.mkdir()
    found = Prometheus(world, directory)
    hosts = [host for host in (await world.lab.status())["hosts"] if re.fullmatch(r"n\d+", host["name"])]
    targets = [
        {"targets": [f"{host['ipv4']}:{METRICS_PORT}"], "labels": {"node": host["name"]}}
        for host in sorted(hosts, key=lambda host: str(host["name"]))
    ]
    path = found.configure(targets)
    await world.lab.spawn(
        PROCESS,
        "fabric",
        [
            "prometheus",
            f"--config.file={path}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={ADDRESS}",
            "--log.level=warn",
        ],
    )
    try:

        async def all_up() -> bool:
            return await found.values("count(up == 1)") == [len(targets) + 1.0]

        await world.until("Prometheus has scraped all", all_up)
        yield found
    finally:
        await world.lab.kill(PROCESS)
        await world.lab.wait(PROCESS)


def queries() -> Iterator[tuple[str, str]]:
    """Each query of the dashboards, with the panel that shows it, as Grafana sends it with everything chosen."""
    for path in sorted((references.MONITORING / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                text = target["expr"].replace("$__rate_interval", WINDOW)
                yield f"{path.stem}: {panel['title']}", re.sub(r"\$(network|node)\b", ".*", text)


def blocks(language: str) -> Iterator[str]:
    """Lines of the runbooks' blocks in a language, each once."""
    texts = [path.read_text() for path in sorted((references.DOCUMENTS / "runbooks").glob("*.md"))]
    found = [
        block for text in texts for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]
    return iter(dict.fromkeys(line for block in found for line in block.splitlines()))


def pod(namespace: str, name: str, node: str) -> dict[str, Any]:
    """A pod on a node."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "pause", "image": IMAGE, "args": ["pause"]}],
        },
    }


async def test_every_query_of_the_dashboards_has_data_after_a_migration(healthy: Any) -> None:
    world = healthy
    if not await _migrated(world):
        # An idle machine's blackout is unknown: its port must carry something.
        async with world.traffic() as traffic:
            assert await world.migration_ends(await world.migrate()) == "Succeeded"
            await world.goes_on(traffic)
    async with prometheus(world) as watcher:
        # What is counted while Prometheus looks: a second ADD of a node, names of the network and of the world.
        node = await world.node_of(RED)
        try:
            for name in ("watched", "watched-too"):
                await world.apply(pod(RED[0], name, node))
                await world.lab.kubectl("wait", "-n", RED[0], f"pod/{name}", "--for=condition=Ready", "--timeout=90s")
            guest = await world.scenario.guest(*RED)
            for name in (f"{BLUE[1]}.{BLUE[0]}", "www.example.org"):
                await guest.run(["probe", "resolve", name, "A"])
            lacking = dict(queries())
            assert len(lacking) > 20

            async def all_have_data() -> bool:
                for title, expression in list(lacking.items()):
                    if await watcher.values(expression):
                        del lacking[title]
                return not lacking

            try:
                await world.until("all queries have data", all_have_data, 60)
            except LabError as error:
                raise AssertionError(f"without data: {lacking}") from error
            for expression in blocks("promql"):
                assert await watcher.get("query", query=expression) is not None
            # There is one controller in the lab, and nothing else is wrong with its processes.
            firing = await watcher.firing()
            assert "VmnetControllerNotRedundant" in firing
            assert not firing & {
                "VmnetAgentDown",
                "VmnetAgentsMissing",
                "VmnetControllerDown",
                "VmnetControllerNotLeading",
            }
        finally:
            await world.lab.kubectl(
                "delete", "pod", "-n", RED[0], "watched", "watched-too", "--ignore-not-found", "--wait=false"
            )


async def _migrated(world: Any) -> bool:
    """Whether the processes that run have counted a migration, and all of it."""
    agents: set[str] = set()
    for host in (await world.lab.status())["hosts"]:
        if re.fullmatch(r"n\d+", host["name"]):
            agents |= (await world.metrics(f"http://{host['ipv4']}:{METRICS_PORT}/metrics")).keys()
    controller = await world.metrics("http://127.0.0.1:9411/metrics")
    wanted = {f"vmnet_migration_{what}_seconds_count" for what in ("blackout", "delivery", "cut_over", "hand_over")}
    return "vmnet_migrations_total" in controller and wanted | {"vmnet_migration_connections_total"} <= agents


async def test_every_command_of_the_runbooks_runs(world: Any) -> None:
    environment = {**os.environ, "KUBECONFIG": str(world.lab.kubeconfig)}
    programs = {"kubectl": [str(kubectl.find())], "vmnet": [sys.executable, "-m", "vmnet.cmd"]}
    lines = list(blocks("console"))
    assert len(lines) > 10
    for line in lines:
        assert line.startswith("$ ")
        program, *words = shlex.split(line[2:].replace("NAMESPACE", BLUE[0]).replace("MACHINE", BLUE[1]))
        process = await asyncio.create_subprocess_exec(
            *programs[program],
            *words,
            env=environment,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, (line, errors)


@pytest.mark.skipif(not os.environ.get("VMNET_ALERTS"), reason="takes minutes: make alerts")
@pytest.mark.timeout(1800)
async def test_alerts_fire_for_real(healthy: Any, a_slow_link: dict[str, Any]) -> None:
    world = healthy
    assert FIRED_FOR_REAL <= ALERTS
    async with prometheus(world) as watcher, world.namespace(FULL):
        await watcher.fires("VmnetControllerNotRedundant")

        async def quiet() -> bool:
            return not await watcher.firing() & FIRED_FOR_REAL - watcher.seen

        # Before its first scrape Prometheus misses everything.
        await world.until("nothing else is wrong", quiet)
        node = await world.node_of(RED)
        await _exhaust(world, node)
        await watcher.fires("VmnetNetworkAddressesExhausted")
        await _ask_too_much(world)
        await watcher.fires("VmnetDnsLimited")
        await watcher.fires("VmnetMalformedPackets")
        await _stop_the_resolver(world, watcher)
        await _break_a_port(world, node)
        await watcher.fires("VmnetNetworkBroken", 120)
        await _fail_a_migration(world, a_slow_link)
        await watcher.fires("VmnetMigrationFailed")
        other = min({"n1", "n2", "n3"} - {node, await world.node_of(BLUE)})
        await _hoard_connections(world, watcher, other)
        # CNI ADD waits a minute for an address; the second round of failures is the first that a rate shows.
        await watcher.fires("VmnetPodAttachmentSlow", 240)
        await watcher.fires("VmnetPodAttachmentFailing", 240)
        await world.lab.kubectl("delete", "pods", "--all", "-n", FULL, "--wait=false")
        await _kill_the_controller(world, watcher)
        await _kill_an_agent_again_and_again(world, watcher)
        await _start_an_agent_without_an_api(world, watcher)
        watcher.configure([])
        await world.lab.kill(PROCESS, signal.SIGHUP)
        await watcher.fires("VmnetAgentsMissing")
        assert watcher.seen == FIRED_FOR_REAL


async def _exhaust(world: Any, node: str) -> None:
    """A network of eight addresses, and more pods than that."""
    spec = {"topology": "Layer2", "layer2": {"role": "Primary", "subnets": ["10.99.0.0/29"]}}
    await world.apply(
        {
            "apiVersion": "k8s.ovn.org/v1",
            "kind": "UserDefinedNetwork",
            "metadata": {"namespace": FULL, "name": "small"},
            "spec": spec,
        }
    )
    await world.lab.kubectl("wait", "-n", FULL, "udn/small", "--for=condition=NetworkReady", "--timeout=60s")
    await world.apply(*(pod(FULL, f"crowd-{number}", node) for number in range(CROWD)))


async def _ask_too_much(world: Any) -> None:
    """Red sends rubbish to the DHCP server, and a pod beside it asks more of the world than one client may."""
    await world.apply(pod(RED[0], "noisy", await world.node_of(RED)))
    await world.lab.kubectl("wait", "-n", RED[0], "pod/noisy", "--for=condition=Ready", "--timeout=60s")
    red = await world.scenario.guest(*RED)
    # The first time makes the series, the second one is what a rate shows.
    for seconds in ("1", "3"):
        await red.run(["probe", "udp", GATEWAY, "67", "500", seconds], timeout=60)
        await _ask(world, 3000)


async def _ask(world: Any, number: int) -> None:
    await world.lab.kubectl("exec", "-n", RED[0], "noisy", "--", "python3", "-c", _NAMES, GATEWAY, str(number))


async def _stop_the_resolver(world: Any, watcher: Prometheus) -> None:
    await world.lab.kill("outside", signal.SIGSTOP)
    try:

        async def ask() -> bool:
            await _ask(world, 60)
            return "VmnetDnsFailing" in await watcher.firing()

        await world.until("names are asked in vain", ask, 120)
        await watcher.fires("VmnetDnsFailing")
    finally:
        await world.lab.kill("outside", signal.SIGCONT)
        await world.lab.kubectl("delete", "pod", "-n", RED[0], "noisy", "--wait=false")


async def _break_a_port(world: Any, node: str) -> None:
    """Take its port away from a pod that runs: that, the agent cannot mend."""
    metadata = (await world.get("udn", "-n", FULL, "small"))["metadata"]
    place = names.network_namespace(NetworkId(int(metadata["annotations"][names.NETWORK_ID_ANNOTATION])))

    async def port() -> str | None:
        shown = await world.lab.exec(node, ["ip", "-j", "-n", place, "link", "show", "master", names.BRIDGE])
        found = [item["ifname"] for item in json.loads(shown.stdout)] if shown.exit == 0 else []
        return next((name for name in found if re.fullmatch("p[0-9a-f]{12}", name)), None)

    name = await world.until("a pod of the small network has its port", port)
    done = await world.lab.exec(node, ["ip", "-n", place, "link", "del", name])
    assert done.exit == 0, done.stderr


async def _fail_a_migration(world: Any, a_slow_link: dict[str, Any]) -> None:
    source = await world.node_of(BLUE)
    await world.apply(a_slow_link)
    try:
        migration = await world.migrate()

        async def killed() -> bool:
            for item in await world.launchers(BLUE):
                place = item["spec"].get("nodeName")
                if place not in (None, source) and item["status"].get("phase") == "Running":
                    argv = ["pkill", "-KILL", "-f", f"qemu-system.*{item['metadata']['uid']}"]
                    return bool((await world.lab.exec(place, argv)).exit == 0)
            return False

        await world.until("the target's QEMU is killed", killed)
        assert await world.migration_ends(migration) == "Failed"
    finally:
        await world.lab.kubectl("delete", "migrationpolicy", "slow", "--wait=false")
    await world.lab.kubectl("delete", "vmim", "--all", "-n", BLUE[0], "--wait=true", "--timeout=60s")


async def _hoard_connections(world: Any, watcher: Prometheus, node: str) -> None:
    """Connections that say nothing take most of the file descriptors that an agent may have."""
    address = next(host["ipv4"] for host in (await world.lab.status())["hosts"] if host["name"] == node)
    (pid,) = (await world.lab.exec(node, ["pgrep", "-f", f"vmnet.cmd agent --node-name {node} "])).stdout.split()
    (limit,) = await watcher.values(f'process_max_fds{{job="vmnet-agent", node="{node}"}}')
    done = await world.lab.exec(node, ["prlimit", "--pid", pid, "--nofile=300:"])
    assert done.exit == 0, done.stderr
    await world.lab.spawn("hoarder", "fabric", ["python3", "-c", _HOARD, str(address), str(METRICS_PORT), "245"])
    try:
        await watcher.fires("VmnetFileDescriptorsLow")
    finally:
        await world.lab.kill("hoarder")
        await world.lab.wait("hoarder")
        await world.lab.exec(node, ["prlimit", "--pid", pid, f"--nofile={int(limit)}:"])


async def _kill_the_controller(world: Any, watcher: Prometheus) -> None:
    await world.lab.kill("controller", signal.SIGKILL)
    await world.lab.wait("controller")
    await watcher.fires("VmnetControllerDown")
    await world.lab.restart("controller")
    # The dead one's lease must run out first.
    await watcher.fires("VmnetControllerNotLeading")


async def _kill_an_agent_again_and_again(world: Any, watcher: Prometheus) -> None:
    agent = f"agent-{await world.node_of(BLUE)}"
    url = await world.agent_url(agent.removeprefix("agent-"))

    async def scraped() -> bool:
        return "VmnetAgentDown" not in await watcher.firing()

    for _ in range(3):
        await world.lab.kill(agent, signal.SIGKILL)
        await world.lab.wait(agent)
        await watcher.fires("VmnetAgentDown")
        await world.lab.restart(agent)
        await world.until("the next agent is ready", lambda: world.answers(f"{url}/readyz"))
        # A start that was never scraped is no change.
        await world.until("it is scraped again", scraped)
    await watcher.fires("VmnetRestarting")


async def _start_an_agent_without_an_api(world: Any, watcher: Prometheus) -> None:
    agent = f"agent-{await world.node_of(RED)}"
    url = await world.agent_url(agent.removeprefix("agent-"))
    await world.lab.kill(agent, signal.SIGKILL)
    await world.lab.wait(agent)
    await world.lab.kill("apiserver", signal.SIGSTOP)
    try:
        await world.lab.restart(agent)
        await watcher.fires("VmnetNotReady")
    finally:
        await world.lab.kill("apiserver", signal.SIGCONT)
    await world.until("the agent is ready", lambda: world.answers(f"{url}/readyz"))
