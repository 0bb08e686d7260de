"""NetworkPolicies of ``networking.k8s.io/v1`` as values. https://kubernetes.io/docs/concepts/services-networking/network-policies/"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_network
from typing import Any, Final, TypeVar

from vmnet.model.addresses import IPNetwork

NAMESPACE_NAME_LABEL: Final = "kubernetes.io/metadata.name"
"""Every namespace has it, with its own name."""
_PORT_NAME: Final = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
"""RFC 6335 section 5.1, in lower case."""
T = TypeVar("T")


class Operator(StrEnum):
    """Of one requirement of a label selector."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class Protocol(StrEnum):
    """What a port is a port of."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


@dataclass(frozen=True, slots=True, order=True)
class Requirement:
    """One requirement of a label selector."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether labels meet it. A key that is absent is not in any list of values."""
        match self.operator:
            case Operator.IN:
                return labels.get(self.key) in self.values
            case Operator.NOT_IN:
                return labels.get(self.key) not in self.values
            case Operator.EXISTS:
                return self.key in labels
            case Operator.DOES_NOT_EXIST:
                return self.key not in labels


@dataclass(frozen=True, slots=True)
class Selector:
    """A label selector; without requirements it selects everything. They are sorted: equal ones look alike."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether all requirements hold."""
        return all(requirement.holds(labels) for requirement in self.requirements)


@dataclass(frozen=True, slots=True)
class PodPeer:
    """Pods; of the policy's own namespace when ``namespaces`` is None."""

    pods: Selector = Selector()
    namespaces: Selector | None = None


@dataclass(frozen=True, slots=True)
class BlockPeer:
    """Addresses."""

    block: IPNetwork
    exceptions: tuple[IPNetwork, ...] = ()


Peer = PodPeer | BlockPeer


@dataclass(frozen=True, slots=True)
class PolicyPort:
    """Destination ports: a number, a range, a name of the destination pod's, or all of the protocol's."""

    protocol: Protocol = Protocol.TCP
    first: int | None = None
    last: int | None = None
    """The same as ``first`` unless it is a range."""
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """What is admitted. No peers: everyone; no ports: everything, whatever the protocol."""

    peers: tuple[Peer, ...] = ()
    ports: tuple[PolicyPort, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """One NetworkPolicy. None for a direction in which it isolates nobody; no rules: nothing is admitted."""

    namespace: str
    pods: Selector
    ingress: tuple[Rule, ...] | None = ()
    egress: tuple[Rule, ...] | None = None


class Misread(ValueError):
    """A policy that cannot be understood; the message begins with the field.

    ``closed``: what is to stand for it, which opens nothing; None when not even its pods are known.
    """

    def __init__(self, message: str, closed: Policy | None = None) -> None:
        super().__init__(message)
        self.closed = closed


def parse(item: Mapping[str, Any]) -> Policy:
    """The policy of a NetworkPolicy object. Raises Misread.

    What this version of the API does not know is not understood: an unknown constraint must not be passed over.
    """
    namespace = str(item["metadata"]["namespace"])
    spec = _object(item.get("spec"), "spec")
    pods = selector(spec.get("podSelector"), "spec.podSelector")
    try:
        _object(spec, "spec", {"podSelector", "policyTypes", "ingress", "egress"})
        ingress, egress = _isolated(spec)
    except Misread as error:
        raise Misread(str(error), Policy(namespace, pods, (), ())) from None
    try:
        return Policy(
            namespace,
            pods,
            _each(spec.get("ingress"), "spec.ingress", _rule("from")) if ingress else None,
            _each(spec.get("egress"), "spec.egress", _rule("to")) if egress else None,
        )
    except Misread as error:
        closed = Policy(namespace, pods, () if ingress else None, () if egress else None)
        raise Misread(str(error), closed) from None


def selector(value: Any, field: str) -> Selector:
    """A LabelSelector; absent means empty. Raises Misread."""
    found = _object(value, field, {"matchLabels", "matchExpressions"})
    requirements = set()
    for key, text in _object(found.get("matchLabels"), f"{field}.matchLabels").items():
        requirements.add(Requirement(key, Operator.IN, (_text(text, f"{field}.matchLabels[{key}]"),)))
    requirements |= set(_each(found.get("matchExpressions"), f"{field}.matchExpressions", _requirement))
    return Selector(tuple(sorted(requirements)))


def _isolated(spec: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether for ingress and for egress."""
    types = _each(spec.get("policyTypes"), "spec.policyTypes", _text)
    for index, found in enumerate(types):
        if found not in ("Ingress", "Egress"):
            raise Misread(f"spec.policyTypes[{index}]: {found!r} is neither Ingress nor Egress")
    if types:
        return "Ingress" in types, "Egress" in types
    return True, bool(spec.get("egress"))


def _requirement(value: Any, field: str) -> Requirement:
    found = _object(value, field, {"key", "operator", "values"})
    key = _text(found.get("key"), f"{field}.key")
    try:
        operator = Operator(_text(found.get("operator"), f"{field}.operator"))
    except ValueError as error:
        if isinstance(error, Misread):
            raise
        raise Misread(f"{field}.operator: {found.get('operator')!r} is not one of {', '.join(Operator)}") from None
    values = tuple(sorted(set(_each(found.get("values"), f"{field}.values", _text))))
    if bool(values) != (operator in (Operator.IN, Operator.NOT_IN)):
        raise Misread(f"{field}.values: {operator} takes {'no' if values else 'at least one'} value")
    return Requirement(key, operator, values)


def _rule(peers: str) -> Callable[[Any, str], Rule]:
    """Reads one rule; ``peers``: ``from`` or ``to``."""

    def read(value: Any, field: str) -> Rule:
        found = _object(value, field, {"ports", peers})
        return Rule(
            _each(found.get(peers), f"{field}.{peers}", _peer), _each(found.get("ports"), f"{field}.ports", _port)
        )

    return read


def _peer(value: Any, field: str) -> Peer:
    found = _object(value, field, {"podSelector", "namespaceSelector", "ipBlock"})
    given = {key for key, item in found.items() if item is not None}
    if not given:
        raise Misread(f"{field}: one of podSelector, namespaceSelector and ipBlock is needed")
    if "ipBlock" in given:
        if len(given) > 1:
            raise Misread(f"{field}.ipBlock: it stands alone")
        return _block(found["ipBlock"], f"{field}.ipBlock")
    namespaces = found.get("namespaceSelector")
    return PodPeer(
        selector(found.get("podSelector"), f"{field}.podSelector"),
        selector(namespaces, f"{field}.namespaceSelector") if namespaces is not None else None,
    )


def _block(value: Any, field: str) -> BlockPeer:
    found = _object(value, field, {"cidr", "except"})
    block = _network(found.get("cidr"), f"{field}.cidr")
    exceptions = _each(found.get("except"), f"{field}.except", _network)
    for index, exception in enumerate(exceptions):
        if exception.version != block.version or not exception.subnet_of(block):  # type: ignore[arg-type]
            raise Misread(f"{field}.except[{index}]: {exception} is not within {block}")
    return BlockPeer(block, exceptions)


def _network(value: Any, field: str) -> IPNetwork:
    text = _text(value, field)
    if "/" not in text or "%" in text:  # an interface of whose host?
        raise Misread(f"{field}: {text!r} is not a CIDR")
    try:
        return ip_network(text, strict=False)  # the API accepts host bits
    except ValueError:
        raise Misread(f"{field}: {text!r} is not a CIDR") from None


def _port(value: Any, field: str) -> PolicyPort:
    found = _object(value, field, {"protocol", "port", "endPort"})
    given = found.get("protocol")
    try:
        protocol = Protocol.TCP if given is None else Protocol(given)
    except ValueError:
        raise Misread(f"{field}.protocol: {given!r} is not one of {', '.join(Protocol)}") from None
    port, end = found.get("port"), found.get("endPort")
    if isinstance(port, str):
        if end is not None:
            raise Misread(f"{field}.endPort: it needs a number in port")
        if not _PORT_NAME.fullmatch(port):
            raise Misread(f"{field}.port: {port!r} is not a port's name")
        return PolicyPort(protocol, name=port)
    if port is None:
        if end is not None:
            raise Misread(f"{field}.endPort: it needs a number in port")
        return PolicyPort(protocol)
    first = _number(port, f"{field}.port")
    last = first if end is None else _number(end, f"{field}.endPort")
    if last < first:
        raise Misread(f"{field}.endPort: {last} is below port {first}")
    return PolicyPort(protocol, first, last)


def _number(value: Any, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
        raise Misread(f"{field}: {value!r} is not a port")
    return value


def _object(value: Any, field: str, known: set[str] | None = None) -> Mapping[str, Any]:
    """A JSON object, empty when absent."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Misread(f"{field}: {value!r} is not an object")
    unknown = sorted(set(value) - known) if known is not None else []
    if unknown:
        raise Misread(f"{field}.{unknown[0]}: this field is not known")
    return value


def _each(value: Any, field: str, read: Callable[[Any, str], T]) -> tuple[T, ...]:
    """Each item of a JSON list, which is empty when absent."""
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Misread(f"{field}: {value!r} is not a list")
    return tuple(read(item, f"{field}[{index}]") for index, item in enumerate(value))


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise Misread(f"{field}: {value!r} is not a string")
    return value
