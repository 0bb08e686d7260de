"""``make bench-migration``: what a live migration costs a machine's connections beyond the pause that QEMU makes.

A guest goes back and forth between two nodes. Meanwhile a pod on the third sends it a thousand probes a second, it
sends as many to the pod, and TCP streams run both ways. Of each migration the longest silence of each probe is set
against QEMU's own STOP and RESUME, at the guest's card and in the answers. A third probe, to a guest that stays, shows
what the machine itself does to one.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from vmnet.kube.api import PODS, POLICIES, VMIMS, VMIS, Kube, KubeError, NotFound, Object, Resource
from vmnet.kube.client import KubeClient
from vmnet.lab.bench import cards, crowd
from vmnet.lab.demo import BLUE, NETWORK, RED, Scenario
from vmnet.lab.errors import LabError
from vmnet.lab.guest.agent import GuestAgent
from vmnet.lab.guest.probe import probe_binary
from vmnet.lab.kubelet.pods import SandboxRecord
from vmnet.lab.lab import Lab
from vmnet.lab.virt import kinds
from vmnet.lab.virt.qemu import GUESTS_FIRST
from vmnet.model import names
from vmnet.model.names import NetworkId

INTERVAL_MS: Final = 1.0
"""Between two probes: what lies between two answers when nothing happens."""
PEER_NODE: Final = "n3"
PEER: Final = ("red-namespace", "peer")
MIGRATION_SECONDS: Final = 120.0
STREAM_RATE: Final = "100000"
"""Octets a second: streams that take all of an emulated guest's time would show its own gaps, not the network's."""
_LOST_IN_A_ROW: Final = 5
"""So many migrations that give no figure, one after another, end a series."""
_EVERY: Final = 10
"""One of so many migrations has another machine's migration beside it."""
_PROBE: Final = ["--json-lines", "udp"]
_SECONDS: Final = "600"
LIMITS: Final = {"p50": 0.5, "p99": 2.0, "max": 5.0}
"""Milliseconds, of what goes beyond QEMU's pause and the probe's own interval."""


@dataclass(frozen=True, slots=True)
class Row:
    """One migration. Times in ms; ``None``: QEMU said nothing. ``noise``: of the guest that stays; None if it moved."""

    source: str
    target: str
    pause: float | None
    to_guest: float
    from_guest: float
    noise: float | None
    card: float | None
    """From the last probe that reached the guest's card at the source before its STOP, to the first at the target."""
    card_noise: float | None
    """The longest time between two probes that reached the card of the guest that stays; None if it moved."""
    lost: int
    duplicates: int
    key: str
    blackout: float | None
    """By the datapath: from the guest's last frame at the source to the first one to it at the target."""
    silence: float | None
    """By the datapath: from the guest's last frame at the source to its first one at the target."""
    delivery: float | None
    """By the datapath: from the port's opening to the first frame to the guest."""
    fdb_moves: int
    misdelivered: int
    accompanied: bool

    @property
    def excess(self) -> float | None:
        """The longer silence without QEMU's pause and the probe's interval; never below zero."""
        if self.pause is None:
            return None
        return max(0.0, max(self.to_guest, self.from_guest) - self.pause - INTERVAL_MS)

    @property
    def at_card(self) -> float | None:
        """What the network adds to QEMU's pause, whatever the guest's processor does; never below zero."""
        if self.pause is None or self.card is None:
            return None
        return max(0.0, self.card - self.pause - INTERVAL_MS)

    @property
    def card_idle(self) -> float | None:
        """What the machine did meanwhile to probes to a guest that stayed, before its card."""
        return None if self.card_noise is None else max(0.0, self.card_noise - INTERVAL_MS)

    @property
    def outside(self) -> float | None:
        """The probe's silence without what the datapath saw of it; near nothing where the two agree."""
        return None if self.blackout is None else max(self.to_guest, self.from_guest) - self.blackout

    @property
    def idle(self) -> float | None:
        """What the machine did meanwhile to a probe whose guest stayed."""
        return None if self.noise is None else max(0.0, self.noise - INTERVAL_MS)


@dataclass(slots=True)
class Series:
    """Migrations under one condition."""

    name: str
    rows: list[Row] = field(default_factory=list)
    resets: int = 0
    stream_errors: int = 0
    failures: list[str] = field(default_factory=list)
    """Migrations that gave no figure, and why."""


class Bench:
    """The lab with the demo's machines, a peer pod, and what runs between them."""

    def __init__(self, lab: Lab, kube: Kube, tell: Callable[[str], None]) -> None:
        self._lab, self._kube, self._tell = lab, kube, tell
        self._scenario = Scenario(lab, tell)
        self._probe = str(probe_binary())
        self._count = 0
        self._peer_netns = ""
        self._addresses: dict[str, str] = {}
        self._namespace = ""
        self._mac = ""
        self._begins_at = ""
        self._running: set[str] = set()

    async def prepare(self) -> None:
        """Boot both machines beside the peer's node, and listen everywhere."""
        await self._lab.kubectl("cordon", PEER_NODE)
        await self._scenario.create()
        blue, red = await self._scenario.guest(*BLUE), await self._scenario.guest(*RED)
        for name, guest in (("blue", blue), ("red", red)):
            found = await self._scenario.addresses(guest)
            self._addresses[name] = next(text for text in found if "." in text).split("/")[0]
            await self._scenario.serve(guest)
        await self._make_peer()
        self._mac = await self._scenario.vmi(*BLUE, "{.status.interfaces[0].mac}")
        path = r"jsonpath={.metadata.annotations.k8s\.ovn\.org/network-id}"
        identity = await self._lab.kubectl("get", "cudn", NETWORK, "-o", path)
        self._namespace = names.network_namespace(NetworkId(int(identity)))
        enter = ["ip", "netns", "exec", self._namespace]
        await self._lab.spawn("fdb", PEER_NODE, [*enter, "bridge", "monitor", "fdb"])

        async def known() -> str:
            shown = json.loads((await self._inside(PEER_NODE, "bridge", "-j", "fdb", "show", "br", "br0")).stdout)
            return next((str(item["dst"]) for item in shown if item["mac"] == self._mac and "dst" in item), "")

        self._begins_at = await self._scenario.until("the peer's node knows where blue is", known)
        await self._watch_for_the_misdelivered()

    async def series(
        self, found: Series, count: int, keep: Callable[[], Awaitable[None]], *, agents_stopped: bool = False
    ) -> None:
        """So many migrations more, with streams that run all the time; ``keep`` is called after each."""
        name, streams, lost = found.name, {}, 0
        for stream, *end in (("send", "7008", "3600", STREAM_RATE), ("receive", "7009", "3600")):
            process = f"{stream}-{name.replace(' ', '-')}"
            words = ["--json-lines", stream, self._addresses["blue"], *end]
            streams[process] = await self._from_peer(process, *words)
        before = len(found.rows) + len(found.failures)
        for number in range(before, before + count):
            accompanied = number % _EVERY == _EVERY - 1
            try:
                row = await self._migrate(accompanied, agents_stopped=agents_stopped)
            except (LabError, KubeError, OSError, ValueError) as error:
                found.failures.append(f"{number + 1}: {type(error).__name__}: {error}")
                self._tell(f"{name}, {number + 1} of {before + count} gave no figure: {error}")
                lost += 1
                await keep()
                if lost == _LOST_IN_A_ROW:
                    break
                await self._recover()
                continue
            lost = 0
            found.rows.append(row)
            shown = "no figure" if row.excess is None else f"{row.excess:.2f} ms"
            card = "no figure" if row.at_card is None else f"{row.at_card:.2f} ms"
            self._tell(
                f"{name}, {number + 1} of {before + count}: {row.source}→{row.target}, beyond QEMU's pause: {card} "
                f"at the card{_noise(row.card_idle)}, {shown} answered{_noise(row.idle)}"
            )
            await keep()
        for process, log in streams.items():
            result = await self._end(process, log)
            found.resets += int(result["resets"])
            found.stream_errors += (
                len(result["errors"]) if isinstance(result["errors"], list) else int(result["errors"])
            )
        await keep()

    async def _recover(self) -> None:
        """After a migration that failed, or was not seen to the end: nothing of it shall run on."""
        for process in tuple(self._running):
            with contextlib.suppress(LabError):
                await self._end(process, self._lab.directory.log(process))
        for namespace, machine in (BLUE, RED):

            async def rests(namespace: str = namespace, machine: str = machine) -> bool:
                items = (await self._kube.list(VMIMS, namespace)).items
                mine = [item for item in items if item["spec"]["vmiName"] == machine]
                return all(item.get("status", {}).get("phase") in ("Succeeded", "Failed") for item in mine)

            with contextlib.suppress(LabError):
                await self._scenario.until("no migration is under way", rests, timeout=MIGRATION_SECONDS)
        guest = await self._scenario.guest(*BLUE)
        await guest.run(["sh", "-c", "pkill -INT -f '[p]robe --json-lines udp' || true"])

    # One migration

    async def _migrate(self, accompanied: bool, *, agents_stopped: bool) -> Row:
        self._count += 1
        number, blue = self._count, await self._scenario.guest(*BLUE)
        vmi = await self._kube.get(VMIS, BLUE[1], BLUE[0])
        source = vmi["status"]["nodeName"]
        forget = {kinds.PAUSE_ANNOTATION: None, names.MIGRATION_RECORD_ANNOTATION: None}
        await self._kube.patch(VMIS, BLUE[1], {"metadata": {"annotations": forget}}, BLUE[0])
        fdb, misdelivered = self._fdb_length(), await self._misdelivered()
        before = await self._blue_ports()
        watched = [self._addresses["blue"], self._addresses["red"]]
        captures = {
            node: await self._start(f"card-{number}-{node}", node, cards.command(self._namespace, watched))
            for node in ("n1", "n2")
        }
        probes = {
            process: await self._from_peer(process, *_PROBE, self._addresses[name], "7007", "1000", _SECONDS)
            for process, name in ((f"to-{number}", "blue"), (f"still-{number}", "red"))
        }
        job = await blue.start(["probe", *_PROBE, self._addresses["peer"], "7007", "1000", _SECONDS])
        await self._scenario.until("the probes run", partial(self._run, list(probes.values()), blue, job))
        companion = await self._start_migration(RED) if accompanied else ""
        migration = await self._start_migration(BLUE)
        uid = (await self._kube.get(VMIMS, migration, BLUE[0]))["metadata"]["uid"]
        async with self._stopped_agents(migration) if agents_stopped else _nothing():
            await self._succeeded(migration, BLUE)
        if companion:
            await self._succeeded(companion, RED)
        vmi = await self._scenario.until("QEMU's pause and the record are written", partial(self._written, uid))
        after = await self._blue_ports() - before
        results = {process: await self._end(process, log) for process, log in probes.items()}
        reached = {node: await self._captured(f"card-{number}-{node}", log) for node, log in captures.items()}
        back = await (await self._scenario.guest(*BLUE)).finish(job)
        to_guest, still = results[f"to-{number}"], results[f"still-{number}"]
        annotations = vmi["metadata"]["annotations"]
        record = json.loads(annotations[names.MIGRATION_RECORD_ANNOTATION])
        pause, stopped = annotations.get(kinds.PAUSE_ANNOTATION), annotations.get(kinds.STOPPED_ANNOTATION)
        left, arrived = (
            cards.at_ports(reached[node], self._addresses["blue"], ports)
            for node, ports in ((source, before), (vmi["status"]["nodeName"], after))
        )
        others = [item for found in reached.values() for item in found if item.address == self._addresses["red"]]
        blackout = record["blackoutSeconds"]
        return Row(
            source,
            vmi["status"]["nodeName"],
            float(pause) if pause else None,
            float(to_guest["longest_gap_ms"]),
            float(back["longest_gap_ms"]),
            None if accompanied else float(still["longest_gap_ms"]),
            cards.gap(left, arrived, float(stopped)) if stopped else None,
            None if accompanied else cards.longest(others),
            int(to_guest["lost"]) + int(back["lost"]),
            int(to_guest["duplicates"]) + int(back["duplicates"]),
            str((record["cutOver"] or {}).get("key", "")),
            _milliseconds(blackout),
            _milliseconds(record.get("pauseSeconds")),
            _milliseconds(record.get("deliverySeconds")),
            self._moves(fdb),
            await self._misdelivered() - misdelivered,
            accompanied,
        )

    async def _start_migration(self, machine: tuple[str, str]) -> str:
        body = {
            "apiVersion": VMIMS.api_version,
            "kind": VMIMS.kind,
            "metadata": {"generateName": f"bench-{machine[1]}-", "namespace": machine[0]},
            "spec": {"vmiName": machine[1]},
        }
        return str((await self._kube.create(VMIMS, body, machine[0]))["metadata"]["name"])

    async def _succeeded(self, migration: str, machine: tuple[str, str]) -> None:
        async def over() -> bool:
            try:
                phase = (await self._kube.get(VMIMS, migration, machine[0])).get("status", {}).get("phase", "")
            except NotFound:
                raise LabError(f"migration {migration} has gone before its end was seen") from None
            if phase == "Failed":
                raise LabError(f"migration {migration} of {machine[1]} failed")
            return bool(phase == "Succeeded")

        await self._scenario.until(f"migration {migration} has succeeded", over, timeout=MIGRATION_SECONDS)

    @asynccontextmanager
    async def _stopped_agents(self, migration: str) -> AsyncIterator[None]:
        """From the moment the target's port is staged no agent does anything, until the block ends."""
        uid = (await self._kube.get(VMIMS, migration, BLUE[0]))["metadata"]["uid"]

        async def staged() -> bool:
            pods = (await self._kube.list(PODS, BLUE[0], labels=f"{names.MIGRATION_JOB_LABEL}={uid}")).items
            return any(pod.get("status", {}).get("phase") == "Running" for pod in pods)

        await self._scenario.until("the target's port is staged", staged)
        agents = [f"agent-{node}" for node in ("n1", "n2", "n3")]
        for agent in agents:
            await self._lab.kill(agent, signal.SIGSTOP)
        vmi = await self._kube.get(VMIS, BLUE[1], BLUE[0])
        if kinds.PAUSE_ANNOTATION in vmi["metadata"].get("annotations", {}):
            raise LabError("the machine had moved before the agents were stopped: this migration proves nothing")
        try:
            yield
        finally:
            for agent in agents:
                await self._lab.kill(agent, signal.SIGCONT)

    async def _written(self, uid: str) -> Object | None:
        """The machine, once it tells of this migration: an older record that is removed is written again."""
        vmi = await self._kube.get(VMIS, BLUE[1], BLUE[0])
        wanted = (kinds.PAUSE_ANNOTATION, names.MIGRATION_RECORD_ANNOTATION)
        annotations = vmi["metadata"].get("annotations", {})
        if not all(key in annotations for key in wanted):
            return None
        record = json.loads(annotations[names.MIGRATION_RECORD_ANNOTATION])
        # The agent's account may be added to the record later.
        return vmi if record["uid"] == uid and record.get("cutOver") else None

    # What is seen

    def _fdb_length(self) -> int:
        return self._lab.directory.log("fdb").stat().st_size

    def _moves(self, offset: int) -> int:
        """How often blue's MAC changed its VTEP on the peer's node since the monitor's log was that long."""
        log = self._lab.directory.log("fdb").read_bytes()
        seen: list[str] = [self._begins_at]
        for line in [*log[:offset].decode().splitlines(), "", *log[offset:].decode().splitlines()]:
            if not line:
                del seen[:-1]  # where it was at the beginning
                continue
            words = line.split()
            if self._mac in words and "dst" in words and words[0] != "Deleted":
                vtep = words[words.index("dst") + 1]
                if not seen or seen[-1] != vtep:
                    seen.append(vtep)
        return max(0, len(seen) - 1)

    async def _watch_for_the_misdelivered(self) -> None:
        """Count, on every node, blue's probes that leave by a port that is neither blue's nor the fabric's."""
        for node in ("n1", "n2", PEER_NODE):
            script = (
                "add table bridge bench; add set bridge bench others { type ifname; }; "
                "add chain bridge bench forward { type filter hook forward priority 10; policy accept; }; "
                f"add rule bridge bench forward ether daddr {self._mac} oifname @others udp dport 7007 counter"
            )
            done = await self._inside(node, "nft", script)
            if done.exit:
                raise LabError(f"no counter on {node}: {done.stderr.strip()}")
            shown = json.loads((await self._inside(node, "ip", "-j", "link", "show", "master", "br0")).stdout or "[]")
            ports = [link["ifname"] for link in shown if link["ifname"] != names.VXLAN_L2]
            mine = await self._blue_ports()
            others = ", ".join(f'"{port}"' for port in ports if port not in mine)
            if others:
                done = await self._inside(node, "nft", f"add element bridge bench others {{ {others} }}")
                if done.exit:
                    raise LabError(f"no counter on {node}: {done.stderr.strip()}")

    async def _blue_ports(self) -> set[str]:
        pods = (await self._kube.list(PODS, BLUE[0])).items
        return {str(names.port_interface(pod["metadata"]["uid"], names.PRIMARY_INTERFACE)) for pod in pods}

    async def _misdelivered(self) -> int:
        found = 0
        for node in ("n1", "n2", PEER_NODE):
            shown = await self._inside(node, "nft", "-j", "list", "table", "bridge", "bench")
            for item in json.loads(shown.stdout)["nftables"]:
                for expression in item.get("rule", {}).get("expr", ()):
                    found += int(expression.get("counter", {}).get("packets", 0))
        return found

    async def _inside(self, node: str, *argv: str) -> Any:
        return await self._lab.exec(node, ["ip", "netns", "exec", self._namespace, *argv])

    # The peer

    async def _make_peer(self) -> None:
        # The others keep the network on both of blue's nodes, and would be hit by what goes astray there.
        for name, node in ((PEER[1], PEER_NODE), ("keeper-1", "n1"), ("keeper-2", "n2")):
            record = await self._make_pod(name, node)
            if node == PEER_NODE:
                self._peer_netns = record.netns
        annotations = (await self._kube.get(PODS, PEER[1], PEER[0]))["metadata"]["annotations"]
        networks = json.loads(annotations[names.POD_NETWORKS_ANNOTATION])
        primary = next(item for key, item in networks.items() if key != "default")
        self._addresses["peer"] = next(text for text in primary["ip_addresses"] if "." in text).split("/")[0]
        log = await self._from_peer("serve", "serve")
        await self._scenario.until("the peer serves", partial(_says, log, "serving"))

    async def _make_pod(self, name: str, node: str) -> SandboxRecord:
        container = {"name": "main", "image": "registry.k8s.io/pause:3.10", "command": ["sleep", "36000"]}
        pod = {"metadata": {"name": name, "namespace": PEER[0]}, "spec": {"nodeName": node, "containers": [container]}}
        uid = (await self._kube.create(PODS, pod, PEER[0]))["metadata"]["uid"]

        async def ready() -> SandboxRecord | None:
            record = SandboxRecord.read(self._lab.pod_directory(uid))
            return record if record is not None and record.ready else None

        found: SandboxRecord = await self._scenario.until(f"pod {name} has its interface", ready)
        return found

    async def _from_peer(self, process: str, *words: str) -> Path:
        argv = ["nsenter", f"--net={self._peer_netns}", self._probe, *words]
        if words[0] != "serve" and "udp" in words:
            return await self._start(process, PEER_NODE, argv)
        return await self._lab.spawn(process, PEER_NODE, [*GUESTS_FIRST, *argv])

    async def _start(self, process: str, node: str, argv: Sequence[str]) -> Path:
        """What ends with the migration that it is for."""
        log = await self._lab.spawn(process, node, [*GUESTS_FIRST, *argv])
        self._running.add(process)
        return log

    async def _captured(self, process: str, log: Path) -> list[cards.Delivery]:
        """What has left the node towards guests; the capture ends."""
        self._running.discard(process)
        await self._lab.kill(process, signal.SIGINT)
        await self._lab.wait(process)
        text = await asyncio.to_thread(log.read_text)
        if "\n0 packets dropped by kernel" not in text:
            raise LabError(f"{process}: {text[-200:].strip()}")
        return cards.deliveries(text)

    async def _run(self, logs: Sequence[Path], guest: GuestAgent, job: str) -> bool:
        return all([await _answered(log.read_text()) for log in logs]) and await _answered(
            (await guest.poll(job)).stdout
        )

    async def _end(self, process: str, log: Path) -> dict[str, Any]:
        self._running.discard(process)
        await self._lab.kill(process, signal.SIGINT)
        await self._lab.wait(process)
        lines = (await asyncio.to_thread(log.read_text)).strip().splitlines()
        result = json.loads(lines[-1])
        if "result" not in result:
            raise LabError(f"{process} gave no result: {lines[-1]}")
        return dict(result)


def _noise(found: float | None) -> str:
    return "" if found is None else f" (machine: {found:.2f} ms)"


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


async def _says(log: Path, text: str) -> bool:
    return text in await asyncio.to_thread(log.read_text)


async def _answered(output: str) -> bool:
    lines = output.strip().splitlines()
    return bool(lines) and int(json.loads(lines[-1]).get("received", 0)) > 0


@asynccontextmanager
async def changing_policy(kube: Kube, a_second: float) -> AsyncIterator[list[int]]:
    """A NetworkPolicy of blue's namespace that changes so often; how often it did, when the block has ended."""
    changes = [0]

    async def change() -> None:
        policy: Resource = POLICIES
        body: Object = {
            "metadata": {"name": "bench", "namespace": BLUE[0]},
            "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}, {"ports": [{"port": 1}]}]},
        }
        await kube.create(policy, body, BLUE[0])
        begun = time.monotonic()
        while True:
            ingress = [{}, {"ports": [{"port": 1 + changes[0] % 60000}]}]
            await kube.patch(policy, "bench", {"spec": {"ingress": ingress}}, BLUE[0])
            changes[0] += 1
            await asyncio.sleep(max(0.0, begun + changes[0] / a_second - time.monotonic()))

    task = asyncio.create_task(change(), name="policy")
    try:
        yield changes
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await kube.delete(POLICIES, "bench", BLUE[0])
    if not changes[0]:
        raise LabError("the policy was never changed")


# The report


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted or unsorted values, the one that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


_DERIVED: Final = ("excess", "idle", "at_card", "card_idle", "outside")


def summary(series: Series) -> dict[str, Any]:
    """Figures of one series. ``excess`` and ``machine`` in ms."""
    excess = [row.excess for row in series.rows if row.excess is not None]
    idle = [row.idle for row in series.rows if row.idle is not None]
    pauses = [row.pause for row in series.rows if row.pause is not None]
    blackouts = [row.blackout for row in series.rows if row.blackout is not None]

    def spread(values: Sequence[float]) -> dict[str, float]:
        if not values:
            return {}
        shares = {"p50": statistics.median(values), "p99": percentile(values, 0.99), "max": max(values)}
        return {name: round(value, 3) for name, value in shares.items()}

    return {
        "name": series.name,
        "migrations": len(series.rows),
        "accompanied": sum(row.accompanied for row in series.rows),
        "qemu_pause": spread(pauses),
        "excess": spread(excess),
        "machine": spread(idle),
        "card": spread([row.at_card for row in series.rows if row.at_card is not None]),
        "card_machine": spread([row.card_idle for row in series.rows if row.card_idle is not None]),
        "blackout": spread(blackouts),
        "silence": spread([row.silence for row in series.rows if row.silence is not None]),
        "delivery": spread([row.delivery for row in series.rows if row.delivery is not None]),
        "outside": spread([row.outside for row in series.rows if row.outside is not None]),
        "keys": {key: sum(row.key == key for row in series.rows) for key in sorted({row.key for row in series.rows})},
        "duplicates": sum(row.duplicates for row in series.rows),
        "misdelivered": sum(row.misdelivered for row in series.rows),
        "lost": sum(row.lost for row in series.rows),
        "resets": series.resets,
        "stream_errors": series.stream_errors,
        "failures": series.failures,
        "fdb_moves": {str(n): sum(r.fdb_moves == n for r in series.rows) for n in {r.fdb_moves for r in series.rows}},
        "rows": [{**asdict(row), **{name: getattr(row, name) for name in _DERIVED}} for row in series.rows],
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| series | migrations | no figure | QEMU's pause p50/p99/max | beyond it, at the guest's card p50/p99/max "
        "| the machine's noise there p50/p99/max | beyond it, answered p50/p99/max "
        "| the machine's noise there p50/p99/max | from opening to first frame p50/p99/max "
        "| probe without the datapath's blackout p50/p99/max | twice | wrong place | resets | FDB moves |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in found:
        moves = ", ".join(f"{count} × {number}" for number, count in sorted(item["fdb_moves"].items()))
        lines.append(
            f"| {item['name']} | {item['migrations']} ({item['accompanied']} beside another) | "
            f"{len(item['failures'])} | "
            f"{_shown(item['qemu_pause'])} | {_shown(item['card'])} | {_shown(item['card_machine'])} | "
            f"{_shown(item['excess'])} | {_shown(item['machine'])} | "
            f"{_shown(item['delivery'])} | {_shown(item['outside'])} | "
            f"{item['duplicates']} | {item['misdelivered']} | {item['resets']} | {moves} |"
        )
    limits = " / ".join(f"{value:g}" for value in LIMITS.values())
    lines.append(f"\nTimes in ms. Asked for beyond QEMU's pause: {limits} (p50 / p99 / max).")
    return "\n".join(lines)


def _shown(spread: dict[str, float]) -> str:
    return " / ".join(f"{value:.2f}" for value in spread.values()) or "—"


_CURVES: Final = {
    ("at_card", "-"): "beyond QEMU’s pause, at the card",
    ("card_idle", ":"): "a guest that stays, at its card",
    ("excess", "--"): "beyond QEMU’s pause, answered",
    ("idle", "-."): "a guest that stays, answered",
}


def plot(found: Sequence[dict[str, Any]], directory: Path) -> None:
    """``migration.png`` and ``migration.svg``: how many migrations stayed below which silence."""
    import matplotlib  # here, for it takes a while and has no other use

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for item in found:
        for kind, style in _CURVES:
            values = sorted(row[kind] for row in item["rows"] if row[kind] is not None)
            label = f"{item['name']}: {_CURVES[kind, style]}"
            share = [100 * (index + 1) / len(values) for index in range(len(values))]
            axes.step(values, share, style, where="post", label=label)
    for name, value in LIMITS.items():
        axes.axvline(value, color="grey", linewidth=0.6)
        axes.text(value, 2, f" {name} ≤ {value:g}", fontsize=7, color="grey")
    axes.set(xscale="symlog", xlabel="longest silence of a 1 kHz probe, ms", ylabel="migrations, %", ylim=(0, 101))
    axes.set_xlim(left=0)
    axes.legend(fontsize=7)
    for suffix in ("png", "svg"):
        figure.savefig(directory / f"migration.{suffix}", dpi=150)
    pyplot.close(figure)


def write(body: dict[str, Any], report: Path) -> None:
    """As JSON; directories are made."""
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(body, indent=2) + "\n")


def resumed(report: Path) -> dict[str, Series]:
    """The series of an earlier run, by name."""
    found = {}
    for item in json.loads(report.read_text())["series"]:
        fields = Row.__dataclass_fields__
        rows = [Row(**{key: row[key] for key in fields}) for row in item["rows"]]
        counts = (int(item["resets"]), int(item["stream_errors"]))
        found[item["name"]] = Series(item["name"], rows, *counts, list(item["failures"]))
    return found


async def run(counts: tuple[int, int, int], endpoints: int, report: Path, known: Mapping[str, Series]) -> None:
    """All series, in one lab; those that are known go on."""

    def tell(text: str) -> None:
        print(f"==> {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    plain, stopped, crowded = counts
    wanted = {"plain": plain, "agents stopped": stopped, f"{endpoints} endpoints": crowded}
    every = {name: known.get(name) or Series(name) for name in wanted}
    todo = {name: count - len(every[name].rows) for name, count in wanted.items()}
    load = os.getloadavg()[0]

    async def keep() -> None:
        """Write after each migration: a later one may be the end of the run."""
        found = [summary(series) for series in every.values() if series.rows or series.failures]
        body = {"load_average_before": round(load, 2), "endpoints": endpoints, "series": found}
        await asyncio.to_thread(write, body, report)

    async with Lab(f"bench-{os.getpid()}", nodes=3) as lab:
        kube = await KubeClient.connect(lab.kubeconfig, user_agent="bench-migration")
        try:
            bench = Bench(lab, kube, tell)
            await bench.prepare()
            for name, series in every.items():
                if todo[name] <= 0:
                    continue
                async with _crowd(kube, endpoints, tell) if name == f"{endpoints} endpoints" else _nothing():
                    await bench.series(series, todo[name], keep, agents_stopped=name == "agents stopped")
        finally:
            await kube.close()
    found = [summary(series) for series in every.values() if series.rows]
    await asyncio.to_thread(plot, found, report.parent)
    print(table(found))
    print(f"\nreport: {report}")


@asynccontextmanager
async def _crowd(kube: Kube, endpoints: int, tell: Callable[[str], None]) -> AsyncIterator[None]:
    tell(f"make {endpoints} endpoints")
    await crowd.make(kube, BLUE[0], endpoints, tell)
    started = time.monotonic()
    async with changing_policy(kube, 10) as changes:
        yield
        tell(f"{changes[0] / (time.monotonic() - started):.1f} changes of the policy a second")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="bench-migration", description=__doc__)
    parser.add_argument("--migrations", type=int, default=100, help="of the plain series (%(default)s)")
    parser.add_argument("--stopped", type=int, default=30, help="with all agents stopped (%(default)s)")
    parser.add_argument("--crowded", type=int, default=30, help="among many endpoints and changes (%(default)s)")
    parser.add_argument("--endpoints", type=int, default=10_000, help="how many that is (%(default)s)")
    parser.add_argument("--report", type=Path, default=Path("build/bench/migration.json"), help="%(default)s")
    parser.add_argument("--resume", action="store_true", help="go on with the series that the report has")
    arguments = parser.parse_args()
    known = resumed(arguments.report) if arguments.resume and arguments.report.exists() else {}
    counts = (arguments.migrations, arguments.stopped, arguments.crowded)
    asyncio.run(run(counts, arguments.endpoints, arguments.report, known))


if __name__ == "__main__":
    main()
