"""nftables text: port security, the migration gate, the anycast gateway's edge, address translation.

The rules and their order were measured on real migrations (docs/architecture.md, "Datapath"). ``ct`` is refused in
netdev chains, so port security and gate are stateless; sets, not rules, carry endpoints; and nothing on the cut-over
path deletes, because a deleting transaction costs several times one that adds.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from vmnet.model import addresses, names
from vmnet.model.endpoint import Endpoint, Join, LocalPort, NodeNetwork, PortState
from vmnet.model.names import InterfaceName, MacAddress
from vmnet.model.network import GATEWAY_LINK_LOCAL, Network

TABLE: Final = "netdev vmnet"
NODE_TABLE: Final = "inet vmnet"
NETWORK_REMOVAL: Final = f"add table {TABLE}\ndelete table {TABLE}\n"
"""Takes a network's own table away, if it is there."""

_SETS: Final = """\
  set standby { type ifname; }
  set open { type ifname; flags dynamic; size 65535; }
  set moved { type ether_addr; flags dynamic; size 65535; }
  set bind { type ifname . ether_addr; }
  set bind4 { type ifname . ether_addr . ipv4_addr; }
  set bind6 { type ifname . ether_addr . ipv6_addr; }
  set target6 { typeof iifname . @th,64,128; }
  set rarp { typeof iifname . @nh,64,48; }
  set local { type ether_addr; }
"""

CUT_MARK: Final = 0x20
"""On a frame that takes the short cut. It does not leave the namespace: the kernel clears marks on the way out."""
_FLOW4: Final = "@ll,0,112 . @nh,72,8 . @nh,96,96"
_FLOW6: Final = "@ll,0,112 . @nh,48,8 . @nh,64,256 . @nh,320,32"
"""Ethernet header, protocol, addresses, ports: where they are without IPv4 options and IPv6 extension headers."""
_SHORT_LIVED: Final = "flags dynamic,timeout; timeout 10s;"

# The short cut (docs/adr/short-cut.md): a flow's frames that lately came to a pod's port, or left to the fabric, having
# passed everything that judges them, are passed on at once, with port security (the key holds both MACs, and each port
# lets only its own in here), but without bridge and conntrack. What begins, ends or resets a connection, fragments, and
# one packet of each flow in ten seconds go the whole way, so that conntrack stays in the picture. Machines' ports are
# no destination: whose frames were on their way to one would miss its move.
_SHORT_CUT: Final = f"""\
  set flows4 {{ typeof {_FLOW4}; {_SHORT_LIVED} size 16384; }}
  set flows6 {{ typeof {_FLOW6}; {_SHORT_LIVED} size 16384; }}
  map here {{ type ether_addr : iface_index; {_SHORT_LIVED} size 4096; }}
  set there {{ type ether_addr; {_SHORT_LIVED} size 16384; }}
  chain passed4 {{
    ip protocol != {{ tcp, udp }} return
    tcp flags & (fin | syn | rst) != 0x0 return
    add @flows4 {{ {_FLOW4} }}
  }}
  chain passed6 {{
    ip6 nexthdr != {{ tcp, udp }} return
    tcp flags & (fin | syn | rst) != 0x0 return
    add @flows6 {{ {_FLOW6} }}
  }}
  chain passed {{
    ether type ip @nh,0,64 & 0xff00000000003fff == 0x4500000000000000 jump passed4
    ether type ip6 jump passed6
  }}
"""


def _cut_chains(fabric: bool) -> str:
    """``fabric``: also to other nodes. Never from one node to another one."""
    out = f'    iifname != "{names.VXLAN_L2}" ether daddr @there fwd to "{names.VXLAN_L2}"\n' if fabric else ""
    chains = "".join(
        f"""\
  chain ended{version} {{
    delete @flows{version} {{ {flow} }}
  }}
  chain cut{version} {{
    tcp flags & (fin | syn | rst) != 0x0 goto ended{version}
    {flow} != @flows{version} return
    meta mark set {CUT_MARK:#x}
    fwd to ether daddr map @here
{out}\
    meta mark set 0
  }}
"""
        for version, flow in ((4, _FLOW4), (6, _FLOW6))
    )
    return f"""\
{_SHORT_CUT}\
{chains}\
  chain cut {{
    @nh,0,64 & 0xff00000000003fff == 0x4500000000000000 jump cut4
    @nh,0,4 6 jump cut6
  }}
"""


# What could hide in fragments: a header that only one that puts them together sees (RFC 7113), and neighbour discovery
# as a whole, which never needs them (RFC 6980). A packet whose headers do not end (no ``meta l4proto``) drops.
_FRAGMENTS: Final = """\
  chain datagram6 {
    udp sport 547 drop
    accept
  }
  chain fragment6 {
    frag nexthdr { 0, 43, 44, 51, 60, 135, 139, 140 } drop
    exthdr frag exists icmpv6 type 133-137 drop
  }
"""

# A port's frames. 0x8035 is reverse ARP (RFC 903): what QEMU says for a guest that has just resumed. Only a machine's
# port has the gate before the bindings (``port_in``, ``port_out``): a pod never moves, and look-ups cost every packet.
_ADDRESSES: Final = """\
  chain bound4 {
    ip protocol tcp accept
    udp sport 67 drop
    accept
  }
  chain bound6 {
    ip6 nexthdr tcp accept
    ip6 nexthdr udp goto datagram6
    jump fragment6
    udp sport 547 drop
    icmpv6 type { nd-router-advert, nd-redirect } drop
    icmpv6 type nd-neighbor-advert iifname . @th,64,128 != @target6 drop
    meta l4proto != 255 accept
    drop
  }
  chain source4 {
    iifname . ether saddr . ip saddr @bind4 goto bound4
    ip saddr 0.0.0.0 udp dport 67 iifname . ether saddr @bind accept
    drop
  }
  chain source6 {
    iifname . ether saddr . ip6 saddr @bind6 goto bound6
    iifname . ether saddr != @bind drop
    ip6 saddr != :: drop
    jump fragment6
    icmpv6 type nd-neighbor-solicit iifname . @th,64,128 != @target6 drop
    icmpv6 type { nd-neighbor-solicit, nd-router-solicit, mld2-listener-report } accept
    drop
  }
  chain source_arp {
    iifname . ether saddr != @bind drop
    iifname . arp saddr ether . arp saddr ip @bind4 accept
    arp saddr ip 0.0.0.0 iifname . arp saddr ether @bind accept
    drop
  }
"""

# Where nobody gives addresses (IPAM disabled) a port is bound to its MAC; what no workload may say stays forbidden.
_MACS: Final = """\
  chain bound4 {
    ip protocol tcp accept
    udp sport 67 drop
    accept
  }
  chain bound6 {
    ip6 nexthdr tcp accept
    ip6 nexthdr udp goto datagram6
    jump fragment6
    udp sport 547 drop
    icmpv6 type { nd-router-advert, nd-redirect } drop
    meta l4proto != 255 accept
    drop
  }
  chain source4 {
    iifname . ether saddr @bind goto bound4
    drop
  }
  chain source6 {
    iifname . ether saddr @bind goto bound6
    drop
  }
  chain source_arp {
    iifname . ether saddr != @bind drop
    iifname . arp saddr ether @bind accept
    drop
  }
"""

_PORT: Final = """\
  chain source {
    ether type vmap { ip : goto source4, ip6 : goto source6, arp : goto source_arp }
    drop
  }
  chain reverse {
    iifname . @nh,64,48 != @rarp drop
    iifname . @nh,144,48 != @rarp drop
  }
  chain port_in {
    iifname . ether saddr != @bind drop
    ether type 0x8035 jump reverse
    ether type 0x8035 iifname @standby add @open { iifname }
    ether type 0x8035 delete @moved { ether saddr } accept
    iifname @standby iifname != @open drop
    ether saddr @moved drop
    goto source
  }
  chain reflection {
    ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 oifname . ether saddr @bind drop
  }
  chain port_out {
    oifname @standby oifname != @open drop
    ether daddr @moved drop
    goto reflection
  }
"""


def network_script(desired: NodeNetwork) -> str:
    """The tables of one network namespace, without its ports."""
    network = desired.network
    bound = _ADDRESSES if network.subnets else _MACS
    bound += _cut_chains(_cuts_to_fabric(network))
    if not network.routed:
        return f"table {TABLE} {{\n{_SETS}{_FRAGMENTS}{bound}{_PORT}{_switch_chains(network)}}}\n"
    fabric = _fabric_chains(desired) if network.stretched else ""
    return f"""\
table {TABLE} {{
{_SETS}{_FRAGMENTS}{bound}{_PORT}{fabric}\
}}
table inet vmnet {{
  chain output {{
    type filter hook output priority 0; policy accept;
    icmpv6 type nd-redirect drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{names.UPLINK}" ip saddr != {desired.join.network_ipv4.ip} snat to {desired.join.network_ipv4.ip}
    oifname "{names.UPLINK}" ip6 saddr != {desired.join.network_ipv6.ip} snat to {desired.join.network_ipv6.ip}
  }}
}}
"""


def _cuts_to_fabric(network: Network) -> bool:
    """Whether what is behind the fabric stays there: a machine that keeps its addresses may come here."""
    return network.stretched and network.overlaid and bool(network.subnets) and not network.persistent


def _sent(network: Network) -> str:
    """What leaves by the fabric to other nodes' pods. A frame that is flooded is not for them alone."""
    if not _cuts_to_fabric(network):
        return ""
    return f"    ether saddr != {network.gateway_mac} ether daddr != @local add @there {{ ether daddr }} jump passed\n"


def _switch_chains(network: Network) -> str:
    """The edge of a segment on which no router of ours speaks."""
    # Each node answers DHCP for its own machines, where addresses are given at all.
    local = "    udp dport { 67, 547 } drop\n" if network.subnets else ""
    return f"""\
  chain vx_in {{
    type filter hook ingress device "{names.VXLAN_L2}" priority 0; policy accept;
    jump cut
    ether type 0x8035 add @moved {{ ether saddr }}
    ether saddr {network.gateway_mac} drop
  }}
  chain vx_out {{
    type filter hook egress device "{names.VXLAN_L2}" priority 0; policy accept;
    meta mark {CUT_MARK:#x} accept
    ether saddr {network.gateway_mac} drop
{local}\
{_sent(network)}\
  }}
"""


def _fabric_chains(desired: NodeNetwork) -> str:
    """The segment's edge towards the other nodes."""
    network, gateway_mac = desired.network, desired.network.gateway_mac
    gateway4, gateway6 = network.gateway_for(4), network.gateway_for(6)
    arp_in = f"    arp saddr ip {gateway4} drop\n" if gateway4 else ""
    arp_out = f"    arp daddr ip {gateway4} drop\n    arp saddr ip {gateway4} drop\n" if gateway4 else ""
    targets = ", ".join(f"0x{int(address):032x}" for address in (gateway6, GATEWAY_LINK_LOCAL) if address is not None)
    return f"""\
  chain vx_in {{
    type filter hook ingress device "{names.VXLAN_L2}" priority 0; policy accept;
    jump cut
    ether type 0x8035 add @moved {{ ether saddr }}
    ether saddr {gateway_mac} drop
{arp_in}\
    icmpv6 type {{ nd-router-solicit, nd-router-advert, nd-redirect }} drop
  }}
  chain vx_out {{
    type filter hook egress device "{names.VXLAN_L2}" priority 0; policy accept;
    meta mark {CUT_MARK:#x} accept
    ether daddr {gateway_mac} drop
{arp_out}\
    icmpv6 type {{ nd-router-solicit, nd-router-advert, nd-redirect }} drop
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} @th,64,128 {{ {targets} }} drop
    ip6 saddr {GATEWAY_LINK_LOCAL} drop
    icmpv6 type nd-neighbor-solicit ether saddr {gateway_mac} drop
    udp dport {{ 67, 547 }} drop
{_sent(network)}\
    ether saddr {gateway_mac} ether saddr set {desired.node.router_mac}
  }}
"""


def node_script(joins: Iterable[str]) -> str:
    """The node's own table, whatever of it was there before.

    What comes from the join pools leaves with the node's address. That address makes a VXLAN datagram believable to
    the other nodes, and VXLAN has no other credential: so nothing that a node forwards may reach a node's VXLAN port,
    or any guest could speak for the fabric of any network; and one that says it is from another node must have come
    where the way to that node begins, or any pod could.

    Networks do not meet in the node, and none meets the default network: into one goes only what the node translates
    (node ports) and what belongs to it; out of one nothing goes to the default network's pods or to the node itself,
    but to the Services that every network may ask, and for names (a resolver may run on the node).
    """
    rules = "".join(
        f'    {"ip6" if ":" in pool else "ip"} saddr {pool} oifname != "{names.JOIN_PREFIX}*" masquerade\n'
        for pool in joins
    )
    return f"""\
add table {NODE_TABLE}
delete table {NODE_TABLE}
table {NODE_TABLE} {{
  set vteps4 {{ type ipv4_addr; }}
  set vteps6 {{ type ipv6_addr; }}
  set tunnels {{ type inet_service; }}
  set vnis {{ typeof @th,96,24; }}
  set ways4 {{ typeof ip saddr . iif; {_SHORT_LIVED} size 4096; }}
  set ways6 {{ typeof ip6 saddr . iif; {_SHORT_LIVED} size 4096; }}
  set pods4 {{ type ipv4_addr; flags interval; }}
  set pods6 {{ type ipv6_addr; flags interval; }}
  set services4 {{ type ipv4_addr; }}
  set services6 {{ type ipv6_addr; }}
  chain vxlan {{
    ip saddr . iif @ways4 accept
    ip6 saddr . iif @ways6 accept
    ip saddr != @vteps4 drop
    ip6 saddr != @vteps6 drop
    fib saddr . iif oif missing drop
    add @ways4 {{ ip saddr . iif }}
    add @ways6 {{ ip6 saddr . iif }}
  }}
  chain begun {{
    ct state established,related accept
    icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
  }}
  chain asked {{
    ct status & dnat == dnat ct original ip daddr @services4 accept
    ct status & dnat == dnat ct original ip6 daddr @services6 accept
  }}
  chain to_node {{
    jump begun
    jump asked
    meta l4proto {{ tcp, udp }} th dport 53 accept
    drop
  }}
  chain from_network {{
    jump begun
    jump asked
    ip daddr @pods4 drop
    ip6 daddr @pods6 drop
  }}
  chain to_network {{
    jump begun
    ct status & dnat == dnat accept
    drop
  }}
  chain input {{
    type filter hook input priority filter - 10; policy accept;
    udp dport @tunnels @th,96,24 @vnis jump vxlan
    iifname "{names.JOIN_PREFIX}*" goto to_node
  }}
  chain forward {{
    type filter hook forward priority filter - 10; policy accept;
    udp dport @tunnels ip daddr @vteps4 drop
    udp dport @tunnels ip6 daddr @vteps6 drop
    iifname "{names.JOIN_PREFIX}*" goto from_network
  }}
  chain into_network {{
    type filter hook postrouting priority filter - 10; policy accept;
    oifname "{names.JOIN_PREFIX}*" goto to_network
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
{rules}\
  }}
}}
"""


NODE_SETS: Final = frozenset({"vteps4", "vteps6", "tunnels", "vnis", "pods4", "pods6", "services4", "services6"})
NODE_CHAINS: Final = frozenset({"vxlan", "into_network", "input", "forward", "postrouting"})


def node_elements_script(missing: Mapping[str, Iterable[str]], stale: Mapping[str, Iterable[str]]) -> str:
    """Bring the node's sets in step: ``vteps`` hold the other nodes, ``tunnels`` VXLAN's port, ``vnis`` this node's
    networks', ``pods`` the default network's subnets, ``services`` the addresses that every network may ask."""
    lines = [
        f"{verb} element {NODE_TABLE} {name} {{ {', '.join(sorted(elements))} }}"
        # In this order, for a subnet may give way to one that holds it.
        for verb, found in (("delete", stale), ("add", missing))
        for name, elements in sorted(found.items())
        if elements
    ]
    return "\n".join(lines) + "\n" if lines else ""


def chains_of(port: InterfaceName) -> tuple[str, str]:
    """The ingress and egress base chain of one port."""
    return f"in_{port}", f"out_{port}"


def port_script(port: LocalPort) -> str:
    """Bind a port and hang it into the common chains. Loaded before the port comes up: no frame passes unchecked."""
    name, endpoint = port.endpoint.port, port.endpoint
    ingress, egress = chains_of(name)
    if endpoint.machine is not None:
        rules = [(ingress, "jump port_in"), (egress, "jump port_out")]
    else:
        rules = [(ingress, "jump source"), (egress, "jump reflection")]
        if endpoint.addresses:
            rules = [
                (ingress, f"ether saddr {endpoint.mac} jump cut"),
                (egress, f"meta mark {CUT_MARK:#x} accept"),
                (egress, f"ether daddr {endpoint.mac} add @here {{ ether daddr : oif }} jump passed"),
                *rules,
            ]
    lines = [f"add element {TABLE} {set_name} {{ {elements} }}" for set_name, elements in _bindings(endpoint)]
    if port.state is PortState.STANDBY:
        lines.append(f'add element {TABLE} standby {{ "{name}" }}')
    for chain, hook in ((ingress, "ingress"), (egress, "egress")):
        lines += [
            f'add chain {TABLE} {chain} {{ type filter hook {hook} device "{name}" priority 0; policy accept; }}',
            f"flush chain {TABLE} {chain}",
        ]
    lines += [f"add rule {TABLE} {chain} {rule}" for chain, rule in rules]
    return "\n".join(lines) + "\n"


def remove_port_script(name: InterfaceName, sets: dict[str, list[str]]) -> str:
    """Take a port out of the tables: ``sets`` holds the elements that were seen.

    Whatever has gone meanwhile (another removal was faster; older kernels drop a device's chains along with it) must
    not fail the transaction: all of it is added again before it is deleted. nft 1.0.6 has no ``destroy``.
    """
    gate = f'"{name}"'  # its guest may have opened the port since
    elements = {**sets, **{gate_set: [gate] for gate_set in ("standby", "open")}}
    # Whoever has its MAC next is behind another port.
    lines = [f"flush map {TABLE} here"]
    for chain in chains_of(name):
        lines += [f"{verb} chain {TABLE} {chain}" for verb in ("add", "flush", "delete")]
    for set_name, found in elements.items():
        if found:
            lines += [f"{verb} element {TABLE} {set_name} {{ {', '.join(found)} }}" for verb in ("add", "delete")]
    return "\n".join(lines) + "\n"


def open_script(port: InterfaceName) -> str:
    """What the guest's RARP does to its own port, for when KubeVirt's word comes first."""
    return f'add element {TABLE} open {{ "{port}" }}\n'


def moved_script(mac: MacAddress) -> str:
    """What the guest's RARP from the fabric does to its old port."""
    return f"add element {TABLE} moved {{ {mac} }}\n"


def not_moved_script(mac: MacAddress) -> str:
    """The machine is on this node again. A deleting transaction: never on the cut-over path."""
    return f"add element {TABLE} moved {{ {mac} }}\ndelete element {TABLE} moved {{ {mac} }}\n"


def join_pools(join: Join) -> tuple[str, str]:
    """The two networks of one join."""
    return str(join.network_ipv4.network), str(join.network_ipv6.network)


def _bindings(endpoint: Endpoint) -> list[tuple[str, str]]:
    port, mac = endpoint.port, endpoint.mac
    found = [("bind", f'"{port}" . {mac}'), ("local", str(mac))]
    found += [("bind4", f'"{port}" . {mac} . {item.ip}') for item in endpoint.addresses if item.version == 4]
    sources = [item.ip for item in endpoint.addresses if item.version == 6] + [addresses.link_local(mac)]
    found += [("bind6", f'"{port}" . {mac} . {address}') for address in sources]
    if endpoint.machine is not None:
        found.append(("rarp", f'"{port}" . 0x{mac.replace(":", "")}'))
    found += [("target6", f'"{port}" . 0x{int(address):032x}') for address in sources]
    return found
