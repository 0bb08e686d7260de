"""Who answers for a load balancer's address, and the answers."""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address

from vmnet.kube.api import Object
from vmnet.lab.proxy.announcing import announced, announcement, answer
from vmnet.model.names import MacAddress
from vmnet.wire import arp, ethernet, ndp

MINE, ASKING = MacAddress("02:30:00:00:00:01"), MacAddress("02:30:00:00:01:00")
FOUR, SIX = IPv4Address("172.30.0.200"), IPv6Address("fd00:30::200")
OWN = frozenset({FOUR, SIX})
NODES = ("n1", "n2", "n3")


def node(name: str, ready: str = "True") -> Object:
    return {"metadata": {"name": name}, "status": {"conditions": [{"type": "Ready", "status": ready}]}}


def service(name: str, address: str, policy: str = "Cluster") -> Object:
    return {
        "metadata": {"namespace": "ns", "name": name},
        "spec": {"clusterIPs": ["10.96.0.7"], "ports": [{"port": 80}], "externalTrafficPolicy": policy},
        "status": {"loadBalancer": {"ingress": [{"ip": address}]}},
    }


def endpoint_slice(name: str, *nodes: str) -> Object:
    return {
        "metadata": {"namespace": "ns", "name": name, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"port": 8080}],
        "endpoints": [{"addresses": ["10.244.1.2"], "nodeName": node} for node in nodes],
    }


def who(service: Object, slices: Iterable[Object] = (), nodes: Iterable[Object] = ()) -> set[str]:
    alive = list(nodes)
    return {name for name in NODES if announced([service], slices, alive, name)}


def test_one_node_answers_and_not_the_same_one_for_every_address() -> None:
    nodes = [node(name) for name in NODES]
    chosen = {tuple(who(service("web", f"172.30.0.{number}"), nodes=nodes)) for number in range(200, 240)}
    assert chosen == {("n1",), ("n2",), ("n3",)}


def test_another_node_answers_for_one_that_is_not_ready() -> None:
    (first,) = who(service("web", "172.30.0.200"), nodes=[node(name) for name in NODES])
    left = [node(name, "Unknown" if name == first else "True") for name in NODES]
    (second,) = who(service("web", "172.30.0.200"), nodes=left)
    assert second != first
    assert who(service("web", "172.30.0.200"), nodes=[node(name, "False") for name in NODES]) == set()


def test_with_policy_local_the_node_has_an_endpoint() -> None:
    nodes = [node(name) for name in NODES]
    local = service("web", "172.30.0.200", "Local")
    for name in NODES:
        assert who(local, [endpoint_slice("web", name)], nodes) == {name}
    assert who(local, [endpoint_slice("web")], nodes) == set()


def test_an_arp_request_is_answered_to_who_asks() -> None:
    asking = IPv4Address("172.30.0.100")
    request = arp.Arp(arp.Operation.REQUEST, ASKING, asking, MacAddress("00:00:00:00:00:00"), FOUR, ASKING)
    reply = answer(arp.encode(request), OWN, MINE)
    assert reply is not None
    assert arp.decode(reply) == arp.reply(MINE, FOUR, ASKING, asking)
    assert answer(arp.encode(request), frozenset({SIX}), MINE) is None
    assert answer(arp.encode(arp.gratuitous_reply(ASKING, FOUR)), OWN, MINE) is None


def test_a_solicitation_is_answered_to_who_asks_and_to_all_when_nobody_has_an_address_yet() -> None:
    group = IPv6Address("ff02::1:ff00:200")
    for source, link, to in ((IPv6Address("fd00:30::100"), ASKING, ASKING), (ndp.UNSPECIFIED, None, None)):
        message = ndp.NeighborSolicitation(SIX, link)
        frame = ndp.encode(ndp.Packet(ASKING, ethernet.multicast_mac(group), source, group, message))
        reply = answer(frame, OWN, MINE)
        assert reply is not None
        packet = ndp.decode(reply)
        assert isinstance(packet.message, ndp.NeighborAdvertisement)
        assert (packet.message.target, packet.message.target_link, packet.message.override) == (SIX, MINE, True)
        assert packet.message.solicited is (to is not None)
        assert packet.destination == (source if to else ndp.ALL_NODES)
        assert answer(frame, frozenset({FOUR}), MINE) is None


def test_what_is_no_request_is_not_answered() -> None:
    assert answer(b"", OWN, MINE) is None
    assert answer(b"\xff" * 60, OWN, MINE) is None


def test_a_new_address_is_announced_to_all() -> None:
    assert arp.decode(announcement(FOUR, MINE)).gratuitous
    message = ndp.decode(announcement(SIX, MINE)).message
    assert isinstance(message, ndp.NeighborAdvertisement)
    assert ip_address(str(message.target)) == SIX
