"""Every metric of the product, and the HTTP handlers that show them (``/metrics``, ``/livez``, ``/readyz``).

Names have the prefix ``vmnet_`` and base units; no address is ever a label.
"""

from collections.abc import Callable
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

REGISTRY: Final = CollectorRegistry()

_MACHINE: Final = ("namespace", "name", "node", "network")
_FAST: Final = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

MIGRATIONS: Final = Counter(
    "vmnet_migrations",
    "Finished live migrations by outcome (succeeded, failed).",
    [*_MACHINE, "outcome"],
    registry=REGISTRY,
)
MIGRATION_BLACKOUT: Final = Histogram(
    "vmnet_migration_blackout_seconds",
    "From the port's opening to the first frame that it carried towards the guest.",
    _MACHINE,
    buckets=_FAST,
    registry=REGISTRY,
)
MIGRATION_CUT_OVER: Final = Histogram(
    "vmnet_migration_cut_over_seconds",
    "From the key (guest frame or annotation) seen by the agent to the last re-asserted entry.",
    [*_MACHINE, "key"],
    buckets=_FAST,
    registry=REGISTRY,
)
ANNOUNCEMENTS: Final = Counter(
    "vmnet_announcements",
    "Announcement frames sent, by kind (garp, na, ra, rarp, gateway_arp).",
    ["network", "kind"],
    registry=REGISTRY,
)
DHCP_REQUESTS: Final = Counter(
    "vmnet_dhcp_requests",
    "DHCP messages received by family and type.",
    ["network", "family", "type"],
    registry=REGISTRY,
)
ROUTER_SOLICITATIONS: Final = Counter(
    "vmnet_router_solicitations", "Router solicitations received.", ["network"], registry=REGISTRY
)
MALFORMED: Final = Counter(
    "vmnet_malformed_packets",
    "Packets dropped because they could not be parsed.",
    ["network", "protocol"],
    registry=REGISTRY,
)
DNS_REQUESTS: Final = Counter(
    "vmnet_dns_requests",
    "DNS requests by query type, response code and outcome (local, forwarded, cached, refused).",
    ["network", "type", "rcode", "outcome"],
    registry=REGISTRY,
)
CNI_REQUESTS: Final = Histogram(
    "vmnet_cni_request_seconds",
    "CNI requests by command and result (ok, or the CNI error code).",
    ["command", "result"],
    buckets=_FAST,
    registry=REGISTRY,
)
ADDRESSES_USED: Final = Gauge(
    "vmnet_network_addresses_used",
    "Allocated addresses by network and family.",
    ["network", "family"],
    registry=REGISTRY,
)
ADDRESSES_CAPACITY: Final = Gauge(
    "vmnet_network_addresses_capacity",
    "Addresses that can be given to workloads, by network and family.",
    ["network", "family"],
    registry=REGISTRY,
)
RECONCILES: Final = Histogram(
    "vmnet_reconcile_seconds",
    "Reconciliations by kind and result.",
    ["kind", "result"],
    buckets=_FAST,
    registry=REGISTRY,
)


def application(ready: Callable[[], str | None]) -> web.Application:
    """Serve metrics and health. ``ready`` returns None when all is well, else the reason why not."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        reason = ready()
        return web.Response(text="ok\n") if reason is None else web.Response(status=503, text=f"{reason}\n")

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/livez", livez), web.get("/readyz", readyz)])
    return app
