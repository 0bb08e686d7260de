from typing import Any

import pytest

from vmnet.controller import objects
from vmnet.model import names


@pytest.mark.parametrize(
    ("selector", "labels", "selected"),
    [
        ({}, {}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "1", "b": "2"}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "2"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, {"a": "2"}, True),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}, {}, False),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {"a": "1"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"a": ""}, True),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {"a": ""}, False),
        ({"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "b", "operator": "Exists"}]}, {"a": "1"}, False),
    ],
)
def test_selectors(selector: Any, labels: dict[str, str], selected: bool) -> None:
    assert objects.selects(selector, labels) is selected


def test_the_request_as_a_webhook_writes_it() -> None:
    """As recorded in E1-mac-and-address."""
    text = (
        '[{"name":"default","namespace":"ovn-kubernetes","ips":["192.168.0.50/16"],'
        '"mac":"02:03:04:05:06:07","ipam-claim-reference":"green.happy"}]'
    )
    annotations = {names.DEFAULT_NETWORK_ANNOTATION: text, names.PRIMARY_CLAIM_ANNOTATION: "green.happy"}
    found = objects.pod_request({"metadata": {"annotations": annotations}})
    assert [str(item) for item in found.addresses] == ["192.168.0.50"]
    assert (found.mac, found.claim) == ("02:03:04:05:06:07", "green.happy")


def test_a_plain_network_name_in_the_annotation_requests_nothing() -> None:
    annotations = {names.DEFAULT_NETWORK_ANNOTATION: "kube-system/other"}
    assert objects.pod_request({"metadata": {"annotations": annotations}}) == objects.Request()


@pytest.mark.parametrize("text", ["{", "[]", '"text"'])
def test_an_annotation_that_cannot_be_read_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="pod-networks"):
        objects.pod_networks({"metadata": {"annotations": {names.POD_NETWORKS_ANNOTATION: text}}})


def test_a_machine_and_its_instance_ask_alike() -> None:
    spec = {
        "domain": {"devices": {"interfaces": [{"name": "happy", "macAddress": "02-03-04-05-06-07"}]}},
        "networks": [{"name": "other", "multus": {"networkName": "x"}}, {"name": "happy", "pod": {}}],
    }
    annotations = {objects.REQUESTED_ADDRESSES_ANNOTATION: '{"happy": ["10.0.0.5", "fd00::5"], "other": ["10.1.0.5"]}'}
    vmi: Any = {"metadata": {"annotations": annotations}, "spec": spec}
    vm: Any = {"metadata": {}, "spec": {"template": {"metadata": {"annotations": annotations}, "spec": spec}}}
    assert objects.primary_network_name(vm) == objects.primary_network_name(vmi) == "happy"
    found = objects.machine_request(vm, "happy")
    assert found == objects.machine_request(vmi, "happy")
    assert [str(item) for item in found.addresses] == ["10.0.0.5", "fd00::5"]
    assert found.mac == "02:03:04:05:06:07"


def test_long_lists_are_shortened() -> None:
    assert objects.shortened(["b", "a"]) == "a, b"
    assert objects.shortened(map(str, range(12)), most=2) == "0, 1 and 10 more"
