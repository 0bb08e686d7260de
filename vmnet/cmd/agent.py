"""``vmnet agent``: owns one node's datapath; one runs on every node."""

import argparse
import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Final

from aiohttp import web

from vmnet import metrics
from vmnet.agent.agent import Agent, Settings
from vmnet.agent.cluster import Stores
from vmnet.agent.multus import CONFIGURATIONS, Mode
from vmnet.agent.name_queries import SOCKET
from vmnet.agent.service_tables import DEFAULT_SERVICES
from vmnet.cmd.controller import host_and_port
from vmnet.kernel.linux import LinuxKernel
from vmnet.kube.api import ENDPOINT_SLICES, NADS, NAMESPACES, NODES, PODS, POLICIES, SERVICE_CIDRS, SERVICES, VMIS
from vmnet.kube.client import KubeClient
from vmnet.kube.watch import ListWatch
from vmnet.model import addresses, names
from vmnet_dns.server import upstream_routes

log = logging.getLogger(__name__)

MAX_INTERFACE_NAME: Final = 15
_LEVELS: Final = ("debug", "info", "warning", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    node = os.environ.get("NODE_NAME")
    parser.add_argument("--node-name", default=node, required=not node, help="this node (default: $NODE_NAME)")
    parser.add_argument(
        "--kubeconfig", type=Path, help="file to connect with (default: $KUBECONFIG, then the pod's own)"
    )
    parser.add_argument(
        "--metrics-address",
        type=host_and_port,
        default="127.0.0.1:9465",
        metavar="HOST:PORT",
        help="where /metrics, /livez and /readyz are served (%(default)s)",
    )
    parser.add_argument("--cluster-domain", default="cluster.local", help="DNS domain of the cluster (%(default)s)")
    parser.add_argument(
        "--dns-upstream",
        type=_upstream,
        action="append",
        default=[],
        metavar="[DOMAIN=]ADDRESS[:PORT]",
        help="server that names outside the cluster domain, or in one domain, are forwarded to; may be repeated"
        " (default: the cluster's DNS, kube-system/kube-dns)",
    )
    parser.add_argument(
        "--dns-ttl",
        type=int,
        choices=range(5, 31),
        default=30,
        metavar="SECONDS",
        help="of machines' and pods' names, 5 to 30 (%(default)s); of Services it is 5",
    )
    parser.add_argument("--log-dns-queries", action="store_true", help="one line for every DNS query")
    parser.add_argument("--dns-socket", type=Path, default=SOCKET, help="for vmnet dns query (%(default)s)")
    parser.add_argument(
        "--default-service",
        type=_service,
        action="append",
        metavar="NAMESPACE/NAME",
        help="Service of the cluster that every network may use; may be repeated, and replaces the default: "
        + ", ".join(DEFAULT_SERVICES),
    )
    parser.add_argument(
        "--service-range",
        type=addresses.network,
        action="append",
        default=[],
        metavar="CIDR",
        help="range of cluster addresses, besides those of the API's ServiceCIDR objects (Kubernetes 1.33); what nobody"
        " has of it is refused in every network; may be repeated",
    )
    parser.add_argument("--cni-socket", type=Path, default=Path(names.CNI_SOCKET), help="%(default)s")
    parser.add_argument(
        "--multus",
        choices=[mode.value for mode in Mode],
        default=Mode.AUTO.value,
        help="whether Multus attaches pods to secondary networks; without it this agent does (%(default)s)",
    )
    parser.add_argument(
        "--cni-configurations",
        type=Path,
        default=CONFIGURATIONS,
        metavar="DIRECTORY",
        help="where Multus is looked for (%(default)s)",
    )
    parser.add_argument(
        "--localnet",
        type=localnet,
        action="append",
        default=[],
        metavar="PHYSICAL=BRIDGE",
        help="bridge of this node that carries a physical network of Localnet topology; may be repeated",
    )
    parser.add_argument(
        "--kubelet-cgroup",
        metavar="PATH",
        help="control group (version 2) of the kubelet, as /proc/<pid>/cgroup shows it: only it reaches eth0 of pods"
        " that have a network of their own (default: look for it; empty: let every process of root)",
    )
    parser.add_argument("--log-level", choices=_LEVELS, help="default: info, or $VMNET_LOG_LEVEL")


def localnet(text: str) -> tuple[str, str]:
    """Split ``physical network=bridge``. Raises ValueError."""
    physical, separator, bridge = text.partition("=")
    if not separator or not physical or not bridge or len(bridge) > MAX_INTERFACE_NAME:
        raise ValueError(f"{text!r} is not PHYSICAL=BRIDGE")
    return physical, bridge


def _upstream(text: str) -> str:
    upstream_routes([text])
    return text


def _service(text: str) -> str:
    namespace, _, name = text.partition("/")
    if not namespace or not name or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAMESPACE/NAME")
    return text


async def run(arguments: argparse.Namespace) -> int:
    """Run until SIGTERM or SIGINT. Nothing is torn down: the next agent adopts the datapath."""
    if arguments.log_level:
        logging.getLogger().setLevel(arguments.log_level.upper())
    host, port = arguments.metrics_address
    settings = Settings(
        node_name=arguments.node_name,
        cluster_domain=arguments.cluster_domain,
        default_services=tuple(arguments.default_service or DEFAULT_SERVICES),
        service_ranges=tuple(arguments.service_range),
        dns_upstreams=upstream_routes(arguments.dns_upstream),
        dns_socket=arguments.dns_socket,
        log_queries=arguments.log_dns_queries,
        dns_ttl=arguments.dns_ttl,
        cni_socket=arguments.cni_socket,
        multus=Mode(arguments.multus),
        kubelet_cgroup=arguments.kubelet_cgroup,
        cni_configurations=arguments.cni_configurations,
        localnets=tuple(arguments.localnet),
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    kube = await KubeClient.connect(arguments.kubeconfig, user_agent="vmnet-agent")
    kernel = LinuxKernel()
    try:
        stores = Stores(
            pods=ListWatch(kube, PODS),
            nodes=ListWatch(kube, NODES),
            namespaces=ListWatch(kube, NAMESPACES),
            nads=ListWatch(kube, NADS),
            machines=ListWatch(kube, VMIS, optional=True),
            services=ListWatch(kube, SERVICES),
            endpoint_slices=ListWatch(kube, ENDPOINT_SLICES),
            policies=ListWatch(kube, POLICIES),
            service_cidrs=ListWatch(kube, SERVICE_CIDRS, optional=True),
        )
        agent = Agent(settings, kernel, kube, stores)
        runner = web.AppRunner(metrics.application(agent.not_ready), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            working = asyncio.create_task(agent.run(), name="agent")
            stopping = asyncio.create_task(stop.wait(), name="stop")
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            working.cancel()
            await asyncio.gather(stopping, return_exceptions=True)
            try:
                await working
            except asyncio.CancelledError:
                log.info("agent of %s ends; its datapath stays", arguments.node_name)
        finally:
            await runner.cleanup()
        return 0
    finally:
        await kernel.close()
        await kube.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
