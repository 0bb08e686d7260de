"""Whether a network, as the kernel shows it, can carry what it is there for.

Not whether everything is as planned (``plan`` says that): only what nobody but the agent changes, so that a difference
is a fault and not a change that is on its way. What guests' frames and other nodes move is left out.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from vmnet.model import names
from vmnet.model.endpoint import NodeNetwork, PodReference
from vmnet.model.names import InterfaceName
from vmnet.plan import firewall
from vmnet.plan.network import Held
from vmnet.plan.state import LinkState, NetworkState, NodeState

Ports = Mapping[InterfaceName, PodReference]


class Part(StrEnum):
    """Which part of a network is at fault; a label of metrics, so there are few."""

    NAMESPACE = "namespace"
    BRIDGE = "bridge"
    GATEWAY = "gateway"
    TUNNEL = "tunnel"
    JOIN = "join"
    TABLES = "tables"
    PORT = "port"
    POD = "pod"
    """It has lost its interface: only a new pod gets another."""
    ANSWER = "answer"
    """The gateway's address has all it needs, and does not answer."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is not there or not as it must be; ``says`` names it."""

    part: Part
    says: str


def faults(
    desired: NodeNetwork,
    observed: NetworkState | None,
    held: Held = MappingProxyType({}),
    ports: Ports = MappingProxyType({}),
) -> tuple[Fault, ...]:
    """What is wrong; nothing when all is well. ``held``: the tables that were loaded; ``ports``: of pods that live."""
    if observed is None:
        return (Fault(Part.NAMESPACE, f"network namespace {desired.network.namespace} is gone"),)
    return tuple(_faults(desired, observed, held, ports))


def node_faults(observed: NodeState, held: Held) -> tuple[Fault, ...]:
    """The same of the node's own namespace."""
    found = []
    if not observed.prepared:
        found.append(Fault(Part.TABLES, f"the node's table {firewall.NODE_TABLE} is gone or incomplete"))
    found += _tables(observed.tables, held, "the node's ")
    return tuple(found)


def _faults(desired: NodeNetwork, observed: NetworkState, held: Held, ports: Ports) -> Iterator[Fault]:
    network, links = desired.network, observed.links
    yield from _link(Part.BRIDGE, links, names.BRIDGE)
    if network.stretched and (network.overlaid or desired.bridge is not None):
        yield from _link(Part.TUNNEL, links, names.VXLAN_L2, names.BRIDGE)
    if network.routed:
        yield from _gateways(desired, links.get(names.BRIDGE))
        if desired.node.transit:
            yield from _link(Part.TUNNEL, links, names.VXLAN_L3)
            yield from _addresses(Part.TUNNEL, links.get(names.VXLAN_L3), map(str, desired.node.transit))
    if network.joined:
        yield from _link(Part.JOIN, links, names.UPLINK)
        inside = (str(desired.join.network_ipv4), str(desired.join.network_ipv6))
        yield from _addresses(Part.JOIN, links.get(names.UPLINK), inside)
        if observed.default_routes < {4, 6} and names.UPLINK in links:
            yield Fault(Part.JOIN, f"no default route over {names.UPLINK}")
    if "port_in" not in observed.chains:
        yield Fault(Part.TABLES, f"table {firewall.TABLE} is gone")
    yield from _tables(observed.tables, held)
    for link in observed.ports():
        if link.name in ports and (not link.up or link.master != names.BRIDGE):
            yield Fault(Part.PORT, f"port {link.name} is not up on {names.BRIDGE}")
        elif link.name in ports and not set(firewall.chains_of(link.name)) <= observed.chains:
            yield Fault(Part.PORT, f"port {link.name} is not bound to its addresses")
    for name in sorted(ports.keys() - links.keys()):
        pod = ports[name]
        yield Fault(Part.POD, f"pod {pod.namespace}/{pod.name} has lost its port {name}: delete the pod")


def _gateways(desired: NodeNetwork, bridge: LinkState | None) -> Iterator[Fault]:
    have = {str(item.ip) for item in bridge.addresses} if bridge else set()
    for gateway in desired.network.gateways:
        if bridge is not None and str(gateway) not in have:
            yield Fault(Part.GATEWAY, f"{names.BRIDGE} lacks gateway address {gateway}")


def _link(
    part: Part, links: Mapping[InterfaceName, LinkState], name: InterfaceName, master: InterfaceName | None = None
) -> Iterator[Fault]:
    link = links.get(name)
    if link is None:
        yield Fault(part, f"{name} is gone")
    elif not link.up:
        yield Fault(part, f"{name} is down")
    elif master is not None and link.master != master:
        yield Fault(part, f"{name} is not on {master}")


def _addresses(part: Part, link: LinkState | None, wanted: Iterable[str]) -> Iterator[Fault]:
    have = {str(item) for item in link.addresses} if link else set()
    for address in wanted:
        if link is not None and address not in have:
            yield Fault(part, f"{link.name} lacks address {address}")


def _tables(observed: Mapping[str, tuple[str, ...]], held: Held, whose: str = "") -> Iterator[Fault]:
    for identity, table in held.items():
        marks = observed.get(identity)
        if marks is None:
            yield Fault(Part.TABLES, f"{whose}table {identity} is gone")
        elif marks[-1:] != (table.digest,):
            yield Fault(Part.TABLES, f"{whose}table {identity} is not as it was loaded")
