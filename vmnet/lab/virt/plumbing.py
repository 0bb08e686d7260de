"""KubeVirt's l2bridge (managed tap) wiring inside the launcher's pod.

The pod interface becomes a bridge port beside the guest's tap; a stand-in of its name keeps its addresses and MAC, so
that what looks at the pod finds them, but answers no ARP.
"""

import hashlib
import json
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmnet.lab import namespaces
from vmnet.lab.errors import LabError

TAP: Final = "tap0"
_HASHED: Final = "pod"
_TIMEOUT: Final = 20


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the guest's network card is to be; ``mtu`` in octets."""

    interface: str
    tap: str
    mac: str
    mtu: int


def hashed_name(network: str) -> str:
    """Name of the pod's interface on a Multus network that the machine's spec calls so, as KubeVirt derives it."""
    return f"{_HASHED}{hashlib.sha256(network.encode()).hexdigest()}"[:14]


def nic_name(interface: str) -> str:
    """The pod interface after the stand-in took its name."""
    return f"{interface.removeprefix(_HASHED)}-nic"


def bridge_name(interface: str) -> str:
    """The bridge between pod interface and tap."""
    return f"k6t-{interface.removeprefix(_HASHED)}"


def tap_name(interface: str) -> str:
    """The tap device: ``tap0`` for the pod's own network, as KubeVirt calls it."""
    return f"tap{interface.removeprefix(_HASHED)}" if interface.startswith(_HASHED) else TAP


def wire(interface: str) -> Wiring:
    """Wire ``interface`` of this process's network namespace to a new tap device. Raises LabError."""
    link = _show(interface)
    mac, mtu = str(link["address"]), int(link["mtu"])
    addresses = [
        f"{item['local']}/{item['prefixlen']}" for item in link.get("addr_info", []) if item.get("scope") == "global"
    ]
    nic, bridge, tap = nic_name(interface), bridge_name(interface), tap_name(interface)
    _ip(f"link set {interface} down", f"addr flush dev {interface}", f"link set {interface} name {nic}")
    # Its own MAC would make the bridge keep the guest's frames for itself.
    _ip(
        f"link set {nic} address {_local_mac()}",
        f"link add {bridge} mtu {mtu} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        f"tuntap add {tap} mode tap vnet_hdr",
    )
    for name in (nic, bridge, tap):
        # Nothing but the guest may speak on its port: no router solicitation, no MLD of ours.
        namespaces.sysctl(f"net/ipv6/conf/{name}/disable_ipv6", 1)
        # And no ARP reply for the stand-in's address: that counts where the request comes in, not where the address is.
        namespaces.sysctl(f"net/ipv4/conf/{name}/arp_ignore", 8)
    _ip(
        f"link set {tap} mtu {mtu}",
        f"link set {nic} master {bridge}",
        f"link set {tap} master {bridge}",
        f"link set {bridge} up",
        f"link set {nic} up",
        f"link set {tap} up",
    )
    _stand_in(interface, mac, mtu, addresses)
    return Wiring(interface, tap, mac, mtu)


def _stand_in(interface: str, mac: str, mtu: int, addresses: list[str]) -> None:
    """A dummy device, or a bridge without ports where the kernel has no dummy: neither sends anything."""
    try:
        _ip(f"link add {interface} address {mac} mtu {mtu} type dummy")
    except LabError:
        _ip(f"link add {interface} address {mac} mtu {mtu} type bridge stp_state 0 mcast_snooping 0")
    namespaces.sysctl(f"net/ipv4/conf/{interface}/arp_ignore", 1)
    namespaces.sysctl(f"net/ipv6/conf/{interface}/accept_dad", 0)
    namespaces.sysctl(f"net/ipv6/conf/{interface}/accept_ra", 0)
    _ip(
        *(f"addr add {address} dev {interface}{' nodad' if ':' in address else ''}" for address in addresses),
        f"link set {interface} up",
    )


def exists(interface: str) -> bool:
    """Whether this process's network namespace has the interface."""
    return Path("/proc/sys/net/ipv4/conf", interface).exists()


def _local_mac() -> str:
    return ":".join(f"{octet:02x}" for octet in (0x02, *secrets.token_bytes(5)))


def _show(interface: str) -> dict[str, Any]:
    links = json.loads(_run(["ip", "-j", "addr", "show", "dev", interface]))
    return dict(links[0])


def _ip(*lines: str) -> None:
    _run(["ip", "-batch", "-"], "".join(f"{line}\n" for line in lines))


def _run(argv: list[str], text: str = "") -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout
