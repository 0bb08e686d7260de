"""GuestServices on socket pairs that stand for the bridge; real clients are in tests/netns."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_interface, ip_network
from typing import cast

import pytest

from vmnet.agent import guests
from vmnet.agent.guests import GuestServices
from vmnet.kernel.api import Gone, Kernel
from vmnet.model.endpoint import Endpoint, MachineReference, PodReference
from vmnet.model.names import InterfaceName, MacAddress, NamespaceName, NetworkId
from vmnet.model.network import Network
from vmnet.wire import datagram, dhcp4, ndp
from vmnet.wire.datagram import Datagram
from vmnet.wire.ndp import Packet, RouterAdvertisement, RouterSolicitation

NETWORK = Network("cluster_udn_happy", NetworkId(7), subnets=(ip_network("192.168.0.0/16"), ip_network("fd00:7::/64")))
MAC = MacAddress("0a:58:c0:a8:00:05")
ENDPOINT = Endpoint(
    PodReference("blue-ns", "virt-launcher-blue-abcde", "uid-blue"),
    NETWORK.name,
    "n1",
    MAC,
    (ip_interface("192.168.0.5/16"), ip_interface("fd00:7::5/64")),
    machine=MachineReference("blue-ns", "blue"),
)
MTU = 1400
DEADLINE = 10.0
BROADCAST = MacAddress("ff:ff:ff:ff:ff:ff")
DISCOVER = datagram.encode(
    Datagram(
        MAC,
        BROADCAST,
        dhcp4.UNSPECIFIED,
        dhcp4.LIMITED_BROADCAST,
        68,
        67,
        dhcp4.encode(dhcp4.Message(dhcp4.MessageType.DISCOVER, 1, MAC)),
    )
)
SOLICITATION = ndp.encode(
    Packet(MAC, MacAddress("33:33:00:00:00:02"), ndp.UNSPECIFIED, ndp.ALL_ROUTERS, RouterSolicitation())
)


class Wires:
    """Gives one end of a pair for each socket asked for and keeps the other, the guests' side."""

    def __init__(self) -> None:
        self.guests: dict[str, socket.socket] = {}
        self.opened: list[socket.socket] = []
        self.asked: list[tuple[object, ...]] = []
        self.gateway_missing = False

    async def packet_socket(
        self,
        namespace: NamespaceName,
        interface: InterfaceName,
        *,
        protocols: Sequence[int] = (),
        udp_ports: Sequence[int] = (),
    ) -> socket.socket:
        self.asked.append((namespace, interface, tuple(protocols), tuple(udp_ports)))
        return self._pair(namespace)

    async def udp_socket(
        self, namespace: NamespaceName, address: IPv4Address | IPv6Address, port: int
    ) -> socket.socket:
        if self.gateway_missing:
            raise Gone("no such address", errno=99)
        self.asked.append((namespace, str(address), port))
        return self._pair(f"{namespace}/udp")

    def _pair(self, name: str) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        theirs.setblocking(False)
        if name in self.guests:
            self.guests[name].close()
        self.guests[name] = theirs
        self.opened.append(ours)
        return ours

    async def heard(self, namespace: str = NETWORK.namespace) -> bytes:
        receive = asyncio.get_running_loop().sock_recv(self.guests[namespace], 4096)
        return await asyncio.wait_for(receive, DEADLINE)


def never(low: float, high: float) -> float:
    """Advertisements as far apart as they may be."""
    return high


@pytest.fixture
def wires() -> Wires:
    return Wires()


@pytest.fixture
async def services(wires: Wires) -> AsyncIterator[GuestServices]:
    served = GuestServices(cast(Kernel, wires), "cluster.local", draw=never)
    yield served
    served.close()
    for wire in wires.guests.values():
        wire.close()
    assert all(opened.fileno() == -1 for opened in wires.opened), "every socket was closed"


async def test_it_opens_one_filtered_socket_and_holds_the_dhcp_port(services: GuestServices, wires: Wires) -> None:
    for _ in range(3):
        await services.update(NETWORK, MTU, [ENDPOINT])
    assert wires.asked == [("vmnet-7", "br0", (0x0800, 0x86DD), (67, 547)), ("vmnet-7", "192.168.0.1", 67)]


async def test_a_served_machine_is_advertised_to_and_answered(services: GuestServices, wires: Wires) -> None:
    await services.update(NETWORK, MTU, [ENDPOINT])
    unsolicited = ndp.decode(await wires.heard())
    assert isinstance(unsolicited.message, RouterAdvertisement)
    wires.guests["vmnet-7"].send(DISCOVER)
    offer = datagram.decode(await wires.heard())
    assert dhcp4.decode(offer.payload).your == IPv4Address("192.168.0.5")
    wires.guests["vmnet-7"].send(SOLICITATION)
    assert ndp.decode(await wires.heard()) == unsolicited


async def test_a_repeated_update_says_nothing_and_a_change_is_advertised(services: GuestServices, wires: Wires) -> None:
    await services.update(NETWORK, MTU, [ENDPOINT])
    await wires.heard()
    await services.update(NETWORK, MTU, [ENDPOINT])
    await services.update(NETWORK, MTU - 100, [ENDPOINT])
    changed = ndp.decode(await wires.heard())
    assert isinstance(changed.message, RouterAdvertisement)
    assert changed.message.mtu == MTU - 100


async def test_advertisements_are_repeated(wires: Wires) -> None:
    served = GuestServices(cast(Kernel, wires), "cluster.local", draw=lambda low, high: 0.001)
    await served.update(NETWORK, MTU, [ENDPOINT])
    frames = {await wires.heard() for _ in range(5)}
    assert len(frames) == 1
    served.close()
    wires.guests["vmnet-7"].close()
    wires.guests["vmnet-7/udp"].close()


async def test_a_pod_is_not_served(services: GuestServices, wires: Wires) -> None:
    pod = replace(ENDPOINT, machine=None, mac=MacAddress("0a:58:c0:a8:00:06"))
    await services.update(NETWORK, MTU, [pod])
    wires.guests["vmnet-7"].send(SOLICITATION.replace(bytes.fromhex("0a58c0a80005"), bytes.fromhex("0a58c0a80006")))
    wires.guests["vmnet-7"].send(DISCOVER)
    await services.update(NETWORK, MTU, [pod, ENDPOINT])
    # The first thing anyone hears is for the machine: the pod's solicitation, first in the queue, got no answer.
    heard = [await wires.heard(), await wires.heard()]
    assert {frame[:6] for frame in heard} == {bytes.fromhex("0a58c0a80005")}


async def test_networks_with_the_same_addresses_are_apart(services: GuestServices, wires: Wires) -> None:
    twin = replace(NETWORK, name="cluster_udn_twin", id=NetworkId(8))
    other = replace(ENDPOINT, network=twin.name, machine=MachineReference("red-ns", "red"))
    await services.update(NETWORK, MTU, [ENDPOINT])
    await services.update(twin, MTU, [other])
    await wires.heard("vmnet-7")
    await wires.heard("vmnet-8")
    wires.guests["vmnet-8"].send(DISCOVER)
    offer = dhcp4.decode(datagram.decode(await wires.heard("vmnet-8")).payload)
    assert offer.options[dhcp4.Option.HOSTNAME] == b"red"
    services.remove(twin.id)
    wires.guests["vmnet-7"].send(DISCOVER)
    offer = dhcp4.decode(datagram.decode(await wires.heard("vmnet-7")).payload)
    assert offer.options[dhcp4.Option.HOSTNAME] == b"blue"


async def test_a_machine_that_left_is_not_answered(services: GuestServices, wires: Wires) -> None:
    other = replace(ENDPOINT, mac=MacAddress("0a:58:c0:a8:00:06"), addresses=(ip_interface("192.168.0.6/16"),))
    await services.update(NETWORK, MTU, [ENDPOINT, other])
    await wires.heard()
    await services.update(NETWORK, MTU, [other])
    wires.guests["vmnet-7"].send(DISCOVER)
    wires.guests["vmnet-7"].send(DISCOVER.replace(bytes.fromhex("0a58c0a80005"), bytes.fromhex("0a58c0a80006")))
    assert dhcp4.decode(datagram.decode(await wires.heard()).payload).your == IPv4Address("192.168.0.6")


async def test_a_failed_start_leaves_nothing_open_and_can_be_repeated(services: GuestServices, wires: Wires) -> None:
    wires.gateway_missing = True
    with pytest.raises(Gone):
        await services.update(NETWORK, MTU, [ENDPOINT])
    assert wires.opened[0].fileno() == -1
    wires.gateway_missing = False
    await services.update(NETWORK, MTU, [ENDPOINT])
    assert isinstance(ndp.decode(await wires.heard()).message, RouterAdvertisement)


async def test_noise_does_not_stop_the_service(services: GuestServices, wires: Wires) -> None:
    await services.update(NETWORK, MTU, [ENDPOINT])
    await wires.heard()
    for noise in (b"x", b"", DISCOVER[:20], DISCOVER[:100], SOLICITATION[:40], SOLICITATION[:58], bytes(2000)):
        wires.guests["vmnet-7"].send(noise)
    wires.guests["vmnet-7"].send(DISCOVER)
    assert datagram.decode(await wires.heard()).destination_port == 68


async def test_a_flood_is_taken_in_batches(
    services: GuestServices, wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "_BATCH", 2)
    monkeypatch.setattr(guests, "_REST", 3600.0)
    await services.update(NETWORK, MTU, [ENDPOINT])
    await wires.heard()
    for _ in range(5):
        wires.guests["vmnet-7"].send(DISCOVER)
    assert await wires.heard() == await wires.heard()
    await asyncio.sleep(0)
    with pytest.raises(BlockingIOError):
        wires.guests["vmnet-7"].recv(4096)
    services.remove(NETWORK.id)  # while it rests


async def test_a_flood_delays_but_loses_nothing(
    services: GuestServices, wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "_BATCH", 2)
    monkeypatch.setattr(guests, "_REST", 0.001)
    await services.update(NETWORK, MTU, [ENDPOINT])
    await wires.heard()
    for _ in range(7):
        wires.guests["vmnet-7"].send(DISCOVER)
    assert len({await wires.heard() for _ in range(7)}) == 1


async def test_concurrent_updates_open_once(services: GuestServices, wires: Wires) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(services.update(NETWORK, MTU, [ENDPOINT]))
    assert len(wires.opened) == 2


def test_a_cluster_domain_that_dns_cannot_carry_is_refused(wires: Wires) -> None:
    with pytest.raises(ValueError):
        GuestServices(cast(Kernel, wires), "cluster..local")
