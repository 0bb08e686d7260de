"""The responder in real network namespaces: equal networks apart, the world reached through the network's own link."""

import asyncio
import os
import random
import shutil
import sys
from collections.abc import AsyncIterator
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest

from vmnet.agent.responder import Names, Responders
from vmnet.kernel.linux import LinuxKernel
from vmnet.model.endpoint import Endpoint, MachineReference, PodReference
from vmnet.model.names import MacAddress, NetworkId
from vmnet.model.network import Network
from vmnet_dns.forward import Upstream

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2 to make namespaces"
)

DEADLINE = 30
WORLD = {b"\x00": [Upstream(ip_address("10.99.255.53"))]}
BLUE = "blue.ns.vm.cluster.local"
ZONE = """
network = "world"
domain = "example.org"
subnets = ["10.99.0.0/16"]
[[host]]
names = ["www.example.org", {many}]
addresses = [{addresses}]
"""


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(DEADLINE):
        out, error = await process.communicate()
    assert process.returncode == 0, f"{command}: {error.decode()}"
    return out.decode()


async def dig(namespace: str, server: str, *arguments: str) -> str:
    return await run("ip", "netns", "exec", namespace, "dig", f"@{server}", "+time=5", "+tries=1", *arguments)


def endpoint(address: str, address6: str) -> Endpoint:
    return Endpoint(
        pod=PodReference("ns", "virt-launcher-blue", "uid"),
        network="happy",
        node="n1",
        mac=MacAddress("0a:58:c0:a8:00:05"),
        addresses=(ip_interface(address), ip_interface(address6)),
        machine=MachineReference("ns", "blue"),
    )


@pytest.fixture
async def networks(tmp_path: Path) -> AsyncIterator[tuple[Network, Network]]:
    """Two networks with the same subnets, each linked to one ``world`` namespace where a resolver listens."""
    base = random.SystemRandom().randrange(4_000_000, 8_000_000, 2)
    made = [
        Network(
            f"happy-{number}",
            NetworkId(base + number),
            subnets=(ip_network("192.168.0.0/16"), ip_network("fd00:1::/64")),
        )
        for number in (0, 1)
    ]
    world = f"vmnet-test-{base}"
    namespaces = [world, *(network.namespace for network in made)]
    resolver: asyncio.subprocess.Process | None = None
    try:
        for namespace in namespaces:
            await run("ip", "netns", "add", namespace)
            await run("ip", "-n", namespace, "link", "set", "lo", "up")
        for number, network in enumerate(made):
            inside = ("ip", "-n", network.namespace)
            await run(*inside, "link", "add", "br0", "type", "bridge")
            await run(*inside, "address", "add", "192.168.0.1/16", "dev", "br0")
            await run(*inside, "address", "add", "fd00:1::1/64", "dev", "br0", "nodad")
            await run(*inside, "link", "set", "br0", "up")
            await run(*inside, "link", "add", "up0", "type", "veth", "peer", "name", f"j{number}", "netns", world)
            await run(*inside, "address", "add", f"10.99.{number}.2/30", "dev", "up0")
            await run("ip", "-n", world, "address", "add", f"10.99.{number}.1/30", "dev", f"j{number}")
            await run("ip", "-n", world, "link", "set", f"j{number}", "up")
            await run(*inside, "link", "set", "up0", "up")
            await run(*inside, "route", "add", "10.99.255.53", "via", f"10.99.{number}.1")
        await run("ip", "-n", world, "address", "add", "10.99.255.53/32", "dev", "lo")
        zone = tmp_path / "world.toml"
        addresses = ", ".join(f'"203.0.113.{number}"' for number in range(1, 251))
        zone.write_text(ZONE.format(many='"many.example.org"', addresses=addresses))
        resolver = await asyncio.create_subprocess_exec(
            "ip", "netns", "exec", world, sys.executable, "-c",
            "import sys; from vmnet_dns.server import main; sys.exit(main())", str(zone), "--listen", "10.99.255.53:53",
            stderr=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "dns")},
        )  # fmt: skip
        assert resolver.stderr is not None
        async with asyncio.timeout(DEADLINE):
            assert b"serving world" in await resolver.stderr.readline()
        yield made[0], made[1]
    finally:
        if resolver is not None:
            resolver.terminate()
            await resolver.wait()
        for namespace in namespaces:
            await (await asyncio.create_subprocess_exec("ip", "netns", "delete", namespace)).wait()


async def test_networks_are_apart_and_each_reaches_the_world_by_its_own_link(networks: tuple[Network, Network]) -> None:
    one, two = networks
    kernel = LinuxKernel()
    responders = Responders(kernel, upstreams=lambda: WORLD)
    try:
        await responders.serve(one, Names([endpoint("192.168.0.5/16", "fd00:1::5/64")]))
        await responders.serve(two, Names([endpoint("192.168.0.6/16", "fd00:1::6/64")]))
        for network, address, address6 in ((one, "192.168.0.5", "fd00:1::5"), (two, "192.168.0.6", "fd00:1::6")):
            for server in ("192.168.0.1", "fd00:1::1"):
                assert (await dig(network.namespace, server, "+short", BLUE)).split() == [address]
                assert (await dig(network.namespace, server, "+short", "+tcp", BLUE, "AAAA")).split() == [address6]
            assert (await dig(network.namespace, "192.168.0.1", "+short", "-x", address)).split() == [f"{BLUE}."]
        assert "status: NXDOMAIN" in await dig(one.namespace, "192.168.0.1", "-x", "192.168.0.6")
        # 250 addresses do not fit a datagram: the responder has to ask its upstream over TCP, and so has dig.
        for network in networks:
            assert len((await dig(network.namespace, "192.168.0.1", "+short", "many.example.org")).split()) == 250
            assert "status: NXDOMAIN" in await dig(network.namespace, "192.168.0.1", "nobody.example.org")
    finally:
        await responders.close()
        await kernel.close()


async def test_without_a_way_to_the_world_failure_comes_soon(networks: tuple[Network, Network]) -> None:
    one, _ = networks
    await run("ip", "-n", one.namespace, "link", "set", "up0", "down")
    kernel = LinuxKernel()
    responders = Responders(kernel, upstreams=lambda: WORLD)
    clock = asyncio.get_running_loop().time
    try:
        await responders.serve(one, Names([]))
        began = clock()
        assert "status: SERVFAIL" in await dig(one.namespace, "192.168.0.1", "www.example.org")
        # A stub resolver gives up after 5 s.
        assert clock() - began < 5
        assert "status: NXDOMAIN" in await dig(one.namespace, "192.168.0.1", BLUE)
    finally:
        await responders.close()
        await kernel.close()


LOOKUP = Path(__file__).parents[1] / "lookup.c"


async def test_resolvers_of_others_find_names_by_the_search_list(
    networks: tuple[Network, Network], tmp_path: Path
) -> None:
    one, _ = networks
    program = tmp_path / "lookup"
    await run("musl-gcc", "-static", "-o", str(program), str(LOOKUP))
    # "ip netns exec" puts this in the place of /etc/resolv.conf.
    configuration = Path("/etc/netns") / one.namespace
    kernel = LinuxKernel()
    responders = Responders(kernel, upstreams=lambda: WORLD)
    inside = ("ip", "netns", "exec", one.namespace)
    try:
        configuration.mkdir(parents=True)
        for server in ("192.168.0.1", "fd00:1::1"):
            (configuration / "resolv.conf").write_text(
                f"nameserver {server}\n"
                "search ns.vm.cluster.local vm.cluster.local ns.svc.cluster.local svc.cluster.local cluster.local\n"
                "options ndots:5 timeout:5\n"
            )
            await responders.serve(one, Names([endpoint("192.168.0.5/16", "fd00:1::5/64")]))
            for name in ("blue", "blue.ns", "BLUE.ns.vm.cluster.local."):
                found = await run(*inside, "getent", "ahosts", name)
                assert {line.split()[0] for line in found.splitlines()} == {"192.168.0.5", "fd00:1::5"}
                assert set((await run(*inside, str(program), name)).split()) == {"192.168.0.5", "fd00:1::5"}
                told = await run(*inside, "host", name)
                assert "has address 192.168.0.5" in told
                assert "has IPv6 address fd00:1::5" in told
            found = await run(*inside, "getent", "hosts", "192.168.0.5")
            assert found.split() == ["192.168.0.5", BLUE]
            assert (await run(*inside, str(program), "red")).split() == ["none"]
            # More than a datagram holds: glibc asks again over TCP, musl 1.2.3 knows none and takes what is there.
            assert len(set((await run(*inside, str(program), "many.example.org")).split())) > 20
            many = await run(*inside, "getent", "ahostsv4", "many.example.org")
            assert len({line.split()[0] for line in many.splitlines()}) == 250
    finally:
        await responders.close()
        await kernel.close()
        shutil.rmtree(configuration, ignore_errors=True)


async def test_names_are_told_while_the_world_is_away_and_what_was_asked_before_too(
    networks: tuple[Network, Network],
) -> None:
    one, _ = networks
    kernel = LinuxKernel()
    responders = Responders(kernel, upstreams=lambda: WORLD)
    try:
        await responders.serve(one, Names([endpoint("192.168.0.5/16", "fd00:1::5/64")]))
        assert "203.0.113.1" in await dig(one.namespace, "192.168.0.1", "+short", "www.example.org")
        await run("ip", "-n", one.namespace, "link", "set", "up0", "down")
        assert (await dig(one.namespace, "192.168.0.1", "+short", BLUE)).split() == ["192.168.0.5"]
        assert "203.0.113.1" in await dig(one.namespace, "192.168.0.1", "+short", "www.example.org")
    finally:
        await responders.close()
        await kernel.close()
