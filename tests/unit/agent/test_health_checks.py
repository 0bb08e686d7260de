"""Health checks of Services, asked by HTTP."""

import asyncio
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest

from vmnet.agent.health_checks import HealthCheck, HealthChecks


class World:
    def __init__(self) -> None:
        self.healthy = True
        self.checks = HealthChecks(lambda: self.healthy, host="127.0.0.1")

    async def ask(self, port: int, path: str = "/") -> tuple[int, str, object]:
        """Status, weight and body."""
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session,
            session.get(f"http://127.0.0.1:{port}{path}") as reply,
        ):
            assert reply.headers["Content-Type"].startswith("application/json")
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            return reply.status, reply.headers["X-Load-Balancing-Endpoint-Weight"], await reply.json()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.checks.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def body(name: str, endpoints: int, *, healthy: bool = True) -> dict[str, object]:
    service = {"namespace": "red", "name": name}
    return {"service": service, "localEndpoints": endpoints, "serviceProxyHealthy": healthy}


async def test_the_node_answers_200_where_it_has_endpoints_and_503_where_it_has_none(world: World) -> None:
    web, other = free_port(), free_port()
    assert await world.checks.follow({web: HealthCheck("red", "web", 2), other: HealthCheck("red", "other", 0)})
    assert await world.ask(web) == (200, "2", body("web", 2))
    assert await world.ask(web, "/healthz") == (200, "2", body("web", 2))
    assert await world.ask(other) == (503, "0", body("other", 0))
    await world.checks.follow({web: HealthCheck("red", "web", 0), other: HealthCheck("red", "other", 1)})
    assert await world.ask(web) == (503, "0", body("web", 0))
    assert await world.ask(other) == (200, "1", body("other", 1))
    world.healthy = False
    assert await world.ask(other) == (503, "1", body("other", 1, healthy=False))


async def test_a_service_that_goes_is_listened_for_no_longer(world: World) -> None:
    port = free_port()
    await world.checks.follow({port: HealthCheck("red", "web", 1)})
    await world.ask(port)
    assert await world.checks.follow({})
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_port_that_somebody_has_is_left_to_them_until_they_go(world: World) -> None:
    wanted = {}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        wanted[port] = HealthCheck("red", "web", 1)
        assert not await world.checks.follow(wanted)
        assert not await world.checks.follow(wanted)
    assert await world.checks.follow(wanted)
    assert (await world.ask(port))[0] == 200
