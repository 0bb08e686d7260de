"""The lock on eth0 of pods with a network of their own: only the kubelet, and to ports that a pod opens, gets through.

Two kinds of table. One on the veth of each such pod (``netdev``), because a bridge of the default network forwards
between pods without asking anybody; it is stateless, and what state is needed a mark brings from the other. And one for
the node, which knows connections, and whose process a packet is from. Frames between a pod and its node meet both.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address
from typing import Final

from vmnet.model import addresses, names
from vmnet.model.addresses import IPAddress
from vmnet.model.names import InterfaceName, MacAddress
from vmnet.plan.state import Cgroup
from vmnet.plan.table import Chain, Elements, Table

MARK: Final = 0x200000
"""Packet mark between the node's table and a pod's veth: may pass. Whatever else carried it loses it on the way."""
PREFIX: Final = "vmnet-lock"
NODE_TABLE: Final = f"inet {PREFIX}"
NOBODY: Final = str(IPv4Address(0))
"""Who asks by ARP whether an address is free (RFC 5227 section 2.1.1)."""
ANSWER_SECONDS: Final = 180
"""So long may a pod answer a datagram to a port that it opened, as conntrack's limit for a stream of them."""

_NEIGHBOURS: Final = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }"
_ASK4: Final = "icmp type { echo-request, destination-unreachable, time-exceeded, parameter-problem }"
_ASK6: Final = "icmpv6 type { echo-request, destination-unreachable, packet-too-big, time-exceeded, parameter-problem }"
_ANSWER4: Final = "icmp type { echo-reply, destination-unreachable, time-exceeded, parameter-problem }"
_ANSWER6: Final = (
    "icmpv6 type { echo-reply, destination-unreachable, packet-too-big, time-exceeded, parameter-problem }"
)


class Protocol(StrEnum):
    """What a port may be opened for."""

    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"
    ICMP = "icmp"


@dataclass(frozen=True, slots=True, order=True)
class OpenPort:
    """One opening; ``port`` is 0 for ICMP, which has none and stands for both families."""

    protocol: Protocol
    port: int = 0


@dataclass(frozen=True, slots=True)
class Lock:
    """One pod's eth0. ``device``: its other end on the node; None: there is none, and only the node's table guards it.

    ``mac``: None when nobody knows it any more.
    """

    pod_uid: str
    device: InterfaceName | None
    mac: MacAddress | None
    addresses: frozenset[IPAddress]
    open: frozenset[OpenPort] = frozenset()


def name_of(pod_uid: str) -> str:
    """Name of the table of one pod's veth."""
    return f"{PREFIX}-{names.port_interface(pod_uid, names.DEFAULT_INTERFACE)}"


def identity_of(pod_uid: str) -> str:
    """Family and name of it."""
    return f"netdev {name_of(pod_uid)}"


def tables(locks: Iterable[Lock], kubelet: Cgroup | None) -> tuple[Table, ...]:
    """All tables of a node; none when it has no such pod. ``kubelet``: None makes do with root's processes."""
    found = tuple(locks)
    if not found:
        return ()
    return (node_table(found, kubelet), *(pod_table(lock) for lock in found if lock.device is not None))


def node_table(locks: Iterable[Lock], kubelet: Cgroup | None) -> Table:
    """The node's table. ``pods4`` and so on hold every locked address: rules are as many, however many pods."""
    found = tuple(locks)
    sets: dict[str, Elements] = {}
    for version in (4, 6):
        kind = f"ipv{version}_addr"
        held = [(item, lock.open) for lock in found for item in lock.addresses if item.version == version]
        sets[f"pods{version}"] = Elements(f"type {kind};", frozenset(str(item) for item, _ in held))
        sets[f"icmp{version}"] = Elements(
            f"type {kind};", frozenset(str(item) for item, opened in held if OpenPort(Protocol.ICMP) in opened)
        )
        sets[f"open{version}"] = Elements(
            f"type {kind} . inet_proto . inet_service;",
            frozenset(f"{item} . {port.protocol} . {port.port}" for item, opened in held for port in _ports(opened)),
        )
    passes = f"meta mark set meta mark | {MARK:#x} accept"
    # Of a connection that has been let in its end may belong to no process any more (TIME_WAIT). A first packet never
    # passes by this: an address may have had another pod before, and its connections may still be known.
    begun = "meta l4proto tcp tcp flags & syn == 0 ct state established"
    forgets = f"meta mark set meta mark & {0xFFFFFFFF ^ MARK:#x}"
    opened = (
        f"ip daddr . meta l4proto . th dport @open4 {passes}",
        f"ip6 daddr . meta l4proto . th dport @open6 {passes}",
        f"ip daddr @icmp4 {_ASK4} {passes}",
        f"ip6 daddr @icmp6 {_ASK6} {passes}",
        f"ct state related {passes}",
    )
    chains = {
        "answers": Chain(("ct state { new, invalid, untracked } drop",)),
        "forwarded": Chain((forgets, *opened, "drop")),
        "local": Chain(
            (
                forgets,
                f"{_process(kubelet)} {passes}{_which(kubelet)}",
                f"{begun} {passes}",
                *opened,
                f"{_NEIGHBOURS} accept",
                "drop",
            )
        ),
        # A pod answers by eth0 and begins nothing; what it may answer was let in before.
        "prerouting": Chain(
            (
                "ip saddr @pods4 jump answers",
                f"ip6 saddr @pods6 {_NEIGHBOURS} accept",
                "ip6 saddr @pods6 jump answers",
            ),
            "type filter hook prerouting priority mangle; policy accept;",
        ),
        # After whoever translates: what counts is where it goes in the end.
        "forward": Chain(
            ("ip daddr @pods4 goto forwarded", "ip6 daddr @pods6 goto forwarded"),
            "type filter hook forward priority filter - 10; policy accept;",
        ),
        "output": Chain(
            ("ip daddr @pods4 goto local", "ip6 daddr @pods6 goto local"),
            "type filter hook output priority filter + 300; policy accept;",
        ),
    }
    return Table("inet", PREFIX, sets, chains)


def pod_table(lock: Lock) -> Table:
    """The table of one pod's veth. Raises ValueError when the pod has none."""
    if lock.device is None:
        raise ValueError(f"pod {lock.pod_uid} has no veth")
    own4 = _listed(item for item in lock.addresses if item.version == 4)
    own6 = _listed(item for item in lock.addresses if item.version == 6)
    link_local = str(addresses.link_local(lock.mac)) if lock.mac is not None else "fe80::/10"
    bound = [f"ether saddr != {lock.mac} drop"] if lock.mac is not None else []
    icmp = OpenPort(Protocol.ICMP) in lock.open
    ports = frozenset(f"{port.protocol} . {port.port}" for port in _ports(lock.open))
    answer = "inet_proto . inet_service . inet_service; flags dynamic,timeout; size 65535;"
    sets = {
        "open": Elements("type inet_proto . inet_service;", ports),
        "asked4": Elements(f"type ipv4_addr . {answer} timeout {ANSWER_SECONDS}s;", None),
        "asked6": Elements(f"type ipv6_addr . {answer} timeout {ANSWER_SECONDS}s;", None),
    }
    marked = f"meta mark & {MARK:#x} == {MARK:#x} accept"
    opened = "meta l4proto . th dport @open accept"
    # An answer of TCP tells itself; of the others whoever was asked by is remembered.
    answers = "meta l4proto tcp tcp flags & (syn | ack) != syn meta l4proto . th sport @open accept"
    to4 = [marked, *([f"{_ASK4} accept"] if icmp else []), *_asked("ip", "asked4"), opened, "drop"]
    to6 = [marked, f"{_NEIGHBOURS} accept", *([f"{_ASK6} accept"] if icmp else []), *_asked("ip6", "asked6")]
    from4 = ["fib daddr type local accept", *([f"{_ANSWER4} accept"] if icmp else []), answers]
    from4 += ["ip daddr . meta l4proto . th dport . th sport @asked4 accept", "drop"]
    from6 = ["fib daddr type local accept", *([f"{_ANSWER6} accept"] if icmp else []), answers]
    from6 += ["ip6 daddr . meta l4proto . th dport . th sport @asked6 accept", "drop"]
    sources6 = ", ".join(part for part in (own6, link_local, "::") if part)
    targets = [f"0x{int(item):032x}" for item in lock.addresses if item.version == 6]
    if lock.mac is not None:
        targets.append(f"0x{int(addresses.link_local(lock.mac)):032x}")
    claims = f"icmpv6 type nd-neighbor-advert @th,64,128 != {{ {', '.join(sorted(targets))} }} drop"
    chains = {
        "from_arp": Chain(
            (
                *([f"arp saddr ether != {lock.mac} drop"] if lock.mac is not None else []),
                f"arp saddr ip {{ {', '.join(part for part in (own4, NOBODY) if part)} }} accept",
                "drop",
            )
        ),
        "from4": Chain((*([f"ip saddr != {{ {own4} }} drop"] if own4 else ["drop"]), *from4)),
        "from6": Chain(
            (
                f"ip6 saddr != {{ {sources6} }} drop",
                *([claims] if targets else []),
                "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, mld2-listener-report } accept",
                *([f"ip6 saddr != {{ {own6} }} drop"] if own6 else ["drop"]),
                *from6,
            )
        ),
        "to4": Chain(tuple(to4)),
        "to6": Chain((*to6, opened, "drop")),
        "ingress": Chain(
            (*bound, "ether type vmap { ip : goto from4, ip6 : goto from6, arp : goto from_arp }", "drop"),
            f'type filter hook ingress device "{lock.device}" priority filter; policy accept;',
        ),
        "egress": Chain(
            ("ether type vmap { ip : goto to4, ip6 : goto to6, arp : accept }", "drop"),
            f'type filter hook egress device "{lock.device}" priority filter; policy accept;',
        ),
    }
    return Table("netdev", name_of(lock.pod_uid), sets, chains, device=lock.device)


def _asked(family: str, name: str) -> tuple[str, ...]:
    asker = f"{family} saddr . meta l4proto . th sport . th dport"
    return (f"meta l4proto != tcp meta l4proto . th dport @open update @{name} {{ {asker} }}",)


def _ports(opened: Iterable[OpenPort]) -> tuple[OpenPort, ...]:
    return tuple(port for port in opened if port.protocol is not Protocol.ICMP)


def _listed(found: Iterable[IPAddress]) -> str:
    return ", ".join(str(item) for item in sorted(found, key=int))


def _process(kubelet: Cgroup | None) -> str:
    if kubelet is None:
        return "meta skuid 0"
    return f'socket cgroupv2 level {kubelet.path.count("/") + 1} "{kubelet.path}"'


def _which(kubelet: Cgroup | None) -> str:
    # nft turns the path into the directory's number once: another directory of that path must be another table.
    return f' comment "cgroup {kubelet.inode}"' if kubelet is not None else ""
