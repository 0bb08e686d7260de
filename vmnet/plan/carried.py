"""Which of a machine's connections another node must know of, and how: what its agent writes into conntrack there.

Seen from the machine every connection is one of three kinds:

- what stays on the segment is as the machine sees it, translated by nobody or elsewhere: the entry alone is what a
  stateful policy asks for;
- what goes over the network's edge keeps its translation on the node where it was begun (its *home*): the entry is as
  the machine sees it and carries the home's mark, which leads to that node's router (``plan.edge``);
- what the machine asks of a Service is translated on the machine's own node, and the translation goes along.

Of the last, packets may come on either node before its entry is in place; they are held (``hold_script``) rather than
taken for something new, and a backend's words that nobody has translated do not reach the guest.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vmnet.model import names
from vmnet.model.addresses import TRANSIT_IPV4, TRANSIT_IPV6, IPAddress, IPNetwork
from vmnet.model.connection import PROTOCOLS, TCP, Connection, Flow
from vmnet.model.network import Network

HOLD_SECONDS: Final = 30
"""How long an element holds without being written again: an agent that dies in the middle holds nothing for longer."""
CONNECTIONS_LIMIT: Final = 16384
"""Connections of one machine that are carried; what is more begins anew."""
TIMEOUT_LIMIT: Final = 432000
"""Seconds: as long as the kernel itself would wait for an established TCP connection."""
_TCP_STATES: Final = range(2, 7)
"""SYN_RECV … LAST_ACK: what is begun or over is carried by nobody."""
_HOLD: Final = "inet carried"
_GUARD: Final = "bridge carried"
"""Not made by ``plan.table``: they come for a migration, and go after it. Packets pay for them meanwhile only."""
_MIDDLE: Final = "ct state new tcp flags & (syn | rst) == 0x0"
_TYPES: Final = {4: "ipv4_addr", 6: "ipv6_addr"}
_KEYWORDS: Final = {4: "ip", 6: "ip6"}


@dataclass(frozen=True, slots=True)
class Segment:
    """Where a machine's connections are: its network as conntrack meets it."""

    addresses: frozenset[IPAddress]
    """The machine's."""
    inside: tuple[IPNetwork, ...]
    gateways: frozenset[IPAddress]

    @classmethod
    def of(cls, network: Network, addresses: Iterable[IPAddress]) -> "Segment":
        """A machine's place in a network."""
        gateways = (network.gateway_for(version) for version in (4, 6))
        return cls(
            frozenset(addresses), tuple(network.subnets), frozenset(item for item in gateways if item is not None)
        )

    def holds(self, address: IPAddress) -> bool:
        """Whether an address is one of the segment's own."""
        return any(address.version == item.version and address in item for item in self.inside)

    def near(self, address: IPAddress) -> bool:
        """Whether packets to it stay between this network's routers."""
        return self.holds(address) or address in (TRANSIT_IPV4 if address.version == 4 else TRANSIT_IPV6)


def outgoing(segment: Segment, connections: Iterable[Connection], home: int) -> tuple[Connection, ...]:
    """A moving machine's connections as its next node must have them. ``home``: this node's mark."""
    found = (_seen(segment, item, home) for item in connections)
    return tuple(item for item in found if item is not None)[:CONNECTIONS_LIMIT]


def _seen(segment: Segment, item: Connection, home: int) -> Connection | None:
    if item.original.protocol == TCP and (item.tcp is None or item.tcp.state not in _TCP_STATES):
        return None
    own = segment.addresses
    if item.original.source in own and is_service(item):
        served = item.reply.reversed().source == item.original.source and segment.holds(item.reply.source)
        if not served or item.reply.source in segment.gateways | own:
            # Of the gateway there is one on every node, and it knows nothing of the others' connections.
            return None
        return replace(item, mark=0)
    if item.original.source in own:
        seen, peer = replace(item, reply=item.original.reversed()), item.original.destination
    elif item.reply.source in own:
        seen, peer = replace(item, original=item.reply.reversed()), item.reply.destination
    else:
        return None
    if peer in segment.gateways or peer in own or peer.is_link_local or peer.is_multicast:
        return None
    if segment.near(peer):
        return replace(seen, mark=0)
    return replace(seen, mark=item.mark if _is_home(item.mark) else home)


def is_service(item: Connection) -> bool:
    """Whether what it asked for was answered by somebody else."""
    asked, answering = item.original, item.reply
    return (asked.destination, asked.destination_port) != (answering.source, answering.source_port)


def incoming(segment: Segment, item: Connection, home: int) -> Connection | None:
    """What to write of a connection that another agent told of; None when it is this node's own affair.

    ``home``: this node's mark. Raises ValueError for what no honest agent would send: another machine's connections,
    translations to where no backend can be, marks that lead nowhere.
    """
    if item.original.protocol not in PROTOCOLS or item.original.protocol != item.reply.protocol:
        raise ValueError(f"protocol {item.original.protocol}")
    if item.original.source.version != item.reply.source.version:
        raise ValueError("two families")
    own = segment.addresses
    if item.translated:
        same = (item.original.source, item.original.source_port) == (
            item.reply.destination,
            item.reply.destination_port,
        )
        if item.original.source not in own or not same or not segment.holds(item.reply.source) or item.mark:
            raise ValueError(f"{item.original} is not a machine's question to a Service")
        if item.reply.source in segment.gateways | own:
            raise ValueError(f"{item.reply.source} serves nobody")
    else:
        ends = {item.original.source, item.original.destination}
        if not ends & own:
            raise ValueError(f"{item.original} is not the machine's")
        away = not all(segment.near(end) for end in ends)
        if away != _is_home(item.mark) or (item.mark and not away):
            raise ValueError(f"mark {item.mark:#x} for {item.original}")
    if item.original.protocol == TCP and (item.tcp is None or item.tcp.state not in _TCP_STATES):
        raise ValueError("no state that could be carried")
    if item.mark == home:
        return None
    return replace(item, timeout=max(1, min(item.timeout, TIMEOUT_LIMIT)), zone=0)


def services(connections: Iterable[Connection]) -> tuple[Connection, ...]:
    """Those whose translation goes along with the machine."""
    return tuple(item for item in connections if item.translated)


def handed_over(item: Connection) -> Connection:
    """What a node keeps of a Service's connection whose translation has gone to another: as the backend sees it."""
    return replace(item, original=item.reply.reversed())


def hold_script(connections: Sequence[Connection], arriving: Iterable[IPAddress] = ()) -> str:
    """Hold these for ``HOLD_SECONDS`` from now: nothing of them is taken for a new connection.

    Nor is what machines at the addresses ``arriving``, which come here, say to Services in the middle of a connection;
    and what a backend says to them reaches them on this node only if somebody has translated it.
    """
    coming = sorted(arriving, key=str)
    lines = [f"add table {_HOLD}\n", f"add table {_GUARD}\n"]
    held, chosen, plain = [], [], []
    for version, kind in _TYPES.items():
        flows = f"type {kind} . {kind} . inet_proto . inet_service . inet_service;"
        word = _KEYWORDS[version]
        key = f"{word} saddr . {word} daddr . meta l4proto . th sport . th dport"
        for name, declared in (
            (f"{_HOLD} held{version}", flows),
            (f"{_HOLD} arriving{version}", f"type {kind};"),
            (f"{_GUARD} plain{version}", flows),
        ):
            lines.append(f"add set {name} {{ {declared} flags timeout; timeout {HOLD_SECONDS}s; }}\n")
        held += [f"{condition} {key} @held{version} drop" for condition in (_MIDDLE, "ct state new meta l4proto udp")]
        chosen.append(f"{_MIDDLE} ct status dnat {word} saddr @arriving{version} drop")
        plain.append(f'oifname != "{names.VXLAN_L2}" {key} @plain{version} drop')
    for name, hook, rules in (
        (f"{_HOLD} held", "prerouting priority mangle", held),
        (f"{_HOLD} chosen", "prerouting priority dstnat + 5", chosen),
        (f"{_GUARD} plain", "forward priority 0", plain),
    ):
        lines.append(f"add chain {name} {{ type filter hook {hook}; policy accept; }}\nflush chain {name}\n")
        lines += [f"add rule {name} {rule}\n" for rule in rules]
    for version in _TYPES:
        ways = {_text(flow) for item in connections for flow in _flows(item) if flow.source.version == version}
        lines += _anew(f"{_HOLD} held{version}", ways)
        lines += _anew(f"{_HOLD} arriving{version}", {str(item) for item in coming if item.version == version})
        if coming:
            spoken = {_text(item.reply) for item in connections if item.reply.source.version == version}
            lines += _anew(f"{_GUARD} plain{version}", spoken)
    return "".join(lines)


def release_script() -> str:
    """Hold nothing any more."""
    return "".join(f"add table {name}\ndelete table {name}\n" for name in (_HOLD, _GUARD))


def _flows(item: Connection) -> Iterable[Flow]:
    """Every flow that is on the wire while a Service's connection changes its node."""
    yield from (item.original, item.original.reversed(), item.reply, item.reply.reversed())


def _anew(name: str, elements: Collection[str]) -> list[str]:
    # An element that is there already keeps its old time, so it goes first.
    listed = ", ".join(sorted(elements))
    if not elements:
        return []
    return [f"{verb} element {name} {{ {listed} }}\n" for verb in ("add", "delete", "add")]


def _text(flow: Flow) -> str:
    return " . ".join(
        str(part) for part in (flow.source, flow.destination, flow.protocol, flow.source_port, flow.destination_port)
    )


def _is_home(mark: int) -> bool:
    return mark & 0xFF000000 == names.HOME_MARK and mark != names.HOME_MARK
