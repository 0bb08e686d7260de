"""DHCP at the node: the lease is the sender's, and nothing a guest sends raises."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_interface

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Counter

from vmnet import metrics
from vmnet.agent import dhcp
from vmnet.model.addresses import IPAddress
from vmnet.model.names import MacAddress
from vmnet.wire import datagram, dhcp4, dhcp6
from vmnet.wire.datagram import Datagram
from vmnet.wire.dhcp6 import Association
from vmnet.wire.lease import Lease, LeaseIPv4, LeaseIPv6

MAC, STRANGER = MacAddress("0a:58:c0:a8:00:05"), MacAddress("0a:58:c0:a8:00:66")
HOST = IPv6Address("fe80::858:c0ff:fea8:5")
LEASE = Lease(
    mac=MAC,
    gateway_mac=MacAddress("0a:58:c0:a8:00:01"),
    duid=b"\x00\x04" + bytes(16),
    mtu=1400,
    hostname="blue",
    domain="blue-ns.vm.cluster.local",
    search=("blue-ns.vm.cluster.local", "cluster.local"),
    ipv4=LeaseIPv4(ip_interface("192.168.0.5/16"), IPv4Address("192.168.0.1")),
    ipv6=LeaseIPv6(ip_interface("fd00:7::5/64"), IPv6Address("fd00:7::1")),
)
LEASES = {MAC: LEASE}
DISCOVER = dhcp4.encode(dhcp4.Message(dhcp4.MessageType.DISCOVER, 1, MAC))
SOLICIT = dhcp6.encode(
    dhcp6.Message(dhcp6.MessageType.SOLICIT, 1, b"\0\3client", associations=(Association(dhcp6.Option.IA_NA, 1),))
)
BROADCAST = MacAddress("ff:ff:ff:ff:ff:ff")


def from_guest(payload: bytes, *, mac: MacAddress = MAC, source: IPAddress = dhcp4.UNSPECIFIED) -> bytes:
    if isinstance(source, IPv4Address):
        return datagram.encode(Datagram(mac, BROADCAST, source, dhcp4.LIMITED_BROADCAST, 68, 67, payload))
    return datagram.encode(Datagram(mac, BROADCAST, source, dhcp6.ALL_SERVERS, 546, 547, payload))


def value(counter: Counter, *labels: str) -> float:
    return float(counter.labels(*labels)._value.get())


def test_dhcp4_is_answered_and_counted() -> None:
    before = value(metrics.DHCP_REQUESTS, "net-a", "ipv4", "discover")
    reply = dhcp.answer(from_guest(DISCOVER), LEASES, "net-a")
    assert reply is not None
    assert dhcp4.decode(datagram.decode(reply).payload).your == IPv4Address("192.168.0.5")
    assert value(metrics.DHCP_REQUESTS, "net-a", "ipv4", "discover") == before + 1


def test_dhcp6_is_answered_and_counted() -> None:
    before = value(metrics.DHCP_REQUESTS, "net-a", "ipv6", "solicit")
    reply = dhcp.answer(from_guest(SOLICIT, source=HOST), LEASES, "net-a")
    assert reply is not None
    assert datagram.decode(reply).destination == HOST
    [association] = dhcp6.decode(datagram.decode(reply).payload).associations
    assert association.addresses[0].address == IPv6Address("fd00:7::5")
    assert value(metrics.DHCP_REQUESTS, "net-a", "ipv6", "solicit") == before + 1


def test_a_stranger_gets_nothing() -> None:
    assert dhcp.answer(from_guest(DISCOVER, mac=STRANGER), LEASES, "net-a") is None
    assert dhcp.answer(from_guest(SOLICIT, mac=STRANGER, source=HOST), LEASES, "net-a") is None


def test_the_lease_follows_the_frame_not_the_message() -> None:
    posing = dhcp4.encode(dhcp4.Message(dhcp4.MessageType.DISCOVER, 1, STRANGER))
    other = replace(LEASE, mac=STRANGER)
    assert dhcp.answer(from_guest(posing), {MAC: LEASE, STRANGER: other}, "net-a") is None


@pytest.mark.parametrize(
    ("frame", "protocol"),
    [
        (from_guest(DISCOVER)[:30], "udp"),
        (from_guest(DISCOVER[:100]), "dhcp4"),
        (from_guest(SOLICIT[:-1], source=HOST), "dhcp6"),
        (from_guest(SOLICIT, source=IPv6Address("fd00:7::5")), "dhcp6"),
    ],
    ids=["headers", "dhcp4", "dhcp6", "global-source"],
)
def test_malformed_packets_are_counted_and_dropped(frame: bytes, protocol: str) -> None:
    before = value(metrics.MALFORMED, "net-b", protocol)
    assert dhcp.answer(frame, LEASES, "net-b") is None
    assert value(metrics.MALFORMED, "net-b", protocol) == before + 1


@settings(derandomize=True, deadline=None, max_examples=500)
@given(
    st.sampled_from([DISCOVER, SOLICIT]), st.integers(0, 300), st.binary(max_size=12), st.integers(0, 8), st.booleans()
)
def test_nothing_a_guest_sends_raises(payload: bytes, offset: int, noise: bytes, cut: int, six: bool) -> None:
    broken = payload[:offset] + noise + payload[offset + len(noise) :]
    frame = from_guest(broken[: len(broken) - cut], source=HOST if six else dhcp4.UNSPECIFIED)
    reply = dhcp.answer(frame, LEASES, "net-c")
    assert reply is None or datagram.decode(reply).destination_mac == MAC
