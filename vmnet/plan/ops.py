"""Operations on one node's kernel: printable values, in the order in which they are to be carried out.

``namespace`` is a network namespace below ``/run/netns``; None stands for the node's own.
"""

from dataclasses import dataclass

from vmnet.model.addresses import IPAddress, IPInterface, IPNetwork
from vmnet.model.names import VXLAN_PORT, InterfaceName, MacAddress, NamespaceName


@dataclass(frozen=True, slots=True)
class CreateNamespace:
    """Make a network namespace with its loopback up."""

    namespace: NamespaceName


@dataclass(frozen=True, slots=True)
class DeleteNamespace:
    """Delete a network namespace and everything in it. Fine when it is gone already."""

    namespace: NamespaceName


@dataclass(frozen=True, slots=True)
class SetSysctls:
    """Write ``(key, value)`` pairs; keys as in ``net/ipv4/ip_forward``."""

    namespace: NamespaceName | None
    values: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class CreateBridge:
    """The L2 segment. Multicast snooping is off: a guest's MLD query could otherwise starve neighbour discovery."""

    namespace: NamespaceName
    name: InterfaceName
    mac: MacAddress
    mtu: int


@dataclass(frozen=True, slots=True)
class CreateVxlan:
    """A VTEP made in the node's namespace, where its UDP socket stays, and moved into the network's.

    ``mac``: the kernel draws one when it is None. Without ``learning`` only written entries say where a MAC is.
    """

    namespace: NamespaceName
    name: InterfaceName
    vni: int
    local: IPAddress
    mtu: int
    mac: MacAddress | None = None
    learning: bool = True
    port: int = VXLAN_PORT


@dataclass(frozen=True, slots=True)
class CreateLocalnet:
    """The veth between a network namespace and a bridge of the node, as an untagged port of ``vlan`` if that is set.

    ``mtu`` is the bridge's: the kernel would lower that to a port's.
    """

    namespace: NamespaceName
    node_end: InterfaceName
    network_end: InterfaceName
    bridge: InterfaceName
    mtu: int
    vlan: int | None = None


@dataclass(frozen=True, slots=True)
class CreateJoin:
    """The veth between the node and a network namespace."""

    namespace: NamespaceName
    node_end: InterfaceName
    network_end: InterfaceName
    mtu: int


@dataclass(frozen=True, slots=True)
class CreatePort:
    """The veth of one pod interface, attached to the bridge. ``alias`` says which container it belongs to."""

    namespace: NamespaceName
    port: InterfaceName
    bridge: InterfaceName
    pod_netns: str
    interface: InterfaceName
    mac: MacAddress
    mtu: int
    alias: str


@dataclass(frozen=True, slots=True)
class AttachToBridge:
    """Make a device a bridge port and bring it up.

    ``hairpin``: frames may leave by the port that they came from. Never for a way to other bridges: it makes a loop.
    """

    namespace: NamespaceName
    interface: InterfaceName
    bridge: InterfaceName
    neigh_suppress: bool = False
    hairpin: bool = False


@dataclass(frozen=True, slots=True)
class SetUp:
    """Bring a device up."""

    namespace: NamespaceName | None
    interface: InterfaceName


@dataclass(frozen=True, slots=True)
class DeleteLink:
    """Delete a device. Fine when it is gone already."""

    namespace: NamespaceName | None
    interface: InterfaceName


@dataclass(frozen=True, slots=True)
class AddAddress:
    """Give a device an address, without duplicate address detection."""

    namespace: NamespaceName | None
    interface: InterfaceName
    address: IPInterface


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    """Fine when it is gone already."""

    namespace: NamespaceName | None
    interface: InterfaceName
    address: IPInterface


@dataclass(frozen=True, slots=True)
class AddDefaultRoute:
    """Default route of one family."""

    namespace: NamespaceName
    interface: InterfaceName
    gateway: IPAddress


@dataclass(frozen=True, slots=True)
class SetRoute:
    """Route to a network by way of another node's router, whatever route to it was there before.

    Without ``gateway`` what goes there is refused, unless a longer route says otherwise.
    """

    namespace: NamespaceName
    interface: InterfaceName
    destination: IPNetwork
    gateway: IPAddress | None


@dataclass(frozen=True, slots=True)
class RemoveRoute:
    """Fine when it is gone already."""

    namespace: NamespaceName
    interface: InterfaceName
    destination: IPNetwork
    gateway: IPAddress | None


@dataclass(frozen=True, slots=True)
class SetHomeRoute:
    """What carries ``mark`` goes to another node's router, one gateway per family. The table has the mark's number."""

    namespace: NamespaceName
    interface: InterfaceName
    mark: int
    gateways: tuple[IPAddress, ...]


@dataclass(frozen=True, slots=True)
class SetNeighbour:
    """Static neighbour: the node must never ask for a remote endpoint from the anycast address."""

    namespace: NamespaceName
    interface: InterfaceName
    address: IPAddress
    mac: MacAddress


@dataclass(frozen=True, slots=True)
class RemoveNeighbour:
    """Fine when it is gone already."""

    namespace: NamespaceName
    interface: InterfaceName
    address: IPAddress


@dataclass(frozen=True, slots=True)
class SetFdb:
    """Where a MAC is: behind a local port, or behind ``vtep`` when ``interface`` is the VXLAN. Movable by learning."""

    namespace: NamespaceName
    interface: InterfaceName
    mac: MacAddress
    vtep: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class RemoveFdb:
    """Fine when it is gone already."""

    namespace: NamespaceName
    interface: InterfaceName
    mac: MacAddress
    vtep: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class SetTunnel:
    """Behind which VTEP a router's MAC is, on a VXLAN outside of any bridge. Only another such entry moves it."""

    namespace: NamespaceName
    interface: InterfaceName
    mac: MacAddress
    vtep: IPAddress


@dataclass(frozen=True, slots=True)
class RemoveTunnel:
    """Fine when it is gone already."""

    namespace: NamespaceName
    interface: InterfaceName
    mac: MacAddress
    vtep: IPAddress


@dataclass(frozen=True, slots=True)
class AddFlood:
    """Replicate broadcast and unknown frames to a VTEP."""

    namespace: NamespaceName
    interface: InterfaceName
    vtep: IPAddress


@dataclass(frozen=True, slots=True)
class RemoveFlood:
    """Fine when it is gone already."""

    namespace: NamespaceName
    interface: InterfaceName
    vtep: IPAddress


@dataclass(frozen=True, slots=True)
class LoadFirewall:
    """Run an nftables script as one transaction."""

    namespace: NamespaceName | None
    script: str


@dataclass(frozen=True, slots=True)
class ConfigurePod:
    """Inside a pod: addresses, default routes by the network's gateway, and eth0 only for replies of its own address.

    ``default_addresses``: eth0's addresses, each with the gateway it had. ``routes``: what else is reached by the
    network, each with its next hop.
    """

    netns: str
    interface: InterfaceName
    default_interface: InterfaceName
    addresses: tuple[IPInterface, ...]
    gateways: tuple[IPAddress, ...]
    default_addresses: tuple[tuple[IPInterface, IPAddress | None], ...] = ()
    routes: tuple[tuple[IPNetwork, IPAddress], ...] = ()


Op = (
    CreateNamespace
    | DeleteNamespace
    | SetSysctls
    | CreateBridge
    | CreateVxlan
    | CreateJoin
    | CreateLocalnet
    | CreatePort
    | AttachToBridge
    | SetUp
    | DeleteLink
    | AddAddress
    | RemoveAddress
    | AddDefaultRoute
    | SetRoute
    | RemoveRoute
    | SetHomeRoute
    | SetNeighbour
    | RemoveNeighbour
    | SetFdb
    | RemoveFdb
    | SetTunnel
    | RemoveTunnel
    | AddFlood
    | RemoveFlood
    | LoadFirewall
    | ConfigurePod
)
