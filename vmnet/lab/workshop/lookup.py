"""Tokens of the workshop's commands, replaced by what the API says at that moment.

| token | stands for |
|---|---|
| ``<udn:blue/blue-0>``, ``<udn6:…>`` | the pod's IPv4 or IPv6 address on its primary network |
| ``<eth0:…>`` | its address on the default network |
| ``<node:…>`` | the node that it runs on |
| ``<udns:blue/app=blue>`` | the IPv4 addresses of all pods with a label that are not being deleted |
| ``<cluster:blue/blue-service>``, ``<cluster6:…>`` | the Service's address |
| ``<balancer:…>``, ``<balancer6:…>`` | its load balancer's address |
| ``<port:…>`` | its first node port |
| ``<health:…>`` | the node port at which load balancers ask whether a node has endpoints of it |
| ``<hostip:…>`` | the IPv4 address of the node that the pod runs on |
| ``<net1:…>``, ``<net2:…>`` | its address on a secondary network |
| ``<freeip:blue/app=blue>`` | the IPv4 address of a node that runs no pod with a label |
"""

import json
import re
from collections.abc import Mapping, Sequence
from ipaddress import ip_interface
from typing import Any, Final

from vmnet.kube.api import NODES, PODS, SERVICES, Kube, NotFound, Object
from vmnet.model.names import NETWORK_STATUS_ANNOTATION, POD_NETWORKS_ANNOTATION

_TOKEN: Final = re.compile(r"<([a-z0-9]+):([^<>\s]+)>")


class Unknown(Exception):
    """A token stands for nothing (yet); the message says which and why."""


class Lookup:
    """Reads the API for every text."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube

    async def values(self, *texts: str) -> dict[str, str]:
        """What the tokens of some texts stand for, by token. Raises Unknown."""
        found: dict[str, str] = {}
        for match in (match for text in texts for match in _TOKEN.finditer(text)):
            if match.group(0) not in found:
                found[match.group(0)] = await self._value(match.group(1), match.group(2))
        return found

    async def _value(self, kind: str, name: str) -> str:
        namespace, _, rest = name.partition("/")
        try:
            match kind:
                case "udn" | "udn6":
                    return primary_address(await self._kube.get(PODS, rest, namespace), 6 if kind == "udn6" else 4)
                case "eth0":
                    return str((await self._kube.get(PODS, rest, namespace))["status"]["podIP"])
                case "node":
                    return str((await self._kube.get(PODS, rest, namespace))["spec"]["nodeName"])
                case "hostip":
                    return str((await self._kube.get(PODS, rest, namespace))["status"]["hostIP"])
                case "net1" | "net2":
                    return status_address(await self._kube.get(PODS, rest, namespace), kind)
                case "udns":
                    return " ".join(primary_address(pod, 4) for pod in await self._pods(namespace, rest))
                case "freeip":
                    return await self._free(namespace, rest)
                case _:
                    return service_value(await self._kube.get(SERVICES, rest, namespace), kind)
        except (NotFound, KeyError, IndexError) as error:
            raise Unknown(f"<{kind}:{name}> is not known: {error!r}") from error

    async def _pods(self, namespace: str, labels: str) -> Sequence[Object]:
        found = (await self._kube.list(PODS, namespace, labels=labels)).items
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    async def _free(self, namespace: str, labels: str) -> str:
        taken = {pod["spec"].get("nodeName") for pod in await self._pods(namespace, labels)}
        nodes = (await self._kube.list(NODES)).items
        free = [node for node in nodes if node["metadata"]["name"] not in taken]
        if not free:
            raise Unknown(f"every node runs a pod of {namespace} with {labels}")
        addresses = [item["address"] for item in free[0]["status"]["addresses"] if item["type"] == "InternalIP"]
        return _of_family(addresses, 4)


def _of_family(texts: Sequence[str], version: int) -> str:
    """The first address of a family, without its prefix. Raises KeyError."""
    for text in texts:
        found = ip_interface(text)
        if found.version == version:
            return str(found.ip)
    raise KeyError(f"no IPv{version} address in {texts}")


def replace(text: str, values: Mapping[str, str]) -> str:
    """The text with its tokens replaced."""
    return _TOKEN.sub(lambda match: values[match.group(0)], text)


def primary_address(pod: Object, version: int) -> str:
    """The pod's address on its primary network. Raises KeyError, IndexError."""
    entries: Mapping[str, Any] = json.loads(pod["metadata"]["annotations"][POD_NETWORKS_ANNOTATION])
    for entry in entries.values():
        if entry["role"] == "primary":
            return _of_family(entry["ip_addresses"], version)
    raise KeyError(f"no primary network in {POD_NETWORKS_ANNOTATION}")


def status_address(pod: Object, interface: str) -> str:
    """The pod's first address on one of its interfaces. Raises KeyError, IndexError."""
    for entry in json.loads(pod["metadata"]["annotations"][NETWORK_STATUS_ANNOTATION]):
        if entry.get("interface") == interface:
            return str(entry["ips"][0])
    raise KeyError(f"no interface {interface} in {NETWORK_STATUS_ANNOTATION}")


def service_value(service: Object, kind: str) -> str:
    """A Service's address or port. Raises KeyError, IndexError."""
    spec = service["spec"]
    version = 6 if kind.endswith("6") else 4
    match kind.removesuffix("6"):
        case "cluster":
            addresses = spec["clusterIPs"]
        case "balancer":
            addresses = [item["ip"] for item in service["status"]["loadBalancer"]["ingress"]]
        case "port":
            return str(spec["ports"][0]["nodePort"])
        case "health":
            return str(spec["healthCheckNodePort"])
        case _:
            raise KeyError(kind)
    return _of_family(addresses, version)
