"""What users do wrong: they are told what and why, and once it is put right all goes on without a restart."""

from typing import Any

import pytest

from vmnet.lab.demo import BLUE, NETWORK
from vmnet.lab.errors import LabError

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]


def udn(namespace: str, name: str, **layer2: Any) -> dict[str, Any]:
    """A primary UserDefinedNetwork."""
    body = {"role": "Primary", "subnets": ["10.91.0.0/16"], **layer2}
    return {
        "apiVersion": "k8s.ovn.org/v1",
        "kind": "UserDefinedNetwork",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"topology": "Layer2", "layer2": body},
    }


def pod(namespace: str, name: str) -> dict[str, Any]:
    """A pod that does nothing."""
    container = {"name": "main", "image": "registry.k8s.io/pause:3.10"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 1},
    }


async def ready(world: Any, namespace: str, name: str, status: str, says: str) -> None:
    """Wait for the network's condition, with words of its message."""

    async def found() -> bool:
        conditions = (await world.get("userdefinednetwork", "-n", namespace, name)).get("status", {})
        return any(
            item["type"] == "NetworkReady" and item["status"] == status and says in item["message"]
            for item in conditions.get("conditions", [])
        )

    await world.until(f"network {name} has NetworkReady={status}: {says!r}", found)


async def test_a_machine_waits_for_a_network_that_does_not_exist_yet(healthy: Any) -> None:
    world = healthy
    blue = await world.get("vm", "-n", *BLUE)
    async with world.namespace("early-namespace") as namespace:
        await world.apply(
            {
                "apiVersion": "kubevirt.io/v1",
                "kind": "VirtualMachine",
                "metadata": {"namespace": namespace, "name": "early"},
                "spec": {"runStrategy": "Always", "template": {"spec": blue["spec"]["template"]["spec"]}},
            }
        )
        await world.event(namespace, "ErrorAllocatingPod", "virt-launcher-early", "has none yet")
        (waiting,) = await world.launchers((namespace, "early"))
        assert waiting["status"]["phase"] == "Pending"
        await world.apply(udn(namespace, "late", ipam={"lifecycle": "Persistent"}))
        await world.lab.kubectl("wait", "-n", namespace, "vmi/early", "--for=condition=Ready", "--timeout=120s")
        (running,) = await world.launchers((namespace, "early"))
        assert running["metadata"]["uid"] == waiting["metadata"]["uid"]
        claim = await world.get("ipamclaim", "-n", namespace, "early.happy")
        assert claim["status"]["ips"][0].startswith("10.91.")


async def test_a_second_primary_network_is_refused_until_the_first_is_gone(healthy: Any) -> None:
    world = healthy
    async with world.namespace("two-namespace") as namespace:
        await world.apply(udn(namespace, "first"))
        await ready(world, namespace, "first", "True", "created")
        await world.apply(udn(namespace, "second", subnets=["10.92.0.0/16"]))
        await ready(world, namespace, "second", "False", f"has primary network {namespace}_first already")
        await world.lab.kubectl("delete", "userdefinednetwork", "-n", namespace, "first", "--timeout=60s")
        await ready(world, namespace, "second", "True", "created")


async def test_a_second_primary_network_for_a_tenant_with_machines_is_refused(healthy: Any) -> None:
    world = healthy
    await world.apply(udn(BLUE[0], "rival"))
    try:
        await ready(world, BLUE[0], "rival", "False", f"has primary network cluster_udn_{NETWORK} already")
    finally:
        await world.lab.kubectl("delete", "userdefinednetwork", "-n", BLUE[0], "rival", "--timeout=60s")


async def test_a_pod_waits_for_an_address_of_a_full_subnet(healthy: Any) -> None:
    world = healthy
    async with world.namespace("full-namespace") as namespace:
        # Of eight addresses the network itself keeps four: the subnet's first and last, gateway and management.
        await world.apply(udn(namespace, "tiny", subnets=["10.93.0.0/29"]))
        await ready(world, namespace, "tiny", "True", "created")
        names = [f"pod-{number}" for number in range(4)]
        await world.apply(*(pod(namespace, name) for name in names))
        pods = [f"pod/{name}" for name in names]
        await world.lab.kubectl("wait", "-n", namespace, *pods, "--for=condition=Ready", "--timeout=90s")
        await world.apply(pod(namespace, "one-too-many"))
        says = "subnet 10.93.0.0/29 has no free address"
        await world.event(namespace, "ErrorAllocatingPod", "one-too-many", says)
        await world.lab.kubectl("delete", "-n", namespace, pods[0], "--timeout=60s")
        await world.lab.kubectl("wait", "-n", namespace, "pod/one-too-many", "--for=condition=Ready", "--timeout=120s")


@pytest.mark.parametrize(
    ("layer2", "field", "rule"),
    [
        ({"subnets": ["10.91.0.7/16"]}, "spec.layer2.subnets[0]", "must have no host bits set"),
        ({"subnets": ["lots"]}, "spec.layer2.subnets[0]", "must be a subnet in CIDR notation"),
        ({"subnets": ["10.91.0.0/16", "10.92.0.0/16"]}, "layer2.subnets", "of two IP families"),
        ({"subnets": ["10.91.0.0/16", "fd00:91::/64"], "mtu": 1000}, "layer2.mtu", "must be at least 1280"),
        ({"role": "Main"}, "spec.layer2.role", '"Primary", "Secondary"'),
        ({"ipam": {"mode": "Disabled"}}, "layer2.ipam.mode", "allowed for role Secondary only"),
    ],
    ids=["host bits", "no subnet", "one family twice", "small mtu", "role", "no addresses"],
)
async def test_a_wrong_network_is_rejected_with_field_and_rule(
    world: Any, layer2: dict[str, Any], field: str, rule: str
) -> None:
    with pytest.raises(LabError) as caught:
        await world.apply(udn(BLUE[0], "wrong", **layer2))
    assert field in str(caught.value)
    assert rule in str(caught.value)
    assert not await world.lab.kubectl("get", "userdefinednetwork", "-n", BLUE[0], "wrong", "--ignore-not-found")
