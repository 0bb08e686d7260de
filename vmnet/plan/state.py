"""What the kernel has: observed state, as values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface

from vmnet.model.addresses import IPAddress, IPInterface, IPNetwork
from vmnet.model.connection import Flow
from vmnet.model.names import InterfaceName, MacAddress, NamespaceName
from vmnet.plan.table import Marks


@dataclass(frozen=True, slots=True)
class LinkState:
    """One device."""

    name: InterfaceName
    mac: MacAddress
    mtu: int
    up: bool
    kind: str = ""
    """``bridge``, ``vxlan``, ``veth`` or empty."""
    master: InterfaceName | None = None
    alias: str = ""
    addresses: frozenset[IPInterface] = frozenset()
    port: int = 0
    """UDP port of a ``vxlan``."""


@dataclass(frozen=True, slots=True)
class FdbEntry:
    """Where a MAC is. ``vtep`` is set for the entry of the VXLAN device itself."""

    mac: MacAddress
    interface: InterfaceName
    vtep: IPAddress | None = None
    asserted: bool = False
    """True for what the agent wrote (extern_learn, static), False for what the kernel learned."""


@dataclass(frozen=True, slots=True)
class NetworkState:
    """One network namespace."""

    namespace: NamespaceName
    links: Mapping[InterfaceName, LinkState] = field(default_factory=dict)
    neighbours: Mapping[IPAddress, MacAddress] = field(default_factory=dict)
    """Static neighbours of the bridge."""
    routers: Mapping[IPAddress, MacAddress] = field(default_factory=dict)
    """Static neighbours of ``rt0``."""
    tunnels: Mapping[MacAddress, IPAddress] = field(default_factory=dict)
    """FDB of ``rt0``: router MAC → VTEP."""
    routes: Mapping[IPNetwork, IPAddress | None] = field(default_factory=dict)
    """Routes over ``rt0`` with their next hops, without the connected ones; None for what is refused."""
    homes: frozenset[int] = frozenset()
    """Marks that another node's router has a rule for."""
    fdb: frozenset[FdbEntry] = frozenset()
    floods: frozenset[IPAddress] = frozenset()
    default_routes: frozenset[int] = frozenset()
    """Families (4, 6) that have a default route."""
    sets: Mapping[str, frozenset[tuple[str, ...]]] = field(default_factory=dict)
    """Elements of the nftables sets, each as its parts' text."""
    chains: frozenset[str] = frozenset()
    tables: Mapping[str, Marks] = field(default_factory=dict)
    """Tables of ``plan.table`` that are here, by identity, each with the digests it carries."""

    @property
    def open(self) -> frozenset[str]:
        """Standby ports that their guests have opened."""
        return frozenset(element[0] for element in self.sets.get("open", ()))

    @property
    def standby(self) -> frozenset[str]:
        """Ports that were created for migration targets."""
        return frozenset(element[0] for element in self.sets.get("standby", ()))

    @property
    def moved(self) -> frozenset[str]:
        """MACs whose own RARP last came over the fabric: their ports on this node are closed."""
        return frozenset(element[0] for element in self.sets.get("moved", ()))

    def waits(self, port: InterfaceName) -> bool:
        """Whether a standby port's guest has not come to it yet."""
        return port in self.standby and port not in self.open

    def ports(self) -> tuple[LinkState, ...]:
        """Pod ports on the bridge."""
        return tuple(link for link in self.links.values() if link.kind == "veth" and link.name.startswith("p"))


@dataclass(frozen=True, slots=True)
class JoinState:
    """Node end of a join veth."""

    name: InterfaceName
    ipv4: IPv4Interface | None
    ipv6: IPv6Interface | None


@dataclass(frozen=True, slots=True)
class BridgeState:
    """A bridge of the node's own."""

    mtu: int
    filters_vlans: bool = False


@dataclass(frozen=True, slots=True)
class NodeState:
    """The node's own namespace."""

    namespaces: frozenset[NamespaceName] = frozenset()
    """Network namespaces of ours that exist."""
    joins: Mapping[InterfaceName, JoinState] = field(default_factory=dict)
    mtu: int = 1500
    """MTU of the device that holds the underlay address' default route."""
    prepared: bool = False
    """The node's own table is in place, with all its chains and sets (written after the sysctls)."""
    sets: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Elements of the sets in the node's own table, as text."""
    tables: Mapping[str, Marks] = field(default_factory=dict)
    """Tables of ``plan.table`` that are here, by identity, each with the digests it carries."""
    links: frozenset[InterfaceName] = frozenset()
    """Every device of the node's own namespace."""
    locked: Mapping[InterfaceName, InterfaceName] = field(default_factory=dict)
    """Veths of pods whose eth0 is locked (``plan.lock``), by the names of the pods' ports."""
    bridges: Mapping[InterfaceName, BridgeState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PodState:
    """One interface of a pod."""

    interface: InterfaceName
    mac: MacAddress
    mtu: int
    addresses: frozenset[IPInterface]


@dataclass(frozen=True, slots=True)
class DefaultInterface:
    """A pod's interface on the default network. ``device``: its other end in the node's namespace, None if it has none.

    ``addresses`` are the global ones, without prefix lengths.
    """

    device: InterfaceName | None
    mac: MacAddress
    addresses: frozenset[IPAddress]


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A control group (version 2): its path below the hierarchy's root, and which directory of that name it is."""

    path: str
    inode: int


@dataclass(frozen=True, slots=True)
class Datagrams:
    """A conntrack entry for UDP: what was asked for, and who answers. Both are the same where nothing was translated.

    ``flow`` is what the one who asks sends, and names the entry.
    """

    asked: IPAddress
    port: int
    backend: IPAddress
    backend_port: int
    flow: Flow
