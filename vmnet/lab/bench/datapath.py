"""``make bench-datapath``: traffic through a network against a bare bridge and VXLAN between the same pods.

The network has 10,000 endpoints, port security, Services, and a policy that isolates all of them. Both ways are
measured in turn, five times each, in one run; what is compared are ratios of medians, and the spread of each is shown
beside it.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from vmnet.lab.bench import attach, node
from vmnet.lab.errors import LabError
from vmnet.lab.guest.probe import binary
from vmnet.lab.init import COMPONENTS
from vmnet.lab.lab import Lab

METER: Final = Path(__file__).with_name("meter.c")
PORT: Final = "7100"
BULK_PORT: Final = "5201"
ROUNDS: Final = 5
_CLUSTER: Final = {str(address) for address in node.SERVICES.values()}
CONNECTIONS: Final = "4000"
"""Fewer than a client has ports."""


@dataclass(slots=True)
class Measurement:
    """One figure, both ways. ``limit``: the ratio that is asked for; ``at_least`` says on which side of it is good."""

    name: str
    unit: str
    limit: float
    at_least: bool
    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Ours to bare, of medians."""
        return statistics.median(self.ours) / statistics.median(self.bare)

    @property
    def met(self) -> bool:
        """Whether the ratio is what was asked for."""
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit


class Bench:
    """Two nodes, the network and the bare bridge on them, and programs in the pods."""

    def __init__(self, lab: Lab, meter: Path, tell: Callable[[str], None]) -> None:
        self._lab = lab
        self._meter = str(meter)
        self._tell = tell

    async def prepare(self, endpoints: int) -> dict[str, Any]:
        """Render on both nodes, start the servers; what rendering took on each."""
        taken = {}
        for name in node.NODES:
            self._tell(f"render {endpoints} endpoints on {name}")
            argv = [sys.executable, "-m", "vmnet.lab.bench.node", name]
            done = await self._lab.exec(
                name, argv, stdin=json.dumps({"endpoints": endpoints, "port": int(PORT)}), timeout=300
            )
            if done.exit:
                raise LabError(f"node {name} could not be prepared: {done.stderr.strip()[-800:]}")
            taken[name] = json.loads(done.stdout)
        for pod in ("b", "c"):
            host = node.PODS[pod][0]
            await self._lab.spawn(f"meter-{pod}", host, ["ip", "netns", "exec", pod, self._meter, "serve", PORT])
            await self._lab.spawn(f"iperf-{pod}", host, ["ip", "netns", "exec", pod, "iperf3", "-s", "-p", BULK_PORT])
        for pod in ("b", "c"):
            for address in (node.network_address(pod), node.bare_address(pod)):
                await self._until_answered(address)
        return taken

    async def bulk(self, address: str) -> float:
        """TCP, Mbit/s that arrived."""
        done = await self._in_pod("iperf3", "-c", address, "-p", BULK_PORT, "-t", "3", "-J")
        return float(json.loads(done)["end"]["sum_received"]["bits_per_second"]) / 1e6

    async def packets(self, address: str) -> float:
        """65-octet datagrams a second that arrived."""
        return float(json.loads(await self._in_pod(self._meter, "packets", address, PORT, "2"))["per_second"])

    async def rtt(self, address: str) -> float:
        """99th percentile of the round trip of one datagram, µs."""
        return float(json.loads(await self._in_pod(self._meter, "rtt", address, PORT, "20000"))["p99_us"])

    async def connections(self, address: str) -> float:
        """TCP connections a second, one after another."""
        return await self._connect(address, PORT)

    async def service_connections(self, address: str) -> float:
        """The same, of a Service when it is a cluster address."""
        return await self._connect(address, str(node.SERVICE_PORT) if address in _CLUSTER else PORT)

    async def _connect(self, address: str, port: str) -> float:
        return float(json.loads(await self._in_pod(self._meter, "connect", address, port, CONNECTIONS))["per_second"])

    async def _until_answered(self, address: str) -> None:
        for _ in range(50):
            done = await self._lab.exec(
                "n1", ["ip", "netns", "exec", "a", self._meter, "rtt", address, PORT, "1"], timeout=30
            )
            if done.exit == 0:
                return
            await asyncio.sleep(0.2)
        raise LabError(f"no answer from {address}: {done.stderr.strip()}")

    async def _in_pod(self, *argv: str) -> str:
        done = await self._lab.exec("n1", ["ip", "netns", "exec", "a", *argv], timeout=60)
        if done.exit:
            raise LabError(f"{' '.join(argv)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


async def measure(lab: Lab, endpoints: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """The whole run. Raises LabError."""
    bench = Bench(lab, await asyncio.to_thread(binary, METER), tell)
    taken = await bench.prepare(endpoints)
    found: list[tuple[Measurement, Callable[[str], Awaitable[float]], str, str]] = []
    for where, pod in (("across nodes", "b"), ("same node", "c")):
        ours, bare = node.network_address(pod), node.bare_address(pod)
        found += [
            (Measurement(f"TCP throughput, {where}", "Mbit/s", 0.95, at_least=True), bench.bulk, ours, bare),
            (Measurement(f"small packets, {where}", "1/s", 0.90, at_least=True), bench.packets, ours, bare),
            (Measurement(f"RTT p99, {where}", "µs", 1.15, at_least=False), bench.rtt, ours, bare),
            (Measurement(f"TCP connections, {where}", "1/s", 0.85, at_least=True), bench.connections, ours, bare),
            # Against the same pod by its own address in the network.
            (
                Measurement(f"ClusterIP connections, {where}", "1/s", 0.85, at_least=True),
                bench.service_connections,
                str(node.SERVICES[pod]),
                ours,
            ),
        ]
    for number in range(ROUNDS):
        tell(f"round {number + 1} of {ROUNDS}")
        for measurement, run, ours, bare in found:
            # Each goes first as often as the other: what the machine does meanwhile hits both.
            for mine in (True, False) if number % 2 == 0 else (False, True):
                (measurement.ours if mine else measurement.bare).append(await run(ours if mine else bare))
    measurements = [item[0] for item in found]
    return {
        "endpoints": endpoints,
        "render": taken,
        "load_average": os.getloadavg()[0],
        "measurements": [shown(item) for item in measurements],
    }


def shown(item: Measurement) -> dict[str, Any]:
    """As the report has it."""
    return {**asdict(item), "ratio": round(item.ratio, 3), "met": item.met}


def write(found: dict[str, Any], report: Path) -> None:
    """As JSON; directories are made."""
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(found, indent=2) + "\n")


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| what | vmnet | bare | ratio | asked for | met |", "|---|---|---|---|---|---|"]
    for item in report["measurements"]:
        sign = "≥" if item["at_least"] else "≤"
        lines.append(
            f"| {item['name']} ({item['unit']}) | {_spread(item['ours'])} | {_spread(item['bare'])} "
            f"| {item['ratio']:.2f} | {sign} {item['limit']:.2f} | {'yes' if item['met'] else 'no'} |"
        )
    return "\n".join(lines)


def _spread(found: Sequence[float]) -> str:
    return f"{statistics.median(found):,.0f} ({min(found):,.0f}–{max(found):,.0f})"


async def attachments(pods: int, tell: Callable[[str], None]) -> list[Measurement]:
    """CNI ADD against its kernel operations in a script: median and 99th percentile, ms.

    Each is one figure of many attachments. The first pod, whose ADD makes the network, is told apart.
    """
    taken = await attach.measure(pods + 1, tell)
    ours, bare = ([value * 1e3 for value in taken[name]] for name in ("ours", "bare"))
    found = [Measurement("CNI ADD, first pod of a network", "ms", attach.LIMIT, False, ours[:1], bare[:1])]
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        mine, theirs = [attach.percentile(ours[1:], share)], [attach.percentile(bare[1:], share)]
        found.append(Measurement(f"CNI ADD, {name}", "ms", attach.LIMIT, False, mine, theirs))
    return found


async def run(endpoints: int, pods: int, report: Path) -> None:
    """Bring a lab up, measure, write and print."""

    def tell(text: str) -> None:
        print(f"==> {text}", file=sys.stderr, flush=True)

    async with Lab(f"bench-{os.getpid()}", nodes=2, without=COMPONENTS) as lab:
        found = await measure(lab, endpoints, tell)
    found["measurements"] += [shown(item) for item in await attachments(pods, tell)]
    await asyncio.to_thread(write, found, report)
    print(table(found))
    print(f"\nreport: {report}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="bench-datapath", description=__doc__)
    parser.add_argument("--endpoints", type=int, default=10_000, help="endpoints of the network (%(default)s)")
    parser.add_argument("--pods", type=int, default=100, help="pods to attach (%(default)s)")
    parser.add_argument("--report", type=Path, default=Path("build/bench/datapath.json"), help="%(default)s")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.endpoints, arguments.pods, arguments.report))


if __name__ == "__main__":
    main()
