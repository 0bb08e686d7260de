"""One lab with the demo's two machines for every test here, and the ends of its logs when a test fails."""

import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from vmnet.lab.demo import BLUE, RED, Scenario
from vmnet.lab.guest.agent import GuestAgent
from vmnet.lab.lab import Lab
from vmnet.lab.topology import METRICS_PORT
from vmnet.model import names

CONTROLLER_METRICS = "http://127.0.0.1:9411/metrics"
_FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"
_LOGS = ("agent-", "controller", "virt-", "kubelet-")
_UP = pytest.StashKey["World"]()


@dataclass(slots=True)
class Traffic:
    """Probes and streams that one guest has started."""

    guest: GuestAgent
    jobs: dict[str, str]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def counts(self) -> dict[str, int]:
        """What each has got across so far: probes answered, octets. Fails when one has ended."""
        found = {}
        for name, job in self.jobs.items():
            state = await self.guest.poll(job)
            assert state.running, f"{name} ended: {state.stderr} {state.stdout[-300:]}"
            lines = [json.loads(line) for line in state.stdout.splitlines()]
            found[name] = int(lines[-1].get("bytes", lines[-1].get("received", 0))) if lines else 0
        return found

    async def finish(self) -> None:
        """End them; ``results`` then holds what they saw."""
        for name, job in self.jobs.items():
            if name not in self.results:
                self.results[name] = await self.guest.finish(job)


class World:
    """The lab, red and blue, and what tests ask about them."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.scenario = Scenario(lab, lambda _: None)

    # Objects

    async def get(self, *arguments: str) -> dict[str, Any]:
        """``kubectl get … -o json``."""
        found: dict[str, Any] = json.loads(await self.lab.kubectl("get", *arguments, "-o", "json"))
        return found

    async def apply(self, *objects: dict[str, Any]) -> None:
        """``kubectl apply`` of these objects."""
        await self.lab.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))

    async def events(self, namespace: str, reason: str) -> list[dict[str, Any]]:
        """Events of a namespace with this reason."""
        return list((await self.get("events", "-n", namespace, "--field-selector", f"reason={reason}"))["items"])

    async def event(self, namespace: str, reason: str, about: str, says: str, timeout: float = 60) -> None:
        """Wait for an event about an object whose name begins so, with a message that has these words."""

        async def seen() -> bool:
            return any(
                item["involvedObject"]["name"].startswith(about) and says in item["message"]
                for item in await self.events(namespace, reason)
            )

        await self.until(f"event {reason} about {about} says {says!r}", seen, timeout)

    @asynccontextmanager
    async def namespace(self, name: str) -> AsyncIterator[str]:
        """A namespace for primary networks; everything in it goes with it."""
        labels = {names.PRIMARY_NETWORK_LABEL: ""}
        await self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        try:
            yield name
        finally:
            await self.lab.kubectl("delete", "namespace", name, "--wait=false")

    # Machines

    async def node_of(self, machine: tuple[str, str]) -> str:
        """Where a machine runs."""
        return await self.scenario.vmi(*machine, "{.status.nodeName}")

    async def launchers(self, machine: tuple[str, str]) -> list[dict[str, Any]]:
        """Its pods, the finished ones too."""
        items = (await self.get("pods", "-n", machine[0], "-l", "kubevirt.io=virt-launcher"))["items"]
        return [pod for pod in items if pod["metadata"]["annotations"][names.DOMAIN_ANNOTATION] == machine[1]]

    async def launcher(self, machine: tuple[str, str]) -> dict[str, Any]:
        """The pod that runs it now."""
        node = await self.node_of(machine)
        running = [
            pod
            for pod in await self.launchers(machine)
            if pod["spec"].get("nodeName") == node and pod["status"].get("phase") == "Running"
        ]
        assert len(running) == 1, running
        return running[0]

    async def ipv4(self, machine: tuple[str, str]) -> str:
        """The machine's IPv4 address, as the guest has it."""
        found = await self.scenario.addresses(await self.scenario.guest(*machine))
        return next(text for text in found if "." in text).split("/")[0]

    async def facts(self, machine: tuple[str, str]) -> dict[str, Any]:
        """What must be the same wherever the machine runs: read in the guest."""
        guest = await self.scenario.guest(*machine)
        await guest.run(["ping", "-c", "1", "-W", "2", "192.168.0.1"])
        neighbours = (await guest.run(["ip", "neigh", "show", "192.168.0.1"])).stdout.split()
        return {
            "addresses": await self.scenario.addresses(guest),
            "mac": (await guest.run(["cat", "/sys/class/net/eth0/address"])).stdout.strip(),
            "gateway": neighbours[neighbours.index("lladdr") + 1] if "lladdr" in neighbours else "",
        }

    async def migrate(self, vmi: str = BLUE[1], namespace: str = BLUE[0]) -> str:
        """Ask for a migration; returns the name of the object."""
        body = {
            "apiVersion": "kubevirt.io/v1",
            "kind": "VirtualMachineInstanceMigration",
            "metadata": {"generateName": f"{vmi}-", "namespace": namespace},
            "spec": {"vmiName": vmi},
        }
        output = await self.lab.kubectl("create", "-f", "-", "-o", "name", stdin=yaml.safe_dump(body))
        return output.strip().split("/")[-1]

    async def phase(self, migration: str, namespace: str = BLUE[0]) -> str:
        """Phase of a migration; ``gone`` when it was deleted."""
        path = ["-o", "jsonpath={.status.phase}{'/'}"]
        found = await self.lab.kubectl("get", "vmim", "-n", namespace, migration, "--ignore-not-found", *path)
        return found.strip().rstrip("/") if found.strip() else "gone"

    async def migration_ends(self, migration: str) -> str:
        """Wait for its end; returns the last phase."""

        async def over() -> str:
            phase = await self.phase(migration)
            return phase if phase in ("Succeeded", "Failed", "gone") else ""

        return str(await self.until(f"migration {migration} is over", over, 150))

    # Traffic

    @asynccontextmanager
    async def traffic(self) -> AsyncIterator[Traffic]:
        """Probe and streams between red and blue, for as long as the block runs."""
        red = await self.scenario.guest(*RED)
        address = await self.ipv4(BLUE)
        commands = {
            "probe": ["udp", address, "7007", "1000", "300"],
            "to blue": ["send", address, "7008", "300"],
            "from blue": ["receive", address, "7009", "300"],
        }
        async with self.streams(red, commands) as traffic:
            yield traffic

    @asynccontextmanager
    async def streams(self, guest: GuestAgent, commands: dict[str, list[str]]) -> AsyncIterator[Traffic]:
        """What the guest's probe does by these commands, for as long as the block runs."""
        jobs = {name: await guest.start(["probe", "--json-lines", *words]) for name, words in commands.items()}
        traffic = Traffic(guest, jobs)
        try:
            await self.goes_on(traffic)
            yield traffic
        finally:
            await traffic.finish()

    async def goes_on(self, traffic: Traffic) -> None:
        """Wait until each has got more across than now, twice: the first step may tell of what was on its way."""
        for _ in range(2):
            before = await traffic.counts()

            async def more(before: dict[str, int] = before) -> bool:
                now = await traffic.counts()
                return all(now[name] > count for name, count in before.items())

            await self.until("probe and streams get on", more, 90)

    # Processes

    async def metrics(self, url: str) -> dict[str, list[tuple[dict[str, str], float]]]:
        """Samples by name."""
        result = await self.lab.exec("fabric", ["python3", "-c", _FETCH, url])
        assert result.exit == 0, result.stderr
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(result.stdout):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
        return found

    async def agent_url(self, node: str) -> str:
        """Where a node's agent serves."""
        host = next(item for item in (await self.lab.status())["hosts"] if item["name"] == node)
        return f"http://{host['ipv4']}:{METRICS_PORT}"

    async def metric(self, url: str, name: str, /, **labels: str) -> float:
        """Sum of the samples that have these labels; 0 when there is none."""
        samples = (await self.metrics(url)).get(name, [])
        return sum(value for found, value in samples if labels.items() <= found.items())

    async def answers(self, url: str) -> bool:
        """Whether a GET gives 200."""
        return (await self.lab.exec("fabric", ["python3", "-c", _FETCH, url])).exit == 0

    def log(self, process: str) -> str:
        """A process's whole log."""
        return self.lab.directory.log(process).read_text(errors="replace")

    async def until(self, what: str, look: Callable[[], Awaitable[Any]], timeout: float = 90) -> Any:
        """Look until there is something."""
        return await self.scenario.until(what, look, timeout=timeout)

    def tails(self) -> Iterator[tuple[str, str]]:
        """The ends of the logs that tell what happened."""
        for path in sorted((self.lab.directory.path / "logs").glob("*.log")):
            if path.name.startswith(_LOGS):
                yield path.name, self.lab.directory.log_tail(path.stem, 40)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """The lab with red and blue running, each answering on probe's ports."""
    async with Lab(name=f"test-{os.getpid()}") as lab:
        found = World(lab)
        request.session.stash[_UP] = found
        await found.scenario.create()
        for machine in (RED, BLUE):
            guest = await found.scenario.guest(*machine)
            await found.scenario.addresses(guest)
            await found.scenario.serve(guest)
        yield found


@pytest_asyncio.fixture(loop_scope="session")
async def healthy(world: World) -> AsyncIterator[World]:
    """The same; afterwards both machines run, and red reaches blue, or this test is to blame."""
    yield world
    started = time.monotonic()
    red = await world.scenario.guest(*RED)
    result = await red.run(["ping", "-c", "1", "-W", "5", await world.ipv4(BLUE)], timeout=30)
    assert result.exit == 0, f"red does not reach blue after the test ({time.monotonic() - started:.1f} s): {result}"


@pytest.fixture
def a_slow_link() -> dict[str, Any]:
    """A MigrationPolicy for blue: its memory takes many seconds, so that there is a middle to interrupt."""
    return {
        "apiVersion": "migrations.kubevirt.io/v1alpha1",
        "kind": "MigrationPolicy",
        "metadata": {"name": "slow"},
        "spec": {
            "bandwidthPerMigration": "1Mi",
            "selectors": {"namespaceSelector": {"kubernetes.io/metadata.name": BLUE[0]}},
        },
    }


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add the lab's logs to the report of what failed."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    world = item.session.stash.get(_UP, None)
    if report.failed and world is not None:
        report.sections += [(f"lab log {name}", text) for name, text in world.tails() if text]
