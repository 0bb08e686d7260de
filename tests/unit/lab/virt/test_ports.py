"""Many clients on the one console and agent port that QEMU offers."""

import asyncio
from pathlib import Path

from vmnet.lab.guest.agent import GuestAgent
from vmnet.lab.guest.probe import probe_binary
from vmnet.lab.virt.ports import AgentPort, Console
from vmnet.runtime.tasks import TaskScope


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with asyncio.timeout(10):
        while True:
            try:
                return await asyncio.open_unix_connection(str(path))
            except OSError:
                await asyncio.sleep(0.01)


async def test_console_has_many_clients_and_a_memory(tmp_path: Path) -> None:
    guests: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    server = await asyncio.start_unix_server(lambda *pair: guests.put_nowait(pair), str(tmp_path / "q"))
    async with server, TaskScope() as scope, asyncio.timeout(20):
        scope.start(Console().run(tmp_path / "q", tmp_path / "c"), "console")
        guest_reader, guest_writer = await guests.get()
        one, one_writer = await connect(tmp_path / "c")
        guest_writer.write(b"booted\n")
        assert await one.readexactly(7) == b"booted\n"
        two, two_writer = await connect(tmp_path / "c")
        assert await two.readexactly(7) == b"booted\n"
        one_writer.write(b"a")
        assert await guest_reader.readexactly(1) == b"a"
        two_writer.write(b"b")
        assert await guest_reader.readexactly(1) == b"b"
        guest_writer.write(b"both")
        assert await one.readexactly(4) == await two.readexactly(4) == b"both"
        for writer in (guest_writer, one_writer, two_writer):
            writer.close()


async def test_agents_do_not_hear_each_other(tmp_path: Path) -> None:
    guest = await asyncio.create_subprocess_exec(str(probe_binary()), "agent", "--listen", str(tmp_path / "q"))
    try:
        async with TaskScope() as scope:
            scope.start(AgentPort().run(tmp_path / "q", tmp_path / "a"), "agent port")
            agents = [GuestAgent(tmp_path / "a") for _ in range(3)]
            for agent in agents:
                await agent.ready(10)
            results = await asyncio.gather(
                *(agent.run(["sh", "-c", f"sleep 0.1; echo {number}"]) for number, agent in enumerate(agents))
            )
            assert [result.stdout for result in results] == ["0\n", "1\n", "2\n"]
            for agent in agents:
                agent.close()
    finally:
        guest.terminate()
        await guest.wait()
