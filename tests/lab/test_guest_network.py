"""What a machine finds when it has booted: addresses, routes, names; and what the API says of it."""

import json
from ipaddress import ip_interface
from typing import Any

import pytest

from vmnet.lab.demo import BLUE, NETWORK, RED
from vmnet.lab.topology import OUTSIDE_HOST
from vmnet.model import names

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

GATEWAY = "192.168.0.1"
GATEWAY_MAC = "0a:58:c0:a8:00:01"


@pytest.mark.parametrize("machine", [RED, BLUE], ids=["red", "blue"])
async def test_a_guest_is_configured_by_what_the_network_tells_it(world: Any, machine: tuple[str, str]) -> None:
    namespace, name = machine
    guest = await world.scenario.guest(*machine)

    async def run(*words: str) -> str:
        result = await guest.run(list(words))
        assert result.exit == 0, result
        return str(result.stdout).strip()

    addresses = [ip_interface(text) for text in await world.scenario.addresses(guest)]
    assert [item.version for item in addresses] == [4, 6]
    assert str(addresses[0].network) == "192.168.0.0/16"
    assert addresses[1].ip in ip_interface("fd20:1234::/64").network
    assert (await world.facts(machine))["gateway"] == GATEWAY_MAC
    assert await run("ip", "-4", "route", "show", "default") == f"default via {GATEWAY} dev eth0"
    routers = [line.split()[2] for line in (await run("ip", "-6", "route", "show", "default")).splitlines()]
    assert routers == ["fe80::1"]
    neighbours = (await run("ip", "-6", "neigh", "show")).splitlines()
    # Who asks the gateway for names by its global address hears, too, that it is a router.
    links = [line.split()[0] for line in neighbours if line.startswith("fe80:") and " router " in f"{line} "]
    assert links == ["fe80::1"]
    assert await run("cat", "/sys/class/net/eth0/mtu") == "1450"
    assert await run("hostname") == name
    lines = (await run("cat", "/etc/resolv.conf")).splitlines()
    search = next(line for line in lines if line.startswith("search ")).split()[1:]
    assert search[0] == f"{namespace}.vm.cluster.local"
    assert "cluster.local" in search
    assert f"nameserver {GATEWAY}" in lines


@pytest.mark.parametrize("machine", [RED, BLUE], ids=["red", "blue"])
async def test_the_api_says_what_the_guest_has(world: Any, machine: tuple[str, str]) -> None:
    namespace, name = machine
    guest = await world.scenario.guest(*machine)
    found = [ip_interface(text) for text in await world.scenario.addresses(guest)]
    bare = [str(item.ip) for item in found]

    async def interfaces() -> Any:
        status = (await world.get("vmi", "-n", namespace, name))["status"]
        listed = status.get("interfaces", [])
        return listed if listed and sorted(listed[0].get("ipAddresses", [])) == sorted(bare) else None

    (interface,) = await world.until("the VMI lists the guest's addresses", interfaces)
    assert interface["podInterfaceName"] == names.PRIMARY_INTERFACE
    assert interface["ipAddress"] == bare[0]
    assert interface["name"] == "happy"

    claim = await world.get("ipamclaim", "-n", namespace, f"{name}.happy")
    assert claim["spec"]["network"] == names.cudn_network_name(NETWORK)
    assert claim["status"]["ips"] == [f"{bare[0]}/16", f"{bare[1]}/64"]

    pod = await world.launcher(machine)
    assert claim["status"]["ownerPod"]["name"] == pod["metadata"]["name"]
    networks = json.loads(pod["metadata"]["annotations"][names.POD_NETWORKS_ANNOTATION])
    primary = networks[f"{namespace}/{NETWORK}"]
    assert primary["role"] == "primary"
    assert primary["ip_addresses"] == claim["status"]["ips"]
    assert primary["mac_address"] == interface["mac"] == (await world.facts(machine))["mac"]
    assert primary["gateway_ips"] == [GATEWAY, "fd20:1234::1"]
    assert networks["default"]["role"] == "infrastructure-locked"
    assert networks["default"]["ip_addresses"][0].startswith("10.244.")
    default, entry = json.loads(pod["metadata"]["annotations"][names.NETWORK_STATUS_ANNOTATION])
    assert default["interface"] == "eth0"
    assert "default" not in default
    assert (entry["name"], entry["interface"], entry["default"]) == (f"{namespace}/{NETWORK}", "ovn-udn1", True)
    assert entry["ips"] == bare


async def test_names_are_answered_for_both_machines(world: Any) -> None:
    for machine, other in ((RED, BLUE), (BLUE, RED)):
        guest = await world.scenario.guest(*machine)
        listed = await world.scenario.addresses(await world.scenario.guest(*other))
        ipv4, ipv6 = (text.split("/")[0] for text in listed)
        full = f"{other[1]}.{other[0]}.vm.cluster.local"
        # The second name needs the search list.
        for name in (full, f"{other[1]}.{other[0]}"):
            assert (await guest.run(["probe", "resolve", name, "A"])).stdout.split() == [ipv4]
            assert (await guest.run(["probe", "resolve", name, "AAAA"])).stdout.split() == [ipv6]
        for address in (ipv4, ipv6):
            assert (await guest.run(["probe", "resolve", address, "PTR"])).stdout.split() == [full]


async def test_a_machine_finds_itself_by_its_short_name(world: Any) -> None:
    blue = await world.scenario.guest(*BLUE)
    assert (await blue.run(["probe", "resolve", "blue", "A"])).stdout.split() == [await world.ipv4(BLUE)]


@pytest.mark.parametrize(
    "name",
    ["nobody.blue-namespace.vm.cluster.local", "blue.nowhere.vm.cluster.local", "nothing.cluster.local"],
)
async def test_a_name_that_nobody_has_is_denied(world: Any, name: str) -> None:
    red = await world.scenario.guest(*RED)
    result = await red.run(["nslookup", f"{name}.", GATEWAY])
    assert result.exit != 0
    assert "NXDOMAIN" in result.stdout + result.stderr


async def test_names_outside_the_cluster_are_forwarded(world: Any) -> None:
    red = await world.scenario.guest(*RED)
    assert (await red.run(["probe", "resolve", "www.outside.test", "A"])).stdout.split() == [str(OUTSIDE_HOST.ipv4)]
    assert (await red.run(["probe", "resolve", "www.outside.test", "AAAA"])).stdout.split() == [str(OUTSIDE_HOST.ipv6)]
