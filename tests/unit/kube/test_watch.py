"""The list-watch and the client against a server that does everything wrong, over real sockets."""

import asyncio
import json
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from vmnet.kube.api import PODS, VMIS, EventType, NotFound, Object, PatchType, Resource, Unavailable, WatchEvent
from vmnet.kube.client import KubeClient
from vmnet.kube.fake import FakeKube
from vmnet.kube.watch import ListWatch
from vmnet.runtime.backoff import Backoff

DEADLINE = 20
QUICK = Backoff(first=0.01, most=0.05)

Step = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.005)


def pod(name: str, version: int, **labels: str) -> Object:
    return {
        "metadata": {
            "name": name,
            "namespace": "red",
            "uid": f"uid-{name}",
            "resourceVersion": str(version),
            "labels": labels,
        }
    }


def line(kind: str, item: Object) -> bytes:
    return json.dumps({"type": kind, "object": item}).encode() + b"\n"


def status(code: int, reason: str) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": reason,
    }


class BadServer:
    """Answers lists from ``items`` and each watch with the next step of ``script``; the last step repeats."""

    def __init__(self) -> None:
        self.items: list[Object] = []
        self.version = 1
        self.script: list[Step] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.list_step: Step | None = None
        self.url = ""
        self.released = asyncio.Event()

    @property
    def lists(self) -> int:
        return sum(1 for kind, query in self.requests if kind == "list" and "continue" not in query)

    @property
    def watches(self) -> list[dict[str, str]]:
        return [query for kind, query in self.requests if kind == "watch"]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        if query.get("watch"):
            self.requests.append(("watch", query))
            step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            return await step(request)
        self.requests.append(("list", query))
        if self.list_step is not None:
            return await self.list_step(request)
        limit, start = int(query.get("limit", "500")), int(query.get("continue", "0"))
        page = self.items[start : start + limit]
        metadata: dict[str, Any] = {"resourceVersion": str(self.version)}
        if start + limit < len(self.items):
            metadata["continue"] = str(start + limit)
        return web.json_response({"kind": "PodList", "metadata": metadata, "items": page})

    # Steps.

    def events(self, *lines: bytes, then: Step | None = None) -> Step:
        async def step(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            for data in lines:
                await response.write(data)
            if then is not None:
                await then(request)
            return response

        return step

    async def silence(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if not request._payload_writer.output_size:
            await response.prepare(request)
        await self.released.wait()
        return response

    async def reset(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        sock = request.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
        return web.Response()

    def answer(self, code: int, body: object) -> Step:
        async def step(request: web.Request) -> web.StreamResponse:
            if isinstance(body, str):
                return web.Response(status=code, text=body)
            return web.json_response(body, status=code)

        return step


@pytest.fixture
async def server() -> AsyncIterator[BadServer]:
    bad = BadServer()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", bad.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    bad.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    yield bad
    bad.released.set()
    await runner.cleanup()


class Following:
    """A running list-watch and what its handler saw."""

    def __init__(self, watch: ListWatch) -> None:
        self.watch = watch
        self.seen: list[tuple[str, str]] = []
        watch.add_handler(self._changed)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        word = "added" if old is None else "deleted" if new is None else "changed"
        item = new or old
        assert item is not None
        self.seen.append((word, item["metadata"]["name"]))


@pytest.fixture
async def follow(server: BadServer) -> AsyncIterator[Callable[..., Awaitable[Following]]]:
    stops: list[Callable[[], Awaitable[None]]] = []

    async def begin(resource: Resource = PODS, *, silence: float = 30.0, **options: Any) -> Following:
        client = KubeClient(
            server.url, user_agent="test", request_seconds=5, watch_seconds=silence, watch_grace_seconds=0.1
        )
        options = {"backoff": QUICK, "missing_backoff": QUICK} | options
        following = Following(ListWatch(client, resource, **options))
        task = asyncio.create_task(following.watch.run())

        async def stop() -> None:
            server.released.set()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await client.close()

        stops.append(stop)
        return following

    yield begin
    for stop in stops:
        await stop()


async def test_pages_events_and_bookmarks(server: BadServer, follow: Callable[..., Awaitable[Following]]) -> None:
    server.items = [pod(f"p{number}", number) for number in range(1, 1202)]
    server.version = 2000
    server.script = [
        server.events(
            line("MODIFIED", pod("p1", 2001)),
            line("MODIFIED", pod("p1", 2001)),
            line("DELETED", pod("p2", 2002)),
            line("ADDED", pod("new", 2003)),
            line("BOOKMARK", {"metadata": {"resourceVersion": "2010"}}),
        ),
        server.silence,
    ]
    following = await follow()
    await until(lambda: len(server.watches) == 2)
    assert following.watch.synced.is_set()
    assert sum(1 for kind, _ in server.requests if kind == "list") == 3
    assert following.seen[1201:] == [("changed", "p1"), ("deleted", "p2"), ("added", "new")]
    assert server.watches[0]["resourceVersion"] == "2000"
    assert server.watches[0]["allowWatchBookmarks"] == "true"
    assert server.watches[1]["resourceVersion"] == "2010"
    assert len(list(following.watch.items())) == 1201
    assert following.watch.get("red/p1") == pod("p1", 2001) | {"apiVersion": "v1", "kind": "Pod"}
    assert following.watch.failure is None


GONE = status(410, "Expired")


@pytest.mark.parametrize("how", ["stream", "http"])
async def test_an_expired_version_lists_again_and_finds_deletions(
    how: str, server: BadServer, follow: Callable[..., Awaitable[Following]]
) -> None:
    server.items = [pod("stays", 1), pod("goes", 2), pod("changes", 3), pod("again", 4)]
    expired = server.events(line("ERROR", GONE)) if how == "stream" else server.answer(410, GONE)

    async def first(request: web.Request) -> web.StreamResponse:
        server.version = 9
        again = pod("again", 8)
        again["metadata"]["uid"] = "another"
        server.items = [pod("stays", 1), pod("changes", 7), again]
        return await expired(request)

    server.script = [first, server.silence]
    following = await follow()
    await until(lambda: len(server.watches) == 2)
    assert server.lists == 2
    assert server.watches[1]["resourceVersion"] == "9"
    assert following.seen[4:] == [
        ("deleted", "goes"),
        ("changed", "changes"),
        ("deleted", "again"),
        ("added", "again"),
    ]


@pytest.mark.parametrize(
    "how", ["eof", "reset", "plain 500", "status 503", "html 200", "half event", "410 for ever", "events and eof"]
)
async def test_a_bad_watch_never_spins(
    how: str, server: BadServer, follow: Callable[..., Awaitable[Following]]
) -> None:
    server.items = [pod("red", 1)]
    steps = {
        "eof": server.events(),
        "reset": server.events(line("ADDED", pod("blue", 5)), then=server.reset),
        "plain 500": server.answer(500, "upstream connect error"),
        "status 503": server.answer(503, status(503, "ServiceUnavailable")),
        "html 200": server.answer(200, "<html>proxy login</html>"),
        "half event": server.events(b'{"type": "ADDED", "obj'),
        "410 for ever": server.events(line("ERROR", GONE)),
        "events and eof": server.events(line("BOOKMARK", {"metadata": {"resourceVersion": "6"}})),
    }
    server.script = [steps[how]]
    following = await follow(backoff=Backoff(first=0.05, most=0.4, jitter=0))
    await until(lambda: len(server.watches) == 5)
    server.requests.clear()
    # Four failures in a row: at 0.2 to 0.4 s each, one second has room for no more than five.
    await asyncio.sleep(1)
    assert 1 <= len(server.watches) <= 6, Counter(kind for kind, _ in server.requests)
    assert following.watch.synced.is_set()
    assert following.watch.get("red/red") is not None
    if how in ("plain 500", "status 503", "html 200", "half event"):
        assert following.watch.failure is not None
    # And it recovers.
    server.version = 20
    server.script = [server.events(line("ADDED", pod("late", 30)), then=server.silence)]
    await until(lambda: following.watch.get("red/late"))
    assert following.watch.failure is None


async def test_silence_beyond_the_limit_reconnects_from_the_last_version(
    server: BadServer, follow: Callable[..., Awaitable[Following]]
) -> None:
    server.script = [
        server.events(line("ADDED", pod("red", 7)), then=server.silence),
        server.events(line("ADDED", pod("blue", 8)), then=server.silence),
    ]
    following = await follow(silence=1.0)
    await until(lambda: following.watch.get("red/blue"))
    assert server.lists == 1
    assert server.watches[1]["resourceVersion"] == "7"


async def test_a_bad_list_is_tried_again(server: BadServer, follow: Callable[..., Awaitable[Following]]) -> None:
    server.items = [pod("red", 1)]
    server.script = [server.silence]
    server.list_step = server.answer(500, "boom")
    following = await follow()
    await until(lambda: server.lists >= 3)
    assert not following.watch.synced.is_set()
    assert isinstance(following.watch.failure, Unavailable)
    server.list_step = None
    await until(following.watch.synced.is_set)
    assert following.seen == [("added", "red")]


async def test_a_kind_that_is_not_served_is_found_when_it_appears(
    server: BadServer, follow: Callable[..., Awaitable[Following]]
) -> None:
    server.script = [server.silence]
    server.list_step = server.answer(404, "404 page not found")
    following = await follow(VMIS)
    optional = await follow(VMIS, optional=True)
    await until(lambda: server.lists >= 6)
    assert following.watch.missing
    assert isinstance(following.watch.failure, NotFound)
    assert not following.watch.synced.is_set()
    assert optional.watch.synced.is_set()
    server.items = [pod("red", 1)]
    server.list_step = None
    await until(lambda: following.watch.get("red/red") and optional.watch.get("red/red"))
    assert not following.watch.missing
    assert following.watch.failure is None


async def test_a_short_404_keeps_the_store_and_a_long_one_empties_it(
    server: BadServer, follow: Callable[..., Awaitable[Following]]
) -> None:
    server.items = [pod("red", 1)]
    server.script = [server.events(line("ERROR", GONE))]
    patient = await follow(VMIS)
    hasty = await follow(VMIS, gone_seconds=0.0)
    await until(lambda: patient.watch.get("red/red") and hasty.watch.get("red/red"))
    server.list_step = server.answer(404, status(404, "NotFound"))
    await until(lambda: hasty.watch.get("red/red") is None and patient.watch.missing)
    assert hasty.seen[-1] == ("deleted", "red")
    assert patient.watch.get("red/red") is not None


async def test_an_object_of_a_megabyte_arrives(server: BadServer, follow: Callable[..., Awaitable[Following]]) -> None:
    big = pod("big", 9, filler="x" * 1_000_000)
    server.script = [server.events(line("ADDED", big), then=server.silence)]
    following = await follow()
    await until(lambda: following.watch.get("red/big"))


async def test_a_failing_handler_hides_nothing_from_the_others() -> None:
    kube = FakeKube()
    watch = ListWatch(kube, PODS, backoff=QUICK)
    seen: list[str] = []

    def broken(old: Object | None, new: Object | None) -> None:
        raise RuntimeError("broken")

    watch.add_handler(broken)
    watch.add_handler(lambda old, new: seen.append((new or old or {})["metadata"]["name"]))
    task = asyncio.create_task(watch.run())
    await watch.synced.wait()
    await kube.create(PODS, {"metadata": {"name": "red", "namespace": "red"}})
    await until(lambda: seen == ["red"])
    late: list[str] = []
    watch.add_handler(lambda old, new: late.append((new or {})["metadata"]["name"]))
    assert late == ["red"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_server_restored_to_an_older_state_is_listed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmnet.kube.watch.QUIET_SECONDS", 0.05)
    kube = FakeKube()
    await kube.create(PODS, {"metadata": {"name": "red", "namespace": "red"}})
    watch = ListWatch(kube, PODS, backoff=QUICK)
    task = asyncio.create_task(watch.run())
    await watch.synced.wait()
    watch._version = "1000"
    kube.end_watches()
    await until(lambda: ("watch", "/api/v1/pods") in kube.calls[2:])
    await kube.create(PODS, {"metadata": {"name": "blue", "namespace": "red"}})
    await asyncio.sleep(0.1)
    kube.end_watches()
    await until(lambda: watch.get("red/blue"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_events_have_their_type() -> None:
    kube = FakeKube()
    stream = kube.watch(PODS, "0")
    await kube.create(PODS, {"metadata": {"name": "red", "namespace": "red"}})
    await kube.patch(PODS, "red", {"spec": {"a": 1}}, "red", type=PatchType.MERGE)
    await kube.delete(PODS, "red", "red")
    found: list[WatchEvent] = [await anext(stream) for _ in range(3)]
    assert [event.type for event in found] == [EventType.ADDED, EventType.MODIFIED, EventType.DELETED]
