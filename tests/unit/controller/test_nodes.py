import json
from typing import Any

from vmnet import metrics
from vmnet.kube.api import NADS, NODES, PODS, UDNS, Conflict
from vmnet.model import names


async def test_every_node_has_a_number_of_its_own(world: Any) -> None:
    for name in ("n1", "n2", "n3"):
        world.node(name)
    async with world.controller():
        await world.until(lambda: world.number("n1") and world.number("n2") and world.number("n3"))
        world.node("n4")
        await world.until(lambda: world.number("n4"))
    assert sorted(world.number(f"n{number}") for number in (1, 2, 3, 4)) == [1, 2, 3, 4]


async def test_numbers_that_are_written_down_are_kept(world: Any) -> None:
    world.node("n1", 7)
    world.node("n2")
    async with world.controller() as controller:
        assert await world.until(lambda: world.number("n2")) == 8
        # A node that comes with a number, as one that was restored.
        world.node("n3", 20)
        world.node("n4")
        assert await world.until(lambda: world.number("n4"))
        await world.settled(controller)
    assert world.number("n1") == 7
    assert world.number("n3") == 20


async def test_of_two_nodes_with_one_number_the_older_keeps_it(world: Any) -> None:
    world.node("a-younger", 3, creationTimestamp="2026-11-23T10:00:00Z")
    world.node("b-older", 3, creationTimestamp="2026-11-23T09:00:00Z")
    async with world.controller():
        assert await world.until(lambda: world.number("a-younger") != 3 and world.number("a-younger")) == 4
    assert world.number("b-older") == 3


async def test_a_number_that_somebody_changes_or_removes_is_written_again(world: Any) -> None:
    world.node("n1")
    async with world.controller() as controller:
        await world.until(lambda: world.number("n1") == 1)
        for value in ("9", None, "none"):
            await world.kube.patch(NODES, "n1", {"metadata": {"annotations": {names.NODE_NUMBER_ANNOTATION: value}}})
            await world.settled(controller)
            assert world.kube.peek(NODES, "n1")["metadata"]["annotations"][names.NODE_NUMBER_ANNOTATION] == "1"


async def test_the_number_of_a_node_that_is_gone_is_given_late(world: Any) -> None:
    world.node("n1")
    async with world.controller() as controller:
        await world.until(lambda: world.number("n1"))
        world.kube.vanish(NODES, "n1")
        await world.settled(controller)
        world.node("n2")
        assert await world.until(lambda: world.number("n2")) == 2


async def test_a_write_that_met_another_is_tried_again(world: Any) -> None:
    world.node("n1")
    patch, refused = world.kube.patch, 0

    async def contested(resource: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal refused
        if resource is NODES and refused < 2:
            refused += 1
            assert arguments[1]["metadata"]["resourceVersion"]
            raise Conflict("somebody was faster")
        return await patch(resource, *arguments, **more)

    world.kube.patch = contested
    async with world.controller():
        assert await world.until(lambda: world.number("n1")) == 1
    assert refused == 2


KEY = "blue/blue-network"
NAME = "blue_blue-network"


def prepare(world: Any, *subnets: str, nodes: int = 2) -> None:
    world.namespace("blue")
    world.layer3("blue", "blue-network", *subnets)
    for number in range(1, nodes + 1):
        world.node(f"n{number}")


async def allocated(world: Any, pod: str) -> list[str]:
    entry = await world.until(lambda: world.allocation("blue", pod, KEY))
    return list(entry["ip_addresses"])


async def test_a_node_gets_its_part_with_the_first_pod(world: Any) -> None:
    prepare(world, "103.103.0.0/16", "fd20::/48")
    async with world.controller() as controller:
        await world.until(lambda: world.number("n1") and world.number("n2"))
        await world.settled(controller)
        assert (world.parts("n1"), world.parts("n2")) == ({}, {})
        world.pod("blue", "blue-0", node="n1")
        assert await allocated(world, "blue-0") == ["103.103.0.3/24", "fd20::3/64"]
        world.pod("blue", "blue-1", node="n2")
        assert await allocated(world, "blue-1") == ["103.103.1.3/24", "fd20:0:0:1::3/64"]
        world.pod("blue", "blue-2", node="n1")
        assert await allocated(world, "blue-2") == ["103.103.0.4/24", "fd20::4/64"]
    assert world.allocation("blue", "blue-1", KEY) == {
        "ip_addresses": ["103.103.1.3/24", "fd20:0:0:1::3/64"],
        "mac_address": "0a:58:67:67:01:03",
        "gateway_ips": ["103.103.1.1", "fd20:0:0:1::1"],
        "role": "primary",
    }
    assert world.parts("n1") == {NAME: ["103.103.0.0/24", "fd20::/64"]}


async def test_no_pod_has_an_address_before_the_part_is_written(world: Any) -> None:
    prepare(world, "103.103.0.0/16", nodes=1)
    patch, told = world.kube.patch, []

    async def seen(resource: Any, *arguments: Any, **more: Any) -> Any:
        if resource is PODS:
            told.append(world.parts("n1"))
        return await patch(resource, *arguments, **more)

    world.kube.patch = seen
    world.pod("blue", "blue-0")
    async with world.controller():
        await allocated(world, "blue-0")
    assert told == [{NAME: ["103.103.0.0/24"]}]


async def test_pods_wait_for_their_node_without_a_word(world: Any) -> None:
    prepare(world, "103.103.0.0/16", nodes=1)
    async with world.controller() as controller:
        await world.until(lambda: world.nad("blue", "blue-network"))
        world.pod("blue", "unbound", node="")
        world.pod("blue", "early", node="n7")
        await world.settled(controller)
        assert not world.events("ErrorAllocatingPod")
        world.node("n7")
        assert await allocated(world, "early") == ["103.103.0.3/24"]
        bound = world.kube.peek(PODS, "unbound", "blue")
        bound["spec"]["nodeName"] = "n1"
        world.kube.seed(PODS, bound)
        assert await allocated(world, "unbound") == ["103.103.1.3/24"]
    assert not world.events("ErrorAllocatingPod")


async def test_parts_and_addresses_are_taken_over(world: Any) -> None:
    prepare(world, "103.103.0.0/16")
    world.pod("blue", "blue-0", node="n2")
    async with world.controller():
        assert await allocated(world, "blue-0") == ["103.103.0.3/24"]
    world.pod("blue", "blue-1", node="n1")
    world.pod("blue", "blue-2", node="n2")
    async with world.controller():
        assert await allocated(world, "blue-1") == ["103.103.1.3/24"]
        assert await allocated(world, "blue-2") == ["103.103.0.4/24"]


async def test_a_spoiled_annotation_is_made_good_from_the_pods(world: Any) -> None:
    prepare(world, "103.103.0.0/16")
    world.pod("blue", "blue-0", node="n2")
    world.pod("blue", "blue-1", node="n1")
    async with world.controller():
        await allocated(world, "blue-0")
        await allocated(world, "blue-1")
    before = world.parts("n1"), world.parts("n2")
    for node, value in (("n1", "{"), ("n2", None)):
        await world.kube.patch(NODES, node, {"metadata": {"annotations": {names.NODE_SUBNETS_ANNOTATION: value}}})
    async with world.controller():
        for node, held in zip(("n1", "n2"), before, strict=True):
            await world.until(lambda node=node, held=held: world_parts(world, node) == held)


def world_parts(world: Any, node: str) -> Any:
    try:
        return world.parts(node)
    except json.JSONDecodeError:
        return None


async def test_a_part_that_is_used_up_and_a_network_without_further_parts_say_so(world: Any) -> None:
    prepare(world, "10.0.0.0/28/29", nodes=3)
    for number in range(5):
        world.pod("blue", f"a{number}", node="n1")
    world.pod("blue", "b", node="n2")
    async with world.controller():
        await world.told("ErrorAllocatingPod", "on node n1: subnet 10.0.0.")
        await allocated(world, "b")
        world.pod("blue", "c", node="n3")
        await world.told("ErrorAllocatingPod", "on node n3: no part of 10.0.0.0/28 is left for node n3")
        # Both are put right by what comes free or comes new.
        given = [number for number in range(5) if world.allocation("blue", f"a{number}", KEY)]
        assert len(given) == 4, "network, broadcast, gateway and management address are not for pods"
        world.kube.vanish(PODS, f"a{given[0]}", "blue")
        (late,) = set(range(5)) - set(given)
        await allocated(world, f"a{late}")
        world.layer3("blue", "blue-network", "10.0.0.0/28/29", "10.9.0.0/16")
        assert await allocated(world, "c") == ["10.9.0.3/24"]
    assert world.parts("n3") == {NAME: ["10.9.0.0/24"]}


async def test_the_part_of_a_node_that_is_gone_is_given_again(world: Any) -> None:
    prepare(world, "10.0.0.0/24/24")
    world.pod("blue", "a", node="n1")
    async with world.controller():
        await allocated(world, "a")
        world.pod("blue", "b", node="n2")
        await world.told("ErrorAllocatingPod", "no part of 10.0.0.0/24 is left")
        world.kube.vanish(NODES, "n1")
        world.kube.vanish(PODS, "a", "blue")
        assert await world.until(lambda: world.allocation("blue", "b", KEY))
    assert world.parts("n2") == {NAME: ["10.0.0.0/24"]}


async def test_a_network_that_is_gone_leaves_no_part(world: Any) -> None:
    prepare(world, "103.103.0.0/16")
    world.namespace("green")
    world.layer3("green", "green-network", "203.203.0.0/16")
    world.pod("blue", "blue-0", node="n1")
    world.pod("green", "green-0", node="n1")
    async with world.controller():
        await world.until(lambda: len(world.parts("n1")) == 2)
        await world.until(lambda: world.allocation("blue", "blue-0", KEY))
        await world.kube.delete(UDNS, "blue-network", "blue")
        world.kube.vanish(PODS, "blue-0", "blue")
        await world.until(lambda: world.kube.peek(UDNS, "blue-network", "blue") is None)
        await world.until(lambda: world.parts("n1") == {"green_green-network": ["203.203.0.0/24"]})
        # Made anew it begins anew.
        world.layer3("blue", "blue-network", "103.103.0.0/16/26")
        world.pod("blue", "blue-1", node="n2")
        assert await allocated(world, "blue-1") == ["103.103.0.3/26"]


async def test_the_part_of_a_network_that_went_while_nobody_looked_is_taken_away_and_counted(world: Any) -> None:
    prepare(world, "103.103.0.0/16")
    world.pod("blue", "blue-0", node="n1")
    async with world.controller():
        await allocated(world, "blue-0")
    world.kube.vanish(PODS, "blue-0", "blue")
    world.kube.vanish(UDNS, "blue-network", "blue")
    world.kube.vanish(NADS, "blue-network", "blue")
    counted = metrics.LEFT_OVERS.labels("annotation")
    before = counted._value.get()
    async with world.controller():
        await world.until(lambda: counted._value.get() == before + 1)
    assert world.parts("n1") == {}


async def test_a_static_request_must_lie_in_the_part_of_the_pods_node(world: Any) -> None:
    prepare(world, "103.103.0.0/16", nodes=1)

    def asking(address: str) -> dict[str, str]:
        element = {"name": "default", "namespace": "blue", "ips": [address]}
        return {names.DEFAULT_NETWORK_ANNOTATION: json.dumps([element])}

    world.pod("blue", "inside", annotations=asking("103.103.0.77/24"))
    world.pod("blue", "outside", annotations=asking("103.103.9.9/24"))
    async with world.controller():
        assert await allocated(world, "inside") == ["103.103.0.77/24"]
        await world.told("ErrorAllocatingPod", "address 103.103.9.9 is not in subnet 103.103.0.0/24")
    assert world.allocation("blue", "outside", KEY) is None


async def test_a_machine_on_a_layer3_network_stays_where_it_is(world: Any) -> None:
    prepare(world, "103.103.0.0/16")
    vmi = world.vmi(world.vm("blue", "blue"), node="n1")
    source = world.launcher(vmi, "source", node="n1")
    async with world.controller():
        assert await allocated(world, "source") == ["103.103.0.3/24"]
        world.launcher(vmi, "target", node="n2")
        await world.told("ErrorAllocatingPod", "the machine runs in pod blue/source: on a Layer3")
        assert world.allocation("blue", "target", KEY) is None
        assert world.parts("n2") == {}
        # It starts anew there once it has ended here.
        world.finish(source)
        assert await allocated(world, "target") == ["103.103.1.3/24"]


async def test_a_new_node_takes_pods_when_its_agent_is_ready(world: Any) -> None:
    others = {"key": "node.kubernetes.io/disk-pressure", "effect": "NoSchedule"}
    for name in ("n1", "n2"):
        world.node(name)
        taints = [{"key": names.NODE_TAINT, "effect": "NoSchedule"}, others]
        await world.kube.patch(NODES, name, {"spec": {"taints": taints}})

    def agent(name: str, namespace: str, account: str, ready: str, node: str = "n1") -> Any:
        conditions = [{"type": "Ready", "status": ready}]
        return {
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"nodeName": node, "serviceAccountName": account},
            "status": {"phase": "Running", "conditions": conditions},
        }

    def taints(node: str) -> list[str]:
        return [taint["key"] for taint in world.kube.peek(NODES, node)["spec"]["taints"]]

    both = [names.NODE_TAINT, others["key"]]
    world.kube.seed(PODS, agent("somebody-elses", "red", names.AGENT_ACCOUNT, "True"))
    world.kube.seed(PODS, agent("no-agent", names.SYSTEM_NAMESPACE, "vmnet-controller", "True"))
    world.kube.seed(PODS, agent("agent", names.SYSTEM_NAMESPACE, names.AGENT_ACCOUNT, "False"))
    async with world.controller() as controller:
        await world.until(lambda: world.number("n1") and world.number("n2"))
        await world.settled(controller)
        assert taints("n1") == taints("n2") == both
        status = agent("agent", names.SYSTEM_NAMESPACE, names.AGENT_ACCOUNT, "True")["status"]
        await world.kube.patch(PODS, "agent", {"status": status}, names.SYSTEM_NAMESPACE, subresource="status")
        await world.until(lambda: taints("n1") == [others["key"]])
        await world.settled(controller)
        assert taints("n2") == both
        # A node whose agent was ready before the node was tainted.
        await world.kube.patch(NODES, "n1", {"spec": {"taints": [{"key": names.NODE_TAINT, "effect": "NoExecute"}]}})
        await world.until(lambda: taints("n1") == [])
