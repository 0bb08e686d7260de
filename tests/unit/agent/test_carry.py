"""Two agents with kernels in memory, and what one tells the other over real TLS on the loopback."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from vmnet.agent import carry
from vmnet.agent.carry import Arrivals, Departures, Holds
from vmnet.agent.credentials import Credentials, signing_request
from vmnet.agent.facts import Attachment
from vmnet.agent.peers import Away, Link, Peers
from vmnet.controller import agent_certificates
from vmnet.kernel.fake import FakeKernel
from vmnet.model import names
from vmnet.model.connection import ASSURED, SEEN_REPLY, TCP, UDP, Connection, Flow, TcpState
from vmnet.model.endpoint import Endpoint, MachineReference, Node, PodReference
from vmnet.model.migration import Carried, Way
from vmnet.model.names import MacAddress, NetworkId
from vmnet.model.network import Network, Role
from vmnet.plan import ops, policy
from vmnet.plan.state import NetworkState
from vmnet.wire.handover import Arrived, Ask, Left, Told, When

NETWORK = Network("blue_net", NetworkId(7), role=Role.PRIMARY, subnets=(ip_network("192.168.0.0/16"),), persistent=True)
MACHINE = MachineReference("blue", "vm")
NOW = datetime.now(UTC)
AUTHORITY = agent_certificates.renewed(None, NOW)
_NUMBER = 0


def endpoint(node: str, pod: str, address: str, machine: MachineReference | None = None) -> Endpoint:
    return Endpoint(
        PodReference("blue", pod, f"uid-{pod}"),
        NETWORK.name,
        node,
        MacAddress("0a:58:c0:a8:00:05"),
        (ip_interface(f"{address}/16"),),
        machine=machine,
    )


SOURCE = endpoint("n1", "source", "192.168.0.5", MACHINE)
TARGET = endpoint("n2", "target", "192.168.0.5", MACHINE)
BACKENDS = {node: endpoint(node, f"backend-{node}", f"192.168.1.{node[1:]}") for node in ("n1", "n2", "n3")}


def flow(source: str, destination: str, protocol: int = UDP, ports: tuple[int, int] = (1000, 80)) -> Flow:
    return Flow(protocol, ip_address(source), ports[0], ip_address(destination), ports[1])


def entry(original: Flow, reply: Flow | None = None, mark: int = 0) -> Connection:
    tcp = TcpState(3) if original.protocol == TCP else None
    return Connection(original, reply or original.reversed(), SEEN_REPLY | ASSURED, 100, mark, tcp)


def served(node: str, port: int = 1000) -> Connection:
    """What the machine asked of a Service and the backend on a node answers."""
    backend = f"192.168.1.{node[1:]}"
    return entry(flow("192.168.0.5", "10.96.0.7", TCP, (port, 80)), flow(backend, "192.168.0.5", TCP, (8080, port)))


def seen_by_backend(item: Connection) -> Connection:
    return entry(item.reply.reversed(), item.reply)


EAST_WEST = entry(flow("192.168.0.9", "192.168.0.5", TCP))
ABROAD = entry(flow("192.168.0.5", "172.30.0.100"), flow("172.30.0.100", "100.65.0.6", ports=(80, 1000)))


@dataclass
class Api:
    """What both agents' stores know."""

    nodes: dict[str, Node]
    endpoints_there: list[Endpoint]
    source: str = "n1"

    def attachment_of(self, network: str) -> Attachment | None:
        return Attachment("blue/net", NETWORK) if network == NETWORK.name else None

    def endpoints(self, network: str) -> tuple[Endpoint, ...]:
        return tuple(self.endpoints_there) if network == NETWORK.name else ()

    def came_from(self, endpoint: Endpoint) -> Node | None:
        return self.nodes.get(self.source)


class Datapath:
    def __init__(self, node: Node, tables: Iterable[str] = ()) -> None:
        self.node, self.node_name, self.tables = node, node.name, set(tables)
        self.homes: set[int] = set()

    def this_node(self) -> Node:
        return self.node

    def holds(self, network: Network, table: str) -> bool:
        return table in self.tables

    async def reach_homes(self, network: Network, marks: Iterable[int]) -> None:
        self.homes |= set(marks)


def credentials(node: str, authority: agent_certificates.Authority = AUTHORITY) -> Credentials:
    """An agent that has its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    asked = x509.load_pem_x509_csr(signing_request(key, node))
    found = Credentials(cast(Any, None), node)
    text = agent_certificates.signed(authority, asked, node, NOW)
    certificate, *authorities = x509.load_pem_x509_certificates(text.encode())
    found._use(key, certificate, authorities)
    return found


class Agent:
    def __init__(self, api: Api, name: str, shown: Credentials | None = None) -> None:
        self.node, self.kernel = api.nodes[name], FakeKernel()
        self.kernel.networks[NETWORK.namespace] = NetworkState(NETWORK.namespace)
        self.networks = Datapath(self.node)
        holds = Holds(self.kernel)
        departures = Departures(self.kernel, cast(Any, api), cast(Any, self.networks), holds)
        self.peers = Peers(shown or credentials(name), departures.answer)
        self.arrivals = Arrivals(self.kernel, cast(Any, api), cast(Any, self.networks), self.peers, holds)

    def knows(self) -> dict[Flow, Connection]:
        return self.kernel.conntrack.get(NETWORK.namespace, {})

    async def put(self, *entries: Connection) -> None:
        await self.kernel.put_connections(NETWORK.namespace, entries)

    def scripts(self) -> list[str]:
        return [op.script for op in self.kernel.applied if isinstance(op, ops.LoadFirewall)]


@pytest.fixture
def api() -> Api:
    """Nodes at loopback addresses that no other test uses."""
    global _NUMBER
    _NUMBER += 1
    base = f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
    nodes = {
        f"n{number}": Node(f"n{number}", ip_address(f"{base}.{_NUMBER * 4 % 252 + number}"), number)
        for number in (1, 2, 3)
    }
    return Api(nodes, [SOURCE, TARGET, *BACKENDS.values()])


async def listens(node: Node) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                _, writer = await asyncio.open_connection(str(node.address), names.PEERS_PORT)
            except OSError:
                await asyncio.sleep(0.01)
                continue
            writer.close()
            return


@asynccontextmanager
async def running(*agents: Agent) -> AsyncIterator[None]:
    serving = [
        asyncio.create_task(agent.peers.serve(str(agent.node.address)), name=agent.node.name) for agent in agents
    ]
    try:
        for agent in agents:
            await listens(agent.node)
        yield
    finally:
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not look():
            await asyncio.sleep(0.01)


async def test_what_is_known_there_is_known_here_before_the_guest_comes(api: Api) -> None:
    source, target = Agent(api, "n1"), Agent(api, "n2")
    away, near, far = served("n1"), served("n2", 1002), served("n3", 1003)
    await source.put(EAST_WEST, ABROAD, away, near, far)
    # As the backend on the target's own node sees it.
    await target.put(seen_by_backend(near))
    home = names.HOME_MARK | 1
    async with running(source):
        target.arrivals.expect(NETWORK, TARGET)
        await until(lambda: len(target.knows()) == 5)
        assert target.knows()[ABROAD.original] == entry(ABROAD.original, mark=home)
        assert target.networks.homes == {home}
        assert target.knows()[far.original] == far
        assert near.original not in target.knows(), "its backend speaks with the machine where it still is"
        assert any(" bridge carried plain4 " in script for script in target.scripts())
        later, ended = entry(flow("192.168.0.5", "192.168.0.10")), EAST_WEST.original
        await source.put(later)
        await source.kernel.forget_connections(NETWORK.namespace, [ended])
        target.arrivals.arrived(TARGET)
        found = await target.arrivals.settled(TARGET, 60)
        assert found.way is Way.STREAMED
        assert found.connections == 5
        assert found.seconds is not None
        await target.arrivals.close()
    known = target.knows()
    assert (known[near.original], known[far.original], known[later.original]) == (near, far, later)
    assert seen_by_backend(near).original not in known
    assert ended not in known
    # Of what the target translates now the source knows what its own backend sees.
    assert {item for item in source.knows() if item.destination == ip_address("10.96.0.7")} == set()
    assert source.knows()[seen_by_backend(away).original] == seen_by_backend(away)
    assert ABROAD.original in source.knows()
    for agent in (source, target):
        assert "delete table inet carried" in agent.scripts()[-1], "nothing is held any longer"


async def test_the_source_tells_when_the_guest_spoke_last_there(api: Api) -> None:
    source, target = Agent(api, "n1"), Agent(api, "n2")
    await source.put(EAST_WEST)
    async with running(source):
        source.kernel.frames_seen[SOURCE.mac] = 1795426800.25
        target.arrivals.expect(NETWORK, TARGET)
        await until(lambda: EAST_WEST.original in target.knows())
        source.kernel.frames_seen[SOURCE.mac] = 1795426801.5
        target.arrivals.arrived(TARGET)
        assert (await target.arrivals.settled(TARGET, 60)).way is Way.STREAMED
        # What the guest's old port sees afterwards is nobody's last frame.
        source.kernel.frames_seen[SOURCE.mac] = 1795426900.0
        found = target.arrivals.last_frame(TARGET)
        assert found is not None
        # Both ends read one clock here: what is told differs by no more than is said.
        assert abs(found.at - 1795426801.5) <= found.error + 1e-6
        async with target.peers.dial(source.node) as link:
            await link.send(When(MACHINE, "other"))
            answer = await link.receive(60)
            assert isinstance(answer, Left)
            assert answer.last is None, "of another network nothing is known"
        await target.arrivals.close()


async def test_of_a_guest_that_said_nothing_nobody_knows_when_it_left(api: Api) -> None:
    source, target = Agent(api, "n1"), Agent(api, "n2")
    await source.put(EAST_WEST)
    async with running(source):
        target.arrivals.expect(NETWORK, TARGET)
        await until(lambda: EAST_WEST.original in target.knows())
        target.arrivals.arrived(TARGET)
        assert (await target.arrivals.settled(TARGET, 60)).way is Way.STREAMED
        assert target.arrivals.last_frame(TARGET) is None
        await target.arrivals.close()


async def test_a_source_that_is_away_leaves_the_policies_to_admit_what_looks_begun(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carry, "AGAIN_SECONDS", 0.01)
    source, target = Agent(api, "n1"), Agent(api, "n2")
    target.networks.tables.add(f"inet {policy.NAME}")
    await source.put(EAST_WEST)
    target.arrivals.expect(NETWORK, TARGET)
    target.arrivals.arrived(TARGET)
    assert await target.arrivals.settled(TARGET, 60) == Carried(Way.UNANSWERED)
    await until(lambda: any(policy.arrived_script([ip_address("192.168.0.5")]) == item for item in target.scripts()))
    async with running(source):
        # It comes back, and is asked for as long as that can be of use.
        await until(lambda: EAST_WEST.original in target.knows())
        await target.arrivals.close()


async def test_a_source_that_comes_back_late_is_on_record_as_that(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "AGAIN_SECONDS", 0.01)
    source, target = Agent(api, "n1"), Agent(api, "n2")
    await source.put(EAST_WEST)
    target.arrivals.expect(NETWORK, TARGET)
    target.arrivals.arrived(TARGET)
    await target.arrivals.settled(TARGET, 60)
    async with running(source):
        way = Way.UNANSWERED
        async with asyncio.timeout(60):
            while way is not Way.LATE:
                way = (await target.arrivals.settled(TARGET, 60)).way
                await asyncio.sleep(0.01)
        await target.arrivals.close()


async def test_a_machine_that_began_here_brings_nothing(api: Api) -> None:
    api.source = ""
    target = Agent(api, "n2")
    target.arrivals.expect(NETWORK, TARGET)
    target.arrivals.arrived(TARGET)
    assert await target.arrivals.settled(TARGET, 60) == Carried(Way.NOBODY)
    await target.arrivals.close()


async def test_a_guest_that_never_comes_leaves_nothing(api: Api) -> None:
    source, target = Agent(api, "n1"), Agent(api, "n2")
    await source.put(EAST_WEST)
    own = entry(flow("192.168.1.2", "192.168.0.5"))
    await target.put(own)
    async with running(source):
        target.arrivals.expect(NETWORK, TARGET)
        await until(lambda: EAST_WEST.original in target.knows())
        target.arrivals.forget(TARGET)
        await until(lambda: list(target.knows()) == [own.original])
        await target.arrivals.close()


@pytest.mark.parametrize(
    "network", [replace(NETWORK, persistent=False), replace(NETWORK, role=Role.SECONDARY)], ids=["moves not", "no edge"]
)
async def test_where_nothing_can_be_carried_nobody_is_asked(api: Api, network: Network) -> None:
    target = Agent(api, "n2")
    target.arrivals.expect(network, TARGET)
    target.arrivals.arrived(TARGET)
    assert await target.arrivals.settled(TARGET, 60) == Carried()
    await target.arrivals.close()


async def test_nobody_is_told_of_a_machine_that_does_not_go_there(api: Api) -> None:
    source, other = Agent(api, "n1"), Agent(api, "n3")
    await source.put(EAST_WEST)
    async with running(source):
        for ask in (
            Ask(MACHINE, NETWORK.name),
            Ask(MachineReference("blue", "other"), NETWORK.name),
            Ask(MACHINE, "other"),
        ):
            async with other.peers.dial(source.node) as link:
                await link.send(ask)
                with pytest.raises(Away):
                    await link.receive(60)
        async with other.peers.dial(source.node) as link:
            await link.send(Arrived())
            with pytest.raises(Away):
                await link.receive(60)
    assert EAST_WEST.original in source.knows()


@pytest.mark.parametrize("told", [entry(flow("192.168.0.6", "192.168.0.9")), entry(ABROAD.original, mark=0x10)])
async def test_a_source_that_tells_of_others_is_not_believed(api: Api, told: Connection) -> None:
    target = Agent(api, "n2")
    asked = asyncio.Event()

    async def answer(link: Link) -> None:
        await link.receive(60)
        await link.send(Told((told,)))
        with pytest.raises(Away):
            await link.receive(60)
        asked.set()

    liar = Peers(credentials("n1"), answer)
    serving = asyncio.create_task(liar.serve(str(api.nodes["n1"].address)), name="liar")
    try:
        target.arrivals.expect(NETWORK, TARGET)
        async with asyncio.timeout(60):
            await asked.wait()
        assert target.knows() == {}
    finally:
        await target.arrivals.close()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def hears(agent: Agent, node: Node) -> None:
    async with agent.peers.dial(node) as link:
        await link.send(Ask(MACHINE, NETWORK.name))
        await link.receive(60)


async def test_who_cannot_show_whose_agent_it_is_is_nobody(api: Api) -> None:
    shown = credentials("n2", agent_certificates.renewed(None, NOW))
    stranger = Agent(api, "n2", shown)
    source, target = Agent(api, "n1"), Agent(api, "n2")
    imposter = Agent(api, "n3", credentials("n2"))
    nobody = Agent(api, "n2", Credentials(cast(Any, None), "n2"))
    async with running(source, imposter):
        await hears(target, source.node)
        for agent, node in ((target, imposter.node), (nobody, source.node), (stranger, source.node)):
            with pytest.raises(Away):
                await hears(agent, node)
        # Even when it believes the others.
        assert shown.client is not None
        shown.client.load_verify_locations(cadata=AUTHORITY.certificates)
        with pytest.raises(Away):
            await hears(stranger, source.node)
