"""The DHCPv4 server in every state a client can be in (RFC 2131 section 4.3)."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_interface, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmnet.model.names import MacAddress
from vmnet.wire import datagram, dhcp4, dhcp4_server, domains
from vmnet.wire.dhcp4 import UNSPECIFIED, Message, MessageType, Option
from vmnet.wire.lease import LEASE_SECONDS, Lease, LeaseIPv4

MAC = MacAddress("0a:58:c0:a8:00:05")
GATEWAY = IPv4Address("192.168.0.1")
ADDRESS = IPv4Address("192.168.0.5")
OTHER = IPv4Address("192.168.0.99")
SEARCH = ("blue.vm.cluster.local", "vm.cluster.local", "blue.svc.cluster.local", "svc.cluster.local", "cluster.local")
LEASE = Lease(
    mac=MAC,
    gateway_mac=MacAddress("0a:58:c0:a8:00:01"),
    duid=b"\x00\x04" + bytes(16),
    mtu=1400,
    hostname="blue",
    domain="blue.vm.cluster.local",
    search=SEARCH,
    ipv4=LeaseIPv4(ip_interface("192.168.0.5/16"), GATEWAY),
)


def ask(kind: MessageType, client: IPv4Address = UNSPECIFIED, **options: bytes) -> Message:
    chosen = {Option[name.upper()]: value for name, value in options.items()}
    return Message(kind, 0x1234, MAC, client=client, options=chosen)


def answer(message: Message) -> Message:
    reply = dhcp4_server.respond(message, LEASE)
    assert reply is not None
    assert reply.reply
    assert reply.transaction == message.transaction
    assert reply.mac == MAC
    assert reply.server == GATEWAY, "the gateway's address is the server's identity, on every node"
    return reply


def check_configuration(reply: Message) -> None:
    options = reply.options
    assert options[Option.SUBNET_MASK] == bytes([255, 255, 0, 0])
    assert options[Option.ROUTER] == options[Option.DNS] == GATEWAY.packed
    assert options[Option.MTU] == (1400).to_bytes(2, "big")
    assert options[Option.HOSTNAME] == b"blue"
    assert options[Option.DOMAIN] == b"blue.vm.cluster.local"
    assert options[Option.BROADCAST] == bytes([192, 168, 255, 255])
    assert domains.decode_names(options[Option.SEARCH], compressed=True) == SEARCH


def lease_time(reply: Message) -> int:
    return int.from_bytes(reply.options[Option.LEASE_TIME], "big")


def test_discover_is_offered_the_address() -> None:
    reply = answer(ask(MessageType.DISCOVER))
    assert (reply.type, reply.your) == (MessageType.OFFER, ADDRESS)
    assert lease_time(reply) == LEASE_SECONDS
    times = [int.from_bytes(reply.options[key], "big") for key in (Option.RENEWAL_TIME, Option.REBINDING_TIME)]
    assert times == [LEASE_SECONDS // 2, LEASE_SECONDS * 7 // 8]
    check_configuration(reply)


def test_discover_for_another_address_is_offered_the_right_one() -> None:
    assert answer(ask(MessageType.DISCOVER, requested_address=OTHER.packed)).your == ADDRESS


def test_rapid_commit_needs_no_request() -> None:
    reply = answer(ask(MessageType.DISCOVER, rapid_commit=b""))
    assert (reply.type, reply.your) == (MessageType.ACK, ADDRESS)
    assert Option.RAPID_COMMIT in reply.options


REQUESTS = {
    "selecting": lambda address: ask(
        MessageType.REQUEST, requested_address=address.packed, server=GATEWAY.packed
    ),
    "init-reboot": lambda address: ask(MessageType.REQUEST, requested_address=address.packed),
    "renewing": lambda address: ask(MessageType.REQUEST, client=address),
    "rebinding": lambda address: replace(ask(MessageType.REQUEST, client=address), broadcast=True),
}  # fmt: skip


@pytest.mark.parametrize("state", REQUESTS)
def test_a_request_for_the_own_address_is_granted(state: str) -> None:
    reply = answer(REQUESTS[state](ADDRESS))
    assert (reply.type, reply.your) == (MessageType.ACK, ADDRESS)
    assert reply.client == (ADDRESS if state.startswith("re") else UNSPECIFIED)
    assert lease_time(reply) == LEASE_SECONDS
    check_configuration(reply)


@pytest.mark.parametrize("state", REQUESTS)
def test_a_request_for_another_address_is_refused(state: str) -> None:
    reply = answer(REQUESTS[state](OTHER))
    assert (reply.type, reply.your, reply.client) == (MessageType.NAK, UNSPECIFIED, UNSPECIFIED)
    assert set(reply.options) == {Option.SERVER, Option.MESSAGE}
    frame = datagram.decode(dhcp4_server.frame(reply, REQUESTS[state](OTHER), LEASE))
    assert frame.destination == dhcp4.LIMITED_BROADCAST


def test_a_request_for_another_server_is_not_ours() -> None:
    message = ask(MessageType.REQUEST, requested_address=ADDRESS.packed, server=OTHER.packed)
    assert dhcp4_server.respond(message, LEASE) is None


def test_a_request_for_nothing_is_ignored() -> None:
    assert dhcp4_server.respond(ask(MessageType.REQUEST), LEASE) is None


def test_inform_is_told_all_but_an_address() -> None:
    reply = answer(ask(MessageType.INFORM, client=ADDRESS))
    assert (reply.type, reply.your, reply.client) == (MessageType.ACK, UNSPECIFIED, ADDRESS)
    assert Option.LEASE_TIME not in reply.options
    check_configuration(reply)
    assert dhcp4_server.respond(ask(MessageType.INFORM, client=OTHER), LEASE) is None


@pytest.mark.parametrize(
    "kind", [MessageType.DECLINE, MessageType.RELEASE, MessageType.OFFER, MessageType.ACK, MessageType.NAK]
)
def test_what_needs_no_answer_gets_none(kind: MessageType) -> None:
    assert dhcp4_server.respond(ask(kind, client=ADDRESS), LEASE) is None


@pytest.mark.parametrize(
    "message",
    [
        replace(ask(MessageType.DISCOVER), relay=IPv4Address("192.168.0.7")),
        ask(MessageType.DISCOVER, relay_information=b"\x01\x01x"),
        replace(ask(MessageType.DISCOVER), mac=MacAddress("0a:58:c0:a8:00:06")),
        replace(ask(MessageType.DISCOVER), reply=True),
    ],
    ids=["relayed", "relay-information", "foreign-mac", "reply"],
)
def test_imposters_get_nothing(message: Message) -> None:
    assert dhcp4_server.respond(message, LEASE) is None


def test_a_network_without_ipv4_is_silent() -> None:
    assert dhcp4_server.respond(ask(MessageType.DISCOVER), replace(LEASE, ipv4=None)) is None


@pytest.mark.parametrize("message", [ask(MessageType.DISCOVER), REQUESTS["init-reboot"](OTHER)], ids=["offer", "nak"])
def test_the_client_identifier_comes_back(message: Message) -> None:
    identifier = b"\xff" + bytes(18)
    message = replace(message, options={**message.options, Option.CLIENT_IDENTIFIER: identifier})
    assert answer(message).options[Option.CLIENT_IDENTIFIER] == identifier


@pytest.mark.parametrize(
    ("message", "destination"),
    [
        (ask(MessageType.DISCOVER), ADDRESS),
        (replace(ask(MessageType.DISCOVER), broadcast=True), dhcp4.LIMITED_BROADCAST),
        (ask(MessageType.REQUEST, client=ADDRESS), ADDRESS),
    ],
    ids=["unicast", "broadcast", "renewing"],
)
def test_replies_reach_the_client_and_nobody_else(message: Message, destination: IPv4Address) -> None:
    sent = datagram.decode(dhcp4_server.frame(answer(message), message, LEASE))
    assert (sent.source_mac, sent.destination_mac) == (LEASE.gateway_mac, MAC)
    assert (sent.source, sent.destination) == (GATEWAY, destination)
    assert (sent.source_port, sent.destination_port) == (67, 68)
    assert dhcp4.decode(sent.payload) == answer(message)


def test_short_messages_keep_what_matters() -> None:
    long = replace(LEASE, domain="d" * 60 + ".local", search=tuple(f"{'x' * 50}.{number}.local" for number in range(9)))
    message = ask(MessageType.DISCOVER, client_identifier=bytes(240), rapid_commit=b"")
    reply = dhcp4_server.respond(message, long)
    assert reply is not None
    sent = datagram.decode(dhcp4_server.frame(reply, message, long))
    assert len(sent.payload) <= dhcp4.DEFAULT_LIMIT
    kept = dhcp4.decode(sent.payload).options
    assert {Option.SUBNET_MASK, Option.ROUTER, Option.DNS, Option.MTU, Option.LEASE_TIME} <= set(kept)
    assert Option.SEARCH not in kept
    roomy = ask(MessageType.DISCOVER, maximum_size=(1500).to_bytes(2, "big"))
    reply = dhcp4_server.respond(roomy, long)
    assert reply is not None
    sent = datagram.decode(dhcp4_server.frame(reply, roomy, long))
    assert domains.decode_names(dhcp4.decode(sent.payload).options[Option.SEARCH], compressed=True) == long.search
    assert len(sent.payload) + 28 <= LEASE.mtu


ANY = st.builds(
    Message,
    type=st.sampled_from(MessageType),
    transaction=st.integers(0, 0xFFFFFFFF),
    mac=st.just(MAC),
    broadcast=st.booleans(),
    client=st.sampled_from([UNSPECIFIED, ADDRESS, OTHER]),
    options=st.fixed_dictionaries(
        {},
        optional={
            Option.REQUESTED_ADDRESS: st.sampled_from([ADDRESS.packed, OTHER.packed, bytes(4)]),
            Option.SERVER: st.sampled_from([GATEWAY.packed, OTHER.packed]),
            Option.CLIENT_IDENTIFIER: st.binary(max_size=240),
            Option.MAXIMUM_SIZE: st.binary(min_size=2, max_size=2),
            Option.RAPID_COMMIT: st.just(b""),
        },
    ),
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(ANY)
def test_no_client_ever_gets_another_address_or_an_error(message: Message) -> None:
    reply = dhcp4_server.respond(message, LEASE)
    if reply is None:
        return
    assert reply.your in (ADDRESS, UNSPECIFIED)
    sent = datagram.decode(dhcp4_server.frame(reply, message, LEASE))
    assert sent.destination_mac == MAC


def test_a_secondary_network_is_told_as_routes() -> None:
    routes = (
        (ip_network("203.203.0.0/16"), IPv4Address("203.203.4.1")),
        (ip_network("10.0.128.0/17"), IPv4Address("203.203.4.1")),
        (ip_network("fd20::/48"), IPv6Address("fd20:0:0:4::1")),
    )
    lease = replace(LEASE, router=False, routes=routes)
    reply = dhcp4_server.respond(ask(MessageType.DISCOVER), lease)
    assert reply is not None
    # RFC 3442: only the octets that the prefix covers.
    assert reply.options[Option.ROUTES] == (
        bytes([16, 203, 203, 203, 203, 4, 1]) + bytes([17, 10, 0, 128, 203, 203, 4, 1])
    )
    assert Option.ROUTER not in reply.options
    without = dhcp4_server.respond(ask(MessageType.DISCOVER), replace(lease, routes=()))
    assert without is not None
    assert Option.ROUTES not in without.options


def test_a_lease_without_a_router_tells_address_and_mtu_only() -> None:
    secondary = replace(LEASE, router=False)
    reply = dhcp4_server.respond(ask(MessageType.DISCOVER), secondary)
    assert reply is not None
    assert reply.your == ADDRESS
    configured = set(reply.options) - {Option.LEASE_TIME, Option.RENEWAL_TIME, Option.REBINDING_TIME, Option.SERVER}
    assert configured == {Option.SUBNET_MASK, Option.MTU, Option.BROADCAST}
