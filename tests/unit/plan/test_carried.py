from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from vmnet.model import names
from vmnet.model.connection import ASSURED, SEEN_REPLY, TCP, UDP, Connection, Flow, TcpState
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role
from vmnet.plan import carried
from vmnet.plan.carried import Segment

SUBNETS = (ip_network("192.168.0.0/16"), ip_network("fd20::/64"))
NETWORK = Network("blue_net", NetworkId(7), role=Role.PRIMARY, subnets=SUBNETS)
SEGMENT = Segment.of(NETWORK, (ip_address("192.168.0.5"), ip_address("fd20::5")))
HERE, EARLIER = names.HOME_MARK | 1, names.HOME_MARK | 3


def flow(source: str, destination: str, protocol: int = UDP, ports: tuple[int, int] = (1000, 80)) -> Flow:
    return Flow(protocol, ip_address(source), ports[0], ip_address(destination), ports[1])


def entry(original: Flow, reply: Flow | None = None, mark: int = 0, state: int = 3) -> Connection:
    tcp = TcpState(state) if original.protocol == TCP else None
    return Connection(original, reply or original.reversed(), SEEN_REPLY | ASSURED, 100, mark, tcp)


def told(item: Connection) -> list[Connection]:
    return list(carried.outgoing(SEGMENT, [item], HERE))


@pytest.mark.parametrize(
    ("own", "peer"), [("192.168.0.5", "192.168.0.9"), ("fd20::5", "fd20::9"), ("192.168.0.5", "100.88.0.2")]
)
def test_what_stays_between_the_networks_routers_comes_as_it_is(own: str, peer: str) -> None:
    for item in (entry(flow(own, peer)), entry(flow(peer, own))):
        assert told(item) == [item]


@pytest.mark.parametrize(
    ("own", "out", "join"), [("192.168.0.5", "172.30.0.100", "100.65.0.6"), ("fd20::5", "fd00:30::100", "fd99::6")]
)
def test_what_was_translated_here_stays_here_and_is_marked_so(own: str, out: str, join: str) -> None:
    went = flow(own, out)
    assert told(entry(went, flow(out, join, ports=(80, 1000)))) == [entry(went, mark=HERE)]


def test_what_has_its_home_elsewhere_keeps_it() -> None:
    item = entry(flow("192.168.0.5", "172.30.0.100"), mark=EARLIER)
    assert told(item) == [item]


def test_who_came_by_a_node_port_is_told_as_the_machine_sees_it() -> None:
    came = flow("172.30.0.100", "100.65.0.6", ports=(4000, 30080))
    local = entry(came, flow("192.168.0.5", "172.30.0.100", ports=(80, 4000)))
    assert told(local) == [entry(flow("172.30.0.100", "192.168.0.5", ports=(4000, 80)), mark=HERE)]
    everywhere = entry(came, flow("192.168.0.5", "100.88.0.1", ports=(80, 4000)))
    assert told(everywhere) == [entry(flow("100.88.0.1", "192.168.0.5", ports=(4000, 80)))]


def test_a_client_that_asked_for_a_service_keeps_its_translation() -> None:
    asked = entry(flow("192.168.0.9", "10.96.0.7"), flow("192.168.0.5", "192.168.0.9", ports=(8080, 1000)))
    assert told(asked) == [entry(flow("192.168.0.9", "192.168.0.5", ports=(1000, 8080)))]


SERVED = entry(flow("192.168.0.5", "10.96.0.7", TCP), flow("192.168.0.9", "192.168.0.5", TCP, ports=(8080, 1000)))


def test_what_the_machine_asked_of_a_service_goes_along_whole() -> None:
    assert told(SERVED) == [SERVED]
    assert carried.services([SERVED, entry(flow("192.168.0.5", "192.168.0.9"))]) == (SERVED,)
    # The backend speaks with the machine: nobody translates here any more.
    assert carried.handed_over(SERVED) == entry(SERVED.reply.reversed(), SERVED.reply)


@pytest.mark.parametrize(
    "item",
    [
        entry(flow("192.168.0.5", "192.168.0.9", TCP), state=1),
        entry(flow("192.168.0.5", "192.168.0.9", TCP), state=7),
        replace(entry(flow("192.168.0.5", "192.168.0.9", TCP)), tcp=None),
        entry(flow("192.168.0.5", "192.168.0.1")),
        entry(flow("192.168.0.1", "192.168.0.5")),
        entry(flow("fd20::5", "fe80::1")),
        entry(flow("192.168.0.5", "224.0.0.251")),
        entry(flow("192.168.0.8", "192.168.0.9")),
        # The resolver, which is on every node.
        entry(flow("192.168.0.5", "10.96.0.10"), flow("192.168.0.1", "192.168.0.5", ports=(53, 1000))),
        # A machine that asked for a Service and got itself.
        entry(flow("192.168.0.5", "10.96.0.7"), flow("192.168.0.5", "192.168.0.1", ports=(8080, 1000))),
        # Asked for a Service over the edge.
        entry(flow("192.168.0.5", "10.96.0.1"), flow("172.30.0.1", "100.65.0.6", ports=(6443, 1000))),
    ],
)
def test_what_is_begun_or_over_or_everywhere_or_somebody_else_s_stays(item: Connection) -> None:
    assert told(item) == []


def test_no_machine_carries_more_than_it_may() -> None:
    many = [
        entry(flow("192.168.0.5", f"192.168.{1 + number // 60000}.9", ports=(number % 60000, 80)))
        for number in range(carried.CONNECTIONS_LIMIT + 5)
    ]
    assert len(carried.outgoing(SEGMENT, many, HERE)) == carried.CONNECTIONS_LIMIT


@pytest.mark.parametrize(
    "item",
    [
        entry(flow("192.168.0.5", "192.168.0.9")),
        entry(flow("172.30.0.100", "192.168.0.5"), mark=EARLIER),
        SERVED,
    ],
)
def test_what_an_agent_tells_is_written(item: Connection) -> None:
    assert carried.incoming(SEGMENT, item, HERE) == item
    forever = replace(item, timeout=2**31 - 1, zone=5)
    written = carried.incoming(SEGMENT, forever, HERE)
    assert written == replace(item, timeout=carried.TIMEOUT_LIMIT)


def test_what_began_on_this_node_is_not_for_others_to_tell() -> None:
    assert carried.incoming(SEGMENT, entry(flow("192.168.0.5", "172.30.0.100"), mark=HERE), HERE) is None


@pytest.mark.parametrize(
    "item",
    [
        entry(flow("192.168.0.8", "192.168.0.9")),
        entry(flow("192.168.0.8", "172.30.0.100"), mark=EARLIER),
        # No mark, or one that is no home's.
        entry(flow("192.168.0.5", "172.30.0.100")),
        entry(flow("192.168.0.5", "172.30.0.100"), mark=0x10),
        entry(flow("192.168.0.5", "172.30.0.100"), mark=names.HOME_MARK),
        entry(flow("192.168.0.5", "192.168.0.9"), mark=EARLIER),
        # Translations to where no backend is, for others, of sources, and with a mark.
        replace(SERVED, reply=replace(SERVED.reply, source=ip_address("172.30.0.1"))),
        replace(SERVED, reply=replace(SERVED.reply, source=ip_address("192.168.0.1"))),
        replace(SERVED, reply=replace(SERVED.reply, source=ip_address("192.168.0.5"))),
        replace(SERVED, reply=replace(SERVED.reply, destination=ip_address("192.168.0.8"))),
        replace(SERVED, reply=replace(SERVED.reply, destination_port=1001)),
        replace(SERVED, original=replace(SERVED.original, source=ip_address("192.168.0.8"))),
        replace(SERVED, mark=EARLIER),
        replace(SERVED, tcp=TcpState(9)),
        replace(SERVED, tcp=None),
        replace(SERVED, reply=replace(SERVED.reply, protocol=UDP)),
        entry(flow("192.168.0.5", "192.168.0.9", protocol=1)),
        entry(flow("192.168.0.5", "192.168.0.9"), flow("fd20::9", "fd20::5")),
    ],
)
def test_what_no_honest_agent_tells_is_refused(item: Connection) -> None:
    with pytest.raises(ValueError):
        carried.incoming(SEGMENT, item, HERE)


def elements(script: str, name: str) -> list[str]:
    return [line.partition(" element ")[2] for line in script.splitlines() if f" element {name} " in line]


WAYS = (
    "10.96.0.7 . 192.168.0.5 . 6 . 80 . 1000",
    "192.168.0.5 . 10.96.0.7 . 6 . 1000 . 80",
    "192.168.0.5 . 192.168.0.9 . 6 . 1000 . 8080",
    "192.168.0.9 . 192.168.0.5 . 6 . 8080 . 1000",
)


def test_all_four_ways_of_a_service_s_connection_are_held_anew() -> None:
    script = carried.hold_script([SERVED])
    assert elements(script, "inet carried held4") == [f"inet carried held4 {{ {', '.join(WAYS)} }}"] * 3
    verbs = [line.split()[0] for line in script.splitlines() if " element " in line]
    assert verbs == ["add", "delete", "add"], "or it would keep its old time"


def test_only_where_the_machine_comes_are_backends_words_kept_from_it() -> None:
    script = carried.hold_script([SERVED], [ip_address("fd20::5")])
    assert set(elements(script, "bridge carried plain4")) == {f"bridge carried plain4 {{ {WAYS[3]} }}"}
    assert set(elements(script, "inet carried arriving6")) == {"inet carried arriving6 { fd20::5 }"}
    assert not elements(carried.hold_script([SERVED]), "bridge carried plain4")
