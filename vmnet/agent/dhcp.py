"""DHCP at the node: which lease a frame is about, what it is answered, and the counting."""

from collections.abc import Mapping
from ipaddress import IPv6Address

from vmnet import metrics
from vmnet.model.names import MacAddress
from vmnet.wire import datagram, dhcp4, dhcp4_server, dhcp6, dhcp6_server
from vmnet.wire.lease import Lease
from vmnet.wire.malformed import Malformed


def answer(frame: bytes, leases: Mapping[MacAddress, Lease], network: str) -> bytes | None:
    """The reply frame to one frame with a DHCPv4 or DHCPv6 message, or None. Never raises.

    The lease is the one of the frame's source MAC: the port's binding has made sure that it is the sender's own.
    """
    try:
        packet = datagram.decode(frame)
    except Malformed:
        metrics.MALFORMED.labels(network, "udp").inc()
        return None
    lease = leases.get(packet.source_mac)
    if lease is None:
        return None
    protocol = "dhcp6" if packet.destination_port == dhcp6.SERVER_PORT else "dhcp4"
    try:
        if protocol == "dhcp4":
            return _answer4(packet.payload, lease, network)
        if not isinstance(packet.source, IPv6Address) or not packet.source.is_link_local:
            raise Malformed("DHCPv6 from an address that is not link-local")  # RFC 8415 section 7.1
        return _answer6(packet.payload, lease, network, packet.source)
    except Malformed:
        metrics.MALFORMED.labels(network, protocol).inc()
        return None


def _answer4(payload: bytes, lease: Lease, network: str) -> bytes | None:
    message = dhcp4.decode(payload)
    metrics.DHCP_REQUESTS.labels(network, "ipv4", message.type.name.lower()).inc()
    reply = dhcp4_server.respond(message, lease)
    return None if reply is None else dhcp4_server.frame(reply, message, lease)


def _answer6(payload: bytes, lease: Lease, network: str, client: IPv6Address) -> bytes | None:
    message = dhcp6.decode(payload)
    metrics.DHCP_REQUESTS.labels(network, "ipv6", message.type.name.lower()).inc()
    reply = dhcp6_server.respond(message, lease)
    return None if reply is None else dhcp6_server.frame(reply, lease, client)
