"""The lab's network: a fabric bridge, nodes on it, and a host outside the cluster.

The fabric lives in the lab's own network namespace; every node and ``outside`` is a namespace joined to it by a veth.
``outside`` knows the fabric's addresses only: pods reach it, and it reaches pods, only by what their node translates.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, Final

from vmnet.lab import namespaces
from vmnet.lab.errors import LabError

BRIDGE: Final = "ul0"
PHYSICAL_NETWORK: Final = "physnet"
PHYSICAL_BRIDGE: Final = "phys0"
"""The second network, without addresses: a bridge in the fabric, and one of each node with that node's eth1 in it."""
FABRIC_IPV4: Final = IPv4Address("172.30.0.1")
FABRIC_IPV6: Final = IPv6Address("fd00:30::1")
OUTSIDE: Final = "outside"
FABRIC: Final = "fabric"
API_PORT: Final = 6443
METRICS_PORT: Final = 9465
WEBHOOK_PORT: Final = 9443
MTU: Final = 1500
MAX_NODES: Final = 50
DEFAULT_POD_NETWORK: Final = IPv4Network("10.244.0.0/16")
DEFAULT_POD_NETWORK_IPV6: Final = IPv6Network("fd00:10:244::/48")
SERVICE_RANGES: Final = (IPv4Network("10.96.0.0/16"), IPv6Network("fd00:10:96::/112"))
CLUSTER_DNS: Final = SERVICE_RANGES[0].network_address + 10
"""The tenth address of the service range, as kubeadm chooses it."""
LOAD_BALANCER_POOLS: Final = (
    tuple(FABRIC_IPV4 + number for number in range(199, 249)),
    tuple(IPv6Address(f"fd00:30::{number}") for number in range(200, 250)),
)
"""Addresses of the fabric that Services of type LoadBalancer are given: 172.30.0.200 and fd00:30::200 first."""
CNI_BINARIES: Final = Path("/usr/lib/cni")
"""Where Debian's containernetworking-plugins are."""


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace on the fabric: a node, or ``outside``. ``veth`` is the end on the bridge, ``eth0`` the other.

    ``eth1`` is on the physical network of Localnet topologies.
    """

    name: str
    ipv4: IPv4Address
    ipv6: IPv6Address
    mac: str

    @property
    def veth(self) -> str:
        """Interface on the bridge."""
        return f"ul-{self.name}"

    @property
    def second_veth(self) -> str:
        """Interface on the second network's bridge."""
        return f"ph-{self.name}"


def node(index: int) -> Host:
    """Node ``n<index>``, from 1 on: 172.30.0.1<index>, fd00:30::1<index>."""
    return Host(
        f"n{index}", FABRIC_IPV4 + 10 + index - 1, IPv6Address(f"fd00:30::{10 + index}"), f"02:30:00:00:00:{index:02x}"
    )


def nodes(count: int) -> tuple[Host, ...]:
    """All nodes. Raises LabError when there would be too many for the addresses."""
    if not 1 <= count <= MAX_NODES:
        raise LabError(f"a lab of {count} nodes is not possible", f"choose 1 to {MAX_NODES}")
    return tuple(node(index) for index in range(1, count + 1))


OUTSIDE_HOST: Final = Host(OUTSIDE, FABRIC_IPV4 + 99, IPv6Address("fd00:30::100"), "02:30:00:00:01:00")


def pod_subnet(host: Host) -> IPv4Network:
    """The default network's IPv4 subnet of a node: ``10.244.<n>.0/24``."""
    number = int(host.name.removeprefix("n"))
    return list(DEFAULT_POD_NETWORK.subnets(new_prefix=24))[number]


def pod_subnet_ipv6(host: Host) -> IPv6Network:
    """The default network's IPv6 subnet of a node: ``fd00:10:244:<n>::/64``."""
    number = int(host.name.removeprefix("n"))
    return IPv6Network((int(DEFAULT_POD_NETWORK_IPV6.network_address) + (number << 64), 64))


def pod_subnets(host: Host) -> tuple[str, str]:
    """``podCIDRs`` of a node, IPv4 first."""
    return str(pod_subnet(host)), str(pod_subnet_ipv6(host))


def fabric_batch() -> list[str]:
    """``ip -batch`` lines that make the fabric in the lab's own namespace."""
    return [
        "link set lo up",
        f"link add {BRIDGE} type bridge mcast_snooping 0",
        f"addr add {FABRIC_IPV4}/24 dev {BRIDGE}",
        f"addr add {FABRIC_IPV6}/64 dev {BRIDGE} nodad",
        f"link set {BRIDGE} mtu {MTU} up",
        f"link add {PHYSICAL_BRIDGE} type bridge mcast_snooping 0",
        f"link set {PHYSICAL_BRIDGE} mtu {MTU} up",
    ]


def join_batch(host: Host, pid: int) -> list[str]:
    """Lines, for the lab's own namespace, that join the namespace of process ``pid`` to the fabric."""
    return [
        f"link add {host.veth} mtu {MTU} type veth peer name eth0 address {host.mac} mtu {MTU} netns {pid}",
        f"link set {host.veth} master {BRIDGE} up",
        f"link add {host.second_veth} mtu {MTU} type veth peer name eth1 mtu {MTU} netns {pid}",
        f"link set {host.second_veth} master {PHYSICAL_BRIDGE} up",
    ]


def host_batch(host: Host, others: Sequence[Host] = ()) -> list[str]:
    """Lines for the host's namespace. A node has a default route and routes to the pods of ``others``; outside none."""
    lines = [
        "link set lo up",
        f"addr add {host.ipv4}/24 dev eth0",
        f"addr add {host.ipv6}/64 dev eth0 nodad",
        "link set eth0 up",
        "link set eth1 addrgenmode none",
        "link set eth1 up",
    ]
    if host.name != OUTSIDE:
        lines += [
            f"link add {PHYSICAL_BRIDGE} type bridge mcast_snooping 0",
            f"link set {PHYSICAL_BRIDGE} addrgenmode none",
            f"link set eth1 master {PHYSICAL_BRIDGE}",
            f"link set {PHYSICAL_BRIDGE} up",
        ]
        lines += [f"route add default via {FABRIC_IPV4}", f"route add ::/0 via {FABRIC_IPV6}"]
        for other in others:
            if other != host:
                lines.append(f"route add {pod_subnet(other)} via {other.ipv4}")
                lines.append(f"route add {pod_subnet_ipv6(other)} via {other.ipv6}")
    return lines


NODE_SYSCTLS: Final = {
    "net/ipv4/ip_forward": 1,
    "net/ipv6/conf/all/forwarding": 1,
    "net/ipv6/conf/all/accept_ra": 0,
    "net/ipv6/conf/default/accept_ra": 0,
    "net/ipv4/conf/all/rp_filter": 0,
    "net/ipv4/conf/default/rp_filter": 0,
}
"""What an administrator sets on a Kubernetes node before anything is installed."""

OUTSIDE_SYSCTLS: Final = {"net/ipv6/conf/all/accept_ra": 0, "net/ipv6/conf/default/accept_ra": 0}


def set_sysctls(host: str) -> None:
    """Called in the host's own namespace. Raises OSError."""
    for name, value in (OUTSIDE_SYSCTLS if host == OUTSIDE else NODE_SYSCTLS).items():
        namespaces.sysctl(name, value)


def network_configuration(host: Host) -> dict[str, Any]:
    """The node's CNI configuration list: the default network by Debian's plugins. The agent adds its own."""
    plugins: list[dict[str, Any]] = [
        {
            "type": "bridge",
            "bridge": "cni0",
            "isDefaultGateway": True,
            "hairpinMode": True,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": subnet}] for subnet in pod_subnets(host)]},
        }
    ]
    return {
        # 1.0.0 is the newest version that Debian 12's plugins speak.
        "cniVersion": "1.0.0",
        "name": "lab-default",
        "plugins": plugins,
    }


def write_network_configuration(configuration: Mapping[str, Any], directory: Path) -> None:
    """Put it where kubelet looks, by rename: kubelet never sees half of it."""
    temporary = directory / ".10-lab.conflist"
    temporary.write_text(json.dumps(configuration, indent=2) + "\n")
    temporary.rename(directory / "10-lab.conflist")


def masquerade_rules() -> str:
    """nftables text of a node: what pods send to the world leaves with the node's address, to other pods with theirs.

    Not the bridge plugin's ``ipMasq``: that would translate what goes to pods of other nodes, too."""
    return f"""\
table inet pod-egress {{
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    ip saddr {DEFAULT_POD_NETWORK} ip daddr != {{ {DEFAULT_POD_NETWORK}, 224.0.0.0/4 }} masquerade
    ip6 saddr {DEFAULT_POD_NETWORK_IPV6} ip6 daddr != {{ {DEFAULT_POD_NETWORK_IPV6}, ff00::/8 }} masquerade
  }}
}}
"""


async def run_batch(lines: Sequence[str], prefix: Sequence[str] = (), timeout: float = 20) -> None:
    """Feed lines to ``ip -batch``; ``prefix`` enters the namespace. Raises LabError with ip's message."""
    await _feed(("ip", "-batch", "-"), "".join(f"{line}\n" for line in lines), prefix, timeout)


async def load_rules(text: str, prefix: Sequence[str] = (), timeout: float = 20) -> None:
    """Feed rules to ``nft``; ``prefix`` enters the namespace. Raises LabError with nft's message."""
    await _feed(("nft", "-f", "-"), text, prefix, timeout)


async def _feed(argv: Sequence[str], text: str, prefix: Sequence[str], timeout: float) -> None:
    process = await asyncio.create_subprocess_exec(
        *prefix,
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout):
            _, errors = await process.communicate(text.encode())
    except TimeoutError:
        process.kill()
        raise LabError(f"{argv[0]} {argv[1]} did not end within {timeout:g} s") from None
    if process.returncode != 0:
        raise LabError(f"{argv[0]} {argv[1]} failed: {errors.decode(errors='replace').strip()}")
