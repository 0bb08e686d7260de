"""The stand-in as a process: what it answers on its ports, and how it ends."""

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import aiohttp
import pytest

from vmnet.lab.kubelet import agnhost

Start = Callable[..., Coroutine[Any, Any, asyncio.subprocess.Process]]
PATIENCE = 60


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET6, kind) as probe:
        probe.bind(("::", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    started: list[asyncio.subprocess.Process] = []

    async def begin(*words: str) -> asyncio.subprocess.Process:
        argv = (sys.executable, "-m", "vmnet.lab.kubelet.agnhost", *words)
        started.append(await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE))
        return started[-1]

    yield begin
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    """Status and text, once it serves."""
    async with asyncio.timeout(PATIENCE), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"http://{host}:{port}{path}") as answer:
                    return answer.status, await answer.text()
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.05)


async def test_http(start: Start) -> None:
    port = free_port()
    process = await start("netexec", f"--http-port={port}", "--udp-port=-1")
    assert await get(port, "/hostname") == (200, socket.gethostname())
    assert (await get(port, "/clientip"))[1].startswith("127.0.0.1:")
    assert (await get(port, "/clientip", "[::1]"))[1].startswith("[::1]:")
    assert await get(port, "/healthz") == (200, "")
    assert await get(port, "/echo?msg=hello&code=503") == (503, "hello")
    assert (await get(port, "/echo?code=9"))[0] == 400
    assert (await get(port, "/nothing"))[0] == 404
    answer = json.loads((await get(port, f"/dial?host=127.0.0.1&port={port}&request=echo?msg=x&tries=2"))[1])
    assert answer == {"responses": ["x", "x"]}
    answer = json.loads((await get(port, f"/dial?host=127.0.0.1&port={free_port()}&request=hostname"))[1])
    assert len(answer["errors"]) == 1
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), PATIENCE) == 0


async def test_the_exit_status_is_the_one_that_was_asked_for(start: Start) -> None:
    port = free_port()
    process = await start("netexec", f"--http-port={port}", "--udp-port=-1")
    assert (await get(port, "/exit?code=7"))[0] == 200
    assert await asyncio.wait_for(process.wait(), PATIENCE) == 7


async def test_udp_is_answered_by_the_same_words(start: Start) -> None:
    port, datagrams = free_port(), free_port(socket.SOCK_DGRAM)
    await start("netexec", f"--http-port={port}", f"--udp-port={datagrams}")
    await get(port, "/healthz")
    for request, expected in (("hostname", socket.gethostname()), ("echo%20a%20b", "a b")):
        path = f"/dial?host=127.0.0.1&port={datagrams}&request={request}&protocol=udp"
        assert json.loads((await get(port, path))[1]) == {"responses": [expected]}


async def test_two_instances_share_an_address_by_their_ports(start: Start) -> None:
    first, second = free_port(), free_port()
    await start("netexec", f"--http-port={first}", "--udp-port=-1")
    await start("netexec", f"--http-port={second}", "--udp-port=-1")
    assert (await get(first, "/healthz"))[0] == (await get(second, "/healthz"))[0] == 200


async def test_a_port_that_is_taken_ends_it(start: Start) -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6) as taken:
        process = await start("netexec", f"--http-port={taken.getsockname()[1]}", "--udp-port=-1")
        _, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode != 0
    assert b"in use" in errors


async def test_sctp_is_served_where_the_kernel_has_it(start: Start) -> None:
    port, messages = free_port(), free_port()
    process = await start("netexec", f"--http-port={port}", "--udp-port=-1", f"--sctp-port={messages}")
    try:
        asking = socket.socket(socket.AF_INET, socket.SOCK_STREAM, agnhost.IPPROTO_SCTP)
    except OSError:
        _, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert process.returncode != 0
        assert b"Protocol not supported" in errors
        return
    await get(port, "/healthz")
    asking.setblocking(False)
    loop = asyncio.get_running_loop()
    with asking:
        async with asyncio.timeout(PATIENCE):
            await loop.sock_connect(asking, ("127.0.0.1", messages))
            await loop.sock_sendall(asking, b"echo hello")
            assert await loop.sock_recv(asking, 100) == b"hello"


def test_the_ports_default_to_the_images() -> None:
    found = agnhost.parser().parse_args(["netexec"])
    assert (found.http_port, found.udp_port, found.sctp_port) == (8080, 8081, -1)


@pytest.mark.parametrize(
    ("message", "expected"), [(b"echo hi there\n", b"hi there"), (b"clientip", b"10.0.0.1:5"), (b"nonsense", b"")]
)
def test_words(message: bytes, expected: bytes) -> None:
    assert agnhost.reply_to(message, ("::ffff:10.0.0.1", 5)) == expected
