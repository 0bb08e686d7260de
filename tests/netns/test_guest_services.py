"""Real DHCP clients and the kernel's own router discovery against the guest services, in network namespaces.

Each client runs in a mount and UTS namespace of its own, on a copy of /etc: this machine's resolv.conf, host name and
leases are never touched.
"""

import asyncio
import ctypes
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface, ip_interface, ip_network
from pathlib import Path
from typing import Any, TypeVar

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_RA, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from vmnet import metrics
from vmnet.agent import dhcp
from vmnet.agent.announcer import Announcer
from vmnet.agent.guests import GuestServices
from vmnet.announce.announcement import Kind, announcements
from vmnet.kernel.linux import LinuxKernel
from vmnet.model import names
from vmnet.model.addresses import link_local, mac_bytes
from vmnet.model.endpoint import Endpoint, Join, LocalPort, MachineReference, Node, NodeNetwork, PodReference
from vmnet.model.names import MacAddress, NetworkId
from vmnet.model.network import Network
from vmnet.plan import firewall
from vmnet.wire import arp, datagram, dhcp4, dhcp6, ndp
from vmnet.wire.datagram import Datagram
from vmnet.wire.lease import lease_of
from vmnet.wire.malformed import Malformed

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")

MTU = 1400
SEARCH = [
    "red-ns.vm.cluster.local",
    "vm.cluster.local",
    "red-ns.svc.cluster.local",
    "svc.cluster.local",
    "cluster.local",
]
DEADLINE = 60.0
CLONE_NEWNET = 0x40000000
SO_ATTACH_FILTER = 26
ETH_P_ALL = 0x0003
LIBC = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


# --- the rig --------------------------------------------------------------------------------------------------------


def inside(namespace: str, call: Callable[[], T]) -> T:
    """Run in a network namespace; only the calling thread moves, and it moves back."""
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        if LIBC.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
        try:
            return call()
        finally:
            LIBC.setns(home.fileno(), CLONE_NEWNET)


def packet_socket(namespace: str, interface: str, expression: str = "") -> socket.socket:
    """A packet socket behind a filter in tcpdump's language."""

    def opened() -> socket.socket:
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        if expression:
            text = subprocess.run(
                ["tcpdump", "-ddd", "-y", "EN10MB", expression], capture_output=True, text=True, check=True
            ).stdout
            code = [tuple(map(int, line.split())) for line in text.splitlines()[1:]]
            program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
            head = struct.pack("HL", len(code), ctypes.addressof(program))
            packets.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, head)
        packets.bind((interface, ETH_P_ALL))
        packets.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # "network is down", of a link that comes up later
        return packets

    return inside(namespace, opened)


def ip(*arguments: str, namespace: str | None = None) -> str:
    where = ["-n", namespace] if namespace else []
    return subprocess.run(["ip", *where, *arguments], capture_output=True, text=True, check=True, timeout=30).stdout


@dataclass(frozen=True)
class Rig:
    """One network on one node, with one machine's port whose far end is ``eth0`` of the namespace ``guest``."""

    network: Network
    endpoint: Endpoint
    guest: str
    etc: Path
    scratch: Path

    @property
    def machine(self) -> str:
        return self.network.namespace

    async def in_guest(self, script: str, deadline: float = DEADLINE) -> str:
        """Run a shell script as the guest would, with private /etc, /run and lease files. Gives its output."""
        setup = (
            "set -e; mount --make-rprivate /; "
            f"mount --bind {self.etc} /etc; "
            "mount -t tmpfs tmpfs /run; mkdir -p /run/dhcpcd; "
            "mkdir -p /var/lib/dhcp /var/lib/dhcpcd; "
            "mount -t tmpfs tmpfs /var/lib/dhcp; mount -t tmpfs tmpfs /var/lib/dhcpcd; "
            "hostname localhost; set +e; "
        )
        process = await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", self.guest, "unshare", "--mount", "--uts", "sh", "-c", setup + script),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SCRATCH": str(self.scratch)},
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), deadline)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
        return output.decode(errors="replace")

    def guest_ip(self, *arguments: str) -> Any:
        return json.loads(ip("-j", *arguments, namespace=self.guest) or "[]")

    def resolv_conf(self) -> str:
        return (self.etc / "resolv.conf").read_text()


@pytest.fixture
def namespaces() -> Iterator[Callable[[str], str]]:
    """Makes network namespaces and deletes them afterwards, with whatever still runs inside."""
    with ExitStack() as stack:

        def make(name: str) -> str:
            ip("netns", "add", name)
            stack.callback(remove, name)
            ip("link", "set", "lo", "up", namespace=name)
            return name

        def remove(name: str) -> None:
            for pid in ip("netns", "pids", name).split():
                os.kill(int(pid), 9)
            ip("netns", "delete", name)

        yield make


def example(number: int) -> tuple[Network, Endpoint]:
    """A dual-stack network and a machine on it."""
    network = Network(
        f"cluster_udn_{number}",
        NetworkId(number),
        subnets=(ip_network("192.168.0.0/16"), ip_network("fd00:7::/64")),
    )
    endpoint = Endpoint(
        pod=PodReference("red-ns", "virt-launcher-red-abcde", f"uid-{number}"),
        network=network.name,
        node="n1",
        mac=MacAddress("0a:58:c0:a8:00:05"),
        addresses=(ip_interface("192.168.0.5/16"), ip_interface("fd00:7::5/64")),
        machine=MachineReference("red-ns", "red"),
    )
    return network, endpoint


@pytest.fixture
def rig(namespaces: Callable[[str], str], tmp_path: Path) -> Rig:
    number = random.randrange(1 << 22, names.MAX_NETWORK_ID)
    network, endpoint = example(number)
    make_node(namespaces, network)
    guest = namespaces(f"vmg-{number}")
    for key in ("all", "default"):
        set_ipv6(guest, key, accept_dad=0, dad_transmits=0, accept_ra=1, router_solicitation_delay=0)
    attach(network.namespace, endpoint.port, guest, endpoint.mac)
    etc = tmp_path / "etc"
    shutil.copytree("/etc", etc, symlinks=True)
    (etc / "resolv.conf").unlink()
    (etc / "resolv.conf").write_text("")
    (etc / "hostname").write_text("localhost\n")
    return Rig(network, endpoint, guest, etc, tmp_path)


def make_node(namespaces: Callable[[str], str], network: Network, name: str = "") -> str:
    """The network's namespace of a node: ``br0`` with the anycast gateway (docs/architecture.md)."""
    namespace = namespaces(name or network.namespace)
    for key in ("all", "default"):
        set_ipv6(namespace, key, accept_dad=0, forwarding=1, accept_ra=0)
    ip(
        "link",
        "add",
        "br0",
        "address",
        network.gateway_mac,
        "type",
        "bridge",
        "mcast_snooping",
        "0",
        namespace=namespace,
    )
    ip("link", "set", "br0", "up", namespace=namespace)
    for subnet, gateway in zip(network.subnets, network.gateways, strict=True):
        ip("address", "add", f"{gateway}/{subnet.prefixlen}", "dev", "br0", "nodad", namespace=namespace)
    ip("address", "add", "fe80::1/64", "dev", "br0", "nodad", namespace=namespace)
    return namespace


def attach(namespace: str, port: str, guest: str, mac: str, *, name: str = "eth0") -> None:
    """A port on ``br0`` whose far end is an interface of the guest; that one stays down."""
    far = ("peer", "name", name, "address", mac, "netns", guest)
    ip("link", "add", port, "type", "veth", *far, namespace=namespace)
    ip("link", "set", port, "master", "br0", "up", namespace=namespace)


def set_ipv6(namespace: str, interface: str, **values: int) -> None:
    pairs = [f"net.ipv6.conf.{interface}.{key}={value}" for key, value in values.items()]
    subprocess.run(["ip", "netns", "exec", namespace, "sysctl", "-qw", *pairs], check=True, timeout=30)


@pytest.fixture
async def kernel() -> AsyncIterator[LinuxKernel]:
    opened = LinuxKernel()
    yield opened
    await opened.close()


@pytest.fixture
async def services(rig: Rig, kernel: LinuxKernel) -> AsyncIterator[GuestServices]:
    served = GuestServices(kernel, "cluster.local")
    await served.update(rig.network, MTU, [rig.endpoint])
    yield served
    served.close()


async def until(condition: Callable[[], T], deadline: float = DEADLINE) -> T:
    """Wait for a condition that has no event to wait for."""
    async with asyncio.timeout(deadline):
        while not (found := condition()):
            await asyncio.sleep(0.02)
        return found


def counted(metric: Any, *labels: str) -> float:
    return float(metric.labels(*labels)._value.get())


# --- DHCPv4 ---------------------------------------------------------------------------------------------------------

UDHCPC_SCRIPT = """#!/bin/sh
case "$1" in bound|renew)
  env > "$SCRATCH/$1.part" && mv "$SCRATCH/$1.part" "$SCRATCH/$1"
  ip address replace "$ip/$mask" dev "$interface"
  ip route replace default via "$router" ;;
nak) echo "$message" > "$SCRATCH/nak" ;;
esac
"""


def udhcpc_script(rig: Rig) -> Path:
    script = rig.scratch / "udhcpc.sh"
    script.write_text(UDHCPC_SCRIPT)
    script.chmod(0o755)
    return script


def searched(resolv_conf: str) -> list[str]:
    [line] = [line for line in resolv_conf.splitlines() if line.startswith("search")]
    return [name.rstrip(".") for name in line.split()[1:]]


def environment(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)


async def test_busybox_gets_everything(rig: Rig, services: GuestServices) -> None:
    options = "-O search -O mtu -O hostname -O domain -O broadcast"
    command = f"busybox udhcpc -f -q -n -t 5 -T 1 -i eth0 -s {udhcpc_script(rig)} {options}"
    output = await rig.in_guest(f"ip link set eth0 up; {command}")
    got = environment(rig.scratch / "bound") if (rig.scratch / "bound").exists() else pytest.fail(output)
    assert got["ip"] == "192.168.0.5"
    assert got["mask"] == "16"
    assert got["router"] == got["dns"] == got["serverid"] == "192.168.0.1"
    assert got["domain"] == "red-ns.vm.cluster.local"
    assert got["search"].split() == SEARCH
    assert got["hostname"] == "red"
    assert got["mtu"] == str(MTU)
    assert got["broadcast"] == "192.168.255.255"
    assert int(got["lease"]) >= 8 * 3600, "guests must outlive an agent that is away for hours"
    assert counted(metrics.DHCP_REQUESTS, rig.network.name, "ipv4", "discover") >= 1
    assert counted(metrics.DHCP_REQUESTS, rig.network.name, "ipv4", "request") >= 1


async def test_busybox_renews_by_unicast_and_hears_no_port_unreachable(rig: Rig, services: GuestServices) -> None:
    # The gateway's only: a client that is slow asks twice, and its kernel then refuses the second answer by itself.
    unreachable = packet_socket(rig.guest, "eth0", "icmp[0] == 3 and src host 192.168.0.1")
    with unreachable:
        script = (
            f"ip link set eth0 up; busybox udhcpc -f -n -t 5 -T 3 -i eth0 -s {udhcpc_script(rig)} & client=$!; "
            'while [ ! -e "$SCRATCH/bound" ]; do sleep 0.05; done; kill -USR1 $client; '
            'while [ ! -e "$SCRATCH/renew" ]; do sleep 0.05; done; kill $client; wait'
        )
        await rig.in_guest(script)
        with pytest.raises(BlockingIOError):
            unreachable.recv(2048)
    assert environment(rig.scratch / "renew")["ip"] == "192.168.0.5"


async def test_dhclient_configures_the_machine(rig: Rig, services: GuestServices) -> None:
    output = await rig.in_guest(
        "dhclient -4 -1 -v -pf /run/dhclient.pid -lf /var/lib/dhcp/leases eth0; hostname; cat /var/lib/dhcp/leases; "
        "kill $(cat /run/dhclient.pid)"
    )
    assert "bound to 192.168.0.5" in output, output
    assert "option dhcp-lease-time 86400" in output
    assert "option dhcp-server-identifier 192.168.0.1" in output
    assert re.search(r'option host-name "red"', output)
    [link] = rig.guest_ip("-4", "address", "show", "eth0")
    assert [(item["local"], item["prefixlen"]) for item in link["addr_info"]] == [("192.168.0.5", 16)]
    assert link["mtu"] == MTU
    assert [route["gateway"] for route in rig.guest_ip("-4", "route", "show", "default")] == ["192.168.0.1"]
    assert "nameserver 192.168.0.1" in rig.resolv_conf()
    assert searched(rig.resolv_conf()) == SEARCH


async def test_dhclient_with_another_machines_address_is_refused_and_starts_over(
    rig: Rig, services: GuestServices
) -> None:
    lease = (
        'lease { interface "eth0"; fixed-address 192.168.0.99; option subnet-mask 255.255.0.0; '
        "option dhcp-server-identifier 192.168.0.1; option dhcp-lease-time 86400; "
        "renew 4 2099/01/01 00:00:00; rebind 4 2099/01/01 00:00:00; expire 4 2099/01/01 00:00:00; }"
    )
    output = await rig.in_guest(
        f"echo '{lease}' > /var/lib/dhcp/leases; "
        "dhclient -4 -1 -v -pf /run/dhclient.pid -lf /var/lib/dhcp/leases eth0; kill $(cat /run/dhclient.pid)"
    )
    assert "DHCPNAK from 192.168.0.1" in output, output
    assert "bound to 192.168.0.5" in output


async def test_dhclient_releases_without_losing_the_address(rig: Rig, services: GuestServices) -> None:
    once = "dhclient -4 -1 -v -pf /run/dhclient.pid -lf /var/lib/dhcp/leases eth0; "
    release = "dhclient -4 -r -v -pf /run/dhclient.pid -lf /var/lib/dhcp/leases eth0; "
    output = await rig.in_guest(once + release + once + "kill $(cat /run/dhclient.pid)")
    assert output.count("bound to 192.168.0.5") == 2, output
    assert counted(metrics.DHCP_REQUESTS, rig.network.name, "ipv4", "release") == 1


# --- both families --------------------------------------------------------------------------------------------------


async def test_dhcpcd_configures_both_families(rig: Rig, services: GuestServices) -> None:
    output = await rig.in_guest(
        "dhcpcd --persistent --waitip=46 --timeout 30 eth0; hostname > $SCRATCH/hostname; dhcpcd --exit eth0"
    )
    [link] = rig.guest_ip("address", "show", "eth0")
    scoped = {(item["local"], item["prefixlen"]) for item in link["addr_info"] if item["scope"] == "global"}
    assert {("192.168.0.5", 16), ("fd00:7::5", 128)} == scoped, output
    assert (rig.scratch / "hostname").read_text().startswith("red."), output
    [default4] = rig.guest_ip("-4", "route", "show", "default")
    [default6] = rig.guest_ip("-6", "route", "show", "default")
    assert default4["gateway"] == "192.168.0.1"
    assert default6["gateway"] == "fe80::1"
    assert "nameserver 192.168.0.1" in rig.resolv_conf()
    assert "nameserver fd00:7::1" in rig.resolv_conf()
    assert searched(rig.resolv_conf()) == SEARCH


# --- IPv6 -----------------------------------------------------------------------------------------------------------


async def test_dhclient6_gets_the_address_from_the_stable_server(rig: Rig, services: GuestServices) -> None:
    start = "ip link set eth0 up; while ip -6 address show dev eth0 | grep -q tentative; do sleep 0.05; done; "
    output = await rig.in_guest(
        start + "dhclient -6 -1 -v -pf /run/dhclient6.pid -lf /var/lib/dhcp/leases6 eth0; cat /var/lib/dhcp/leases6; "
        "dhclient -6 -r -v -pf /run/dhclient6.pid -lf /var/lib/dhcp/leases6 eth0"
    )
    assert "iaaddr fd00:7::5" in output, output
    assert "option dhcp6.name-servers fd00:7::1" in output
    assert all(name in output for name in SEARCH)
    assert "nameserver fd00:7::1" in rig.resolv_conf()
    assert counted(metrics.DHCP_REQUESTS, rig.network.name, "ipv6", "request") == 1
    assert counted(metrics.DHCP_REQUESTS, rig.network.name, "ipv6", "release") >= 1


async def test_dhclient6_confirms_after_a_link_flap(rig: Rig, services: GuestServices) -> None:
    start = "ip link set eth0 up; while ip -6 address show dev eth0 | grep -q tentative; do sleep 0.05; done; "
    once = "dhclient -6 -1 -v -pf /run/dhclient6.pid -lf /var/lib/dhcp/leases6 eth0; kill $(cat /run/dhclient6.pid); "
    await rig.in_guest(start + once + once)
    assert counted(metrics.DHCP_REQUESTS, rig.network.name, "ipv6", "confirm") >= 1
    [link] = rig.guest_ip("-6", "address", "show", "eth0", "scope", "global")
    assert [item["local"] for item in link["addr_info"] if item] == ["fd00:7::5"]


async def test_the_kernel_finds_one_router_and_makes_no_address(rig: Rig, services: GuestServices) -> None:
    capture = packet_socket(rig.guest, "eth0", "icmp6[0] == 134")
    with capture:
        ip("link", "set", "eth0", "up", namespace=rig.guest)
        [route] = await until(lambda: rig.guest_ip("-6", "route", "show", "default"))
        frame = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(capture, 2048), DEADLINE)
    assert route["gateway"] == "fe80::1"
    assert route["protocol"] == "ra"
    prefixes = [item["dst"] for item in rig.guest_ip("-6", "route", "show", "proto", "kernel")]
    on_link = rig.guest_ip("-6", "route", "show", "fd00:7::/64")
    assert on_link, prefixes
    assert "gateway" not in on_link[0]
    [link] = rig.guest_ip("-6", "address", "show", "eth0")
    assert [item["scope"] for item in link["addr_info"]] == ["link"], "no autoconfiguration"
    mtu = await rig.in_guest("cat /proc/sys/net/ipv6/conf/eth0/mtu")
    assert mtu.strip() == str(MTU)
    assert counted(metrics.ROUTER_SOLICITATIONS, rig.network.name) >= 1
    check_with_tshark(rig.scratch, frame)


def capture_file(path: Path, frames: Sequence[bytes]) -> Path:
    """A pcap file (libpcap's classic format, Ethernet)."""
    parts = [struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)]
    parts += [struct.pack("<IIII", 0, 0, len(frame), len(frame)) + frame for frame in frames]
    path.write_bytes(b"".join(parts))
    return path


def dissected(path: Path, *fields: str) -> list[list[str]]:
    """What tshark reads, a list of values for each frame; checksums are verified."""
    arguments = ["tshark", "-r", str(path), "-o", "ip.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE"]
    arguments += ["-T", "fields", *(part for field in fields for part in ("-e", field))]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60).stdout
    flags = {"True": "1", "False": "0"}
    return [[flags.get(value, value) for value in line.split("\t")] for line in output.splitlines()]


def check_with_tshark(scratch: Path, frame: bytes) -> None:
    """An independent dissector reads the advertisement as meant, its checksum included."""
    wanted = {
        "icmpv6.checksum.status": "1",
        "icmpv6.nd.ra.flag.m": "1",
        "icmpv6.opt.prefix.flag.l": "1",
        "icmpv6.opt.prefix.flag.a": "0",
        "icmpv6.opt.mtu": str(MTU),
        "icmpv6.opt.rdnss": "fd00:7::1",
        "icmpv6.opt.dnssl": ",".join(SEARCH),
        "ipv6.src": "fe80::1",
        "ipv6.hlim": "255",
        "_ws.malformed": "",
    }
    assert dissected(capture_file(scratch / "ra.pcap", [frame]), *wanted) == [list(wanted.values())]


async def test_tshark_finds_nothing_wrong_with_any_frame(tmp_path: Path) -> None:
    network, endpoint = example(9)
    lease = lease_of(network, endpoint, MTU, "cluster.local")
    leases = {endpoint.mac: lease}
    everyone = MacAddress("ff:ff:ff:ff:ff:ff")
    discover = dhcp4.encode(dhcp4.Message(dhcp4.MessageType.DISCOVER, 1, endpoint.mac))
    reboot = dhcp4.Message(
        dhcp4.MessageType.REQUEST, 1, endpoint.mac, options={dhcp4.Option.REQUESTED_ADDRESS: bytes([10, 0, 0, 1])}
    )
    associations = tuple(
        dhcp6.Association(kind, 1) for kind in (dhcp6.Option.IA_NA, dhcp6.Option.IA_TA, dhcp6.Option.IA_PD)
    )
    solicit = dhcp6.Message(
        dhcp6.MessageType.SOLICIT, 1, b"\0\3\0\1abcdef", associations=associations, fqdn=dhcp6.Fqdn("red")
    )
    questions = [
        Datagram(endpoint.mac, everyone, dhcp4.UNSPECIFIED, dhcp4.LIMITED_BROADCAST, 68, 67, discover),
        Datagram(endpoint.mac, everyone, dhcp4.UNSPECIFIED, dhcp4.LIMITED_BROADCAST, 68, 67, dhcp4.encode(reboot)),
        Datagram(endpoint.mac, everyone, link_local(endpoint.mac), dhcp6.ALL_SERVERS, 546, 547, dhcp6.encode(solicit)),
    ]
    answers = [dhcp.answer(datagram.encode(question), leases, network.name) for question in questions]
    frames = [*(frame for frame in answers if frame), *(item.frame for item in announcements(lease))]
    assert len(frames) == 3 + 12
    sums = ("ip.checksum.status", "udp.checksum.status", "icmpv6.checksum.status")
    read = dissected(capture_file(tmp_path / "all.pcap", frames), "_ws.malformed", "_ws.expert.severity", *sums)
    assert len(read) == len(frames)
    for malformed, severity, *status in read:
        assert malformed == ""
        assert not severity or max(map(int, severity.split(","))) < 0x600000, "no warnings, no errors"
        assert set(status) <= {"", "1"}, "every checksum is good"
    named = dissected(tmp_path / "all.pcap", "dhcp.option.hostname")
    assert named[0] == ["red"]


async def test_a_pod_is_not_advertised_to(rig: Rig, kernel: LinuxKernel) -> None:
    """CNI has given it a default route already; a second gateway must not appear."""
    served = GuestServices(kernel, "cluster.local")
    pod = Endpoint(rig.endpoint.pod, rig.network.name, "n1", rig.endpoint.mac, rig.endpoint.addresses)
    await served.update(rig.network, MTU, [pod])
    advertised = packet_socket(rig.guest, "eth0", "icmp6[0] == 134")
    solicited = packet_socket(rig.machine, "br0", "icmp6[0] == 133")
    with advertised, solicited:
        ip("link", "set", "eth0", "up", namespace=rig.guest)
        await asyncio.wait_for(asyncio.get_running_loop().sock_recv(solicited, 2048), DEADLINE)
        # The services' socket had it by then as well, and the loop has turned since: the question was not answered.
        await served.update(rig.network, MTU, [rig.endpoint])
        frame = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(advertised, 2048), DEADLINE)
        assert isinstance(ndp.decode(frame).message, ndp.RouterAdvertisement)
    served.close()
    assert counted(metrics.ROUTER_SOLICITATIONS, rig.network.name) == 0


async def test_a_lost_bridge_is_served_again_after_the_next_update(rig: Rig, services: GuestServices) -> None:
    ip("link", "delete", "br0", namespace=rig.machine)
    await until(lambda: not services._segments)
    ip("link", "add", "br0", "address", rig.network.gateway_mac, "type", "bridge", namespace=rig.machine)
    ip("link", "set", "br0", "up", namespace=rig.machine)
    ip("address", "add", "192.168.0.1/16", "dev", "br0", namespace=rig.machine)
    ip("link", "set", rig.endpoint.port, "master", "br0", namespace=rig.machine)
    await services.update(rig.network, MTU, [rig.endpoint])
    output = await rig.in_guest(
        f"ip link set eth0 up; busybox udhcpc -f -q -n -t 5 -T 1 -i eth0 -s {udhcpc_script(rig)}"
    )
    assert (rig.scratch / "bound").exists(), output


# --- announcements --------------------------------------------------------------------------------------------------


def kind_of(frame: bytes, endpoint: Endpoint) -> Kind | None:
    """What a captured frame announces about the endpoint."""
    try:
        if frame[12:14] == b"\x80\x35":
            return Kind.RARP if arp.decode(frame).sender_mac == endpoint.mac else None
        if frame[12:14] == b"\x08\x06":
            packet = arp.decode(frame)
            return Kind.GRATUITOUS_ARP if packet.gratuitous and packet.sender_mac == endpoint.mac else None
        message = ndp.decode(frame).message
    except Malformed:
        return None
    if isinstance(message, ndp.NeighborAdvertisement) and message.override and not message.solicited:
        return Kind.NEIGHBOR_ADVERTISEMENT
    return None


def drain(packets: socket.socket, endpoint: Endpoint) -> Counter[Kind]:
    found: Counter[Kind] = Counter()
    while True:
        try:
            frame, address = packets.recvfrom(2048)
        except BlockingIOError:
            return found
        kind = kind_of(frame, endpoint)
        if kind is not None and address[2] != socket.PACKET_OUTGOING:
            found[kind] += 1


@dataclass(frozen=True)
class Fabric:
    """The rig's node joined by a real VXLAN to a second one with a guest of its own."""

    rig: Rig
    far_node: str
    far_guest: str
    near_guest: str


@pytest.fixture
def fabric(rig: Rig, namespaces: Callable[[str], str]) -> Fabric:
    number = rig.network.id
    far_node = make_node(namespaces, rig.network, f"vmf-{number}")
    far_guest, near_guest = namespaces(f"vmh-{number}"), namespaces(f"vmi-{number}")
    ip("link", "add", "ul0", "type", "veth", "peer", "name", "ul0", "netns", far_node, namespace=rig.machine)
    for node, own, other in ((rig.machine, "10.9.0.1", "10.9.0.2"), (far_node, "10.9.0.2", "10.9.0.1")):
        ip("address", "add", f"{own}/24", "dev", "ul0", namespace=node)
        ip("link", "set", "ul0", "up", namespace=node)
        vxlan = ("type", "vxlan", "id", str(number), "local", own, "dstport", "4789")
        ip("link", "add", "vx0", *vxlan, namespace=node)
        ip("link", "set", "vx0", "master", "br0", "up", namespace=node)
        bridge = ["ip", "netns", "exec", node, "bridge"]
        subprocess.run([*bridge, "link", "set", "dev", "vx0", "neigh_suppress", "on"], check=True)
        subprocess.run([*bridge, "fdb", "append", "00:00:00:00:00:00", "dev", "vx0", "dst", other], check=True)
    attach(far_node, "pfar", far_guest, "0a:58:c0:a8:00:06")
    attach(rig.machine, "pnear", near_guest, "0a:58:c0:a8:00:07")
    for guest in (rig.guest, far_guest, near_guest):
        ip("link", "set", "eth0", "up", namespace=guest)
    return Fabric(rig, far_node, far_guest, near_guest)


async def test_announcements_reach_both_nodes_and_the_guest(fabric: Fabric, kernel: LinuxKernel) -> None:
    rig = fabric.rig
    announcer = Announcer(kernel, "cluster.local")
    await announcer.prepare(rig.network, MTU, rig.endpoint)
    loop = asyncio.get_running_loop()
    with (
        packet_socket(fabric.far_guest, "eth0") as far,
        packet_socket(fabric.near_guest, "eth0") as near,
        packet_socket(rig.guest, "eth0", "arp[6:2] == 2 or icmp6[0] == 134") as own,
    ):
        assert announcer.announce(rig.endpoint, loop.time()) > 0
        assert announcer.announce(rig.endpoint, loop.time()) == 0, "one cut-over, one series"
        counts = await asyncio.wait_for(announcer.settled(rig.endpoint), DEADLINE)
        rounds = 6
        peers = {Kind.GRATUITOUS_ARP: 2 * rounds, Kind.NEIGHBOR_ADVERTISEMENT: 2 * rounds}
        seen_far = await collected(far, rig.endpoint, 5 * rounds)
        assert seen_far == {**peers, Kind.RARP: rounds}
        assert await collected(near, rig.endpoint, 4 * rounds) == peers
        assert counts == {
            Kind.RARP: rounds,
            Kind.GRATUITOUS_ARP: 4 * rounds,
            Kind.NEIGHBOR_ADVERTISEMENT: 4 * rounds,
            Kind.GATEWAY_ARP: rounds,
            Kind.ROUTER_ADVERTISEMENT: 2,
            Kind.ROUTER_FAREWELL: 2,
        }
        for kind, count in counts.items():
            machine, node = rig.endpoint.machine, rig.endpoint.node
            assert machine is not None
            labels = (machine.namespace, machine.name, node, rig.network.name, kind.value)
            assert counted(metrics.ANNOUNCEMENTS, *labels) == count
        told = [await asyncio.wait_for(loop.sock_recv(own, 2048), DEADLINE) for _ in range(rounds)]
    assert any(frame[12:14] == b"\x08\x06" and arp.decode(frame).sender == IPv4Address("192.168.0.1") for frame in told)
    announcer.close()


async def test_scapy_and_tshark_read_the_captured_announcements_as_meant(
    fabric: Fabric, kernel: LinuxKernel, tmp_path: Path
) -> None:
    """What is on the wire, at a peer behind the fabric and at the guest; only a whole round has an advertisement."""
    rig = fabric.rig
    mac, (four, six) = rig.endpoint.mac, (str(item.ip) for item in rig.endpoint.addresses)
    own6, gateway = str(link_local(mac)), rig.network.gateway_mac
    announcer = Announcer(kernel, "cluster.local")
    await announcer.prepare(rig.network, MTU, rig.endpoint)
    kinds = "ether proto 0x8035 or arp or icmp6[0] == 136 or icmp6[0] == 134"
    heard = f"(ether src {mac} or ether src {gateway}) and ({kinds})"
    with packet_socket(fabric.far_guest, "eth0", heard) as far, packet_socket(rig.guest, "eth0", heard) as own:
        announcer.announce(rig.endpoint, asyncio.get_running_loop().time())
        counts = await asyncio.wait_for(announcer.settled(rig.endpoint), DEADLINE)
        rounds, far_frames, own_frames = counts[Kind.RARP], [], []

        def all_there() -> bool:
            far_frames.extend(everything(far))
            own_frames.extend(frame for frame in everything(own) if frame[6:12] == mac_bytes(gateway))
            return len(far_frames) >= 5 * rounds and len(own_frames) >= rounds + 4

        await until(all_there)
    announcer.close()
    assert 2 <= rounds <= 6, "a late loop leaves rounds out, and never adds any"

    def read(frame: bytes) -> tuple[object, ...]:
        packet = Ether(frame)
        if packet.type in (0x0806, 0x8035):
            found = ARP(bytes(packet.payload))  # scapy leaves a reverse ARP undissected
            return packet.type, packet.dst, found.op, found.hwsrc, found.psrc, found.pdst
        na = packet.getlayer(ICMPv6ND_NA)
        if na is None:
            return packet.src, packet.dst, packet[ICMPv6ND_RA].routerlifetime > 0, packet[IPv6].src, packet[IPv6].hlim
        target = na[ICMPv6NDOptDstLLAddr].lladdr
        return packet.dst, packet[IPv6].dst, packet[IPv6].hlim, na.tgt, na.O, na.S, na.R, target

    everyone, nothing = "ff:ff:ff:ff:ff:ff", "0.0.0.0"
    advertised = [("33:33:00:00:00:01", "ff02::1", 255, target, 1, 0, 0, mac) for target in (six, own6)]
    spoken = [
        (0x8035, everyone, 3, mac, nothing, nothing),
        (0x0806, everyone, 1, mac, four, four),
        (0x0806, everyone, 2, mac, four, four),
        *advertised,
    ]
    assert Counter(map(read, far_frames)) == dict.fromkeys(spoken, rounds)
    told = Counter(map(read, own_frames))
    assert told[(0x0806, mac, 2, gateway, "192.168.0.1", four)] == rounds
    assert told[(gateway, mac, True, "fe80::1", 255)] == counts[Kind.ROUTER_ADVERTISEMENT] == 2
    former = str(link_local(gateway))
    assert told[(gateway, mac, False, former, 255)] == counts[Kind.ROUTER_FAREWELL] == 2
    assert told.total() == rounds + 4
    spoken_by_routers = [frame for frame in own_frames if frame[12:14] == b"\x86\xdd"]
    routers = ("ipv6.src", "icmpv6.nd.ra.router_lifetime", "icmpv6.nd.ra.flag.m", "ipv6.hlim", "icmpv6.checksum.status")
    rows = Counter(map(tuple, dissected(capture_file(tmp_path / "routers.pcap", spoken_by_routers), *routers)))
    assert rows == {("fe80::1", "9000", "1", "255", "1"): 2, (former, "0", "1", "255", "1"): 2}

    fields = ("_ws.malformed", "_ws.expert.severity", "arp.opcode", "arp.isgratuitous", "icmpv6.checksum.status")
    flags = ("icmpv6.nd.na.flag.o", "icmpv6.nd.na.flag.s", "icmpv6.nd.na.flag.r", "icmpv6.nd.na.target_address")
    rows = Counter(map(tuple, dissected(capture_file(tmp_path / "far.pcap", far_frames), *fields[2:], *flags)))
    assert rows == {
        ("3", "", "", "", "", "", ""): rounds,
        ("1", "1", "", "", "", "", ""): rounds,
        ("2", "1", "", "", "", "", ""): rounds,
        ("", "", "1", "1", "0", "0", six): rounds,
        ("", "", "1", "1", "0", "0", own6): rounds,
    }
    everything_seen = capture_file(tmp_path / "all.pcap", [*far_frames, *own_frames])
    for malformed, severity in dissected(everything_seen, *fields[:2]):
        assert malformed == ""
        assert not severity or max(map(int, severity.split(","))) < 0x600000


async def collected(packets: socket.socket, endpoint: Endpoint, total: int) -> Counter[Kind]:
    """Announcements received so far, once there are ``total``."""
    found: Counter[Kind] = Counter()

    def enough() -> bool:
        found.update(drain(packets, endpoint))
        return found.total() >= total

    await until(enough)
    return found


async def test_a_guest_gives_up_a_predecessor_s_router(fabric: Fabric, kernel: LinuxKernel) -> None:
    """It has learned that one before it came to us; afterwards it has ours alone."""
    rig, former = fabric.rig, str(link_local(fabric.rig.network.gateway_mac))

    def routers() -> set[str]:
        words = ip("-6", "route", "show", "default", namespace=rig.guest).split()
        return {words[place + 1] for place, word in enumerate(words) if word == "via"}

    before = ndp.encode(
        ndp.Packet(
            rig.network.gateway_mac,
            rig.endpoint.mac,
            link_local(rig.network.gateway_mac),
            ndp.ALL_NODES,
            ndp.RouterAdvertisement(lifetime=1800, managed=True, source_link=rig.network.gateway_mac),
        )
    )
    with await kernel.packet_socket(rig.network.namespace, names.BRIDGE) as bridge:
        bridge.send(before)
        await until(lambda: routers() == {former})
    announcer = Announcer(kernel, "cluster.local")
    await announcer.prepare(rig.network, MTU, rig.endpoint)
    announcer.announce(rig.endpoint, asyncio.get_running_loop().time())
    await until(lambda: routers() == {"fe80::1"})
    announcer.close()


async def test_a_neighbour_believes_the_announcements(fabric: Fabric, kernel: LinuxKernel) -> None:
    """A stale entry, as after an address changed hands, is put right without the neighbour asking."""
    rig, far = fabric.rig, fabric.far_guest
    wrong = "0a:58:00:00:00:99"
    ip("address", "add", "192.168.0.6/16", "dev", "eth0", namespace=far)
    ip("address", "add", "fd00:7::6/64", "dev", "eth0", "nodad", namespace=far)
    for address in ("192.168.0.5", "fd00:7::5"):
        ip("neighbour", "replace", address, "lladdr", wrong, "dev", "eth0", "nud", "stale", namespace=far)
    announcer = Announcer(kernel, "cluster.local")
    await announcer.prepare(rig.network, MTU, rig.endpoint)
    announcer.announce(rig.endpoint, asyncio.get_running_loop().time())

    def right() -> bool:
        entries = json.loads(ip("-j", "neighbour", "show", "dev", "eth0", namespace=far))
        known = {entry["dst"]: entry.get("lladdr") for entry in entries}
        return all(known.get(address) == rig.endpoint.mac for address in ("192.168.0.5", "fd00:7::5"))

    await until(right)
    announcer.close()


async def test_a_reverse_arp_from_elsewhere_ends_the_series(fabric: Fabric, kernel: LinuxKernel) -> None:
    """The machine moved on while it was being announced: this node must not call it back."""
    rig = fabric.rig
    announcer = Announcer(kernel, "cluster.local")
    await announcer.prepare(rig.network, MTU, rig.endpoint)
    announcer.announce(rig.endpoint, asyncio.get_running_loop().time())
    with packet_socket(fabric.far_guest, "eth0") as guest:
        guest.send(arp.encode(arp.reverse_announcement(rig.endpoint.mac)))
        counts = await asyncio.wait_for(announcer.settled(rig.endpoint), DEADLINE)
    assert counts[Kind.RARP] < 6
    announcer.close()


# --- behind the port security -----------------------------------------------------------------------------------


@pytest.fixture
def secured(fabric: Fabric) -> Fabric:
    """The rules that a node really loads, on the fabric and on the machine's port."""
    rig = fabric.rig
    node = Node("n1", IPv4Address("10.9.0.1"))
    join = Join(
        1,
        IPv4Interface("100.65.0.1/30"),
        IPv4Interface("100.65.0.2/30"),
        IPv6Interface("fd97::1/126"),
        IPv6Interface("fd97::2/126"),
    )
    port = LocalPort(rig.endpoint)
    script = firewall.network_script(NodeNetwork(rig.network, node, MTU, join, (port,))) + firewall.port_script(port)
    load = ["ip", "netns", "exec", rig.machine, "nft", "-f", "-"]
    subprocess.run(load, input=script, text=True, check=True, timeout=30)
    return fabric


async def test_clients_work_behind_the_port_security(secured: Fabric, services: GuestServices) -> None:
    rig = secured.rig
    with packet_socket(secured.far_guest, "eth0", "udp or icmp6[0] == 133 or icmp6[0] == 134") as far:
        for state in ("down", "up"):  # which has the kernel ask again
            ip("link", "set", "eth0", state, namespace=rig.guest)
        [route] = await until(lambda: rig.guest_ip("-6", "route", "show", "default"))
        assert route["gateway"] == "fe80::1"
        four = await rig.in_guest(f"busybox udhcpc -f -q -n -t 5 -T 1 -i eth0 -s {udhcpc_script(rig)}")
        assert (rig.scratch / "bound").exists(), four
        six = await rig.in_guest(
            "dhclient -6 -1 -v -pf /run/dhclient6.pid -lf /var/lib/dhcp/leases6 eth0; kill $(cat /run/dhclient6.pid)"
        )
        assert any(link for link in rig.guest_ip("-6", "address", "show", "to", "fd00:7::5")), six
        own = [frame for frame in everything(far) if frame[6:12] == mac_bytes(rig.endpoint.mac)]
        assert own == [], "nothing of all this leaves the node"


def everything(packets: socket.socket) -> list[bytes]:
    """What a socket has received so far."""
    frames = []
    while True:
        try:
            frames.append(packets.recv(2048))
        except BlockingIOError:
            return frames


async def test_announcements_pass_the_port_security(secured: Fabric, kernel: LinuxKernel) -> None:
    rig = secured.rig
    announcer = Announcer(kernel, "cluster.local")
    await announcer.prepare(rig.network, MTU, rig.endpoint)
    with (
        packet_socket(secured.far_guest, "eth0") as far,
        packet_socket(rig.guest, "eth0", f"ether dst {rig.endpoint.mac}") as own,
    ):
        announcer.announce(rig.endpoint, asyncio.get_running_loop().time())
        assert (await collected(far, rig.endpoint, 5)).keys() == {
            Kind.RARP,
            Kind.GRATUITOUS_ARP,
            Kind.NEIGHBOR_ADVERTISEMENT,
        }
        frame = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(own, 2048), DEADLINE)
    assert frame[:12] == mac_bytes(rig.endpoint.mac) + mac_bytes(rig.network.gateway_mac)
    announcer.close()
