"""One node's agent: the parts, and the loops that keep them in step with the API."""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from vmnet import metrics
from vmnet.agent import facts
from vmnet.agent.announcer import Announcer
from vmnet.agent.attachments import Attachments
from vmnet.agent.carry import Arrivals, Departures, Holds
from vmnet.agent.cluster import Cluster, Stores
from vmnet.agent.cni_server import CniServer
from vmnet.agent.conflist import Conflist, installs, shim
from vmnet.agent.credentials import Credentials
from vmnet.agent.cut_over import CutOvers
from vmnet.agent.datagrams import Datagrams
from vmnet.agent.default_interfaces import DefaultInterfaces
from vmnet.agent.guests import GuestServices
from vmnet.agent.health_checks import HealthChecks
from vmnet.agent.inspection import Inspection
from vmnet.agent.multus import Mode, Multus
from vmnet.agent.name_queries import NameQueries
from vmnet.agent.networks import Networks, NotReady, TableSource
from vmnet.agent.peers import Peers
from vmnet.agent.policy_tables import PolicyTables
from vmnet.agent.responder import Names, Responders
from vmnet.agent.self_report import SelfReport
from vmnet.agent.self_test import SelfTest
from vmnet.agent.service_tables import ServiceTables
from vmnet.agent.services import AddressService, NameService
from vmnet.cni.call import DELETED_DIRECTORY
from vmnet.kernel.api import Gone, Kernel
from vmnet.kube.api import Kube, KubeError
from vmnet.kube.events import Recorder
from vmnet.model import names
from vmnet.model.configuration import Configuration
from vmnet.model.endpoint import Endpoint, MachineReference, PortState
from vmnet.runtime.aside import share
from vmnet.runtime.garbage import collect, short_breaks
from vmnet.runtime.queue import KeyedQueue, work
from vmnet.runtime.tasks import TaskScope
from vmnet_dns import message
from vmnet_dns.forward import Routes, Upstream
from vmnet_dns.server import upstream_routes

log = logging.getLogger(__name__)

SETTLE_SECONDS: Final = 2.0
"""So long after the last pod has joined a network it is looked at: others would wait for the look."""
LONGEST_SETTLING: Final = 20.0
"""So long after the first of them it is looked at though more may come."""
MOVED_SECONDS: Final = 1.0
"""After a frame has closed a machine's port it is asked whether the API agrees."""
TAKEN_SECONDS: Final = 20.0
"""A port for health checks that somebody else has is asked for again this often."""
_HEALTH_CHECKS: Final = "health checks"


class Agent:
    """Runs until cancelled. Everything it made stays in the kernel when it ends, for the next one to adopt."""

    def __init__(self, configuration: Configuration, kernel: Kernel, kube: Kube, stores: Stores) -> None:
        """``configuration`` names the node."""
        own, dns, domain = configuration.agent, configuration.dns, configuration.shared.cluster_domain
        if own.node_name is None:
            raise ValueError("an agent without a node")
        self._stores = stores
        self._node_name = own.node_name
        self._resync_seconds = float(own.resync_seconds)
        self._upstreams = upstream_routes(dns.upstreams)
        """Servers by domain. Where the root has none, the cluster's own DNS is asked."""
        self._network_queue = KeyedQueue()
        self._machine_queue = KeyedQueue()
        self._name_queue = KeyedQueue()
        self._node_queue = KeyedQueue()
        self._renamed: set[str] = set()
        """Networks all of whose names are to be looked at."""
        self._touched: dict[str, dict[str, Endpoint | None]] = {}
        """Network → the endpoints, by their pods' uids, whose names are to be looked at."""
        self._adopted = asyncio.Event()
        self._cluster = Cluster(
            stores,
            on_network=self._network_changed,
            on_machine=lambda machine: self._machine_queue.add(f"{machine.namespace}/{machine.name}"),
            on_endpoints=self._endpoints_changed,
        )
        self._policies = PolicyTables(kube, stores, self._cluster, self._node_name, self._network_queue.add)
        self._defaults = DefaultInterfaces(
            kernel,
            kube,
            stores,
            self._cluster,
            self._node_name,
            lambda: self._node_queue.add("node"),
            own.kubelet_cgroup,
        )
        self._services = ServiceTables(
            stores,
            self._cluster,
            on_network=self._network_changed,
            on_node=lambda: self._node_queue.add("node"),
            default_services=own.default_services,
            ranges=own.service_ranges,
        )
        sources: tuple[TableSource, ...] = (
            self._services,
            self._policies,
            self._defaults,
        )
        self._guests = GuestServices(kernel, domain)
        self._responders = Responders(
            kernel,
            upstreams=self._dns_routes,
            interface=self._interface_name,
            domain=domain,
            ttl=dns.ttl,
            log_queries=dns.log_queries,
        )
        self._announcer = Announcer(kernel, domain, on_moved=self._moved)
        datagrams = Datagrams(kernel, self._services.datagrams, self._services.ways)
        self._networks = Networks(
            kernel,
            self._cluster,
            self._node_name,
            (
                AddressService(self._guests),
                NameService(self._responders, self._names),
                datagrams,
            ),
            on_detached=lambda endpoint: self._cut_overs.forget(endpoint),
            sources=sources,
            on_attached=lambda network: self._network_queue.add_settled(network, SETTLE_SECONDS, LONGEST_SETTLING),
            localnets=dict(own.localnets),
            vxlan_port=own.udp_port_for_vxlan,
            on_observed=self._defaults.observed,
            default_services=self._services.default_addresses,
            on_node_tables=datagrams.follow_node,
        )
        self._credentials = Credentials(kube, self._node_name)
        holds = Holds(kernel)
        departures = Departures(kernel, self._cluster, self._networks, holds)
        self._peers = Peers(self._credentials, departures.answer, own.tcp_port_for_agents)
        self._arrivals = Arrivals(kernel, self._cluster, self._networks, self._peers, holds)
        self._cut_overs = CutOvers(kernel, kube, self._cluster, self._networks, self._announcer, self._arrivals)
        multus = Multus(Mode(own.multus), own.cni_configurations)
        self._attachments = Attachments(
            kube,
            self._cluster,
            self._networks,
            self._cut_overs,
            self._policies,
            self._adopted,
            multus,
            self._defaults,
            self.not_ready,
            lambda: bool(self._self_test.node_faults()),
        )
        self._health_checks = HealthChecks(lambda: not self._out_of_place())
        self._self_test = SelfTest(
            kernel,
            self._networks,
            Recorder(kube, names.FIELD_MANAGER_AGENT, host=self._node_name),
            self._network_queue.add,
            lambda: self._node_queue.add("node"),
            node=lambda: stores.nodes.get(self._node_name),
            domain=domain,
            period=float(own.self_test_seconds),
        )
        self._conflist = (
            Conflist(
                own.cni_configurations,
                own.cni_programs,
                shim(),
                remove=own.install_cni == "remove",
                networks=lambda: [network.name for network in self._networks.rendered()],
            )
            if installs(own.install_cni)
            else None
        )
        self._server = CniServer(own.cni_socket, self._attachments.handle)
        report = SelfReport(
            kernel,
            self._networks,
            self._self_test,
            stores,
            {
                "network": self._network_queue,
                "machine": self._machine_queue,
                "names": self._name_queue,
                "node": self._node_queue,
            },
            missing=self.missing,
            chained=None if self._conflist is None else self._conflist.described,
        )
        self._inspection = Inspection(
            dns.socket,
            {"status": report.answer, "dns": NameQueries(self._responders).answer},
        )

    def not_ready(self) -> str | None:
        """Why the node's datapath is not in place, a line for each reason; None when it is."""
        return "\n".join(self.missing()) or None

    def missing(self) -> tuple[str, ...]:
        """What is not in place."""
        problem = self._conflist.problem if self._conflist is not None else None
        return (*self._out_of_place(), *((problem,) if problem is not None else ()))

    def _out_of_place(self) -> tuple[str, ...]:
        """Of the datapath, which serves the pods that are there also where no new one is given to this agent."""
        found = []
        behind = sorted(store.resource.plural for store in self._stores.all() if not store.synced.is_set())
        if behind:
            found.append(f"not listed yet: {', '.join(behind)}")
        elif self._cluster.node(self._node_name) is None:
            found.append(f"node {self._node_name} has no InternalIP in the API")
        if not self._adopted.is_set():
            found.append("the node's networks are being taken over")
        return (*found, *(fault.says for fault in self._self_test.node_faults()))

    def networks(self) -> dict[str, list[str]]:
        """The networks of this node, each with what the last self-test found wrong with it."""
        return self._self_test.report()

    async def run(self) -> None:
        """Serve until cancelled."""
        share()
        try:
            with short_breaks():
                await self._serve()
        finally:
            await self._server.close()
            await self._inspection.close()
            await self._cut_overs.close()
            await self._arrivals.close()
            self._announcer.close()
            self._guests.close()
            await self._responders.close()
            await self._health_checks.close()

    async def _serve(self) -> None:
        async with TaskScope() as tasks:
            for store in self._stores.all():
                tasks.service(store.run(), f"watch {store.resource.plural}")
            # Calls wait inside until the state is read: a shim that connects now need not poll.
            await self._server.start()
            await self._inspection.start()
            await self._start()
            tasks.service(
                work(
                    self._network_queue,
                    self._reconcile_network,
                    kind="network",
                    observe=_observe,
                    expected=(NotReady, Gone),
                ),
                "networks",
            )
            tasks.service(
                work(
                    self._machine_queue,
                    self._reconcile_machine,
                    kind="machine",
                    observe=_observe,
                    expected=(NotReady, Gone, KubeError),
                ),
                "machines",
            )
            tasks.service(work(self._name_queue, self._reconcile_names, kind="names", observe=_observe), "names")
            tasks.service(
                work(self._node_queue, self._reconcile_node, kind="node", observe=_observe, expected=(NotReady, Gone)),
                "node",
            )
            tasks.service(self._policies.tell(), "events on policies")
            tasks.service(self._defaults.tell(), "events on opened ports")
            tasks.service(self._credentials.run(), "this agent's certificate")
            tasks.service(self._peers.serve(str(self._networks.this_node().address)), "other agents")
            tasks.service(self._self_test.run(), "self-test")
            tasks.service(self._defaults.follow_kubelet(), "the kubelet's control group")
            if self._conflist is not None:
                tasks.service(self._conflist.run(), "the node's CNI configuration")
            tasks.service(collect(), "garbage")
            await asyncio.Event().wait()

    async def _start(self) -> None:
        for store in self._stores.all():
            await store.synced.wait()
        while self._cluster.node(self._node_name) is None:
            log.info("waiting for node %s to have an InternalIP", self._node_name)
            await asyncio.sleep(0.5)
        await self._defaults.adopt()
        for endpoint in await self._networks.adopt():
            found = self._cluster.attachment_of(endpoint.network)
            if found is None or endpoint.machine is None:
                continue
            gate = await self._networks.gate(found.network, endpoint)
            if gate is not None:
                # A port that its guest opened while no agent ran needs no staging, but its place written down and told.
                waiting = gate.standby and not gate.open
                state = PortState.STANDBY if waiting else PortState.ACTIVE
                await self._cut_overs.stage(found.network, self._networks.mtu(found.network), endpoint, state)
                if gate.standby and gate.open:
                    self._cut_overs.catch_up(found.network, endpoint)
                self._machine_queue.add(f"{endpoint.machine.namespace}/{endpoint.machine.name}")
        await self._attachments.catch_up(Path(DELETED_DIRECTORY))
        self._adopted.set()
        log.info("node %s: %d networks taken over", self._node_name, len(self._networks.rendered()))

    def _moved(self, endpoint: Endpoint) -> None:
        """The frame that closed a port may be a late one, of a target that has failed: then the API knows better."""
        machine = endpoint.machine
        if machine is not None:
            self._machine_queue.add_after(f"{machine.namespace}/{machine.name}", MOVED_SECONDS)

    def _network_changed(self, network: str) -> None:
        self._renamed.add(network)
        self._follow_changes(network)

    def _endpoints_changed(self, network: str, endpoints: Mapping[str, Endpoint | None]) -> None:
        self._touched.setdefault(network, {}).update(endpoints)
        self._follow_changes(network)

    def _follow_changes(self, network: str) -> None:
        # Names do not wait for the datapath, nor for other networks.
        self._name_queue.add(network)
        self._network_queue.add(network)

    def _names(self, network: str) -> Names:
        return Names(self._cluster.members(network), self._services.named(network))

    def _interface_name(self, machine: MachineReference) -> str | None:
        found = self._cluster.machine(machine)
        return facts.interface_on_pod_network(found) if found is not None else None

    def _dns_routes(self) -> Routes:
        root = message.encode_name(".")
        routes = dict(self._upstreams)
        if not routes.get(root):
            routes[root] = tuple(Upstream(address) for address in self._services.name_servers())
        return routes

    async def _reconcile_names(self, network: str) -> float | None:
        self._responders.deny(self._cluster.subnets())
        touched = self._touched.pop(network, {})
        if network in self._renamed:
            self._renamed.discard(network)
            self._responders.follow(network, lambda: self._names(network))
        else:
            self._responders.touch(network, touched)
        return None

    async def _reconcile_network(self, name: str) -> float | None:
        await self._networks.render(name)
        # A namespace has got, or lost, its network: its Services are ours, or not.
        self._node_queue.add(_HEALTH_CHECKS)
        return self._resync_seconds

    async def _reconcile_node(self, key: str) -> float | None:
        if key == _HEALTH_CHECKS:
            free = await self._health_checks.follow(self._services.health_checks(self._node_name))
            return None if free else TAKEN_SECONDS
        self._node_queue.add(_HEALTH_CHECKS)
        await self._networks.prepare_node()
        return self._resync_seconds

    async def _reconcile_machine(self, key: str) -> float | None:
        namespace, _, name = key.partition("/")
        return await self._cut_overs.reconcile(MachineReference(namespace, name))


def _observe(kind: str, result: str, seconds: float) -> None:
    metrics.RECONCILES.labels(kind, result).observe(seconds)
