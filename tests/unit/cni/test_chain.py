"""Configurations of the default networks that clusters have, and what becomes of them."""

import json
from typing import Any

import pytest

from vmnet.cni import chain
from vmnet.cni.chain import Unusable

PORTMAP = {"type": "portmap", "snat": True, "capabilities": {"portMappings": True}}
FLANNEL: dict[str, Any] = {
    "name": "cbr0",
    "cniVersion": "0.3.1",
    "plugins": [{"type": "flannel", "delegate": {"hairpinMode": True, "isDefaultGateway": True}}, PORTMAP],
}
CALICO: dict[str, Any] = {
    "name": "k8s-pod-network",
    "cniVersion": "0.3.1",
    "plugins": [
        {
            "type": "calico",
            "datastore_type": "kubernetes",
            "mtu": 0,
            "nodename_file_optional": False,
            "ipam": {"type": "calico-ipam", "assign_ipv4": "true"},
            "container_settings": {"allow_ip_forwarding": False},
            "policy": {"type": "k8s"},
            "kubernetes": {"kubeconfig": "/etc/cni/net.d/calico-kubeconfig"},
        },
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        PORTMAP,
    ],
}
CILIUM: dict[str, Any] = {
    "cniVersion": "0.3.1",
    "name": "cilium",
    "plugins": [{"type": "cilium-cni", "enable-debug": False, "log-file": "/var/run/cilium/cilium-cni.log"}],
}
KINDNET: dict[str, Any] = {
    "cniVersion": "0.3.1",
    "name": "kindnet",
    "plugins": [
        {
            "type": "ptp",
            "ipMasq": False,
            "ipam": {
                "type": "host-local",
                "dataDir": "/run/cni-ipam-state",
                "routes": [{"dst": "0.0.0.0/0"}],
                "ranges": [[{"subnet": "10.244.1.0/24"}]],
            },
            "mtu": 1500,
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}
BRIDGE: dict[str, Any] = {
    "cniVersions": ["0.3.1", "1.0.0", "1.1.0"],
    "cniVersion": "1.0.0",
    "name": "bridge",
    "disableCheck": True,
    "x.example/key": {"kept": [1, 2.5, None, "ü"]},
    "plugins": [{"type": "bridge", "ipam": {"type": "host-local"}}, PORTMAP],
}
LISTS = [FLANNEL, CALICO, CILIUM, KINDNET, BRIDGE]


@pytest.mark.parametrize("body", LISTS, ids=lambda body: str(body["name"]))
def test_it_comes_last_once_and_changes_nothing_else(body: dict[str, Any]) -> None:
    found = chain.chained(body)
    assert found["plugins"] == [*body["plugins"], {"type": "vmnet-cni"}]
    assert list(found) == list(body)
    assert chain.chained(found) == found
    assert chain.unchained(found) == body
    assert chain.parse(chain.render(found)) == found


def test_what_others_append_afterwards_does_not_stay_behind_it() -> None:
    istio = {"type": "istio-cni", "kubernetes": {"cni_bin_dir": "/opt/cni/bin"}}
    body = {**CILIUM, "plugins": [*CILIUM["plugins"], {"type": "vmnet-cni"}, istio, {"type": "vmnet-cni", "key": 1}]}
    assert chain.chained(body)["plugins"] == [*CILIUM["plugins"], istio, {"type": "vmnet-cni", "key": 1}]


def test_a_single_plugin_becomes_a_list() -> None:
    single = {"cniVersion": "0.4.0", "name": "old", "type": "macvlan", "ipam": {"type": "dhcp"}}
    assert chain.wrapped(single, "10-old.conf") == {
        "cniVersion": "0.4.0",
        "name": "old",
        "plugins": [single, {"type": "vmnet-cni", "wraps": "10-old.conf"}],
    }
    # Before 0.3.0 there were no lists.
    assert chain.wrapped({"name": "old", "type": "macvlan"}, "x")["cniVersion"] == "0.3.1"
    assert chain.wrapped({"name": "old", "type": "macvlan", "cniVersion": "0.2.0"}, "x")["cniVersion"] == "0.3.1"


@pytest.mark.parametrize(
    "body",
    [
        {"name": "x", "cniVersion": "1.0.0", "plugins": []},
        {"name": "x", "cniVersion": "1.0.0", "plugins": None},
        {"name": "x", "cniVersion": "1.0.0", "plugins": [{"type": "vmnet-cni"}]},
        # Every pod of the node would be refused for its version.
        {**FLANNEL, "cniVersion": "2.0.0"},
        {**FLANNEL, "cniVersion": "0.2.0"},
        {"name": "x", "plugins": FLANNEL["plugins"]},
    ],
)
def test_a_list_that_cannot_be_chained_into_is_left_alone(body: dict[str, Any]) -> None:
    with pytest.raises(Unusable):
        chain.chained(body)


def test_a_newer_version_may_be_offered_beside_one_that_is_spoken() -> None:
    assert chain.has_plugin(chain.chained({**FLANNEL, "cniVersion": "1.2.0", "cniVersions": ["1.0.0"]}))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"1", b"\xff", json.dumps(FLANNEL).encode()[:-3], b" " * (2 << 20)])
def test_half_a_file_is_no_configuration(text: bytes) -> None:
    with pytest.raises(Unusable):
        chain.parse(text)


def test_runtimes_read_in_the_order_of_names() -> None:
    names = [
        "99-loopback.conf",
        "10-b.conflist",
        "05-a.json",
        "calico-kubeconfig",
        "x.conflist.bak",
        "00-vmnet.conflist",
    ]
    assert chain.candidates(names) == ["05-a.json", "10-b.conflist", "99-loopback.conf"]


@pytest.mark.parametrize(
    ("body", "multus"),
    [
        ({"type": "multus", "name": "multus-cni-network", "delegates": [FLANNEL]}, True),
        ({"type": "multus-shim", "name": "multus-cni-network", "clusterNetwork": "/x"}, True),
        ({"name": "x", "plugins": [{"type": "multus"}, PORTMAP]}, True),
        (FLANNEL, False),
    ],
)
def test_multus_is_known(body: dict[str, Any], multus: bool) -> None:
    assert chain.is_multus(body) == multus
