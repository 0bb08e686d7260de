import asyncio
import json
import logging
from typing import Any

import pytest

from vmnet.kube.api import CUDNS, NADS, NAMESPACES, PODS, UDNS, Forbidden, Unavailable
from vmnet.kube.fake import refuse
from vmnet.model import names
from vmnet.model.network import from_nad

PROTECTION = names.NETWORK_PROTECTION_FINALIZER


async def test_a_cluster_network_is_made_in_every_selected_namespace(world: Any) -> None:
    for name in ("red", "blue", "other"):
        world.namespace(name)
    owner = world.cudn("happy-tenant", "red", "blue", uid="u1")
    async with world.controller():
        await world.until(lambda: world.condition(CUDNS, "happy-tenant", "NetworkReady"))
    nad = world.nad("red", "happy-tenant")
    assert nad["metadata"]["finalizers"] == [PROTECTION]
    assert nad["metadata"]["labels"] == {"k8s.ovn.org/user-defined-network": ""}
    assert nad["metadata"]["ownerReferences"][0] == {
        "apiVersion": "k8s.ovn.org/v1",
        "kind": "ClusterUserDefinedNetwork",
        "name": "happy-tenant",
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    network = from_nad(nad)
    assert (network.name, network.id, network.persistent) == ("cluster_udn_happy-tenant", 1, True)
    assert json.loads(nad["spec"]["config"])["netAttachDefName"] == "red/happy-tenant"
    assert world.nad("blue", "happy-tenant") is not None
    assert world.nad("other", "happy-tenant") is None
    item = world.kube.peek(CUDNS, "happy-tenant")
    assert item["metadata"]["finalizers"] == [PROTECTION]
    assert item["metadata"]["annotations"][names.NETWORK_ID_ANNOTATION] == "1"
    created = world.condition(CUDNS, "happy-tenant", "NetworkCreated")
    assert (created["status"], created["reason"]) == ("True", "NetworkAttachmentDefinitionCreated")
    assert "[blue, red]" in created["message"]
    assert created["observedGeneration"] == item["metadata"]["generation"]
    ready = world.condition(CUDNS, "happy-tenant", "NetworkReady")
    assert (ready["status"], ready["reason"]) == ("True", "NetworkAttachmentDefinitionReady")
    assert world.condition(CUDNS, "happy-tenant", "NetworkAllocationSucceeded")["status"] == "True"


async def test_a_namespaced_network_says_what_the_users_document_shows(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    async with world.controller():
        ready = await world.until(lambda: world.condition(UDNS, "tenant", "NetworkReady", "red"))
    assert ready["message"] == "NetworkAttachmentDefinition has been created"
    assert from_nad(world.nad("red", "tenant")).name == "red_tenant"


async def test_settled_networks_are_not_written_again(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    async with world.controller() as controller:
        await world.until(lambda: world.condition(UDNS, "tenant", "NetworkReady", "red"))
        await world.settled(controller)
        before = len(world.kube.calls)
        controller.queues["udn"].add("red/tenant")
        await world.settled(controller)
        assert world.kube.calls[before:] == []


async def test_numbers_are_unique_across_kinds_and_foreign_attachments(world: Any) -> None:
    for name in ("a", "b", "c"):
        world.namespace(name)
    foreign = {"name": "other", "type": "someone-else"}
    world.kube.seed(
        NADS,
        {
            "metadata": {"name": "x", "namespace": "a", "annotations": {names.NETWORK_ID_ANNOTATION: "1"}},
            "spec": {"config": json.dumps(foreign)},
        },
    )
    world.udn("a", "tenant")
    world.cudn("shared", "b")
    world.cudn("second", "c")
    async with world.controller():
        for key in (("a", "tenant"), ("b", "shared"), ("c", "second")):
            await world.until(lambda key=key: world.nad(*key))
    numbers = {from_nad(world.nad(*key)).id for key in (("a", "tenant"), ("b", "shared"), ("c", "second"))}
    assert len(numbers) == 3
    assert 1 not in numbers


async def test_the_number_survives_a_crash_between_number_and_attachment(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    world.kube.fail = lambda verb, resource, name: (
        Unavailable("down") if verb == "create" and resource is NADS else None
    )
    async with world.controller():
        await world.until(
            lambda: (world.kube.peek(UDNS, "tenant", "red")["metadata"].get("annotations") or {}).get(
                names.NETWORK_ID_ANNOTATION
            )
        )
    number = world.kube.peek(UDNS, "tenant", "red")["metadata"]["annotations"][names.NETWORK_ID_ANNOTATION]
    world.kube.fail = None
    world.namespace("blue")
    world.udn("blue", "later")
    async with world.controller():
        await world.until(lambda: world.nad("red", "tenant") and world.nad("blue", "later"))
    assert str(from_nad(world.nad("red", "tenant")).id) == number
    assert str(from_nad(world.nad("blue", "later")).id) != number


async def test_two_networks_that_carry_one_number_are_told(world: Any) -> None:
    world.namespace("a")
    world.namespace("b")
    for namespace in ("a", "b"):
        item = world.udn(namespace, "tenant")
        item["metadata"]["annotations"] = {names.NETWORK_ID_ANNOTATION: "7"}
        world.kube.seed(UDNS, item)
    async with world.controller():
        refused = await world.until(
            lambda: next(
                (
                    found
                    for namespace in ("a", "b")
                    if (found := world.condition(UDNS, "tenant", "NetworkAllocationSucceeded", namespace))
                    and found["status"] == "False"
                ),
                None,
            )
        )
    assert (refused["reason"], "7 belongs to network" in refused["message"]) == ("InternalError", True)
    assert world.events("NetworkAllocationFailed")


async def test_an_attachment_deleted_by_hand_comes_back(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    async with world.controller():
        first = await world.until(lambda: world.nad("red", "tenant"))
        await world.kube.delete(NADS, "tenant", "red")
        second = await world.until(
            lambda: (
                (found := world.nad("red", "tenant")) and found["metadata"]["uid"] != first["metadata"]["uid"] and found
            )
        )
    assert from_nad(second) == from_nad(first)


async def test_an_attachment_that_goes_with_its_namespace_is_not_an_error(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    why = "403: unable to create new content in namespace red because it is being terminated"
    async with world.controller():
        await world.until(lambda: world.condition(UDNS, "tenant", "NetworkReady", "red"))
        world.kube.fail = refuse("create", resource=NADS, error=Forbidden(why))
        await world.kube.delete(NADS, "tenant", "red")
        await world.until(lambda: world.condition(UDNS, "tenant", "NetworkReady", "red")["message"] == why)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_changed_attachment_is_put_right(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    async with world.controller():
        wanted = (await world.until(lambda: world.nad("red", "tenant")))["spec"]
        await world.kube.patch(NADS, "tenant", {"spec": {"config": "{}"}}, "red")
        await world.until(lambda: world.nad("red", "tenant")["spec"] == wanted)


async def test_somebody_elses_attachment_is_an_error_until_it_is_gone(world: Any) -> None:
    world.namespace("red")
    world.kube.seed(NADS, {"metadata": {"name": "tenant", "namespace": "red"}, "spec": {"config": '{"type":"bridge"}'}})
    world.udn("red", "tenant")
    async with world.controller():
        found = await world.until(lambda: world.condition(UDNS, "tenant", "NetworkCreated", "red"))
        assert (found["status"], found["reason"]) == ("False", "SyncError")
        assert "does not belong to this network" in found["message"]
        assert world.nad("red", "tenant")["spec"]["config"] == '{"type":"bridge"}'
        await world.kube.delete(NADS, "tenant", "red")
        await world.until(lambda: world.condition(UDNS, "tenant", "NetworkReady", "red")["status"] == "True")


async def test_a_primary_network_needs_the_label(world: Any) -> None:
    world.namespace("red", labelled=False)
    world.namespace("blue")
    world.cudn("tenant", "red", "blue")
    async with world.controller():
        found = await world.until(lambda: world.condition(CUDNS, "tenant", "NetworkCreated"))
    assert (found["status"], found["reason"]) == ("False", "NetworkAttachmentDefinitionSyncError")
    assert "namespace red: " in found["message"]
    assert names.PRIMARY_NETWORK_LABEL in found["message"]
    assert "created in: blue" in found["message"]
    assert world.nad("red", "tenant") is None


async def test_a_second_primary_network_waits_for_the_first_to_go(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "first")
    async with world.controller():
        await world.until(lambda: world.nad("red", "first"))
        world.cudn("second", "red")
        found = await world.until(lambda: world.condition(CUDNS, "second", "NetworkReady"))
        assert found["status"] == "False"
        assert "has primary network red_first already" in found["message"]
        await world.kube.delete(UDNS, "first", "red")
        await world.until(lambda: world.nad("red", "second"))
        await world.until(lambda: world.condition(CUDNS, "second", "NetworkReady")["status"] == "True")
        assert world.nad("red", "first") is None


async def test_of_two_primary_networks_at_once_one_gets_the_namespace(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "a")
    world.udn("red", "b")
    world.cudn("c", "red")
    async with world.controller() as controller:
        await world.until(lambda: world.condition(CUDNS, "c", "NetworkReady"))
        await world.until(lambda: world.condition(UDNS, "a", "NetworkReady", "red"))
        await world.until(lambda: world.condition(UDNS, "b", "NetworkReady", "red"))
        await world.settled(controller)
    assert sum(world.nad("red", name) is not None for name in "abc") == 1


async def test_a_secondary_network_may_stand_beside_the_primary_one(world: Any) -> None:
    world.namespace("red", labelled=False)
    world.udn("red", "extra", role="Secondary")
    async with world.controller():
        await world.until(lambda: world.nad("red", "extra"))


async def test_a_deselected_namespace_keeps_the_network_while_pods_use_it(world: Any) -> None:
    world.namespace("red")
    world.namespace("blue")
    world.cudn("tenant", "red", "blue")
    pod = world.pod("red", "web-0")
    async with world.controller():
        await world.until(lambda: world.allocation("red", "web-0", "red/tenant"))
        await world.until(lambda: world.nad("blue", "tenant"))
        item = world.kube.peek(CUDNS, "tenant")
        item["spec"]["namespaceSelector"]["matchExpressions"][0]["values"] = ["blue"]
        world.kube.seed(CUDNS, item)
        await world.until(lambda: "red/web-0" in world.condition(CUDNS, "tenant", "NetworkCreated")["message"])
        assert world.nad("red", "tenant") is not None
        world.finish(pod)
        await world.until(lambda: world.nad("red", "tenant") is None)
        assert world.nad("blue", "tenant") is not None


async def test_a_namespace_that_gets_the_selected_label_gets_the_network(world: Any) -> None:
    world.namespace("red")
    item = world.cudn("tenant")
    item["spec"]["namespaceSelector"] = {"matchLabels": {"team": "x"}}
    world.kube.seed(CUDNS, item)
    async with world.controller():
        found = await world.until(lambda: world.condition(CUDNS, "tenant", "NetworkReady"))
        assert "no namespace is selected" in found["message"]
        world.namespace("red", team="x")
        await world.until(lambda: world.nad("red", "tenant"))


async def test_deletion_waits_and_names_the_pods(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    pod = world.pod("red", "web-0")
    async with world.controller():
        await world.until(lambda: world.allocation("red", "web-0", "red/tenant"))
        await world.kube.delete(UDNS, "tenant", "red")
        found = await world.until(
            lambda: (c := world.condition(UDNS, "tenant", "NetworkReady", "red")) and c["status"] == "False" and c
        )
        assert "red/web-0" in found["message"]
        assert world.nad("red", "tenant") is not None
        world.kube.vanish(PODS, pod["metadata"]["name"], "red")
        await world.until(lambda: world.kube.peek(UDNS, "tenant", "red") is None)
        await world.until(lambda: world.nad("red", "tenant") is None)


async def test_an_attachment_does_not_outlive_its_network(world: Any) -> None:
    world.namespace("red")
    world.udn("red", "tenant")
    async with world.controller():
        await world.until(lambda: world.nad("red", "tenant"))
    world.kube.vanish(UDNS, "tenant", "red")
    async with world.controller():
        # What the garbage collector does.
        await world.kube.delete(NADS, "tenant", "red")
        await world.until(lambda: world.nad("red", "tenant") is None)


async def test_what_cannot_be_done_is_said(world: Any) -> None:
    world.namespace("red")
    world.layer3("red", "tenant", "10.0.0.0/16/30")
    spec = {"topology": "Localnet", "localnet": {"role": "Secondary", "physicalNetworkName": "lan"}}
    world.kube.seed(UDNS, {"metadata": {"name": "lan", "namespace": "red"}, "spec": spec})
    world.namespace("blue")
    world.udn("blue", "small", subnets=["10.0.0.0/32"])
    async with world.controller():
        found = await world.until(lambda: world.condition(UDNS, "tenant", "NetworkCreated", "red"))
        assert found["message"].startswith("layer3: subnet 10.0.0.0/16: nodes cannot have /30 of it")
        found = await world.until(lambda: world.condition(UDNS, "lan", "NetworkCreated", "red"))
        assert "only a ClusterUserDefinedNetwork can be Localnet" in found["message"]
        found = await world.until(lambda: world.condition(UDNS, "small", "NetworkCreated", "blue"))
        assert found["message"].startswith("layer2: subnet 10.0.0.0/32")


async def test_a_terminating_namespace_gets_nothing(world: Any) -> None:
    item = world.namespace("red")
    item["status"]["phase"] = "Terminating"
    world.kube.seed(NAMESPACES, item)
    world.cudn("tenant", "red")
    async with world.controller() as controller:
        await world.until(lambda: world.condition(CUDNS, "tenant", "NetworkReady"))
        await world.settled(controller)
        await asyncio.sleep(0)
    assert world.nad("red", "tenant") is None


async def test_a_namespace_can_go_with_everything_in_it(world: Any) -> None:
    world.namespace("red")
    world.cudn("tenant", "red")
    world.pod("red", "web-0")
    async with world.controller():
        await world.until(lambda: world.allocation("red", "web-0", "red/tenant"))
        item = world.kube.peek(NAMESPACES, "red")
        item["metadata"]["deletionTimestamp"] = "2026-11-23T12:00:00Z"
        item["status"]["phase"] = "Terminating"
        world.kube.seed(NAMESPACES, item)
        await world.kube.delete(NADS, "tenant", "red")
        await world.until(lambda: "red/web-0" in world.condition(CUDNS, "tenant", "NetworkCreated")["message"])
        assert world.nad("red", "tenant") is not None
        world.kube.vanish(PODS, "web-0", "red")
        await world.until(lambda: world.nad("red", "tenant") is None)
