"""NetworkPolicy inside one network: who may speak to whom, as nftables tables.

A policy is judged where its pods are: egress where the source's port is, ingress where the destination's is, by the
``forward`` hook, which sees routed packets and (br_netfilter) bridged ones. Each isolated port's address leads, by a
verdict map, to the chain of exactly the policies that select its pod; a chain's rules name sets of peers. A set belongs
to a selector, not to a policy or a port, so a pod that comes or changes its labels is one element in each set that
selects it, however many pods the policies apply to; the number of rules follows from the policies alone.

Chains are named by what is in them, and sets by their selector. So a changed policy is a new chain: a packet that is on
its way while the kernel changes over meets the old rules or the new ones, never a mixture.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Final

from vmnet.model.addresses import IPAddress, IPNetwork
from vmnet.model.endpoint import Endpoint, PodReference
from vmnet.model.names import InterfaceName
from vmnet.model.policy import NAMESPACE_NAME_LABEL, BlockPeer, Operator, Policy, PolicyPort, Protocol, Rule, Selector
from vmnet.plan.table import Chain, Elements, Table

NAME: Final = "vmnet-policy"

_FAMILIES: Final = ((4, "ip", "ipv4_addr"), (6, "ip6", "ipv6_addr"))
_UNBLOCKED: Final = (
    "nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, "
    "mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report"
)
"""Neighbour and multicast listener discovery. What the gateway sends and gets (DHCP, RA, DNS) is not forwarded."""
_MULTICAST: Final = "ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00"

NamedPort = tuple[str, Protocol, int]


@dataclass(frozen=True)
class Member:
    """A pod on the network: what policies ask of it. ``ports``: the ports its containers name."""

    pod: PodReference
    labels: Mapping[str, str]
    addresses: tuple[IPAddress, ...]
    ports: frozenset[NamedPort] = frozenset()

    @cached_property
    def texts(self) -> tuple[tuple[int, str], ...]:
        """Each address with its IP version, as nft reads it."""
        return tuple((address.version, str(address)) for address in self.addresses)


@dataclass(frozen=True, slots=True)
class _Group:
    """Pods that a selector finds: in one namespace, or in those that another selector finds."""

    pods: Selector
    namespaces: str | Selector

    @property
    def key(self) -> str:
        return _digest(repr(self))

    def element(self, address: str, member: Member) -> Iterable[str]:
        return (address,)


@dataclass(frozen=True, slots=True)
class _Named:
    """Where a port of this name is, on each pod that has one."""

    name: str
    protocol: Protocol

    @property
    def key(self) -> str:
        return _digest(repr(self))

    def element(self, address: str, member: Member) -> Iterable[str]:
        for name, protocol, number in member.ports:
            if (name, protocol) == (self.name, self.protocol):
                yield f"{address} . {protocol.lower()} . {number}"


class _Collection:
    """The elements that a group, or a port's name, has in the network; of each IP version a set that is made once."""

    def __init__(self, of: _Group | _Named) -> None:
        self._of = of
        # Two pods of a machine that migrates have the same address.
        self._counts: dict[int, Counter[str]] = {4: Counter(), 6: Counter()}
        self._made: dict[int, Elements] = {}

    def change(self, before: Member | None, after: Member | None) -> bool:
        """Put another state of a pod in the place of one; whether it made a difference."""
        old, new = self._elements(before), self._elements(after)
        if old == new:
            return False
        changed = False
        for elements, step in ((new, 1), (old, -1)):
            for version, text in elements:
                counts = self._counts[version]
                counts[text] += step
                if counts[text] == 0:
                    del counts[text]
                changed = True
                self._made.pop(version, None)
        return changed

    def elements(self, version: int) -> Elements:
        """The set of one IP version."""
        if version not in self._made:
            kind = "ipv4_addr" if version == 4 else "ipv6_addr"
            more = " . inet_proto . inet_service" if isinstance(self._of, _Named) else ""
            self._made[version] = Elements(f"type {kind}{more};", frozenset(self._counts[version]))
        return self._made[version]

    def _elements(self, member: Member | None) -> list[tuple[int, str]]:
        if member is None:
            return []
        return sorted((version, text) for version, item in member.texts for text in self._of.element(item, member))


@dataclass(frozen=True, slots=True)
class _Side:
    """One direction of one policy, as rules; what their sets are made from."""

    rules: tuple[str, ...]
    needs: frozenset[_Group | _Named]


class NetworkPolicies:
    """Policies and pods of one network, kept in step change by change. Pure: it asks nothing and knows no time.

    The ``put_…`` and ``drop_…`` methods tell whether tables made before may now be different.
    """

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._by_namespace: dict[str, set[str]] = {}
        self._by_label: dict[tuple[str, str], set[str]] = {}
        self._namespaces: dict[str, Mapping[str, str]] = {}
        self._policies: dict[str, dict[str, Policy]] = {}
        """By namespace, then by name."""
        self._sides: dict[tuple[str, bool], _Side | None] = {}
        self._collections: dict[_Group | _Named, _Collection] = {}
        """Made when first asked for."""
        self._selected: dict[str, tuple[str, ...]] = {}
        """Of this node's pods, by their keys: keys of the policies that select them."""
        self._strangers: set[str] = set()
        """Pods whose ports were asked for, but that were not known, or not as those."""

    def namespaces(self) -> frozenset[str]:
        """Namespaces of its pods."""
        return frozenset(self._by_namespace)

    def put_member(self, member: Member) -> bool:
        """A pod has come, or is not as it was."""
        key = _key(member.pod)
        before = self._members.get(key)
        if before == member:
            return False
        self._members[key] = member
        self._by_namespace.setdefault(member.pod.namespace, set()).add(key)
        return self._changed(key, before, member)

    def drop_member(self, namespace: str, name: str) -> bool:
        """A pod is no longer on the network."""
        key = f"{namespace}/{name}"
        before = self._members.pop(key, None)
        if before is None:
            return False
        keys = self._by_namespace[namespace]
        keys.discard(key)
        if not keys:
            del self._by_namespace[namespace]
        return self._changed(key, before, None)

    def put_namespace(self, name: str, labels: Mapping[str, str]) -> bool:
        """A namespace is known, with these labels."""
        labels = {**labels, NAMESPACE_NAME_LABEL: name}
        return self._relabel(name, labels)

    def drop_namespace(self, name: str) -> bool:
        """A namespace is not known: no selector of namespaces finds it."""
        return self._relabel(name, None)

    def put_policy(self, name: str, policy: Policy) -> bool:
        """A policy has come, or is not as it was."""
        first = not self._policies
        policies = self._policies.setdefault(policy.namespace, {})
        if policies.get(name) == policy:
            return False
        policies[name] = policy
        return self._reselect(policy.namespace, name) or (first and bool(self._strangers))

    def drop_policy(self, namespace: str, name: str) -> bool:
        """A policy is gone."""
        policies = self._policies.get(namespace, {})
        if policies.pop(name, None) is None:
            return False
        if not policies:
            del self._policies[namespace]
        return self._reselect(namespace, name) or (not self._policies and bool(self._strangers))

    def tables(self, local: Iterable[Endpoint]) -> tuple[Table, ...]:
        """Tables of the node that has these ports; none while no policy isolates any of them.

        A port whose pod is not known is closed: nobody can say what selects it.
        """
        ports = [(endpoint, self._selecting(endpoint)) for endpoint in local]
        self._strangers = {_key(endpoint.pod) for endpoint, policies in ports if policies is None}
        if not self._policies:
            return ()
        chains: dict[str, Chain] = {}
        verdicts: dict[str, dict[str, str]] = {}
        needs: set[_Group | _Named] = set()
        by_address = _by_address(ports)
        together = {policies for _, policies in ports} | set(by_address.values())
        for egress in (True, False):
            profiles = {policies: self._profile(policies, egress=egress) for policies in together}
            for address, policies in by_address.items():
                profile = profiles[policies]
                if profile is not None:
                    chains[profile.name] = profile.chain
                    needs |= profile.needs
                    verdicts.setdefault(_verdicts(egress, address.version), {})[str(address)] = f"jump {profile.name}"
        if not chains:
            return ()
        for need in self._collections.keys() - needs:
            del self._collections[need]
        # In order, for the digest tells the order.
        chains = {"moved": _MOVED, **dict(sorted(chains.items())), "forward": _FORWARD}
        sets = {**_ARRIVED, **self._maps(verdicts), **self._sets(needs)}
        judged = Table("inet", NAME, sets, chains, bridged=True)
        secluded = {endpoint.port for endpoint, policies in ports if profiles[policies] is not None}
        return (judged, _multicast(secluded)) if secluded else (judged,)

    # Inside

    def _changed(self, key: str, before: Member | None, after: Member | None) -> bool:
        changed = self._selected.pop(key, None) is not None or key in self._strangers
        for state, present in ((before, False), (after, True)):
            for label in state.labels.items() if state is not None else ():
                keys = self._by_label.setdefault(label, set())
                (keys.add if present else keys.discard)(key)
                if not keys:
                    del self._by_label[label]
        for of, collection in self._collections.items():
            was = before if before is not None and self._belongs(of, before) else None
            now = after if after is not None and self._belongs(of, after) else None
            changed |= collection.change(was, now)
        return changed

    def _relabel(self, name: str, labels: Mapping[str, str] | None) -> bool:
        before = self._namespaces.get(name)
        if before == labels:
            return False
        changed = False
        for of, collection in self._collections.items():
            if isinstance(of, _Group) and isinstance(of.namespaces, Selector):
                was, now = (found is not None and of.namespaces.matches(found) for found in (before, labels))
                for key in self._by_namespace.get(name, ()) if was != now else ():
                    member = self._members[key]
                    if of.pods.matches(member.labels):
                        changed |= collection.change(member if was else None, member if now else None)
        if labels is None:
            del self._namespaces[name]
        else:
            self._namespaces[name] = labels
        return changed

    def _reselect(self, namespace: str, name: str) -> bool:
        for egress in (True, False):
            self._sides.pop((f"{namespace}/{name}", egress), None)
        selected = [key for key in self._selected if key.startswith(f"{namespace}/")]
        for key in selected:
            del self._selected[key]
        return bool(selected)

    def _belongs(self, of: _Group | _Named, member: Member) -> bool:
        if isinstance(of, _Named):
            return True
        if isinstance(of.namespaces, Selector):
            labels = self._namespaces.get(member.pod.namespace)
            if labels is None or not of.namespaces.matches(labels):
                return False
        elif of.namespaces != member.pod.namespace:
            return False
        return of.pods.matches(member.labels)

    def _collection(self, of: _Group | _Named) -> _Collection:
        found = self._collections.get(of)
        if found is None:
            found = self._collections[of] = _Collection(of)
            for key in self._candidates(of):
                member = self._members[key]
                if self._belongs(of, member):
                    found.change(None, member)
        return found

    def _candidates(self, of: _Group | _Named) -> Iterable[str]:
        """Pods that may belong: not all of the network's are worth a look."""
        if isinstance(of, _Named):
            return self._members
        for requirement in of.pods.requirements:
            if requirement.operator is Operator.IN:
                listed = (self._by_label.get((requirement.key, value), ()) for value in requirement.values)
                return {key for keys in listed for key in keys}
        return self._by_namespace.get(of.namespaces, ()) if isinstance(of.namespaces, str) else self._members

    def _selecting(self, endpoint: Endpoint) -> tuple[str, ...] | None:
        """Policies that select a pod; None when the pod is not known."""
        key = _key(endpoint.pod)
        member = self._members.get(key)
        if member is None or member.pod.uid != endpoint.pod.uid:
            return None
        if key not in self._selected:
            policies = self._policies.get(member.pod.namespace, {})
            self._selected[key] = tuple(
                f"{member.pod.namespace}/{name}"
                for name, policy in sorted(policies.items())
                if policy.pods.matches(member.labels)
            )
        return self._selected[key]

    def _side(self, key: str, *, egress: bool) -> _Side | None:
        """What one policy admits in one direction; None when it isolates nobody in it."""
        if (key, egress) not in self._sides:
            namespace, _, name = key.partition("/")
            policy = self._policies[namespace][name]
            rules = policy.egress if egress else policy.ingress
            peer = "daddr" if egress else "saddr"
            self._sides[key, egress] = _side(namespace, rules, peer) if rules is not None else None
        return self._sides[key, egress]

    def _profile(self, policies: tuple[str, ...] | None, *, egress: bool) -> "_Profile | None":
        """What several policies admit together in one direction; None when that is everything."""
        if policies is None:
            return _profile((), frozenset(), egress=egress)
        sides = [side for key in policies if (side := self._side(key, egress=egress)) is not None]
        rules = tuple(dict.fromkeys(rule for side in sides for rule in side.rules))
        if not sides or _OPEN in rules:
            return None
        return _profile(rules, frozenset(need for side in sides for need in side.needs), egress=egress)

    def _maps(self, verdicts: Mapping[str, Mapping[str, str]]) -> dict[str, Elements]:
        """Where each isolated address' chains are, and that it may speak to itself, by way of a service."""
        found = {}
        for version, _, kind in _FAMILIES:
            addresses = set[str]()
            for egress in (True, False):
                name = _verdicts(egress, version)
                found[name] = Elements(f"type {kind} : verdict;", verdicts.get(name, {}))
                addresses |= verdicts.get(name, {}).keys()
            itself = frozenset(f"{address} . {address}" for address in addresses)
            found[f"self{version}"] = Elements(f"type {kind} . {kind};", itself)
        return found

    def _sets(self, needs: Iterable[_Group | _Named]) -> dict[str, Elements]:
        return {
            _set(need, version): self._collection(need).elements(version)
            for need in sorted(needs, key=lambda item: item.key)
            for version, _, _ in _FAMILIES
        }


@dataclass(frozen=True, slots=True)
class _Profile:
    """A chain that the addresses of equally isolated pods lead to."""

    name: str
    chain: Chain
    needs: frozenset[_Group | _Named]


_OPEN: Final = "return"
"""A rule that admits everything. To return is to go on: from egress to ingress, and from ingress out of the hook."""
_ARRIVED: Final = {
    f"arrived{version}": Elements(f"type {kind}; flags timeout; timeout 30s;", None) for version, _, kind in _FAMILIES
}
"""Machines that have come without their connections: the agent they left did not answer. For a short time only."""
_MOVED: Final = Chain(
    tuple(
        # A connection's middle; nothing tells it from a probe that pretends to be one (an ACK scan).
        f"ct state new tcp flags & (syn | rst) == 0x0 {word} {side} @arrived{version} accept"
        for version, word, _ in _FAMILIES
        for side in ("saddr", "daddr")
    )
)
_FORWARD: Final = Chain(
    (
        "ct state established,related accept",
        f"icmpv6 type {{ {_UNBLOCKED} }} accept",
        # For a moved machine's connections, which this node has never seen begin.
        "jump moved",
        *(f"{word} saddr . {word} daddr @self{version} accept" for version, word, _ in _FAMILIES),
        *(f"{word} saddr vmap @out{version}" for version, word, _ in _FAMILIES),
        *(f"{word} daddr vmap @in{version}" for version, word, _ in _FAMILIES),
    ),
    "type filter hook forward priority filter; policy accept;",
)


def _multicast(secluded: Iterable[InterfaceName]) -> Table:
    """What is sent to many names no destination that the policies could judge: isolated ports do not get it.

    The ``forward`` hook of the IP families does not know the port that a frame leaves by; the bridge's does.
    """
    ports = frozenset(f'"{name}"' for name in secluded)
    rules = (
        f"{_MULTICAST} jump many",
        "accept",
    )
    many = (
        "oifname != @secluded accept",
        f"icmpv6 type {{ {_UNBLOCKED} }} accept",
        "ether type { ip, ip6 } drop",
    )
    return Table(
        "bridge",
        NAME,
        {"secluded": Elements("type ifname;", ports)},
        {"many": Chain(many), "forward": Chain(rules, "type filter hook forward priority 0; policy accept;")},
    )


def _profile(rules: tuple[str, ...], needs: frozenset[_Group | _Named], *, egress: bool) -> _Profile:
    chain = Chain((*rules, "drop"))
    return _Profile(f"{'out' if egress else 'in'}_{_digest(repr(chain.rules))}", chain, needs)


def _verdicts(egress: bool, version: int) -> str:
    return f"{'out' if egress else 'in'}{version}"


def _by_address(
    ports: Iterable[tuple[Endpoint, tuple[str, ...] | None]],
) -> dict[IPAddress, tuple[str, ...] | None]:
    """Policies of each address. None: of no known pod; another pod of that address (its successor) counts instead."""
    found: dict[IPAddress, tuple[str, ...] | None] = {}
    for endpoint, policies in ports:
        for address in endpoint.all_addresses:
            before = found.get(address)
            known = [item for item in (before, policies) if item is not None]
            found[address] = tuple(sorted({key for item in known for key in item})) if known else None
    return found


def _side(namespace: str, rules: Iterable[Rule], peer: str) -> _Side:
    """``peer``: ``saddr`` or ``daddr``, the address that is the peer's."""
    found: list[str] = []
    needs: set[_Group | _Named] = set()
    for rule in rules:
        peers = _peers(namespace, rule, peer, needs)
        for clause in peers:
            for ports in _ports(rule, clause.partition(" ")[0], needs):
                found.append(" ".join(part for part in (clause, ports, _OPEN) if part))
    return _Side(tuple(dict.fromkeys(found)), frozenset(needs))


def _peers(namespace: str, rule: Rule, side: str, needs: set[_Group | _Named]) -> list[str]:
    """One condition for each kind of peer; an empty one for everyone."""
    if not rule.peers:
        return [""]
    found = []
    blocks: list[IPNetwork] = []
    for peer in rule.peers:
        if isinstance(peer, BlockPeer):
            blocks += _without(peer)
            continue
        group = _Group(peer.pods, namespace if peer.namespaces is None else peer.namespaces)
        needs.add(group)
        found += [f"{word} {side} @{_set(group, version)}" for version, word, _ in _FAMILIES]
    # Elements of an interval set must not overlap.
    blocks4 = collapse_addresses(item for item in blocks if isinstance(item, IPv4Network))
    blocks6 = collapse_addresses(item for item in blocks if isinstance(item, IPv6Network))
    for word, networks in (("ip", [str(item) for item in blocks4]), ("ip6", [str(item) for item in blocks6])):
        if networks:
            found.append(f"{word} {side} {{ {', '.join(networks)} }}")
    return list(dict.fromkeys(found))


def _without(peer: BlockPeer) -> list[IPNetwork]:
    """A block without its exceptions, which lie in it."""
    found: list[IPNetwork] = [peer.block]
    for exception in peer.exceptions:
        found = [part for network in found for part in _excluded(network, exception)]
    return found


def _excluded(network: IPNetwork, exception: IPNetwork) -> Iterable[IPNetwork]:
    if network.subnet_of(exception):  # type: ignore[arg-type]
        return ()
    return network.address_exclude(exception) if exception.subnet_of(network) else (network,)  # type: ignore[arg-type]


def _ports(rule: Rule, word: str, needs: set[_Group | _Named]) -> list[str]:
    """One condition for each kind of port; an empty one for everything. ``word``: the family, if the peer tells it."""
    if not rule.ports:
        return [""]
    whole = sorted({port.protocol.lower() for port in rule.ports if port.first is None and port.name is None})
    found = [f"meta l4proto {{ {', '.join(whole)} }}"] if whole else []
    numbers = [
        f"{protocol} . {first}" if first == last else f"{protocol} . {first}-{last}"
        for protocol, first, last in _ranges(rule.ports)
        if protocol not in whole
    ]
    if numbers:
        found.append(f"meta l4proto . th dport {{ {', '.join(numbers)} }}")
    for port in rule.ports:
        if port.name is not None and port.protocol.lower() not in whole:
            named = _Named(port.name, port.protocol)
            needs.add(named)
            found += [
                f"{family} daddr . meta l4proto . th dport @{_set(named, version)}"
                for version, family, _ in _FAMILIES
                if word in ("", family)
            ]
    return found


def _ranges(ports: Iterable[PolicyPort]) -> list[tuple[str, int, int]]:
    """Numbered ports as ranges that do not overlap."""
    found: list[tuple[str, int, int]] = []
    for protocol, first, last in sorted(
        (port.protocol.lower(), port.first, port.last or port.first) for port in ports if port.first is not None
    ):
        if found and found[-1][0] == protocol and first <= found[-1][2] + 1:
            found[-1] = (protocol, found[-1][1], max(found[-1][2], last))
        else:
            found.append((protocol, first, last))
    return found


def _set(need: _Group | _Named, version: int) -> str:
    return f"{'named' if isinstance(need, _Named) else 'peers'}{version}_{need.key}"


def _key(pod: PodReference) -> str:
    return f"{pod.namespace}/{pod.name}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def arrived_script(addresses: Iterable[IPAddress]) -> str:
    """Admit for a while, until conntrack knows them, connections that machines with these addresses are amid."""
    return "".join(f"add element inet {NAME} arrived{item.version} {{ {item} }}\n" for item in addresses)
