"""The node's own namespace: forwarding, translation of what leaves by it, and the numbering of joins."""

from collections.abc import Collection, Sequence
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, collapse_addresses
from types import MappingProxyType
from typing import Final

from vmnet.model import names
from vmnet.model.addresses import IPAddress, IPNetwork
from vmnet.model.endpoint import Join
from vmnet.model.names import NetworkId
from vmnet.plan import firewall, ops
from vmnet.plan.network import Held, load_tables
from vmnet.plan.ops import Op
from vmnet.plan.state import NodeState
from vmnet.plan.table import Table

JOIN_IPV4: Final = IPv4Network("100.65.0.0/16")
JOIN_IPV6: Final = IPv6Network("fd99::/64")

SYSCTLS: Final = (
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
)


class JoinsExhausted(Exception):
    """More networks on this node than the join subnet has room for."""


def plan(
    observed: NodeState,
    pools: Sequence[IPv4Network | IPv6Network] = (JOIN_IPV4, JOIN_IPV6),
    *,
    vxlan_port: int = names.VXLAN_PORT,
    vteps: Collection[IPAddress] = (),
    networks: Collection[NetworkId] = (),
    pods: Collection[IPNetwork] = (),
    services: Collection[IPAddress] = (),
    tables: Sequence[Table] = (),
    held: Held = MappingProxyType({}),
) -> tuple[Op, ...]:
    """Operations that let networks leave by the node; empty when they can.

    ``vteps``: underlay addresses of the *other* nodes; only they may speak VXLAN, at UDP port ``vxlan_port``, for
    ``networks``, those that are on this node or about to be. ``pods``: subnets of the default network; ``services``:
    addresses that networks may ask. To be planned again whenever one of these changes. ``tables``: what else the
    node's own namespace shall hold.
    """
    wanted = {
        "vteps4": {str(item) for item in vteps if item.version == 4},
        "vteps6": {str(item) for item in vteps if item.version == 6},
        **{f"pods{version}": _subnets(pods, version) for version in (4, 6)},
        **{f"services{version}": {str(item) for item in services if item.version == version} for version in (4, 6)},
        "tunnels": {str(vxlan_port)},
        "vnis": {str(vni) for number in networks for vni in (number, number | names.L3_VNI_BIT)},
    }
    present = {name: set(observed.sets.get(name, ())) if observed.prepared else set() for name in wanted}
    elements = firewall.node_elements_script(
        {name: wanted[name] - present[name] for name in wanted}, {name: present[name] - wanted[name] for name in wanted}
    )
    found: list[Op] = []
    if not observed.prepared:
        # One transaction: without it there would be a moment in which the table lets no node speak.
        script = firewall.node_script(str(pool) for pool in pools) + elements
        found += [ops.SetSysctls(None, SYSCTLS), ops.LoadFirewall(None, script)]
    elif elements:
        found.append(ops.LoadFirewall(None, elements))
    found += load_tables(None, observed.tables, tables, held)
    return tuple(found)


def _subnets(found: Collection[IPNetwork], version: int) -> set[str]:
    """As nft lists them; those that overlap are one, for a set of intervals refuses them."""
    ipv4 = (item for item in found if isinstance(item, IPv4Network))
    ipv6 = (item for item in found if isinstance(item, IPv6Network))
    merged = collapse_addresses(ipv4) if version == 4 else collapse_addresses(ipv6)
    return {str(item) if item.num_addresses > 1 else str(item.network_address) for item in merged}


def allocate_join(
    observed: NodeState,
    network_id: NetworkId,
    promised: frozenset[int] = frozenset(),
    ipv4: IPv4Network = JOIN_IPV4,
    ipv6: IPv6Network = JOIN_IPV6,
) -> Join:
    """The join of a network: the one it has, else the lowest number that is neither used nor ``promised`` to another.

    Raises JoinsExhausted.
    """
    name = names.join_interface(network_id)
    taken = set(promised) | {
        (int(state.ipv4.ip) - int(ipv4.network_address)) // 4
        for state in observed.joins.values()
        if state.ipv4 is not None and state.ipv4.ip in ipv4 and state.name != name
    }
    existing = observed.joins.get(name)
    if existing is not None and existing.ipv4 is not None and existing.ipv4.ip in ipv4:
        index = (int(existing.ipv4.ip) - int(ipv4.network_address)) // 4
    else:
        room = ipv4.num_addresses // 4
        index = next((number for number in range(1, room) if number not in taken), 0)
        if not index:
            raise JoinsExhausted(f"{room - 1} networks use all of the join subnet {ipv4}")
    first4, first6 = ipv4.network_address + 4 * index, ipv6.network_address + 4 * index
    return Join(
        index=index,
        node_ipv4=IPv4Interface((int(first4) + 1, 30)),
        network_ipv4=IPv4Interface((int(first4) + 2, 30)),
        node_ipv6=IPv6Interface((int(first6) + 1, 126)),
        network_ipv6=IPv6Interface((int(first6) + 2, 126)),
    )
