"""Names of Services in a network's DNS (the Kubernetes DNS specification 1.1.0, with the network's addresses)."""

import logging
from collections.abc import Iterable
from typing import Final

from vmnet.model.addresses import IPAddress
from vmnet.model.service import Service
from vmnet_dns.zone import Record, address_records, alias_record, pointer_records, service_record

log = logging.getLogger(__name__)

TTL: Final = 5
"""Seconds: who answers for a Service changes while it is used."""


def records(service: Service, domain: str) -> list[Record]:
    """A, AAAA, SRV, PTR and CNAME records. A headless Service has the addresses of its endpoints, and a name each."""
    try:
        return list(dict.fromkeys(_of(service, f"{service.name}.{service.namespace}.svc.{domain}")))
    except ValueError as error:
        log.warning("service %s/%s has no name in DNS: %s", service.namespace, service.name, error)
        return []


def _of(service: Service, name: str) -> Iterable[Record]:
    if service.alias:
        yield alias_record(name, service.alias, TTL)
        return
    if service.addresses:
        yield from address_records(name, service.addresses, TTL)
        yield from pointer_records(name, service.addresses, TTL)
        for port in service.ports:
            if port.name:
                yield service_record(f"_{port.name}._{port.protocol}.{name}", port.number, name, ttl=TTL)
        return
    hosts: dict[IPAddress, str] = {}
    for member in service.members:
        hosts[member.address] = f"{member.hostname or _dashed(member.address)}.{name}"
        yield from address_records(name, [member.address], TTL)
        yield from address_records(hosts[member.address], [member.address], TTL)
        yield from pointer_records(hosts[member.address], [member.address], TTL)
    for port in service.ports:
        for backend in port.backends:
            if port.name and backend.address in hosts:
                owner = f"_{port.name}._{port.protocol}.{name}"
                yield service_record(owner, backend.port, hosts[backend.address], ttl=TTL)


def _dashed(address: IPAddress) -> str:
    text = str(address).replace(".", "-").replace(":", "-")
    return f"0{text}" if text.startswith("-") else text
