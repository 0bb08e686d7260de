"""Operations as batch lines of iproute2 and scripts of nftables."""

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from vmnet.kernel import namespaces
from vmnet.model.addresses import IPAddress, IPNetwork
from vmnet.model.names import InterfaceName, NamespaceName
from vmnet.plan import ops
from vmnet.plan.ops import Op

POD_TABLE: Final = 100
"""Routing table of replies from a pod's default interface."""
_SECONDS: Final = 10
_ZERO_MAC: Final = "00:00:00:00:00:00"
_FAILED_LINE: Final = re.compile(r"Command failed -:(\d+)")
_GONE: Final = (
    "Cannot find device",
    "No such device",
    "Cannot open network namespace",
    "does not exist",
)
_UNSUPPORTED: Final = ("Operation not supported", "Unknown device type", "Protocol not supported")


@dataclass(frozen=True, slots=True)
class Step:
    """Lines for one program. Those that ``may_fail`` remove what may be gone; they go first, and after a failure of
    one all others are still tried.
    """

    program: tuple[str, ...]
    netns: str | None
    lines: tuple[str, ...] = ()
    may_fail: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A function to be run inside a namespace."""

    netns: str | None
    function: Callable[[], Any]
    node: bool = False
    """With the node's mounts: what it writes must be the node's."""


@dataclass(slots=True)
class Batch:
    """Steps that one run of a program carries out."""

    step: Step
    lines: list[str] = field(default_factory=list)
    owners: list[Op] = field(default_factory=list)

    @classmethod
    def of(cls, step: Step, op: Op) -> "Batch":
        """A batch that begins with a step."""
        batch = cls(step)
        batch.add(step, op)
        return batch

    def takes(self, step: Step) -> bool:
        """Whether a step can go along: same program, same namespace, and all lines of both may fail, or none."""
        mine = (self.step.program, self.step.netns, bool(self.step.lines), bool(self.step.may_fail))
        mixed = self.step.lines and self.step.may_fail
        return not mixed and mine == (step.program, step.netns, bool(step.lines), bool(step.may_fail))

    def add(self, step: Step, op: Op) -> None:
        """Append a step."""
        lines = (*step.may_fail, *step.lines)
        self.lines += lines
        self.owners += [op] * len(lines)

    def argv(self) -> list[str]:
        """The program as it is called."""
        program = list(self.step.program)
        if self.step.may_fail:
            program.insert(1, "-force")
        return program

    def script(self) -> str:
        """Its standard input."""
        return "\n".join(self.lines) + "\n"

    def blame(self, errors: str) -> tuple[Op, str] | None:
        """The operation that failed, and what the program said; None when only such lines failed as may."""
        if not self.step.lines:
            return None
        said: list[str] = []
        failed = False
        for line in errors.splitlines():
            match = _FAILED_LINE.match(line)
            if match is None:
                said.append(line)
                continue
            failed, number = True, int(match.group(1)) - 1
            if number >= len(self.step.may_fail):
                return self.owners[min(number, len(self.owners) - 1)], " ".join(said).strip()
            said.clear()
        return None if failed else (self.owners[0], " ".join(said).strip())


def is_gone(errors: str) -> bool:
    """The device or namespace vanished."""
    return any(text in errors for text in _GONE)


def is_unsupported(errors: str) -> bool:
    """The kernel lacks something."""
    return any(text in errors for text in _UNSUPPORTED)


def render(op: Op) -> tuple[Step | Call, ...]:
    """Batch lines and calls of one operation, in order."""
    match op:
        case ops.CreateNamespace(namespace):
            added = Call(None, partial(namespaces.add, namespace), node=True)
            return (added, _ip(namespace, "link set dev lo up"))
        case ops.DeleteNamespace(namespace):
            return (Call(None, partial(namespaces.remove, namespace), node=True),)
        case ops.SetSysctls(namespace, values):
            return (Call(_path(namespace), partial(_write_sysctls, values), node=True),)
        case ops.CreateBridge(namespace, name, mac, mtu):
            return (
                _ip(
                    namespace,
                    f"link add name {name} address {mac} mtu {mtu} type bridge mcast_snooping 0 forward_delay 0",
                    f"link set dev {name} addrgenmode none",
                ),
            )
        case ops.CreateVxlan(namespace, name, vni, local, mtu, mac, learning, port):
            temporary = f"vmx{vni}"
            address = f" address {mac}" if mac else ""
            learns = "learning" if learning else "nolearning"
            return (
                _ip(None, f"link del dev {temporary}", tolerant=True),
                _ip(
                    None,
                    f"link add name {temporary}{address} mtu {mtu}"
                    f" type vxlan id {vni} local {local} dstport {port} {learns}",
                    f"link set dev {temporary} netns {_path(namespace)} name {name}",
                ),
                # A device that changes namespaces forgets this.
                _ip(namespace, f"link set dev {name} addrgenmode none"),
            )
        case ops.CreateJoin(namespace, node_end, network_end, mtu):
            return (
                _ip(None, f"link del dev {node_end}", tolerant=True),
                _ip(
                    None,
                    f"link add name {node_end} mtu {mtu} type veth"
                    f" peer name {network_end} mtu {mtu} netns {_path(namespace)}",
                    f"link set dev {node_end} addrgenmode none",
                ),
            )
        case ops.CreateLocalnet(namespace, node_end, network_end, bridge, mtu, vlan):
            # It gets its name last: whoever sees that name may take the rest for done.
            temporary = f"{network_end}-new"
            steps: list[Step | Call] = [
                _ip(None, f"link del dev {node_end}", tolerant=True),
                _ip(
                    None,
                    f"link add name {node_end} mtu {mtu} type veth"
                    f" peer name {temporary} mtu {mtu} netns {_path(namespace)}",
                    f"link set dev {node_end} addrgenmode none",
                    f"link set dev {node_end} master {bridge}",
                ),
            ]
            if vlan is not None:
                steps.append(_bridge(None, f"vlan del dev {node_end} vid 1", tolerant=True))
                steps.append(_bridge(None, f"vlan add dev {node_end} vid {vlan} pvid untagged"))
            steps.append(_ip(None, f"link set dev {node_end} up"))
            named = _ip(
                namespace,
                f"link set dev {temporary} addrgenmode none",
                f"link set dev {temporary} name {network_end}",
            )
            return (*steps, named)
        case ops.CreatePort(namespace, port, _, pod_netns, interface, mac, mtu, alias):
            return (
                _ip(
                    namespace,
                    f"link add name {port} mtu {mtu} type veth"
                    f" peer name {interface} address {mac} mtu {mtu} netns {pod_netns}",
                    f"link set dev {port} addrgenmode none",
                    f"link set dev {port} alias {alias}",
                ),
            )
        case ops.AttachToBridge(namespace, interface, bridge, neigh_suppress, hairpin):
            suppress, back = ("on" if flag else "off" for flag in (neigh_suppress, hairpin))
            flags = f"learning on neigh_suppress {suppress} hairpin {back}"
            return (
                _ip(
                    namespace,
                    f"link set dev {interface} master {bridge}",
                    f"link set dev {interface} type bridge_slave {flags}",
                    f"link set dev {interface} up",
                ),
            )
        case ops.SetUp(namespace, interface):
            return (_ip(namespace, f"link set dev {interface} up"),)
        case ops.DeleteLink(namespace, interface):
            return (_ip(namespace, f"link del dev {interface}", tolerant=True),)
        case ops.AddAddress(namespace, interface, address):
            nodad = " nodad" if address.version == 6 else ""
            return (_ip(namespace, f"addr replace {address} dev {interface}{nodad}"),)
        case ops.RemoveAddress(namespace, interface, address):
            return (_ip(namespace, f"addr del {address} dev {interface}", tolerant=True),)
        case ops.AddDefaultRoute(namespace, interface, gateway):
            return (_ip(namespace, f"route replace default via {gateway} dev {interface}"),)
        case ops.SetRoute(namespace, interface, destination, gateway):
            return (_ip(namespace, f"route replace {_route(destination, interface, gateway)}"),)
        case ops.RemoveRoute(namespace, interface, destination, gateway):
            return (_ip(namespace, f"route del {_route(destination, interface, gateway)}", tolerant=True),)
        case ops.SetHomeRoute(namespace, interface, mark, gateways):
            steps = []
            for gateway in gateways:
                program = ("ip", f"-{gateway.version}", "-batch", "-")
                rule = f"fwmark {mark:#x} lookup {mark}"
                route = f"route replace default via {gateway} dev {interface} table {mark}"
                # The rule may be there from a writer that died before it wrote the other family's.
                steps.append(Step(program, _path(namespace), may_fail=(f"rule del {rule}",)))
                steps.append(Step(program, _path(namespace), (route, f"rule add {rule}")))
            return tuple(steps)
        case ops.SetNeighbour(namespace, interface, address, mac):
            return (_ip(namespace, f"neigh replace {address} lladdr {mac} dev {interface} nud permanent"),)
        case ops.RemoveNeighbour(namespace, interface, address):
            # Made before it is deleted: ip ends its whole batch at a neighbour that is not there, -force or not.
            entry = f"neigh replace {address} lladdr {_ZERO_MAC} dev {interface} nud noarp"
            return (_ip(namespace, entry, f"neigh del {address} dev {interface}", tolerant=True),)
        case ops.SetFdb(namespace, interface, mac, vtep):
            lines = [f"fdb replace {mac} dev {interface} master dynamic extern_learn"]
            if vtep is not None:
                lines.append(f"fdb replace {mac} dev {interface} self dst {vtep} dynamic extern_learn")
            return (_bridge(namespace, *lines),)
        case ops.RemoveFdb(namespace, interface, mac, vtep):
            lines = [f"fdb del {mac} dev {interface} master"]
            if vtep is not None:
                lines.append(f"fdb del {mac} dev {interface} self dst {vtep}")
            return (_bridge(namespace, *lines, tolerant=True),)
        case ops.SetTunnel(namespace, interface, mac, vtep):
            return (_bridge(namespace, f"fdb replace {mac} dev {interface} self dst {vtep} static"),)
        case ops.RemoveTunnel(namespace, interface, mac, vtep):
            return (_bridge(namespace, f"fdb del {mac} dev {interface} self dst {vtep}", tolerant=True),)
        case ops.AddFlood(namespace, interface, vtep):
            return (_bridge(namespace, f"fdb append {_ZERO_MAC} dev {interface} self dst {vtep} permanent"),)
        case ops.RemoveFlood(namespace, interface, vtep):
            return (_bridge(namespace, f"fdb del {_ZERO_MAC} dev {interface} self dst {vtep}", tolerant=True),)
        case ops.LoadFirewall(namespace, script):
            return (Step(("nft", "-f", "-"), _path(namespace), tuple(script.splitlines())),)
        case ops.ConfigurePod():
            return _configure_pod(op)


def _configure_pod(op: ops.ConfigurePod) -> tuple[Step | Call, ...]:
    sysctls = tuple((f"net/ipv6/conf/{op.interface}/{key}", "0") for key in ("accept_ra", "accept_dad", "autoconf"))
    up = [f"link set dev {op.interface} up"]
    up += [
        f"addr replace {address} dev {op.interface}{' nodad' if address.version == 6 else ''}"
        for address in op.addresses
    ]
    stale: list[str] = []
    rules: dict[int, list[str]] = {4: [], 6: []}
    for version, everything in ((4, "0.0.0.0/0"), (6, "::/0")):
        gateway = next((item for item in op.gateways if item.version == version), None)
        if op.gateways or op.default_addresses:
            # A secondary interface has neither: eth0's default routes are none of its business.
            stale.append(f"route del {everything} dev {op.default_interface}")
        for address, via in op.default_addresses:
            if address.version != version:
                continue
            rules[version].append(f"from {address.ip} lookup {POD_TABLE}")
            if via is not None:
                up.append(f"route replace {everything} via {via} dev {op.default_interface} table {POD_TABLE}")
        if gateway is not None:
            up.append(f"route replace {everything} via {gateway} dev {op.interface}")
    up += [f"route replace {destination} via {hop} dev {op.interface}" for destination, hop in op.routes]
    # A repeated ADD meets what the first one left: neither may stay behind, and rules would pile up.
    stale += [f"rule del {rule}" for rule in rules[4]]
    up += [f"rule add {rule}" for rule in rules[4]]
    plain, inet6 = ("ip", "-batch", "-"), ("ip", "-6", "-batch", "-")
    # Plugins that route by a link-local neighbour (Calico) do not tell it: the route that they made does.
    untold = tuple(address.version for address, via in op.default_addresses if via is None)
    steps: list[Step | Call] = [
        Call(op.netns, partial(_write_sysctls, sysctls), node=True),
        *([Call(op.netns, partial(_keep_default_routes, op.default_interface, untold))] if untold else []),
        Step(plain, op.netns, tuple(up), may_fail=tuple(stale)),
    ]
    if rules[6]:
        # Unlike routes, rules do not tell their family by their addresses.
        stale6, up6 = (tuple(f"rule {verb} {rule}" for rule in rules[6]) for verb in ("del", "add"))
        steps.append(Step(inet6, op.netns, up6, may_fail=stale6))
    return tuple(steps)


def _route(destination: IPNetwork, interface: InterfaceName, gateway: IPAddress | None) -> str:
    if gateway is None:
        return f"unreachable {destination} proto static"
    return f"{destination} via {gateway} dev {interface} proto static"


def _keep_default_routes(interface: InterfaceName, versions: tuple[int, ...]) -> None:
    """Copy a device's default routes to the table of its own replies, before they are deleted. Raises OSError."""
    for version in versions:
        show = ["ip", f"-{version}", "-j", "route", "show", "default", "dev", interface]
        listed = subprocess.run(show, capture_output=True, timeout=_SECONDS, check=False)
        for route in json.loads(listed.stdout or b"[]"):
            if "gateway" not in route:
                continue
            hop = ["via", route["gateway"], "dev", interface, "table", str(POD_TABLE), "onlink"]
            keep = ["ip", f"-{version}", "route", "replace", "default", *hop]
            done = subprocess.run(keep, capture_output=True, timeout=_SECONDS, check=False)
            if done.returncode:
                raise OSError(0, done.stderr.decode(errors="replace").strip())


def _write_sysctls(values: tuple[tuple[str, str], ...]) -> None:
    for key, value in values:
        path = Path("/proc/sys") / key
        # A kernel without br_netfilter has no bridge-nf-call switch to turn off.
        if path.exists() or not key.startswith("net/bridge/"):
            path.write_text(value)


def _path(namespace: NamespaceName | None) -> str | None:
    return str(namespaces.path_of(namespace)) if namespace else None


def _ip(namespace: NamespaceName | None, *lines: str, tolerant: bool = False) -> Step:
    return _step("ip", namespace, lines, tolerant)


def _bridge(namespace: NamespaceName | None, *lines: str, tolerant: bool = False) -> Step:
    return _step("bridge", namespace, lines, tolerant)


def _step(program: str, namespace: NamespaceName | None, lines: tuple[str, ...], tolerant: bool) -> Step:
    words, where = (program, "-batch", "-"), _path(namespace)
    return Step(words, where, may_fail=lines) if tolerant else Step(words, where, lines)
