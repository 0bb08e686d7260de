import json
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from vmnet import metrics
from vmnet.controller.pods import entry
from vmnet.ipam.network_pools import Allocation
from vmnet.kube.api import CUDNS, PODS, UDNS
from vmnet.model import names
from vmnet.model.names import MacAddress, NetworkId
from vmnet.model.network import Network, Role, Topology


def used(network: str) -> float:
    return metrics.ADDRESSES_USED.labels(network, "ipv4")._value.get()


async def test_a_single_stack_entry_has_the_singular_forms(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    world.pod("red", "web-0")
    async with world.controller():
        found = await world.until(lambda: world.allocation("red", "web-0", "red/tenant"))
    assert found == {
        "ip_addresses": ["10.20.0.3/24"],
        "ip_address": "10.20.0.3/24",
        "mac_address": "0a:58:0a:14:00:03",
        "gateway_ips": ["10.20.0.1"],
        "gateway_ip": "10.20.0.1",
        "role": "primary",
    }


async def test_other_entries_of_the_annotation_stay(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    default = {"role": "infrastructure-locked"}
    world.pod("red", "web-0", annotations={names.POD_NETWORKS_ANNOTATION: json.dumps({"default": default})})
    async with world.controller():
        await world.until(lambda: world.allocation("red", "web-0", "red/tenant"))
    assert world.allocation("red", "web-0", "default") == default


async def test_pods_outside_the_network_are_left_alone(world: Any) -> None:
    world.namespace("plain", labelled=False)
    world.namespace("red")
    world.udn("red", "tenant")
    world.pod("plain", "a")
    item = world.pod("red", "host")
    item["spec"]["hostNetwork"] = True
    world.kube.seed(PODS, item)
    world.finish(world.pod("red", "done"))
    async with world.controller() as controller:
        await world.until(lambda: world.condition(UDNS, "tenant", "NetworkReady", "red"))
        await world.settled(controller)
    for namespace, name in (("plain", "a"), ("red", "host"), ("red", "done")):
        assert names.POD_NETWORKS_ANNOTATION not in (
            world.kube.peek(PODS, name, namespace)["metadata"].get("annotations") or {}
        )
    assert not world.events("ErrorAllocatingPod")


async def test_a_pod_waits_for_its_network_with_an_event(world: Any) -> None:
    world.namespace("red")
    world.pod("red", "web-0")
    async with world.controller():
        event = await world.until(lambda: next(iter(world.events("ErrorAllocatingPod")), None))
        assert event["involvedObject"]["name"] == "web-0"
        assert "red" in event["message"]
        world.udn("red", "tenant")
        await world.until(lambda: world.allocation("red", "web-0", "red/tenant"))


async def test_an_exhausted_subnet_recovers_when_a_pod_goes(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant", subnets=["10.20.0.0/29"])
    for number in range(4):
        world.pod("red", f"web-{number}")
    async with world.controller() as controller:
        for number in range(4):
            await world.until(lambda number=number: world.allocation("red", f"web-{number}", "red/tenant"))
        world.pod("red", "late")
        await world.told("ErrorAllocatingPod", "subnet 10.20.0.0/29 has no free address")
        await world.settled(controller)
        assert used("red_tenant") == 4
        gone = world.allocation("red", "web-2", "red/tenant")["ip_addresses"]
        world.kube.vanish(PODS, "web-2", "red")
        late = await world.until(lambda: world.allocation("red", "late", "red/tenant"))
    assert late["ip_addresses"] == gone


async def test_a_finished_pod_gives_its_address_back(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "done", subnets=["10.20.0.0/29"])
    pod = world.pod("red", "job")
    async with world.controller() as controller:
        await world.until(lambda: world.allocation("red", "job", "red/done"))
        world.finish(pod, "Failed")
        await world.until(lambda: used("red_done") == 0)
        await world.settled(controller)
    assert metrics.ADDRESSES_CAPACITY.labels("red_done", "ipv4")._value.get() == 4


async def test_a_successor_of_the_same_name_is_another_pod(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    world.pod("red", "web-0")
    async with world.controller():
        first = await world.until(lambda: world.allocation("red", "web-0", "red/tenant"))
        world.kube.vanish(PODS, "web-0", "red")
        world.pod("red", "web-0")
        second = await world.until(lambda: world.allocation("red", "web-0", "red/tenant"))
        await world.until(lambda: used("red_tenant") == 1)
    assert first["ip_addresses"] != second["ip_addresses"]


async def test_a_restart_takes_over_what_is_written_on_pods(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    world.pod("red", "web-0")
    async with world.controller():
        first = await world.until(lambda: world.allocation("red", "web-0", "red/tenant"))
    world.pod("red", "a-new-one-that-sorts-first")
    async with world.controller() as controller:
        new = await world.until(lambda: world.allocation("red", "a-new-one-that-sorts-first", "red/tenant"))
        assert new["ip_addresses"] == ["10.20.0.4/24"]
        assert world.allocation("red", "web-0", "red/tenant") == first
        world.kube.vanish(PODS, "web-0", "red")
        await world.settled(controller)
        await world.until(lambda: used("red_tenant") == 1)


async def test_a_static_request_of_a_plain_pod(world: Any) -> None:
    world.namespace("red")
    world.cudn("tenant", "red")
    request = [
        {
            "name": "default",
            "namespace": "ovn-kubernetes",
            "ips": ["192.168.0.50/16", "fd00:10::50/64"],
            "mac": "02:03:04:05:06:07",
        }
    ]
    world.pod("red", "web-0", annotations={names.DEFAULT_NETWORK_ANNOTATION: json.dumps(request)})
    async with world.controller():
        found = await world.until(lambda: world.allocation("red", "web-0", "red/tenant"))
    assert found["ip_addresses"] == ["192.168.0.50/16", "fd00:10::50/64"]
    assert found["mac_address"] == "02:03:04:05:06:07"


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ('[{"name":"default","ips":["10.20.0.1/24"]}]', "10.20.0.1 of subnet 10.20.0.0/24 is kept"),
        ('[{"name":"default","ips":["10.99.0.5/24"]}]', "10.99.0.5 is not in subnet"),
        ('[{"name":"default","ips":["fd00::5/64"]}]', "has no IPv6 subnet"),
        ('[{"name":"default","mac":"nonsense"}]', "'nonsense' is not a MAC address"),
        ("[{", "is not JSON"),
        ("[]", "must be a list of one element"),
    ],
)
async def test_a_bad_request_is_an_event_that_says_why(world: Any, annotation: str, message: str) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    world.pod("red", "web-0", annotations={names.DEFAULT_NETWORK_ANNOTATION: annotation})
    async with world.controller():
        await world.told("ErrorAllocatingPod", message)


async def test_an_address_that_is_taken_is_given_when_it_comes_free(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    request = json.dumps([{"name": "default", "ips": ["10.20.0.3/24"]}])
    world.pod("red", "first")
    async with world.controller():
        await world.until(lambda: world.allocation("red", "first", "red/tenant"))
        world.pod("red", "second", annotations={names.DEFAULT_NETWORK_ANNOTATION: request})
        await world.told("ErrorAllocatingPod", "10.20.0.3 is in use by pod red/first")
        world.kube.vanish(PODS, "first", "red")
        await world.until(lambda: world.allocation("red", "second", "red/tenant"))


async def test_pods_of_one_network_in_two_namespaces_share_its_addresses(world: Any) -> None:
    for namespace in ("red", "blue"):
        world.namespace(namespace)
        for number in range(3):
            world.pod(namespace, f"web-{number}")
    world.cudn("tenant", "red", "blue")
    async with world.controller():
        found = [
            await world.until(lambda ns=ns, n=n: world.allocation(ns, f"web-{n}", f"{ns}/tenant"))
            for ns in ("red", "blue")
            for n in range(3)
        ]
        assert world.condition(CUDNS, "tenant", "NetworkReady")["status"] == "True"
    assert len({item["ip_addresses"][0] for item in found}) == 6
    assert len({item["mac_address"] for item in found}) == 6


def test_a_pod_reaches_a_secondary_layer3_network_by_routes() -> None:
    network = Network(
        "green",
        NetworkId(3),
        Topology.LAYER3,
        Role.SECONDARY,
        subnets=(ip_network("203.203.0.0/16"), ip_network("fd20::/48")),
        host_prefixes=(24, 64),
    )
    allocation = Allocation((ip_address("203.203.4.3"), ip_address("fd20:0:0:4::3")), (24, 64), MacAddress("0a:58:0"))
    assert entry(network, allocation)["routes"] == [
        {"dest": "203.203.0.0/16", "nextHop": "203.203.4.1"},
        {"dest": "fd20::/48", "nextHop": "fd20:0:0:4::1"},
    ]
    assert "routes" not in entry(replace(network, role=Role.PRIMARY), allocation)


# Secondary networks


def asks(*elements: Any) -> dict[str, Any]:
    """Metadata of a pod that asks for networks, in the JSON form; one text is the short form."""
    short = len(elements) == 1 and isinstance(elements[0], str)
    return {"annotations": {names.NETWORKS_ANNOTATION: elements[0] if short else json.dumps(elements)}}


async def test_a_pod_gets_what_it_asks_for_beside_its_primary_network(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    world.secondary("red", "storage")
    world.secondary("red", "backup", subnets=["10.40.0.0/24", "fd00:40::/64"])
    world.pod("red", "web-0", **asks("storage, red/backup@bk0"))
    async with world.controller():
        found = await world.until(lambda: world.allocation("red", "web-0", "red/backup"))
        assert world.allocation("red", "web-0", "red/tenant")["role"] == "primary"
    assert found == {
        "ip_addresses": ["10.40.0.1/24", "fd00:40::1/64"],
        "mac_address": "0a:58:0a:28:00:01",
        "role": "secondary",
    }
    assert world.allocation("red", "web-0", "red/storage") == {
        "ip_addresses": ["10.30.0.1/24"],
        "ip_address": "10.30.0.1/24",
        "mac_address": "0a:58:0a:1e:00:01",
        "role": "secondary",
    }


async def test_a_namespace_without_a_primary_network_can_have_secondary_ones(world: Any) -> None:
    world.namespace("plain", labelled=False)
    world.secondary("plain", "storage")
    world.pod("plain", "web-0", **asks("storage"))
    world.pod("plain", "other")
    async with world.controller() as controller:
        await world.until(lambda: world.allocation("plain", "web-0", "plain/storage"))
        await world.settled(controller)
    assert not world.kube.peek(PODS, "other", "plain")["metadata"].get("annotations")


async def test_a_network_without_ipam_gives_a_mac_only(world: Any) -> None:
    world.namespace("red", labelled=False)
    world.secondary("red", "bare", subnets=[], ipam={"mode": "Disabled"})
    world.pod("red", "web-0", **asks("bare"))
    world.pod("red", "web-1", **asks("bare"))
    async with world.controller():
        first = await world.until(lambda: world.allocation("red", "web-0", "red/bare"))
        second = await world.until(lambda: world.allocation("red", "web-1", "red/bare"))
    assert (first["ip_addresses"], first["role"]) == ([], "secondary")
    assert first["mac_address"].startswith("0a:58:")
    assert first["mac_address"] != second["mac_address"]
    world.pod("red", "web-2", **asks({"name": "bare", "mac": first["mac_address"]}))
    async with world.controller():
        # A restart knows who has which.
        event = await world.told("ErrorAllocatingPod", first["mac_address"])
    assert event["involvedObject"]["name"] == "web-2"
    assert world.allocation("red", "web-0", "red/bare") == first


async def test_a_static_request_on_a_secondary_network(world: Any) -> None:
    world.namespace("red", labelled=False)
    world.secondary("red", "storage")
    wanted = {"name": "storage", "ips": ["10.30.0.77/24"], "mac": "02:03:04:05:06:07"}
    world.pod("red", "web-0", **asks(wanted))
    async with world.controller():
        found = await world.until(lambda: world.allocation("red", "web-0", "red/storage"))
        assert (found["ip_addresses"], found["mac_address"]) == (["10.30.0.77/24"], "02:03:04:05:06:07")
        world.pod("red", "web-1", **asks({**wanted, "mac": None}))
        event = await world.told("ErrorAllocatingPod", "10.30.0.77 is in use by pod red/web-0")
        assert event["involvedObject"]["name"] == "web-1"
        world.kube.vanish(PODS, "web-0", "red")
        assert (await world.until(lambda: world.allocation("red", "web-1", "red/storage")))["ip_addresses"] == [
            "10.30.0.77/24"
        ]


async def test_one_network_that_cannot_be_had_does_not_keep_the_others_away(world: Any) -> None:
    world.namespace("red", labelled=False)
    world.namespace("green", labelled=False)
    world.secondary("red", "storage")
    world.secondary("green", "secret")
    world.pod("red", "web-0", **asks("storage,absent,green/secret"))
    async with world.controller():
        await world.until(lambda: world.allocation("red", "web-0", "red/storage"))
        await world.told("ErrorAllocatingPod", "red/absent does not exist")
        await world.told("ErrorAllocatingPod", "green/secret belongs to another namespace")
        world.secondary("red", "absent", subnets=["10.50.0.0/24"])
        await world.until(lambda: world.allocation("red", "web-0", "red/absent"))
    assert world.allocation("red", "web-0", "green/secret") is None


async def test_a_shared_namespace_s_network_is_for_everybody_and_knows_its_users(world: Any) -> None:
    world.namespace("default", labelled=False)
    world.namespace("red", labelled=False)
    world.secondary("default", "storage")
    pod = world.pod("red", "web-0", **asks("default/storage"))
    async with world.controller():
        await world.until(lambda: world.allocation("red", "web-0", "default/storage"))
        await world.kube.delete(UDNS, "storage", "default")
        found = await world.until(
            lambda: (
                (told := world.condition(UDNS, "storage", "NetworkCreated", "default"))
                and told["status"] == "False"
                and told
            )
        )
        assert "red/web-0" in found["message"]
        world.finish(pod)
        await world.until(lambda: world.kube.peek(UDNS, "storage", "default") is None)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("tenant", "network red_tenant is a primary network"),
        ("a,a", "red/a is named twice"),
        ('[{"name": "storage", "ips": ["10.30.0.5"', "not JSON"),
        ('[{"name": "storage", "ips": ["10.99.0.5/24"]}]', "10.99.0.5 is not in subnet 10.30.0.0/24"),
        ('[{"name": "storage", "ips": ["fd00::5"]}]', "has no IPv6 subnet"),
        ('[{"name": "storage", "mac": "0a:59:00:00:00:01"}]', "in use by the nodes' routers"),
    ],
)
async def test_what_a_pod_cannot_have_is_told(world: Any, annotation: str, message: str) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    world.secondary("red", "storage")
    world.pod("red", "web-0", **asks(annotation))
    async with world.controller():
        await world.told("ErrorAllocatingPod", message)
        await world.until(lambda: world.allocation("red", "web-0", "red/tenant"))
    assert world.allocation("red", "web-0", "red/storage") is None


async def test_pods_of_a_migrating_machine_share_what_no_claim_holds(world: Any) -> None:
    world.namespace("red", labelled=False)
    world.secondary("red", "bare", subnets=[], ipam={"mode": "Disabled"})
    labels = {names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE, names.CREATED_BY_LABEL: "vmi-1"}
    source = world.pod("red", "source", labels=labels, **asks("bare"))
    async with world.controller() as controller:
        first = await world.until(lambda: world.allocation("red", "source", "red/bare"))
        target = world.pod("red", "target", labels=labels, **asks("bare"))
        assert await world.until(lambda: world.allocation("red", "target", "red/bare")) == first
        world.finish(source)
        await world.settled(controller)
        world.pod("red", "thief", **asks({"name": "bare", "mac": first["mac_address"]}))
        await world.told("ErrorAllocatingPod", "in use by machine red/machine")
        world.finish(target)
        await world.until(lambda: world.allocation("red", "thief", "red/bare"))


async def test_a_finished_pod_gives_back_all_its_addresses(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "main")
    world.secondary("red", "side")
    pod = world.pod("red", "job", **asks("side"))
    async with world.controller():
        await world.until(lambda: world.allocation("red", "job", "red/side"))
        await world.until(lambda: (used("red_main"), used("red_side")) == (1, 1))
        world.finish(pod)
        await world.until(lambda: (used("red_main"), used("red_side")) == (0, 0))
