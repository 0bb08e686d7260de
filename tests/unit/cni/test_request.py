"""CNI requests: what the specification lets a runtime send, and the code each fault gets."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from vmnet.cni import request
from vmnet.cni.errors import CniError, Code
from vmnet.cni.request import Attachment, Command
from vmnet.model.endpoint import PodReference

ENVIRONMENT = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "0123abc",
    "CNI_NETNS": "/run/netns/x",
    "CNI_IFNAME": "eth0",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=red;K8S_POD_NAME=vm-0;K8S_POD_UID=u-1",
}
CONFIG: dict[str, Any] = {"cniVersion": "1.1.0", "name": "lab", "type": "vmnet-cni", "prevResult": {}}


def parse(environment: Mapping[str, str] | None = None, config: Mapping[str, Any] | None = None) -> request.Request:
    return request.parse({**ENVIRONMENT, **(environment or {})}, json.dumps({**CONFIG, **(config or {})}).encode())


def test_add_names_the_pod() -> None:
    found = parse()
    assert found.command is Command.ADD
    assert found.pod == PodReference("red", "vm-0", "u-1")
    assert (found.container_id, found.netns, found.ifname) == ("0123abc", "/run/netns/x", "eth0")
    assert found.network == "lab"
    assert found.previous_result == {}


def test_a_runtime_without_kubernetes_names_no_pod() -> None:
    assert parse({"CNI_ARGS": ""}).pod is None


def test_a_meta_plugins_add_is_the_first_of_its_chain() -> None:
    assert parse(config={"prevResult": None, "netAttachDefName": "red/storage"}).previous_result is None


def test_a_value_may_hold_an_equals_sign() -> None:
    assert request.parse_args("A=b=c;B=") == {"A": "b=c", "B": ""}


def test_del_needs_no_namespace() -> None:
    assert parse({"CNI_COMMAND": "DEL", "CNI_NETNS": ""}).netns == ""


@pytest.mark.parametrize(
    ("environment", "config", "code"),
    [
        ({"CNI_COMMAND": "MOVE"}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_COMMAND": ""}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_CONTAINERID": ""}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_CONTAINERID": "../../etc"}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_CONTAINERID": "abc\n"}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_NETNS": ""}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_NETNS": "", "CNI_COMMAND": "CHECK"}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_IFNAME": ""}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_IFNAME": "a" * 16}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_IFNAME": "a/b"}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_IFNAME": ".."}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_ARGS": "novalue"}, {}, Code.INVALID_ENVIRONMENT),
        ({}, {"cniVersion": "9.0.0"}, Code.INCOMPATIBLE_VERSION),
        ({"CNI_IFNAME": "a\u00a0b"}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_IFNAME": "é" * 8}, {}, Code.INVALID_ENVIRONMENT),
        ({"CNI_NETNS": "red"}, {}, Code.INVALID_ENVIRONMENT),
        ({}, {"name": "../lab"}, Code.INVALID_CONFIG),
        ({}, {"name": None}, Code.INVALID_CONFIG),
        ({}, {"prevResult": None}, Code.INVALID_CONFIG),
        ({"CNI_COMMAND": "CHECK"}, {"cniVersion": "0.3.1"}, Code.INCOMPATIBLE_VERSION),
        ({"CNI_COMMAND": "STATUS"}, {"cniVersion": "1.0.0"}, Code.INCOMPATIBLE_VERSION),
        ({"CNI_COMMAND": "GC"}, {"cniVersion": "1.0.0"}, Code.INCOMPATIBLE_VERSION),
        ({}, {"prevResult": []}, Code.INVALID_CONFIG),
        ({}, {"prevResult": {"ips": [1]}}, Code.INVALID_CONFIG),
        ({}, {"prevResult": {"interfaces": {}}}, Code.INVALID_CONFIG),
        ({"CNI_COMMAND": "CHECK"}, {"prevResult": None}, Code.INVALID_CONFIG),
        ({"CNI_COMMAND": "GC"}, {}, Code.INVALID_CONFIG),
        ({"CNI_COMMAND": "GC"}, {"cni.dev/valid-attachments": [{"containerID": "x"}]}, Code.INVALID_CONFIG),
    ],
)
def test_faults_have_the_code_of_the_specification(
    environment: dict[str, str], config: dict[str, Any], code: Code
) -> None:
    with pytest.raises(CniError) as caught:
        parse(environment, config)
    assert caught.value.code is code


@pytest.mark.parametrize("config", [b"", b"{", b"[]", b"\xff"])
def test_a_configuration_that_is_no_json_object_is_a_decoding_failure(config: bytes) -> None:
    with pytest.raises(CniError) as caught:
        request.parse(ENVIRONMENT, config)
    assert caught.value.code is Code.DECODING_FAILURE


def test_gc_keeps_what_is_listed() -> None:
    listed = [{"containerID": "a", "ifname": "eth0"}, {"containerID": "b", "ifname": "net1"}]
    found = parse({"CNI_COMMAND": "GC"}, {"cni.dev/valid-attachments": listed})
    assert found.valid_attachments == (Attachment("a", "eth0"), Attachment("b", "net1"))


def test_status_needs_no_container() -> None:
    found = request.parse({"CNI_COMMAND": "STATUS"}, json.dumps({**CONFIG, "cniVersion": "1.1.0"}).encode())
    assert found.container_id == ""
