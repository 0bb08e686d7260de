"""The DHCPv6 server's decisions: one message and the sender's lease in, one reply out (RFC 8415 section 18.3)."""

from dataclasses import replace
from ipaddress import IPv6Address
from typing import Final

from vmnet.model.network import GATEWAY_LINK_LOCAL
from vmnet.wire import datagram, dhcp6
from vmnet.wire.datagram import Datagram
from vmnet.wire.dhcp6 import Assigned, Association, Fqdn, Message, MessageType, Option, Status, StatusCode
from vmnet.wire.lease import LEASE_SECONDS, REBIND_SECONDS, RENEW_SECONDS, Lease

_NEEDS_SERVER: Final = (MessageType.REQUEST, MessageType.RENEW, MessageType.RELEASE, MessageType.DECLINE)
_FORBIDS_SERVER: Final = (MessageType.SOLICIT, MessageType.CONFIRM, MessageType.REBIND)
_OTHERS: Final = {
    Option.IA_TA: Status(StatusCode.NO_ADDRESSES, "no temporary addresses here"),
    Option.IA_PD: Status(StatusCode.NO_PREFIX, "no prefixes are delegated here"),
}


def respond(message: Message, lease: Lease) -> Message | None:
    """The reply, or None where RFC 8415 section 16 has the message discarded. Never raises.

    The server is stateless: the lease is what the API says, so every identity association of the machine has a binding.
    """
    if lease.ipv6 is None or not _valid(message, lease):
        return None
    address = lease.ipv6.address.ip
    match message.type:
        case MessageType.SOLICIT if message.rapid_commit:
            return replace(_reply(message, lease, MessageType.REPLY, _assign(message, address)), rapid_commit=True)
        case MessageType.SOLICIT:
            advertise = _reply(message, lease, MessageType.ADVERTISE, _assign(message, address))
            return replace(advertise, preference=dhcp6.MOST_PREFERRED)
        case MessageType.REQUEST | MessageType.RENEW | MessageType.REBIND:
            return _reply(message, lease, MessageType.REPLY, _assign(message, address))
        case MessageType.CONFIRM:
            return _confirm(message, lease, address)
        case MessageType.RELEASE | MessageType.DECLINE:
            # Acknowledged and without effect: the address belongs to the machine as long as that exists.
            return replace(_plain(message, lease), status=Status(StatusCode.SUCCESS))
        case MessageType.INFORMATION_REQUEST:
            return _reply(message, lease, MessageType.REPLY, ())
        case _:
            return None


def frame(reply: Message, lease: Lease, client: IPv6Address) -> bytes:
    """The reply as an Ethernet frame from the gateway's link-local address to the client's."""
    return datagram.encode(
        Datagram(
            lease.gateway_mac,
            lease.mac,
            GATEWAY_LINK_LOCAL,
            client,
            dhcp6.SERVER_PORT,
            dhcp6.CLIENT_PORT,
            dhcp6.encode(reply),
        )
    )


def _valid(message: Message, lease: Lease) -> bool:
    """RFC 8415 section 16: who must name whom."""
    if message.type == MessageType.INFORMATION_REQUEST:
        return not message.associations and message.server in (None, lease.duid)
    if message.client is None:
        return False
    if message.type in _NEEDS_SERVER:
        return message.server == lease.duid
    return message.type in _FORBIDS_SERVER and message.server is None


def _assign(message: Message, address: IPv6Address) -> tuple[Association, ...]:
    """The machine has one address: the first IA_NA gets it, and lifetimes of 0 for what else the client holds there."""
    answers: list[Association] = []
    given = False
    for association in message.associations:
        if association.kind != Option.IA_NA:
            answers.append(Association(association.kind, association.identifier, status=_OTHERS[association.kind]))
        elif given:
            status = Status(StatusCode.NO_ADDRESSES, "this machine has one address")
            answers.append(Association(Option.IA_NA, association.identifier, status=status))
        else:
            given = True
            stale = tuple(Assigned(item.address, 0, 0) for item in association.addresses if item.address != address)
            if message.type not in (MessageType.RENEW, MessageType.REBIND):
                stale = ()  # merely hints
            current = Assigned(address, LEASE_SECONDS, LEASE_SECONDS)
            answers.append(
                Association(Option.IA_NA, association.identifier, RENEW_SECONDS, REBIND_SECONDS, (current, *stale))
            )
    return tuple(answers)


def _confirm(message: Message, lease: Lease, address: IPv6Address) -> Message | None:
    """RFC 8415 section 18.3.3, but by address, not by prefix: the port's binding lets only its own address through."""
    held = [item.address for association in message.associations for item in association.addresses]
    if not held:
        return None
    if all(item == address for item in held):
        return replace(_plain(message, lease), status=Status(StatusCode.SUCCESS))
    return replace(
        _plain(message, lease), status=Status(StatusCode.NOT_ON_LINK, f"{address} is this machine's address")
    )


def _plain(message: Message, lease: Lease) -> Message:
    return Message(MessageType.REPLY, message.transaction, message.client, lease.duid)


def _reply(message: Message, lease: Lease, kind: MessageType, associations: tuple[Association, ...]) -> Message:
    fqdn: Fqdn | None = None
    if message.fqdn is not None and lease.hostname:
        # The node's responder answers for the name, so the client is told not to register it (RFC 4704 section 6).
        name = f"{lease.hostname}.{lease.domain}"
        fqdn = Fqdn(name, server_updates=True, override=not message.fqdn.server_updates)
    return Message(
        type=kind,
        transaction=message.transaction,
        client=message.client,
        server=lease.duid,
        associations=associations,
        dns=(lease.ipv6.gateway,) if lease.ipv6 and lease.ipv6.gateway else (),
        search=lease.search if lease.router else (),
        fqdn=fqdn,
    )
