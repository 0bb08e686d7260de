"""nftables rules of service ports, shaped as kube-proxy's nftables mode shapes them. Pure.

One table for each family, replaced as a whole in one transaction; other tables are never touched. Addresses are
translated at priority -100, the place that every kube-proxy uses: whoever translates earlier (-101) wins. What is to be
masqueraded carries kube-proxy's mark 0x4000 from prerouting to postrouting.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from vmnet.lab.proxy.services import Backend, ServicePort

TABLE: Final = "kube-proxy"
MASQUERADE_MARK: Final = "0x4000"
_FAMILIES: Final = {4: ("ip", "ipv4_addr", "127.0.0.0/8"), 6: ("ip6", "ipv6_addr", "::1")}


def ruleset(ports: Iterable[ServicePort], node: str, pod_networks: Sequence[str]) -> str:
    """Text for ``nft -f`` that makes the tables of both families what they should be on ``node``.

    ``pod_networks``: the default network as a whole, one CIDR of each family."""
    everything = list(ports)
    return "".join(
        _table(version, [port for port in everything if port.version == version], node, pod_networks)
        for version in _FAMILIES
    )


def removal() -> str:
    """Text that removes the tables."""
    return "".join(f"table {family} {TABLE}\ndelete table {family} {TABLE}\n" for family, _, _ in _FAMILIES.values())


class _Table:
    """Collects the chains and map elements of one family."""

    def __init__(self, version: int, node: str, pod_network: str) -> None:
        self.family, self.kind, _ = _FAMILIES[version]
        self.node = node
        self.pod_network = pod_network
        self.chains: list[str] = []
        # Of two services that claim the same address and port the first one has it.
        self.service_addresses: dict[str, str] = {}
        self.node_ports: dict[str, str] = {}
        self.missing_addresses: dict[str, str] = {}
        self.missing_node_ports: dict[str, str] = {}
        self.hairpin: set[str] = set()

    def add(self, port: ServicePort) -> None:
        """Chains and elements of one service port."""
        self.hairpin |= {f"{item.address} . {item.address}" for item in port.backends}
        inside = port.local(self.node) if port.internal_local else port.backends
        here = f"{port.cluster_address} . {port.protocol} . {port.port}"
        if inside:
            kind = "local" if port.internal_local else "cluster"
            self.service_addresses.setdefault(here, f"goto {self._balance(port, kind, inside)}")
        else:
            # With Local, endpoints may be elsewhere: the client is to try again, not to be refused.
            verdict = "drop" if port.internal_local and port.backends else "goto refuse"
            self.missing_addresses.setdefault(here, verdict)
        outside = [f"{address} . {port.protocol} . {port.port}" for address in port.external_addresses]
        at_node = [f"{port.protocol} . {port.node_port}"] if port.node_port else []
        if not outside and not at_node:
            return
        if port.backends:
            chain = self._external(port)
            self.service_addresses = {**dict.fromkeys(outside, f"goto {chain}"), **self.service_addresses}
            self.node_ports = {**dict.fromkeys(at_node, f"goto {chain}"), **self.node_ports}
        if not port.backends or (port.external_local and not port.local(self.node)):
            verdict = "drop" if port.backends else "goto refuse"
            self.missing_addresses = {**dict.fromkeys(outside, verdict), **self.missing_addresses}
            self.missing_node_ports = {**dict.fromkeys(at_node, verdict), **self.missing_node_ports}

    def _balance(self, port: ServicePort, kind: str, backends: Sequence[Backend]) -> str:
        """The chain that chooses a backend; made once."""
        name = _chain(kind, port)
        choices = ", ".join(f"{place} : {item.address} . {item.port}" for place, item in enumerate(backends))
        rule = (
            f"meta l4proto {port.protocol} dnat {self.family} to numgen random mod {len(backends)} map {{ {choices} }}"
        )
        self._chain(name, f"# {port.service}:{port.port_name}", rule)
        return name

    def _external(self, port: ServicePort) -> str:
        """What comes from outside: with policy Cluster every backend, but with this node's address as the source."""
        name = _chain("external", port)
        everywhere = self._balance(port, "cluster", port.backends)
        if not port.external_local:
            self._chain(name, "jump mark-for-masquerade", f"goto {everywhere}")
            return name
        local = port.local(self.node)
        self._chain(
            name,
            # Pods and the node itself reach it anyway: they could use the cluster address as well.
            f"{self.family} saddr {self.pod_network} goto {everywhere}",
            "fib saddr type local jump mark-for-masquerade",
            f"fib saddr type local goto {everywhere}",
            *([f"goto {self._balance(port, 'local', local)}"] if local else []),
        )
        return name

    def _chain(self, name: str, *rules: str) -> None:
        text = f"  chain {name} {{\n" + "".join(f"    {rule}\n" for rule in rules) + "  }\n"
        if text not in self.chains:
            self.chains.append(text)

    def text(self, loopback: str) -> str:
        """The whole table."""
        key = f"{self.kind} . inet_proto . inet_service"
        maps = (
            _set("set hairpin", f"{self.kind} . {self.kind}", sorted(self.hairpin))
            + _map("service-addresses", key, self.service_addresses)
            + _map("service-node-ports", "inet_proto . inet_service", self.node_ports)
            + _map("without-endpoint", key, self.missing_addresses)
            + _map("without-endpoint-at-node", "inet_proto . inet_service", self.missing_node_ports)
        )
        chains = "".join(self.chains)
        daddr, mark = f"{self.family} daddr", MASQUERADE_MARK
        return f"""\
table {self.family} {TABLE}
delete table {self.family} {TABLE}
table {self.family} {TABLE} {{
  chain mark-for-masquerade {{
    meta mark set meta mark | {mark}
  }}
  chain refuse {{
    reject
  }}
{chains}{maps}  chain services {{
    {daddr} . meta l4proto . th dport vmap @service-addresses
    fib daddr type local {daddr} != {loopback} meta l4proto . th dport vmap @service-node-ports
  }}
  chain nat-prerouting {{
    type nat hook prerouting priority dstnat;
    jump services
  }}
  chain nat-output {{
    type nat hook output priority -100;
    jump services
  }}
  chain nat-postrouting {{
    type nat hook postrouting priority srcnat;
    meta mark & {mark} == {mark} meta mark set meta mark ^ {mark} masquerade fully-random
    ct status dnat {self.family} saddr . {daddr} @hairpin masquerade fully-random
  }}
  chain endpoint-check {{
    {daddr} . meta l4proto . th dport vmap @without-endpoint
  }}
  chain filter-input {{
    type filter hook input priority filter;
    ct state new jump endpoint-check
    ct state new fib daddr type local {daddr} != {loopback} meta l4proto . th dport vmap @without-endpoint-at-node
  }}
  chain filter-forward {{
    type filter hook forward priority filter;
    ct state new jump endpoint-check
  }}
  chain filter-output {{
    type filter hook output priority filter;
    ct state new jump endpoint-check
  }}
}}
"""


def _table(version: int, ports: Sequence[ServicePort], node: str, pod_networks: Sequence[str]) -> str:
    pod_network = next(text for text in pod_networks if (":" in text) == (version == 6))
    table = _Table(version, node, pod_network)
    for port in ports:
        table.add(port)
    return table.text(_FAMILIES[version][2])


def _chain(kind: str, port: ServicePort) -> str:
    """A name that fits and that no other service port has."""
    digest = hashlib.sha256(f"{port.service}:{port.port_name}:{port.protocol}:{port.port}".encode()).hexdigest()[:12]
    return f"{kind}-{digest}"


def _map(name: str, key: str, elements: Mapping[str, str]) -> str:
    return _set(f"map {name}", f"{key} : verdict", [f"{item} : {verdict}" for item, verdict in elements.items()])


def _set(head: str, kind: str, elements: Sequence[str]) -> str:
    body = f"    elements = {{ {', '.join(elements)} }}\n" if elements else ""
    return f"  {head} {{\n    type {kind}\n{body}  }}\n"
