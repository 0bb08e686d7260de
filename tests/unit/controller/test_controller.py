import asyncio
import json
from typing import Any

from vmnet.kube.api import NADS, PODS, UDNS, WatchEvent
from vmnet.model import names


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
