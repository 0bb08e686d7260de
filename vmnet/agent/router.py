"""Router discovery at the node: answers to solicitations (RFC 4861 section 6.2.6)."""

from collections.abc import Mapping

from vmnet import metrics
from vmnet.model.names import MacAddress
from vmnet.wire import ndp, router
from vmnet.wire.lease import Lease
from vmnet.wire.malformed import Malformed
from vmnet.wire.ndp import RouterSolicitation


def answer(frame: bytes, leases: Mapping[MacAddress, Lease], network: str) -> bytes | None:
    """The advertisement that answers one frame with a router solicitation, or None. Never raises.

    It is sent at once: RFC 4861 has routers wait a random time so that several of them do not speak together, and here
    one router answers, to the asking guest alone.
    """
    try:
        packet = ndp.decode(frame)
    except Malformed:
        metrics.MALFORMED.labels(network, "nd").inc()
        return None
    lease = leases.get(packet.source_mac)
    if lease is None or not isinstance(packet.message, RouterSolicitation):
        return None
    metrics.ROUTER_SOLICITATIONS.labels(network).inc()
    return advertise(lease)


def advertise(lease: Lease) -> bytes | None:
    """The advertisement for one guest as a frame; None when it has no IPv6."""
    packet = router.advertisement(lease)
    return None if packet is None else ndp.encode(packet)
