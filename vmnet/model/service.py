"""A Service of a network, as its agents render it: where it is asked for, and who answers."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmnet.model import addresses
from vmnet.model.addresses import IPAddress, IPNetwork

Object = Mapping[str, Any]
LOCAL: Final = "Local"
AFFINITY_SECONDS: Final = 10800
"""core/v1, ClientIPConfig: the default."""
_FAMILY: Final = {"IPv4": 4, "IPv6": 6}
_TRAFFIC: Final = frozenset({"tcp", "udp", "sctp"})


@dataclass(frozen=True, slots=True, order=True)
class Backend:
    """One endpoint that may be sent to."""

    address: IPAddress
    port: int
    node: str = ""


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port. ``backends``: of both families, those that are to be used now; empty when nobody answers.

    ``ending``: those that terminate but still serve. A policy Local sends to them where its node has nobody who is
    ready, whatever other nodes have.
    """

    name: str
    protocol: str
    number: int
    node_port: int | None = None
    backends: tuple[Backend, ...] = ()
    ending: tuple[Backend, ...] = ()

    def near(self, node: str, version: int) -> tuple[Backend, ...]:
        """Whom a policy Local sends to on a node."""
        for found in (self.backends, self.ending):
            here = tuple(item for item in found if item.node == node and item.address.version == version)
            if here:
                return here
        return ()


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One endpoint as DNS names it. ``hostname`` is empty where its pod has none."""

    address: IPAddress
    hostname: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    """One Service. ``addresses``: its cluster addresses, none of a headless one; ``external``: load balancer and
    external addresses, of its families; ``members``: who DNS may name; ``alias``: what an ExternalName stands for."""

    namespace: str
    name: str
    addresses: tuple[IPAddress, ...]
    ports: tuple[ServicePort, ...]
    external: tuple[IPAddress, ...] = ()
    affinity_seconds: int | None = None
    internal_local: bool = False
    external_local: bool = False
    balancers: tuple[IPAddress, ...] = ()
    """Those of ``external`` that a load balancer gave."""
    sources: tuple[IPNetwork, ...] = ()
    """Who may use ``balancers``; everybody when empty."""
    health_port: int | None = None
    """Where every node tells load balancers, by HTTP, how many endpoints it has (spec.healthCheckNodePort)."""
    ready_on: tuple[str, ...] = ()
    """The node of each ready endpoint, as often as it has some."""
    members: tuple[Member, ...] = ()
    alias: str = ""

    @property
    def exposed(self) -> bool:
        """Whether the nodes take traffic for it."""
        return bool(self.external) or any(port.node_port for port in self.ports)


def cluster_addresses(item: Object) -> tuple[IPAddress, ...]:
    """Cluster addresses of a Service object; none of a headless one."""
    spec = item.get("spec") or {}
    texts = spec.get("clusterIPs") or [spec.get("clusterIP") or "None"]
    return tuple(addresses.address(text) for text in texts if text not in ("", "None"))


def parse(item: Object, slices: Iterable[Object]) -> Service:
    """The Service of an object and its EndpointSlices. Raises ValueError naming the bad field."""
    metadata, spec = item["metadata"], item.get("spec") or {}
    shown = tuple(slices)
    every = bool(spec.get("publishNotReadyAddresses"))
    ports = []
    for port in spec.get("ports") or []:
        protocol = str(port.get("protocol") or "TCP").lower()
        if protocol not in _TRAFFIC:
            raise ValueError(f"spec.ports[{port.get('name') or port['port']}].protocol: {protocol} is not known")
        name = str(port.get("name") or "")
        backends, ending = _backends(shown, name, protocol, every=every)
        ports.append(
            ServicePort(name, protocol, int(port["port"]), port.get("nodePort") or None, tuple(backends), tuple(ending))
        )
    given = ((item.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    # One that hands packets over with the node's own address is reached by its node port (ipMode Proxy).
    balancer = [str(entry["ip"]) for entry in given if entry.get("ip") and entry.get("ipMode", "VIP") == "VIP"]
    external = balancer + [str(text) for text in spec.get("externalIPs") or []]
    affinity = None
    if spec.get("sessionAffinity") == "ClientIP":
        config = (spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}
        affinity = int(config.get("timeoutSeconds") or AFFINITY_SECONDS)
    local = spec.get("externalTrafficPolicy") == LOCAL
    try:
        found = cluster_addresses(item)
        families = {address.version for address in found}
        return Service(
            namespace=metadata["namespace"],
            name=metadata["name"],
            addresses=found,
            ports=tuple(ports),
            external=_of_families(external, families),
            affinity_seconds=affinity,
            internal_local=spec.get("internalTrafficPolicy") == LOCAL,
            external_local=local,
            balancers=_of_families(balancer, families),
            health_port=int(spec.get("healthCheckNodePort") or 0) or None if local else None,
            ready_on=_ready_on(shown, every=every) if local else (),
            sources=tuple(addresses.network(text.strip()) for text in spec.get("loadBalancerSourceRanges") or []),
            # Addresses of different families have no order of their own.
            members=tuple(sorted(_members(shown, every=every), key=lambda one: (one.address.version, one))),
            alias=str(spec.get("externalName") or "") if spec.get("type") == "ExternalName" else "",
        )
    except ValueError as error:
        raise ValueError(f"spec: {error}") from error


def _members(slices: Iterable[Object], *, every: bool) -> set[Member]:
    """Ready endpoints with their host names."""
    return {
        Member(address, str(endpoint.get("hostname") or ""))
        for item in slices
        for endpoint in item.get("endpoints") or []
        if every or (endpoint.get("conditions") or {}).get("ready") is not False
        for address in map(addresses.address, endpoint.get("addresses") or [])
        if address.version == _FAMILY.get(str(item.get("addressType")))
    }


def _of_families(texts: Iterable[str], families: Collection[int]) -> tuple[IPAddress, ...]:
    """External addresses count only in a family that the Service has."""
    found = dict.fromkeys(addresses.address(text) for text in texts)
    return tuple(address for address in found if address.version in families)


def _ready_on(slices: Iterable[Object], *, every: bool) -> tuple[str, ...]:
    """Nodes of the ready endpoints, once for each pod, whichever families and ports it is listed with."""
    found = {
        (str(endpoint.get("nodeName") or ""), str((endpoint.get("targetRef") or {}).get("uid") or address))
        for item in slices
        for endpoint in item.get("endpoints") or []
        if every or (endpoint.get("conditions") or {}).get("ready") is not False
        for address in endpoint.get("addresses") or []
    }
    return tuple(sorted(node for node, _ in found if node))


def _backends(
    slices: Iterable[Object], name: str, protocol: str, *, every: bool
) -> tuple[list[Backend], list[Backend]]:
    """The endpoints of one port: those that are to be used, and those that end but serve.

    To be used are those that are ready, of each family; where none is, those that still serve (Kubernetes,
    "EndpointSlices", Conditions: a terminating endpoint that serves is better than none).
    """
    ready: set[Backend] = set()
    serving: set[Backend] = set()
    for item in slices:
        family = _FAMILY.get(str(item.get("addressType")))
        numbers = [
            int(port["port"])
            for port in item.get("ports") or []
            if str(port.get("name") or "") == name
            and str(port.get("protocol") or "TCP").lower() == protocol
            and port.get("port")
        ]
        for endpoint in item.get("endpoints") or []:
            conditions = endpoint.get("conditions") or {}
            found = {
                Backend(address, number, str(endpoint.get("nodeName") or ""))
                for address in map(addresses.address, endpoint.get("addresses") or [])
                for number in numbers
                if address.version == family
            }
            if every or conditions.get("ready") is not False:
                ready |= found
            elif conditions.get("serving") and conditions.get("terminating"):
                serving |= found
    chosen, ending = [], []
    for version in (4, 6):
        usable, leaving = (
            sorted(backend for backend in found if backend.address.version == version) for found in (ready, serving)
        )
        chosen += usable or leaving
        ending += leaving
    return chosen, ending
