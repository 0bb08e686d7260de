"""A real guest: boots, gets its address, answers, and moves between two namespaces while connections run."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from vmnet.lab.guest.agent import GuestAgent
from vmnet.lab.guest.image import GuestImage, guest_image
from vmnet.lab.guest.probe import probe_binary
from vmnet.lab.virt import qemu
from vmnet.lab.virt.qemu import Accelerator, Machine
from vmnet.lab.virt.qmp import Qmp

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and tap devices need root"),
    pytest.mark.timeout(180),
]

MAC = "0a:58:c0:a8:00:05"
ADDRESS, SERVER = "192.168.0.5", "192.168.0.1"
PLUMB = "import json, dataclasses; from vmnet.lab.virt import plumbing; "
PLUMB += "print(json.dumps(dataclasses.asdict(plumbing.wire('ovn-udn1'))))"


@dataclass(frozen=True)
class Space:
    """A network namespace that a sleeping process keeps."""

    pid: int

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("nsenter", "-t", str(self.pid), "-n", "--")

    def ip(self, *lines: str) -> None:
        subprocess.run(
            [*self.prefix, "ip", "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True, timeout=20
        )

    def run(self, *argv: str) -> str:
        return subprocess.run([*self.prefix, *argv], check=True, capture_output=True, text=True, timeout=60).stdout


@contextmanager
def namespace() -> Iterator[Space]:
    holder = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        space = Space(holder.pid)
        space.ip("link set lo up")
        yield space
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()


@dataclass(frozen=True)
class Rig:
    """A segment with a DHCP server and traffic partner, and two pods that may run the guest."""

    server: Space
    pods: tuple[Space, Space]
    machines: tuple[Machine, Machine]


@pytest.fixture(scope="module")
def image() -> GuestImage:
    return guest_image()


@pytest.fixture(scope="module")
def accelerator(image: GuestImage) -> Accelerator:
    return qemu.choose_accelerator(image)


@contextmanager
def rig(image: GuestImage, accelerator: Accelerator, directory: Path) -> Iterator[Rig]:
    with namespace() as server, namespace() as first, namespace() as second:
        server.ip("link add br0 type bridge forward_delay 0 mcast_snooping 0", "link set br0 up")
        machines = []
        for number, pod in enumerate((first, second), start=1):
            server.ip(
                f"link add p{number} mtu 1450 type veth peer name ovn-udn1 address {MAC} mtu 1450 netns {pod.pid}"
            )
            server.ip(f"link set p{number} master br0 up")
            pod.ip(f"addr add {ADDRESS}/16 dev ovn-udn1", "link set ovn-udn1 up")
            wiring = json.loads(pod.run(sys.executable, "-c", PLUMB))
            assert wiring == {"interface": "ovn-udn1", "tap": "tap0", "mac": MAC, "mtu": 1450}
            machines.append(
                Machine(
                    name="blue",
                    directory=directory / f"pod{number}",
                    image=image,
                    accelerator=accelerator.name,
                    mac=MAC,
                    mtu=1450,
                    tap="tap0",
                )
            )
        server.ip(f"addr add {SERVER}/16 dev br0")
        yield Rig(server, (first, second), (machines[0], replace(machines[1], incoming=True)))


@asynccontextmanager
async def dhcp_server(server: Space, directory: Path) -> AsyncIterator[None]:
    configuration = directory / "udhcpd.conf"
    (directory / "leases").touch()
    configuration.write_text(
        f"start {ADDRESS}\nend {ADDRESS}\ninterface br0\nlease_file {directory}/leases\npidfile {directory}/pid\n"
        f"option subnet 255.255.0.0\noption router {SERVER}\noption dns {SERVER}\noption domain example.test\n"
        f"option search one.test two.test\noption mtu 1400\noption hostname azure\nstatic_lease {MAC} {ADDRESS}\n"
    )
    process = await asyncio.create_subprocess_exec(
        *server.prefix, "busybox", "udhcpd", "-f", str(configuration), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def probe(server: Space, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *server.prefix, str(probe_binary()), *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def result(process: asyncio.subprocess.Process) -> dict[str, object]:
    process.send_signal(signal.SIGTERM)
    output, _ = await asyncio.wait_for(process.communicate(), 20)
    return dict(json.loads(output.decode().splitlines()[-1]))


async def until(agent: GuestAgent, *argv: str, contains: str) -> str:
    async with asyncio.timeout(60):
        while True:
            answer = await agent.run(argv, timeout=10)
            if contains in answer.stdout:
                return answer.stdout
            await asyncio.sleep(0.1)


async def test_a_guest_boots_answers_and_moves(image: GuestImage, accelerator: Accelerator, tmp_path: Path) -> None:
    with rig(image, accelerator, tmp_path) as made:
        async with dhcp_server(made.server, tmp_path):
            await scenario(made, tmp_path)


async def scenario(made: Rig, tmp_path: Path) -> None:
    first, second = made.machines
    processes = []
    started = time.monotonic()
    try:
        processes.append(await qemu.start(first, made.pods[0].prefix))
        agent = GuestAgent(first.directory / qemu.AGENT_SOCKET)
        await agent.ready()
        print(f"agent answers after {time.monotonic() - started:.1f} s under {first.accelerator}")
        await configured_by_dhcp(agent)
        print(f"configured after {time.monotonic() - started:.1f} s")
        await console_answers(first.directory / qemu.CONSOLE_SOCKET)
        serving = await agent.start(["probe", "serve"])
        async with asyncio.timeout(20):
            while "serving" not in (await agent.poll(serving, wait=0.1)).stdout:
                pass
        processes.append(await qemu.start(second, made.pods[1].prefix))
        async with (
            probe(made.server, "serve"),
            probe(made.server, "udp", ADDRESS, "7007", "1000", "600") as echo,
            probe(made.server, "send", ADDRESS, "7008", "600") as into,
            probe(made.server, "receive", ADDRESS, "7009", "600") as out_of,
        ):
            job = await agent.start(["probe", "send", SERVER, "7008", "600"])
            await asyncio.sleep(1)  # traffic before the move
            pause = await migrate(first, second)
            agent.close()
            moved = GuestAgent(second.directory / qemu.AGENT_SOCKET)
            await asyncio.sleep(1)  # and after it
            guest_stream = await moved.finish(job)
            results = {"udp": await result(echo), "send": await result(into), "receive": await result(out_of)}
        print(f"pause {pause:.1f} ms, probe gap {results['udp']['longest_gap_ms']:.1f} ms")
        assert ADDRESS in (await moved.run(["ip", "-4", "addr", "show", "dev", "eth0"])).stdout
        moved.close()
        for stream in (results["send"], results["receive"], guest_stream):
            assert stream["resets"] == 0
            assert stream["errors"] == 0
            assert stream["bytes"] > 100_000
            assert stream["longest_gap_ms"] < 3000
        assert results["udp"]["received"] > 1000
        assert 0 < pause < 3000
        assert results["udp"]["longest_gap_ms"] < 3000
    finally:
        for process in processes:
            await qemu.end(process)


async def configured_by_dhcp(agent: GuestAgent) -> None:
    assert f"{ADDRESS}/16" in await until(agent, "ip", "-4", "addr", "show", "dev", "eth0", contains=ADDRESS)
    assert f"default via {SERVER}" in await until(agent, "ip", "route", contains="default")
    resolver = await until(agent, "cat", "/etc/resolv.conf", contains="nameserver")
    assert f"nameserver {SERVER}" in resolver
    assert "search one.test two.test" in resolver
    assert "mtu 1400" in (await agent.run(["ip", "link", "show", "eth0"])).stdout
    assert (await agent.run(["hostname"])).stdout == "azure\n"
    assert (await agent.run(["iperf3", "--version"])).exit == 0


async def console_answers(path: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b"echo $((6*7))-on-$(hostname)\n")
    await writer.drain()
    async with asyncio.timeout(20):
        await reader.readuntil(b"42-on-azure")
    writer.close()


async def migrate(first: Machine, second: Machine) -> float:
    """By a socket pair that stands for the nodes' network; returns the pause in milliseconds."""
    async with (
        await Qmp.connect(first.directory / qemu.QMP_SOCKET) as source,
        await Qmp.connect(second.directory / qemu.QMP_SOCKET) as target,
    ):
        here, there = socket.socketpair()
        with here, there:
            await qemu.receive(target, there)
            await qemu.send(source, here)
        assert await qemu.finished(source, 60) == "completed", await qemu.failure(source)
        stopped = await source.wait_for(lambda event: event.name == "STOP", 10)
        resumed = await target.wait_for(lambda event: event.name == "RESUME", 10)
        await source.execute("quit")
        return (resumed.time - stopped.time) * 1000


async def test_a_failed_migration_leaves_the_guest_running(
    image: GuestImage, accelerator: Accelerator, tmp_path: Path
) -> None:
    with rig(image, accelerator, tmp_path) as made:
        first, second = made.machines
        processes = [await qemu.start(first, made.pods[0].prefix), await qemu.start(second, made.pods[1].prefix)]
        try:
            async with GuestAgent(first.directory / qemu.AGENT_SOCKET) as agent:
                await agent.ready()
                async with (
                    await Qmp.connect(first.directory / qemu.QMP_SOCKET) as source,
                    await Qmp.connect(second.directory / qemu.QMP_SOCKET) as target,
                ):
                    here, there = socket.socketpair()
                    with here, there:
                        await qemu.receive(target, there)
                        # Slow enough that the target dies in the middle.
                        await qemu.send(source, here, qemu.Settings(bandwidth=2**20))
                    await source.wait_for(lambda event: qemu.is_migration(event, "active"), 20)
                    processes[1].kill()
                    assert await qemu.finished(source, 60) == "failed"
                    assert await qemu.failure(source) != "no message"
                    assert (await source.execute("query-status"))["status"] == "running"
                assert (await agent.run(["hostname"])).exit == 0
        finally:
            for process in processes:
                await qemu.end(process)
