"""A user-defined network, as its NetworkAttachmentDefinition describes it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import IPv6Address
from typing import Any, Final

from vmnet.model import addresses, names
from vmnet.model.addresses import IPAddress, IPInterface, IPNetwork
from vmnet.model.names import MacAddress, NamespaceName, NetworkId

GATEWAY_LINK_LOCAL: Final = IPv6Address("fe80::1")
"""The anycast router of every network, on every node."""
VXLAN_OVERHEAD: Final = {4: 50, 6: 70}
"""Outer Ethernet + IP + UDP + VXLAN headers, by the underlay's IP version (RFC 7348 section 5)."""
HOST_PREFIXES: Final = {4: 24, 6: 64}
"""Prefix length of a node's part of a Layer3 network that does not say another, by IP version."""


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
    """One network. Equal on every node and in every namespace that shares it, but for ``parts``.

    A Layer3 network may have several ``subnets`` of a family: they are what the nodes' parts are cut from.
    """

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
    host_prefixes: tuple[int, ...] = ()
    """Layer3: prefix length of a node's part, one for each of ``subnets``."""
    parts: tuple[IPNetwork, ...] = ()
    """Layer3, as one node sees it (``at``): the subnets of its own segment."""
    physical: str = ""
    """Localnet: name of the physical network, which each node maps to one of its bridges."""
    vlan: int | None = None
    """Localnet: VLAN id (IEEE 802.1Q) that its frames have on that bridge."""

    def at(self, parts: Iterable[IPNetwork]) -> "Network":
        """The network as the node sees it that has these parts; one that is not Layer3 is the same everywhere."""
        return self if self.stretched else replace(self, parts=tuple(parts))

    def around(self, interfaces: Iterable[IPInterface]) -> "Network":
        """The network as the node sees it that holds an endpoint with these addresses."""
        return self.at(item.network for item in interfaces)

    @property
    def stretched(self) -> bool:
        """Whether all its nodes share one segment; a Layer3 network has one on each node and routes between them."""
        return self.topology is not Topology.LAYER3

    @property
    def overlaid(self) -> bool:
        """Whether its frames go from node to node inside VXLAN; the nodes' own network carries a Localnet one."""
        return self.topology is not Topology.LOCALNET

    @property
    def segments(self) -> tuple[IPNetwork, ...]:
        """Subnets on ``br0``."""
        return self.subnets if self.stretched else self.parts

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
        return self.role is Role.PRIMARY or not self.stretched

    @property
    def joined(self) -> bool:
        """Whether its routers have a way out by the node: egress, services."""
        return self.role is Role.PRIMARY

    @property
    def pod_routes(self) -> tuple[tuple[IPNetwork, IPAddress], ...]:
        """Routes that a pod on this node's segment needs beside the connected one, each with its next hop.

        A primary network needs none: the pod's default route leads there.
        """
        if self.stretched or self.role is Role.PRIMARY:
            return ()
        return tuple((subnet, hop) for subnet in self.subnets if (hop := self.gateway_for(subnet.version)))

    @property
    def gateways(self) -> tuple[IPAddress, ...]:
        """One per segment: the requested one of its family, else the first usable address.

        A network that has no routers of ours has only those that were asked for: something else answers there.
        """
        if not self.routed:
            return self.default_gateways
        return tuple(self._infrastructure(subnet, 0) for subnet in self.segments)

    @property
    def management_addresses(self) -> tuple[IPAddress, ...]:
        """One per segment: the second usable address. None where no router of ours needs one."""
        return tuple(self._infrastructure(subnet, 1) for subnet in self.segments) if self.routed else ()

    @property
    def gateway_mac(self) -> MacAddress:
        """Anycast MAC of the gateway, derived from the IPv4 gateway if all nodes have the same one.

        Without routers it is only what the bridges and the DHCP replies carry, derived from the network's name.
        """
        if not self.routed:
            digest = hashlib.sha256(f"bridge of {self.name}".encode()).digest()
            return MacAddress("0a:58:" + ":".join(f"{byte:02x}" for byte in digest[:4]))
        gateways = self.gateways if self.stretched else ()
        return addresses.mac_for(min(gateways, key=lambda gateway: gateway.version, default=GATEWAY_LINK_LOCAL))

    def gateway_for(self, version: int) -> IPAddress | None:
        """Gateway of one family (4 or 6)."""
        return next((gateway for gateway in self.gateways if gateway.version == version), None)

    def subnet_for(self, version: int) -> IPNetwork | None:
        """Subnet of one family (4 or 6) on ``br0``."""
        return next((subnet for subnet in self.segments if subnet.version == version), None)

    def effective_mtu(self, underlay_mtu: int, underlay_version: int) -> int:
        """MTU of the segment: what the underlay carries, or less if the network asks for less."""
        most = underlay_mtu - (VXLAN_OVERHEAD[underlay_version] if self.overlaid else 0)
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

    def _subnet_texts(self) -> tuple[str, ...]:
        if self.stretched:
            return tuple(map(str, self.subnets))
        return tuple(f"{subnet}/{host}" for subnet, host in zip(self.subnets, self.host_prefixes, strict=True))

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
            ("subnets", self._subnet_texts()),
            ("joinSubnet", self.join_subnets),
            ("reservedSubnets", self.reserved_subnets),
            (_withheld(self.topology), self.infrastructure_subnets),
            ("defaultGatewayIPs", self.default_gateways),
        ):
            if value:
                config[key] = ",".join(str(item) for item in value)
        if self.persistent:
            config["allowPersistentIPs"] = True
        if self.physical:
            config["physicalNetworkName"] = self.physical
        if self.vlan is not None:
            config["vlanID"] = self.vlan
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

    topology = Topology(config.get("topology", "layer2"))
    subnets: tuple[IPNetwork, ...]
    host_prefixes: tuple[int, ...] = ()
    if topology is Topology.LAYER3:
        pairs = [divided(text) for text in split("subnets")]
        subnets, host_prefixes = tuple(subnet for subnet, _ in pairs), tuple(host for _, host in pairs)
    else:
        subnets = tuple(addresses.network(text) for text in split("subnets"))
    return Network(
        name=str(config["name"]),
        id=NetworkId(int(number)),
        topology=topology,
        role=Role(config.get("role", "secondary")),
        subnets=subnets,
        mtu=int(config["mtu"]) if config.get("mtu") else None,
        persistent=bool(config.get("allowPersistentIPs", False)),
        reserved_subnets=tuple(addresses.network(text) for text in split("reservedSubnets")),
        infrastructure_subnets=tuple(addresses.network(text) for text in split(_withheld(topology))),
        default_gateways=tuple(addresses.address(text) for text in split("defaultGatewayIPs")),
        join_subnets=tuple(addresses.network(text) for text in split("joinSubnet")),
        host_prefixes=host_prefixes,
        physical=str(config.get("physicalNetworkName", "")),
        vlan=int(config["vlanID"]) if config.get("vlanID") else None,
    )


def _withheld(topology: Topology) -> str:
    """Key of the ranges that workloads never get."""
    return "excludeSubnets" if topology is Topology.LOCALNET else "infrastructureSubnets"


def divided(text: str) -> tuple[IPNetwork, int]:
    """``103.103.0.0/16/24``: a range, and the prefix length of the parts that nodes get of it. Raises ValueError.

    Without the second length it is the usual one; a part has room for gateway, management address and one workload.
    """
    cidr, separator, host = text.partition("/")
    length, separator, host = host.partition("/")
    subnet = addresses.network(f"{cidr}/{length}" if length else cidr)
    if separator and not (host.isascii() and host.isdecimal()):
        raise ValueError(f"subnet {text}: {host!r} is not a prefix length")
    prefix = int(host) if separator else HOST_PREFIXES[subnet.version]
    most = 29 if subnet.version == 4 else 126
    if not subnet.prefixlen <= prefix <= most:
        raise ValueError(f"subnet {subnet}: nodes cannot have /{prefix} of it, only /{subnet.prefixlen} … /{most}")
    return subnet, prefix
