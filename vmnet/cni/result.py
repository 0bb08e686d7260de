"""CNI results: the previous plugin's result, extended with the interface on a user-defined network.

Multus makes the interface of the first IP with a ``gateway`` the pod's default, and containerd reports the addresses of
``eth0`` alone, so eth0's come first and lose their gateway while the primary network's carry one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmnet.model.addresses import IPAddress, IPInterface, IPNetwork
from vmnet.model.names import DEFAULT_INTERFACE

_DEFAULT_ROUTES: Final = ("0.0.0.0/0", "::/0")


@dataclass(frozen=True, slots=True)
class ResultAddress:
    """One address of the new interface; ``gateway`` is set on the interface that holds the default route."""

    address: IPInterface
    gateway: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class ResultRoute:
    """One route the plugin made in the pod."""

    destination: IPNetwork
    gateway: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class ResultInterface:
    """The new interface in the pod. ``sandbox`` is CNI_NETNS."""

    name: str
    mac: str
    sandbox: str
    mtu: int
    addresses: tuple[ResultAddress, ...]
    routes: tuple[ResultRoute, ...] = ()
    primary: bool = True
    """It holds the pod's default route: the default interface gives up its gateway."""


def version_tuple(version: str) -> tuple[int, ...]:
    """``1.1.0`` as (1, 1, 0)."""
    return tuple(int(part) for part in version.split("."))


def extend(previous: Mapping[str, Any] | None, interface: ResultInterface, version: str) -> dict[str, Any]:
    """The result of ADD in ``cniVersion`` ``version``: ``previous`` (None when not chained) and ``interface``.

    An interface of the same name in the same sandbox is replaced, so a repeated ADD gives the same result.
    """
    previous = previous or {}
    interfaces, positions = _kept_interfaces(previous.get("interfaces") or [], interface)
    ips = [_in_version(item, version) for item in _kept_addresses(previous, interfaces, positions, interface.primary)]
    index = len(interfaces)
    interfaces.append(_interface(interface, version))
    ips += [_address(item, index, version) for item in interface.addresses]
    routes = [
        route
        for route in previous.get("routes") or []
        if not (interface.primary and route.get("dst") in _DEFAULT_ROUTES)
    ]
    routes += [_route(route) for route in interface.routes if _route(route) not in routes]
    result = {key: value for key, value in previous.items() if key not in ("cniVersion", "interfaces", "ips", "routes")}
    return {"cniVersion": version, **result, "interfaces": interfaces, "ips": ips, "routes": routes}


def pass_on(previous: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The result of an ADD that changed nothing."""
    return {**previous, "cniVersion": version}


def find_interface(result: Mapping[str, Any], name: str, sandbox: str) -> Mapping[str, Any] | None:
    """The interface ``name`` of a sandbox in a result (for CHECK); None when it is not there."""
    for item in result.get("interfaces") or []:
        if item.get("name") == name and item.get("sandbox") == sandbox:
            return dict(item)
    return None


def addresses_of(result: Mapping[str, Any], name: str, sandbox: str) -> tuple[str, ...]:
    """The addresses (``10.0.0.5/24``) that a result gives to one interface."""
    interfaces: Sequence[Mapping[str, Any]] = result.get("interfaces") or []
    return tuple(
        str(item.get("address"))
        for item in result.get("ips") or []
        if isinstance(item.get("interface"), int)
        and 0 <= item["interface"] < len(interfaces)
        and interfaces[item["interface"]].get("name") == name
        and interfaces[item["interface"]].get("sandbox") == sandbox
    )


def _kept_interfaces(items: Sequence[Any], new: ResultInterface) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Interfaces without an older ``new``, and where each old index went."""
    kept: list[dict[str, Any]] = []
    positions: dict[int, int] = {}
    for index, item in enumerate(items):
        if item.get("name") == new.name and item.get("sandbox") == new.sandbox:
            continue
        positions[index] = len(kept)
        kept.append(dict(item))
    return kept, positions


def _kept_addresses(
    previous: Mapping[str, Any], interfaces: Sequence[Mapping[str, Any]], positions: Mapping[int, int], primary: bool
) -> list[dict[str, Any]]:
    # ``interface`` is optional in a result: an address without one belongs to the interface that the runtime asked for.
    default = next(
        (i for i, item in enumerate(interfaces) if item.get("sandbox") and item.get("name") == DEFAULT_INTERFACE), None
    )
    kept = []
    for item in previous.get("ips") or []:
        address = dict(item)
        index = address.pop("interface", None)
        if index is None:
            index = default
        elif index in positions:
            index = positions[index]
        else:
            continue
        if primary:
            address.pop("gateway", None)
        if index is not None:
            address["interface"] = index
        kept.append(address)
    # The default interface first (CRI-O takes all addresses in order); the sort is stable.
    return sorted(kept, key=lambda item: item.get("interface") != default)


def _interface(interface: ResultInterface, version: str) -> dict[str, Any]:
    body: dict[str, Any] = {"name": interface.name, "mac": interface.mac, "sandbox": interface.sandbox}
    # ``mtu`` of an interface came with 1.1; older runtimes decode strictly.
    return {**body, "mtu": interface.mtu} if version_tuple(version) >= (1, 1) else body


def _in_version(item: dict[str, Any], version: str) -> dict[str, Any]:
    """An address as ``version`` has it: before 1.0 each names its family."""
    if version_tuple(version) >= (1, 0):
        item.pop("version", None)
        return item
    return {"version": "6" if ":" in str(item.get("address")) else "4", **item}


def _address(item: ResultAddress, index: int, version: str) -> dict[str, Any]:
    body: dict[str, Any] = {"address": str(item.address), "interface": index}
    if item.gateway is not None:
        body["gateway"] = str(item.gateway)
    return _in_version(body, version)


def _route(route: ResultRoute) -> dict[str, Any]:
    body = {"dst": str(route.destination)}
    return body if route.gateway is None else {**body, "gw": str(route.gateway)}
