"""Which Services are whose, and who is told, with stores that the test writes."""

from typing import Any, cast

import pytest

from vmnet.agent.cluster import Cluster, Stores
from vmnet.agent.health_checks import HealthCheck
from vmnet.agent.service_tables import ServiceTables
from vmnet.kube.api import (
    ENDPOINT_SLICES,
    NADS,
    NAMESPACES,
    NODES,
    PODS,
    POLICIES,
    SERVICE_CIDRS,
    SERVICES,
    VMIS,
)
from vmnet.kube.fake import FakeInformer
from vmnet.model import addresses, names
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role

KINDS = (PODS, NODES, NAMESPACES, NADS, VMIS, SERVICES, ENDPOINT_SLICES, POLICIES, SERVICE_CIDRS)


class World:
    """Two namespaces, each with a primary network."""

    def __init__(self) -> None:
        self.stores = {kind: FakeInformer(kind) for kind in KINDS}
        stores = Stores(*(cast(Any, self.stores[kind]) for kind in KINDS))
        self.cluster = Cluster(stores, on_network=lambda name: None, on_machine=lambda machine: None)
        for number, namespace in enumerate(("red", "blue"), 1):
            network = Network(
                f"{namespace}_net", NetworkId(number), role=Role.PRIMARY, subnets=(addresses.network("10.0.0.0/16"),)
            )
            annotations = {names.NETWORK_ID_ANNOTATION: str(number)}
            nad = {"namespace": namespace, "name": "net", "annotations": annotations}
            self.stores[NADS].put({"metadata": nad, "spec": {"config": network.to_nad_config(f"{namespace}/net")}})
        self.asked: list[str] = []
        self.tables = ServiceTables(
            stores, self.cluster, on_network=self.asked.append, on_node=lambda: self.asked.append("node")
        )

    def service(self, namespace: str, name: str, address: str, **spec: Any) -> None:
        ports = [{"port": 80, "nodePort": spec.pop("node_port", None)}]
        self.stores[SERVICES].put(
            {"metadata": {"namespace": namespace, "name": name}, "spec": {"clusterIP": address, "ports": ports, **spec}}
        )

    def mirror(self, namespace: str, service: str, *found: str, manager: str = names.MIRROR_CONTROLLER) -> None:
        labels = {"endpointslice.kubernetes.io/managed-by": manager, names.MIRRORED_SERVICE_LABEL: service}
        self.stores[ENDPOINT_SLICES].put(
            {
                "metadata": {"namespace": namespace, "name": f"{service}-x", "labels": labels},
                "addressType": "IPv4",
                "ports": [{"port": 8080}],
                "endpoints": [{"addresses": [text]} for text in found],
            }
        )

    def backends(self, network: str) -> dict[str, list[str]]:
        return {
            item.name: [str(backend.address) for port in item.ports for backend in port.backends]
            for item in self.tables.services(network)
        }


@pytest.fixture
def world() -> World:
    return World()


async def test_a_network_has_the_services_of_its_namespaces_with_mirrored_endpoints(world: World) -> None:
    world.service("red", "web", "10.96.0.7")
    world.service("default", "other", "10.96.0.9")
    world.mirror("red", "web", "10.0.0.5")
    assert world.backends("red_net") == {"web": ["10.0.0.5"]}
    assert world.backends("blue_net") == {}
    world.stores[ENDPOINT_SLICES].drop("red/web-x")
    assert world.backends("red_net") == {"web": []}


async def test_slices_of_the_default_network_do_not_count(world: World) -> None:
    world.service("red", "web", "10.96.0.7")
    world.mirror("red", "web", "10.244.1.5", manager="endpointslice-controller.k8s.io")
    assert world.backends("red_net") == {"web": []}


async def test_all_cluster_addresses_but_the_default_services_are_refused(world: World) -> None:
    world.service("red", "web", "10.96.0.7")
    world.service("default", "kubernetes", "10.96.0.1")
    world.service("default", "headless", "None")
    assert world.tables.refused() == {addresses.address("10.96.0.7")}
    world.stores[SERVICES].drop("red/web")
    assert world.tables.refused() == frozenset()


async def test_a_change_of_endpoints_concerns_one_network_and_a_new_address_all(world: World) -> None:
    world.service("red", "web", "10.96.0.7")
    assert {"red_net", "blue_net", "node"} <= set(world.asked)
    world.asked.clear()
    world.mirror("red", "web", "10.0.0.5")
    assert set(world.asked) == {"red_net", "node"}
    world.asked.clear()
    world.mirror("red", "web", "10.0.0.5")
    assert world.asked == []


async def test_a_node_port_needs_its_network_everywhere_unless_the_policy_is_local(world: World) -> None:
    world.service("red", "web", "10.96.0.7")
    assert not world.tables.demands("red_net")
    world.service("red", "web", "10.96.0.7", node_port=30080)
    assert world.tables.demands("red_net")
    assert not world.tables.demands("blue_net")
    world.service("red", "web", "10.96.0.7", node_port=30080, externalTrafficPolicy="Local")
    assert not world.tables.demands("red_net")


async def test_a_node_tells_how_many_ready_endpoints_it_has_of_networks_services(world: World) -> None:
    local = {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}
    world.service("red", "web", "10.96.0.7", healthCheckNodePort=31000, **local)
    world.service("blue", "empty", "10.96.0.8", healthCheckNodePort=31001, **local)
    world.service("default", "other", "10.96.0.9", healthCheckNodePort=31002, **local)
    world.service("red", "everywhere", "10.96.0.10", healthCheckNodePort=31003)
    world.mirror("red", "web", "10.0.0.5", "10.0.0.6")
    (item,) = world.stores[ENDPOINT_SLICES].items()
    here = [{**endpoint, "nodeName": "n1"} for endpoint in item["endpoints"]]
    world.stores[ENDPOINT_SLICES].put({**item, "endpoints": here})
    empty = HealthCheck("blue", "empty", 0)
    assert world.tables.health_checks("n1") == {31000: HealthCheck("red", "web", 2), 31001: empty}
    assert world.tables.health_checks("n2") == {31000: HealthCheck("red", "web", 0), 31001: empty}


async def test_a_service_that_cannot_be_read_is_not_served_but_still_refused_to_others(world: World) -> None:
    world.service("red", "web", "10.96.0.7", externalIPs=["x"])
    assert world.backends("red_net") == {}
    assert world.tables.refused() == {addresses.address("10.96.0.7")}


async def test_a_range_of_cluster_addresses_concerns_every_network(world: World) -> None:
    def tell(*cidrs: str) -> None:
        world.stores[SERVICE_CIDRS].put({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": list(cidrs)}})

    tell("10.96.0.0/16", "no range")
    assert world.tables.ranges() == {addresses.network("10.96.0.0/16")}
    assert set(world.asked) == {"red_net", "blue_net", "node"}
    world.asked.clear()
    tell("10.96.0.0/16")
    assert world.asked == []
    world.stores[SERVICE_CIDRS].drop("kubernetes")
    assert world.tables.ranges() == frozenset()
    assert set(world.asked) == {"red_net", "blue_net", "node"}


async def test_a_tenant_does_not_take_the_cluster_s_own_addresses_for_external_ones(world: World) -> None:
    asked = ["10.96.0.1", "10.96.7.7", "172.30.0.250"]
    world.service("red", "web", "10.96.0.7", externalIPs=asked)
    external = {str(address) for item in world.tables.services("red_net") for address in item.external}
    assert external == set(asked)
    world.service("default", "kubernetes", "10.96.0.1")
    world.stores[SERVICE_CIDRS].put({"metadata": {"name": "more"}, "spec": {"cidrs": ["10.96.7.0/24"]}})
    (found,) = world.tables.services("red_net")
    assert found.external == (addresses.address("172.30.0.250"),)
