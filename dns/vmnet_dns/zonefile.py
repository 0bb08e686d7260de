"""Reading a view from a TOML file, for the responder that runs by itself."""

import tomllib
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from vmnet_dns.zone import (
    Record,
    Subnet,
    View,
    address_records,
    alias_record,
    pointer_records,
    service_record,
    text_record,
)


def load(path: Path, *, allowed: Iterable[Subnet] = ()) -> View:
    """The view of a zone file; ``allowed``: further clients' subnets. Raises OSError, ValueError with the reason."""
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        view = parse(data)
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return replace(view, subnets=(*view.subnets, *allowed))


def parse(data: dict[str, Any]) -> View:
    """The same from parsed TOML. Raises KeyError, TypeError, ValueError."""
    unknown = set(data) - {"network", "domain", "subnets", "servers", "forwarded", "host", "record"}
    if unknown:
        raise ValueError(f"unknown keys: {', '.join(sorted(unknown))}")
    records: list[Record] = []
    for host in data.get("host", ()):
        addresses = [ip_address(text) for text in host["addresses"]]
        for name in host["names"]:
            records += address_records(name, addresses)
        records += pointer_records(host["names"][0], addresses)
    records += [_record(item) for item in data.get("record", ())]
    return View.make(
        str(data.get("network", "network")),
        domain=data.get("domain", "cluster.local"),
        subnets=[ip_network(text) for text in data.get("subnets", ())],
        servers=[ip_address(text) for text in data.get("servers", ())],
        forwarded=data.get("forwarded", ()),
        records=records,
    )


def _record(item: dict[str, Any]) -> Record:
    name = item["name"]
    if "srv" in item:
        service = item["srv"]
        return service_record(
            name,
            int(service["port"]),
            service["target"],
            priority=int(service.get("priority", 0)),
            weight=int(service.get("weight", 0)),
        )
    if "cname" in item:
        return alias_record(name, item["cname"])
    if "txt" in item:
        texts = item["txt"]
        return text_record(name, *([texts] if isinstance(texts, str) else texts))
    raise ValueError(f"record {name}: needs srv, cname or txt")
