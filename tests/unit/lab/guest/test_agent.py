"""The agent's protocol against the real agent program, on a Unix socket instead of a virtio port."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from vmnet.lab.guest.agent import AgentError, GuestAgent
from vmnet.lab.guest.probe import probe_binary


@asynccontextmanager
async def running(path: Path) -> AsyncIterator[GuestAgent]:
    process = await asyncio.create_subprocess_exec(str(probe_binary()), "agent", "--listen", str(path))
    try:
        async with GuestAgent(path) as agent:
            await agent.ready(timeout=10)
            yield agent
    finally:
        process.terminate()
        await process.wait()


async def test_output_and_exit_status(tmp_path: Path) -> None:
    async with running(tmp_path / "a") as agent:
        result = await agent.run(["sh", "-c", "echo out; echo 'e r r' >&2; exit 3"])
        assert (result.exit, result.stdout, result.stderr) == (3, "out\n", "e r r\n")


async def test_arguments_arrive_unchanged(tmp_path: Path) -> None:
    words = ["", "a b", "%41", "ü\n", "'"]
    async with running(tmp_path / "a") as agent:
        result = await agent.run(["printf", "<%s>", *words])
        assert result.stdout == "".join(f"<{word}>" for word in words)


async def test_input_and_long_output(tmp_path: Path) -> None:
    text = "ä line of text\n" * 20000
    async with running(tmp_path / "a") as agent:
        assert (await agent.run(["cat"], input=text)).stdout == text


async def test_unknown_program(tmp_path: Path) -> None:
    async with running(tmp_path / "a") as agent:
        assert (await agent.run(["/no/such"])).exit == 127


async def test_timeout_kills(tmp_path: Path) -> None:
    async with running(tmp_path / "a") as agent:
        with pytest.raises(AgentError, match="not done within"):
            await agent.run(["sleep", "60"], timeout=0.3)


async def test_many_at_once(tmp_path: Path) -> None:
    async with running(tmp_path / "a") as agent:
        results = await asyncio.gather(*(agent.run(["sh", "-c", f"sleep 0.2; echo {n}"]) for n in range(20)))
        assert [item.stdout for item in results] == [f"{n}\n" for n in range(20)]


async def test_a_job_outlives_the_connection(tmp_path: Path) -> None:
    async with running(tmp_path / "a") as agent:
        program = "trap 'echo {\\\"ended\\\":true}; exit' TERM; echo ready; while :; do sleep 0.05; done"
        job = await agent.start(["sh", "-c", program])
        async with asyncio.timeout(10):
            while (await agent.poll(job, wait=0.05)).stdout != "ready\n":
                pass
        agent.close()
        async with GuestAgent(tmp_path / "a") as other:
            assert (await other.poll(job)).running
            assert await other.finish(job) == {"ended": True}
            with pytest.raises(AgentError, match="no such job"):
                await other.poll(job)


async def test_a_cut_line_is_repeated(tmp_path: Path) -> None:
    async with running(tmp_path / "a") as agent:
        agent.close()
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "a"))
        writer.write(b"x start half")
        await writer.drain()
        writer.close()
        del reader
        assert (await agent.run(["echo", "fine"])).stdout == "fine\n"


async def test_nobody_there(tmp_path: Path) -> None:
    async with GuestAgent(tmp_path / "nothing") as agent:
        with pytest.raises(AgentError, match="no answer from the guest"):
            await agent.ready(timeout=0.3)
