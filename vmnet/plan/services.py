"""Services of one network on one node, as nftables tables: translation in the network, and the way in from the node.

In the network's namespace a verdict map leads from (address, protocol, port) to a chain per service port and family,
which picks a backend. The client's address stays. What comes in over the join (the node's own table sends there what
asks for a node port or an external address) gets this node's transit address, so that answers come back to this node
from wherever the backend is; a Service with the policy Local keeps the client's address and has the backends of this
node alone. Whatever else asks for a cluster address is refused: it belongs to another network, or to nobody.

As kube-proxy has it: the policies are for whom they name, so pods and nodes, which could as well use the cluster
address, get every backend by an external address or a node port (the node gives them the join's address, by which the
network knows them). Who asks for a Service without any backend is refused; where only other nodes have one, dropped.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Final

from vmnet.model import names
from vmnet.model.addresses import IPAddress, IPNetwork
from vmnet.model.endpoint import Join, NodeNetwork
from vmnet.model.service import Backend, Service, ServicePort
from vmnet.plan.node import JOIN_IPV4, JOIN_IPV6
from vmnet.plan.state import Datagrams
from vmnet.plan.table import Chain, Elements, Table

NAME: Final = "vmnet-services"
LOCAL_MARK: Final = 0x10
"""On what came in for a Service whose policy is Local: its source is not translated."""
_KEYWORD: Final = {4: "ip", 6: "ip6"}
_TYPE: Final = {4: "ipv4_addr", 6: "ipv6_addr"}
_FAMILIES: Final = (4, 6)
_JOINS: Final = {4: JOIN_IPV4, 6: JOIN_IPV6}
_ENTRANCES: Final = range(1024, 30000)
"""Ports of the network's end of the join, for what has an external address but no node port. Nothing listens there."""
_ANY: Final = "meta l4proto { tcp, udp, sctp }"


@dataclass(slots=True)
class _Draft:
    """A table in the making."""

    chains: dict[str, Chain] = field(default_factory=dict)
    sets: dict[str, Elements] = field(default_factory=dict)
    inside: dict[int, dict[str, str]] = field(default_factory=lambda: {4: {}, 6: {}})
    """(address . protocol . port) → verdict, for what is asked for within the network."""
    entering: dict[int, dict[str, str]] = field(default_factory=lambda: {4: {}, 6: {}})
    """(protocol . port) → verdict, for what comes over the join."""
    through: dict[int, dict[str, str]] = field(default_factory=lambda: {4: {}, 6: {}})
    """The same, for pods and nodes, where the Service's policy is not for them."""
    unanswered: dict[int, set[str]] = field(default_factory=lambda: {4: set(), 6: set()})
    closed: dict[int, set[str]] = field(default_factory=lambda: {4: set(), 6: set()})
    """(protocol . port) of what comes over the join, and nobody serves."""
    hairpins: dict[int, set[str]] = field(default_factory=lambda: {4: set(), 6: set()})


def network_tables(
    desired: NodeNetwork,
    services: Iterable[Service],
    refused: Iterable[IPAddress],
    name_servers: Iterable[IPAddress] = (),
    ranges: Iterable[IPNetwork] = (),
    shared: Iterable[IPAddress] = (),
) -> tuple[Table, ...]:
    """The table of one network's namespace. ``refused``: cluster addresses that lead nowhere from it.

    The network's own may be among them: they are served before they could be refused. ``ranges``: where the cluster
    takes cluster addresses from; of those only the ones ``shared`` by all networks are asked for outside of it.
    ``name_servers``: addresses of the cluster's DNS; the network's responder, on the gateway's address, answers in its
    place.
    """
    draft, found = _Draft(), tuple(services)
    doors, own = entrances(found), {item.ip for local in desired.ports for item in local.endpoint.addresses}
    for service in found:
        for port in service.ports:
            for version in sorted({item.version for item in service.addresses}):
                _serve(draft, desired.node.name, service, port, version, doors.get(_key(service, port)))
                backends = {item.address for item in (*port.backends, *port.ending) if item.address.version == version}
                draft.hairpins[version] |= {f"{item} . {item}" for item in backends & own}
    foreign = {4: set[str](), 6: set[str]()}
    for address in refused:
        foreign[address.version].add(str(address))
    for version in _FAMILIES:
        kind = _TYPE[version]
        draft.sets |= {
            f"inside{version}": Elements(f"type {kind} . inet_proto . inet_service : verdict;", draft.inside[version]),
            f"entering{version}": Elements("type inet_proto . inet_service : verdict;", draft.entering[version]),
            f"through{version}": Elements("type inet_proto . inet_service : verdict;", draft.through[version]),
            f"unanswered{version}": Elements(
                f"type {kind} . inet_proto . inet_service;", frozenset(draft.unanswered[version])
            ),
            f"closed{version}": Elements("type inet_proto . inet_service;", frozenset(draft.closed[version])),
            f"refused{version}": Elements(f"type {kind};", frozenset(foreign[version])),
            f"hairpins{version}": Elements(f"type {kind} . {kind};", frozenset(draft.hairpins[version])),
        }
    servers, passed = _by_family(name_servers), _by_family(shared)
    chains = {
        **draft.chains,
        "prerouting": Chain(
            tuple(_prerouting(desired, servers)), "type nat hook prerouting priority dstnat; policy accept;"
        ),
        "leaving": Chain(tuple(_leaving(_merged(ranges), passed))),
        "forward": Chain(
            (f'oifname "{names.UPLINK}" goto leaving',), "type filter hook forward priority filter - 5; policy accept;"
        ),
        "input": Chain(tuple(_input(desired)), "type filter hook input priority filter - 5; policy accept;"),
        "postrouting": Chain(
            tuple(_postrouting(desired)), "type nat hook postrouting priority srcnat - 5; policy accept;"
        ),
    }
    return (Table("inet", NAME, draft.sets, chains, bridged=bool(draft.inside[4] or draft.inside[6])),)


def node_tables(
    exposed: Mapping[str, tuple[Join, tuple[Service, ...]]], pods: Iterable[IPNetwork] = ()
) -> tuple[Table, ...]:
    """The node's own table: node ports and external addresses to the join of their network.

    ``exposed``: by network, its join on this node and its Services. At the network's end every service port has one
    port, the node port where there is one, so that one map there serves them. ``pods``: the default network.
    """
    ports: dict[int, dict[str, str]] = {4: {}, 6: {}}
    external: dict[int, dict[str, str]] = {4: {}, 6: {}}
    limited: dict[int, set[str]] = {4: set(), 6: set()}
    admitted: dict[int, set[str]] = {4: set(), 6: set()}
    ends: dict[int, dict[str, str]] = {4: {}, 6: {}}
    hairpins: dict[int, set[str]] = {4: set(), 6: set()}
    for _, (join, services) in sorted(exposed.items()):
        inner = {4: join.network_ipv4.ip, 6: join.network_ipv6.ip}
        for version, outer in ((4, join.node_ipv4.ip), (6, join.node_ipv6.ip)):
            ends[version][str(inner[version])] = str(outer)
            hairpins[version].add(f"{inner[version]} . {inner[version]}")
        doors = entrances(services)
        for service in services:
            for port in service.ports:
                for version in {item.version for item in service.addresses} if port.node_port is not None else ():
                    ports[version].setdefault(f"{port.protocol} . {port.node_port}", str(inner[version]))
                for address in service.external:
                    version, key = address.version, f"{address} . {port.protocol} . {port.number}"
                    if key in external[version]:
                        continue  # Two claim one address and port: the first one has it.
                    external[version][key] = f"{inner[version]} . {doors[_key(service, port)]}"
                    if service.sources and address in service.balancers:
                        limited[version].add(key)
                        admitted[version] |= {f"{key} . {item}" for item in _merged(service.sources)[version]}
    sets: dict[str, Elements] = {}
    rules, guard, disguise = [], [], []
    neighbours = _merged(pods)
    for version in _FAMILIES:
        protocol, kind = _KEYWORD[version], _TYPE[version]
        key = f"{protocol} daddr . meta l4proto . th dport"
        sets |= {
            f"ports{version}": Elements(f"type inet_proto . inet_service : {kind};", ports[version]),
            f"external{version}": Elements(
                f"type {kind} . inet_proto . inet_service : {kind} . inet_service;", external[version]
            ),
            f"limited{version}": Elements(f"type {kind} . inet_proto . inet_service;", frozenset(limited[version])),
            f"admitted{version}": Elements(
                f"type {kind} . inet_proto . inet_service . {kind}; flags interval;", frozenset(admitted[version])
            ),
            f"ends{version}": Elements(f"type {kind} : {kind};", ends[version]),
            f"hairpins{version}": Elements(f"type {kind} . {kind};", frozenset(hairpins[version])),
        }
        guard.append(f"{key} @limited{version} {key} . {protocol} saddr != @admitted{version} drop")
        rules += [
            f"{_ANY} dnat {protocol} to {key} map @external{version}",
            f"fib daddr type local {_ANY} dnat {protocol} to meta l4proto . th dport map @ports{version}",
        ]
        sources = ["fib saddr type local", f"{protocol} saddr . {protocol} daddr @hairpins{version}"]
        if neighbours[version]:
            sources.append(f"{protocol} saddr {{ {', '.join(neighbours[version])} }}")
        disguise += [
            f'oifname "{names.JOIN_PREFIX}*" ct status dnat meta nfproto ipv{version} {source} '
            f"snat {protocol} to {protocol} daddr map @ends{version}"
            for source in sources
        ]
    chains = {
        "guard": Chain(tuple(guard), "type filter hook prerouting priority -102; policy accept;"),
        # Before kube-proxy, which would send them to addresses of the default network.
        "prerouting": Chain(tuple(rules), "type nat hook prerouting priority -101; policy accept;"),
        "output": Chain(tuple(rules), "type nat hook output priority -101; policy accept;"),
        # The node, pods, and the network's own pods by a node's address: they enter as neighbours do.
        "postrouting": Chain(tuple(disguise), "type nat hook postrouting priority srcnat - 5; policy accept;"),
    }
    return (Table("inet", NAME, sets, chains),)


def entrances(services: Iterable[Service]) -> dict[tuple[str, str, str, int], int]:
    """By namespace, name, protocol and port: the port at the network's end of the join, where a node leads there.

    That of a service port without a node port follows from its name, so that others that come and go leave it alone.
    """
    exposed = [(_key(service, port), port) for service in services if service.exposed for port in service.ports]
    found = {key: port.node_port for key, port in exposed if port.node_port is not None}
    taken = {(key[2], number) for key, number in found.items()}
    for key, port in sorted(exposed, key=lambda item: item[0]):
        if port.node_port is None:
            place = int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:4])
            while (port.protocol, _ENTRANCES[place % len(_ENTRANCES)]) in taken:
                place += 1
            found[key] = _ENTRANCES[place % len(_ENTRANCES)]
            taken.add((port.protocol, found[key]))
    return found


Place = tuple[IPAddress, int]
"""An address and a port."""


def datagram_backends(desired: NodeNetwork, services: Iterable[Service]) -> dict[Place, frozenset[Place]]:
    """For UDP, by what may be asked for in the network's namespace: who may answer."""
    found: dict[Place, frozenset[Place]] = {}
    known = tuple(services)
    doors = entrances(known)
    inner: dict[int, IPAddress] = {4: desired.join.network_ipv4.ip, 6: desired.join.network_ipv6.ip}
    for service in known:
        for port in (port for port in service.ports if port.protocol == "udp"):
            door = doors.get(_key(service, port))
            for version in {item.version for item in service.addresses}:
                chosen = {item for item in port.backends if item.address.version == version}
                chosen |= set(port.near(desired.node.name, version))
                backends = frozenset((item.address, item.port) for item in chosen)
                asked = [item for item in (*service.addresses, *service.external) if item.version == version]
                found |= {(address, port.number): backends for address in asked}
                if door is not None:
                    found[inner[version], door] = backends
    return found


def node_datagrams(
    exposed: Mapping[str, tuple[Join, tuple[Service, ...]]],
) -> tuple[dict[Place, Place], dict[tuple[int, int], Place]]:
    """For UDP, where ``node_tables`` lead to: by external address and port, and by family and node port."""
    external: dict[Place, Place] = {}
    ports: dict[tuple[int, int], Place] = {}
    for _, (join, known) in sorted(exposed.items()):
        inner: dict[int, IPAddress] = {4: join.network_ipv4.ip, 6: join.network_ipv6.ip}
        doors = entrances(known)
        for service in known:
            for port in (port for port in service.ports if port.protocol == "udp"):
                number = port.node_port
                if number is not None:
                    for version in {item.version for item in service.addresses}:
                        ports.setdefault((version, number), (inner[version], number))
                for address in service.external:
                    external.setdefault((address, port.number), (inner[address.version], doors[_key(service, port)]))
    return external, ports


def astray(
    entries: Iterable[Datagrams], external: Mapping[Place, Place], ports: Mapping[tuple[int, int], Place]
) -> frozenset[Datagrams]:
    """Of the node's entries those that lead into a network by a way that is another one's now, or nobody's."""
    return frozenset(
        entry
        for entry in entries
        if (entry.backend, entry.backend_port) != (entry.asked, entry.port)
        and any(entry.backend.version == pool.version and entry.backend in pool for pool in (JOIN_IPV4, JOIN_IPV6))
        and (entry.backend, entry.backend_port)
        != external.get((entry.asked, entry.port), ports.get((entry.asked.version, entry.port)))
    )


def stale(
    entries: Iterable[Datagrams], wanted: Mapping[Place, frozenset[Place]], former: Collection[Place] = ()
) -> frozenset[Datagrams]:
    """The entries that lead to who may not answer. ``former``: what was asked for, and is not served now."""
    return frozenset(
        entry
        for entry in entries
        if (entry.asked, entry.port) in former
        or (entry.backend, entry.backend_port)
        not in wanted.get((entry.asked, entry.port), {(entry.backend, entry.backend_port)})
    )


def _key(service: Service, port: ServicePort) -> tuple[str, str, str, int]:
    return service.namespace, service.name, port.protocol, port.number


def _by_family(found: Iterable[IPAddress]) -> dict[int, list[str]]:
    known = tuple(found)
    return {version: sorted(str(item) for item in known if item.version == version) for version in _FAMILIES}


def _merged(found: Iterable[IPNetwork]) -> dict[int, list[str]]:
    """Those that overlap are one, for a set of intervals refuses them."""
    known = tuple(found)
    return {
        4: [str(item) for item in collapse_addresses(item for item in known if isinstance(item, IPv4Network))],
        6: [str(item) for item in collapse_addresses(item for item in known if isinstance(item, IPv6Network))],
    }


def _serve(draft: _Draft, node: str, service: Service, port: ServicePort, version: int, door: int | None) -> None:
    """One port of one Service, for one of its families."""
    name = _chain_name(service, port, version)
    everywhere = [backend for backend in port.backends if backend.address.version == version]
    near = list(port.near(node, version))
    entered = door is not None and (port.node_port is not None or any(a.version == version for a in service.external))
    if everywhere:
        _choose(draft, name, "c", service, port, everywhere, version)
    if near and (service.internal_local or (service.external_local and entered)):
        _choose(draft, name, "n", service, port, near, version)
    anybody = bool(everywhere or near)
    for address in (item for item in service.addresses if item.version == version):
        key = f"{address} . {port.protocol} . {port.number}"
        if not anybody:
            draft.unanswered[version].add(key)
        elif service.internal_local:
            # Others have endpoints: the client is to try again.
            draft.inside[version][key] = f"goto n{name}" if near else "drop"
        else:
            draft.inside[version][key] = f"goto c{name}"
    for address in (item for item in service.external if item.version == version):
        key = f"{address} . {port.protocol} . {port.number}"
        if not anybody:
            draft.unanswered[version].add(key)
        elif service.sources and address in service.balancers:
            ranges = _merged(service.sources)[version]
            passing = (f"{_KEYWORD[version]} saddr {{ {', '.join(ranges)} }} goto c{name}",) if ranges else ()
            draft.chains[f"s{name}"] = Chain((*passing, "drop"))
            draft.inside[version].setdefault(key, f"goto s{name}")
        else:
            draft.inside[version].setdefault(key, f"goto c{name}")
    if not entered:
        return
    key = f"{port.protocol} . {door}"
    if not anybody:
        draft.closed[version].add(key)
    elif not service.external_local:
        draft.entering[version][key] = f"goto c{name}"
    else:
        draft.through[version][key] = f"goto c{name}"
        draft.entering[version][key] = f"goto l{name}" if near else "drop"
        if near:
            draft.chains[f"l{name}"] = Chain((f"meta mark set {LOCAL_MARK:#x}", f"goto n{name}"))


def _choose(
    draft: _Draft, name: str, prefix: str, service: Service, port: ServicePort, backends: list[Backend], version: int
) -> None:
    """The chain that picks one of the backends, by chance, or by where a client went before."""
    protocol = _KEYWORD[version]
    to = f"meta l4proto {port.protocol} dnat {protocol} to"
    if service.affinity_seconds is None:
        if len(backends) == 1:
            rule = f"{to} {_target(backends[0])}"
        else:
            targets = ", ".join(f"{index} : {item.address} . {item.port}" for index, item in enumerate(backends))
            rule = f"{to} numgen random mod {len(backends)} map {{ {targets} }}"
        draft.chains[f"{prefix}{name}"] = Chain((rule,))
        return
    known, choices = [], []
    for index, backend in enumerate(backends):
        one = f"{name}_{hashlib.sha256(f'{backend.address} {backend.port}'.encode()).hexdigest()[:8]}"
        header = f"type {_TYPE[version]}; flags dynamic,timeout; timeout {service.affinity_seconds}s; size 65535;"
        # One for every way to it: a client may come by another one the next time.
        draft.sets[f"k{one}"] = Elements(header, None)
        draft.chains[f"b{one}"] = Chain((f"update @k{one} {{ {protocol} saddr }}", f"{to} {_target(backend)}"))
        known.append(f"{protocol} saddr @k{one} goto b{one}")
        choices.append(f"{index} : goto b{one}")
    choice = f"numgen random mod {len(backends)} vmap {{ {', '.join(choices)} }}"
    draft.chains[f"{prefix}{name}"] = Chain((*known, choice))


def _prerouting(desired: NodeNetwork, servers: Mapping[int, list[str]]) -> Iterable[str]:
    inner = {4: desired.join.network_ipv4.ip, 6: desired.join.network_ipv6.ip}
    for version in _FAMILIES:
        protocol, gateway = _KEYWORD[version], desired.network.gateway_for(version)
        if servers[version] and gateway is not None:
            yield (
                f'iifname != "{names.UPLINK}" {protocol} daddr {{ {", ".join(servers[version])} }} '
                f"meta l4proto {{ tcp, udp }} th dport 53 dnat {protocol} to {gateway}"
            )
        entering = f'iifname "{names.UPLINK}" {protocol} daddr {inner[version]}'
        yield f"{entering} {protocol} saddr {_JOINS[version]} meta l4proto . th dport vmap @through{version}"
        yield f"{entering} meta l4proto . th dport vmap @entering{version}"
        yield f'iifname != "{names.UPLINK}" {protocol} daddr . meta l4proto . th dport vmap @inside{version}'


def _leaving(ranges: Mapping[int, list[str]], passed: Mapping[int, list[str]]) -> Iterable[str]:
    """Of what would leave the network."""
    for version in _FAMILIES:
        protocol = _KEYWORD[version]
        # Refused rather than dropped: whoever asks learns it at once.
        yield f"{protocol} daddr . meta l4proto . th dport @unanswered{version} reject"
        yield f"{protocol} daddr @refused{version} reject"
        if ranges[version]:
            but = f"{protocol} daddr != {{ {', '.join(passed[version])} }} " if passed[version] else ""
            yield f"{protocol} daddr {{ {', '.join(ranges[version])} }} {but}reject"


def _input(desired: NodeNetwork) -> Iterable[str]:
    for version, inner in ((4, desired.join.network_ipv4.ip), (6, desired.join.network_ipv6.ip)):
        protocol = _KEYWORD[version]
        yield (
            f'iifname "{names.UPLINK}" {protocol} daddr {inner} meta l4proto . th dport @closed{version} '
            f"meta nfproto ipv{version} reject"
        )


def _postrouting(desired: NodeNetwork) -> Iterable[str]:
    for version in _FAMILIES:
        protocol = _KEYWORD[version]
        gateway = desired.network.gateway_for(version)
        if gateway is not None:
            # A pod that reached itself would answer itself, untranslated.
            yield f"ct status dnat {protocol} saddr . {protocol} daddr @hairpins{version} snat {protocol} to {gateway}"
        transit = next((item.ip for item in desired.node.transit if item.version == version), None)
        if transit is not None:
            yield (
                f'iifname "{names.UPLINK}" oifname != "{names.UPLINK}" ct status dnat meta mark != {LOCAL_MARK:#x} '
                f"meta nfproto ipv{version} snat {protocol} to {transit}"
            )


def _target(backend: Backend) -> str:
    return (
        f"{backend.address}:{backend.port}" if backend.address.version == 4 else f"[{backend.address}]:{backend.port}"
    )


def _chain_name(service: Service, port: ServicePort, version: int) -> str:
    text = f"{service.namespace}/{service.name}/{port.protocol}/{port.number}/{version}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]
