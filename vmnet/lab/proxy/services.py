"""Service ports with their endpoints, from Services and EndpointSlices. Pure.

Of the slices, only those count that carry ``kubernetes.io/service-name`` and are not for another proxy, whoever wrote
them: kube-proxy knows neither pods nor networks.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vmnet.kube.api import Object, object_key

SERVICE_NAME: Final = "kubernetes.io/service-name"
OTHER_PROXY: Final = "service.kubernetes.io/service-proxy-name"
HEADLESS: Final = "service.kubernetes.io/headless"


@dataclass(frozen=True, slots=True, order=True)
class Backend:
    """Where a connection may go. ``node`` is empty when the slice does not say."""

    address: str
    port: int
    node: str = ""


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a Service, in one address family."""

    service: str
    """``namespace/name``."""
    port_name: str
    version: int
    """Address family: 4 or 6."""
    protocol: str
    """``tcp``, ``udp`` or ``sctp``."""
    port: int
    cluster_address: str
    node_port: int | None
    external_addresses: tuple[str, ...]
    """Of load balancers and ``externalIPs``."""
    internal_local: bool
    external_local: bool
    """``internalTrafficPolicy`` and ``externalTrafficPolicy`` are Local."""
    backends: tuple[Backend, ...]

    def local(self, node: str) -> tuple[Backend, ...]:
        """The backends on a node."""
        return tuple(backend for backend in self.backends if backend.node == node)


def service_ports(services: Iterable[Object], slices: Iterable[Object]) -> list[ServicePort]:
    """All that is to be served, in a stable order."""
    grouped: dict[str, list[Object]] = {}
    for item in slices:
        labels = item["metadata"].get("labels") or {}
        if SERVICE_NAME in labels and OTHER_PROXY not in labels and HEADLESS not in labels:
            grouped.setdefault(f"{item['metadata']['namespace']}/{labels[SERVICE_NAME]}", []).append(item)
    found = []
    for service in sorted(services, key=object_key):
        found += _ports_of(service, grouped.get(object_key(service), []))
    return found


def _ports_of(service: Object, slices: list[Object]) -> list[ServicePort]:
    spec = service["spec"]
    addresses = [item for item in spec.get("clusterIPs") or [spec.get("clusterIP")] if item and item != "None"]
    labels = service["metadata"].get("labels") or {}
    if spec.get("type") == "ExternalName" or OTHER_PROXY in labels:
        return []
    external = [*load_balancer_addresses(service), *(spec.get("externalIPs") or ())]
    found = []
    for address in addresses:
        version = ipaddress.ip_address(address).version
        family = [item for item in slices if item.get("addressType") == f"IPv{version}"]
        for port in spec.get("ports") or ():
            found.append(
                ServicePort(
                    service=object_key(service),
                    port_name=port.get("name") or "",
                    version=version,
                    protocol=str(port.get("protocol") or "TCP").lower(),
                    port=int(port["port"]),
                    cluster_address=str(address),
                    node_port=port.get("nodePort"),
                    external_addresses=tuple(
                        item for item in external if ipaddress.ip_address(item).version == version
                    ),
                    internal_local=spec.get("internalTrafficPolicy") == "Local",
                    external_local=spec.get("externalTrafficPolicy") == "Local",
                    backends=_backends(family, port.get("name") or "", str(port.get("protocol") or "TCP")),
                )
            )
    return found


def load_balancer_addresses(service: Object) -> list[str]:
    """What a load balancer was given, without those that hand packets over with the node's address."""
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    return [item["ip"] for item in ingress if item.get("ip") and item.get("ipMode", "VIP") == "VIP"]


def _backends(slices: list[Object], name: str, protocol: str) -> tuple[Backend, ...]:
    """Ready ones; where none is, those that still serve while they terminate."""
    ready: set[Backend] = set()
    leaving: set[Backend] = set()
    for item in slices:
        numbers = [
            port["port"]
            for port in item.get("ports") or ()
            if (port.get("name") or "") == name and (port.get("protocol") or "TCP") == protocol and port.get("port")
        ]
        for endpoint in item.get("endpoints") or ():
            conditions = endpoint.get("conditions") or {}
            if conditions.get("ready") is not False:
                chosen = ready
            elif conditions.get("serving") and conditions.get("terminating"):
                chosen = leaving
            else:
                continue
            chosen |= {
                Backend(address, int(number), endpoint.get("nodeName") or "")
                for address in endpoint.get("addresses") or ()[:1]
                for number in numbers
            }
    return tuple(sorted(ready or leaving))
