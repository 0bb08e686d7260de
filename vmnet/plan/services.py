"""Services of one network on one node, as nftables tables: translation in the network, and the way in from the node.

In the network's namespace a verdict map leads from (address, protocol, port) to a chain per service port and family,
which picks a backend. The client's address stays. What comes in over the join (the node's own table sends there what
asks for a node port or an external address) gets this node's transit address, so that answers come back to this node
from wherever the backend is; a Service with the policy Local keeps the client's address and has the backends of this
node alone. Whatever else asks for a cluster address is refused: it belongs to another network.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from vmnet.model import names
from vmnet.model.addresses import IPAddress
from vmnet.model.endpoint import Join, NodeNetwork
from vmnet.model.service import Backend, Service, ServicePort
from vmnet.plan.table import Chain, Elements, Table

NAME: Final = "vmnet-services"
LOCAL_MARK: Final = 0x10
"""On what came in for a Service whose policy is Local: its source is not translated."""
_KEYWORD: Final = {4: "ip", 6: "ip6"}
_TYPE: Final = {4: "ipv4_addr", 6: "ipv6_addr"}
_FAMILIES: Final = (4, 6)


@dataclass(slots=True)
class _Draft:
    """A table in the making."""

    chains: dict[str, Chain] = field(default_factory=dict)
    sets: dict[str, Elements] = field(default_factory=dict)
    inside: dict[int, dict[str, str]] = field(default_factory=lambda: {4: {}, 6: {}})
    """(address . protocol . port) → verdict, for what is asked for within the network."""
    entering: dict[int, dict[str, str]] = field(default_factory=lambda: {4: {}, 6: {}})
    """(protocol . port) → verdict, for what comes over the join."""
    unanswered: dict[int, set[str]] = field(default_factory=lambda: {4: set(), 6: set()})
    hairpins: dict[int, set[str]] = field(default_factory=lambda: {4: set(), 6: set()})


def network_tables(
    desired: NodeNetwork,
    services: Iterable[Service],
    refused: Iterable[IPAddress],
    name_servers: Iterable[IPAddress] = (),
) -> tuple[Table, ...]:
    """The table of one network's namespace. ``refused``: cluster addresses that lead nowhere from it.

    The network's own may be among them: they are served before they could be refused. ``name_servers``: addresses of
    the cluster's DNS; the network's responder, on the gateway's address, answers in its place.
    """
    draft = _Draft()
    for service in services:
        for port in service.ports:
            for version in _FAMILIES:
                _serve(draft, desired, service, port, version)
    foreign = {4: set[str](), 6: set[str]()}
    for address in refused:
        foreign[address.version].add(str(address))
    for version in _FAMILIES:
        kind = _TYPE[version]
        draft.sets |= {
            f"inside{version}": Elements(f"type {kind} . inet_proto . inet_service : verdict;", draft.inside[version]),
            f"entering{version}": Elements("type inet_proto . inet_service : verdict;", draft.entering[version]),
            f"unanswered{version}": Elements(
                f"type {kind} . inet_proto . inet_service;", frozenset(draft.unanswered[version])
            ),
            f"refused{version}": Elements(f"type {kind};", frozenset(foreign[version])),
            f"hairpins{version}": Elements(f"type {kind} . {kind};", frozenset(draft.hairpins[version])),
        }
    known = tuple(name_servers)
    servers = {version: sorted(str(item) for item in known if item.version == version) for version in _FAMILIES}
    chains = {
        **draft.chains,
        "prerouting": Chain(
            tuple(_prerouting(desired, servers)), "type nat hook prerouting priority dstnat; policy accept;"
        ),
        "forward": Chain(tuple(_forward()), "type filter hook forward priority filter - 5; policy accept;"),
        "postrouting": Chain(
            tuple(_postrouting(desired)), "type nat hook postrouting priority srcnat - 5; policy accept;"
        ),
    }
    return (Table("inet", NAME, draft.sets, chains, bridged=bool(draft.inside[4] or draft.inside[6])),)


def node_tables(exposed: Mapping[str, tuple[Join, tuple[Service, ...]]]) -> tuple[Table, ...]:
    """The node's own table: node ports and external addresses to the join of their network.

    ``exposed``: by network, its join on this node and its Services. At the network's end the port is the node port
    for both, so that one map there serves them.
    """
    ports: dict[int, dict[str, str]] = {4: {}, 6: {}}
    external: dict[int, dict[str, str]] = {4: {}, 6: {}}
    limited: dict[int, set[str]] = {4: set(), 6: set()}
    admitted: dict[int, set[str]] = {4: set(), 6: set()}
    for _, (join, services) in sorted(exposed.items()):
        inner = {4: join.network_ipv4.ip, 6: join.network_ipv6.ip}
        for service in services:
            for port in service.ports:
                if port.node_port is None:
                    continue
                for version in {item.version for item in service.addresses}:
                    ports[version][f"{port.protocol} . {port.node_port}"] = str(inner[version])
                for address in service.external:
                    version = address.version
                    key = f"{address} . {port.protocol} . {port.number}"
                    external[version][key] = f"{inner[version]} . {port.node_port}"
                    ranges = [item for item in service.sources if item.version == version]
                    if service.sources:
                        limited[version].add(key)
                        admitted[version] |= {f"{key} . {item}" for item in ranges}
    sets: dict[str, Elements] = {}
    rules, guard = [], []
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
        }
        guard.append(f"{key} @limited{version} {key} . {protocol} saddr != @admitted{version} drop")
        rules += [
            f"meta l4proto {{ tcp, udp, sctp }} dnat {protocol} to {key} map @external{version}",
            f"fib daddr type local meta l4proto {{ tcp, udp, sctp }} dnat {protocol} to meta l4proto . th dport "
            f"map @ports{version}",
        ]
    chains = {
        "guard": Chain(tuple(guard), "type filter hook prerouting priority -102; policy accept;"),
        # Before kube-proxy, which would send them to addresses of the default network.
        "prerouting": Chain(tuple(rules), "type nat hook prerouting priority -101; policy accept;"),
        "output": Chain(tuple(rules), "type nat hook output priority -101; policy accept;"),
    }
    return (Table("inet", NAME, sets, chains),)


def _serve(draft: _Draft, desired: NodeNetwork, service: Service, port: ServicePort, version: int) -> None:
    """One port of one Service, for one family."""
    backends = [backend for backend in port.backends if backend.address.version == version]
    near = [backend for backend in backends if backend.node == desired.node.name]
    within, entering = near if service.internal_local else backends, near if service.external_local else backends
    cluster = [address for address in service.addresses if address.version == version]
    external = [address for address in service.external if address.version == version]
    if not cluster and not external:
        return
    name = _chain_name(service, port, version)
    for chosen, prefix in ((within, "i"), (entering, "e")):
        if chosen and (prefix == "i" or port.node_port is not None):
            marks = ("meta mark set 0x10",) if prefix == "e" and service.external_local else ()
            _choose(draft, f"{prefix}{name}", service, port, chosen, version, marks)
    for address in (*cluster, *external):
        # A pod that asks for an external address means the Service, as one outside does.
        key = f"{address} . {port.protocol} . {port.number}"
        if within:
            draft.inside[version][key] = f"goto i{name}"
        else:
            draft.unanswered[version].add(key)
    if port.node_port is not None and cluster:
        key = f"{port.protocol} . {port.node_port}"
        draft.entering[version][key] = f"goto e{name}" if entering else "drop"
    own = {item.ip for local in desired.ports for item in local.endpoint.addresses}
    draft.hairpins[version] |= {f"{item.address} . {item.address}" for item in within if item.address in own}


def _choose(
    draft: _Draft,
    name: str,
    service: Service,
    port: ServicePort,
    backends: list[Backend],
    version: int,
    marks: tuple[str, ...],
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
        draft.chains[name] = Chain((*marks, rule))
        return
    known, choices = [], []
    for index, backend in enumerate(backends):
        one = f"{name}_{hashlib.sha256(f'{backend.address} {backend.port}'.encode()).hexdigest()[:8]}"
        header = f"type {_TYPE[version]}; flags dynamic,timeout; timeout {service.affinity_seconds}s; size 65535;"
        draft.sets[f"c{one}"] = Elements(header, None)
        update = f"update @c{one} {{ {protocol} saddr }}"
        draft.chains[one] = Chain((*marks, update, f"{to} {_target(backend)}"))
        known.append(f"{protocol} saddr @c{one} goto {one}")
        choices.append(f"{index} : goto {one}")
    draft.chains[name] = Chain((*known, f"numgen random mod {len(backends)} vmap {{ {', '.join(choices)} }}"))


def _prerouting(desired: NodeNetwork, servers: Mapping[int, list[str]]) -> Iterable[str]:
    inner = {4: desired.join.network_ipv4.ip, 6: desired.join.network_ipv6.ip}
    for version in _FAMILIES:
        protocol, gateway = _KEYWORD[version], desired.network.gateway_for(version)
        if servers[version] and gateway is not None:
            yield (
                f'iifname != "{names.UPLINK}" {protocol} daddr {{ {", ".join(servers[version])} }} '
                f"meta l4proto {{ tcp, udp }} th dport 53 dnat {protocol} to {gateway}"
            )
        yield (
            f'iifname "{names.UPLINK}" {protocol} daddr {inner[version]} meta l4proto . th dport '
            f"vmap @entering{version}"
        )
        yield f'iifname != "{names.UPLINK}" {protocol} daddr . meta l4proto . th dport vmap @inside{version}'


def _forward() -> Iterable[str]:
    for version in _FAMILIES:
        protocol = _KEYWORD[version]
        out = f'oifname "{names.UPLINK}"'
        # Refused rather than dropped: whoever asks learns it at once.
        yield f"{out} {protocol} daddr . meta l4proto . th dport @unanswered{version} reject"
        yield f"{out} {protocol} daddr @refused{version} reject"


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
