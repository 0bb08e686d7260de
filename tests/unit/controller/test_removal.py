"""What a cluster is rid of, and what it keeps."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from vmnet.controller.removal import LEASE, WEBHOOKS, withdraw
from vmnet.kube.api import (
    CLAIMS,
    CUDNS,
    ENDPOINT_SLICES,
    LEASES,
    MUTATING_WEBHOOKS,
    NADS,
    NODES,
    PODS,
    UDNS,
    Resource,
)
from vmnet.kube.fake import FakeKube
from vmnet.model import names

SYSTEM = "vmnet-system"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
OTHERS = "example.org/holds"


def lease(kube: FakeKube, renewed: datetime) -> None:
    text = renewed.isoformat(timespec="microseconds").replace("+00:00", "Z")
    spec = {"holderIdentity": "one", "leaseDurationSeconds": 15, "renewTime": text}
    kube.seed(LEASES, {"metadata": {"namespace": SYSTEM, "name": LEASE}, "spec": spec})


def held(kube: FakeKube, resource: Resource, name: str, namespace: str = "blue") -> list[str]:
    found = kube.peek(resource, name, namespace)
    assert found is not None
    return list(found["metadata"].get("finalizers") or [])


@pytest.fixture
def kube() -> FakeKube:
    found = FakeKube()
    found.unserved.add(CUDNS)
    protected = [names.NETWORK_PROTECTION_FINALIZER, OTHERS]
    for resource, finalizers in ((UDNS, protected), (NADS, protected[:1]), (CLAIMS, [names.CLAIM_FINALIZER])):
        found.seed(resource, {"metadata": {"namespace": "blue", "name": "x", "finalizers": finalizers}})
    annotations = {names.NODE_NUMBER_ANNOTATION: "1", names.NODE_SUBNETS_ANNOTATION: "{}", "theirs": "kept"}
    found.seed(NODES, {"metadata": {"name": "n1", "annotations": annotations}})
    found.seed(MUTATING_WEBHOOKS, {"metadata": {"name": WEBHOOKS}, "webhooks": []})
    managed = {"endpointslice.kubernetes.io/managed-by": names.MIRROR_CONTROLLER}
    mirror = {"namespace": "blue", "name": "mirror", "labels": managed}
    mirror_of = {names.SOURCE_SLICE_ANNOTATION: "slice"}
    found.seed(ENDPOINT_SLICES, {"metadata": {**mirror, "annotations": mirror_of}, "endpoints": []})
    found.seed(ENDPOINT_SLICES, {"metadata": {"namespace": "blue", "name": "slice"}, "endpoints": []})
    return found


async def test_nothing_is_touched_while_a_controller_leads(kube: FakeKube) -> None:
    lease(kube, NOW - timedelta(seconds=5))
    removal = await withdraw(kube, SYSTEM, NOW)
    assert removal.done == ()
    assert "controller one still leads" in removal.left[0]
    assert names.NETWORK_PROTECTION_FINALIZER in held(kube, UDNS, "x")


async def test_what_the_controller_wrote_goes_and_what_tenants_wrote_stays(kube: FakeKube) -> None:
    lease(kube, NOW - timedelta(seconds=16))
    removal = await withdraw(kube, SYSTEM, NOW)
    assert held(kube, UDNS, "x") == [OTHERS]
    assert held(kube, NADS, "x") == held(kube, CLAIMS, "x") == []
    node = kube.peek(NODES, "n1")
    assert node is not None
    assert node["metadata"]["annotations"] == {"theirs": "kept"}
    assert kube.peek(MUTATING_WEBHOOKS, WEBHOOKS) is None
    assert kube.peek(ENDPOINT_SLICES, "mirror", "blue") is None
    assert kube.peek(ENDPOINT_SLICES, "slice", "blue") is not None
    assert removal.left == ()
    assert [sentence.split(" stay")[0] for sentence in removal.kept] == ["1 userdefinednetworks", "1 ipamclaims"]
    assert (await withdraw(kube, SYSTEM, NOW)).done == ()


async def test_pods_that_must_be_made_anew_are_named(kube: FakeKube) -> None:
    entries = {names.POD_NETWORKS_ANNOTATION: json.dumps({"blue/net": {"ip_addresses": []}})}
    for name, phase in (("runs", "Running"), ("over", "Succeeded")):
        metadata = {"namespace": "blue", "name": name, "annotations": entries}
        kube.seed(PODS, {"metadata": metadata, "status": {"phase": phase}})
    kube.seed(PODS, {"metadata": {"namespace": "blue", "name": "plain"}, "status": {"phase": "Running"}})
    (sentence,) = (await withdraw(kube, SYSTEM, NOW)).left
    assert sentence.startswith("1 pods are on networks")
    assert sentence.endswith(": blue/runs")
