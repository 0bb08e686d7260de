"""Responders on real sockets; what only a network namespace can show is in tests/netns."""

import asyncio
import socket
from collections.abc import AsyncIterator
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface, ip_network
from typing import Any

import dns.asyncquery
import dns.message
import dns.rcode
import pytest

from vmnet.agent.responder import Names, Responders, endpoint_records
from vmnet.kernel.api import KernelError
from vmnet.metrics import DNS_TALLIES, REGISTRY
from vmnet.model.endpoint import Endpoint, MachineReference, PodReference
from vmnet.model.names import MacAddress, NamespaceName, NetworkId
from vmnet.model.network import Network
from vmnet.model.service import Service
from vmnet_dns.forward import Routes, Upstream
from vmnet_dns.message import decode_name

DEADLINE = 20
MAC = MacAddress("0a:58:7f:00:00:05")
BLUE = "blue.blue-namespace.vm.cluster.local"


def endpoint(
    *addresses: str, name: str = "virt-launcher-blue", machine: str | None = "blue", namespace: str = "blue-namespace"
) -> Endpoint:
    return Endpoint(
        pod=PodReference(namespace, name, f"uid-{name}"),
        network="happy",
        node="n1",
        mac=MAC,
        addresses=tuple(ip_interface(text) for text in addresses),
        machine=MachineReference(namespace, machine) if machine else None,
    )


def network(number: int, name: str = "happy", subnets: tuple[str, ...] = ("127.0.0.0/8",)) -> Network:
    return Network(name, NetworkId(number), subnets=tuple(ip_network(text) for text in subnets))


class LoopbackKernel:
    """Opens the sockets on this machine's loopback, on ports of their own, and remembers whose they are."""

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        self.streams: dict[str, socket.socket] = {}
        self.opened: list[socket.socket] = []
        self.outgoing: list[tuple[str, str]] = []
        self.fail = False

    async def udp_socket(
        self, namespace: NamespaceName, address: IPv4Address | IPv6Address, port: int
    ) -> socket.socket:
        if self.fail:
            raise KernelError("no such namespace")
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        self.opened.append(sock)
        if port:
            self._bind_both(sock, namespace, str(address))
        else:
            assert address == IPv4Address(0)
            self.outgoing.append((namespace, "udp"))
        return sock

    async def tcp_listener(
        self, namespace: NamespaceName, address: IPv4Address | IPv6Address, port: int
    ) -> socket.socket:
        sock = self.streams.pop(namespace)
        sock.setblocking(False)
        sock.listen()
        self.opened.append(sock)
        return sock

    def _bind_both(self, datagrams: socket.socket, namespace: NamespaceName, address: str) -> None:
        """One free port for both: a port that is free for UDP may be somebody's TCP port."""
        while True:
            stream = socket.create_server((address, 0))
            try:
                datagrams.bind(stream.getsockname())
            except OSError:
                stream.close()
                continue
            self.streams[namespace] = stream
            self.ports[namespace] = stream.getsockname()[1]
            return

    async def tcp_socket(self, namespace: NamespaceName, family: int) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        self.outgoing.append((namespace, "tcp"))
        return sock

    async def ask(self, of: Network, name: str, kind: str = "A", *, tcp: bool = False) -> dns.message.Message:
        query = dns.message.make_query(name, kind)
        send: Any = dns.asyncquery.tcp if tcp else dns.asyncquery.udp
        reply: dns.message.Message = await send(query, "127.0.0.1", port=self.ports[of.namespace], timeout=DEADLINE)
        return reply

    async def told(self, of: Network, name: str, kind: str = "A") -> list[str]:
        reply = await self.ask(of, name, kind)
        return sorted(item.to_text() for rrset in reply.answer for item in rrset)


@pytest.fixture
def kernel() -> LoopbackKernel:
    return LoopbackKernel()


@pytest.fixture
async def responders(kernel: LoopbackKernel) -> AsyncIterator[Responders]:
    made = Responders(kernel, upstreams=dict)  # type: ignore[arg-type]
    yield made
    await made.close()


def texts(*endpoints: Endpoint) -> set[tuple[str, int, str]]:
    found = set()
    for record in [item for one in endpoints for item in endpoint_records(one, "cluster.local", "default")]:
        data = decode_name(record.data) if record.type == 12 else str(ip_address(record.data))
        found.add((decode_name(record.owner), record.type, data))
    return found


def test_names_of_a_machine_and_of_a_pod() -> None:
    machine = endpoint("192.168.0.5/16", "fd00:1::5/64")
    assert texts(machine) == {
        (f"{BLUE}.", 1, "192.168.0.5"),
        (f"{BLUE}.", 28, "fd00:1::5"),
        (f"default.{BLUE}.", 1, "192.168.0.5"),
        (f"default.{BLUE}.", 28, "fd00:1::5"),
        ("192-168-0-5.blue-namespace.pod.cluster.local.", 1, "192.168.0.5"),
        ("fd00-1--5.blue-namespace.pod.cluster.local.", 28, "fd00:1::5"),
        ("5.0.168.192.in-addr.arpa.", 12, f"{BLUE}."),
        (f"{ip_address('fd00:1::5').reverse_pointer}.", 12, f"{BLUE}."),
    }
    pod = endpoint("192.168.0.9/16", name="web", machine=None)
    assert texts(pod) == {
        ("192-168-0-9.blue-namespace.pod.cluster.local.", 1, "192.168.0.9"),
        ("9.0.168.192.in-addr.arpa.", 12, "192-168-0-9.blue-namespace.pod.cluster.local."),
    }


def test_the_time_to_live_is_the_administrators() -> None:
    assert {record.ttl for record in endpoint_records(endpoint("192.168.0.5/16"), "cluster.local", ttl=7)} == {7}


async def test_a_machine_that_migrates_keeps_its_name_whichever_pod_goes_first(
    kernel: LoopbackKernel, responders: Responders
) -> None:
    source, target = endpoint("127.0.0.5/8", name="a"), endpoint("127.0.0.5/8", name="b")
    happy = network(7)
    for present in ([source], [source, target], [target], [target, source], [source]):
        await responders.serve(happy, Names(present))
        assert await kernel.told(happy, BLUE) == ["127.0.0.5"]
        assert await kernel.told(happy, "5.0.0.127.in-addr.arpa", "PTR") == [f"{BLUE}."]
    await responders.serve(happy, Names([]))
    assert (await kernel.ask(happy, BLUE)).rcode() == dns.rcode.NXDOMAIN


def test_a_name_that_dns_cannot_carry_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    long = endpoint("192.168.0.6/16", name="long", machine="x" * 64)
    assert texts(long, endpoint("192.168.0.5/16")) == texts(endpoint("192.168.0.5/16"))
    assert "blue-namespace/long has no name in DNS" in caplog.text


async def test_names_come_and_go_on_the_same_sockets(kernel: LoopbackKernel, responders: Responders) -> None:
    happy = network(7)
    await responders.serve(happy, Names([]))
    assert responders.serving(happy.id)
    assert await kernel.told(happy, "dns-version.cluster.local", "TXT") == ['"1.1.0"']
    assert (await kernel.ask(happy, BLUE)).rcode() == dns.rcode.NXDOMAIN
    await responders.serve(happy, Names([endpoint("127.0.0.5/8")]))
    assert await kernel.told(happy, BLUE) == ["127.0.0.5"]
    assert await kernel.told(happy, "5.0.0.127.in-addr.arpa", "PTR") == [f"{BLUE}."]
    assert (await kernel.ask(happy, BLUE, tcp=True)).answer
    await responders.serve(happy, Names([]))
    assert (await kernel.ask(happy, BLUE)).rcode() == dns.rcode.NXDOMAIN
    assert len(kernel.opened) == 2


async def test_networks_with_equal_names_and_addresses_are_kept_apart(
    kernel: LoopbackKernel, responders: Responders
) -> None:
    one, two = network(1, "one"), network(2, "two")
    await responders.serve(one, Names([endpoint("127.0.0.5/8"), endpoint("127.0.0.6/8", name="r", machine="red")]))
    await responders.serve(two, Names([endpoint("127.0.0.6/8")]))
    assert await kernel.told(one, BLUE) == ["127.0.0.5"]
    assert await kernel.told(two, BLUE) == ["127.0.0.6"]
    assert (await kernel.ask(two, "red.blue-namespace.vm.cluster.local")).rcode() == dns.rcode.NXDOMAIN
    assert await kernel.told(one, "6.0.0.127.in-addr.arpa", "PTR") == ["red.blue-namespace.vm.cluster.local."]
    assert await kernel.told(two, "6.0.0.127.in-addr.arpa", "PTR") == [f"{BLUE}."]


async def test_a_removed_network_gives_its_sockets_back(kernel: LoopbackKernel, responders: Responders) -> None:
    happy = network(7)
    await responders.serve(happy, Names([]))
    await responders.remove(happy.id)
    await responders.remove(happy.id)
    assert not responders.serving(happy.id)
    assert all(sock.fileno() < 0 for sock in kernel.opened)


async def test_other_gateways_open_other_sockets(kernel: LoopbackKernel, responders: Responders) -> None:
    await responders.serve(network(7), Names([]))
    await responders.serve(network(7, subnets=("127.1.0.0/16",)), Names([]))
    assert [sock.fileno() < 0 for sock in kernel.opened] == [True, True, False, False]


async def test_a_namespace_that_is_not_there_leaves_nothing_and_is_tried_again(
    kernel: LoopbackKernel, responders: Responders
) -> None:
    kernel.fail = True
    with pytest.raises(KernelError):
        await responders.serve(network(7), Names([]))
    assert not responders.serving(NetworkId(7))
    kernel.fail = False
    await responders.serve(network(7), Names([endpoint("127.0.0.5/8")]))
    assert await kernel.told(network(7), BLUE) == ["127.0.0.5"]


async def test_updates_at_once_open_one_set_of_sockets(kernel: LoopbackKernel, responders: Responders) -> None:
    await asyncio.gather(*(responders.serve(network(7), Names([endpoint("127.0.0.5/8")])) for _ in range(5)))
    assert len(kernel.opened) == 2


async def test_names_follow_without_the_kernel(kernel: LoopbackKernel, responders: Responders) -> None:
    happy = network(7)
    assert not responders.follow("happy", Names)
    await responders.serve(happy, Names())
    kernel.fail = True
    web = Service("red", "web", (ip_address("10.96.0.7"),), ())
    for endpoints, services, told in (
        ([endpoint("127.0.0.5/8")], [web], ["127.0.0.5"]),
        ([endpoint("127.0.0.6/8")], [web], ["127.0.0.6"]),
        ([], [web], []),
    ):
        assert responders.follow("happy", partial(Names, endpoints, services))
        # The very next question sees it: nothing was awaited in between.
        assert await kernel.told(happy, BLUE) == told
        assert await kernel.told(happy, "web.red.svc.cluster.local") == ["10.96.0.7"]
        assert await kernel.told(happy, "7.0.96.10.in-addr.arpa", "PTR") == ["web.red.svc.cluster.local."]


async def test_what_has_changed_is_right_with_the_next_question_and_the_others_stay(
    kernel: LoopbackKernel, responders: Responders
) -> None:
    happy = network(7)
    assert not responders.touch("happy", {})
    red = endpoint("127.0.0.9/8", name="red", machine="red")
    source, target = endpoint("127.0.0.5/8", name="a"), endpoint("127.0.0.5/8", name="b")
    await responders.serve(happy, Names([red]))
    for touched, told in (
        ({"uid-a": source}, ["127.0.0.5"]),
        ({"uid-b": target}, ["127.0.0.5"]),
        ({"uid-a": None, "uid-never": None}, ["127.0.0.5"]),
        ({"uid-b": endpoint("127.0.0.6/8", name="b")}, ["127.0.0.6"]),
        ({"uid-b": None}, []),
    ):
        assert responders.touch("happy", touched)
        assert await kernel.told(happy, BLUE) == told
        assert await kernel.told(happy, "red.blue-namespace.vm.cluster.local") == ["127.0.0.9"]
    # The whole of it finds nothing else.
    responders.follow("happy", lambda: Names([red]))
    assert await kernel.told(happy, "9.0.0.127.in-addr.arpa", "PTR") == ["red.blue-namespace.vm.cluster.local."]


async def test_the_interface_has_the_name_of_the_machines_specification(kernel: LoopbackKernel) -> None:
    known: dict[str, str] = {}
    responders = Responders(kernel, upstreams=dict, interface=lambda machine: known.get(machine.name))  # type: ignore[arg-type]
    happy, blue = network(7), endpoint("127.0.0.5/8")
    await responders.serve(happy, Names([blue]))
    assert await kernel.told(happy, f"tenant.{BLUE}") == []
    known["blue"] = "tenant"
    responders.follow("happy", lambda: Names([blue]))
    assert await kernel.told(happy, f"tenant.{BLUE}") == ["127.0.0.5"]
    await responders.close()


async def test_nobody_is_asked_for_the_names_of_other_networks_addresses(kernel: LoopbackKernel) -> None:
    asked: list[str] = []

    def upstreams() -> Routes:
        return {b"\x00": [Upstream(ip_address("127.0.0.254"))]}

    responders = Responders(kernel, upstreams=upstreams)  # type: ignore[arg-type]
    happy = network(7)
    await responders.serve(happy, Names())
    other = "5.0.103.103.in-addr.arpa"
    assert (await kernel.ask(happy, other, "PTR")).rcode() == dns.rcode.SERVFAIL
    asked.extend(kind for _, kind in kernel.outgoing)
    assert asked
    kernel.outgoing.clear()
    responders.deny(frozenset({ip_network("103.103.0.0/16")}))
    assert (await kernel.ask(happy, other, "PTR")).rcode() == dns.rcode.NXDOMAIN
    assert not kernel.outgoing
    await responders.close()


async def test_the_world_is_asked_from_inside_the_network_and_requests_are_counted(kernel: LoopbackKernel) -> None:
    def counted(*labels: str) -> int:
        return DNS_TALLIES["counted"].queries.get((labels[0], labels[1], labels[2]), 0)

    responders = Responders(
        kernel,  # type: ignore[arg-type]
        upstreams=lambda: {b"\x00": [Upstream(ip_address("127.0.0.254"))]},
    )
    happy = network(9, "counted")
    await responders.serve(happy, Names([endpoint("127.0.0.5/8")]))
    await kernel.ask(happy, BLUE)
    # Nothing listens on port 53 of 127.0.0.254: an ICMP error comes at once.
    assert (await kernel.ask(happy, "example.org")).rcode() == dns.rcode.SERVFAIL
    assert ("vmnet-9", "udp") in kernel.outgoing
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"noise", ("127.0.0.1", kernel.ports[happy.namespace]))
    async with asyncio.timeout(DEADLINE):
        while not counted("other", "NOERROR", "malformed"):
            await asyncio.sleep(0.005)
    assert counted("A", "NOERROR", "local") == 1
    assert counted("A", "SERVFAIL", "failed") == 1
    labels = {"network": "counted", "type": "A", "rcode": "NOERROR", "outcome": "local"}
    assert REGISTRY.get_sample_value("vmnet_dns_requests_total", labels) == 1
    times = {"network": "counted", "outcome": "local", "le": "+Inf"}
    assert REGISTRY.get_sample_value("vmnet_dns_request_seconds_bucket", times) == 1
    await responders.close()
    assert "counted" not in DNS_TALLIES
