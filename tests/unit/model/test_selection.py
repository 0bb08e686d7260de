import json
from ipaddress import ip_address
from typing import Any

import pytest

from vmnet.model import names
from vmnet.model.selection import Selection, selections


def asked(annotation: Any) -> tuple[Selection, ...]:
    text = annotation if isinstance(annotation, str) else json.dumps(annotation)
    return selections({"namespace": "red", "annotations": {names.NETWORKS_ANNOTATION: text}})


def test_a_pod_without_the_annotation_asks_for_nothing() -> None:
    assert selections({"namespace": "red"}) == ()
    assert selections({"namespace": "red", "annotations": None}) == ()
    assert asked(" ") == ()


def test_the_short_form_names_interfaces_by_place() -> None:
    found = asked("storage, green/backup@bk0 ,last")
    assert [(item.key, item.interface) for item in found] == [
        ("red/storage", "net1"),
        ("green/backup", "bk0"),
        ("red/last", "net3"),
    ]


def test_the_json_form_carries_addresses_mac_and_claim() -> None:
    first, second = asked(
        [
            {"name": "storage", "ips": ["10.0.0.5/24", "fd00::5"], "mac": "02-03-04-05-06-07"},
            {"name": "backup", "namespace": "green", "interface": "bk0", "ipam-claim-reference": "vm.backup"},
        ]
    )
    assert (first.key, first.interface, first.mac) == ("red/storage", "net1", "02:03:04:05:06:07")
    assert first.addresses == (ip_address("10.0.0.5"), ip_address("fd00::5"))
    assert (second.key, second.interface, second.claim) == ("green/backup", "bk0", "vm.backup")


@pytest.mark.parametrize(
    ("annotation", "why"),
    [
        ("[", "not JSON"),
        ('{"name":"a"}', "not a JSON list of objects"),
        ([{"namespace": "red"}], "lacks a name"),
        ("a,,b", "is not"),
        ("a@", "is not"),
        ("/a", "is not"),
        ("a/b/c", "is not"),
        ("a,a@x", "red/a is named twice"),
        ("a@net2,b", "net2 is named twice"),
        ("a@eth0", "not for secondary"),
        ("a@ovn-udn1", "not for secondary"),
        ("a@sixteen-letters-x", "not an interface name"),
        ([{"name": "a", "mac": "nonsense"}], "is not a MAC address"),
        ([{"name": "a", "ips": "10.0.0.5"}], "not a list"),
        ([{"name": "a", "ips": ["10.0.0.500"]}], "10.0.0.500"),
    ],
)
def test_what_cannot_be_read_is_named(annotation: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"annotation k8s.v1.cni.cncf.io/networks: .*{why}"):
        asked(annotation)


def test_networks_of_other_tenants_cannot_be_had_by_naming_them() -> None:
    mine, shared, foreign = asked("a,default/b,green/c")
    assert mine.usable_from("red")
    assert shared.usable_from("red")
    assert not foreign.usable_from("red")
