"""The scenario of ``vmnet lab demo``: two VMs, one live-migrated while connections run, and a report of what was seen.

Every figure in the report comes from a guest, a capture, QEMU or the API; none is assumed.
"""

import asyncio
import json
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from vmnet.lab.errors import LabError
from vmnet.lab.guest.agent import GuestAgent
from vmnet.lab.lab import Lab
from vmnet.lab.report import Lookup, Report, Stream, show, write
from vmnet.lab.virt import subresources
from vmnet.model import names
from vmnet.model.names import NetworkId

MANIFEST: Final = Path(__file__).parent / "data" / "demo.yaml"
OUTSIDE_IPV4: Final = "172.30.0.100"
NETWORK: Final = "happy-tenant"
STALL_LIMIT_MS: Final = 3000
"""A stream that stood still for longer counts as broken."""
BOOT_SECONDS: Final = 90.0
RUN_ON_S: Final = 6
"""How long the streams go on after the migration: longer than STALL_LIMIT_MS, or a stall could hide in the end."""

BLUE_NAME: Final = "blue.blue-namespace.vm.cluster.local"
RED: Final = ("red-namespace", "red")
BLUE: Final = ("blue-namespace", "blue")

Step = Callable[[str], None]


class DemoError(LabError):
    """The scenario could not go on; the message says at which step and what was seen."""


async def run(lab: Lab, *, report: Path, step: Step) -> int:
    """Run the scenario on a lab that is up, write and print the report. 1 when something that must hold did not."""
    found = await Scenario(lab, step).run()
    await asyncio.to_thread(write, found, report)
    show(found, report)
    return 1 if found.problems else 0


@dataclass(slots=True)
class Capture:
    """tcpdump processes on one node and where they write."""

    node: str
    prefix: str
    processes: list[str] = field(default_factory=list)


class Scenario:
    """One run. ``step`` is told what happens now."""

    def __init__(self, lab: Lab, step: Step) -> None:
        self._lab = lab
        self._step = step
        self.report = Report()

    async def run(self) -> Report:
        """The whole scenario. Raises DemoError when a step cannot be done at all."""
        started = time.monotonic()
        await self.create()
        red, blue = await self.guest(*RED), await self.guest(*BLUE)
        report = self.report
        report.accelerator = self._lab.accelerator
        report.from_node = await self.vmi(*BLUE, "{.status.nodeName}")
        report.addresses_before = await self.addresses(blue)
        report.vmi_interfaces = json.loads(await self.vmi(*BLUE, "{.status.interfaces}") or "[]")
        report.claims = await self.claims()
        self._step("ping and names")
        await self._ping(red, report.addresses_before)
        report.gateway_mac_before = await self._gateway_mac(blue)
        report.dns += await self._lookups(red, report.addresses_before, "before")
        await self._migrate_under_traffic(red, blue)
        blue = await self.guest(*BLUE)
        report.addresses_after = await self.addresses(blue)
        report.gateway_mac_after = await self._gateway_mac(blue)
        report.dns += await self._lookups(red, report.addresses_after, "after the migration")
        await self._restart_elsewhere()
        report.claims = await self.claims()
        report.duration_s = round(time.monotonic() - started, 1)
        report.problems = self._judge()
        return report

    # Steps

    async def create(self) -> None:
        """Apply the demo's objects and wait for both machines."""
        self._step("apply the network and two VMs")
        await self._kubectl("apply", "-f", str(MANIFEST))
        await self._kubectl(
            "wait", f"clusteruserdefinednetwork/{NETWORK}", "--for=condition=NetworkReady", "--timeout=60s"
        )
        self._step("boot red and blue")
        for namespace, name in (RED, BLUE):
            await self.until(
                f"VirtualMachineInstance {namespace}/{name} exists", partial(self._exists, namespace, name)
            )
            await self._kubectl("wait", "-n", namespace, f"vmi/{name}", "--for=condition=Ready", "--timeout=120s")

    async def _migrate_under_traffic(self, red: GuestAgent, blue: GuestAgent) -> None:
        report = self.report
        target_address = next(text for text in report.addresses_before if "." in text).split("/")[0]
        self._step("start streams and a 1 kHz probe")
        await self.serve(blue)
        jobs = {
            "probe": await red.start(["probe", "--json-lines", "udp", target_address, "7007", "1000", "600"]),
            "red→blue": await red.start(["probe", "--json-lines", "send", target_address, "7008", "600"]),
            "blue→red": await red.start(["probe", "--json-lines", "receive", target_address, "7009", "600"]),
        }
        outside = await blue.start(["probe", "--json-lines", "send", OUTSIDE_IPV4, "7008", "600"])
        await self.until("the probe is answered", partial(self.all_run, red, list(jobs.values())))
        await self.until("blue sends to the outside host", partial(self.all_run, blue, [outside]))
        self._step(f"live-migrate blue away from {report.from_node}")
        started = time.monotonic()
        async with self._capture() as captured:
            await self.subresource(*BLUE, "migrate")
            await self.finished_migration()
            report.migration_s = round(time.monotonic() - started, 2)
            report.to_node = await self.vmi(*BLUE, "{.status.nodeName}")
            self._step(f"blue runs on {report.to_node}: let the streams run on")
            await asyncio.sleep(RUN_ON_S)  # the streams' own time: there is no event for "nothing happened"
        report.announcements = captured
        blue = await self.guest(*BLUE)
        results = {name: await red.finish(job) for name, job in jobs.items()}
        results["blue→outside"] = await blue.finish(outside)
        pause = await self.vmi(*BLUE, r"{.metadata.annotations.lab\.vmnet\.io/qemu-pause-ms}")
        report.qemu_pause_ms = float(pause) if pause else None
        probe = results.pop("probe")
        report.probe_gap_ms = probe["longest_gap_ms"]
        report.probes_sent, report.probes_lost = probe["sent"], probe["lost"]
        report.probes_duplicated = probe["duplicates"]
        for name, result in results.items():
            gap = float(result["longest_gap_ms"])
            fine = not result["resets"] and not result["errors"] and gap <= STALL_LIMIT_MS
            report.tcp_streams.append(Stream(name, int(result["bytes"]), int(result["resets"]), gap, fine))

    async def serve(self, guest: GuestAgent) -> None:
        """Start the far end of the streams in a guest, and wait until it listens."""
        job = await guest.start(["probe", "serve"])

        async def listens() -> bool:
            return "serving" in (await guest.poll(job)).stdout

        await self.until("the guest serves streams", listens)

    async def all_run(self, guest: GuestAgent, jobs: Sequence[str]) -> bool:
        """Every job has reported progress; one that ended already could not connect."""
        for job in jobs:
            state = await guest.poll(job)
            if not state.running:
                raise DemoError(f"a stream ended before it was needed: {state.stderr.strip() or state.stdout.strip()}")
            if not state.stdout:
                return False
        return True

    async def _restart_elsewhere(self) -> None:
        report = self.report
        self._step(f"stop blue, close {report.to_node}, start blue elsewhere")
        await self.subresource(*BLUE, "stop")
        await self._kubectl("wait", "-n", BLUE[0], f"vmi/{BLUE[1]}", "--for=delete", "--timeout=90s")
        await self._kubectl("cordon", report.to_node)
        await self.subresource(*BLUE, "start")
        await self.until("blue's new VirtualMachineInstance exists", lambda: self._exists(*BLUE))
        await self._kubectl("wait", "-n", BLUE[0], f"vmi/{BLUE[1]}", "--for=condition=Ready", "--timeout=120s")
        await self._kubectl("uncordon", report.to_node)
        report.restarted_on = await self.vmi(*BLUE, "{.status.nodeName}")
        report.addresses_after_restart = await self.addresses(await self.guest(*BLUE))

    def _judge(self) -> list[str]:
        report = self.report
        problems = []
        for what, addresses in (
            ("migration", report.addresses_after),
            ("stop and start", report.addresses_after_restart),
        ):
            if addresses != report.addresses_before:
                problems.append(f"addresses changed over {what}: {report.addresses_before} → {addresses}")
        if report.to_node == report.from_node:
            problems.append(f"blue is still on {report.from_node}")
        if report.restarted_on == report.to_node:
            problems.append(f"blue started again on {report.to_node}, which was closed")
        if report.gateway_mac_before != report.gateway_mac_after:
            problems.append(f"gateway MAC changed: {report.gateway_mac_before} → {report.gateway_mac_after}")
        problems += [
            f"stream {stream.name}: {stream.resets} resets, longest gap {stream.longest_gap_ms:.0f} ms"
            for stream in report.tcp_streams
            if not stream.survived
        ]
        problems += [f"{item.where}: {item.name} {item.type} gave {item.answer}" for item in report.dns if not item.ok]
        if report.probe_gap_ms is None or report.probe_gap_ms > STALL_LIMIT_MS:
            problems.append(f"the 1 kHz probe stood still for {report.probe_gap_ms} ms")
        return problems

    # Looking

    async def addresses(self, guest: GuestAgent) -> list[str]:
        """Global addresses of the guest's interface, from the guest, once both families are there."""

        async def found() -> list[str]:
            result = await guest.run(["ip", "-o", "addr", "show", "dev", "eth0", "scope", "global"], timeout=10)
            return sorted(re.findall(r"inet6? (\S+)", result.stdout))

        async def both() -> list[str]:
            addresses = await found()
            return addresses if len(addresses) >= 2 else []

        return list(await self.until("the guest has IPv4 and IPv6", both))

    async def _gateway_mac(self, guest: GuestAgent) -> str:
        """The gateway's MAC in the guest's own neighbour table."""

        async def found() -> str:
            await guest.run(["ping", "-c", "1", "-W", "2", "192.168.0.1"], timeout=10)
            result = await guest.run(["ip", "neigh", "show", "192.168.0.1"], timeout=10)
            match = re.search(r"lladdr (\S+)", result.stdout)
            return match.group(1) if match else ""

        return str(await self.until("the guest knows its gateway's MAC", found))

    async def _ping(self, guest: GuestAgent, addresses: Sequence[str]) -> None:
        for text in addresses:
            address = text.split("/")[0]

            async def answered(address: str = address) -> bool:
                family = "-6" if ":" in address else "-4"
                return (await guest.run(["ping", family, "-c", "1", "-W", "2", address], timeout=10)).exit == 0

            await self.until(f"red pings {address}", answered)

    async def _lookups(self, guest: GuestAgent, addresses: Sequence[str], when: str) -> list[Lookup]:
        """A, AAAA and PTR of blue, asked by red with the resolver configuration that it was given."""
        lookups = []
        for text in addresses:
            address = text.split("/")[0]
            kind = "AAAA" if ":" in address else "A"
            result = await guest.run(["probe", "resolve", "blue.blue-namespace", kind], timeout=30)
            lookups.append(Lookup(f"red, {when}", "blue.blue-namespace", kind, address, result.stdout.split()))
            result = await guest.run(["probe", "resolve", address, "PTR"], timeout=30)
            lookups.append(Lookup(f"red, {when}", address, "PTR", BLUE_NAME, result.stdout.split()))
        return lookups

    async def claims(self) -> list[dict[str, Any]]:
        """Every IPAMClaim: name, network, addresses and owner pod."""
        items = json.loads(await self._kubectl("get", "ipamclaims", "-A", "-o", "json"))["items"]
        return [
            {
                "name": f"{item['metadata']['namespace']}/{item['metadata']['name']}",
                "network": item["spec"]["network"],
                "ips": item.get("status", {}).get("ips", []),
                "owner_pod": item.get("status", {}).get("ownerPod", {}).get("name"),
            }
            for item in items
        ]

    @asynccontextmanager
    async def _capture(self) -> AsyncIterator[dict[str, int]]:
        """Count announcements on the wire while the block runs; the dict is filled when it ends.

        Each node that blue may move to is watched from the moment it has the network: peers' announcements are counted
        where the target sends them (``vx0``), the guest's router advertisements where it receives them (its port).
        """
        counted: dict[str, int] = {}
        mac = await self.vmi(*BLUE, "{.status.interfaces[0].mac}")
        network_id = await self._kubectl(
            "get", "cudn", NETWORK, "-o", r"jsonpath={.metadata.annotations.k8s\.ovn\.org/network-id}"
        )
        namespace = names.network_namespace(NetworkId(int(network_id)))
        candidates = [node for node in await self._nodes() if node != self.report.from_node]
        watching = [
            asyncio.create_task(self._capture_on(node, namespace), name=f"capture-{node}") for node in candidates
        ]
        try:
            yield counted
            target = self.report.to_node
            for number, node in enumerate(candidates):
                if node == target:
                    counted.update(await self._count(await watching[number], mac))
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)

    async def _nodes(self) -> list[str]:
        hosts = [host["name"] for host in (await self._lab.status())["hosts"]]
        return [name for name in hosts if name not in ("fabric", "outside")]

    async def _capture_on(self, node: str, namespace: str) -> Capture:
        """Capture in a network's namespace on one node, as soon as the network and blue's port are there."""
        await self.until(
            f"{node} has the network", lambda: self._succeeds(node, ["test", "-e", f"/run/netns/{namespace}"])
        )
        port = await self.until(f"{node} has blue's port", lambda: self._target_port(node))
        enter = ["nsenter", f"--net=/run/netns/{namespace}"]
        await self.until(
            f"{port} is up on {node}",
            lambda: self._succeeds(node, [*enter, "test", "-e", f"/proc/sys/net/ipv4/conf/{port}"]),
        )
        capture = Capture(node, f"{self._lab.directory.path}/capture-{node}")
        for interface, direction in (("vx0", "out"), (port, "out")):
            file = f"{capture.prefix}-{'fabric' if interface == 'vx0' else 'guest'}.pcap"
            log = await self._lab.spawn(
                f"capture-{node}-{interface}",
                node,
                [*enter, "tcpdump", "-n", "-U", "-i", interface, "-Q", direction, "-w", file, "arp or icmp6"],
            )
            await self.until(f"tcpdump listens on {interface} of {node}", partial(_contains, log, "listening on"))
            capture.processes.append(f"capture-{node}-{interface}")
        return capture

    async def _target_port(self, node: str) -> str:
        """Port of blue's launcher pod on a node, empty while there is none."""
        pods = json.loads(
            await self._kubectl("get", "pods", "-n", BLUE[0], "-l", "kubevirt.io=virt-launcher", "-o", "json")
        )["items"]
        for pod in pods:
            if pod["spec"].get("nodeName") == node and pod["status"].get("phase") in ("Pending", "Running"):
                return str(names.port_interface(pod["metadata"]["uid"], names.PRIMARY_INTERFACE))
        return ""

    async def _count(self, capture: Capture, mac: str) -> dict[str, int]:
        for process in capture.processes:
            await self._lab.kill(process, signal.SIGINT)
            await self._lab.wait(process)
        filters = {
            "garp": ("fabric", f"arp.isgratuitous && eth.src == {mac}"),
            "na": ("fabric", f"icmpv6.type == 136 && eth.src == {mac}"),
            "ra": ("guest", f"icmpv6.type == 134 && eth.dst == {mac}"),
        }
        found = {}
        for kind, (where, expression) in filters.items():
            file = f"{capture.prefix}-{where}.pcap"
            result = await self._lab.exec("fabric", ["tshark", "-n", "-r", file, "-Y", expression], timeout=60)
            if result.exit:
                raise DemoError(f"tshark cannot read {file}: {result.stderr.strip()}")
            found[kind] = len(result.stdout.splitlines())
        return found

    # Tools

    async def _kubectl(self, *arguments: str) -> str:
        return await self._lab.kubectl(*arguments)

    async def vmi(self, namespace: str, name: str, path: str) -> str:
        """One JSONPath of a VirtualMachineInstance."""
        return (await self._kubectl("get", "-n", namespace, "vmi", name, "-o", f"jsonpath={path}")).strip()

    async def _exists(self, namespace: str, name: str) -> bool:
        return bool(
            (await self._kubectl("get", "-n", namespace, "vmi", name, "--ignore-not-found", "-o", "name")).strip()
        )

    async def _succeeds(self, host: str, argv: Sequence[str]) -> bool:
        return (await self._lab.exec(host, argv)).exit == 0

    async def guest(self, namespace: str, name: str) -> GuestAgent:
        """Command agent of the guest, in the pod that runs it now. Raises DemoError when none comes to run it."""
        agent: GuestAgent = await self.until(
            f"a launcher pod runs {namespace}/{name} on its node", partial(self._running_guest, namespace, name)
        )
        await agent.ready(BOOT_SECONDS)  # a machine is Ready when QEMU runs; its guest boots then
        return agent

    async def _running_guest(self, namespace: str, name: str) -> GuestAgent | None:
        """None also while machine and pods are read at either side of a move."""
        node = await self.vmi(namespace, name, "{.status.nodeName}")
        pods = json.loads(
            await self._kubectl("get", "pods", "-n", namespace, "-l", "kubevirt.io=virt-launcher", "-o", "json")
        )
        for pod in pods["items"]:
            runs = pod["spec"].get("nodeName") == node and pod["status"].get("phase") == "Running"
            if runs and pod["metadata"]["annotations"].get(names.DOMAIN_ANNOTATION) == name:
                return GuestAgent(self._lab.pod_directory(pod["metadata"]["uid"]) / "agent.sock")
        return None

    async def subresource(self, namespace: str, name: str, verb: str) -> None:
        """What ``virtctl`` sends: PUT with an empty JSON object. An external API may have nobody who answers that."""
        groups = json.loads(await self._kubectl("get", "--raw", "/apis"))["groups"]
        if all(group["name"] != subresources.GROUP for group in groups):
            await subresources.on_machine(self._lab.kubeconfig, namespace, name, verb)
            return
        path = f"/apis/subresources.kubevirt.io/v1/namespaces/{namespace}/virtualmachines/{name}/{verb}"
        await self._lab.kubectl("replace", "--raw", path, "-f", "-", stdin="{}")

    async def finished_migration(self) -> None:
        """Wait until every migration of blue has succeeded. Raises DemoError when one failed."""

        async def finished() -> str:
            items = json.loads(await self._kubectl("get", "vmim", "-n", BLUE[0], "-o", "json"))["items"]
            phases = [item.get("status", {}).get("phase", "") for item in items]
            if "Failed" in phases:
                reason = await self.vmi(*BLUE, "{.status.migrationState.failureReason}")
                raise DemoError(f"the migration failed: {reason or 'KubeVirt gave no reason'}")
            return "yes" if phases and set(phases) == {"Succeeded"} else ""

        await self.until("the migration is over", finished, timeout=120)

    async def until(self, what: str, look: Callable[[], Awaitable[Any]], *, timeout: float = 60) -> Any:
        """Look until there is something. Raises DemoError that says what did not come."""
        deadline = time.monotonic() + timeout
        while True:
            value = await look()
            if value:
                return value
            if time.monotonic() > deadline:
                raise DemoError(f"waited {timeout:.0f} s in vain until {what}")
            await asyncio.sleep(0.1)


async def _contains(path: Path, text: str) -> bool:
    return text in await asyncio.to_thread(path.read_text, errors="replace")
