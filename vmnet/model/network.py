"""A user-defined network, as its NetworkAttachmentDefinition describes it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv6Address
from typing import Any, Final

from vmnet.model import addresses, names
from vmnet.model.addresses import IPAddress, IPNetwork
from vmnet.model.names import MacAddress, NamespaceName, NetworkId

GATEWAY_LINK_LOCAL: Final = IPv6Address("fe80::1")
"""The anycast router of every network, on every node."""
VXLAN_OVERHEAD: Final = {4: 50, 6: 70}
"""Outer Ethernet + IP + UDP + VXLAN headers, by the underlay's IP version (RFC 7348 section 5)."""


class Topology(StrEnum):
    """Values as in the NAD configuration (the API writes them capitalized)."""

    LAYER2 = "layer2"
    LAYER3 = "layer3"
    LOCALNET = "localnet"


class Role(StrEnum):
    """Values as in the NAD configuration (the API writes them capitalized)."""

    PRIMARY = "primary"
    SECONDARY = "secondary"


@dataclass(frozen=True, slots=True)
class Network:
    """One network. Equal on every node and in every namespace that shares it."""

    name: str
    id: NetworkId
    topology: Topology = Topology.LAYER2
    role: Role = Role.PRIMARY
    subnets: tuple[IPNetwork, ...] = ()
    mtu: int | None = None
    persistent: bool = False
    reserved_subnets: tuple[IPNetwork, ...] = ()
    infrastructure_subnets: tuple[IPNetwork, ...] = ()
    default_gateways: tuple[IPAddress, ...] = ()
    join_subnets: tuple[IPNetwork, ...] = ()

    @property
    def namespace(self) -> NamespaceName:
        """Network namespace that holds this network on a node."""
        return names.network_namespace(self.id)

    @property
    def l2_vni(self) -> int:
        """VNI of the bridged segment."""
        return int(self.id)

    @property
    def l3_vni(self) -> int:
        """VNI between the routers of the nodes."""
        return int(self.id) | names.L3_VNI_BIT

    @property
    def routed(self) -> bool:
        """Whether the routers of its nodes speak to each other, over ``rt0``."""
        return self.role is Role.PRIMARY or self.topology is Topology.LAYER3

    @property
    def gateways(self) -> tuple[IPAddress, ...]:
        """One per subnet: the requested one of its family, else the first usable address."""
        return tuple(self._infrastructure(subnet, 0) for subnet in self.subnets)

    @property
    def management_addresses(self) -> tuple[IPAddress, ...]:
        """One per subnet: the second usable address."""
        return tuple(self._infrastructure(subnet, 1) for subnet in self.subnets)

    @property
    def gateway_mac(self) -> MacAddress:
        """Anycast MAC of the gateway, derived from the IPv4 gateway if there is one."""
        return addresses.mac_for(sorted(self.gateways, key=lambda gateway: gateway.version)[0])

    def gateway_for(self, version: int) -> IPAddress | None:
        """Gateway of one family (4 or 6)."""
        return next((gateway for gateway in self.gateways if gateway.version == version), None)

    def subnet_for(self, version: int) -> IPNetwork | None:
        """Subnet of one family (4 or 6)."""
        return next((subnet for subnet in self.subnets if subnet.version == version), None)

    def effective_mtu(self, underlay_mtu: int, underlay_version: int) -> int:
        """MTU of the segment: what the underlay carries, or less if the network asks for less."""
        most = underlay_mtu - VXLAN_OVERHEAD[underlay_version]
        return min(self.mtu, most) if self.mtu else most

    def _infrastructure(self, subnet: IPNetwork, index: int) -> IPAddress:
        """The ``index``-th infrastructure address of a subnet (0 = gateway, 1 = management)."""
        if index == 0:
            for gateway in self.default_gateways:
                if gateway.version == subnet.version and gateway in subnet:
                    return gateway
        pools = [pool for pool in self.infrastructure_subnets if pool.version == subnet.version] or [subnet]
        taken = {gateway for gateway in self.default_gateways if gateway.version == subnet.version} if index else set()
        skip = index if not taken else 0
        for pool in pools:
            for offset in range(min(pool.num_addresses, 4)):
                candidate = pool[offset]
                # The first address of a subnet is its network (IPv4) or subnet-router anycast (IPv6) address.
                if candidate == subnet.network_address or candidate in taken:
                    continue
                if skip == 0:
                    return candidate
                skip -= 1
        raise ValueError(f"subnet {subnet} of network {self.name} has no room for gateway and management address")

    def to_nad_config(self, attachment: str) -> str:
        """``spec.config`` of the NAD ``<namespace>/<name>``."""
        config: dict[str, Any] = {
            "cniVersion": "1.1.0",
            "type": names.CNI_TYPE,
            "name": self.name,
            "netAttachDefName": attachment,
            "topology": self.topology.value,
            "role": self.role.value,
        }
        if self.mtu:
            config["mtu"] = self.mtu
        for key, value in (
            ("subnets", self.subnets),
            ("joinSubnet", self.join_subnets),
            ("reservedSubnets", self.reserved_subnets),
            ("infrastructureSubnets", self.infrastructure_subnets),
            ("defaultGatewayIPs", self.default_gateways),
        ):
            if value:
                config[key] = ",".join(str(item) for item in value)
        if self.persistent:
            config["allowPersistentIPs"] = True
        return json.dumps(config, sort_keys=True)


def from_nad(nad: Mapping[str, Any]) -> Network | None:
    """Network of a NAD object; None when the NAD is not ours. Raises ValueError naming the bad field."""
    metadata = nad.get("metadata", {})
    try:
        config = json.loads(nad.get("spec", {}).get("config") or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"spec.config is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("type") != names.CNI_TYPE:
        return None
    number = metadata.get("annotations", {}).get(names.NETWORK_ID_ANNOTATION, "")
    if not number.isdecimal() or not 1 <= int(number) <= names.MAX_NETWORK_ID:
        raise ValueError(f"metadata.annotations[{names.NETWORK_ID_ANNOTATION}] is {number!r}, not a network number")

    def split(key: str) -> list[str]:
        return [part.strip() for part in str(config.get(key, "")).split(",") if part.strip()]

    return Network(
        name=str(config["name"]),
        id=NetworkId(int(number)),
        topology=Topology(config.get("topology", "layer2")),
        role=Role(config.get("role", "secondary")),
        subnets=tuple(addresses.network(text) for text in split("subnets")),
        mtu=int(config["mtu"]) if config.get("mtu") else None,
        persistent=bool(config.get("allowPersistentIPs", False)),
        reserved_subnets=tuple(addresses.network(text) for text in split("reservedSubnets")),
        infrastructure_subnets=tuple(addresses.network(text) for text in split("infrastructureSubnets")),
        default_gateways=tuple(addresses.address(text) for text in split("defaultGatewayIPs")),
        join_subnets=tuple(addresses.network(text) for text in split("joinSubnet")),
    )
