"""The announcer on socket pairs that stand for ``vx0`` and ``br0``, in virtual time."""

import asyncio
import selectors
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from ipaddress import ip_interface, ip_network
from typing import Any, cast

import pytest

from vmnet import metrics
from vmnet.agent.announcer import Announcer
from vmnet.announce.announcement import Kind
from vmnet.announce.schedule import ROUNDS
from vmnet.kernel.api import Gone, Kernel
from vmnet.model.endpoint import Endpoint, MachineReference, PodReference
from vmnet.model.names import InterfaceName, MacAddress, NamespaceName, NetworkId
from vmnet.model.network import Network
from vmnet.wire import arp

NETWORK = Network("cluster_udn_happy", NetworkId(7), subnets=(ip_network("192.168.0.0/16"), ip_network("fd00:7::/64")))
MAC = MacAddress("0a:58:c0:a8:00:05")
ENDPOINT = Endpoint(
    PodReference("blue-ns", "virt-launcher-blue-abcde", "uid-blue"),
    NETWORK.name,
    "n2",
    MAC,
    (ip_interface("192.168.0.5/16"), ip_interface("fd00:7::5/64")),
    machine=MachineReference("blue-ns", "blue"),
)
LABELS = ("blue-ns", "blue", "n2", NETWORK.name)
RED = replace(
    ENDPOINT,
    pod=PodReference("blue-ns", "virt-launcher-red-abcde", "uid-red"),
    mac=MacAddress("0a:58:c0:a8:00:06"),
    addresses=(ip_interface("192.168.0.6/16"),),
)
MTU = 1400
ROUND = 10
"""Frames of a round without the router advertisements."""


class Jump(selectors.DefaultSelector):
    """Instead of waiting, moves the clock on."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is not None:
            self.now += max(timeout, 0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.jump = Jump()
        super().__init__(self.jump)

    def time(self) -> float:
        return self.jump.now


class Wires:
    """Gives one end of a pair for each socket asked for and keeps the other, the far side of the interface."""

    def __init__(self) -> None:
        self.far: dict[str, socket.socket] = {}
        self.opened: list[socket.socket] = []
        self.missing: set[str] = set()

    async def packet_socket(
        self,
        namespace: NamespaceName,
        interface: InterfaceName,
        *,
        protocols: Sequence[int] = (),
        udp_ports: Sequence[int] = (),
    ) -> socket.socket:
        assert tuple(protocols) == (0x8035,), "nothing else is worth a wake-up"
        if interface in self.missing:
            raise Gone(f"no {interface}", errno=19)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        theirs.setblocking(False)
        self.far[interface] = theirs
        self.opened.append(ours)
        return ours

    def drain(self, interface: str) -> list[bytes]:
        frames = []
        while True:
            try:
                frames.append(self.far[interface].recv(4096))
            except BlockingIOError:
                return frames


Body = Callable[[Announcer, Wires], Awaitable[None]]


def in_virtual_time(body: Body) -> None:
    """Run a test whose seconds take no time; afterwards nothing may be open."""
    wires = Wires()

    async def main() -> None:
        announcer = Announcer(cast(Kernel, wires), "cluster.local", draw=lambda low, high: low)
        await body(announcer, wires)
        announcer.close()
        assert all(opened.fileno() == -1 for opened in wires.opened)
        for far in wires.far.values():
            far.close()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_nothing_is_sent_before_it_is_asked_for() -> None:
    wires = Wires()
    announcer = Announcer(cast(Kernel, wires), "cluster.local")
    await announcer.prepare(NETWORK, MTU, ENDPOINT)
    assert wires.drain("vx0") == wires.drain("br0") == []
    announcer.close()
    for far in wires.far.values():
        far.close()


def test_the_first_round_leaves_at_once_and_the_series_is_bounded() -> None:
    async def body(announcer: Announcer, wires: Wires) -> None:
        await announcer.prepare(NETWORK, MTU, ENDPOINT)
        before = {kind: metrics.ANNOUNCEMENTS.labels(*LABELS, kind.value)._value.get() for kind in Kind}
        start = now()
        assert announcer.announce(ENDPOINT, start) == ROUND + 2
        assert len(wires.drain("vx0")) == 5
        assert len(wires.drain("br0")) == 7
        reader = asyncio.create_task(keep_draining(wires))
        counts = await announcer.settled(ENDPOINT)
        reader.cancel()
        assert now() - start == pytest.approx(ROUNDS[-1])
        rounds = len(ROUNDS)
        assert counts == {
            Kind.RARP: rounds,
            Kind.GRATUITOUS_ARP: 4 * rounds,
            Kind.NEIGHBOR_ADVERTISEMENT: 4 * rounds,
            Kind.GATEWAY_ARP: rounds,
            Kind.ROUTER_ADVERTISEMENT: 2,
            Kind.ROUTER_FAREWELL: 2,
        }
        assert announcer.sent(ENDPOINT) == counts
        for kind, count in counts.items():
            assert metrics.ANNOUNCEMENTS.labels(*LABELS, kind.value)._value.get() - before[kind] == count
        metrics.forget_machine("blue-ns", "red")
        assert metrics.ANNOUNCEMENTS.labels(*LABELS, "rarp")._value.get() >= rounds, "another machine has gone"
        metrics.forget_machine("blue-ns", "blue")
        assert all(
            "blue" not in sample.labels.values() for sample in next(iter(metrics.ANNOUNCEMENTS.collect())).samples
        )

    in_virtual_time(body)


async def keep_draining(wires: Wires) -> None:
    """A pair holds few datagrams; the far side must keep reading."""
    while True:
        await asyncio.sleep(0.01)
        for interface in wires.far:
            wires.drain(interface)


def test_both_keys_of_one_cut_over_make_one_series() -> None:
    async def body(announcer: Announcer, wires: Wires) -> None:
        await announcer.prepare(NETWORK, MTU, ENDPOINT)
        assert announcer.announce(ENDPOINT, now()) > 0
        assert announcer.announce(ENDPOINT, now()) == 0

    in_virtual_time(body)


def test_a_cancelled_series_is_silent_and_can_begin_again() -> None:
    async def body(announcer: Announcer, wires: Wires) -> None:
        await announcer.prepare(NETWORK, MTU, ENDPOINT)
        announcer.announce(ENDPOINT, now())
        wires.drain("vx0")
        announcer.cancel(ENDPOINT)
        counts = await announcer.settled(ENDPOINT)
        assert counts.total() == ROUND + 2
        await asyncio.sleep(60)
        assert wires.drain("vx0") == []
        wires.drain("br0")
        assert announcer.announce(ENDPOINT, now()) == ROUND + 2

    in_virtual_time(body)


def test_a_reverse_arp_from_the_fabric_ends_the_series_of_its_machine_alone() -> None:
    async def body(announcer: Announcer, wires: Wires) -> None:
        await announcer.prepare(NETWORK, MTU, ENDPOINT)
        await announcer.prepare(NETWORK, MTU, RED)
        announcer.announce(ENDPOINT, now())
        wires.drain("vx0"), wires.drain("br0")
        announcer.announce(RED, now())
        wires.drain("vx0"), wires.drain("br0")
        wires.far["vx0"].send(b"\xff" * 30)
        wires.far["vx0"].send(arp.encode(arp.reverse_announcement(MAC)))
        reader = asyncio.create_task(keep_draining(wires))
        assert (await announcer.settled(ENDPOINT))[Kind.RARP] == 1
        assert (await announcer.settled(RED))[Kind.RARP] == len(ROUNDS)
        reader.cancel()

    in_virtual_time(body)


def test_who_has_moved_on_is_not_announced_by_a_loop_that_is_late() -> None:
    async def body(announcer: Announcer, wires: Wires) -> None:
        await announcer.prepare(NETWORK, MTU, ENDPOINT)
        announcer.announce(ENDPOINT, now())
        wires.drain("vx0"), wires.drain("br0")
        wires.far["vx0"].send(arp.encode(arp.reverse_announcement(MAC)))
        # The timer is overdue, and the frame has not been looked at: whichever comes first in the loop's turn.
        asyncio.get_running_loop().remove_reader(wires.opened[0])
        reader = asyncio.create_task(keep_draining(wires))
        assert (await announcer.settled(ENDPOINT))[Kind.RARP] == 1
        reader.cancel()

    in_virtual_time(body)


def test_a_reverse_arp_from_the_fabric_is_told_even_when_nothing_is_being_announced() -> None:
    """Its port is closed then, and somebody has to ask whether that is right."""
    told: list[Endpoint] = []

    async def body(_: Announcer, wires: Wires) -> None:
        announcer = Announcer(cast(Kernel, wires), "cluster.local", on_moved=told.append)
        await announcer.prepare(NETWORK, MTU, ENDPOINT)
        await announcer.prepare(NETWORK, MTU, RED)
        wires.far["vx0"].send(arp.encode(arp.reverse_announcement(MAC)))
        while not told:
            await asyncio.sleep(0.01)
        announcer.close()

    in_virtual_time(body)
    assert told == [ENDPOINT]


def test_what_was_not_prepared_is_not_announced() -> None:
    async def body(announcer: Announcer, wires: Wires) -> None:
        assert announcer.announce(ENDPOINT, now()) == 0
        assert announcer.sent(ENDPOINT) == await announcer.settled(ENDPOINT) == Counter()

    in_virtual_time(body)


def test_sockets_are_shared_and_go_with_the_last_port() -> None:
    async def body(announcer: Announcer, wires: Wires) -> None:
        async with asyncio.TaskGroup() as group:
            for endpoint in (ENDPOINT, RED, ENDPOINT):
                group.create_task(announcer.prepare(NETWORK, MTU, endpoint))
        assert len(wires.opened) == 2
        announcer.forget(ENDPOINT)
        assert all(opened.fileno() != -1 for opened in wires.opened)
        announcer.forget(RED)
        assert all(opened.fileno() == -1 for opened in wires.opened)

    in_virtual_time(body)


def test_a_removed_network_leaves_nothing() -> None:
    async def body(announcer: Announcer, wires: Wires) -> None:
        for endpoint in (ENDPOINT, RED):
            await announcer.prepare(NETWORK, MTU, endpoint)
        announcer.announce(ENDPOINT, now())
        announcer.remove(NETWORK.id)
        assert all(opened.fileno() == -1 for opened in wires.opened)
        assert announcer.announce(ENDPOINT, now()) == 0

    in_virtual_time(body)


def test_a_failed_preparation_leaves_nothing_open() -> None:
    async def body(announcer: Announcer, wires: Wires) -> None:
        wires.missing.add("br0")
        with pytest.raises(Gone):
            await announcer.prepare(NETWORK, MTU, ENDPOINT)
        assert all(opened.fileno() == -1 for opened in wires.opened)
        wires.far["vx0"].close()
        wires.missing.clear()
        await announcer.prepare(NETWORK, MTU, ENDPOINT)
        assert announcer.announce(ENDPOINT, now()) == ROUND + 2

    in_virtual_time(body)


def test_an_interface_that_went_away_ends_the_series_and_can_be_prepared_again() -> None:
    async def body(announcer: Announcer, wires: Wires) -> None:
        await announcer.prepare(NETWORK, MTU, ENDPOINT)
        for far in wires.far.values():
            far.close()
        assert announcer.announce(ENDPOINT, now()) == 0
        assert (await announcer.settled(ENDPOINT)).total() == 0
        await announcer.prepare(NETWORK, MTU, ENDPOINT)
        assert announcer.announce(ENDPOINT, now()) == ROUND + 2

    in_virtual_time(body)


def test_a_late_loop_sends_missed_rounds_once() -> None:
    async def body(announcer: Announcer, wires: Wires) -> None:
        await announcer.prepare(NETWORK, MTU, ENDPOINT)
        announcer.announce(ENDPOINT, now())
        wires.drain("vx0"), wires.drain("br0")
        cast(Any, asyncio.get_running_loop()).jump.now += 0.6
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        assert announcer.sent(ENDPOINT)[Kind.RARP] == 2

    in_virtual_time(body)
