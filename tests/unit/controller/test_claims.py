import json
from typing import Any

import pytest

from vmnet import metrics
from vmnet.controller.claims import vm_label
from vmnet.kube.api import CLAIMS, PODS, VMIS, VMS, Object
from vmnet.kube.fake import refuse
from vmnet.model import names

KEY = "blue/happy-tenant"


@pytest.fixture
def tenant(world: Any) -> Any:
    world.namespace("blue")
    world.cudn("happy-tenant", "blue")
    return world


def ready(world: Any, name: str) -> Object | None:
    found = world.claim("blue", name)
    conditions = ((found or {}).get("status") or {}).get("conditions") or []
    return next((item for item in conditions if item["type"] == "IPsAllocated"), None)


def owner_pod(world: Any, name: str) -> str | None:
    found = world.claim("blue", name)
    return (((found or {}).get("status") or {}).get("ownerPod") or {}).get("name")


async def test_a_claim_is_made_and_filled_for_a_stopped_machine(tenant: Any) -> None:
    vm = tenant.vm("blue", "Blue")
    async with tenant.controller():
        await tenant.until(lambda: tenant.claim_ips("blue", "blue.happy"))
    claim = tenant.claim("blue", "blue.happy")
    assert claim["spec"] == {"network": "cluster_udn_happy-tenant", "interface": ""}
    assert claim["metadata"]["labels"] == {"kubevirt.io/vm": "Blue"}
    assert claim["metadata"]["finalizers"] == ["kubevirt.io/persistent-ipam"]
    owner = claim["metadata"]["ownerReferences"][0]
    assert (owner["kind"], owner["uid"]) == ("VirtualMachine", vm["metadata"]["uid"])
    assert claim["status"]["ips"] == ["192.168.0.3/16", "fd00:10::3/64"]
    condition = ready(tenant, "blue.happy")
    assert (condition["status"], condition["reason"]) == ("True", "SuccessfulAllocation")


async def test_source_and_target_of_a_migration_get_the_same_addresses(tenant: Any) -> None:
    vm = tenant.vm("blue", "blue")
    vmi = tenant.vmi(vm, node="n1")
    tenant.launcher(vmi, "source", node="n1", claim=True)
    async with tenant.controller() as controller:
        source = await tenant.until(lambda: tenant.allocation("blue", "source", KEY))
        await tenant.until(lambda: owner_pod(tenant, "blue.happy") == "source")
        tenant.launcher(vmi, "target", node="n2", **{names.MIGRATION_JOB_LABEL: "m1"})
        target = await tenant.until(lambda: tenant.allocation("blue", "target", KEY))
        await tenant.settled(controller)
        # The claim is the source's until the guest has moved.
        assert owner_pod(tenant, "blue.happy") == "source"
        vmi["status"]["nodeName"] = "n2"
        tenant.kube.seed(VMIS, vmi)
        await tenant.until(lambda: owner_pod(tenant, "blue.happy") == "target")
    assert source == target


async def test_addresses_outlive_stop_start_and_a_restart_of_the_controller(tenant: Any) -> None:
    vm = tenant.vm("blue", "blue")
    vmi = tenant.vmi(vm, node="n1")
    tenant.launcher(vmi, "first")
    async with tenant.controller() as controller:
        first = await tenant.until(lambda: tenant.allocation("blue", "first", KEY))
        tenant.kube.vanish(PODS, "first", "blue")
        tenant.kube.vanish(VMIS, "blue", "blue")
        await tenant.settled(controller)
    assert tenant.claim_ips("blue", "blue.happy") == first["ip_addresses"]
    tenant.pod("blue", "a-stranger-who-comes-first")
    async with tenant.controller():
        stranger = await tenant.until(lambda: tenant.allocation("blue", "a-stranger-who-comes-first", KEY))
        assert stranger["ip_addresses"] != first["ip_addresses"]
        again = tenant.vmi(vm, node="n2")
        tenant.launcher(again, "second", node="n2")
        assert await tenant.until(lambda: tenant.allocation("blue", "second", KEY)) == first
        await tenant.until(lambda: owner_pod(tenant, "blue.happy") == "second")


async def test_the_claim_goes_when_machine_and_instance_are_gone(tenant: Any) -> None:
    vm = tenant.vm("blue", "blue")
    vm["metadata"]["finalizers"] = ["kubevirt.io/virtualMachineControllerFinalize"]
    vm = tenant.kube.seed(VMS, vm)
    tenant.vmi(vm)
    async with tenant.controller() as controller:
        await tenant.until(lambda: tenant.claim_ips("blue", "blue.happy"))
        await tenant.kube.delete(VMS, "blue", "blue")
        await tenant.settled(controller)
        assert tenant.claim("blue", "blue.happy") is not None
        tenant.kube.vanish(VMIS, "blue", "blue")
        await tenant.until(lambda: tenant.claim("blue", "blue.happy") is None)
        await tenant.settled(controller)
        assert not list(controller.ledger.pools(next(controller.cluster.attachments()).network).owners())


async def test_an_instance_without_a_machine_owns_its_claim(tenant: Any) -> None:
    vm = tenant.vm("blue", "alone")
    vmi = tenant.vmi(vm)
    tenant.kube.vanish(VMS, "alone", "blue")
    del vmi["metadata"]["ownerReferences"]
    vmi = tenant.kube.seed(VMIS, vmi)
    async with tenant.controller():
        await tenant.until(lambda: tenant.claim_ips("blue", "alone.happy"))
        owner = tenant.claim("blue", "alone.happy")["metadata"]["ownerReferences"][0]
        assert (owner["kind"], owner["uid"]) == ("VirtualMachineInstance", vmi["metadata"]["uid"])
        tenant.kube.vanish(VMIS, "alone", "blue")
        await tenant.until(lambda: tenant.claim("blue", "alone.happy") is None)


async def test_a_requested_address_and_mac(tenant: Any) -> None:
    vm = tenant.vm("blue", "green", mac="02-03-04-05-06-07", addresses=["192.168.0.50", "fd00:10::50"])
    vmi = tenant.vmi(vm)
    tenant.launcher(vmi, "pod")
    async with tenant.controller():
        found = await tenant.until(lambda: tenant.allocation("blue", "pod", KEY))
    assert found["ip_addresses"] == ["192.168.0.50/16", "fd00:10::50/64"]
    assert found["mac_address"] == "02:03:04:05:06:07"
    tenant.kube.vanish(PODS, "pod", "blue")
    tenant.launcher(vmi, "next")
    async with tenant.controller():
        again = await tenant.until(lambda: tenant.allocation("blue", "next", KEY))
    assert again == found


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"addresses": ["192.168.0.3", "fd00:10::99"]}, "IPAddressConflict"),
        ({"mac": "0a:58:c0:a8:00:03"}, "MACAddressConflict"),
        ({"addresses": ["192.168.0.77"]}, "InternalError"),
        ({"addresses": ["192.168.0.1", "fd00:10::99"]}, "InternalError"),
    ],
)
async def test_why_a_claim_is_not_filled(tenant: Any, request_: Any, reason: str) -> None:
    tenant.vm("blue", "first")
    async with tenant.controller():
        await tenant.until(lambda: tenant.claim_ips("blue", "first.happy"))
        vmi = tenant.vmi(tenant.vm("blue", "second", **request_))
        tenant.launcher(vmi, "pod")
        condition = await tenant.until(lambda: ready(tenant, "second.happy"))
        assert (condition["status"], condition["reason"]) == ("False", reason)
        await tenant.told("ErrorAllocatingPod", condition["message"])
        if reason.endswith("Conflict"):
            tenant.kube.vanish(VMS, "first", "blue")
            await tenant.until(lambda: tenant.allocation("blue", "pod", KEY))


async def test_an_exhausted_subnet(world: Any) -> None:
    world.namespace("blue")
    world.cudn("happy-tenant", "blue", subnets=["10.20.0.0/29"])
    for number in range(4):
        world.vm("blue", f"vm-{number}")
    async with world.controller():
        for number in range(4):
            await world.until(lambda number=number: world.claim_ips("blue", f"vm-{number}.happy"))
        world.vm("blue", "late")
        condition = await world.until(lambda: ready(world, "late.happy"))
        assert condition["reason"] == "SubnetExhausted"
        world.kube.vanish(VMS, "vm-1", "blue")
        await world.until(lambda: world.claim_ips("blue", "late.happy"))
        assert ready(world, "late.happy")["status"] == "True"


async def test_somebody_elses_claim_is_an_error(tenant: Any) -> None:
    tenant.kube.seed(
        CLAIMS,
        {
            "metadata": {
                "name": "blue.happy",
                "namespace": "blue",
                "ownerReferences": [{"kind": "VirtualMachine", "name": "other", "uid": "x", "controller": True}],
            },
            "spec": {"network": "cluster_udn_happy-tenant", "interface": ""},
            "status": {"ips": ["192.168.0.9/16", "fd00:10::9/64"]},
        },
    )
    tenant.kube.seed(VMS, {"metadata": {"name": "other", "namespace": "blue", "uid": "x"}, "spec": {}})
    vmi = tenant.vmi(tenant.vm("blue", "blue"))
    tenant.launcher(vmi, "pod")
    async with tenant.controller() as controller:
        event = await tenant.until(lambda: next(iter(tenant.events("ErrorClaimingAddresses")), None))
        assert "belongs to VirtualMachine other" in event["message"]
        await tenant.told("ErrorAllocatingPod", "belongs to VirtualMachine other")
        await tenant.settled(controller)
        assert tenant.allocation("blue", "pod", KEY) is None


async def test_claims_that_ipam_extensions_made_are_used(tenant: Any) -> None:
    """As recorded in A-vm-start: made for the VMI, owned by the VM, without a status."""
    vm = tenant.vm("blue", "blue")
    vmi = tenant.vmi(vm)
    owner = {**vmi["metadata"]["ownerReferences"][0], "blockOwnerDeletion": True}
    metadata = {
        "name": "blue.happy",
        "namespace": "blue",
        "labels": {"kubevirt.io/vm": "blue"},
        "finalizers": ["kubevirt.io/persistent-ipam"],
        "ownerReferences": [owner],
    }
    spec = {"network": "cluster_udn_happy-tenant", "interface": ""}
    made = tenant.kube.seed(CLAIMS, {"metadata": metadata, "spec": spec})
    tenant.launcher(vmi, "pod", claim=True)
    async with tenant.controller():
        found = await tenant.until(lambda: tenant.allocation("blue", "pod", KEY))
    claim = tenant.claim("blue", "blue.happy")
    assert claim["metadata"]["uid"] == made["metadata"]["uid"]
    assert claim["status"]["ips"] == found["ip_addresses"]


async def test_a_claim_without_an_owner_is_filled_when_a_pod_asks(tenant: Any) -> None:
    spec = {"network": "cluster_udn_happy-tenant", "interface": ""}
    tenant.kube.seed(CLAIMS, {"metadata": {"name": "mine", "namespace": "blue"}, "spec": spec})
    request = [{"name": "default", "ips": ["192.168.9.9/16", "fd00:10::9/64"], "ipam-claim-reference": "mine"}]
    async with tenant.controller() as controller:
        await tenant.until(lambda: tenant.nad("blue", "happy-tenant"))
        await tenant.settled(controller)
        assert not tenant.claim_ips("blue", "mine")
        annotations = {
            names.DEFAULT_NETWORK_ANNOTATION: json.dumps(request),
            names.PRIMARY_CLAIM_ANNOTATION: "mine",
        }
        tenant.pod("blue", "pod", annotations=annotations)
        found = await tenant.until(lambda: tenant.allocation("blue", "pod", KEY))
    assert found["ip_addresses"] == tenant.claim_ips("blue", "mine") == ["192.168.9.9/16", "fd00:10::9/64"]


async def test_a_machine_that_came_before_its_network(world: Any) -> None:
    world.namespace("blue")
    vmi = world.vmi(world.vm("blue", "blue"))
    world.launcher(vmi, "pod")
    async with world.controller():
        await world.until(lambda: world.events("ErrorAllocatingPod"))
        world.cudn("happy-tenant", "blue")
        await world.until(lambda: world.allocation("blue", "pod", KEY))


async def test_a_pod_whose_claim_never_comes_says_so(tenant: Any) -> None:
    annotations = {names.PRIMARY_CLAIM_ANNOTATION: "missing"}
    tenant.pod("blue", "pod", annotations=annotations, creationTimestamp="2026-11-23T11:59:00Z")
    async with tenant.controller():
        await tenant.told("ErrorAllocatingPod", "waiting for the IPAMClaim")
        spec = {"network": "cluster_udn_happy-tenant", "interface": ""}
        tenant.kube.seed(CLAIMS, {"metadata": {"name": "missing", "namespace": "blue"}, "spec": spec})
        await tenant.until(lambda: tenant.allocation("blue", "pod", KEY))


async def test_no_claim_where_addresses_are_not_persistent(world: Any) -> None:
    world.namespace("blue")
    world.udn("blue", "tenant")
    vmi = world.vmi(world.vm("blue", "blue"))
    world.launcher(vmi, "pod")
    async with world.controller():
        await world.until(lambda: world.allocation("blue", "pod", "blue/tenant"))
    assert world.claim("blue", "blue.happy") is None


def test_a_long_name_does_not_break_the_label() -> None:
    name = "a" * 70
    assert vm_label("a" * 63) == "a" * 63
    assert len(vm_label(name)) == 63
    assert vm_label(name) != vm_label("a" * 71)


# Secondary networks

STORAGE = "blue/storage"


@pytest.fixture
def flat(world: Any) -> Any:
    """A namespace without a primary network, and a secondary one that keeps machines' addresses."""
    world.namespace("blue", labelled=False)
    world.secondary("blue", "storage", ipam={"lifecycle": "Persistent"})
    return world


def on_storage(world: Any, name: str, *, addresses: list[str] | None = None, mac: str | None = None) -> Any:
    vm = world.vm("blue", name, addresses=None)
    spec = vm["spec"]["template"]["spec"]
    spec["networks"] = [{"name": "store", "multus": {"networkName": "storage"}}]
    spec["domain"]["devices"]["interfaces"] = [{"name": "store", **({"macAddress": mac} if mac else {})}]
    if addresses:
        text = json.dumps({"store": addresses})
        vm["spec"]["template"]["metadata"]["annotations"] = {"network.kubevirt.io/addresses": text}
    return world.kube.seed(VMS, vm)


def asking(world: Any, vmi: Any, name: str, node: str = "n1", **element: Any) -> Any:
    """A launcher pod as KubeVirt makes it: the interface has a name of its own."""
    pod = world.launcher(vmi, name, node=node)
    text = json.dumps([{"name": "storage", "namespace": "blue", "interface": "podf00d", **element}])
    pod["metadata"]["annotations"][names.NETWORKS_ANNOTATION] = text
    return world.kube.seed(PODS, pod)


async def test_a_machine_s_claim_on_a_secondary_network(flat: Any) -> None:
    vm = on_storage(flat, "blue")
    async with flat.controller() as controller:
        ips = await flat.until(lambda: flat.claim_ips("blue", "blue.store"))
        assert ips == ["10.30.0.1/24"]
        assert flat.claim("blue", "blue.store")["spec"]["network"] == "blue_storage"
        vmi = flat.vmi(vm, node="n1")
        source = asking(flat, vmi, "source")
        first = await flat.until(lambda: flat.allocation("blue", "source", STORAGE))
        assert first["ip_addresses"] == ips
        await flat.until(lambda: owner_pod(flat, "blue.store") == "source")
        asking(flat, vmi, "target", node="n2")
        assert await flat.until(lambda: flat.allocation("blue", "target", STORAGE)) == first
        # Stopped, the machine keeps its address.
        flat.finish(source)
        flat.kube.vanish(PODS, "target", "blue")
        flat.kube.vanish(VMIS, "blue", "blue")
        await flat.settled(controller)
        flat.pod("blue", "web", annotations={names.NETWORKS_ANNOTATION: "storage"})
        other = await flat.until(lambda: flat.allocation("blue", "web", STORAGE))
        assert other["ip_addresses"] == ["10.30.0.2/24"]
        flat.kube.vanish(VMS, "blue", "blue")
        await flat.until(lambda: flat.claim("blue", "blue.store") is None)


async def test_what_a_machine_asks_for_on_a_secondary_network(flat: Any) -> None:
    vm = on_storage(flat, "blue", addresses=["10.30.0.50"], mac="02:03:04:05:06:07")
    async with flat.controller():
        assert await flat.until(lambda: flat.claim_ips("blue", "blue.store")) == ["10.30.0.50/24"]
        asking(flat, flat.vmi(vm), "source", mac="02:03:04:05:06:07")
        found = await flat.until(lambda: flat.allocation("blue", "source", STORAGE))
    assert (found["ip_addresses"], found["mac_address"]) == (["10.30.0.50/24"], "02:03:04:05:06:07")


async def test_a_claim_that_the_pod_s_request_names(flat: Any) -> None:
    """As ipam-extensions write it, for a claim that somebody made."""
    spec = {"network": "blue_storage", "interface": "podf00d"}
    flat.kube.seed(CLAIMS, {"metadata": {"name": "mine", "namespace": "blue"}, "spec": spec})
    request = json.dumps([{"name": "storage", "ipam-claim-reference": "mine", "ips": ["10.30.0.60/24"]}])
    async with flat.controller() as controller:
        await flat.settled(controller)
        pod = flat.pod("blue", "one", annotations={names.NETWORKS_ANNOTATION: request})
        found = await flat.until(lambda: flat.allocation("blue", "one", STORAGE))
        assert found["ip_addresses"] == flat.claim_ips("blue", "mine") == ["10.30.0.60/24"]
        flat.finish(pod)
        await flat.settled(controller)
        plain = json.dumps([{"name": "storage", "ips": ["10.30.0.60/24"]}])
        flat.pod("blue", "two", annotations={names.NETWORKS_ANNOTATION: plain})
        await flat.told("ErrorAllocatingPod", "10.30.0.60 is in use by claim blue/mine")
        flat.pod("blue", "three", annotations={names.NETWORKS_ANNOTATION: request})
        await flat.until(lambda: flat.allocation("blue", "three", STORAGE))


async def test_a_machine_with_both_kinds_has_a_claim_for_each(world: Any) -> None:
    world.namespace("blue")
    world.cudn("happy-tenant", "blue")
    world.secondary("blue", "storage", ipam={"lifecycle": "Persistent"})
    world.secondary("blue", "passing", subnets=["10.40.0.0/24"])
    vm = world.vm("blue", "blue")
    networks = vm["spec"]["template"]["spec"]["networks"]
    networks += [{"name": name, "multus": {"networkName": f"blue/{name}"}} for name in ("storage", "passing")]
    world.kube.seed(VMS, vm)
    async with world.controller() as controller:
        await world.until(lambda: world.claim_ips("blue", "blue.happy") and world.claim_ips("blue", "blue.storage"))
        await world.settled(controller)
        assert world.claim("blue", "blue.passing") is None, "that network keeps nothing"
    assert world.claim("blue", "blue.storage")["spec"]["network"] == "blue_storage"


async def test_a_pod_that_is_no_machine_s_cannot_have_a_machine_s_claim(tenant: Any) -> None:
    tenant.vm("blue", "victim")
    async with tenant.controller() as controller:
        ips = await tenant.until(lambda: tenant.claim_ips("blue", "victim.happy"))
        tenant.pod("blue", "thief", annotations={names.PRIMARY_CLAIM_ANNOTATION: "victim.happy"})
        await tenant.told("ErrorAllocatingPod", "belongs to VirtualMachine victim, not to this machine")
        await tenant.settled(controller)
    assert tenant.allocation("blue", "thief", KEY) is None
    assert tenant.claim_ips("blue", "victim.happy") == ips


async def test_a_successor_of_the_same_name_waits_for_a_claim_of_its_own(tenant: Any) -> None:
    former = tenant.vm("blue", "blue")
    async with tenant.controller() as controller:
        await tenant.until(lambda: tenant.claim_ips("blue", "blue.happy"))
        # The successor's pod is seen before anything else of it is.
        vmi = {"metadata": {"name": "blue", "namespace": "blue", "uid": "successor"}}
        tenant.launcher(vmi, "early", claim=True)
        await tenant.settled(controller)
        assert tenant.allocation("blue", "early", KEY) is None
        tenant.kube.vanish(VMS, "blue", "blue")
        await tenant.until(lambda: tenant.claim("blue", "blue.happy") is None)
        machine = {**former, "metadata": {"name": "blue", "namespace": "blue"}}
        vm = tenant.kube.seed(VMS, machine)
        made = tenant.vmi(vm)
        tenant.kube.seed(VMIS, {**made, "metadata": {**made["metadata"], "uid": "successor"}})
        given = await tenant.until(lambda: tenant.allocation("blue", "early", KEY))
        assert given["ip_addresses"] == tenant.claim_ips("blue", "blue.happy")


async def test_a_restart_keeps_an_address_whose_own_mac_is_somebody_elses(tenant: Any) -> None:
    # 192.168.0.3 was given with another MAC than its own; its machine is gone, so nobody says which.
    status = {"ips": ["192.168.0.3/16", "fd00:10::3/64"]}
    spec = {"network": "cluster_udn_happy-tenant", "interface": ""}
    owner = {"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": "a", "uid": "a"}
    rest = {"finalizers": [names.CLAIM_FINALIZER], "ownerReferences": [owner]}
    async with tenant.controller():
        await tenant.until(lambda: tenant.nad("blue", "happy-tenant"))
        tenant.vm("blue", "b", mac="0a:58:c0:a8:00:03", addresses=["192.168.0.9", "fd00:10::9"])
        await tenant.until(lambda: tenant.claim_ips("blue", "b.happy"))
    tenant.kube.seed(
        CLAIMS, {"metadata": {"name": "z.happy", "namespace": "blue", **rest}, "spec": spec, "status": status}
    )
    async with tenant.controller() as controller:
        network = next(controller.cluster.attachments()).network
        held = controller.ledger.pools(network).get("claim blue/z.happy")
        assert held is not None
        assert list(map(str, held.addresses)) == status["ips"]
        assert held.mac != "0a:58:c0:a8:00:03"


async def test_a_successor_s_claim_does_not_keep_what_the_former_one_had(tenant: Any) -> None:
    tenant.vm("blue", "other", addresses=["192.168.0.9", "fd00:10::9"])
    former = tenant.vm("blue", "blue")
    async with tenant.controller() as controller:
        await tenant.until(lambda: tenant.claim_ips("blue", "other.happy") and tenant.claim_ips("blue", "blue.happy"))
        # Gone and there again, as another one, before the controller has looked.
        claim = tenant.claim("blue", "blue.happy")
        tenant.kube.vanish(VMS, "blue", "blue")
        tenant.kube.vanish(CLAIMS, "blue.happy", "blue")
        vm = tenant.vm("blue", "blue", addresses=["192.168.0.9", "fd00:10::9"])
        assert vm["metadata"]["uid"] != former["metadata"]["uid"]
        owner = {**claim["metadata"]["ownerReferences"][0], "uid": vm["metadata"]["uid"]}
        metadata = {"name": "blue.happy", "namespace": "blue", "ownerReferences": [owner]}
        tenant.kube.seed(CLAIMS, {"metadata": metadata, "spec": claim["spec"]})
        await tenant.until(lambda: (ready(tenant, "blue.happy") or {}).get("reason") == "IPAddressConflict")
        await tenant.settled(controller)
        network = next(controller.cluster.attachments()).network
        assert set(controller.ledger.pools(network).owners()) == {"claim blue/other.happy"}


async def test_what_was_given_but_not_written_is_given_back_when_the_machine_asks_for_something_else(
    tenant: Any,
) -> None:
    tenant.vm("blue", "other", addresses=["192.168.0.9", "fd00:10::9"])
    async with tenant.controller() as controller:
        await tenant.until(lambda: tenant.claim_ips("blue", "other.happy"))
        network = next(controller.cluster.attachments()).network
        tenant.kube.fail = refuse("patch", resource=CLAIMS)
        vm = tenant.vm("blue", "blue")
        await tenant.until(lambda: "claim blue/blue.happy" in controller.ledger.pools(network).owners())
        text = json.dumps({"happy": ["192.168.0.9", "fd00:10::9"]})
        vm["spec"]["template"]["metadata"]["annotations"] = {"network.kubevirt.io/addresses": text}
        tenant.kube.seed(VMS, vm)
        tenant.kube.fail = None
        await tenant.until(lambda: (ready(tenant, "blue.happy") or {}).get("reason") == "IPAddressConflict")
        await tenant.settled(controller)
        assert set(controller.ledger.pools(network).owners()) == {"claim blue/other.happy"}


async def test_a_claim_that_is_removed_by_force_comes_back_with_what_its_machine_runs_with(tenant: Any) -> None:
    vmi = tenant.vmi(tenant.vm("blue", "blue"), node="n1")
    tenant.launcher(vmi, "pod", claim=True)
    async with tenant.controller() as controller:
        given = await tenant.until(lambda: tenant.allocation("blue", "pod", KEY))
        former = tenant.claim("blue", "blue.happy")["metadata"]["uid"]
        tenant.kube.vanish(CLAIMS, "blue.happy", "blue")
        await tenant.until(lambda: tenant.claim_ips("blue", "blue.happy"))
        assert tenant.claim("blue", "blue.happy")["metadata"]["uid"] != former
        assert tenant.claim_ips("blue", "blue.happy") == given["ip_addresses"]
        # The machine is gone, and the claim with it; its pod is still ending.
        tenant.kube.vanish(VMS, "blue", "blue")
        tenant.kube.vanish(VMIS, "blue", "blue")
        await tenant.until(lambda: tenant.claim("blue", "blue.happy") is None)
        await tenant.settled(controller)
        pools = controller.ledger.pools(next(controller.cluster.attachments()).network)
        assert pools.get("claim blue/blue.happy")
        tenant.kube.vanish(PODS, "pod", "blue")
        await tenant.until(lambda: pools.get("claim blue/blue.happy") is None)


async def test_a_claim_whose_machine_went_while_nobody_looked_is_released_and_counted(tenant: Any) -> None:
    tenant.vm("blue", "blue")
    tenant.vm("blue", "other")
    async with tenant.controller():
        await tenant.until(lambda: tenant.claim_ips("blue", "blue.happy") and tenant.claim_ips("blue", "other.happy"))
    tenant.kube.vanish(VMS, "blue", "blue")
    before = metrics.LEFT_OVERS.labels("claim")._value.get()
    async with tenant.controller() as controller:
        await tenant.until(lambda: tenant.claim("blue", "blue.happy") is None)
        await tenant.settled(controller)
        assert tenant.claim_ips("blue", "other.happy")
    assert metrics.LEFT_OVERS.labels("claim")._value.get() == before + 1


async def test_a_claim_is_not_released_before_the_instance_s_watch_has_caught_up(tenant: Any) -> None:
    vm = tenant.vm("blue", "blue")
    async with tenant.controller() as controller:
        await tenant.until(lambda: tenant.claim_ips("blue", "blue.happy"))
        # Nothing is heard of instances; the machine's start and its deletion follow each other.
        tenant.kube.fail = refuse("watching", "watch", "list", resource=VMIS)
        tenant.kube.interrupt()
        await tenant.until(lambda: controller.cluster.informers[VMIS].failure)
        tenant.vmi(vm, node="n1")
        tenant.kube.vanish(VMS, "blue", "blue")
        await tenant.until(lambda: controller.cluster.get(VMS, "blue/blue") is None)
        await tenant.settled(controller)
        assert tenant.claim("blue", "blue.happy") is not None
        tenant.kube.fail = None
        await tenant.until(lambda: controller.cluster.get(VMIS, "blue/blue"))
        tenant.kube.vanish(VMIS, "blue", "blue")
        await tenant.until(lambda: tenant.claim("blue", "blue.happy") is None)
