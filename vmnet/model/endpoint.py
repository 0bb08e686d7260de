"""Endpoints: one interface of one pod on one network, and what a node must render for them."""

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Interface, IPv6Interface

from vmnet.model import addresses, names
from vmnet.model.addresses import IPAddress, IPInterface, IPNetwork
from vmnet.model.names import InterfaceName, MacAddress
from vmnet.model.network import Network


class PortState(StrEnum):
    """What a port may do when it is created; afterwards the kernel's sets hold the truth."""

    ACTIVE = "active"
    STANDBY = "standby"
    """Migration target: closed both ways until the guest's own RARP, or the second key, opens it."""


@dataclass(frozen=True, slots=True, order=True)
class PodReference:
    """Which pod; ``uid`` tells a pod from its successor of the same name."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True, order=True)
class MachineReference:
    """Which VM (KubeVirt): the name that DNS, DHCP and claims use."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One interface of one pod. ``addresses`` carry the subnet's prefix length, IPv4 first."""

    pod: PodReference
    network: str
    node: str
    mac: MacAddress
    addresses: tuple[IPInterface, ...]
    interface: InterfaceName = names.PRIMARY_INTERFACE
    machine: MachineReference | None = None
    hostname: str = ""

    @property
    def port(self) -> InterfaceName:
        """Its port on ``br0`` of its node."""
        return names.port_interface(self.pod.uid, self.interface)

    @property
    def ipv4(self) -> IPv4Interface | None:
        """The IPv4 address, if any."""
        return next((item for item in self.addresses if isinstance(item, IPv4Interface)), None)

    @property
    def ipv6(self) -> IPv6Interface | None:
        """The global IPv6 address, if any."""
        return next((item for item in self.addresses if isinstance(item, IPv6Interface)), None)

    @property
    def all_addresses(self) -> tuple[IPAddress, ...]:
        """What the port may use as source: its addresses and its EUI-64 link-local address."""
        return (*(item.ip for item in self.addresses), addresses.link_local(self.mac))


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the fabric sees it. ``address``: underlay address (InternalIP), the VTEP.

    ``number``: its cluster-wide number, once the controller has given it one. ``subnets``: network name and the node's
    part of a Layer3 network, one pair per network that has a part here. ``pods``: its part of the default network.
    """

    name: str
    address: IPAddress
    number: int | None = None
    subnets: tuple[tuple[str, tuple[IPNetwork, ...]], ...] = ()
    pods: tuple[IPNetwork, ...] = ()

    @property
    def router_mac(self) -> MacAddress:
        """Source MAC of frames this node routes to remote endpoints."""
        return names.router_mac(self.name)

    @property
    def transit(self) -> tuple[IPInterface, ...]:
        """Addresses of its routers on ``rt0``, IPv4 first; the same in every network. Empty without a number."""
        return addresses.transit(self.number) if self.number is not None else ()


@dataclass(frozen=True, slots=True)
class LocalPort:
    """A port on this node."""

    endpoint: Endpoint
    state: PortState = PortState.ACTIVE


@dataclass(frozen=True, slots=True)
class RemoteEndpoint:
    """An endpoint that lives behind another node's VTEP."""

    endpoint: Endpoint
    vtep: IPAddress
    settled: bool = True
    """False while a migration is under way: the machine's own frames move its FDB entry then."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where the connections over the network's edge were begun of a machine that has come here from another node."""

    address: IPAddress
    node: Node


@dataclass(frozen=True, slots=True)
class Join:
    """The veth between the node and the network namespace: a /30 and a /126, numbered by this node alone.

    The node has the first usable address of each, the network namespace (``up0``) the second.
    """

    index: int
    node_ipv4: IPv4Interface
    network_ipv4: IPv4Interface
    node_ipv6: IPv6Interface
    network_ipv6: IPv6Interface


@dataclass(frozen=True, slots=True)
class NodeNetwork:
    """Everything one node must render for one network: the desired state of ``plan.network``."""

    network: Network
    node: Node
    mtu: int
    join: Join
    ports: tuple[LocalPort, ...] = ()
    remotes: tuple[RemoteEndpoint, ...] = ()
    peers: tuple[IPAddress, ...] = ()
    """VTEPs of the other nodes that host this network: broadcast and unknown frames are replicated to them."""
    routers: tuple[Node, ...] = ()
    """The other nodes whose routers this one reaches over ``rt0``."""
    homes: tuple[Home, ...] = ()
    former: tuple[Node, ...] = ()
    """Nodes where connections were begun, beside ``homes``: of machines that have come here over others."""
    bridge: InterfaceName | None = None
    """Localnet: the node's own bridge that carries the segment."""
    bridge_mtu: int = 0
    vxlan_port: int = names.VXLAN_PORT
    """UDP port of the tunnels, the same on all nodes."""
