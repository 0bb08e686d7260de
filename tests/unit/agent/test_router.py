"""Answers to router solicitations."""

from ipaddress import IPv6Address, ip_interface

from hypothesis import given, settings
from hypothesis import strategies as st

from vmnet import metrics
from vmnet.agent import router
from vmnet.model.names import MacAddress
from vmnet.wire import ndp
from vmnet.wire.lease import Lease, LeaseIPv6
from vmnet.wire.ndp import NeighborSolicitation, Packet, RouterAdvertisement, RouterSolicitation

MAC = MacAddress("0a:58:c0:a8:00:05")
ROUTERS = MacAddress("33:33:00:00:00:02")
HOST = IPv6Address("fe80::858:c0ff:fea8:5")
LEASE = Lease(
    mac=MAC,
    gateway_mac=MacAddress("0a:58:c0:a8:00:01"),
    duid=b"",
    mtu=1400,
    hostname="blue",
    domain="blue-ns.vm.cluster.local",
    search=("blue-ns.vm.cluster.local",),
    ipv6=LeaseIPv6(ip_interface("fd00:7::5/64"), IPv6Address("fd00:7::1")),
)
LEASES = {MAC: LEASE}
QUESTION = ndp.encode(Packet(MAC, ROUTERS, HOST, ndp.ALL_ROUTERS, RouterSolicitation(MAC)))


def count() -> float:
    return float(metrics.ROUTER_SOLICITATIONS.labels("net-r")._value.get())


def test_a_solicitation_is_answered_and_counted() -> None:
    before = count()
    frame = router.answer(QUESTION, LEASES, "net-r")
    assert frame is not None
    reply = ndp.decode(frame)
    assert isinstance(reply.message, RouterAdvertisement)
    assert reply.destination_mac == MAC
    assert count() == before + 1


def test_one_from_a_host_without_an_address_is_answered_too() -> None:
    question = Packet(MAC, ROUTERS, ndp.UNSPECIFIED, ndp.ALL_ROUTERS, RouterSolicitation())
    assert router.answer(ndp.encode(question), LEASES, "net-r") is not None


def test_strangers_and_other_messages_get_nothing() -> None:
    assert router.answer(QUESTION, {}, "net-r") is None
    other = Packet(MAC, ROUTERS, HOST, ndp.ALL_ROUTERS, NeighborSolicitation(IPv6Address("fe80::1"), MAC))
    assert router.answer(ndp.encode(other), LEASES, "net-r") is None


def test_a_forwarded_solicitation_is_malformed() -> None:
    before = metrics.MALFORMED.labels("net-r", "nd")._value.get()
    assert router.answer(QUESTION[:21] + b"\x40" + QUESTION[22:], LEASES, "net-r") is None
    assert metrics.MALFORMED.labels("net-r", "nd")._value.get() == before + 1


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.integers(12, 80), st.binary(min_size=1, max_size=8), st.integers(0, 40))
def test_nothing_a_guest_sends_raises(offset: int, noise: bytes, cut: int) -> None:
    broken = QUESTION[:offset] + noise + QUESTION[offset + len(noise) :]
    router.answer(broken[: len(broken) - cut], LEASES, "net-r")
