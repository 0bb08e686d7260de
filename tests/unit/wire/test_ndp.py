"""Neighbour discovery: against scapy, both directions, and against what RFC 4861 has a host drop."""

from ipaddress import IPv6Address, IPv6Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDNSSL,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptMTU,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptRDNSS,
    ICMPv6NDOptRouteInfo,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import Ether

from vmnet.model.names import MacAddress
from vmnet.wire import ndp
from vmnet.wire.malformed import Malformed
from vmnet.wire.ndp import (
    NeighborAdvertisement,
    NeighborSolicitation,
    Packet,
    Prefix,
    Route,
    RouterAdvertisement,
    RouterSolicitation,
)

MAC = MacAddress("0a:58:c0:a8:00:05")
ROUTER_MAC = MacAddress("0a:58:c0:a8:00:01")
ALL_NODES_MAC = MacAddress("33:33:00:00:00:01")
HOST = IPv6Address("fe80::858:c0ff:fea8:5")
ROUTER = IPv6Address("fe80::1")
SEARCH = ("blue.vm.cluster.local", "vm.cluster.local")

ADVERTISEMENT = RouterAdvertisement(
    lifetime=9000,
    managed=True,
    other=True,
    source_link=ROUTER_MAC,
    mtu=1400,
    prefixes=(Prefix(IPv6Network("fd00:7::/64"), valid=2592000, preferred=604800),),
    dns=(IPv6Address("fd00:7::1"), IPv6Address("fd00:7::53")),
    search=SEARCH,
    dns_lifetime=9000,
)
MESSAGES = [
    RouterSolicitation(),
    RouterSolicitation(MAC),
    NeighborSolicitation(ROUTER, MAC),
    NeighborAdvertisement(HOST, MAC, override=True),
    NeighborAdvertisement(HOST, MAC, router=True, solicited=True),
    RouterAdvertisement(lifetime=0),
    RouterAdvertisement(lifetime=0, routes=(Route(IPv6Network("fd20::/48"), 9000), Route(IPv6Network("::/0"), 1))),
    ADVERTISEMENT,
]


def frame_of(message: ndp.Message, source: IPv6Address = ROUTER) -> bytes:
    return ndp.encode(Packet(ROUTER_MAC, ALL_NODES_MAC, source, ndp.ALL_NODES, message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_back_and_their_checksum_is_scapys(message: ndp.Message) -> None:
    frame = frame_of(message)
    assert ndp.decode(frame) == Packet(ROUTER_MAC, ALL_NODES_MAC, ROUTER, ndp.ALL_NODES, message)
    seen = Ether(frame)
    checksum = seen[IPv6].payload.cksum
    del seen[IPv6].payload.cksum
    assert Ether(bytes(seen))[IPv6].payload.cksum == checksum


def test_scapy_reads_the_router_advertisement_as_meant() -> None:
    seen = Ether(frame_of(ADVERTISEMENT))
    assert seen[IPv6].hlim == 255
    router = seen[ICMPv6ND_RA]
    assert (router.M, router.O, router.routerlifetime) == (1, 1, 9000)
    assert seen[ICMPv6NDOptSrcLLAddr].lladdr == ROUTER_MAC
    assert seen[ICMPv6NDOptMTU].mtu == 1400
    prefix = seen[ICMPv6NDOptPrefixInfo]
    assert (prefix.prefix, prefix.prefixlen, prefix.L, prefix.A) == ("fd00:7::", 64, 1, 0)
    assert (prefix.validlifetime, prefix.preferredlifetime) == (2592000, 604800)
    assert seen[ICMPv6NDOptRDNSS].dns == ["fd00:7::1", "fd00:7::53"]
    assert [name.rstrip(".") for name in seen[ICMPv6NDOptDNSSL].searchlist if name] == list(SEARCH)


def test_scapy_reads_the_unsolicited_advertisement_as_meant() -> None:
    seen = Ether(ndp.encode(ndp.unsolicited_advertisement(MAC, HOST)))
    assert (seen.src, seen.dst, seen[IPv6].dst) == (MAC, ALL_NODES_MAC, "ff02::1")
    assert (seen[IPv6].src, seen[ICMPv6ND_NA].tgt) == (str(HOST), str(HOST))
    assert (seen[ICMPv6ND_NA].R, seen[ICMPv6ND_NA].S, seen[ICMPv6ND_NA].O) == (0, 0, 1)
    assert seen[ICMPv6NDOptDstLLAddr].lladdr == MAC


def test_what_scapy_builds_is_read() -> None:
    base = Ether(src=MAC, dst=ROUTER_MAC) / IPv6(src=str(HOST), dst="ff02::2", hlim=255)
    solicitation = ndp.decode(bytes(base / ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr(lladdr=MAC)))
    assert solicitation.message == RouterSolicitation(MAC)
    assert (solicitation.source, solicitation.source_mac) == (HOST, MAC)
    asked = ndp.decode(bytes(base / ICMPv6ND_NS(tgt="fd00:7::1") / ICMPv6NDOptSrcLLAddr(lladdr=MAC)))
    assert asked.message == NeighborSolicitation(IPv6Address("fd00:7::1"), MAC)


@pytest.mark.parametrize("units", [2, 3])
def test_a_route_is_read_and_written_as_scapy_does(units: int) -> None:
    option = ICMPv6NDOptRouteInfo(prefix="fd20::", plen=48, rtlifetime=9000, len=units)
    frame = Ether(src=ROUTER_MAC) / IPv6(src=str(ROUTER), dst="ff02::1", hlim=255) / ICMPv6ND_RA(routerlifetime=0)
    read = ndp.decode(bytes(frame / option)).message
    assert isinstance(read, RouterAdvertisement)
    assert read.routes == (Route(IPv6Network("fd20::/48"), 9000),)
    seen = Ether(frame_of(read))[ICMPv6NDOptRouteInfo]
    assert (seen.prefix, seen.plen, seen.rtlifetime, seen.prf) == ("fd20::", 48, 9000, 0)


def solicitation(**fields: object) -> bytes:
    settings: dict[str, object] = {"src": str(HOST), "dst": "ff02::2", "hlim": 255} | fields
    return bytes(Ether(src=MAC, dst=ROUTER_MAC) / IPv6(**settings) / ICMPv6ND_RS())


@pytest.mark.parametrize(
    "frame",
    [
        solicitation(hlim=64),
        solicitation()[:14] + b"\x50" + solicitation()[15:],
        solicitation()[:56],
        solicitation()[:12] + b"\x08\x00" + solicitation()[14:],
        bytes(Ether(src=MAC) / IPv6(src=str(HOST), dst="ff02::2", hlim=255) / ICMPv6ND_RS(code=1)),
        bytes(Ether(src=MAC) / IPv6(src="::", dst="ff02::2", hlim=255) / ICMPv6ND_RS() / ICMPv6NDOptSrcLLAddr()),
        bytes(Ether(src=MAC) / IPv6(src=str(HOST), dst="ff02::2", hlim=255) / ICMPv6ND_RS() / b"\x01\x00abcdef"),
        bytes(Ether(src=MAC) / IPv6(src=str(HOST), dst="ff02::2", hlim=255) / ICMPv6ND_RS() / b"\x01\x02abcdef"),
        bytes(Ether(src=MAC) / IPv6(src=str(HOST), dst="ff02::2", hlim=255) / ICMPv6ND_RS() / b"\x01"),
        bytes(Ether(src=MAC) / IPv6(src=str(HOST), dst="ff02::2", hlim=255) / ICMPv6ND_NS(tgt="ff02::1")),
        bytes(Ether(src=MAC) / IPv6(src="fd00::1", dst="ff02::1", hlim=255) / ICMPv6ND_RA()),
    ],
    ids=["hops", "version", "short", "type", "code", "source", "size-0", "size", "half", "multicast", "global-router"],
)  # fmt: skip
def test_what_a_host_must_drop_is_malformed(frame: bytes) -> None:
    with pytest.raises(Malformed):
        ndp.decode(frame)


FRAMES = [frame_of(message) for message in MESSAGES]


@settings(derandomize=True, deadline=None, max_examples=600)
@given(st.sampled_from(FRAMES), st.integers(54, 260), st.binary(min_size=1, max_size=12), st.integers(0, 8))
def test_nothing_else_is_raised(frame: bytes, offset: int, value: bytes, cut: int) -> None:
    broken = frame[:offset] + value + frame[offset + len(value) :]
    try:
        packet = ndp.decode(broken[: len(broken) - cut])
    except Malformed:
        return
    assert packet.source == ROUTER


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(max_size=120))
def test_nothing_else_is_raised_by_noise(body: bytes) -> None:
    noise = frame_of(RouterSolicitation())[:18] + len(body).to_bytes(2, "big") + FRAMES[0][20:54] + body
    try:
        ndp.decode(noise)
    except Malformed:
        return
