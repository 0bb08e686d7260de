import asyncio
from ipaddress import ip_network
from typing import Any

import pytest

from vmnet.kube.api import NADS, PODS, VMIS
from vmnet.model.endpoint import MachineReference
from vmnet.model.names import InterfaceName, NetworkId
from vmnet.model.network import Network, Role

PRIMARY = Network("red_tenant", NetworkId(1), role=Role.PRIMARY, subnets=(ip_network("10.20.0.0/16"),))
STORAGE = Network("red_storage", NetworkId(2), role=Role.SECONDARY, subnets=(ip_network("10.30.0.0/24"),))
BARE = Network("red_bare", NetworkId(3), role=Role.SECONDARY)


@pytest.fixture
def red(api: Any) -> Any:
    api.namespace("red")
    api.node("n1", "172.30.0.11")
    api.node("n2", "172.30.0.12")
    for network in (PRIMARY, STORAGE, BARE):
        api.nad(f"red/{network.name.partition('_')[2]}", network)
    api.networks.clear()
    return api


def both(api: Any, name: str = "a", **more: Any) -> None:
    api.pod(f"red/{name}", asks="storage", red__tenant="10.20.0.3/16", red__storage="10.30.0.1/24", **more)


def test_a_pod_has_an_endpoint_on_each_of_its_networks(red: Any) -> None:
    both(red)
    primary, secondary = red.cluster.endpoints_of("red/a")
    assert (primary.network, primary.interface) == ("red_tenant", "ovn-udn1")
    assert (secondary.network, secondary.interface) == ("red_storage", "net1")
    assert red.cluster.endpoint("red/a") == primary
    assert red.cluster.endpoint("red/a", "red/storage") == secondary
    assert red.cluster.endpoints("red_storage") == (secondary,)
    assert primary.port != secondary.port
    assert sorted(red.networks) == ["red_storage", "red_tenant"]


def test_only_what_is_asked_for_and_allocated_counts(red: Any) -> None:
    red.pod("red/a", asks="storage", red__tenant="10.20.0.3/16")
    red.pod("red/b", red__storage="10.30.0.1/24")
    assert red.cluster.endpoints("red_storage") == ()
    assert [found.pod.name for found in red.cluster.endpoints("red_tenant")] == ["a"]


def test_a_network_without_ipam_has_endpoints_without_addresses(red: Any) -> None:
    red.pod("red/a", asks="bare", red__bare="")
    (found,) = red.cluster.endpoints("red_bare")
    assert (found.addresses, found.mac) == ((), "0a:58:00:00:00:01")


def test_other_namespaces_networks_cannot_be_had_but_shared_ones(api: Any) -> None:
    api.node("n1", "172.30.0.11")
    api.nad("green/storage", STORAGE)
    api.pod("red/a", asks="green/storage,default/bare", green__storage="10.30.0.1/24", default__bare="")
    assert api.cluster.endpoints_of("red/a") == ()
    api.nad("default/bare", BARE)
    assert [found.network for found in api.cluster.endpoints_of("red/a")] == ["red_bare"]
    assert [found.interface for found in api.cluster.endpoints_of("red/a")] == ["net2"]


def test_an_endpoint_goes_with_its_pod(red: Any) -> None:
    both(red)
    red.networks.clear()
    both(red, phase="Succeeded")
    assert red.cluster.endpoints_of("red/a") == ()
    assert red.cluster.endpoints("red_storage") == ()
    assert sorted(red.networks) == ["red_storage", "red_tenant"]
    both(red, "b")
    red.stores[PODS].drop("red/b")
    assert red.cluster.endpoints("red_tenant") == ()


def test_a_change_on_one_network_concerns_that_one(red: Any) -> None:
    both(red)
    red.networks.clear()
    red.pod("red/a", asks="storage", red__tenant="10.20.0.3/16", red__storage="10.30.0.9/24")
    assert red.networks == ["red_storage"]


def test_a_nad_that_somebody_deletes_takes_nothing_from_living_pods(red: Any) -> None:
    both(red)
    red.networks.clear()
    red.stores[NADS].drop("red/storage")
    assert [found.pod.name for found in red.cluster.endpoints("red_storage")] == ["a"]
    assert red.cluster.attachment_of("red_storage") is not None
    red.nad("red/storage", STORAGE)
    assert red.networks == [], "nothing has changed"
    red.stores[NADS].drop("red/storage")
    red.stores[PODS].drop("red/a")
    assert red.cluster.attachment_of("red_storage") is None, "the last pod ends it"


def test_a_nad_that_nobody_uses_is_gone_at_once(red: Any) -> None:
    red.stores[NADS].drop("red/storage")
    assert red.cluster.attachment_of("red_storage") is None
    assert red.networks == ["red_storage"]


def test_a_nad_that_cannot_be_read_counts_as_gone(red: Any) -> None:
    broken = {
        "metadata": {"namespace": "red", "name": "bare", "annotations": {}},
        "spec": {"config": '{"type": "vmnet"}'},
    }
    red.stores[NADS].put(broken)
    assert red.cluster.attachment("red/bare") is None
    assert red.cluster.known_attachment("red/bare")


def test_a_runtime_s_own_name_for_an_interface_stays_until_the_pod_goes(red: Any) -> None:
    both(red)
    found = red.cluster.name_interface(red.cluster.endpoint("red/a", "red/storage"), InterfaceName("store0"))
    assert found.interface == "store0"
    both(red, annotations={"another": "annotation"})
    assert red.cluster.endpoint("red/a", "red/storage") == found
    both(red, uid="its successor")
    assert red.cluster.endpoint("red/a", "red/storage").interface == "net1"


def test_of_a_migrating_machine_one_pod_is_live_on_every_network(red: Any) -> None:
    both(red, "source", machine="vm")
    both(red, "target", machine="vm", node="n2")
    red.stores[VMIS].put(
        {
            "metadata": {"namespace": "red", "name": "vm"},
            "status": {"nodeName": "n1", "migrationState": {"sourcePod": "source", "targetPod": "target"}},
        }
    )
    for network in ("red_tenant", "red_storage"):
        assert [found.pod.name for found in red.cluster.live_endpoints(network)] == ["source"]
        assert len(red.cluster.endpoints(network)) == 2
    assert red.machines[-1] == MachineReference("red", "vm")
    red.networks.clear()
    moved = {"nodeName": "n2", "migrationState": {"sourcePod": "source", "targetPod": "target", "completed": True}}
    red.stores[VMIS].put({"metadata": {"namespace": "red", "name": "vm"}, "status": moved})
    assert [found.pod.name for found in red.cluster.live_endpoints("red_storage")] == ["target"]
    assert {"red_storage", "red_tenant"} <= set(red.networks)


async def test_waiting_for_an_endpoint_ends_with_its_addresses(red: Any) -> None:
    red.pod("red/a", asks="storage")
    waiting = asyncio.create_task(red.cluster.wait_for_endpoint("red/a", "uid-a", "red/storage"))
    await asyncio.sleep(0)
    assert not waiting.done()
    both(red)
    async with asyncio.timeout(10):
        assert (await waiting).network == "red_storage"


async def test_waiting_for_a_pod_passes_over_its_predecessor_of_the_same_name(red: Any) -> None:
    both(red, uid="old")
    waiting = asyncio.create_task(red.cluster.wait_for_endpoint("red/a", "new"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    both(red, uid="new")
    async with asyncio.timeout(10):
        assert (await waiting).pod.uid == "new"


async def test_a_static_pod_is_known_by_its_mirror(red: Any) -> None:
    both(red, annotations={"kubernetes.io/config.mirror": "made up by kubelet"})
    async with asyncio.timeout(10):
        found = await red.cluster.wait_for_endpoint("red/a", "made up by kubelet")
    assert found.pod.uid == "uid-a"


async def test_waiting_for_a_namespace_ends_with_it_or_with_the_time(red: Any) -> None:
    await red.cluster.wait_for_namespace("green", 0.01)
    assert not red.cluster.namespace_known("green")
    waiting = asyncio.create_task(red.cluster.wait_for_namespace("green", 60))
    await asyncio.sleep(0)
    red.namespace("green")
    async with asyncio.timeout(10):
        await waiting
    assert red.cluster.network_expected("green")


def test_a_node_s_address_concerns_every_network(red: Any) -> None:
    red.node("n2", "172.30.0.99")
    assert sorted(red.networks) == ["red_bare", "red_storage", "red_tenant"]
    assert [str(node.address) for node in red.cluster.nodes()] == ["172.30.0.11", "172.30.0.99"]


async def test_a_survey_sees_who_came_and_went_while_it_looked(red: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmnet.agent.cluster.TURN", 1)
    for name, address in (("a", "10.20.0.3/16"), ("b", "10.20.0.4/16"), ("c", "10.20.0.5/16")):
        red.pod(f"red/{name}", red__tenant=address)
    looking = asyncio.create_task(red.cluster.survey("red_tenant"))
    await asyncio.sleep(0)  # it has looked at the first
    red.pod("red/a", red__tenant="10.20.0.9/16")
    red.pod("red/d", red__tenant="10.20.0.6/16")

    found = {seen.endpoint for seen in await looking}

    assert found == set(red.cluster.endpoints("red_tenant"))
    assert len(found) == 4


def test_a_node_s_endpoints_are_found_without_the_others(red: Any) -> None:
    red.pod("red/a", red__tenant="10.20.0.3/16")
    everybody = red.cluster.endpoints("red_tenant")
    assert red.cluster.endpoints_on(everybody[0].node, "red_tenant") == everybody
    assert red.cluster.endpoints_on("n9", "red_tenant") == ()
