"""From a UserDefinedNetwork or ClusterUserDefinedNetwork to the network it describes."""

from collections.abc import Mapping
from typing import Any

from vmnet.kube.api import Object
from vmnet.model import addresses, names
from vmnet.model.addresses import IPNetwork
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role, Topology, divided


def is_cluster(item: Object) -> bool:
    """True for a ClusterUserDefinedNetwork."""
    return not item["metadata"].get("namespace")


def network_name(item: Object) -> str:
    """The network's name in the cluster."""
    metadata = item["metadata"]
    if is_cluster(item):
        return names.cudn_network_name(metadata["name"])
    return names.udn_network_name(metadata["namespace"], metadata["name"])


def network_spec(item: Object) -> Mapping[str, Any]:
    """The part that both kinds share: topology and its block."""
    spec: Mapping[str, Any] = item.get("spec") or {}
    return (spec.get("network") or {}) if is_cluster(item) else spec


def to_network(item: Object, number: NetworkId) -> Network:
    """The network. Raises ValueError, naming the field, for what the API server should have refused or we cannot do."""
    spec = network_spec(item)
    try:
        topology = Topology(str(spec.get("topology", "")).lower())
    except ValueError as error:
        raise ValueError(f"topology: {spec.get('topology')!r} is not a topology") from error
    if topology is Topology.LOCALNET and not is_cluster(item):
        raise ValueError("topology: only a ClusterUserDefinedNetwork can be Localnet")
    block = spec.get(topology.value)
    if not isinstance(block, dict):
        raise ValueError(f"{topology.value}: must be set when topology is {spec['topology']}")
    ipam = block.get("ipam") or {}
    try:
        subnets, host_prefixes = _subnets(topology, block)
        network = Network(
            name=network_name(item),
            id=number,
            topology=topology,
            role=Role(str(block.get("role", "")).lower()),
            subnets=subnets,
            host_prefixes=host_prefixes,
            mtu=block.get("mtu"),
            persistent=ipam.get("lifecycle") == "Persistent",
            reserved_subnets=tuple(addresses.network(text) for text in block.get("reservedSubnets") or []),
            infrastructure_subnets=tuple(
                addresses.network(text)
                for key in ("infrastructureSubnets", "excludeSubnets")
                for text in block.get(key) or []
            ),
            default_gateways=tuple(addresses.address(text) for text in block.get("defaultGatewayIPs") or []),
            join_subnets=tuple(addresses.network(text) for text in block.get("joinSubnets") or []),
            physical=str(block.get("physicalNetworkName") or ""),
            vlan=((block.get("vlan") or {}).get("access") or {}).get("id"),
        )
        # Raises for subnets too small to hold gateway and management address.
        _ = network.gateways, network.management_addresses
    except (ValueError, IndexError) as error:
        raise ValueError(f"{topology.value}: {error}") from error
    if topology is Topology.LOCALNET and not network.physical:
        raise ValueError("localnet.physicalNetworkName: must be set")
    if not network.subnets and (network.role is Role.PRIMARY or topology is Topology.LAYER3):
        raise ValueError(f"{topology.value}.subnets: a {block.get('role')} network needs one")
    return network


def _subnets(topology: Topology, block: Mapping[str, Any]) -> tuple[tuple[IPNetwork, ...], tuple[int, ...]]:
    """Subnets and, for Layer3, the prefix lengths of the nodes' parts. Raises ValueError."""
    listed = block.get("subnets") or []
    if topology is not Topology.LAYER3:
        return tuple(addresses.network(text) for text in listed), ()
    pairs = []
    for entry in listed:
        host = entry.get("hostSubnet")
        pairs.append(divided(f"{entry['cidr']}/{host}" if host else entry["cidr"]))
    return tuple(subnet for subnet, _ in pairs), tuple(prefix for _, prefix in pairs)
