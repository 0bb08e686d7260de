from typing import Any


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
