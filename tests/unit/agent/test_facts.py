import json
from typing import Any

import pytest

from vmnet.agent import facts
from vmnet.model import names
from vmnet.model.endpoint import MachineReference
from vmnet.model.names import NetworkId
from vmnet.model.network import Network

ENTRY = {"ip_addresses": ["fd00::5/64", "192.168.0.5/16"], "mac_address": "0A:58:C0:A8:00:05", "role": "primary"}
NETWORK = facts.Attachment("blue/happy", Network(name="cluster_udn_happy", id=NetworkId(1)))


def pod(
    name: str, node: str = "n1", *, phase: str = "Running", ready: bool = False, created: int = 0
) -> dict[str, Any]:
    annotations = {
        names.POD_NETWORKS_ANNOTATION: json.dumps({"blue/happy": ENTRY}),
        names.DOMAIN_ANNOTATION: "blue-vm",
    }
    if ready:
        annotations[names.TARGET_READY_ANNOTATION] = "2026-11-23 06:49:28 +0000 UTC"
    return {
        "metadata": {
            "name": name,
            "namespace": "blue",
            "uid": f"uid-{name}",
            "creationTimestamp": f"2026-01-01T00:00:0{created}Z",
            "labels": {"kubevirt.io": "virt-launcher", "kubevirt.io/nodeName": "not-to-be-used"},
            "annotations": annotations,
        },
        "spec": {"nodeName": node},
        "status": {"phase": phase},
    }


def vmi(node: str, **state: Any) -> dict[str, Any]:
    return {"status": {"nodeName": node, **({"migrationState": state} if state else {})}}


def test_endpoint_takes_addresses_ipv4_first_and_the_machine_from_the_domain() -> None:
    endpoint = facts.endpoint(pod("launcher"), NETWORK)
    assert endpoint is not None
    assert [str(item) for item in endpoint.addresses] == ["192.168.0.5/16", "fd00::5/64"]
    assert endpoint.mac == "0a:58:c0:a8:00:05"
    assert endpoint.machine == MachineReference("blue", "blue-vm")
    assert endpoint.hostname == "blue-vm"
    assert endpoint.node == "n1"


def test_no_endpoint_before_allocation_or_binding() -> None:
    bare = pod("launcher")
    del bare["metadata"]["annotations"][names.POD_NETWORKS_ANNOTATION]
    assert facts.endpoint(bare, NETWORK) is None
    assert facts.endpoint(pod("launcher", node=""), NETWORK) is None


@pytest.mark.parametrize(
    "text", ["{", '{"blue/happy": {}}', '{"blue/happy": {"ip_addresses": ["x"], "mac_address": "y"}}']
)
def test_a_bad_annotation_is_an_error_that_can_be_shown(text: str) -> None:
    item = pod("launcher")
    item["metadata"]["annotations"][names.POD_NETWORKS_ANNOTATION] = text
    with pytest.raises(ValueError, match=r"pod-networks|MAC|not"):
        facts.endpoint(item, NETWORK)


SOURCE, TARGET = pod("a", "n1"), pod("b", "n2", created=5)
HANDED = {"sourcePod": "a", "targetPod": "b"}


@pytest.mark.parametrize(
    ("pods", "machine", "live", "settled"),
    [
        pytest.param([], None, None, True, id="no pod"),
        pytest.param([SOURCE], vmi("n1"), "a", True, id="one pod"),
        pytest.param([SOURCE, TARGET], vmi("n1"), "a", False, id="target pod, no hand-off yet"),
        pytest.param([SOURCE, TARGET], None, "a", False, id="no VMI seen: the oldest"),
        pytest.param([SOURCE, TARGET], vmi("n1", **HANDED), "a", False, id="handed off"),
        pytest.param([SOURCE, pod("b", "n2", ready=True)], vmi("n1", **HANDED), "b", False, id="ready-timestamp"),
        pytest.param([SOURCE, TARGET], vmi("n2", **HANDED), "b", False, id="the VMI moved before the annotation came"),
        pytest.param(
            [SOURCE, pod("b", "n2", ready=True)],
            vmi("n1", **HANDED, failed=True, completed=True),
            "a",
            True,
            id="failed",
        ),
        pytest.param([SOURCE, TARGET], vmi("n2", **HANDED, completed=True), "b", True, id="completed, source lingers"),
        pytest.param([pod("a", phase="Succeeded"), TARGET], vmi("n2", **HANDED), "b", True, id="source finished"),
        pytest.param(
            [pod("b", "n2", ready=True, created=5), pod("c", "n3", created=9)],
            vmi("n2", **HANDED, completed=True),
            "b",
            False,
            id="next migration before its hand-off: the old state and the old timestamp do not count",
        ),
        pytest.param(
            [SOURCE, pod("b", "n2", ready=True, created=5), pod("c", "n3", created=9)],
            vmi("n2", **HANDED, completed=True),
            "b",
            False,
            id="a third pod has come before the first one went: one of the stores is behind",
        ),
    ],
)
def test_live_pod(pods: list[Any], machine: Any, live: str | None, settled: bool) -> None:
    found = facts.live_pod(pods, machine)
    assert (found["metadata"]["name"] if found else None) == live
    assert facts.settled(pods, machine) is settled


def test_node_prefers_its_ipv4_internal_address() -> None:
    item = {
        "metadata": {"name": "n1"},
        "status": {
            "addresses": [
                {"type": "Hostname", "address": "n1"},
                {"type": "InternalIP", "address": "fd00:30::11"},
                {"type": "InternalIP", "address": "172.30.0.11"},
            ]
        },
    }
    found = facts.node(item)
    assert found is not None
    assert str(found.address) == "172.30.0.11"
    assert facts.node({"metadata": {"name": "n2"}}) is None


def test_no_endpoint_has_the_mac_of_a_router() -> None:
    found = pod("launcher")
    entry = {**ENTRY, "mac_address": names.router_mac("n2").upper()}
    found["metadata"]["annotations"][names.POD_NETWORKS_ANNOTATION] = json.dumps({"blue/happy": entry})
    with pytest.raises(ValueError, match="is a router's"):
        facts.endpoint(found, NETWORK)


def api_node(**annotations: str) -> dict[str, Any]:
    status = {"addresses": [{"type": "InternalIP", "address": "172.30.0.11"}]}
    return {"metadata": {"name": "n1", "annotations": annotations}, "status": status}


def test_a_node_has_its_number_and_its_parts() -> None:
    parts = json.dumps({"green": ["203.203.1.0/24"], "blue": ["103.103.1.0/24", "fd20:0:0:1::/64"]})
    found = facts.node(api_node(**{names.NODE_NUMBER_ANNOTATION: "3", names.NODE_SUBNETS_ANNOTATION: parts}))
    assert found is not None
    assert [str(address) for address in found.transit] == ["100.88.0.3/16", "fd97::3/64"]
    assert [(name, [str(part) for part in held]) for name, held in found.subnets] == [
        ("blue", ["103.103.1.0/24", "fd20:0:0:1::/64"]),
        ("green", ["203.203.1.0/24"]),
    ]


def test_a_node_whose_annotations_are_spoiled_is_still_a_node() -> None:
    found = facts.node(api_node(**{names.NODE_NUMBER_ANNOTATION: "x", names.NODE_SUBNETS_ANNOTATION: "{"}))
    assert found is not None
    assert found.transit == ()
    assert found.subnets == ()


def test_a_machine_comes_from_its_migration_s_source() -> None:
    source, target = pod("source", "n1"), pod("target", "n2", created=1)
    pods = [source, target]
    staged = vmi("n1")
    assert facts.source_node(target, pods, staged) == "n1", "not handed over yet"
    assert facts.source_node(source, pods, staged) == ""
    over = vmi("n2", sourcePod="source", targetPod="target", sourceNode="n1", targetNode="n2", completed=True)
    assert facts.source_node(target, pods, over) == "n1"
    assert facts.source_node(source, pods, over) == "", "it never came back"


def test_a_pod_that_was_once_a_target_remembers_while_the_vmi_tells_of_another_migration() -> None:
    second, third = pod("second", "n2"), pod("third", "n3", created=1)
    second["metadata"]["annotations"][names.CUT_OVER_ANNOTATION] = json.dumps({"source": "n1"})
    failed = vmi("n2", sourcePod="second", targetPod="third", sourceNode="n2", targetNode="n3", failed=True)
    assert facts.source_node(second, [second, third], failed) == "n1"
    second["metadata"]["annotations"][names.CUT_OVER_ANNOTATION] = "{"
    assert facts.source_node(second, [second, third], failed) == ""


def test_a_machine_that_began_here_comes_from_nowhere() -> None:
    alone = pod("alone", "n1")
    assert facts.source_node(alone, [alone], vmi("n1")) == ""
    assert facts.source_node(alone, [pod("old", "n2", phase="Succeeded"), alone], vmi("n1")) == ""


def test_the_interface_on_the_pod_network_has_the_name_of_the_specification() -> None:
    other = {"name": "storage", "multus": {"networkName": "blue/storage"}}
    networks = [other, {"name": "happy", "pod": {}}]
    assert facts.interface_on_pod_network({"spec": {"networks": networks}}) == "happy"
    assert facts.interface_on_pod_network({"spec": {"networks": [other]}}) is None
    assert facts.interface_on_pod_network({}) is None
