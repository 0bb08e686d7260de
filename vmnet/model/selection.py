"""Which secondary networks a pod asks for: the annotation ``k8s.v1.cni.cncf.io/networks``.

Its two forms are those of the network plumbing group's multi-network standard, section 4.1.2: a comma-separated list of
``[<namespace>/]<name>[@<interface>]``, or a JSON list of objects.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmnet.model import addresses, names
from vmnet.model.addresses import IPAddress
from vmnet.model.names import InterfaceName, MacAddress

SHARED_NAMESPACE: Final = "default"
"""Attachments that an administrator puts here are for pods of all namespaces, as Multus' namespace isolation has it."""
_MAX_INTERFACE: Final = 15


@dataclass(frozen=True, slots=True)
class Selection:
    """One attachment that a pod asks for. ``key`` is ``<namespace>/<name>`` of the NetworkAttachmentDefinition."""

    key: str
    interface: InterfaceName
    addresses: tuple[IPAddress, ...] = ()
    mac: MacAddress | None = None
    claim: str | None = None
    """Name of the IPAMClaim, in the pod's namespace, that holds the addresses."""

    def usable_from(self, namespace: str) -> bool:
        """Whether a pod of that namespace may use it: networks of other tenants are not to be had by naming them."""
        return self.key.partition("/")[0] in (namespace, SHARED_NAMESPACE)


def selections(metadata: Mapping[str, Any]) -> tuple[Selection, ...]:
    """What a pod with these metadata asks for, in order. Raises ValueError, naming the annotation.

    Interfaces without a name of their own are ``net1``, ``net2``, … by their place in the list, as Multus names them.
    """
    text = ((metadata.get("annotations") or {}).get(names.NETWORKS_ANNOTATION) or "").strip()
    if not text:
        return ()
    namespace = str(metadata.get("namespace") or "")
    try:
        elements = _json(text) if text[0] in "[{" else [_short(item) for item in text.split(",")]
        found = tuple(_selection(element, namespace, number) for number, element in enumerate(elements, start=1))
        for what in ("key", "interface"):
            values = [str(getattr(item, what)) for item in found]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"{twice} is named twice")
    except ValueError as error:
        raise ValueError(f"annotation {names.NETWORKS_ANNOTATION}: {error}") from error
    return found


def _json(text: str) -> list[dict[str, Any]]:
    try:
        elements = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(elements, list) or not all(isinstance(element, dict) for element in elements):
        raise ValueError("not a JSON list of objects")
    return elements


def _short(text: str) -> dict[str, Any]:
    attachment, at, interface = text.strip().partition("@")
    namespace, slash, name = attachment.rpartition("/")
    if not name or (at and not interface) or (slash and not namespace) or "/" in namespace:
        raise ValueError(f"{text.strip()!r} is not [<namespace>/]<name>[@<interface>]")
    return {"name": name, "namespace": namespace, "interface": interface}


def _selection(element: Mapping[str, Any], namespace: str, number: int) -> Selection:
    name = element.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"element {number} lacks a name")
    wanted = element.get("ips") or []
    if not isinstance(wanted, list):
        raise ValueError(f"ips of {name} is not a list")
    interface = str(element.get("interface") or f"net{number}")
    if len(interface) > _MAX_INTERFACE or set(interface) & set("/: \t\n") or interface in (".", ".."):
        raise ValueError(f"{interface!r} is not an interface name")
    if interface in (names.DEFAULT_INTERFACE, names.PRIMARY_INTERFACE):
        raise ValueError(f"interface {interface} is not for secondary networks")
    return Selection(
        key=f"{element.get('namespace') or namespace}/{name}",
        interface=InterfaceName(interface),
        addresses=tuple(addresses.interface(str(text)).ip for text in wanted),
        mac=addresses.parse_mac(str(element["mac"])) if element.get("mac") else None,
        claim=str(element.get("ipam-claim-reference") or "") or None,
    )
