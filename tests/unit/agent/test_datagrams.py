"""When entries are looked for and which go, on a kernel in memory."""

from ipaddress import ip_address, ip_interface, ip_network

import pytest

from vmnet.agent.datagrams import Backends, Datagrams, Ways
from vmnet.kernel.fake import FakeKernel
from vmnet.model.connection import UDP, Flow
from vmnet.model.endpoint import Endpoint, MachineReference, PodReference
from vmnet.model.names import MacAddress, NamespaceName, NetworkId
from vmnet.model.network import Network
from vmnet.plan import state
from vmnet.plan.services import Place
from vmnet.plan.state import NetworkState

NETWORK = Network("n", NetworkId(7), subnets=(ip_network("192.168.0.0/16"),))


def place(host: str, port: int) -> Place:
    return ip_address(host), port


WEB, OTHER, DNS = place("10.96.0.7", 80), place("10.96.0.8", 80), place("10.96.0.10", 53)
A, B = place("192.168.0.5", 8080), place("192.168.0.6", 8080)


def entry(asked: Place, backend: Place) -> state.Datagrams:
    return state.Datagrams(*asked, *backend, Flow(UDP, backend[0], 1000, *asked))


class Counting(FakeKernel):
    looks = 0

    async def datagrams(self, namespace: NamespaceName | None) -> frozenset[state.Datagrams]:
        self.looks += 1
        return await super().datagrams(namespace)


class World:
    def __init__(self) -> None:
        self.kernel = Counting()
        self.kernel.networks[NETWORK.namespace] = NetworkState(NETWORK.namespace)
        self.held = self.kernel.translated[NETWORK.namespace] = {
            entry(asked, backend) for asked in (WEB, OTHER, DNS) for backend in (A, B)
        }
        self.backends: Backends = {}
        self.machines: tuple[Endpoint, ...] = ()
        self.datagrams = Datagrams(self.kernel, lambda network: self.backends)

    async def follow(self, **backends: frozenset[Place]) -> set[state.Datagrams]:
        """Who answers for WEB and OTHER; the entries that stay."""
        self.backends = {{"web": WEB, "other": OTHER}[name]: found for name, found in backends.items()}
        await self.datagrams.follow(NETWORK, 1450, (), self.machines)
        return self.held


@pytest.fixture
def world() -> World:
    return World()


async def test_an_agent_that_starts_looks_once(world: World) -> None:
    assert await world.follow(web=frozenset({A})) == {
        entry(asked, backend) for asked in (WEB, OTHER, DNS) for backend in (A, B)
    } - {entry(WEB, B)}
    assert world.kernel.looks == 1
    await world.follow(web=frozenset({A}))
    await world.follow(web=frozenset({A, B}), other=frozenset({A}))
    assert world.kernel.looks == 2, "other is new"
    await world.follow(web=frozenset({A, B}), other=frozenset({A, B}))
    assert world.kernel.looks == 2, "nobody has gone"


async def test_a_backend_or_a_service_that_goes_takes_its_entries_along(world: World) -> None:
    await world.follow(web=frozenset({A, B}), other=frozenset({A, B}))
    assert len(world.held) == 6
    assert entry(WEB, A) not in await world.follow(web=frozenset({B}), other=frozenset({A, B}))
    assert len(world.held) == 5
    await world.follow(web=frozenset({B}))
    assert world.held == {entry(WEB, B), entry(DNS, A), entry(DNS, B)}
    await world.follow(web=frozenset())
    assert world.held == {entry(DNS, A), entry(DNS, B)}


async def test_a_machine_keeps_its_flows_for_as_long_as_it_has_its_address(world: World) -> None:
    """While it migrates it is for a moment no endpoint, and then it is one of another node."""
    pod = PodReference("ns", "launcher", "uid")
    machine = MachineReference("ns", "vm")
    world.machines = (
        Endpoint(pod, "n", "n2", MacAddress("0a:58:c0:a8:00:05"), (ip_interface("192.168.0.5/16"),), machine=machine),
    )
    await world.follow(web=frozenset({A, B}))
    await world.follow(web=frozenset())
    assert entry(WEB, A) in world.held
    assert entry(WEB, B) not in world.held
    world.machines = ()
    await world.follow(web=frozenset())
    assert entry(WEB, A) not in world.held, "it is gone, and nothing else has changed"


async def test_a_network_that_left_and_came_back_is_looked_at(world: World) -> None:
    await world.follow(web=frozenset({A, B}))
    await world.datagrams.leave(NETWORK.id)
    await world.follow(web=frozenset({A}))
    assert world.kernel.looks == 2
    assert entry(WEB, B) not in world.held


async def test_nothing_is_looked_for_where_no_service_speaks_udp(world: World) -> None:
    await world.follow()
    assert world.kernel.looks == 0


async def test_a_way_into_a_network_that_goes_takes_the_node_s_entries_along() -> None:
    """By a node port, whatever address of the node was asked, and by an external address; nobody else's are touched."""
    blue, twin, node = ip_address("100.65.0.2"), ip_address("100.65.0.6"), ip_address("172.30.0.11")
    kernel = Counting()
    by_port, by_address = entry((node, 30080), (blue, 30080)), entry((ip_address("172.30.0.200"), 80), (blue, 31000))
    foreign = entry((node, 30090), place("10.244.1.5", 8080))
    held = kernel.translated[None] = {by_port, by_address, foreign}
    ways: Ways = ({(by_address.asked, 80): (blue, 31000)}, {(4, 30080): (blue, 30080)})
    datagrams = Datagrams(kernel, lambda network: {}, lambda: ways)
    await datagrams.follow_node()
    assert held == {by_port, by_address, foreign}
    ways = (ways[0], {(4, 30080): (twin, 30080)})
    await datagrams.follow_node()
    assert held == {by_address, foreign}
    ways = ({}, ways[1])
    await datagrams.follow_node()
    assert held == {foreign}
    looks = kernel.looks
    ways = ({}, {**ways[1], (6, 30080): (ip_address("fd99::2"), 30080)})
    await datagrams.follow_node()
    assert kernel.looks == looks, "what is added takes nothing away"
