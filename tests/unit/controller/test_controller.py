import asyncio
import json
from pathlib import Path
from typing import Any

import yaml

from vmnet.controller.endpoint_slices import is_mirror
from vmnet.kube.api import (
    CERTIFICATE_REQUESTS,
    CUDNS,
    ENDPOINT_SLICES,
    NADS,
    PODS,
    UDNS,
    VMIS,
    VMS,
    Resource,
    WatchEvent,
)
from vmnet.model import names

RBAC = Path(__file__).parents[3] / "deploy" / "controller" / "rbac.yaml"


async def test_from_a_network_to_an_annotated_machine_pod(world: Any) -> None:
    world.namespace("red")
    world.namespace("blue")
    world.cudn("happy-tenant", "red", "blue")
    vm = world.vm("blue", "blue")
    vmi = world.vmi(vm)
    world.launcher(vmi, "virt-launcher-blue-a")
    world.pod("red", "web-0")
    async with world.controller():
        blue = await world.until(lambda: world.allocation("blue", "virt-launcher-blue-a", "blue/happy-tenant"))
        red = await world.until(lambda: world.allocation("red", "web-0", "red/happy-tenant"))
    assert blue["ip_addresses"] == world.claim_ips("blue", "blue.happy")
    assert {blue["ip_addresses"][0], red["ip_addresses"][0]} == {"192.168.0.3/16", "192.168.0.4/16"}
    assert red["gateway_ips"] == ["192.168.0.1", "fd00:10::1"]
    assert red["role"] == "primary"


async def test_nothing_is_given_before_the_watch_has_caught_up(world: Any) -> None:
    """The leader before us annotated a pod a moment ago, and our watch has not told yet."""
    world.namespace("red")
    world.udn("red", "tenant")
    async with world.controller():
        await world.until(lambda: world.nad("red", "tenant"))
    late = asyncio.Event()
    watch = world.kube.watch

    async def slow(resource: Any, *arguments: Any, **more: Any) -> Any:
        if resource is PODS:
            await late.wait()
        async for event in watch(resource, *arguments, **more):
            assert isinstance(event, WatchEvent)
            yield event

    world.kube.watch = slow
    listed = world.kube.list
    lists = 0

    async def counted(resource: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal lists
        found = await listed(resource, *arguments, **more)
        if resource is PODS:
            lists += 1
            if lists == 1:
                entry = {"ip_addresses": ["10.20.0.3/24"], "mac_address": "0a:58:0a:14:00:03", "role": "primary"}
                value = json.dumps({"red/tenant": entry})
                world.pod("red", "given", annotations={names.POD_NETWORKS_ANNOTATION: value})
                world.pod("red", "a-new-one")
            if lists == 3:
                late.set()
        return found

    world.kube.list = counted
    async with world.controller():
        new = await world.until(lambda: world.allocation("red", "a-new-one", "red/tenant"))
    assert lists >= 3
    assert new["ip_addresses"] == ["10.20.0.4/24"]


async def test_a_network_made_anew_with_other_subnets(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    world.pod("red", "first")
    async with world.controller():
        await world.until(lambda: world.allocation("red", "first", "red/tenant"))
        world.kube.vanish(PODS, "first", "red")
        await world.kube.delete(UDNS, "tenant", "red")
        await world.until(lambda: world.kube.peek(UDNS, "tenant", "red") is None)
        await world.until(lambda: world.kube.peek(NADS, "tenant", "red") is None)
        world.udn("red", "tenant", subnets=["10.30.0.0/24"])
        world.pod("red", "second")
        found = await world.until(lambda: world.allocation("red", "second", "red/tenant"))
    assert found["ip_addresses"] == ["10.30.0.3/24"]


def allowed(rules: list[dict[str, Any]], verb: str, resource: Resource, subresource: str | None) -> bool:
    name = f"{resource.plural}/{subresource}" if subresource else resource.plural
    return any(
        resource.group in rule["apiGroups"] and name in rule["resources"] and verb in rule["verbs"] for rule in rules
    )


async def test_the_role_allows_what_the_controller_does_and_no_more(world: Any) -> None:
    done: set[tuple[str, Resource, str | None]] = set()
    patch = world.kube.patch

    async def recorded(resource: Resource, *arguments: Any, **more: Any) -> Any:
        done.add(("patch", resource, more.get("subresource")))
        return await patch(resource, *arguments, **more)

    def seen(verb: str, resource: Resource, _: str) -> None:
        if verb not in ("patch", "watching"):
            # RBAC's word for PUT.
            done.add(("update" if verb == "replace" else verb, resource, None))

    world.kube.patch = recorded
    world.kube.fail = seen
    world.namespace("red")
    world.namespace("blue")
    world.node("n1")
    world.pod("blue", "early")
    async with world.controller() as controller:
        await world.told("ErrorAllocatingPod", "waiting")
        world.cudn("happy-tenant", "blue")
        world.udn("red", "tenant")
        vm = world.vm("blue", "blue")
        vmi = world.vmi(vm, node="n2")
        world.launcher(vmi, "source", node="n1")
        world.launcher(vmi, "target", node="n2")
        vmi["status"]["migrationState"] = {
            "migrationUid": "m1",
            "sourcePod": "source",
            "targetPod": "target",
            "sourceNode": "n1",
            "targetNode": "n2",
            "completed": True,
            "endTimestamp": "2026-11-23T11:00:00Z",
        }
        world.kube.seed(VMIS, vmi)
        await world.told("NetworkMigrated", "moved")
        await world.until(lambda: world.allocation("blue", "early", "blue/happy-tenant"))
        nad = await world.until(lambda: world.nad("red", "tenant"))
        await world.kube.delete(NADS, "tenant", "red")
        await world.until(
            lambda: (found := world.nad("red", "tenant")) and found["metadata"]["uid"] != nad["metadata"]["uid"]
        )
        source = {"metadata": {"name": "web-x", "namespace": "blue", "labels": {"kubernetes.io/service-name": "web"}}}
        source |= {"addressType": "IPv4", "endpoints": [{"addresses": ["192.168.0.77"]}], "ports": []}
        source = world.kube.seed(ENDPOINT_SLICES, source)
        mirror = await world.until(
            lambda: next((item for item in world.kube._of(ENDPOINT_SLICES).values() if is_mirror(item)), None)
        )
        world.kube.seed(ENDPOINT_SLICES, {**source, "endpoints": []})
        name = mirror["metadata"]["name"]
        await world.until(lambda: not world.kube.peek(ENDPOINT_SLICES, name, "blue")["endpoints"])
        world.kube.vanish(ENDPOINT_SLICES, "web-x", "blue")
        await world.until(lambda: world.kube.peek(ENDPOINT_SLICES, name, "blue") is None)
        for name in ("source", "target", "early"):
            world.kube.vanish(PODS, name, "blue")
        world.kube.vanish(VMIS, "blue", "blue")
        world.kube.vanish(VMS, "blue", "blue")
        await world.until(lambda: world.claim("blue", "blue.happy") is None)
        await world.kube.delete(CUDNS, "happy-tenant")
        await world.kube.delete(UDNS, "tenant", "red")
        await world.until(lambda: world.kube.peek(CUDNS, "happy-tenant") is None)
        await world.until(lambda: world.kube.peek(UDNS, "tenant", "red") is None)
        await world.settled(controller)
    done -= {("delete", UDNS, None), ("delete", CUDNS, None)}  # the user's
    documents = yaml.safe_load_all(RBAC.read_text())
    rules = next(item for item in documents if item["kind"] == "ClusterRole")["rules"]
    assert [item for item in done if not allowed(rules, *item)] == []
    granted = {
        (verb, name)
        for rule in rules
        for verb in rule["verbs"]
        for name in rule["resources"]
        # "get" reads one object again after a conflict; finalizers are checked by an admission plug-in.
        if verb != "get" and not name.endswith("/finalizers")
    }
    used = {(verb, f"{item.plural}/{sub}" if sub else item.plural) for verb, item, sub in done}
    # An event is patched when it happens again.
    # The webhook's keeper (tests/unit/controller/test_webhook.py) has no part in this.
    hooks = {("patch", "mutatingwebhookconfigurations"), ("patch", "validatingwebhookconfigurations")}
    # Nor have the agents' certificates (tests/unit/controller/test_agent_certificates.py).
    requests = CERTIFICATE_REQUESTS.plural
    certificates = {("list", requests), ("watch", requests), ("approve", "signers"), ("sign", "signers")}
    certificates |= {("patch", f"{requests}/{part}") for part in ("approval", "status")}
    assert granted - used == ({("patch", "events")} | hooks | certificates) - used
