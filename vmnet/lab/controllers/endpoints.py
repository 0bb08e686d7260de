"""EndpointSlices of Services, one per address family and set of resolved ports, and load balancer addresses."""

import hashlib
import ipaddress
import json
from collections.abc import Container, Mapping, Sequence
from typing import Any, Final

from vmnet.kube.api import ENDPOINT_SLICES, PODS, SERVICES, Kube, NotFound, Object, object_key
from vmnet.lab.controllers.cluster import Informers, in_namespace, is_ready, is_terminating, owner_reference
from vmnet.lab.controllers.matching import selects_plainly
from vmnet.lab.controllers.placement import is_finished

MANAGED_BY: Final = "endpointslice.kubernetes.io/managed-by"
MANAGER: Final = "endpointslice-controller.k8s.io"
SERVICE_NAME: Final = "kubernetes.io/service-name"
HEADLESS: Final = "service.kubernetes.io/headless"
_ALPHABET: Final = "bcdfghjklmnpqrstvwxz2456789"
_LIMIT: Final = 100

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _suffix(*parts: str) -> str:
    number = int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8])
    letters = []
    for _ in range(5):
        number, rest = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[rest])
    return "".join(letters)


def _resolved_port(port: Mapping[str, Any], pod: Object) -> int | None:
    """The number of a Service's target port in one pod; None when the pod has no port of that name."""
    target = port.get("targetPort", port["port"])
    if isinstance(target, int):
        return target or int(port["port"])
    if target.isdigit():
        return int(target)
    for container in [*(pod["spec"].get("initContainers") or ()), *(pod["spec"].get("containers") or ())]:
        for item in container.get("ports") or ():
            if item.get("name") == target and item.get("protocol", "TCP") == port.get("protocol", "TCP"):
                return int(item["containerPort"])
    return None


def _ports(service: Object, pod: Object) -> list[Object]:
    found = []
    for port in service["spec"].get("ports") or ():
        number = _resolved_port(port, pod)
        if number is None:
            continue
        entry: Object = {"name": port.get("name", ""), "protocol": port.get("protocol", "TCP"), "port": number}
        if port.get("appProtocol"):
            entry["appProtocol"] = port["appProtocol"]
        found.append(entry)
    return found


def _addresses(pod: Object, family: str) -> list[str]:
    status = pod.get("status") or {}
    found = [item["ip"] for item in status.get("podIPs") or ()] or list(filter(None, [status.get("podIP")]))
    return [item for item in found if f"IPv{ipaddress.ip_address(item).version}" == family][:1]


def _endpoint(service: Object, pod: Object, addresses: Sequence[str]) -> Object:
    metadata, spec = pod["metadata"], pod["spec"]
    serving, terminating = is_ready(pod), is_terminating(pod)
    published = bool(service["spec"].get("publishNotReadyAddresses"))
    found: Object = {
        "addresses": list(addresses),
        "conditions": {
            "ready": published or (serving and not terminating),
            "serving": serving,
            "terminating": terminating,
        },
        "targetRef": {
            "kind": "Pod",
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
    }
    if spec.get("nodeName"):
        found["nodeName"] = spec["nodeName"]
    if spec.get("hostname") and spec.get("subdomain") == service["metadata"]["name"]:
        found["hostname"] = spec["hostname"]
    return found


def slices(service: Object, pods: Sequence[Object]) -> list[Object]:
    """The slices a Service should have, for the pods of its namespace. Names depend only on service, family, ports."""
    spec, metadata = service["spec"], service["metadata"]
    if not spec.get("selector") or spec.get("type") == "ExternalName" or is_terminating(service):
        return []
    members = [
        pod
        for pod in sorted(pods, key=object_key)
        if selects_plainly(spec["selector"], pod["metadata"].get("labels")) and not is_finished(pod)
    ]
    labels = {
        **(metadata.get("labels") or {}),
        MANAGED_BY: MANAGER,
        SERVICE_NAME: metadata["name"],
        **({HEADLESS: ""} if spec.get("clusterIP") == "None" else {}),
    }
    made: list[Object] = []
    for family in spec.get("ipFamilies") or ("IPv4",):
        groups: dict[str, tuple[list[Object], list[Object]]] = {}
        for pod in members:
            addresses = _addresses(pod, family)
            if not addresses:
                continue
            ports = _ports(service, pod)
            group = groups.setdefault(json.dumps(ports), (ports, []))
            group[1].append(_endpoint(service, pod, addresses))
        for ports, endpoints in list(groups.values()) or [([], [])]:
            for first in range(0, max(len(endpoints), 1), _LIMIT):
                # A service keeps its first slice's name whatever its ports become.
                place = "" if not made or made[-1]["addressType"] != family else f"{json.dumps(ports)}{first}"
                made.append(
                    {
                        "apiVersion": ENDPOINT_SLICES.api_version,
                        "kind": ENDPOINT_SLICES.kind,
                        "metadata": {
                            "name": f"{metadata['name']}-{_suffix(metadata['uid'], family, place)}",
                            "namespace": metadata["namespace"],
                            "labels": labels,
                            "ownerReferences": [owner_reference(service, SERVICES)],
                        },
                        "addressType": family,
                        "endpoints": endpoints[first : first + _LIMIT],
                        "ports": ports,
                    }
                )
    return made


def load_balancer(service: Object, pools: Sequence[Sequence[Address]], taken: Container[str]) -> list[Object] | None:
    """``status.loadBalancer.ingress`` of a Service: one address of each of its families, as MetalLB gives them.

    ``pools``: what may be given, one sequence for each family; ``taken``: what other Services have. What a Service has
    it keeps. A family whose pool is exhausted gets none. None for a Service of another type."""
    spec = service["spec"]
    if spec.get("type") != "LoadBalancer" or spec.get("loadBalancerClass"):
        return None
    known = [item.get("ip") for item in ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()]
    found = []
    for family in spec.get("ipFamilies") or ("IPv4",):
        free = [text for text in (str(item) for item in _pool(pools, family)) if text not in taken]
        chosen = next((text for text in free if text in known), None) or next(iter(free), None)
        if chosen is not None:
            found.append({"ip": chosen, "ipMode": "VIP"})
    return found


def _pool(pools: Sequence[Sequence[Address]], family: str) -> Sequence[Address]:
    return next((pool for pool in pools if pool and f"IPv{pool[0].version}" == family), ())


class Endpoints:
    """Reconciles Services by key."""

    def __init__(self, kube: Kube, informers: Informers, pools: Sequence[Sequence[Address]] = ()) -> None:
        self._kube = kube
        self._informers = informers
        self._pools = pools
        self._given: dict[str, set[str]] = {}
        """Load balancer addresses by Service, also those that the API's objects do not show yet."""

    async def reconcile(self, key: str) -> float | None:
        """Bring the Service's slices and its load balancer addresses up to date."""
        service = self._informers[SERVICES].get(key)
        if service is None:
            self._given.pop(key, None)
            return None
        namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
        wanted = {
            object_key(item): item for item in slices(service, in_namespace(self._informers[PODS].items(), namespace))
        }
        for known in in_namespace(self._informers[ENDPOINT_SLICES].items(), namespace):
            labels = known["metadata"].get("labels") or {}
            if labels.get(SERVICE_NAME) != name or labels.get(MANAGED_BY) != MANAGER:
                continue
            desired = wanted.pop(object_key(known), None)
            if desired is None:
                await self._remove(known)
            elif _differs(known, desired):
                metadata = {**known["metadata"], "labels": desired["metadata"]["labels"]}
                await self._kube.replace(ENDPOINT_SLICES, {**desired, "metadata": metadata})
        for desired in wanted.values():
            await self._kube.create(ENDPOINT_SLICES, desired)
        await self._balance(service)
        return None

    async def _remove(self, known: Object) -> None:
        metadata = known["metadata"]
        try:
            await self._kube.delete(ENDPOINT_SLICES, metadata["name"], metadata["namespace"], uid=metadata["uid"])
        except NotFound:
            return

    async def _balance(self, service: Object) -> None:
        wanted = load_balancer(service, self._pools, self._taken(object_key(service)))
        self._given[object_key(service)] = {item["ip"] for item in wanted or ()}
        known = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress")
        if is_terminating(service) or (wanted or None) == (known or None):
            return
        metadata = service["metadata"]
        body = {"status": {"loadBalancer": {"ingress": wanted or None}}}
        await self._kube.patch(SERVICES, metadata["name"], body, metadata["namespace"], subresource="status")

    def _taken(self, key: str) -> set[str]:
        """What Services other than ``key`` have."""
        found: set[str] = set()
        for service in self._informers[SERVICES].items():
            if object_key(service) != key:
                ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
                found |= {item["ip"] for item in ingress if item.get("ip")}
        return found.union(*(given for other, given in self._given.items() if other != key))


def _differs(known: Object, desired: Object) -> bool:
    same = (known["metadata"].get("labels") or {}) == desired["metadata"]["labels"]
    return not same or any((known.get(name) or []) != desired[name] for name in ("endpoints", "ports"))
