"""Cluster addresses and node ports of Services, by the dual-stack rules."""

import ipaddress
import random
from collections.abc import Sequence
from typing import Any, Final

from vmnet.lab.apiserver.status import Cause, invalid_value, not_allowed, unsupported

Object = dict[str, Any]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NODE_PORTS: Final = range(30000, 32768)
HEADLESS: Final = "None"
_RESERVED: Final = 16
"""Addresses at the start of a range that are only given when asked for (kubernetes, kube-dns)."""


class ServiceAddresses:
    """Keeps what is taken. ``ranges``: one network per address family, the preferred family first."""

    def __init__(self, ranges: Sequence[Network]) -> None:
        self._ranges = {self._family(network): network for network in ranges}
        self._taken: dict[str, str] = {}
        """Address -> uid of its Service."""
        self._ports: dict[tuple[str, int], str] = {}
        """(protocol, node port) -> uid."""
        self._random = random.Random()  # noqa: S311 — spreads addresses, hides nothing

    @staticmethod
    def _family(network: Network) -> str:
        return f"IPv{network.version}"

    @property
    def families(self) -> list[str]:
        """Configured families, the preferred one first."""
        return list(self._ranges)

    @property
    def ranges(self) -> list[str]:
        """As the ServiceCIDR ``kubernetes`` tells them."""
        return [str(network) for network in self._ranges.values()]

    def first(self, family: str) -> str:
        """The address of the ``kubernetes`` Service."""
        return str(self._ranges[family].network_address + 1)

    def assign(self, service: Object, old: Object | None, *, dry_run: bool) -> list[Cause]:
        """Fill in addresses and ports of a Service that is about to be stored; causes if that cannot be."""
        spec = service["spec"]
        before = (old or {}).get("spec") or {}
        uid = service["metadata"]["uid"]
        if spec.get("type") == "ExternalName":
            for name in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"):
                if spec.get(name) == before.get(name):
                    spec.pop(name, None)
            if not dry_run:
                self._release(uid, keep=set())
            return []
        causes = self._families(spec, before)
        if causes:
            return causes
        causes = self._addresses(spec, before, uid, dry_run=dry_run)
        causes = causes or self._node_ports(spec, before, uid, dry_run=dry_run)
        if not causes and not dry_run:
            ports = {
                (port.get("protocol", "TCP"), port["nodePort"])
                for port in spec.get("ports") or ()
                if port.get("nodePort")
            }
            self._release(uid, keep={*spec.get("clusterIPs", ()), *ports})
        return causes

    def _families(self, spec: Object, before: Object) -> list[Cause]:
        """Decide ``ipFamilies`` and ``ipFamilyPolicy``."""
        given = list(spec.get("clusterIPs") or ())
        if spec.get("clusterIP") and not given:
            given = [spec["clusterIP"]]
        elif given and "clusterIP" in spec and spec["clusterIP"] != given[0]:
            # A merge patch of clusterIP alone: the list follows it.
            given = [spec["clusterIP"]] if spec["clusterIP"] else []
        elif not given and before.get("clusterIPs") and before.get("type") != "ExternalName":
            given = list(before["clusterIPs"])
        for position, address in enumerate(given):
            if address == HEADLESS:
                continue
            try:
                ipaddress.ip_address(address)
            except ValueError:
                message = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
                return [invalid_value(f"spec.clusterIPs[{position}]", address, message)]
        old_addresses = before.get("clusterIPs") or ()
        if old_addresses and given and given[0] != old_addresses[0] and before.get("type") != "ExternalName":
            return [invalid_value("spec.clusterIPs[0]", given, "may not change once set")]
        headless = given[:1] == [HEADLESS]
        families = list(spec.get("ipFamilies") or before.get("ipFamilies") or ())
        for position, family in enumerate(families):
            field = f"spec.ipFamilies[{position}]"
            if family not in ("IPv4", "IPv6"):
                return [unsupported(field, family, ["IPv4", "IPv6"])]
            if family not in self._ranges and not (headless and not spec.get("selector")):
                return [invalid_value(field, family, "not configured on this cluster")]
        policy = spec.get("ipFamilyPolicy")
        dual = len(self._ranges) > 1
        without_selector = headless and not spec.get("selector")
        if policy == "RequireDualStack" and not dual and not without_selector:
            message = "this cluster is not configured for dual-stack services"
            return [invalid_value("spec.ipFamilyPolicy", policy, message)]
        if policy is None:
            if (without_selector and not families) or len(families) > 1 or len(given) > 1:
                policy = "RequireDualStack"
            else:
                policy = before.get("ipFamilyPolicy") or "SingleStack"
        if not families:
            families = [f"IPv{ipaddress.ip_address(item).version}" for item in given if item != HEADLESS]
        if not families:
            families = [self.families[0]]
        if policy == "SingleStack":
            families, given = families[:1], given[:1]
        else:
            possible = ["IPv4", "IPv6"] if without_selector else self.families
            families += [family for family in possible if family not in families]
            families = families[:2]
        spec["ipFamilies"], spec["ipFamilyPolicy"] = families, policy
        if given:
            spec["clusterIPs"] = given
        else:
            spec.pop("clusterIPs", None)
        return []

    def _addresses(self, spec: Object, before: Object, uid: str, *, dry_run: bool) -> list[Cause]:
        addresses = list(spec.get("clusterIPs") or ())
        if addresses[:1] == [HEADLESS]:
            spec["clusterIP"], spec["clusterIPs"] = HEADLESS, [HEADLESS]
            return []
        for position, family in enumerate(spec["ipFamilies"]):
            network = self._ranges[family]
            if position < len(addresses):
                address = addresses[position]
                value = ipaddress.ip_address(address)
                if value not in network or value == network.network_address:
                    message = f"failed to allocate IP {address}: the provided network does not match the current range"
                    return [invalid_value("spec.clusterIPs", addresses, message)]
                if self._taken.get(address, uid) != uid:
                    message = f"failed to allocate IP {address}: provided IP is already allocated"
                    return [invalid_value("spec.clusterIPs", addresses, message)]
            elif dry_run:
                addresses.append(str(network.network_address))
            else:
                found = self._free(network)
                if found is None:
                    message = f"failed to allocate a serviceIP: range is full: {network}"
                    return [Cause("InternalError", message, "spec.clusterIPs")]
                addresses.append(found)
        if not dry_run:
            for address in addresses:
                self._taken[address] = uid
        ordered = {name: value for name, value in spec.items() if name not in ("clusterIP", "clusterIPs")}
        spec.clear()
        spec.update(ordered)
        spec["clusterIP"], spec["clusterIPs"] = addresses[0], addresses
        return []

    def _free(self, network: Network) -> str | None:
        size = min(network.num_addresses - 2, 1 << 16)
        low = _RESERVED if size > 4 * _RESERVED else 1
        for _ in range(64):
            candidate = str(network.network_address + self._random.randint(low, size))
            if candidate not in self._taken:
                return candidate
        for offset in (*range(low, size + 1), *range(1, low)):
            candidate = str(network.network_address + offset)
            if candidate not in self._taken:
                return candidate
        return None

    def _node_ports(self, spec: Object, before: Object, uid: str, *, dry_run: bool) -> list[Cause]:
        kind = spec.get("type")
        ports = spec.get("ports") or []
        if kind == "ClusterIP":
            for port in ports:
                # What a change of type leaves behind goes; what was asked for is refused by validation.
                if before.get("type") in ("NodePort", "LoadBalancer"):
                    port.pop("nodePort", None)
            if before.get("type") in ("NodePort", "LoadBalancer"):
                for name in ("externalTrafficPolicy", "allocateLoadBalancerNodePorts", "healthCheckNodePort"):
                    spec.pop(name, None)
            return []
        wanted = kind == "NodePort" or spec.get("allocateLoadBalancerNodePorts", True)
        given: dict[int, set[str]] = {}
        for position, port in enumerate(ports):
            number, protocol = port.get("nodePort"), port.get("protocol", "TCP")
            field = f"spec.ports[{position}].nodePort"
            if number:
                if number not in NODE_PORTS:
                    message = "provided port is not in the valid range. The range of valid ports is 30000-32767"
                    return [invalid_value(field, number, message)]
                if self._ports.get((protocol, number), uid) != uid:
                    return [invalid_value(field, number, "provided port is already allocated")]
                if protocol in given.setdefault(number, set()):
                    return [not_allowed(field, "may not be used twice")]
                given[number].add(protocol)
            elif wanted and not dry_run:
                number = self._free_port(protocol)
                if number is None:
                    return [Cause("InternalError", "failed to allocate a nodePort: range is full", field)]
                port["nodePort"] = number
            if number and not dry_run:
                self._ports[protocol, number] = uid
        if kind == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local":
            number = spec.get("healthCheckNodePort") or before.get("healthCheckNodePort")
            if not number and not dry_run:
                number = self._free_port("TCP")
            if number:
                spec["healthCheckNodePort"] = number
                if not dry_run:
                    self._ports["TCP", number] = uid
        return []

    def _free_port(self, protocol: str) -> int | None:
        for number in self._random.sample(NODE_PORTS, 256):
            if (protocol, number) not in self._ports:
                return number
        return next((number for number in NODE_PORTS if (protocol, number) not in self._ports), None)

    def _release(self, uid: str, keep: set[Any]) -> None:
        for address in [address for address, owner in self._taken.items() if owner == uid and address not in keep]:
            del self._taken[address]
        for port in [port for port, owner in self._ports.items() if owner == uid and port not in keep]:
            del self._ports[port]

    def release(self, service: Object) -> None:
        """Give back everything of a Service that is gone."""
        self._release(service["metadata"]["uid"], keep=set())
