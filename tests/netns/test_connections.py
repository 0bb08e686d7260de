"""Conntrack entries written by netlink do on the real kernel what they are written for."""

import os
import socket
import subprocess
from collections.abc import AsyncIterator
from functools import partial
from ipaddress import ip_address
from typing import Any

import pytest
import pytest_asyncio

from vmnet.kernel import connections, namespaces
from vmnet.kernel.api import Gone
from vmnet.kernel.linux import LinuxKernel
from vmnet.model.connection import ASSURED, SEEN_REPLY, TCP, UDP, Connection, Flow, Outcome, TcpState
from vmnet.model.names import NamespaceName
from vmnet.plan import carried, ops
from vmnet.plan.state import Datagrams

pytestmark = pytest.mark.timeout(120)

OWN = {4: "192.168.0.5", 6: "fd20::5"}
BACKEND = {4: "192.168.0.9", 6: "fd20::9"}
SERVICE = {4: "10.96.0.7", 6: "fd00:10:96::7"}
_RULES = """\
table inet test {
  chain out {
    type nat hook output priority -100;
    ip daddr 10.96.0.7 udp dport 80 dnat to 192.168.0.77
    ip6 daddr fd00:10:96::7 udp dport 80 dnat to fd20::77
  }
  chain in { type nat hook input priority 100; }
}
"""


def flow(source: str, destination: str, protocol: int = UDP, ports: tuple[int, int] = (1000, 80)) -> Flow:
    return Flow(protocol, ip_address(source), ports[0], ip_address(destination), ports[1])


def entry(original: Flow, reply: Flow | None = None, mark: int = 0, timeout: int = 100) -> Connection:
    tcp = TcpState(3, (7, 7), (3, 3)) if original.protocol == TCP else None
    return Connection(original, reply or original.reversed(), SEEN_REPLY | ASSURED, timeout, mark, tcp)


def served(version: int, protocol: int = UDP) -> Connection:
    asked = flow(OWN[version], SERVICE[version], protocol)
    return entry(asked, flow(BACKEND[version], OWN[version], protocol, (8080, 1000)))


def program(*argv: str, text: str = "") -> None:
    subprocess.run(argv, input=text, text=True, check=True)


@pytest_asyncio.fixture
async def place() -> AsyncIterator[tuple[LinuxKernel, NamespaceName]]:
    """A namespace with both ends of every connection on its loopback, and a NAT that means another backend."""
    name = NamespaceName(f"conntrack-{os.getpid()}")
    program("ip", "netns", "add", name)
    kernel = LinuxKernel()
    try:
        program("ip", "-n", name, "link", "set", "lo", "up")
        for way in (["default"], ["-6", "default"]):
            program("ip", "-n", name, *way[:-1], "route", "add", way[-1], "dev", "lo")
        for text in (*OWN.values(), *BACKEND.values(), "192.168.0.77", "fd20::77"):
            program("ip", "-n", name, "addr", "add", text, "dev", "lo", *(["nodad"] if ":" in text else []))
        program("ip", "netns", "exec", name, "nft", "-f", "-", text=_RULES)
        yield kernel, name
    finally:
        await kernel.close()
        program("ip", "netns", "del", name)


async def inside(kernel: LinuxKernel, name: NamespaceName, function: Any) -> Any:
    return await kernel._workers.run(str(namespaces.path_of(name)), function)


def datagram(address: str, port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    found.bind((address, port))
    found.settimeout(10)
    return found


@pytest.mark.parametrize("version", [4, 6])
async def test_a_connection_goes_on_to_the_backend_that_its_entry_names(place: Any, version: int) -> None:
    kernel, name = place
    wanted = served(version)
    assert await kernel.put_connections(name, [wanted]) == (Outcome.PLACED,)

    def exchange() -> tuple[Any, Any]:
        with datagram(OWN[version], 1000) as own, datagram(BACKEND[version], 8080) as backend:
            own.sendto(b"question", (SERVICE[version], 80))
            question, asker = backend.recvfrom(100)
            backend.sendto(b"answer", asker)
            answer, speaker = own.recvfrom(100)
            return (question, asker[:2]), (answer, speaker[:2])

    asked, answered = await inside(kernel, name, exchange)
    assert asked == (b"question", (OWN[version], 1000))
    assert answered == (b"answer", (SERVICE[version], 80))
    (found,) = await kernel.connections_of(name, [ip_address(OWN[version])])
    assert (found.original, found.reply) == (wanted.original, wanted.reply)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
async def test_what_translates_takes_the_place_of_what_does_not(place: Any, version: int, protocol: int) -> None:
    kernel, name = place
    wanted = served(version, protocol)
    own = [ip_address(OWN[version])]
    elsewhere = entry(
        wanted.original, flow("192.168.0.77" if version == 4 else "fd20::77", OWN[version], protocol, (80, 1000))
    )
    for before in (entry(wanted.reply.reversed()), entry(wanted.reply), elsewhere):
        assert await kernel.put_connections(name, [before]) == (Outcome.PLACED,)
        assert await kernel.put_connections(name, [wanted, wanted]) == (Outcome.PLACED, Outcome.PLACED)
        (found,) = await kernel.connections_of(name, own)
        assert (found.original, found.reply) == (wanted.original, wanted.reply)
        assert await kernel.forget_connections(name, [wanted.reply]) == 1
        assert await kernel.connections_of(name, own) == ()


async def test_what_the_kernel_knows_better_stays(place: Any) -> None:
    kernel, name = place
    own = served(4)
    assert await kernel.put_connections(name, [own]) == (Outcome.PLACED,)
    plain = entry(own.reply.reversed())
    assert await kernel.put_connections(name, [plain]) == (Outcome.KNOWN,)
    assert [item.original for item in await kernel.connections_of(name, [ip_address(OWN[4])])] == [own.original]


@pytest.mark.parametrize("version", [4, 6])
async def test_entries_are_brought_up_to_date_and_forgotten_by_mark(place: Any, version: int) -> None:
    kernel, name = place
    own = ip_address(OWN[version])
    out = flow(OWN[version], "172.30.0.100" if version == 4 else "fd00:30::100")
    other = flow(OWN[version], BACKEND[version])
    assert await kernel.put_connections(name, [entry(out, mark=5, timeout=50), entry(other)]) == (Outcome.PLACED,) * 2
    assert await kernel.put_connections(name, [entry(out, mark=6, timeout=400)]) == (Outcome.PLACED,)
    found = {item.original: item for item in await kernel.connections_of(name, [own])}
    assert found[out].mark == 6
    assert 300 < found[out].timeout <= 400
    await kernel.forget_marked(name, 5)
    assert len(await kernel.connections_of(name, [own])) == 2
    await kernel.forget_marked(name, 6)
    assert [item.original for item in await kernel.connections_of(name, [own])] == [other]
    assert await kernel.forget_connections(name, [other.reversed(), other]) == 1


async def test_only_an_address_s_own_connections_are_found_whoever_began(place: Any) -> None:
    kernel, name = place
    went, came = flow(OWN[4], BACKEND[4]), flow(BACKEND[4], OWN[4], TCP)
    others = [flow("192.168.0.7", "192.168.0.8"), flow("fd20::7", "fd20::8")]
    six = flow(BACKEND[6], OWN[6])
    await kernel.put_connections(name, [entry(item) for item in (went, came, six, *others)])
    found = await kernel.connections_of(name, [ip_address(text) for text in OWN.values()])
    assert {item.original for item in found} == {went, came, six}
    assert next(item for item in found if item.original == came).tcp == TcpState(3, (7, 7), (11, 11))


@pytest.mark.parametrize("version", [4, 6])
async def test_datagrams_that_are_led_elsewhere_are_found_and_forgotten(place: Any, version: int) -> None:
    """Not streams; what nobody translates leads to who was asked."""
    kernel, name = place
    wanted = served(version)
    others = [served(version, TCP), entry(flow(BACKEND[version], OWN[version], UDP, (2000, 2000)))]
    assert await kernel.put_connections(name, [wanted, *others]) == (Outcome.PLACED,) * 3
    asked, reply, plain = wanted.original, wanted.reply, others[1].original
    found = frozenset({Datagrams(asked.destination, 80, reply.source, 8080, asked)})
    untranslated = Datagrams(plain.destination, 2000, plain.destination, 2000, plain)
    assert await kernel.datagrams(name) == {*found, untranslated}
    assert await kernel.forget_datagrams(name, found) == 1
    assert await kernel.forget_datagrams(name, found) == 0
    assert await kernel.datagrams(name) == {untranslated}
    assert len(await kernel.connections_of(name, [ip_address(OWN[version])])) == 2


async def test_who_translates_for_somebody_is_still_needed(place: Any) -> None:
    kernel, name = place
    await kernel.put_connections(name, [entry(flow(OWN[4], BACKEND[4])), served(6)])
    # Datagrams that nobody translates may come from anywhere.
    assert await kernel.connections(name) == {ip_address(text) for text in (OWN[6], BACKEND[6], SERVICE[6])}


async def test_a_namespace_that_has_gone_is_said_to_be(place: Any) -> None:
    kernel, _ = place
    with pytest.raises(Gone):
        await kernel.connections_of(NamespaceName("no-such"), [ip_address(OWN[4])])
    with pytest.raises(Gone):
        await kernel.put_connections(NamespaceName("no-such"), [served(4)])


async def test_a_packet_that_makes_its_own_entry_meanwhile_does_not_win(place: Any) -> None:
    """Plain entries come back as often as they are deleted, while the translating one is written."""
    kernel, name = place
    wanted = served(4)

    def race() -> list[Outcome]:
        with datagram(BACKEND[4], 8080) as backend, datagram(OWN[4], 1000), connections.Conntrack() as conntrack:
            outcomes = []
            for _ in range(50):
                backend.sendto(b"words", (OWN[4], 1000))
                outcomes.append(conntrack.put(wanted))
                conntrack.delete(wanted.original)
            return outcomes

    assert set(await inside(kernel, name, race)) == {Outcome.PLACED}


@pytest.mark.parametrize("version", [4, 6])
async def test_what_is_held_passes_once_its_entry_is_there(place: Any, version: int) -> None:
    """Neither question nor answer is taken for something new; nothing else is held, and a release holds nothing."""
    kernel, name = place
    wanted = served(version)
    script = carried.hold_script([wanted], [ip_address(OWN[version])])
    for _ in range(2):
        await kernel.apply([ops.LoadFirewall(name, script)])

    def passes(source: str, destination: str, ports: tuple[int, int]) -> bool:
        with datagram(source, ports[0]) as sender, datagram(destination, ports[1]) as receiver:
            receiver.settimeout(0.2)
            sender.sendto(b"words", (destination, ports[1]))
            try:
                return receiver.recv(100) == b"words"
            except TimeoutError:
                return False

    back = partial(passes, BACKEND[version], OWN[version], (8080, 1000))
    forth = partial(passes, OWN[version], BACKEND[version], (1000, 8080))
    other = partial(passes, OWN[version], BACKEND[version], (1001, 8080))

    async def anew(way: Any) -> bool:
        # On a loopback a packet's entry is made before the packet is judged.
        await kernel.forget_connections(name, [wanted.reply])
        return bool(await inside(kernel, name, way))

    assert [await anew(way) for way in (back, forth, other)] == [False, False, True]
    # As the backend's own node keeps it.
    await kernel.forget_connections(name, [wanted.reply])
    assert await kernel.put_connections(name, [carried.handed_over(wanted)]) == (Outcome.PLACED,)
    assert [await inside(kernel, name, way) for way in (back, forth)] == [True, True]
    assert not await anew(forth)
    await kernel.apply([ops.LoadFirewall(name, carried.release_script())] * 2)
    assert await anew(forth)
