"""The DHCPv6 server for every message a client sends (RFC 8415 section 18.3)."""

from dataclasses import replace
from ipaddress import IPv6Address, ip_interface

import pytest

from vmnet.model.names import MacAddress
from vmnet.wire import datagram, dhcp6, dhcp6_server
from vmnet.wire.dhcp6 import Assigned, Association, Fqdn, Message, MessageType, Option, StatusCode
from vmnet.wire.lease import LEASE_SECONDS, REBIND_SECONDS, RENEW_SECONDS, Lease, LeaseIPv6

ADDRESS, OTHER = IPv6Address("fd00:7::5"), IPv6Address("fd00:7::99")
CLIENT = b"\x00\x03\x00\x01\x0a\x58\xc0\xa8\x00\x05"
SERVER = b"\x00\x04" + bytes(range(16))
LEASE = Lease(
    mac=MacAddress("0a:58:c0:a8:00:05"),
    gateway_mac=MacAddress("0a:58:c0:a8:00:01"),
    duid=SERVER,
    mtu=1400,
    hostname="blue",
    domain="blue-ns.vm.cluster.local",
    search=("blue-ns.vm.cluster.local", "cluster.local"),
    ipv6=LeaseIPv6(ip_interface("fd00:7::5/64"), IPv6Address("fd00:7::1")),
)


def holding(*addresses: IPv6Address, kind: Option = Option.IA_NA, identifier: int = 7) -> Association:
    return Association(kind, identifier, addresses=tuple(Assigned(item, 10, 20) for item in addresses))


def ask(kind: MessageType, *associations: Association, server: bytes | None = None) -> Message:
    return Message(kind, 0x123456, client=CLIENT, server=server, associations=associations)


def answer(message: Message) -> Message:
    reply = dhcp6_server.respond(message, LEASE)
    assert reply is not None
    assert (reply.transaction, reply.client, reply.server) == (message.transaction, message.client, SERVER)
    return reply


GRANTED = Association(
    Option.IA_NA, 7, RENEW_SECONDS, REBIND_SECONDS, (Assigned(ADDRESS, LEASE_SECONDS, LEASE_SECONDS),)
)


def test_solicit_is_advertised_the_address_and_the_search_ends_there() -> None:
    reply = answer(ask(MessageType.SOLICIT, holding()))
    assert reply.type == MessageType.ADVERTISE
    assert reply.associations == (GRANTED,)
    assert reply.preference == 255
    assert reply.dns == (IPv6Address("fd00:7::1"),)
    assert reply.search == LEASE.search


def test_a_hint_in_solicit_changes_nothing() -> None:
    assert answer(ask(MessageType.SOLICIT, holding(OTHER))).associations == (GRANTED,)


def test_rapid_commit_is_replied_to_at_once() -> None:
    reply = answer(replace(ask(MessageType.SOLICIT, holding()), rapid_commit=True))
    assert (reply.type, reply.rapid_commit, reply.associations) == (MessageType.REPLY, True, (GRANTED,))


@pytest.mark.parametrize(
    ("kind", "server"),
    [(MessageType.REQUEST, SERVER), (MessageType.RENEW, SERVER), (MessageType.REBIND, None)],
)
def test_the_address_is_granted_and_extended(kind: MessageType, server: bytes | None) -> None:
    reply = answer(ask(kind, holding(ADDRESS), server=server))
    assert (reply.type, reply.associations) == (MessageType.REPLY, (GRANTED,))


@pytest.mark.parametrize(("kind", "server"), [(MessageType.RENEW, SERVER), (MessageType.REBIND, None)])
def test_a_wrong_address_ends_when_it_is_renewed(kind: MessageType, server: bytes | None) -> None:
    [association] = answer(ask(kind, holding(OTHER), server=server)).associations
    assert association.addresses == (*GRANTED.addresses, Assigned(OTHER, 0, 0))


def test_confirm_says_whether_the_address_is_the_machines() -> None:
    right = answer(ask(MessageType.CONFIRM, holding(ADDRESS))).status
    assert right is not None
    assert right.code == StatusCode.SUCCESS
    wrong = answer(ask(MessageType.CONFIRM, holding(ADDRESS, OTHER))).status
    assert wrong is not None
    assert wrong.code == StatusCode.NOT_ON_LINK
    assert dhcp6_server.respond(ask(MessageType.CONFIRM, holding()), LEASE) is None


@pytest.mark.parametrize("kind", [MessageType.RELEASE, MessageType.DECLINE])
def test_release_and_decline_are_acknowledged(kind: MessageType) -> None:
    reply = answer(ask(kind, holding(ADDRESS), server=SERVER))
    assert reply.type == MessageType.REPLY
    assert reply.status is not None
    assert reply.status.code == StatusCode.SUCCESS
    assert answer(ask(MessageType.SOLICIT, holding())).associations == (GRANTED,), "the address stays the machine's"


def test_information_request_is_told_all_but_an_address() -> None:
    reply = dhcp6_server.respond(Message(MessageType.INFORMATION_REQUEST, 1), LEASE)
    assert reply is not None
    assert (reply.type, reply.associations, reply.search) == (MessageType.REPLY, (), LEASE.search)


def test_one_address_goes_to_one_association() -> None:
    reply = answer(
        ask(
            MessageType.SOLICIT,
            holding(kind=Option.IA_PD, identifier=1),
            holding(identifier=7),
            holding(identifier=8),
            holding(kind=Option.IA_TA, identifier=9),
        )
    )
    codes = [association.status.code if association.status else None for association in reply.associations]
    assert codes == [StatusCode.NO_PREFIX, None, StatusCode.NO_ADDRESSES, StatusCode.NO_ADDRESSES]
    assert [association.identifier for association in reply.associations] == [1, 7, 8, 9]


@pytest.mark.parametrize(
    "message",
    [
        replace(ask(MessageType.SOLICIT, holding()), client=None),
        ask(MessageType.SOLICIT, holding(), server=SERVER),
        ask(MessageType.REQUEST, holding()),
        ask(MessageType.REQUEST, holding(), server=b"\x00\x04another"),
        ask(MessageType.RENEW, holding(ADDRESS)),
        ask(MessageType.REBIND, holding(ADDRESS), server=SERVER),
        ask(MessageType.CONFIRM, holding(ADDRESS), server=SERVER),
        ask(MessageType.RELEASE, holding(ADDRESS)),
        ask(MessageType.INFORMATION_REQUEST, holding()),
        ask(MessageType.INFORMATION_REQUEST, server=b"\x00\x04another"),
        ask(MessageType.ADVERTISE),
        ask(MessageType.REPLY),
        ask(MessageType.RECONFIGURE),
    ],
)
def test_what_must_be_discarded_gets_no_answer(message: Message) -> None:
    assert dhcp6_server.respond(message, LEASE) is None


def test_a_network_without_ipv6_is_silent() -> None:
    assert dhcp6_server.respond(ask(MessageType.SOLICIT, holding()), replace(LEASE, ipv6=None)) is None


@pytest.mark.parametrize("client_updates", [True, False])
def test_the_name_is_the_servers_business(client_updates: bool) -> None:
    message = replace(ask(MessageType.SOLICIT, holding()), fqdn=Fqdn("mine", server_updates=not client_updates))
    assert answer(message).fqdn == Fqdn("blue.blue-ns.vm.cluster.local", server_updates=True, override=client_updates)
    assert answer(ask(MessageType.SOLICIT, holding())).fqdn is None


def test_the_frame_goes_from_the_router_to_the_client() -> None:
    reply = answer(ask(MessageType.SOLICIT, holding()))
    client = IPv6Address("fe80::858:c0ff:fea8:5")
    sent = datagram.decode(dhcp6_server.frame(reply, LEASE, client))
    assert (sent.source_mac, sent.destination_mac) == (LEASE.gateway_mac, LEASE.mac)
    assert (sent.source, sent.destination) == (IPv6Address("fe80::1"), client)
    assert (sent.source_port, sent.destination_port) == (547, 546)
    assert dhcp6.decode(sent.payload) == reply


def test_a_lease_without_a_router_tells_the_address_only() -> None:
    assert LEASE.ipv6 is not None
    secondary = replace(LEASE, router=False, ipv6=replace(LEASE.ipv6, gateway=None))
    reply = dhcp6_server.respond(ask(MessageType.SOLICIT, holding()), secondary)
    assert reply is not None
    assert (reply.dns, reply.search) == ((), ())
    assert reply.associations[0].addresses
