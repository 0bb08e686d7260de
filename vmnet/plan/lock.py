"""The lock on eth0 of pods with a network of their own: only the kubelet, and to ports that a pod opens, gets through.

Two tables. One (``netdev``) has a pair of chains on the veth of each such pod, because a bridge of the default network
forwards between pods without asking anybody; it is stateless, and what state is needed a mark brings from the other.
And one for the node, which knows connections, and whose process a packet is from. Frames between a pod and its node
meet both. A table for each veth would cost every later pod 0.35 ms for each earlier one: nft asks for the sets and
chains of one table after another.
"""

import re
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
VETH_TABLE: Final = f"netdev {PREFIX}"
NOBODY: Final = str(IPv4Address(0))
"""Who asks by ARP whether an address is free (RFC 5227 section 2.1.1)."""
ANSWER_SECONDS: Final = 180
"""So long may a pod answer a datagram to a port that it opened, as conntrack's limit for a stream of them."""

_IN_CHAIN: Final = re.compile(r"in_(\w+)_([0-9a-f]+)")
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


def chains_of(pod_uid: str, device: InterfaceName) -> tuple[str, str]:
    """Names of the chains on a pod's veth, from the pod and to it. They tell the device: no listing of chains does."""
    port, told = names.port_interface(pod_uid, names.DEFAULT_INTERFACE), device.encode().hex()
    return f"in_{port}_{told}", f"out_{port}_{told}"


def devices(chains: Iterable[str]) -> dict[InterfaceName, InterfaceName]:
    """Veths that these chains are on, by the names of the pods' ports."""
    found = (_IN_CHAIN.fullmatch(name) for name in chains)
    return {InterfaceName(item[1]): InterfaceName(bytes.fromhex(item[2]).decode()) for item in found if item}


def tables(locks: Iterable[Lock], kubelet: Cgroup | None) -> tuple[Table, ...]:
    """All tables of a node; none when it has no such pod. ``kubelet``: None makes do with root's processes."""
    found = tuple(locks)
    if not found:
        return ()
    held = tuple(item for item in found if item.device is not None)
    return (node_table(found, kubelet), *((veth_table(held),) if held else ()))


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


def veth_table(locks: Iterable[Lock]) -> Table:
    """The table of the pods' veths. Sets tell the pods apart: rules of their own are few, however many pods."""
    own: dict[int, set[str]] = {4: set(), 6: set()}
    links, strangers, icmp, opened = set(), set(), set(), set()
    answers: dict[str, Elements] = {}
    bound: dict[str, Chain] = {}
    for item in locks:
        if item.device is None:
            continue
        told = f'"{item.device}"'
        for address in item.addresses:
            own[address.version].add(f"{told} . {address}")
        if item.mac is None:
            strangers.add(told)
        else:
            links.add(f"{told} . {addresses.link_local(item.mac)}")
        if OpenPort(Protocol.ICMP) in item.open:
            icmp.add(told)
        opened |= {f"{told} . {port.protocol} . {port.port}" for port in _ports(item.open)}
        own_answers = _answers(item)
        answers |= own_answers
        bound |= _bound(item, item.device, own_answers)
    sets = {
        "own4": Elements("type ifname . ipv4_addr;", frozenset(own[4])),
        "own6": Elements("type ifname . ipv6_addr;", frozenset(own[6])),
        "links": Elements("type ifname . ipv6_addr;", frozenset(links)),
        "strangers": Elements("type ifname;", frozenset(strangers)),
        "echoing": Elements("type ifname;", frozenset(icmp)),
        "open": Elements("type ifname . inet_proto . inet_service;", frozenset(opened)),
        **answers,
    }
    marked = f"meta mark & {MARK:#x} == {MARK:#x} accept"
    asks = "oifname . meta l4proto . th dport @open accept"
    # An answer of TCP tells itself; of the others whoever was asked by is remembered.
    replies = "meta l4proto tcp tcp flags & (syn | ack) != syn iifname . meta l4proto . th sport @open accept"
    chains = {
        "from_arp": Chain(
            (f"arp saddr ip {NOBODY} accept", "iifname . arp saddr ip @own4 accept", "drop"),
        ),
        "from4": Chain(
            (
                "iifname . ip saddr != @own4 drop",
                "fib daddr type local accept",
                f"iifname @echoing {_ANSWER4} accept",
                replies,
                "drop",
            )
        ),
        "neighbours": Chain(
            ("icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, mld2-listener-report } accept", "drop")
        ),
        "from_own6": Chain(
            (
                "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, mld2-listener-report } accept",
                "fib daddr type local accept",
                f"iifname @echoing {_ANSWER6} accept",
                replies,
                "drop",
            )
        ),
        "from6": Chain(
            (
                "iifname . ip6 saddr @own6 goto from_own6",
                "ip6 saddr :: goto neighbours",
                "iifname . ip6 saddr @links goto neighbours",
                # Whose MAC nobody knows, has a link-local address that nobody knows.
                "ip6 saddr fe80::/10 iifname @strangers goto neighbours",
                "drop",
            )
        ),
        "to4": Chain((marked, f"oifname @echoing {_ASK4} accept", asks, "drop")),
        "to6": Chain((marked, f"{_NEIGHBOURS} accept", f"oifname @echoing {_ASK6} accept", asks, "drop")),
        "arriving": Chain(("ether type vmap { ip : goto from4, ip6 : goto from6, arp : goto from_arp }", "drop")),
        "leaving": Chain(("ether type vmap { ip : goto to4, ip6 : goto to6, arp : accept }", "drop")),
        **bound,
    }
    return Table("netdev", PREFIX, sets, chains)


def _bound(lock: Lock, device: InterfaceName, answers: Iterable[str]) -> dict[str, Chain]:
    """The chains on one pod's veth: what needs its MAC, or the sets (``answers``) of its own."""
    inward, outward = chains_of(lock.pod_uid, device)
    rules = []
    if lock.mac is not None:
        rules += [f"ether saddr != {lock.mac} drop", f"ether type arp arp saddr ether != {lock.mac} drop"]
    targets = [f"0x{int(item):032x}" for item in lock.addresses if item.version == 6]
    if targets and lock.mac is not None:
        targets.append(f"0x{int(addresses.link_local(lock.mac)):032x}")
    if targets:
        rules.append(f"icmpv6 type nd-neighbor-advert @th,64,128 != {{ {', '.join(sorted(targets))} }} drop")
    asked: list[str] = []
    for name in answers:
        family, own = ("ip", "own4") if name.startswith("asked4") else ("ip6", "own6")
        told = "ip saddr" if family == "ip" else "ip6 saddr"
        key = f"{family} daddr . meta l4proto . th dport . th sport"
        rules.append(f"iifname . {told} @{own} {key} @{name} accept")
        key = f"{family} saddr . meta l4proto . th sport . th dport"
        asked.append(f"meta l4proto != tcp oifname . meta l4proto . th dport @open update @{name} {{ {key} }}")
    hook = f'device "{device}" priority filter; policy accept;'
    return {
        inward: Chain((*rules, "goto arriving"), f"type filter hook ingress {hook}"),
        outward: Chain((*asked, "goto leaving"), f"type filter hook egress {hook}"),
    }


def _answers(lock: Lock) -> dict[str, Elements]:
    """The sets that remember who asked a pod by datagrams; its own, lest another's askers push its askers out."""
    if not any(port.protocol is not Protocol.TCP for port in _ports(lock.open)):
        return {}
    port = names.port_interface(lock.pod_uid, names.DEFAULT_INTERFACE)
    kind = "inet_proto . inet_service . inet_service; flags dynamic,timeout; size 65535;"
    return {
        f"asked{version}_{port}": Elements(f"type ipv{version}_addr . {kind} timeout {ANSWER_SECONDS}s;", None)
        for version in (4, 6)
    }


def _ports(opened: Iterable[OpenPort]) -> tuple[OpenPort, ...]:
    return tuple(port for port in opened if port.protocol is not Protocol.ICMP)


def _process(kubelet: Cgroup | None) -> str:
    if kubelet is None:
        return "meta skuid 0"
    return f'socket cgroupv2 level {kubelet.path.count("/") + 1} "{kubelet.path}"'


def _which(kubelet: Cgroup | None) -> str:
    # nft turns the path into the directory's number once: another directory of that path must be another table.
    return f' comment "cgroup {kubelet.inode}"' if kubelet is not None else ""
