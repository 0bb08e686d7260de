"""What the product needs of the Linux kernel. ``linux`` is the real one, ``fake`` the stateful stand-in for tests."""

import socket
from collections.abc import Collection, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from vmnet.model.addresses import IPAddress
from vmnet.model.connection import Connection, Flow, Outcome
from vmnet.model.names import InterfaceName, MacAddress, NamespaceName
from vmnet.plan.ops import Op
from vmnet.plan.state import Cgroup, Datagrams, DefaultInterface, NetworkState, NodeState, PodState


class KernelError(Exception):
    """An operation failed: ``op`` is what was tried, ``errno`` the kernel's answer (0 when it gave none)."""

    def __init__(self, message: str, *, op: Op | None = None, errno: int = 0) -> None:
        super().__init__(message)
        self.op = op
        self.errno = errno


class Gone(KernelError):
    """The namespace or interface vanished meanwhile: observe again."""


class Unsupported(KernelError):
    """This kernel lacks what the operation needs; the message says which module or option. Terminal."""


class LastFrame(Protocol):
    """The last frame that came in by an interface with a given source."""

    def seen(self) -> float | None:
        """When, in seconds since the epoch by this machine's clock; None: none has come yet. Raises OSError."""
        ...

    def close(self) -> None:
        """Look no longer."""
        ...


class Kernel(Protocol):
    """One node's kernel. All names are looked up in this process's mount namespace (``/run/netns``)."""

    async def observe_node(self) -> NodeState:
        """The node's own namespace: uplink, join veths with their addresses, which ``vmnet-*`` namespaces exist."""
        ...

    async def observe_network(self, namespace: NamespaceName) -> NetworkState | None:
        """Links, addresses, neighbours, FDB, sets and chains of one network namespace; None when it does not exist."""
        ...

    async def observe_pod(self, netns: str, interface: InterfaceName) -> PodState | None:
        """One interface inside a pod; ``netns`` is the path CNI gave. None when namespace or interface is not there."""
        ...

    async def default_interface(self, netns: str) -> DefaultInterface | None:
        """A pod's eth0; ``netns`` is the path CNI gave. None when namespace or interface is not there."""
        ...

    async def find_default_interface(self, address: IPAddress) -> DefaultInterface | None:
        """The eth0 that has an address, in any of the named network namespaces that are not networks'."""
        ...

    async def kubelet(self, path: str | None) -> Cgroup | None:
        """The control group of this node's kubelet: looked for, or ``path``. None when packets cannot be told by it."""
        ...

    async def apply(self, ops: Sequence[Op]) -> None:
        """Carry out in order, batched where the kernel allows; stops at the first failure. Raises KernelError."""
        ...

    async def connections(self, namespace: NamespaceName) -> frozenset[IPAddress]:
        """Both ends of each connection that the namespace's conntrack knows, that may still be used, and that is TCP or
        translated. Raises Gone."""
        ...

    async def connections_of(self, namespace: NamespaceName, addresses: Sequence[IPAddress]) -> tuple[Connection, ...]:
        """TCP and UDP connections that these addresses began or answer in. Raises KernelError."""
        ...

    async def put_connections(self, namespace: NamespaceName, entries: Sequence[Connection]) -> tuple[Outcome, ...]:
        """Write conntrack entries and read them back; one outcome for each. Raises KernelError."""
        ...

    async def forget_connections(self, namespace: NamespaceName, flows: Sequence[Flow]) -> int:
        """Delete the conntrack entries of these flows, in whichever direction; how many there were.

        Raises KernelError.
        """
        ...

    async def forget_marked(self, namespace: NamespaceName, mark: int) -> None:
        """Delete every conntrack entry with this mark. Raises KernelError."""
        ...

    async def datagrams(self, namespace: NamespaceName | None) -> frozenset[Datagrams]:
        """Entries of a conntrack (None: the node's) for UDP. Raises Gone."""
        ...

    async def forget_datagrams(self, namespace: NamespaceName | None, entries: Collection[Datagrams]) -> int:
        """Delete such entries; what is sent on is a new connection. Returns how many were still there. Raises Gone."""
        ...

    async def packet_socket(
        self,
        namespace: NamespaceName,
        interface: InterfaceName,
        *,
        protocols: Sequence[int] = (),
        udp_ports: Sequence[int] = (),
    ) -> socket.socket:
        """Non-blocking AF_PACKET/SOCK_RAW socket bound to the interface.

        A BPF filter passes only the given EtherTypes (``protocols``; all when empty) and, of IPv4/IPv6 UDP, only the
        given destination ports when ``udp_ports`` is not empty (with 0x86DD, router solicitations pass too).
        """
        ...

    async def last_frame(self, namespace: NamespaceName, interface: InterfaceName, mac: MacAddress) -> LastFrame:
        """From now on the time of each frame of this source that comes in is kept. Raises KernelError."""
        ...

    async def udp_socket(
        self, namespace: NamespaceName, address: IPv4Address | IPv6Address, port: int
    ) -> socket.socket:
        """Non-blocking UDP socket bound inside the namespace."""
        ...

    async def tcp_listener(
        self, namespace: NamespaceName, address: IPv4Address | IPv6Address, port: int
    ) -> socket.socket:
        """Non-blocking listening TCP socket inside the namespace."""
        ...

    async def tcp_socket(self, namespace: NamespaceName, family: int) -> socket.socket:
        """Non-blocking, unconnected TCP socket inside the namespace; ``family``: AF_INET or AF_INET6."""
        ...

    async def close(self) -> None:
        """Give up sockets and workers; kernel state stays."""
        ...
