"""The real kernel."""

import asyncio
import ipaddress
import json
import logging
import os
import re
import socket
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from pathlib import Path
from typing import Any, Final

from vmnet.kernel import cgroups, commands, connections, last_frame, namespaces, packets
from vmnet.kernel.api import Gone, Kernel, KernelError, LastFrame, Unsupported
from vmnet.kernel.commands import Batch
from vmnet.kernel.namespaces import Workers
from vmnet.model.addresses import IPAddress, IPInterface, IPNetwork, parse_mac
from vmnet.model.addresses import address as parse_address
from vmnet.model.connection import Connection, Flow, Outcome
from vmnet.model.names import (
    BRIDGE,
    DEFAULT_INTERFACE,
    JOIN_PREFIX,
    UPLINK,
    VXLAN_L2,
    VXLAN_L3,
    InterfaceName,
    MacAddress,
    NamespaceName,
)
from vmnet.plan import firewall, lock
from vmnet.plan.ops import Op
from vmnet.plan.state import (
    BridgeState,
    Cgroup,
    Datagrams,
    DefaultInterface,
    FdbEntry,
    JoinState,
    LinkState,
    NetworkState,
    NodeState,
    PodState,
)
from vmnet.plan.table import DIGEST_PREFIX, TABLE_PREFIX, Marks
from vmnet.runtime.aside import aside

log = logging.getLogger(__name__)

TIMEOUT: Final = 60.0
"""Seconds for one program; 10,000 elements take less than one."""
_NO_ENTRY: Final = "No such file or directory"
"""What nft says of a table that is not there."""
LONG: Final = 1 << 16
"""Characters of dumps that are read beside the event loop: some hundred entries, milliseconds."""
DUMPS: Final = 3
"""Of one look, side by side: while a program starts the interpreter does nothing else, a millisecond if it is large."""
_BETWEEN: Final = re.compile(r"[\s,]*")
_DECODER: Final = json.JSONDecoder()
LIST_CHAINS: Final = ["nft", "-j", "list", "chains"]


class LinuxKernel(Kernel):
    """Speaks iproute2 and nftables in batches: one program run for each run of operations of a kind and namespace.

    ``mounts`` is the node's mount namespace (a /proc/…/ns/mnt file) where this process, in a container, has another
    one; what is mounted on the node's ``/run/netns`` must be seen in both.
    """

    def __init__(self, mounts: Path | None = None) -> None:
        self._workers = Workers()
        self._node = Workers(mounts, threads=1)

    async def observe_node(self) -> NodeState:
        """Uplink MTU, joins, our namespaces."""
        links = await self._json(None, ["ip", "-j", "-d", "addr", "show"])
        routes = await self._json(None, ["ip", "-j", "route", "show", "default"])
        joins: dict[InterfaceName, JoinState] = {}
        for link in links:
            name = InterfaceName(link["ifname"])
            if name.startswith(JOIN_PREFIX):
                found = _interfaces(link)
                joins[name] = JoinState(
                    name,
                    next((item for item in found if isinstance(item, IPv4Interface)), None),
                    next(
                        (item for item in found if isinstance(item, IPv6Interface) and not item.ip.is_link_local), None
                    ),
                )
        uplink = routes[0].get("dev") if routes else None
        mtu = next((int(link["mtu"]) for link in links if link["ifname"] == uplink), 1500)
        (sets, chains), tables = await asyncio.gather(self._node_table(), self._json(None, LIST_CHAINS))
        prepared = sets.keys() >= firewall.NODE_SETS and chains >= firewall.NODE_CHAINS
        present = frozenset(
            NamespaceName(path.name) for path in namespaces.DIRECTORY.glob("vmnet-*") if path.name[6:].isdecimal()
        )
        held = {name: frozenset(element[0] for element in elements) for name, elements in sets.items()}
        return NodeState(
            namespaces=present,
            joins=joins,
            mtu=mtu,
            prepared=prepared,
            sets=held,
            tables=_digests(tables),
            bridges=_bridges(links),
            links=frozenset(InterfaceName(link["ifname"]) for link in links),
            locked=_locked(tables),
        )

    async def _node_table(self) -> tuple[dict[str, frozenset[tuple[str, ...]]], frozenset[str]]:
        code, output, errors = await self._run(None, ["nft", "-j", "list", "table", *firewall.NODE_TABLE.split()])
        if code and _NO_ENTRY not in errors:
            raise KernelError(f"nft: {errors.strip()}")
        return _ruleset(json.loads(output) if code == 0 else {}, family="inet")

    async def observe_network(self, namespace: NamespaceName) -> NetworkState | None:
        """Eight dumps, some of them side by side."""
        try:
            return await self._observe_network(namespace)
        except Gone:
            if namespaces.path_of(namespace).exists():
                raise
            return None

    async def _observe_network(self, namespace: NamespaceName) -> NetworkState | None:
        if not namespaces.path_of(namespace).exists():
            return None
        turns = asyncio.Semaphore(DUMPS)

        async def dump(argv: list[str], missing: str | None = None) -> str:
            async with turns:
                return await self._output(namespace, argv, missing)

        links, neighbours, fdb, routes4, routes6, rules, ruleset, listed = await asyncio.gather(
            dump(["ip", "-j", "-d", "addr", "show"]),
            dump(["ip", "-j", "neigh", "show", "nud", "permanent"]),
            dump(["bridge", "-j", "fdb", "show"]),
            dump(["ip", "-j", "-4", "route", "show"]),
            dump(["ip", "-j", "-6", "route", "show"]),
            # The family that is written last.
            dump(["ip", "-j", "-6", "rule", "show"]),
            # Elements of the other tables are never read back: they may be many, and the digest speaks for them.
            dump(["nft", "-j", "list", "table", *firewall.TABLE.split()], missing="{}"),
            dump(LIST_CHAINS),
        )
        dumps = (links, neighbours, fdb, routes4, routes6, rules, ruleset, listed)
        if sum(map(len, dumps)) < LONG:
            return _network_state(namespace, *dumps)
        return await aside(_network_state, namespace, *dumps)

    async def observe_pod(self, netns: str, interface: InterfaceName) -> PodState | None:
        """One interface of a pod."""
        if not await asyncio.to_thread(Path(netns).exists):
            return None
        found = await self._json_at(netns, ["ip", "-j", "addr", "show", "dev", interface], missing=[])
        if not found:
            return None
        link = found[0]
        return PodState(interface, parse_mac(link["address"]), int(link["mtu"]), frozenset(_interfaces(link)))

    async def default_interface(self, netns: str) -> DefaultInterface | None:
        """See the Protocol."""
        if not await asyncio.to_thread(Path(netns).exists):
            return None
        found = await self._json_at(netns, ["ip", "-j", "-d", "addr", "show", "dev", DEFAULT_INTERFACE], missing=[])
        if not found:
            return None
        link = found[0]
        device = await self._other_end(link)
        addresses = frozenset(item.ip for item in _interfaces(link) if not item.ip.is_link_local)
        return DefaultInterface(device, parse_mac(link["address"]), addresses)

    async def _other_end(self, link: dict[str, Any]) -> InterfaceName | None:
        """The node's end of a pod's veth: that names its other end, in whatever namespace it is, by number."""
        if link.get("linkinfo", {}).get("info_kind") != "veth" or "link_index" not in link:
            return None  # a macvlan's number is the uplink's
        try:
            name = socket.if_indextoname(int(link["link_index"]))
        except OSError:
            return None
        found = await self._json(None, ["ip", "-j", "-d", "link", "show", "dev", name], missing=[])
        if not found or found[0].get("linkinfo", {}).get("info_kind") != "veth":
            return None
        return InterfaceName(name) if found[0].get("link_index") == link["ifindex"] else None

    async def find_default_interface(self, address: IPAddress) -> DefaultInterface | None:
        """See the Protocol."""
        for path in await asyncio.to_thread(lambda: sorted(namespaces.DIRECTORY.glob("*"))):
            if path.name.startswith("vmnet-"):
                continue
            try:
                found = await self.default_interface(str(path))
            except KernelError as error:
                log.debug("%s: %s", path, error)
                continue
            if found is not None and address in found.addresses:
                return found
        return None

    async def kubelet(self, path: str | None) -> Cgroup | None:
        """See the Protocol."""
        return await asyncio.to_thread(cgroups.kubelet, path)

    async def apply(self, ops: Sequence[Op]) -> None:
        """In order; consecutive operations of one program and namespace go together."""
        batch: Batch | None = None
        for op in ops:
            for step in commands.render(op):
                if isinstance(step, commands.Call):
                    await self._flush(batch)
                    batch = None
                    await self._call(op, step)
                elif batch is not None and batch.takes(step):
                    batch.add(step, op)
                else:
                    await self._flush(batch)
                    batch = Batch.of(step, op)
        await self._flush(batch)

    async def connections(self, namespace: NamespaceName) -> frozenset[IPAddress]:
        """See the Protocol."""
        found: frozenset[IPAddress] = await self._within(namespace, connections.lasting)
        return found

    async def datagrams(self, namespace: NamespaceName | None) -> frozenset[Datagrams]:
        """See the Protocol."""
        found: frozenset[Datagrams] = await self._within(namespace, connections.datagrams)
        return found

    async def forget_datagrams(self, namespace: NamespaceName | None, entries: Collection[Datagrams]) -> int:
        """See the Protocol."""
        return int(await self._within(namespace, partial(connections.delete, tuple(item.flow for item in entries))))

    async def connections_of(self, namespace: NamespaceName, addresses: Sequence[IPAddress]) -> tuple[Connection, ...]:
        """See the Protocol."""
        found: tuple[Connection, ...] = await self._within(namespace, partial(connections.of, tuple(addresses)))
        return found

    async def put_connections(self, namespace: NamespaceName, entries: Sequence[Connection]) -> tuple[Outcome, ...]:
        """See the Protocol."""
        found: tuple[Outcome, ...] = await self._within(namespace, partial(connections.put, tuple(entries)))
        return found

    async def forget_connections(self, namespace: NamespaceName, flows: Sequence[Flow]) -> int:
        """See the Protocol."""
        return int(await self._within(namespace, partial(connections.delete, tuple(flows))))

    async def forget_marked(self, namespace: NamespaceName, mark: int) -> None:
        """See the Protocol."""
        await self._within(namespace, partial(connections.delete_marked, mark))

    async def packet_socket(
        self,
        namespace: NamespaceName,
        interface: InterfaceName,
        *,
        protocols: Sequence[int] = (),
        udp_ports: Sequence[int] = (),
    ) -> socket.socket:
        """See the Protocol."""
        return await self._open(
            namespace, partial(packets.packet_socket, interface, tuple(protocols), tuple(udp_ports))
        )

    async def last_frame(self, namespace: NamespaceName, interface: InterfaceName, mac: MacAddress) -> LastFrame:
        """See the Protocol."""
        found: LastFrame = await self._made(namespace, partial(last_frame.last_frame, interface, mac))
        return found

    async def udp_socket(
        self, namespace: NamespaceName, address: IPv4Address | IPv6Address, port: int
    ) -> socket.socket:
        """See the Protocol."""
        return await self._open(namespace, partial(packets.udp_socket, address, port))

    async def tcp_listener(
        self, namespace: NamespaceName, address: IPv4Address | IPv6Address, port: int
    ) -> socket.socket:
        """See the Protocol."""
        return await self._open(namespace, partial(packets.tcp_listener, address, port))

    async def tcp_socket(self, namespace: NamespaceName, family: int) -> socket.socket:
        """See the Protocol."""
        return await self._open(namespace, partial(packets.tcp_socket, family))

    async def close(self) -> None:
        """End the threads."""
        self._workers.close()
        self._node.close()

    # Running

    async def _run(self, netns: str | None, argv: Sequence[str], stdin: str = "") -> tuple[int, str, str]:
        try:
            return await self._workers.run(netns, partial(_program, argv, stdin))
        except subprocess.TimeoutExpired:
            raise KernelError(f"{argv[0]} did not end within {TIMEOUT:g} s") from None
        except OSError as error:
            # Without a descriptor for it (EMFILE) a namespace that is there must not be taken for gone.
            gone = isinstance(error, FileNotFoundError) and netns is not None and error.filename == netns
            kind = Gone if gone else KernelError
            raise kind(f"{argv[0]} in {netns or 'the node'}: {error}", errno=error.errno or 0) from error

    async def _within(self, namespace: NamespaceName | None, function: Callable[[], Any]) -> Any:
        try:
            where = str(namespaces.path_of(namespace)) if namespace is not None else None
            return await self._workers.run(where, function)
        except FileNotFoundError as error:
            raise Gone(f"network namespace {namespace} is gone", errno=error.errno or 0) from error
        except OSError as error:
            raise KernelError(f"conntrack of {namespace or 'the node'}: {error}", errno=error.errno or 0) from error

    async def _open(self, namespace: NamespaceName, make: Any) -> socket.socket:
        opened = await self._made(namespace, make)
        assert isinstance(opened, socket.socket)  # noqa: S101
        return opened

    async def _made(self, namespace: NamespaceName, make: Any) -> Any:
        try:
            return await self._workers.run(str(namespaces.path_of(namespace)), make)
        except FileNotFoundError as error:
            raise Gone(f"network namespace {namespace} is gone", errno=error.errno or 0) from error
        except OSError as error:
            kind = Gone if error.errno in packets.GONE else KernelError
            raise kind(f"socket in {namespace}: {error}", errno=error.errno or 0) from error

    async def _call(self, op: Op, step: commands.Call) -> None:
        try:
            await (self._node if step.node else self._workers).run(step.netns, step.function)
        except FileNotFoundError as error:
            raise Gone(f"{op}: {error}", op=op, errno=error.errno or 0) from error
        except OSError as error:
            raise KernelError(f"{op}: {error}", op=op, errno=error.errno or 0) from error

    async def _flush(self, batch: Batch | None) -> None:
        if batch is None:
            return
        try:
            code, _, errors = await self._run(batch.step.netns, batch.argv(), batch.script())
        except Gone:
            if not batch.step.lines:
                return
            raise
        blamed = batch.blame(errors) if code else None
        if blamed is None:
            return
        op, message = blamed
        if commands.is_gone(message):
            raise Gone(f"{op}: {message}", op=op)
        if commands.is_unsupported(message):
            raise Unsupported(f"{op}: {message}", op=op)
        raise KernelError(f"{op}: {message}", op=op)

    async def _json(self, namespace: NamespaceName | None, argv: list[str], missing: Any = None) -> Any:
        return await self._json_at(str(namespaces.path_of(namespace)) if namespace else None, argv, missing)

    async def _json_at(self, netns: str | None, argv: list[str], missing: Any = None) -> Any:
        output = await self._output_at(netns, argv, json.dumps(missing) if missing is not None else None)
        return json.loads(output) if output.strip() else []

    async def _output(self, namespace: NamespaceName, argv: list[str], missing: str | None = None) -> str:
        return await self._output_at(str(namespaces.path_of(namespace)), argv, missing)

    async def _output_at(self, netns: str | None, argv: list[str], missing: str | None) -> str:
        try:
            code, output, errors = await self._run(netns, argv)
        except Gone:
            if missing is not None:
                return missing
            raise
        if code:
            if missing is not None and (commands.is_gone(errors) or _NO_ENTRY in errors):
                return missing
            kind = Gone if commands.is_gone(errors) else KernelError
            raise kind(f"{' '.join(argv)} in {netns or 'the node'}: {errors.strip()}")
        return output


def _program(argv: Sequence[str], stdin: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a program that ended. Raises OSError, subprocess.TimeoutExpired."""
    done = subprocess.run(
        argv,
        input=stdin.encode(),
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def _network_state(
    namespace: NamespaceName,
    links: str,
    neighbours: str,
    fdb: str,
    routes4: str,
    routes6: str,
    rules: str,
    ruleset: str,
    listed: str,
) -> NetworkState:
    """What the dumps say. It may take a second of processor time, with tens of thousands of entries."""
    forwarding = list(_items(fdb))
    entries, floods = _fdb(item for item in forwarding if item["ifname"] != VXLAN_L3)
    static = _neighbours(_items(neighbours))
    routes = [*_items(routes4), *_items(routes6)]
    sets, chains = _ruleset(_document(ruleset))
    return NetworkState(
        namespace=namespace,
        links={InterfaceName(link["ifname"]): _link(link) for link in _items(links)},
        neighbours=static.get(BRIDGE, {}),
        routers=static.get(VXLAN_L3, {}),
        tunnels={
            MacAddress(item["mac"]): parse_address(item["dst"])
            for item in forwarding
            if item["ifname"] == VXLAN_L3 and "dst" in item
        },
        routes=_routes(routes),
        homes=frozenset(int(item["fwmark"], 16) for item in _items(rules) if "fwmark" in item),
        fdb=entries,
        floods=floods,
        default_routes=frozenset(
            parse_address(item["gateway"]).version for item in routes if item["dst"] == "default" and "gateway" in item
        ),
        sets=sets,
        chains=chains,
        tables=_digests(_document(listed)),
    )


def _document(text: str) -> Any:
    return json.loads(text) if text.strip() else {}


def _items(text: str) -> Iterator[dict[str, Any]]:
    """The objects of an array, one after another: nothing else runs while all of them are read at once."""
    at = text.find("[") + 1
    while at:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr] # it matches nothing, too
        if text[at : at + 1] != "{":
            return
        item, at = _DECODER.raw_decode(text, at)
        yield item


def _link(link: dict[str, Any]) -> LinkState:
    return LinkState(
        name=InterfaceName(link["ifname"]),
        mac=MacAddress(link.get("address", "")),
        mtu=int(link["mtu"]),
        up="UP" in link.get("flags", ()),
        kind=link.get("linkinfo", {}).get("info_kind", ""),
        master=InterfaceName(link["master"]) if "master" in link else None,
        alias=link.get("ifalias", ""),
        addresses=frozenset(_interfaces(link)),
        port=int(link.get("linkinfo", {}).get("info_data", {}).get("port", 0)),
    )


def _interfaces(link: dict[str, Any]) -> list[IPInterface]:
    return [
        ipaddress.ip_interface(f"{item['local']}/{item['prefixlen']}")
        for item in link.get("addr_info", ())
        if "local" in item
    ]


def _bridges(links: Iterable[dict[str, Any]]) -> dict[InterfaceName, BridgeState]:
    return {
        InterfaceName(link["ifname"]): BridgeState(
            int(link["mtu"]), bool(link["linkinfo"].get("info_data", {}).get("vlan_filtering"))
        )
        for link in links
        if link.get("linkinfo", {}).get("info_kind") == "bridge"
    }


def _neighbours(items: Iterable[dict[str, Any]]) -> dict[InterfaceName, dict[IPAddress, MacAddress]]:
    found: dict[InterfaceName, dict[IPAddress, MacAddress]] = {}
    for item in items:
        if "lladdr" in item:
            held = found.setdefault(InterfaceName(item["dev"]), {})
            held[parse_address(item["dst"])] = parse_mac(item["lladdr"])
    return found


def _routes(items: Iterable[dict[str, Any]]) -> dict[IPNetwork, IPAddress | None]:
    found: dict[IPNetwork, IPAddress | None] = {}
    for item in items:
        if item["dst"] == "default":
            continue
        if item.get("type") == "unreachable":
            found[ipaddress.ip_network(item["dst"])] = None
        elif item.get("dev") == VXLAN_L3 and "gateway" in item:
            found[ipaddress.ip_network(item["dst"])] = parse_address(item["gateway"])
    return found


def _fdb(items: Iterable[dict[str, Any]]) -> tuple[frozenset[FdbEntry], frozenset[IPAddress]]:
    entries, floods = set(), set()
    for item in items:
        interface = InterfaceName(item["ifname"])
        if item["mac"] == "00:00:00:00:00:00":
            if "dst" in item:
                floods.add(parse_address(item["dst"]))
            continue
        if interface in (BRIDGE, UPLINK) or item.get("state") == "permanent":
            continue
        flags = item.get("flags", ())
        if interface == VXLAN_L2 and "dst" not in item:
            continue  # the bridge's half of the entry; the device's half carries the VTEP
        vtep = parse_address(item["dst"]) if "dst" in item else None
        entries.add(FdbEntry(MacAddress(item["mac"]), interface, vtep, "extern_learn" in flags))
    return frozenset(entries), frozenset(floods)


def _ruleset(
    found: dict[str, Any], family: str = "netdev"
) -> tuple[dict[str, frozenset[tuple[str, ...]]], frozenset[str]]:
    sets: dict[str, frozenset[tuple[str, ...]]] = {}
    chains = set()
    for item in found.get("nftables", []) if isinstance(found, dict) else []:
        if "chain" in item and item["chain"]["family"] == family:
            chains.add(str(item["chain"]["name"]))
        # What runs out is nobody's state, and may be much.
        if "set" in item and item["set"]["family"] == family and "timeout" not in item["set"].get("flags", ()):
            sets[str(item["set"]["name"])] = frozenset(_parts(element) for element in item["set"].get("elem", ()))
    return sets, frozenset(chains)


def _digests(found: dict[str, Any]) -> dict[str, Marks]:
    """Tables of ``plan.table`` by identity, with the digests that the names of their chains tell, oldest first."""
    tables: dict[str, dict[str, int]] = {}
    for item in found.get("nftables", []) if isinstance(found, dict) else []:
        if "chain" not in item or not str(item["chain"]["table"]).startswith(TABLE_PREFIX):
            continue
        chain = item["chain"]
        identity, name = f"{chain['family']} {chain['table']}", str(chain["name"])
        marks = tables.setdefault(identity, {})
        if name.startswith(DIGEST_PREFIX):
            # A table numbers what is made in it.
            marks[name.removeprefix(DIGEST_PREFIX)] = int(chain["handle"])
    return {identity: tuple(sorted(marks, key=marks.__getitem__)) for identity, marks in tables.items()}


def _locked(found: dict[str, Any]) -> dict[InterfaceName, InterfaceName]:
    """Veths that the table of locks is on."""
    chains = (item["chain"] for item in found.get("nftables", []) if "chain" in item)
    return lock.devices(
        str(chain["name"]) for chain in chains if f"{chain['family']} {chain['table']}" == lock.VETH_TABLE
    )


def _parts(element: Any) -> tuple[str, ...]:
    if isinstance(element, dict) and "elem" in element:
        return _parts(element["elem"]["val"])
    if isinstance(element, dict) and "concat" in element:
        return tuple(str(part) for part in element["concat"])
    if isinstance(element, dict) and "prefix" in element:
        return (f"{element['prefix']['addr']}/{element['prefix']['len']}",)
    return (str(element),)
