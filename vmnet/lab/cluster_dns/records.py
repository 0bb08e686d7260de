"""Names of a cluster, from Services and EndpointSlices. Pure.

Follows the Kubernetes DNS specification 1.1.0; section numbers are its own.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from vmnet.kube.api import Object, object_key

SERVICE_NAME: Final = "kubernetes.io/service-name"


@dataclass(frozen=True, slots=True)
class Record:
    """One record's data as text: an address, a name with its final dot, or ``priority weight port target``."""

    type: str
    data: str


@dataclass(slots=True)
class Names:
    """What exists. ``domain`` ends with a dot; keys are lower-case names with their final dot."""

    domain: str
    records: dict[str, list[Record]] = field(default_factory=dict)
    _inner: set[str] = field(default_factory=set)
    """Names that have no record and names below them: they exist (RFC 8020)."""

    def add(self, name: str, kind: str, data: str) -> None:
        """One record, once."""
        record = Record(kind, data)
        known = self.records.setdefault(name, [])
        if record not in known:
            known.append(record)
        while name != self.domain and name.endswith(self.domain):
            name = name.partition(".")[2]
            self._inner.add(name)

    def find(self, name: str, kind: str) -> list[Record] | None:
        """The records of a type (CNAME whatever the type), empty when the name has none; None for no such name."""
        name = name.lower()
        found = self.records.get(name, [])
        if not found and name.endswith(f".pod.{self.domain}"):
            found = self._of_pod(name)
        if not found:
            return [] if name in self._inner else None
        return [record for record in found if kind in (record.type, "ANY") or record.type == "CNAME"]

    def owns(self, name: str) -> bool:
        """Whether nobody else is to be asked for the name."""
        name = name.lower()
        return name == self.domain or name.endswith(f".{self.domain}") or name in self.records

    def _of_pod(self, name: str) -> list[Record]:
        """``1-2-3-4.<namespace>.pod``: the address that the name spells, whether or not such a pod runs."""
        words = name.removesuffix(f".pod.{self.domain}").split(".")
        if len(words) != 2:
            return []
        for text in (words[0].replace("-", "."), words[0].replace("-", ":")):
            try:
                address = ipaddress.ip_address(text)
            except ValueError:
                continue
            return [_address(str(address))]
        return []


def names(services: Iterable[Object], slices: Iterable[Object], domain: str) -> Names:
    """All names of the cluster. ``domain``: ``cluster.local``."""
    found = Names(f"{domain}.")
    grouped: dict[str, list[Object]] = {}
    for item in slices:
        service = (item["metadata"].get("labels") or {}).get(SERVICE_NAME)
        if service:
            grouped.setdefault(f"{item['metadata']['namespace']}/{service}", []).append(item)
    for service in services:
        _add_service(found, service, grouped.get(object_key(service), []))
    return found


def _add_service(found: Names, service: Object, slices: list[Object]) -> None:
    metadata, spec = service["metadata"], service["spec"]
    name = f"{metadata['name']}.{metadata['namespace']}.svc.{found.domain}"
    if spec.get("type") == "ExternalName":
        found.add(name, "CNAME", f"{spec['externalName'].rstrip('.')}.")  # section 2.5
        return
    addresses = [item for item in spec.get("clusterIPs") or [spec.get("clusterIP")] if item]
    if addresses == ["None"]:
        _add_headless(found, name, slices)
        return
    for address in addresses:  # section 2.3.1
        record = _address(address)
        found.add(name, record.type, record.data)
        _add_pointer(found, address, name)
    for port in spec.get("ports") or ():
        _add_port(found, name, name, port)


def _add_headless(found: Names, name: str, slices: list[Object]) -> None:
    for item in slices:  # section 2.4.1
        for endpoint in item.get("endpoints") or ():
            if (endpoint.get("conditions") or {}).get("ready") is False:
                continue
            for address in endpoint.get("addresses") or ():
                record = _address(address)
                host = endpoint.get("hostname") or address.replace(".", "-").replace(":", "-")
                own = f"{host}.{name}".lower()
                found.add(name, record.type, record.data)
                found.add(own, record.type, record.data)
                if endpoint.get("hostname"):
                    _add_pointer(found, address, own)
                for port in item.get("ports") or ():
                    _add_port(found, name, own, port)


def _add_port(found: Names, name: str, target: str, port: Mapping[str, object]) -> None:
    if port.get("name") and port.get("port"):  # sections 2.3.2 and 2.4.2
        protocol = str(port.get("protocol") or "TCP").lower()
        found.add(f"_{port['name']}._{protocol}.{name}".lower(), "SRV", f"0 100 {port['port']} {target}")


def _add_pointer(found: Names, address: str, name: str) -> None:
    found.add(f"{ipaddress.ip_address(address).reverse_pointer}.", "PTR", name)  # section 2.3.3


def _address(text: str) -> Record:
    return Record("A" if ipaddress.ip_address(text).version == 4 else "AAAA", text)
