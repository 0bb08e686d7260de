"""What the stores say of Services, as the tables of the networks on this node and of the node itself."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Final

from vmnet.agent import facts
from vmnet.agent.cluster import Cluster, Stores
from vmnet.agent.health_checks import HealthCheck
from vmnet.kube.api import Object, object_key
from vmnet.model import addresses, names, service
from vmnet.model.addresses import IPAddress, IPNetwork
from vmnet.model.configuration import DEFAULT_SERVICES
from vmnet.model.endpoint import Join, NodeNetwork
from vmnet.model.service import Service
from vmnet.plan import services as plan
from vmnet.plan.services import Place
from vmnet.plan.table import Table

log = logging.getLogger(__name__)

CLUSTER_DNS: Final = "kube-system/kube-dns"


class ServiceTables:
    """A ``TableSource``. Knows every Service and the EndpointSlices with networks' addresses."""

    def __init__(
        self,
        stores: Stores,
        cluster: Cluster,
        *,
        on_network: Callable[[str], None],
        on_node: Callable[[], None],
        default_services: Collection[str] = DEFAULT_SERVICES,
        ranges: Collection[IPNetwork] = (),
    ) -> None:
        self._stores = stores
        self._cluster = cluster
        self._on_network = on_network
        self._on_node = on_node
        self._default_services = frozenset(default_services)
        self._services: dict[str, Service] = {}
        self._by_namespace: dict[str, set[str]] = {}
        self._slices: dict[str, dict[str, Object]] = {}
        """Service key → its mirrored slices by key."""
        self._taken: dict[str, tuple[IPAddress, ...]] = {}
        """Service key → cluster addresses."""
        self._datagrams: dict[str, Mapping[Place, frozenset[Place]]] = {}
        self._ways: tuple[Mapping[Place, Place], Mapping[tuple[int, int], Place]] = ({}, {})
        self._ranges = frozenset(ranges)
        stores.endpoint_slices.add_handler(self._slice_changed)
        stores.services.add_handler(self._service_changed)
        if stores.service_cidrs is not None:
            stores.service_cidrs.add_handler(self._range_changed)

    def services(self, network: str) -> tuple[Service, ...]:
        """Services of the namespaces whose primary network it is.

        Without external addresses that the cluster gives itself: a tenant who names one would get everybody's traffic.
        """
        keys = (key for namespace in self._cluster.namespaces(network) for key in self._by_namespace.get(namespace, ()))
        found = tuple(self._services[key] for key in sorted(keys))
        if not any(item.external for item in found):
            return found
        ranges, taken = self.ranges(), {address for held in self._taken.values() for address in held}

        def reserved(address: IPAddress) -> bool:
            return address in taken or any(address in subnet for subnet in ranges)

        return tuple(
            replace(item, external=tuple(address for address in item.external if not reserved(address)))
            if any(map(reserved, item.external))
            else item
            for item in found
        )

    def default_addresses(self) -> frozenset[IPAddress]:
        """Cluster addresses of the default Services, which every network may ask."""
        return frozenset(
            address for key, found in self._taken.items() if key in self._default_services for address in found
        )

    def refused(self) -> frozenset[IPAddress]:
        """Every cluster address but those of the default Services."""
        return frozenset(
            address for key, found in self._taken.items() if key not in self._default_services for address in found
        )

    def ranges(self) -> frozenset[IPNetwork]:
        """Where the cluster takes cluster addresses from, as far as it says."""
        told = self._stores.service_cidrs.items() if self._stores.service_cidrs is not None else ()
        return self._ranges | {item for found in told for item in _ranges_of(found)}

    def name_servers(self) -> tuple[IPAddress, ...]:
        """Addresses of the cluster's DNS, none where its Service is not one that networks may use."""
        return self._taken.get(CLUSTER_DNS, ()) if CLUSTER_DNS in self._default_services else ()

    def named(self, network: str) -> list[Service]:
        """The network's Services, and those of the cluster that it may use: what its DNS has names for."""
        allowed = [self._services[key] for key in sorted(self._default_services) if key in self._services]
        return [*self.services(network), *allowed]

    def network_tables(self, desired: NodeNetwork) -> tuple[Table, ...]:
        """See ``agent.networks.TableSource``."""
        services = self.services(desired.network.name)
        self._datagrams[desired.network.name] = plan.datagram_backends(desired, services)
        return plan.network_tables(
            desired,
            services,
            self.refused(),
            self.name_servers(),
            self.ranges(),
            self.default_addresses(),
        )

    def datagrams(self, network: str) -> Mapping[Place, frozenset[Place]]:
        """Who may answer datagrams, by what may be asked for, as the tables had it that the network was last given."""
        return self._datagrams.get(network, {})

    def ways(self) -> tuple[Mapping[Place, Place], Mapping[tuple[int, int], Place]]:
        """Where the node's tables lead datagrams, as they were last asked for: ``plan.services.node_datagrams``."""
        return self._ways

    def node_tables(self, rendered: Mapping[str, NodeNetwork]) -> tuple[Table, ...]:
        """See ``agent.networks.TableSource``."""
        exposed: dict[str, tuple[Join, tuple[Service, ...]]] = {}
        for name, desired in rendered.items():
            found = tuple(item for item in self.services(name) if item.exposed)
            if found:
                exposed[name] = (desired.join, found)
        self._ways = plan.node_datagrams(exposed)
        return plan.node_tables(exposed, {subnet for node in self._cluster.nodes() for subnet in node.pods})

    def health_checks(self, node: str) -> dict[int, HealthCheck]:
        """By port, what this node tells load balancers, of the Services of all networks."""
        found: dict[int, HealthCheck] = {}
        for namespace, keys in self._by_namespace.items():
            if self._cluster.primary(namespace) is None:
                continue
            for item in (self._services[key] for key in sorted(keys)):
                if item.health_port is not None:
                    check = HealthCheck(item.namespace, item.name, item.ready_on.count(node))
                    found.setdefault(item.health_port, check)
        return found

    def demands(self, network: str) -> bool:
        """A Service that every node takes traffic for needs its network on every node."""
        return any(item.exposed and not item.external_local for item in self.services(network))

    # Following

    def _service_changed(self, old: Object | None, new: Object | None) -> None:
        key = object_key(facts.subject(old, new))
        before = self._taken.pop(key, ())
        after = service.cluster_addresses(new) if new is not None else ()
        if after:
            self._taken[key] = after
        self._refresh(key)
        if before != after:
            # Everybody else refuses them.
            self._on_every_network()

    def _range_changed(self, old: Object | None, new: Object | None) -> None:
        if (old and _ranges_of(old)) != (new and _ranges_of(new)):
            self._on_every_network()
            self._on_node()

    def _on_every_network(self) -> None:
        for network in self._cluster.networks():
            self._on_network(network)

    def _slice_changed(self, old: Object | None, new: Object | None) -> None:
        item = facts.subject(old, new)
        if facts.labels(item).get("endpointslice.kubernetes.io/managed-by") != names.MIRROR_CONTROLLER:
            return
        key = f"{item['metadata']['namespace']}/{facts.labels(item).get(names.MIRRORED_SERVICE_LABEL, '')}"
        slices = self._slices.setdefault(key, {})
        if new is None:
            slices.pop(object_key(item), None)
        else:
            slices[object_key(item)] = new
        if not slices:
            del self._slices[key]
        self._refresh(key)

    def _refresh(self, key: str) -> None:
        """Read one Service again; its network is told when that makes a difference."""
        namespace = key.partition("/")[0]
        item = self._stores.services.get(key)
        before = self._services.pop(key, None)
        keys = self._by_namespace.setdefault(namespace, set())
        keys.discard(key)
        if item is not None:
            try:
                self._services[key] = service.parse(item, self._slices.get(key, {}).values())
                keys.add(key)
            except (ValueError, KeyError, TypeError) as error:
                log.warning("service %s is not served: %s", key, error)
        if not keys:
            del self._by_namespace[namespace]
        found = self._cluster.primary(namespace)
        if before != self._services.get(key) and found is not None:
            self._on_network(found.network.name)
            self._on_node()


def _ranges_of(item: Object) -> tuple[IPNetwork, ...]:
    """Of a ServiceCIDR object."""
    found = []
    for text in (item.get("spec") or {}).get("cidrs") or ():
        try:
            found.append(addresses.network(str(text)))
        except ValueError as error:
            log.warning("ServiceCIDR %s: %s", item["metadata"]["name"], error)
    return tuple(found)
