"""What keeps networks away from pods of the cluster's default network.

A network's pods leave by the node, and the node has routes to every pod of the default network: without this table
they would be one network in that direction. What the node itself has translated goes on: a cluster service that the
network may use has its pods there.
"""

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from vmnet.model import names
from vmnet.plan.table import Chain, Elements, Table

NAME: Final = "vmnet-default"


def table(subnets: Iterable[IPv4Network | IPv6Network]) -> Table:
    """The node's table. ``subnets``: those of the default network's pods, on all nodes."""
    found = frozenset(subnets)
    sets = {
        f"pods{version}": Elements(
            f"type ipv{version}_addr; flags interval;",
            frozenset(str(subnet) for subnet in found if subnet.version == version),
        )
        for version in (4, 6)
    }
    chain = Chain(
        (
            f'iifname "{names.JOIN_PREFIX}*" ct status & dnat == 0 ip daddr @pods4 drop',
            f'iifname "{names.JOIN_PREFIX}*" ct status & dnat == 0 ip6 daddr @pods6 drop',
        ),
        "type filter hook forward priority filter - 10; policy accept;",
    )
    return Table("inet", NAME, sets, {"forward": chain})
