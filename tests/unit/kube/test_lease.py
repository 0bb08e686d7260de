"""The elector against the fake, against a server that refuses and one that hangs."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from vmnet.kube.api import LEASES, KubeError, Object, Resource, Unavailable
from vmnet.kube.client import KubeClient
from vmnet.kube.fake import FakeKube, refuse
from vmnet.kube.lease import Elector, Timing

DEADLINE = 20
QUICK = Timing(lease=2, renew_deadline=1.0, retry=0.05, request=0.3)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.005)


@dataclass
class Candidate:
    elector: Elector
    begun: int = 0
    ended: int = 0
    ended_at: float = 0.0
    finish: asyncio.Event = field(default_factory=asyncio.Event)

    async def lead(self) -> None:
        self.begun += 1
        try:
            await self.finish.wait()
        finally:
            self.ended += 1
            self.ended_at = asyncio.get_running_loop().time()


def candidate(kube: FakeKube | KubeClient, identity: str, timing: Timing = QUICK) -> Candidate:
    return Candidate(Elector(kube, namespace="vmnet", name="controller", identity=identity, timing=timing))


Start = Callable[[Candidate], asyncio.Task[None]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    tasks: list[asyncio.Task[None]] = []

    def begin(of: Candidate) -> asyncio.Task[None]:
        tasks.append(asyncio.create_task(of.elector.run(of.lead)))
        return tasks[-1]

    yield begin
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def holder(kube: FakeKube) -> str:
    lease = kube.peek(LEASES, "controller", "vmnet")
    return str(lease["spec"]["holderIdentity"]) if lease else ""


async def test_one_leads_and_the_next_takes_over_at_once_when_it_is_stopped(start: Start) -> None:
    kube = FakeKube()
    one, two = candidate(kube, "one"), candidate(kube, "two")
    first = start(one)
    await until(lambda: one.begun)
    start(two)
    await asyncio.sleep(0.3)
    assert two.begun == 0
    assert two.elector.leader == "one"
    stopped = asyncio.get_running_loop().time()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert one.ended == 1
    await until(lambda: two.begun)
    assert asyncio.get_running_loop().time() - stopped < QUICK.lease / 2
    lease = kube.peek(LEASES, "controller", "vmnet")
    assert lease is not None
    assert lease["spec"]["leaseTransitions"] == 1
    assert lease["spec"]["leaseDurationSeconds"] == 2


async def test_a_dead_leaders_lease_is_taken_when_it_has_not_changed_for_its_duration(start: Start) -> None:
    kube = FakeKube()
    spec = {"holderIdentity": "dead", "leaseDurationSeconds": 1, "renewTime": "2099-01-01T00:00:00.000000Z"}
    kube.seed(LEASES, {"metadata": {"name": "controller", "namespace": "vmnet"}, "spec": spec})
    began = asyncio.get_running_loop().time()
    one = candidate(kube, "one")
    start(one)
    await until(lambda: one.begun)
    assert asyncio.get_running_loop().time() - began >= 1.0
    assert holder(kube) == "one"


async def test_of_two_that_see_an_expired_lease_one_leads(start: Start) -> None:
    kube = FakeKube()
    rivals = [candidate(kube, str(number)) for number in range(5)]
    for rival in rivals:
        start(rival)
    await until(lambda: any(rival.begun for rival in rivals))
    await asyncio.sleep(0.5)
    assert sum(rival.begun for rival in rivals) == 1


async def test_a_leader_that_cannot_renew_stops_before_its_lease_ends_and_leads_again_later(start: Start) -> None:
    kube = FakeKube()
    one = candidate(kube, "one")
    start(one)
    await until(lambda: one.begun)
    failed = asyncio.get_running_loop().time()
    kube.fail = refuse(resource=LEASES)
    await until(lambda: one.ended)
    assert one.ended_at - failed < QUICK.lease
    assert not one.elector.leading
    kube.fail = None
    await until(lambda: one.begun == 2)


async def test_a_short_outage_is_survived(start: Start) -> None:
    kube = FakeKube()
    one = candidate(kube, "one")
    start(one)
    await until(lambda: one.begun)
    kube.fail = refuse(resource=LEASES)
    await asyncio.sleep(QUICK.renew_deadline / 3)
    kube.fail = None
    await asyncio.sleep(QUICK.renew_deadline)
    assert (one.begun, one.ended) == (1, 0)


async def test_a_lease_that_somebody_took_ends_the_leader(start: Start) -> None:
    kube = FakeKube()
    one = candidate(kube, "one")
    start(one)
    await until(lambda: one.begun)
    await kube.patch(LEASES, "controller", {"spec": {"holderIdentity": "thief"}}, "vmnet")
    await until(lambda: one.ended)
    assert holder(kube) == "thief"
    assert one.elector.leader == "thief"


async def test_the_end_of_the_leading_task_ends_the_run_and_frees_the_lease(start: Start) -> None:
    kube = FakeKube()
    one = candidate(kube, "one")
    task = start(one)
    await until(lambda: one.begun)
    one.finish.set()
    async with asyncio.timeout(DEADLINE):
        await task
    assert holder(kube) == ""


async def test_a_failure_of_the_leading_task_is_raised_and_frees_the_lease() -> None:
    kube = FakeKube()

    async def broken() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        async with asyncio.timeout(DEADLINE):
            await candidate(kube, "one").elector.run(broken)
    assert holder(kube) == ""


async def test_a_leading_task_that_does_not_stop_ends_the_process() -> None:
    kube = FakeKube()
    released = asyncio.Event()

    async def stubborn() -> None:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue

    task = asyncio.create_task(candidate(kube, "one").elector.run(stubborn))
    await until(lambda: holder(kube) == "one")
    kube.fail = refuse(resource=LEASES)
    with pytest.raises(RuntimeError, match="does not stop"):
        async with asyncio.timeout(DEADLINE):
            await task
    released.set()


@pytest.mark.parametrize("how", ["hung", "refused"])
async def test_a_server_that_hangs_or_is_gone_ends_the_leader_in_time(how: str, start: Start) -> None:
    kube = FakeKube()
    hung = asyncio.Event()
    release = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        if hung.is_set():
            await release.wait()
        body: Object = await request.json() if request.can_read_body else {}
        try:
            match request.method:
                case "GET":
                    found = await kube.get(LEASES, "controller", "vmnet")
                case "POST":
                    found = await kube.create(LEASES, body, "vmnet")
                case _:
                    found = await kube.replace(LEASES, body)
        except KubeError as error:
            answer = {"kind": "Status", "code": error.code, "message": str(error), "reason": type(error).__name__}
            return web.json_response(answer, status=error.code)
        return web.json_response(found)

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    client = KubeClient(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}", user_agent="test")
    one = candidate(client, "one")
    start(one)
    await until(lambda: one.begun)
    failed = asyncio.get_running_loop().time()
    hung.set()
    if how == "refused":
        release.set()
        await runner.cleanup()
    await until(lambda: one.ended)
    assert one.ended_at - failed < QUICK.lease
    release.set()
    await client.close()
    await runner.cleanup()


@pytest.mark.parametrize(
    "wrong", [{"renew_deadline": 20.0}, {"retry": 11.0}, {"request": 10.0}, {"request": 0.0}], ids=str
)
def test_timings_that_could_have_two_leaders_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="renew_deadline"):
        Timing(**wrong)  # type: ignore[arg-type]


def test_the_hook_names_what_it_refuses() -> None:
    fail = refuse("get", resource=LEASES)
    assert isinstance(fail("get", LEASES, "x"), Unavailable)
    assert fail("create", LEASES, "x") is None
    assert fail("get", Resource("", "v1", "pods", "Pod"), "x") is None
