"""The CRDs of ``deploy/crds``: what they accept, what they refuse, and whether they say which field and which rule."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from vmnet.kube.api import CLAIMS, CUDNS, NADS, UDNS, Resource
from vmnet.lab.apiserver import crds
from vmnet.lab.apiserver.schema import Structural

CRDS = Path(__file__).parents[3] / "deploy" / "crds"
FILES = {
    UDNS: "k8s.ovn.org_userdefinednetworks.yaml",
    CUDNS: "k8s.ovn.org_clusteruserdefinednetworks.yaml",
    NADS: "k8s.cni.cncf.io_network-attachment-definitions.yaml",
    CLAIMS: "k8s.cni.cncf.io_ipamclaims.yaml",
}
V4, V6 = "192.168.0.0/16", "fd00:10::/64"


def crd(resource: Resource) -> dict[str, Any]:
    found = yaml.safe_load((CRDS / FILES[resource]).read_text())
    assert isinstance(found, dict)
    return found


SCHEMAS = {resource: Structural.from_crd(crd(resource)["spec"]["versions"][0]) for resource in FILES}


def udn(topology: str = "Layer2", **blocks: Any) -> dict[str, Any]:
    return {
        "apiVersion": "k8s.ovn.org/v1",
        "kind": "UserDefinedNetwork",
        "metadata": {"name": "tenant", "namespace": "red"},
        "spec": {"topology": topology, **blocks},
    }


def layer2(**fields: Any) -> dict[str, Any]:
    wanted = {"role": "Primary", "subnets": [V4], **fields}
    return udn(layer2={key: value for key, value in wanted.items() if value is not None})


def layer3(**fields: Any) -> dict[str, Any]:
    return udn("Layer3", layer3={"role": "Primary", "subnets": [{"cidr": V4, "hostSubnet": 24}], **fields})


def cudn(topology: str = "Layer2", **blocks: Any) -> dict[str, Any]:
    return {
        "apiVersion": "k8s.ovn.org/v1",
        "kind": "ClusterUserDefinedNetwork",
        "metadata": {"name": "tenant"},
        "spec": {
            "namespaceSelector": {"matchLabels": {"team": "x"}},
            "network": {"topology": topology, **blocks},
        },
    }


def localnet(**fields: Any) -> dict[str, Any]:
    wanted = {"role": "Secondary", "physicalNetworkName": "physnet", "subnets": [V4], **fields}
    return cudn("Localnet", localnet={key: value for key, value in wanted.items() if value is not None})


def complaints(item: dict[str, Any], old: dict[str, Any] | None = None) -> list[str]:
    resource = CUDNS if item["kind"] == "ClusterUserDefinedNetwork" else UDNS
    made = copy.deepcopy(item)
    assert SCHEMAS[resource].prune(made) == []
    SCHEMAS[resource].default(made)
    found = SCHEMAS[resource].validate(made, old)
    return [f"{cause.field}: {cause.message}" for cause in found if cause.field != "<nil>"]


@pytest.mark.parametrize(
    "item",
    [
        layer2(),
        layer2(subnets=[V4, V6], mtu=1280),
        layer2(subnets=[V6, V4], ipam={"lifecycle": "Persistent"}),
        layer2(ipam={"mode": "Enabled", "lifecycle": "Persistent"}),
        layer2(reservedSubnets=["192.168.10.0/24"], infrastructureSubnets=["192.168.0.0/30"]),
        layer2(defaultGatewayIPs=["192.168.0.9"]),
        layer2(defaultGatewayIPs=["192.168.7.1"], infrastructureSubnets=["192.168.7.0/24"]),
        layer2(subnets=[V4, V6], defaultGatewayIPs=["192.168.0.9", "fd00:10::9"]),
        layer2(joinSubnets=["100.65.0.0/16", "fd99::/64"]),
        layer2(role="Secondary"),
        layer2(role="Secondary", subnets=None, ipam={"mode": "Disabled"}),
        layer2(mtu=576),
        layer2(mtu=65536),
        layer3(),
        layer3(subnets=[{"cidr": V4}, {"cidr": V6, "hostSubnet": 80}], mtu=9000),
        layer3(subnets=[{"cidr": "10.0.0.0/16"}, {"cidr": "10.1.0.0/16"}]),
        layer3(role="Secondary"),
        cudn(layer2={"role": "Primary", "subnets": [V4, V6], "ipam": {"lifecycle": "Persistent"}}),
        cudn("Layer3", layer3={"role": "Primary", "subnets": [{"cidr": V4}]}),
        localnet(),
        localnet(vlan={"mode": "Access", "access": {"id": 4094}}, excludeSubnets=["192.168.1.0/24"], mtu=1500),
        localnet(subnets=None, ipam={"mode": "Disabled"}),
    ],
)
def test_accepted(item: dict[str, Any]) -> None:
    assert complaints(item) == []


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (udn("Layer4", layer2={}), "topology"),
        (udn(), "spec.layer2: must be set when topology is Layer2"),
        (
            udn("Layer3", layer2={"role": "Primary", "subnets": [V4]}),
            "spec.layer3: must be set when topology is Layer3",
        ),
        (
            udn(layer2={"role": "Primary", "subnets": [V4]}, layer3={"role": "Primary", "subnets": [{"cidr": V4}]}),
            "spec.layer3: must be set when topology is Layer3, and only then",
        ),
        (layer2(role=None), "role: Required value"),
        (layer2(role="Third"), "layer2.role: Unsupported value"),
        (layer2(mtu=575), "layer2.mtu"),
        (layer2(mtu=65537), "layer2.mtu"),
        (layer2(subnets=[V4, V6], mtu=1279), "layer2.mtu: must be at least 1280 with an IPv6 subnet"),
        (layer2(subnets=None), "layer2.subnets: required when ipam.mode is Enabled or not set"),
        (layer2(subnets=[]), "layer2.subnets"),
        (layer2(subnets=[V4, V6, "10.0.0.0/8"]), "layer2.subnets"),
        (layer2(subnets=[V4, "10.0.0.0/8"]), "layer2.subnets: two entries must be of two IP families"),
        (layer2(subnets=[V6, "fd00:11::/64"]), "layer2.subnets: two entries must be of two IP families"),
        (layer2(subnets=["192.168.0.0"]), "must be a subnet in CIDR notation"),
        (layer2(subnets=["192.168.0.1/16"]), "must have no host bits set"),
        (layer2(subnets=["fd00::1/64"]), "must have no host bits set"),
        (
            layer2(role="Secondary", ipam={"mode": "Disabled"}),
            "layer2.subnets: must not be set when ipam.mode is Disabled",
        ),
        (
            layer2(subnets=None, ipam={"mode": "Disabled"}),
            "layer2.ipam.mode: Disabled is allowed for role Secondary only",
        ),
        (
            layer2(role="Secondary", subnets=None, ipam={"mode": "Disabled", "lifecycle": "Persistent"}),
            "ipam.lifecycle: Persistent needs ipam.mode Enabled",
        ),
        (layer2(ipam={}), "ipam"),
        (layer2(ipam={"lifecycle": "Forever"}), "ipam.lifecycle"),
        (layer2(role="Secondary", joinSubnets=["100.65.0.0/16"]), "layer2.joinSubnets: allowed for role Primary only"),
        (layer2(joinSubnets=["100.65.0.0/16", "100.66.0.0/16"]), "layer2.joinSubnets: two entries"),
        (layer2(reservedSubnets=["10.0.0.0/24"]), "layer2.reservedSubnets: each must lie in one of the subnets"),
        (layer2(reservedSubnets=[f"192.168.{n}.0/24" for n in range(26)]), "layer2.reservedSubnets"),
        (layer2(infrastructureSubnets=["10.0.0.0/24"]), "layer2.infrastructureSubnets: each must lie in one"),
        (layer2(infrastructureSubnets=[f"192.168.{n}.0/24" for n in range(5)]), "layer2.infrastructureSubnets"),
        (
            layer2(infrastructureSubnets=["192.168.1.0/24"], reservedSubnets=["192.168.0.0/20"]),
            "layer2.infrastructureSubnets: must not overlap reservedSubnets",
        ),
        (layer2(defaultGatewayIPs=["10.0.0.1"]), "layer2.defaultGatewayIPs: each must lie in one of the subnets"),
        (layer2(defaultGatewayIPs=["192.168.0.1/16"]), "must be an IP address without a prefix length"),
        (layer2(defaultGatewayIPs=["192.168.0.1", "192.168.0.2"]), "layer2.defaultGatewayIPs: two entries"),
        (
            layer2(defaultGatewayIPs=["192.168.0.9"], infrastructureSubnets=["192.168.7.0/24"]),
            "layer2.defaultGatewayIPs: each must lie in one of the infrastructureSubnets",
        ),
        (layer3(subnets=[]), "layer3.subnets"),
        (layer3(subnets=[{"cidr": V4, "hostSubnet": 16}]), "layer3.subnets.hostSubnet: must be longer than the prefix"),
        (layer3(subnets=[{"cidr": V4, "hostSubnet": 32}]), "hostSubnet: must be less than 32 with an IPv4 cidr"),
        (layer3(subnets=[{"cidr": "10.0.0.0/8"}, {"cidr": "10.1.0.0/16"}]), "layer3.subnets: must not overlap"),
        (
            layer3(role="Secondary", subnets=[{"cidr": "10.0.0.0/16"}, {"cidr": "10.1.0.0/16"}]),
            "layer3.subnets: two subnets must be of two IP families",
        ),
        (layer3(subnets=[{"cidr": V6}], mtu=1000), "layer3.mtu: must be at least 1280"),
        (layer3(role="Secondary", joinSubnets=["100.65.0.0/16"]), "layer3.joinSubnets: allowed for role Primary only"),
        (udn("Localnet"), "topology"),
        (cudn(), "spec.network.layer2: must be set when topology is Layer2"),
        (localnet(role="Primary"), "localnet.role"),
        (localnet(physicalNetworkName="a,b"), "localnet.physicalNetworkName: must not contain a comma or a colon"),
        (localnet(vlan={"mode": "Access"}), "localnet.vlan.access: required when vlan.mode is Access"),
        (localnet(vlan={"mode": "Access", "access": {"id": 4095}}), "localnet.vlan.access.id"),
        (localnet(excludeSubnets=["10.0.0.0/24"]), "localnet.excludeSubnets: each must lie in one of the subnets"),
    ],
)
def test_refused_with_field_and_rule(item: dict[str, Any], told: str) -> None:
    found = complaints(item)
    assert any(told in entry for entry in found), found


def test_a_namespace_selector_is_checked() -> None:
    item = cudn(layer2={"role": "Primary", "subnets": [V4]})
    item["spec"]["namespaceSelector"] = {"matchExpressions": [{"key": "a", "operator": "Is"}]}
    assert any("operator: must be In, NotIn, Exists or DoesNotExist" in entry for entry in complaints(item))
    item["spec"]["namespaceSelector"] = {"matchExpressions": [{"key": "a", "operator": "In"}]}
    assert any("values: required for In and NotIn" in entry for entry in complaints(item))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (layer2(), layer3(), "spec.topology: is immutable"),
        (layer2(), layer2(mtu=1400), "layer2: is immutable"),
        (layer2(), layer2(subnets=[V4, V6]), "layer2: is immutable"),
        (layer3(), layer3(role="Secondary"), "layer3.role is immutable"),
        (layer3(mtu=1400), layer3(mtu=1300), "layer3.mtu is immutable"),
        (layer3(), layer3(mtu=1300), "layer3.mtu: is immutable"),
        (layer3(joinSubnets=["100.65.0.0/16"]), layer3(), "layer3.joinSubnets: is immutable"),
        (
            layer3(joinSubnets=["100.65.0.0/16"]),
            layer3(joinSubnets=["100.66.0.0/16"]),
            "layer3.joinSubnets is immutable",
        ),
        (layer3(), layer3(subnets=[{"cidr": V4, "hostSubnet": 25}]), "layer3.subnets.hostSubnet: is immutable"),
        (layer3(), layer3(subnets=[{"cidr": V6}]), "layer3.subnets: a subnet can be added, not removed"),
        (
            layer3(role="Secondary"),
            layer3(role="Secondary", subnets=[{"cidr": V4, "hostSubnet": 24}, {"cidr": V6}]),
            "layer3.subnets: is immutable for role Secondary",
        ),
        (localnet(), localnet(mtu=1400), "localnet: is immutable"),
        (cudn(layer2={"role": "Primary", "subnets": [V4]}), localnet(), "spec.network.topology: is immutable"),
    ],
)
def test_what_must_not_change(old: dict[str, Any], new: dict[str, Any], told: str) -> None:
    found = complaints(new, old)
    assert any(told in entry for entry in found), found


def test_what_may_change() -> None:
    more = layer3(subnets=[{"cidr": V4, "hostSubnet": 24}, {"cidr": V6, "hostSubnet": 80}])
    assert complaints(more, layer3()) == []
    item = cudn(layer2={"role": "Primary", "subnets": [V4]})
    other = copy.deepcopy(item)
    other["spec"]["namespaceSelector"] = {"matchLabels": {"team": "y"}}
    assert complaints(other, item) == []


def test_both_kinds_describe_a_network_alike() -> None:
    one = crd(UDNS)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    other = crd(CUDNS)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    for block in ("layer2", "layer3"):
        assert one[block] == other["network"]["properties"][block]


@pytest.mark.parametrize("resource", FILES)
def test_the_definition_itself_is_valid(resource: Resource) -> None:
    assert crds.validate(crd(resource)) == []


@pytest.mark.parametrize("resource", FILES)
def test_names_match_what_the_product_asks_for(resource: Resource) -> None:
    found = crd(resource)
    assert found["metadata"]["name"] == f"{resource.plural}.{resource.group}"
    names = found["spec"]["names"]
    assert (names["kind"], names["plural"]) == (resource.kind, resource.plural)
    assert found["spec"]["versions"][0]["name"] == resource.version
    assert (found["spec"]["scope"] == "Namespaced") == resource.namespaced


@pytest.mark.parametrize(("resource", "short"), [(UDNS, "udn"), (CUDNS, "cudn")])
def test_short_names_columns_and_status(resource: Resource, short: str) -> None:
    found = crd(resource)["spec"]
    assert found["names"]["shortNames"] == [short]
    version = found["versions"][0]
    columns = [column["name"] for column in version["additionalPrinterColumns"]]
    assert columns == ["Topology", "Role", "Subnets", "Ready", "Age"]
    assert version["subresources"] == {"status": {}}


def rules(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        own = [entry["rule"] for entry in schema.get("x-kubernetes-validations", [])]
        return own + [rule for value in schema.values() for rule in rules(value)]
    return [rule for value in schema for rule in rules(value)] if isinstance(schema, list) else []


@pytest.mark.parametrize("resource", [UDNS, CUDNS])
def test_what_rules_look_at_is_bounded(resource: Resource) -> None:
    """The API server estimates a rule's cost from maxItems and maxLength, and refuses the CRD where they lack."""

    def unbounded(schema: dict[str, Any], path: str) -> list[str]:
        found = []
        inside = rules(schema)
        if inside and schema.get("type") == "array" and "maxItems" not in schema:
            found.append(path)
        ruled = schema.get("x-kubernetes-validations") and schema.get("type") == "string"
        if ruled and "maxLength" not in schema and "enum" not in schema:
            found.append(path)
        for name, value in (schema.get("properties") or {}).items():
            found += unbounded(value, f"{path}.{name}")
        if "items" in schema:
            found += unbounded(schema["items"], f"{path}[]")
        return found

    schema = crd(resource)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert unbounded(schema, "") == []
