"""Connections over the network's edge that stay with the node where they were begun, wherever their machine goes.

Address translation is remembered by one node's conntrack alone. When a machine comes to another node, its connections
to the outside go on to send; what they send has no entry here, and is neither SYN nor RST. Such a packet marks its new
entry with the node that the machine came from, and goes over ``rt0`` to that node's router, which knows the connection
or, by its own mark, where it came from in its turn. What is new begins here. What comes from the outside needs nothing:
it enters where it always did and reaches the machine on the segment (docs/architecture.md, "Datapath").
"""

from collections.abc import Iterable, Sequence
from typing import Final

from vmnet.model import names
from vmnet.model.addresses import TRANSIT_IPV4, TRANSIT_IPV6, IPNetwork
from vmnet.model.endpoint import NodeNetwork
from vmnet.plan import ops
from vmnet.plan.ops import Op
from vmnet.plan.state import NetworkState
from vmnet.plan.table import Chain, Elements, Table

MASK: Final = 0xFF000000
_KEYWORD: Final = {4: "ip", 6: "ip6"}
_TYPE: Final = {4: "ipv4_addr", 6: "ipv6_addr"}
_TRANSIT: Final = {4: TRANSIT_IPV4, 6: TRANSIT_IPV6}
_UNKNOWN: Final = "ct state new tcp flags & (syn | rst) == 0x0"
"""A connection's middle, seen for the first time."""


def mark(number: int) -> int:
    """Mark of what belongs to the router of the node with this number."""
    return names.HOME_MARK | number


def tables(desired: NodeNetwork) -> tuple[Table, ...]:
    """The table of a network whose machines keep their addresses; none for others."""
    network = desired.network
    if not network.persistent or not network.routed:
        return ()
    sets: dict[str, Elements] = {}
    middle: list[str] = []
    marked: list[str] = []
    for version in sorted({subnet.version for subnet in network.subnets}):
        own = [subnet for subnet in network.subnets if subnet.version == version]
        homes = {
            str(home.address): f"{mark(home.node.number):#x}"
            for home in desired.homes
            if home.address.version == version and home.node.number is not None
        }
        kind, protocol = _TYPE[version], _KEYWORD[version]
        sets[f"inside{version}"] = Elements(f"type {kind}; flags interval;", _texts(own) | {str(_TRANSIT[version])})
        sets[f"own{version}"] = Elements(f"type {kind}; flags interval;", _texts(own))
        sets[f"home{version}"] = Elements(f"type {kind} : mark;", homes)
        middle += [
            f"{protocol} daddr != @inside{version} ct mark set {protocol} saddr map @home{version}",
            # Seen only by a bridge with br_netfilter: the outside speaks first, and its entry is the wrong way round.
            f"{protocol} saddr != @inside{version} ct mark set {protocol} daddr map @home{version}",
        ]
        marked.append(f"{protocol} saddr @own{version} meta mark set ct mark")
    # Every packet passes these two rules; nearly all pass no others.
    rules = (f"{_UNKNOWN} jump middle", f"ct mark & {MASK:#x} == {names.HOME_MARK:#x} jump marked")
    chains = {
        "middle": Chain(tuple(middle)),
        "marked": Chain(tuple(marked)),
        "prerouting": Chain(rules, "type filter hook prerouting priority mangle; policy accept;"),
    }
    return (Table("inet", "vmnet-edge", sets, chains),)


def routes(desired: NodeNetwork, state: NetworkState) -> Iterable[Op]:
    """A rule and a route for every home. None is ever taken away: connections may still carry its mark."""
    for node in sorted({*(home.node for home in desired.homes), *desired.former}, key=lambda node: node.name):
        if node.number is not None and mark(node.number) not in state.homes:
            gateways = tuple(item.ip for item in node.transit)
            yield ops.SetHomeRoute(desired.network.namespace, names.VXLAN_L3, mark(node.number), gateways)


def _texts(subnets: Sequence[IPNetwork]) -> frozenset[str]:
    return frozenset(str(subnet) for subnet in subnets)
