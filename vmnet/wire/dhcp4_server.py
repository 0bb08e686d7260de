"""The DHCPv4 server's decisions: one message and the sender's lease in, one reply out (RFC 2131 section 4.3)."""

from ipaddress import IPv4Address, IPv4Network
from typing import Final

from vmnet.model.addresses import IPAddress
from vmnet.wire import datagram, dhcp4, domains
from vmnet.wire.datagram import Datagram
from vmnet.wire.dhcp4 import Message, MessageType, Option
from vmnet.wire.lease import LEASE_SECONDS, REBIND_SECONDS, RENEW_SECONDS, Lease, LeaseIPv4

# What may be left out for a client that takes short messages only, the last option first.
_EXPENDABLE: Final = (Option.SEARCH, Option.BROADCAST, Option.HOSTNAME, Option.DOMAIN)
_HEADERS: Final = 28  # IPv4 and UDP


def respond(message: Message, lease: Lease) -> Message | None:
    """The reply, or None where the protocol, or prudence, wants silence. Never raises.

    The server is stateless: the lease is what the API says, whatever state the client is in.
    """
    ipv4 = lease.ipv4
    if message.reply or message.mac != lease.mac or ipv4 is None:
        return None
    # No relay agent stands between a port and its node: a guest that poses as one gets nothing.
    if message.relay != dhcp4.UNSPECIFIED or Option.RELAY_INFORMATION in message.options:
        return None
    match message.type:
        case MessageType.DISCOVER if Option.RAPID_COMMIT in message.options:
            return _grant(message, lease, ipv4, MessageType.ACK, {Option.RAPID_COMMIT: b""})  # RFC 4039 section 3.1
        case MessageType.DISCOVER:
            return _grant(message, lease, ipv4, MessageType.OFFER)
        case MessageType.REQUEST:
            return _answer_request(message, lease, ipv4)
        case MessageType.INFORM if message.client == ipv4.address.ip:
            # RFC 2131 section 4.3.5: configuration only, to the address the client has.
            return _reply(message, ipv4, MessageType.ACK, _configuration(lease, ipv4))
        case _:  # DECLINE and RELEASE change nothing: the address belongs to the machine as long as that exists
            return None


def frame(reply: Message, request: Message, lease: Lease) -> bytes:
    """The reply as an Ethernet frame. Raises ValueError for a lease without IPv4 or with names that DNS cannot carry.

    It goes to the client's own MAC even when its IP destination is the broadcast address: a reply concerns nobody else,
    and flooding it would show it to every node.
    """
    if lease.ipv4 is None:
        raise ValueError("the lease has no IPv4 address")
    if reply.type == MessageType.NAK:
        destination = dhcp4.LIMITED_BROADCAST  # RFC 2131 section 4.1, with no relay in between
    elif request.client != dhcp4.UNSPECIFIED:
        destination = request.client
    elif request.broadcast:
        destination = dhcp4.LIMITED_BROADCAST
    else:
        destination = reply.your
    limit = max(min(request.limit, lease.mtu - _HEADERS), dhcp4.DEFAULT_LIMIT)
    return datagram.encode(
        Datagram(
            source_mac=lease.gateway_mac,
            destination_mac=lease.mac,
            source=lease.ipv4.gateway,
            destination=destination,
            source_port=dhcp4.SERVER_PORT,
            destination_port=dhcp4.CLIENT_PORT,
            payload=dhcp4.encode(reply, limit, _EXPENDABLE),
        )
    )


def _answer_request(message: Message, lease: Lease, ipv4: LeaseIPv4) -> Message | None:
    """RFC 2131 section 4.3.2: the client's state shows in what it fills in."""
    if message.server is not None and message.server != ipv4.gateway:
        return None  # SELECTING, and another server was selected
    # SELECTING and INIT-REBOOT name the address in the option, RENEWING and REBINDING in ciaddr.
    wanted = message.requested or message.client
    if wanted == dhcp4.UNSPECIFIED:
        return None
    if wanted == ipv4.address.ip:
        return _grant(message, lease, ipv4, MessageType.ACK)
    text = f"{wanted} is not this machine's address"
    return _reply(message, ipv4, MessageType.NAK, {Option.MESSAGE: text.encode()})


def _grant(
    message: Message, lease: Lease, ipv4: LeaseIPv4, kind: MessageType, extra: dict[int, bytes] | None = None
) -> Message:
    times: dict[int, bytes] = {
        Option.LEASE_TIME: LEASE_SECONDS.to_bytes(4, "big"),
        Option.RENEWAL_TIME: RENEW_SECONDS.to_bytes(4, "big"),
        Option.REBINDING_TIME: REBIND_SECONDS.to_bytes(4, "big"),
    }
    options = times | (extra or {}) | _configuration(lease, ipv4)
    return _reply(message, ipv4, kind, options, your=ipv4.address.ip)


def _reply(
    message: Message,
    ipv4: LeaseIPv4,
    kind: MessageType,
    options: dict[int, bytes],
    your: IPv4Address = dhcp4.UNSPECIFIED,
) -> Message:
    head: dict[int, bytes] = {Option.SERVER: ipv4.gateway.packed}
    if identifier := message.options.get(Option.CLIENT_IDENTIFIER):
        head[Option.CLIENT_IDENTIFIER] = identifier  # RFC 6842 section 3
    return Message(
        type=kind,
        transaction=message.transaction,
        mac=message.mac,
        reply=True,
        broadcast=message.broadcast or kind == MessageType.NAK,
        client=message.client if kind == MessageType.ACK else dhcp4.UNSPECIFIED,  # RFC 2131 section 4.3.1, table 3
        your=your,
        options=head | options,
    )


def _route(subnet: IPv4Network, hop: IPAddress) -> bytes:
    """RFC 3442: the prefix length, the octets of the destination that it covers, the router."""
    covered = (subnet.prefixlen + 7) // 8
    return bytes([subnet.prefixlen]) + subnet.network_address.packed[:covered] + hop.packed


def _configuration(lease: Lease, ipv4: LeaseIPv4) -> dict[int, bytes]:
    # The subnet mask comes before the router (RFC 2132 section 3.3).
    options: dict[int, bytes] = {Option.SUBNET_MASK: ipv4.address.netmask.packed}
    if lease.router:
        options |= {Option.ROUTER: ipv4.gateway.packed, Option.DNS: ipv4.gateway.packed}
    options[Option.MTU] = lease.mtu.to_bytes(2, "big")
    if not lease.router:
        options[Option.BROADCAST] = ipv4.address.network.broadcast_address.packed
        if routes := b"".join(_route(subnet, hop) for subnet, hop in lease.routes if isinstance(subnet, IPv4Network)):
            options[Option.ROUTES] = routes
        return options
    options[Option.DOMAIN] = lease.domain.encode()
    if lease.hostname:
        options[Option.HOSTNAME] = lease.hostname.encode()
    options[Option.BROADCAST] = ipv4.address.network.broadcast_address.packed
    options[Option.SEARCH] = domains.encode_compressed(lease.search)
    return options
