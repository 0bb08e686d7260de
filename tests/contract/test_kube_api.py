"""One suite for every Kube: the fake, and the real client against the embedded API server.

Whatever the product's tests rely on in the fake must be true here of both.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import yaml

from vmnet.kube.api import (
    CLAIMS,
    LEASES,
    NAMESPACES,
    PODS,
    UDNS,
    VMS,
    AlreadyExists,
    Conflict,
    EventType,
    Expired,
    Invalid,
    Kube,
    NotFound,
    Object,
    PatchType,
    Resource,
)
from vmnet.kube.client import KubeClient
from vmnet.kube.events import Recorder
from vmnet.kube.fake import FakeKube
from vmnet.kube.lease import Elector, Timing
from vmnet.kube.watch import ListWatch
from vmnet.lab.apiserver.testing import running_server
from vmnet.runtime.backoff import Backoff

ROOT = Path(__file__).parents[2]
CRDS = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False)
DEADLINE = 30
QUICK = Backoff(first=0.01, most=0.05)
numbers = itertools.count(1)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(params=["fake", "embedded"])
async def served(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Kube, Callable[[], None]]]:
    """The API, and what makes it forget its history."""
    if request.param == "fake":
        fake = FakeKube()
        fake.unserved.add(VMS)
        yield fake, fake.compact
        return
    async with running_server(tmp_path) as server:
        server.kubeconfig(tmp_path / "kubeconfig")
        client = await KubeClient.connect(tmp_path / "kubeconfig", user_agent="vmnet-contract")
        for name in ("k8s.cni.cncf.io_ipamclaims.yaml", "k8s.ovn.org_userdefinednetworks.yaml"):
            await client.create(CRDS, yaml.safe_load((ROOT / "deploy" / "crds" / name).read_text()))
        for namespace in ("red", "blue"):
            await client.create(NAMESPACES, {"metadata": {"name": namespace}})
        yield client, server.store.compact
        await client.close()


@pytest.fixture
def kube(served: tuple[Kube, Callable[[], None]]) -> Kube:
    return served[0]


def lease(name: str, **spec: Any) -> Object:
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": "red"},
        "spec": {"holderIdentity": "somebody", **spec},
    }


def labelled(name: str, namespace: str = "red", **labels: str) -> Object:
    return lease(name) | {"metadata": {"name": name, "namespace": namespace, "labels": labels}}


def claim(name: str, **metadata: Any) -> Object:
    return {
        "apiVersion": "k8s.cni.cncf.io/v1alpha1",
        "kind": "IPAMClaim",
        "metadata": {"name": name, "namespace": "red", **metadata},
        "spec": {"network": "happy", "interface": "ovn-udn1"},
    }


def pod(name: str, namespace: str = "red", node: str = "n1", **labels: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "none"}]},
    }


async def test_what_is_created_is_read_and_listed(kube: Kube) -> None:
    made = await kube.create(LEASES, lease("one"))
    assert made["metadata"]["uid"]
    assert made["metadata"]["creationTimestamp"]
    assert await kube.get(LEASES, "one", "red") == made
    listed = await kube.list(LEASES, "red")
    assert [item["metadata"]["name"] for item in listed.items] == ["one"]
    assert (listed.items[0]["apiVersion"], listed.items[0]["kind"]) == ("coordination.k8s.io/v1", "Lease")
    assert int(listed.resource_version) >= int(made["metadata"]["resourceVersion"])
    assert (await kube.list(LEASES, "blue")).items == ()
    assert len((await kube.list(LEASES)).items) == 1


async def test_names_can_be_generated(kube: Kube) -> None:
    body = lease("x")
    body["metadata"] = {"generateName": "pre-", "namespace": "red"}
    names = {(await kube.create(LEASES, body))["metadata"]["name"] for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith("pre-") for name in names)


async def test_errors_have_their_kinds(kube: Kube) -> None:
    await kube.create(LEASES, lease("one"))
    with pytest.raises(AlreadyExists):
        await kube.create(LEASES, lease("one"))
    for call in (
        kube.get(LEASES, "none", "red"),
        kube.delete(LEASES, "none", "red"),
        kube.patch(LEASES, "none", {"spec": {}}, "red"),
        kube.list(VMS),
        kube.get(VMS, "none", "red"),
    ):
        with pytest.raises(NotFound):
            await call
    nameless = lease("x")
    del nameless["metadata"]["name"]
    with pytest.raises(Invalid):
        await kube.create(LEASES, nameless)


async def test_a_stale_write_conflicts(kube: Kube) -> None:
    first = await kube.create(LEASES, lease("one"))
    second = await kube.replace(LEASES, first | {"spec": {"holderIdentity": "two"}})
    assert second["metadata"]["resourceVersion"] != first["metadata"]["resourceVersion"]
    with pytest.raises(Conflict) as caught:
        await kube.replace(LEASES, first | {"spec": {"holderIdentity": "three"}})
    assert not isinstance(caught.value, AlreadyExists)
    stale = {"metadata": {"resourceVersion": first["metadata"]["resourceVersion"]}, "spec": {"holderIdentity": "x"}}
    with pytest.raises(Conflict):
        await kube.patch(LEASES, "one", stale, "red")
    assert (await kube.get(LEASES, "one", "red"))["spec"]["holderIdentity"] == "two"


async def test_a_write_that_changes_nothing_makes_no_version(kube: Kube) -> None:
    made = await kube.create(LEASES, lease("one"))
    same = await kube.patch(LEASES, "one", {"spec": {"holderIdentity": "somebody"}}, "red")
    assert same["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


async def test_merge_patches_merge_and_null_removes(kube: Kube) -> None:
    await kube.create(CLAIMS, claim("one", annotations={"a": "1", "b": "2"}, labels={"x": "y"}))
    patched = await kube.patch(CLAIMS, "one", {"metadata": {"annotations": {"a": None, "c": "3"}}}, "red")
    assert patched["metadata"]["annotations"] == {"b": "2", "c": "3"}
    assert patched["metadata"]["labels"] == {"x": "y"}


async def test_json_patches_test_before_they_write(kube: Kube) -> None:
    await kube.create(CLAIMS, claim("one", finalizers=["vmnet.io/a", "vmnet.io/b"]))
    operations = [
        {"op": "test", "path": "/metadata/finalizers/0", "value": "vmnet.io/a"},
        {"op": "remove", "path": "/metadata/finalizers/0"},
    ]
    patched = await kube.patch(CLAIMS, "one", operations, "red", type=PatchType.JSON)
    assert patched["metadata"]["finalizers"] == ["vmnet.io/b"]
    with pytest.raises(Invalid):
        await kube.patch(CLAIMS, "one", operations, "red", type=PatchType.JSON)


async def test_an_apply_creates_and_then_changes(kube: Kube) -> None:
    for identity in ("one", "two"):
        body = lease("applied", holderIdentity=identity)
        made = await kube.patch(LEASES, "applied", body, "red", type=PatchType.APPLY, field_manager="vmnet", force=True)
        assert made["spec"]["holderIdentity"] == identity
    with pytest.raises(Invalid):
        await kube.patch(LEASES, "applied", lease("applied"), "red", type=PatchType.APPLY)


async def test_status_is_written_apart(kube: Kube) -> None:
    made = await kube.create(CLAIMS, claim("one") | {"status": {"ips": ["10.0.0.9/24"]}})
    assert "status" not in made
    body = made | {"status": {"ips": ["10.0.0.5/24"]}, "spec": {"network": "other", "interface": "x"}}
    written = await kube.replace(CLAIMS, body, subresource="status")
    assert written["status"] == {"ips": ["10.0.0.5/24"]}
    assert written["spec"]["network"] == "happy"
    assert written["metadata"]["generation"] == made["metadata"]["generation"]
    patched = await kube.patch(CLAIMS, "one", {"status": {"ownerPod": {"name": "p"}}}, "red", subresource="status")
    assert patched["status"] == {"ips": ["10.0.0.5/24"], "ownerPod": {"name": "p"}}
    labelled = await kube.patch(CLAIMS, "one", {"metadata": {"labels": {"a": "b"}}, "status": {"ips": []}}, "red")
    assert labelled["status"] == patched["status"]
    assert labelled["metadata"]["labels"] == {"a": "b"}


async def test_the_generation_counts_changes_of_the_spec(kube: Kube) -> None:
    body = {
        "apiVersion": "k8s.ovn.org/v1",
        "kind": "UserDefinedNetwork",
        "metadata": {"name": "net", "namespace": "red"},
        "spec": {"topology": "Layer2", "layer2": {"role": "Primary", "subnets": ["10.0.0.0/16"]}},
    }
    made = await kube.create(UDNS, body)
    assert made["metadata"]["generation"] == 1
    labelled = await kube.patch(UDNS, "net", {"metadata": {"labels": {"a": "b"}}}, "red")
    assert labelled["metadata"]["generation"] == 1
    await kube.delete(UDNS, "net", "red")


async def test_finalizers_delay_the_end(kube: Kube) -> None:
    made = await kube.create(CLAIMS, claim("one", finalizers=["vmnet.io/test"]))
    with pytest.raises(Conflict):
        await kube.delete(CLAIMS, "one", "red", uid="00000000-0000-0000-0000-000000000000")
    await kube.delete(CLAIMS, "one", "red", uid=made["metadata"]["uid"])
    dying = await kube.get(CLAIMS, "one", "red")
    assert dying["metadata"]["deletionTimestamp"]
    await kube.delete(CLAIMS, "one", "red")
    assert (await kube.get(CLAIMS, "one", "red"))["metadata"]["uid"] == made["metadata"]["uid"]
    await kube.patch(CLAIMS, "one", {"metadata": {"finalizers": None}}, "red")
    with pytest.raises(NotFound):
        await kube.get(CLAIMS, "one", "red")


@pytest.mark.parametrize(
    ("labels", "fields", "found"),
    [
        ("app=red", "", {"a", "b"}),
        ("app==red,tier=db", "", {"b"}),
        ("app!=red", "", {"c", "d"}),
        ("app", "", {"a", "b", "c"}),
        ("!app", "", {"d"}),
        ("app in (red, blue)", "", {"a", "b", "c"}),
        ("app notin (red)", "", {"c", "d"}),
        ("", "metadata.name=a", {"a"}),
        ("", "spec.nodeName=n2", {"c"}),
        ("", "spec.nodeName!=n2", {"a", "b", "d"}),
        ("app=red", "metadata.name!=a", {"b"}),
    ],
)
async def test_selectors(kube: Kube, labels: str, fields: str, found: set[str]) -> None:
    await kube.create(PODS, pod("a", app="red"))
    await kube.create(PODS, pod("b", app="red", tier="db"))
    await kube.create(PODS, pod("c", node="n2", app="blue"))
    await kube.create(PODS, pod("d"))
    listed = await kube.list(PODS, "red", labels=labels, fields=fields)
    assert {item["metadata"]["name"] for item in listed.items} == found


async def test_a_watch_replays_and_follows_and_selects(kube: Kube) -> None:
    start = (await kube.list(LEASES, "red")).resource_version
    await kube.create(LEASES, labelled("before", app="red"))
    await kube.create(LEASES, labelled("elsewhere", "blue", app="red"))
    await kube.create(LEASES, labelled("other", app="blue"))
    async with aclosing(kube.watch(LEASES, start, "red", labels="app=red")) as stream:  # type: ignore[type-var]
        seen: list[tuple[EventType, str]] = []

        async def take(count: int) -> None:
            async with asyncio.timeout(DEADLINE):
                while len(seen) < count:
                    event = await anext(stream)
                    if event.type is not EventType.BOOKMARK:
                        seen.append((event.type, event.object["metadata"]["name"]))

        await take(1)
        await kube.patch(LEASES, "before", {"metadata": {"annotations": {"a": "b"}}}, "red")
        await kube.patch(LEASES, "other", {"metadata": {"labels": {"app": "red"}}}, "red")
        await kube.patch(LEASES, "before", {"metadata": {"labels": {"app": "blue"}}}, "red")
        await kube.delete(LEASES, "other", "red")
        await take(5)
    assert seen == [
        (EventType.ADDED, "before"),
        (EventType.MODIFIED, "before"),
        (EventType.ADDED, "other"),
        (EventType.DELETED, "before"),
        (EventType.DELETED, "other"),
    ]


async def test_a_list_watch_follows_a_kind_from_before_it_is_served(kube: Kube) -> None:
    vms = ListWatch(kube, VMS, optional=True, backoff=QUICK, missing_backoff=QUICK)
    claims = ListWatch(kube, CLAIMS, backoff=QUICK)
    seen: list[str] = []
    claims.add_handler(lambda old, new: seen.append(f"{'-' if new is None else '+' if old is None else '~'}"))
    tasks = [asyncio.create_task(watch.run()) for watch in (vms, claims)]
    await until(lambda: vms.missing and vms.synced.is_set() and claims.synced.is_set())
    await kube.create(CLAIMS, claim("one"))
    await kube.patch(CLAIMS, "one", {"status": {"ips": ["10.0.0.5/24"]}}, "red", subresource="status")
    await kube.delete(CLAIMS, "one", "red")
    await until(lambda: seen == ["+", "~", "-"])
    if isinstance(kube, FakeKube):
        kube.unserved.clear()
    else:
        version = {
            "name": "v1",
            "served": True,
            "storage": True,
            "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
        }
        names = {"plural": "virtualmachines", "singular": "virtualmachine", "kind": "VirtualMachine"}
        await kube.create(
            CRDS,
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {"name": "virtualmachines.kubevirt.io"},
                "spec": {"group": "kubevirt.io", "scope": "Namespaced", "names": names, "versions": [version]},
            },
        )
    await until(lambda: not vms.missing)
    machine = {"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": {"name": "blue"}, "spec": {}}
    await kube.create(VMS, machine, "red")
    await until(lambda: vms.get("red/blue"))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_version_from_before_the_history_is_expired(served: tuple[Kube, Callable[[], None]]) -> None:
    kube, compact = served
    made = await kube.create(LEASES, lease("one"))
    await kube.create(LEASES, lease("two"))
    compact()
    stream = kube.watch(LEASES, made["metadata"]["resourceVersion"])
    with pytest.raises(Expired):
        await asyncio.wait_for(anext(stream), DEADLINE)


async def test_a_leader_is_elected_and_gives_way(kube: Kube) -> None:
    timing = Timing(lease=4, renew_deadline=3.0, retry=0.2, request=1.0)
    begun: list[str] = []

    def elector(identity: str) -> asyncio.Task[None]:
        async def lead() -> None:
            begun.append(identity)
            await asyncio.Event().wait()

        made = Elector(kube, namespace="red", name="controller", identity=identity, timing=timing)
        return asyncio.create_task(made.run(lead))

    one = elector("one")
    await until(lambda: begun == ["one"])
    two = elector("two")
    await asyncio.sleep(1)
    assert begun == ["one"]
    one.cancel()
    await asyncio.gather(one, return_exceptions=True)
    await until(lambda: begun == ["one", "two"])
    two.cancel()
    await asyncio.gather(two, return_exceptions=True)


async def test_events_are_counted(kube: Kube) -> None:
    about = await kube.create(CLAIMS, claim(f"one{next(numbers)}"))
    recorder = Recorder(kube, "vmnet-controller", host="n1")
    for _ in range(3):
        await recorder.event(about, "SubnetExhausted", "no address is free", "Warning")
    await recorder.event(about, "SuccessfulAllocation", "10.0.0.5/24")
    listed = await kube.list(Resource("", "v1", "events", "Event"), "red")
    assert {(item["reason"], item["count"], item["type"]) for item in listed.items} == {
        ("SubnetExhausted", 3, "Warning"),
        ("SuccessfulAllocation", 1, "Normal"),
    }
