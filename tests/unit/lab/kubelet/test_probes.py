"""Probes: attempts against real servers, thresholds with real but short periods."""

import asyncio
from collections.abc import Sequence

import pytest
from aiohttp import web

from vmnet.lab.kubelet import probes
from vmnet.lab.kubelet.probes import ProbeSettings


async def no_exec(words: Sequence[str], timeout: float) -> tuple[int, str]:
    raise AssertionError(words)


async def test_http_and_tcp() -> None:
    async def answer(request: web.Request) -> web.Response:
        good = request.headers.get("X-Probe") == "yes" and request.path == "/healthz"
        return web.Response(status=204 if good else 503)

    application = web.Application()
    application.add_routes([web.get("/{tail:.*}", answer)])
    runner = web.AppRunner(application, handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    container = {"ports": [{"name": "web", "containerPort": port}]}
    headers = [{"name": "X-Probe", "value": "yes"}]
    good = {"httpGet": {"port": "web", "path": "healthz", "httpHeaders": headers}}
    assert await probes.attempt(good, container, "127.0.0.1", no_exec) is None
    assert await probes.attempt({"httpGet": {"port": port}}, container, "127.0.0.1", no_exec) == "HTTP status 503"
    assert await probes.attempt({"tcpSocket": {"port": port}}, container, "127.0.0.1", no_exec) is None
    await runner.cleanup()
    for closed in ({"tcpSocket": {"port": port}}, {"httpGet": {"port": port}}):
        assert await probes.attempt(closed, container, "127.0.0.1", no_exec)
    assert "no port named 'x'" in (await probes.attempt({"httpGet": {"port": "x"}}, container, "::1", no_exec) or "")


async def test_exec() -> None:
    async def execute(words: Sequence[str], timeout: float) -> tuple[int, str]:
        assert list(words) == ["test", "-e", "x"]
        return 1, "no x\n"

    probe = {"exec": {"command": ["test", "-e", "x"]}}
    assert await probes.attempt(probe, {}, "", execute) == "exit status 1: no x"


async def test_an_attempt_has_a_time_limit() -> None:
    async def execute(words: Sequence[str], timeout: float) -> tuple[int, str]:
        await asyncio.sleep(30)
        return 0, ""

    assert await probes.attempt({"exec": {}, "timeoutSeconds": 0.05}, {}, "", execute) == "no answer within 0.05 s"


async def test_a_probe_of_an_unknown_kind_fails() -> None:
    assert "knows exec" in (await probes.attempt({"grpc": {"port": 1}}, {}, "", no_exec) or "")


@pytest.mark.parametrize(
    ("script", "ready", "expected"),
    [
        ("++", False, [True]),
        ("--", True, []),
        ("---", True, [False]),
        ("--+--", True, []),
        ("+++---", False, [True, False]),
        ("------", True, [False]),
        ("+-+-+-", False, []),
    ],
)
async def test_thresholds(script: str, ready: bool, expected: list[bool]) -> None:
    results: list[bool] = []
    attempts = iter(script)
    over = asyncio.Event()

    async def once() -> str | None:
        mark = next(attempts, None)
        if mark is None:
            over.set()
            await asyncio.sleep(30)
        return None if mark == "+" else "why"

    settings = ProbeSettings(initial_delay=0, period=0, timeout=1, successes=2, failures=3)
    watching = asyncio.ensure_future(probes.watch(settings, once, lambda good, _: results.append(good), ready))
    await asyncio.wait_for(over.wait(), 5)
    watching.cancel()
    assert results == expected


def test_defaults_are_the_apis() -> None:
    assert ProbeSettings.of({}) == ProbeSettings(0, 10, 1, 1, 3)
