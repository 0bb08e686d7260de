"""Every metric of the product, and the HTTP handlers that show them (``/metrics``, ``/livez``, ``/readyz``).

Names have the prefix ``vmnet_`` and base units; no address is ever a label. ``docs/metrics.md`` is made from
what stands here.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Final

from aiohttp import web
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from vmnet_dns.tally import BUCKETS, Tally

REGISTRY: Final = CollectorRegistry()

_MACHINE: Final = ("namespace", "name", "node", "network")
_FAST: Final = (0.0001, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

MIGRATIONS: Final = Counter(
    "vmnet_migrations",
    "Finished live migrations by outcome (succeeded, failed).",
    [*_MACHINE, "outcome"],
    registry=REGISTRY,
)
MIGRATION_PAUSE: Final = Histogram(
    "vmnet_migration_pause_seconds",
    "From the guest's last frame at the source to its first one at the target: the hypervisor's pause, from outside.",
    _MACHINE,
    buckets=_FAST,
    registry=REGISTRY,
)
MIGRATION_BLACKOUT: Final = Histogram(
    "vmnet_migration_blackout_seconds",
    "From the guest's last frame at the source to the first one that reached it at the target.",
    _MACHINE,
    buckets=_FAST,
    registry=REGISTRY,
)
MIGRATION_DELIVERY: Final = Histogram(
    "vmnet_migration_delivery_seconds",
    "From the port's opening to the first frame that it carried towards the guest: the network's own part.",
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
MIGRATION_CONNECTIONS: Final = Counter(
    "vmnet_migration_connections",
    "Connections that came along with a machine, by way (streamed, late).",
    [*_MACHINE, "way"],
    registry=REGISTRY,
)
MIGRATION_HAND_OVER: Final = Histogram(
    "vmnet_migration_hand_over_seconds",
    "From the guest's first frame to the last connection that the source's agent handed over.",
    _MACHINE,
    buckets=_FAST,
    registry=REGISTRY,
)
ANNOUNCEMENTS: Final = Counter(
    "vmnet_announcements",
    "Announcement frames sent for a machine, by kind (garp, na, ra, ra_farewell, rarp, gateway_arp).",
    [*_MACHINE, "kind"],
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
DNS_TALLIES: Final[dict[str, Tally]] = {}
"""By network, what its responder on this node has counted."""


class _Dns(Collector):
    """Counting by the library's own counters would take longer than answering does."""

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "vmnet_dns_requests",
            "DNS requests by query type, response code and outcome (local, forwarded, cached, stale, refused, limited, "
            "malformed, failed).",
            labels=["network", "type", "rcode", "outcome"],
        )
        seconds = HistogramMetricFamily(
            "vmnet_dns_request_seconds",
            "From taking a DNS request from its socket to sending the answer.",
            labels=["network", "outcome"],
        )
        for network, tally in DNS_TALLIES.items():
            for labels, number in tally.queries.items():
                requests.add_metric([network, *labels], number)
            for outcome, times in tally.times.items():
                total = 0
                buckets = []
                for bound, number in zip((*map(str, BUCKETS), "+Inf"), times, strict=True):
                    total += number
                    buckets.append((bound, float(total)))
                seconds.add_metric([network, outcome], buckets, tally.seconds[outcome])
        yield requests
        yield seconds


REGISTRY.register(_Dns())
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
LEFT_OVERS: Final = Counter(
    "vmnet_left_overs_removed",
    "What nobody needed any more and was found by looking, by kind: claim (its machine is gone), port (its container is"
    " gone), network (it is gone, and its namespace was still on the node); what a controller found at its start:"
    " annotation (a network's part on a node); and what an agent found at its start: link, address,"
    " route, neighbour, fdb, table and element (of nftables).",
    ["kind"],
    registry=REGISTRY,
)
NETWORK_HEALTHY: Final = Gauge(
    "vmnet_network_healthy",
    "1 when the last self-test of a network on a node found nothing wrong, else 0; none where the network is not.",
    ["network", "node"],
    registry=REGISTRY,
)
NETWORK_FAULTS: Final = Counter(
    "vmnet_network_faults",
    "Faults that self-tests found, by part (namespace, bridge, gateway, tunnel, join, tables, port, pod, answer). The"
    " network is empty for what all networks of the node share.",
    ["network", "node", "part"],
    registry=REGISTRY,
)
RECONCILES: Final = Histogram(
    "vmnet_reconcile_seconds",
    "Reconciliations by kind and result.",
    ["kind", "result"],
    buckets=_FAST,
    registry=REGISTRY,
)
READY: Final = Gauge(
    "vmnet_ready",
    "1 while the process is ready (caches listed, datapath in place), else 0; /readyz says what is missing.",
    registry=REGISTRY,
)
LEADING: Final = Gauge(
    "vmnet_leading",
    "1 while this process holds the lease and reconciles, 0 while it waits for it.",
    ["lease"],
    registry=REGISTRY,
)
BUILD: Final = Info("vmnet_build", "The version that runs.", registry=REGISTRY)
BUILD.info({"version": version("vmnet")})
ProcessCollector(registry=REGISTRY)


FORGET_SECONDS: Final = 600.0
"""A machine's series stay for so long after it has gone, so that its last migration is scraped."""


def forget_machine(namespace: str, name: str) -> None:
    """A machine has gone, some time ago: no series of it stays."""
    labels = {"namespace": namespace, "name": name}
    for metric in (
        MIGRATIONS,
        MIGRATION_PAUSE,
        MIGRATION_BLACKOUT,
        MIGRATION_DELIVERY,
        MIGRATION_CUT_OVER,
        MIGRATION_CONNECTIONS,
        MIGRATION_HAND_OVER,
        ANNOUNCEMENTS,
    ):
        metric.remove_by_labels(labels)


def forget_network_health(network: str, node: str) -> None:
    """A network has left the node."""
    with contextlib.suppress(KeyError):
        NETWORK_HEALTHY.remove(network, node)


def application(
    ready: Callable[[], str | None], networks: Callable[[], Mapping[str, Sequence[str]]] | None = None
) -> web.Application:
    """Serve metrics and health. ``ready`` returns None when all is well, else the reason why not.

    ``networks``: what is wrong with each network of this node, as JSON below ``/networks``.
    """

    async def metrics(_: web.Request) -> web.Response:
        READY.set(ready() is None)
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        reason = ready()
        return web.Response(text="ok\n") if reason is None else web.Response(status=503, text=f"{reason}\n")

    async def list_networks(_: web.Request) -> web.Response:
        return web.json_response(networks() if networks is not None else {})

    app = web.Application()
    if networks is not None:
        app.add_routes([web.get("/networks", list_networks)])
    app.add_routes([web.get("/metrics", metrics), web.get("/livez", livez), web.get("/readyz", readyz)])
    return app
