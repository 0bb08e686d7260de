import ast
import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vmnet.kube.api import EVENTS, Object
from vmnet.kube.events import BURST, Recorder
from vmnet.kube.fake import FakeKube, refuse

POD: Object = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "red", "namespace": "red-namespace", "uid": "u1", "resourceVersion": "5"},
}
NETWORK: Object = {"apiVersion": "k8s.ovn.org/v1", "kind": "ClusterUserDefinedNetwork", "metadata": {"name": "happy"}}


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 11, 23, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


async def events(kube: FakeKube) -> list[Object]:
    return list((await kube.list(EVENTS)).items)


async def test_an_event_tells_whose_it_is() -> None:
    kube = FakeKube()
    await Recorder(kube, "vmnet-agent", host="n1").event(POD, "ErrorAllocatingPod", "no address", "Warning")
    (event,) = await events(kube)
    assert event["metadata"]["namespace"] == "red-namespace"
    assert event["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Pod",
        "name": "red",
        "namespace": "red-namespace",
        "uid": "u1",
        "resourceVersion": "5",
    }
    assert event["source"] == {"component": "vmnet-agent", "host": "n1"}
    assert (event["reason"], event["type"], event["count"]) == ("ErrorAllocatingPod", "Warning", 1)


async def test_repeats_raise_the_count_and_other_messages_do_not() -> None:
    kube, clock = FakeKube(), Clock()
    recorder = Recorder(kube, "vmnet", now=clock)
    for message in ("no address", "no address", "no network", "no address"):
        clock.now += timedelta(seconds=1)
        await recorder.event(POD, "Failed", message)
    counts = {event["message"]: (event["count"], event["lastTimestamp"]) for event in await events(kube)}
    assert counts == {"no address": (3, "2026-11-23T12:00:04Z"), "no network": (1, "2026-11-23T12:00:03Z")}


async def test_repeats_at_once_make_one_event() -> None:
    kube = FakeKube()
    recorder = Recorder(kube, "vmnet")
    await asyncio.gather(*(recorder.event(POD, "Failed", "no address") for _ in range(10)))
    assert [event["count"] for event in await events(kube)] == [10]


async def test_a_flood_is_bounded_per_object_and_what_was_held_back_is_counted() -> None:
    kube, clock = FakeKube(), Clock()
    recorder = Recorder(kube, "vmnet", now=clock)
    for _ in range(100):
        await recorder.event(POD, "Failed", "again")
    assert len(kube.calls) == BURST
    await recorder.event(NETWORK, "Made", "another object")
    clock.now += timedelta(seconds=60)
    await recorder.event(POD, "Failed", "again")
    counts = {event["message"]: event["count"] for event in await events(kube)}
    assert counts == {"again": 101, "another object": 1}


async def test_cluster_objects_have_their_events_in_default() -> None:
    kube = FakeKube()
    await Recorder(kube, "vmnet").event(NETWORK, "Made", "a network")
    (event,) = await events(kube)
    assert event["metadata"]["namespace"] == "default"


async def test_an_expired_event_is_made_anew() -> None:
    kube = FakeKube()
    recorder = Recorder(kube, "vmnet")
    await recorder.event(POD, "Failed", "again")
    (event,) = await events(kube)
    kube.vanish(EVENTS, event["metadata"]["name"], "red-namespace")
    await recorder.event(POD, "Failed", "again")
    (event,) = await events(kube)
    assert event["count"] == 1


async def test_a_failing_api_does_not_stop_the_caller() -> None:
    kube = FakeKube(fail=refuse(resource=EVENTS))
    await Recorder(kube, "vmnet").event(POD, "Failed", "again")


def warnings() -> list[tuple[str, ast.Call]]:
    """Every event of type Warning that the product writes, by its place."""
    found = []
    for folder in ("controller", "agent"):
        for path in sorted((Path(__file__).parents[3] / "vmnet" / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "event":
                    words = [item.value for item in node.args if isinstance(item, ast.Constant)]
                    if "Warning" in words:
                        found.append((f"{path.name}:{node.lineno}", node))
    return found


def test_every_warning_says_what_to_do() -> None:
    found = warnings()
    assert len(found) >= 6
    assert [place for place, call in found if "next_step" not in {item.arg for item in call.keywords}] == []


async def test_the_next_step_is_kept_whole() -> None:
    kube = FakeKube()
    await Recorder(kube, "me").event(POD, "Broken", "x" * 5000, "Warning", next_step="delete it")
    (event,) = await events(kube)
    assert event["message"].endswith("x → delete it")
    assert len(event["message"]) == 1024
