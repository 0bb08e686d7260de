"""Whole hand-overs on three nodes with the real agents, controller and kernels, and pods in the place of guests.

The machine's launchers are pods that answer datagrams with their own names, so a client sees which of them the network
leads to; what QEMU would send when a guest begins to run is built by scapy. What KubeVirt would write is written
here, in its order.
"""

import asyncio
import json
import os
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import yaml
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Ether

from vmnet.lab import topology
from vmnet.lab.errors import LabError
from vmnet.lab.lab import Lab
from vmnet.model import addresses, names

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(400),
]

SPACE: Final = "blue"
NODES: Final = ("n1", "n2", "n3")
PORT: Final = 7000
ANSWERS: Final = """\
import select, socket, sys
ends, runs = [], sys.argv[2] == "runs"
for family, every in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
    end = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    end.bind((every, 7000))
    ends.append(end)
while True:
    for end in select.select(ends, [], [])[0]:
        data, peer = end.recvfrom(100)
        if data in (b"runs", b"stands") and peer[0] == "127.0.0.1":
            runs = data == b"runs"
        if not runs:
            continue
        try:
            end.sendto(data + b" " + sys.argv[1].encode(), peer)
        except OSError as error:
            print(error, flush=True)
"""
ASKS: Final = """\
import json, select, socket, subprocess, sys, time
# Every IPv4 question is a broadcast frame, which each port of the machine that is open brings to a launcher.
everyone = "lladdr ff:ff:ff:ff:ff:ff dev ovn-udn1 nud permanent".split()
subprocess.run(["ip", "neighbour", "replace", sys.argv[1], *everyone], check=True)
ends = {}
for family, address in ((socket.AF_INET, sys.argv[1]), (socket.AF_INET6, sys.argv[2])):
    end = socket.socket(family, socket.SOCK_DGRAM)
    end.connect((address, 7000))
    ends[end] = {"who": [], "count": 0, "twice": 0, "last": -1, "told": {}}
number, told = 0, 0.0
while True:
    number += 1
    for end in ends:
        try:
            end.send(str(number).encode())
        except OSError:
            pass
    until = time.monotonic() + 0.03
    while (left := until - time.monotonic()) > 0:
        for end in select.select(list(ends), [], [], left)[0]:
            seen = ends[end]
            try:
                question, who = end.recv(100).decode().split()
            except OSError:
                continue
            seen["twice"] += question in seen["told"]
            seen["told"][question] = who
            seen["count"] += 1
            if not seen["who"] or seen["who"][-1] != who:
                seen["who"].append(who)
    if time.monotonic() - told > 0.1:
        told = time.monotonic()
        lines = [{key: seen[key] for key in ("who", "count", "twice")} for seen in ends.values()]
        print(json.dumps({"asked": number, "answers": lines}), flush=True)
"""
SENDS: Final = """\
import socket, subprocess, sys
then, frames = sys.argv[1], sys.argv[2:]
# Where no guest runs nothing speaks for it, not even the pod's kernel: KubeVirt's launcher has another MAC.
hush = "add table netdev hush; delete table netdev hush;"
if then == "stands":
    chain = "{ type filter hook egress device ovn-udn1 priority 0; policy drop; }"
    hush += f"add table netdev hush; add chain netdev hush out {chain};"
if then != "-":
    subprocess.run(["nft", hush], check=True)
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(then.encode(), ("127.0.0.1", 7000))
end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
end.bind(("ovn-udn1", 0))
for text in frames:
    end.send(bytes.fromhex(text))
"""


def objects() -> list[dict[str, Any]]:
    layer2 = {"role": "Primary", "subnets": ["192.168.0.0/16", "fd20::/64"], "ipam": {"lifecycle": "Persistent"}}
    interface = {"name": "net", "binding": {"name": "l2bridge"}}
    return [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": SPACE, "labels": {names.PRIMARY_NETWORK_LABEL: ""}},
        },
        {
            "apiVersion": "k8s.ovn.org/v1",
            "kind": "UserDefinedNetwork",
            "metadata": {"namespace": SPACE, "name": "net"},
            "spec": {"topology": "Layer2", "layer2": layer2},
        },
        {
            "apiVersion": "kubevirt.io/v1",
            "kind": "VirtualMachineInstance",
            "metadata": {"namespace": SPACE, "name": "vm"},
            "spec": {
                "domain": {"devices": {"interfaces": [interface]}},
                "networks": [{"name": "net", "pod": {}}],
            },
        },
    ]


def pod(name: str, node: str, *command: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": SPACE, "name": name, "labels": {}, "annotations": {}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "main", "image": "probe", "command": ["python3", "-u", "-c", *command]}],
        },
    }


class World:
    """The lab, the machine, and who asks it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.vmi: dict[str, Any] = {}
        self.count = 0
        self.uids: dict[str, str] = {}
        self.node, self.launcher = "", ""
        self.target, self.target_node = "", ""
        self.namespace, self.mac = "", ""
        self.addresses: list[str] = []
        self.monitors: dict[str, Path] = {}
        self.before: dict[str, int] = {}
        """How many places each FDB had known when the migration began."""

    # Objects

    async def get(self, *arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.lab.kubectl("get", "-n", SPACE, *arguments, "-o", "json"))
        return found

    async def apply(self, *items: dict[str, Any]) -> None:
        await self.lab.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(items))

    async def until(self, what: str, look: Callable[[], Awaitable[Any]], seconds: float = 60) -> Any:
        last: Any = None
        try:
            async with asyncio.timeout(seconds):
                while not (last := await look()):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"not reached: {what}") from None
        return last

    async def ready(self, *pods: str) -> None:
        await self.lab.kubectl(
            "wait", "-n", SPACE, *(f"pod/{name}" for name in pods), "--for=condition=Ready", "--timeout=90s"
        )

    async def launch(self, node: str, migration: str = "") -> str:
        """A launcher of the machine; with ``migration``, the target of that one."""
        self.count += 1
        name = f"virt-launcher-vm-{self.count}"
        metadata = self.vmi["metadata"]
        body = pod(name, node, ANSWERS, name, "stands" if migration else "runs")
        body["metadata"] |= {
            "labels": {names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE, names.CREATED_BY_LABEL: metadata["uid"]},
            "annotations": {names.DOMAIN_ANNOTATION: "vm"},
            "ownerReferences": [
                {
                    "apiVersion": "kubevirt.io/v1",
                    "kind": "VirtualMachineInstance",
                    "name": "vm",
                    "uid": metadata["uid"],
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        }
        if migration:
            body["metadata"]["labels"][names.MIGRATION_JOB_LABEL] = migration

        async def accepted() -> bool:
            try:
                await self.apply(body)
            except LabError as error:
                if "failed calling webhook" not in str(error):
                    raise
                return False  # a controller that has just begun does not listen yet; KubeVirt tries again, too
            return True

        await self.until("the launcher is let in", accepted)
        await self.ready(name)
        self.uids[name] = (await self.get("pod", name))["metadata"]["uid"]
        return name

    async def kubevirt_says(self, **status: Any) -> None:
        patch = json.dumps({"status": status})
        await self.lab.kubectl("patch", "vmi", "-n", SPACE, "vm", "--type=merge", "-p", patch)

    async def create(self) -> None:
        await self.apply(*objects())
        await self.lab.kubectl("wait", "-n", SPACE, "udn/net", "--for=condition=NetworkReady", "--timeout=60s")
        self.vmi = await self.get("vmi", "vm")
        self.node = "n2"
        self.launcher = await self.launch(self.node)
        await self.kubevirt_says(nodeName=self.node, phase="Running")
        annotations = (await self.get("pod", self.launcher))["metadata"]["annotations"]
        entry = json.loads(annotations[names.POD_NETWORKS_ANNOTATION])[f"{SPACE}/net"]
        self.addresses = [text.split("/")[0] for text in entry["ip_addresses"]]
        self.mac = entry["mac_address"]
        number = (await self.get("udn", "net"))["metadata"]["annotations"][names.NETWORK_ID_ANNOTATION]
        self.namespace = f"vmnet-{number}"
        await self.apply(*(pod(f"red-{node}", node, "import time; time.sleep(1e6)") for node in NODES))
        await self.ready(*(f"red-{node}" for node in NODES))
        await self.apply(pod("asker", "n1", ASKS, *self.addresses))
        await self.ready("asker")
        for node in NODES:
            words = ["ip", "netns", "exec", self.namespace, "bridge", "-timestamp", "monitor", "fdb"]
            self.monitors[node] = await self.lab.spawn(f"monitor-{node}", node, words)
        await self.answered_by(self.launcher)

    # One migration

    async def stage(self) -> None:
        """A target's pod on another node, and KubeVirt's hand-off; the guest still runs at the source.

        Who asks is on n1, and so the machine goes to and fro between the other two nodes.
        """
        self.target_node = "n3" if self.node == "n2" else "n2"
        # A dead target's late frame may still have closed the port: it opens again a second later.
        await self.gates_are(**{self.node: "open"})
        migration = f"migration-{self.count}"
        self.target = await self.launch(self.target_node, migration)
        await self.kubevirt_says(
            migrationState={
                "migrationUid": migration,
                "sourcePod": self.launcher,
                "sourceNode": self.node,
                "targetPod": self.target,
                "targetNode": self.target_node,
                "startTimestamp": "2026-11-23T10:00:00Z",
                "endTimestamp": None,
                "completed": None,
                "failed": None,
            }
        )
        await self.gates_are(**{self.node: "open", self.target_node: "closed"})
        # What an earlier test's dead target has said late is over by now.
        self.before = {node: len(self.moves(node, abroad=node == "n1")) for node in NODES}

    async def speaks(self, name: str, *frames: Ether, then: str = "-") -> None:
        """Frames out of a pod's interface; ``then``: its guest ``runs`` or ``stands``."""
        texts = [bytes(frame).hex() for frame in frames]
        await self.lab.kubectl("exec", "-n", SPACE, name, "--", "python3", "-c", SENDS, then, *texts)

    def reverse_arp(self) -> Ether:
        """What QEMU sends when a guest begins to run."""
        mac = self.mac
        frame = Ether(src=mac, dst="ff:ff:ff:ff:ff:ff", type=0x8035)
        return frame / ARP(op=3, hwsrc=mac, hwdst=mac, psrc="0.0.0.0", pdst="0.0.0.0")

    async def stands(self) -> None:
        """QEMU stops the guest at the source."""
        await self.speaks(self.launcher, then="stands")

    async def runs_at_target(self) -> None:
        """QEMU resumes the guest there."""
        await self.stands()
        await self.speaks(self.target, self.reverse_arp(), then="runs")

    async def target_is_ready(self) -> None:
        annotation = f"{names.TARGET_READY_ANNOTATION}=2026-11-23 10:00:01 +0000 UTC"
        await self.lab.kubectl("annotate", "pod", "-n", SPACE, self.target, annotation)

    async def succeeds(self) -> None:
        """KubeVirt's last words; the source's pod goes."""
        await self.kubevirt_says(
            nodeName=self.target_node,
            migrationState={"completed": True, "endTimestamp": "2026-11-23T10:00:02Z"},
        )
        former = self.launcher
        self.node, self.launcher = self.target_node, self.target
        await self.record("succeeded")
        await self.lab.kubectl("delete", "pod", "-n", SPACE, former, "--wait=true", "--timeout=60s")
        self.target = self.target_node = ""

    async def fails(self, *, dead: bool = True) -> None:
        """The target's pod dies, and KubeVirt says that the migration has failed."""
        if dead:
            await self.lab.kubectl("delete", "pod", "-n", SPACE, self.target, "--force", "--grace-period=0")
        await self.kubevirt_says(
            migrationState={"completed": True, "failed": True, "endTimestamp": "2026-11-23T10:00:02Z"}
        )

    async def has_gone(self) -> None:
        """Wait until nothing is left of the target."""
        node, port = self.target_node, names.port_interface(self.uids[self.target], names.PRIMARY_INTERFACE)

        async def gone() -> bool:
            done = await self.lab.exec(node, ["ip", "-n", self.namespace, "link", "show", port])
            return done.exit != 0

        await self.until(f"{self.target} has gone from {node}", gone)
        self.target = self.target_node = ""

    @asynccontextmanager
    async def without(self, process: str) -> AsyncIterator[None]:
        """One of our processes is killed, and started again afterwards."""
        await self.lab.kill(process, signal.SIGKILL)
        try:
            await self.lab.wait(process)
            yield
        finally:
            await self.lab.restart(process)

    async def record(self, outcome: str) -> dict[str, Any]:
        async def told() -> dict[str, Any]:
            annotations = (await self.get("vmi", "vm"))["metadata"].get("annotations") or {}
            found: dict[str, Any] = json.loads(annotations.get(names.MIGRATION_RECORD_ANNOTATION, "{}"))
            right = found.get("outcome") == outcome and found["to"]["pod"] == self.target
            return found if right else {}

        found: dict[str, Any] = await self.until("the migration is on record", told)
        return found

    async def cut_over(self, launcher: str) -> dict[str, Any]:
        """What the target's agent has written down."""

        async def told() -> dict[str, Any]:
            annotations = (await self.get("pod", launcher))["metadata"]["annotations"]
            found: dict[str, Any] = json.loads(annotations.get(names.CUT_OVER_ANNOTATION, "{}"))
            return found

        found: dict[str, Any] = await self.until("the target's agent has said what it saw", told)
        return found

    # What the network does

    async def sets(self, node: str) -> dict[str, set[str]]:
        """Sets of the network's gate on a node."""
        command = ["ip", "netns", "exec", self.namespace, "nft", "-j", "list", "sets", "netdev"]
        done = await self.lab.exec(node, command)
        assert done.exit == 0, done.stderr
        found = (item["set"] for item in json.loads(done.stdout)["nftables"] if "set" in item)
        return {
            item["name"]: {word["elem"]["val"] if isinstance(word, dict) else word for word in item.get("elem", ())}
            for item in found
            if item["name"] in ("standby", "open", "moved")
        }

    async def gates(self) -> dict[str, str]:
        """State of the machine's port on each node that has one."""
        found = {}
        for node, launcher in {self.node: self.launcher, self.target_node: self.target}.items():
            if not launcher:
                continue
            port = names.port_interface(self.uids[launcher], names.PRIMARY_INTERFACE)
            sets = await self.sets(node)
            closed = port in sets["standby"] - sets["open"]
            found[node] = "closed" if closed or self.mac in sets["moved"] else "open"
        return found

    async def gates_are(self, **wanted: str) -> None:
        """Wait until each port is as it should be."""
        seen: dict[str, str] = {}

        async def right() -> bool:
            nonlocal seen
            seen = await self.gates()
            assert list(seen.values()).count("open") < 2, f"two ports are open: {seen}"
            return seen == wanted

        try:
            await self.until("the gates", right)
        except AssertionError as error:
            raise AssertionError(f"{seen} instead of {wanted}") from error

    async def asked(self) -> dict[str, Any]:
        text = await self.lab.kubectl("logs", "-n", SPACE, "asker", "--tail=1")
        # Another line may have come between the last one and the end of the file.
        found: dict[str, Any] = json.loads(text.strip().splitlines()[-1]) if text.strip() else {}
        return found

    async def answered_by(self, launcher: str) -> None:
        """Wait until a launcher answers in both families, and goes on to."""
        before: list[int] | None = None

        async def answers() -> bool:
            nonlocal before
            found = (await self.asked()).get("answers", [])
            if len(found) < 2 or any(seen["who"][-1:] != [launcher] for seen in found):
                before = None
                return False
            counts = [seen["count"] for seen in found]
            if before is None:
                before = counts
            return all(now > then + 2 for now, then in zip(counts, before, strict=True))

        await self.until(f"{launcher} answers", answers)

    async def history(self) -> list[list[str]]:
        """Who has answered so far, one after the other, by family; nobody ever together with another."""
        found = (await self.asked())["answers"]
        assert [seen["twice"] for seen in found] == [0, 0], "two launchers have answered one question"
        return [seen["who"] for seen in found]

    def moves(self, node: str, *, abroad: bool = False) -> list[str]:
        """Devices that a node's bridge has had the machine behind, one after the other; ``abroad``: the nodes that its
        VXLAN has sent the machine's frames to."""
        found: list[str] = []
        for line in self.monitors[node].read_text().splitlines():
            words = line.split()
            if self.mac not in words or "Deleted" in words or ("dst" in words) is not abroad:
                continue
            place = words[words.index("dst" if abroad else "dev") + 1]
            if found[-1:] != [place]:
                found.append(place)
        return found

    async def moved(self, *ways: tuple[str, str], again: bool = False) -> None:
        """Since the migration began each FDB has had the machine at these nodes (and launchers), and nowhere else.

        ``again``: it may have gone all that way once more.
        """
        wanted: dict[str, list[str]] = {}
        for here in NODES:
            devices = [
                names.port_interface(self.uids[launcher], names.PRIMARY_INTERFACE) if node == here else names.VXLAN_L2
                for node, launcher in ways
            ]
            wanted[here] = [f"172.30.0.1{node[1]}" for node, _ in ways] if here == "n1" else devices
        seen: dict[str, list[str]] = {}

        async def right() -> bool:
            nonlocal seen
            seen = {node: self.moves(node, abroad=node == "n1")[self.before[node] :] for node in NODES}
            return all(seen[node] in (wanted[node], wanted[node] * 2 if again else None) for node in NODES)

        try:
            await self.until("the moves", right, 20)
        except AssertionError as error:
            raise AssertionError(f"{seen} instead of {wanted}") from error

    @asynccontextmanager
    async def unreachable(self, node: str) -> AsyncIterator[None]:
        """Cut a node off from all others, the API included."""
        (veth,) = (host.veth for host in topology.nodes(len(NODES)) if host.name == node)
        await self.lab.exec("fabric", ["ip", "link", "set", veth, "down"])
        try:
            yield
        finally:
            await self.lab.exec("fabric", ["ip", "link", "set", veth, "up"])


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with Lab(f"h-{secrets.token_hex(4)}", without=("proxy", "dns", "virt", "outside")) as lab:
        found = World(lab)
        await found.create()
        failures = request.session.testsfailed
        yield found
        if request.session.testsfailed > failures:
            for name in (*(f"agent-{node}" for node in NODES), *(f"monitor-{node}" for node in NODES), "controller"):
                print(f"--- {name}\n{lab.directory.log_tail(name, 40)}")


async def test_the_network_moves_with_every_agent_stopped(world: World) -> None:
    await world.stage()
    source, target = world.node, world.target_node
    for node in NODES:
        await world.lab.kill(f"agent-{node}", signal.SIGSTOP)
    try:
        # What the target pod's own kernel says, and what anybody else says, opens nothing.
        mac, address, everyone = world.mac, world.addresses[0], "ff:ff:ff:ff:ff:ff"
        arp = {"hwsrc": mac, "psrc": address, "pdst": address}
        link_local = str(addresses.link_local(names.MacAddress(mac)))
        all_nodes = Ether(src=mac, dst="33:33:00:00:00:01")
        await world.speaks(
            world.target,
            Ether(src=mac, dst=everyone) / ARP(op=1, **arp),
            Ether(src=mac, dst=everyone) / ARP(op=2, **arp),
            all_nodes / IPv6(src=link_local, dst="ff02::1") / ICMPv6ND_NA(tgt=world.addresses[1], R=0, S=0, O=1),
            all_nodes / IPv6(src="::", dst="ff02::1") / ICMPv6ND_NS(tgt=link_local),
        )
        await world.speaks("red-n1", world.reverse_arp())
        assert await world.gates() == {source: "open", target: "closed"}
        await world.runs_at_target()
        await world.answered_by(world.target)
        assert await world.gates() == {source: "closed", target: "open"}
        await world.moved((target, world.target))
    finally:
        for node in NODES:
            await world.lab.kill(f"agent-{node}", signal.SIGCONT)
    seen = await world.cut_over(world.target)
    assert (seen["key"], seen["source"]) == ("frame", source)
    await world.succeeds()
    await world.moved((target, world.launcher))
    await world.answered_by(world.launcher)


async def test_a_guest_that_says_nothing_is_let_in_by_kubevirt_s_word(world: World) -> None:
    """Its first frames were lost, it is paused, or it never announces anything; what it says later changes nothing."""
    await world.stage()
    source, target = world.node, world.target_node
    await world.stands()
    await world.speaks(world.target, then="runs")
    await world.target_is_ready()
    await world.answered_by(world.target)
    await world.gates_are(**{source: "closed", target: "open"})
    await world.speaks(world.target, world.reverse_arp())
    seen = await world.cut_over(world.target)
    assert seen["key"] == "annotation"
    assert seen["opened_at"] >= seen["annotation_at"]
    assert await world.gates() == {source: "closed", target: "open"}
    await world.succeeds()
    await world.moved((target, world.launcher))
    await world.answered_by(world.launcher)


@pytest.mark.parametrize("when", ["before its first frame", "after it"])
@pytest.mark.parametrize("how", ["dies", "is unreachable"])
async def test_a_target_that_fails_leaves_the_machine_where_it_was(world: World, how: str, when: str) -> None:
    await world.stage()
    source, target, launcher = world.node, world.target_node, world.target
    ways = []
    if when == "after it":
        await world.runs_at_target()
        await world.answered_by(launcher)
        ways = [(target, launcher), (source, world.launcher)]
    async with world.unreachable(target) if how == "is unreachable" else nullcontext():
        if when == "after it":
            # As after a failed switch-over: the guest goes on at the source, and says nothing.
            await world.speaks(world.launcher, then="runs")
        await world.fails()
        await world.answered_by(world.launcher)
    assert (await world.record("failed"))["to"]["pod"] == launcher
    # A node that comes back finds a port that was open when it went.
    await world.has_gone()
    await world.gates_are(**{source: "open"})
    await world.answered_by(world.launcher)
    if how == "dies":
        # docs/migration.md, "Limits": the dead target's agent may announce once more before the source does.
        await world.moved(*ways, again=bool(ways))


async def test_a_source_that_dies_after_the_guest_has_left_is_not_missed(world: World) -> None:
    """As during post-copy: the guest runs at the target, and the source's node is away before KubeVirt has noticed."""
    await world.stage()
    source, target = world.node, world.target_node
    await world.runs_at_target()
    async with world.unreachable(source):
        await world.answered_by(world.target)
        seen = await world.cut_over(world.target)
        assert seen["key"] == "frame"
    await world.gates_are(**{source: "closed", target: "open"})
    await world.succeeds()
    await world.moved((target, world.launcher))
    await world.answered_by(world.launcher)


PROCESSES: Final = ("target", "source", "controller")


@pytest.mark.parametrize("turn", range(len(PROCESSES)))
async def test_whoever_is_killed_at_whatever_step(world: World, turn: int) -> None:
    """At each of three steps one of the three is killed and started again; each is at each step in one of the turns."""
    await world.stage()
    source, target = world.node, world.target_node
    victims = {"target": f"agent-{target}", "source": f"agent-{source}", "controller": "controller"}
    staged, opened, over = (victims[PROCESSES[(turn + step) % len(PROCESSES)]] for step in range(len(PROCESSES)))
    async with world.without(staged):
        await world.runs_at_target()
        await world.answered_by(world.target)
        assert await world.gates() == {source: "closed", target: "open"}
    async with world.without(opened):
        await world.answered_by(world.target)
        assert await world.gates() == {source: "closed", target: "open"}
        await world.kubevirt_says(
            nodeName=target, migrationState={"completed": True, "endTimestamp": "2026-11-23T10:00:02Z"}
        )
    async with world.without(over):
        await world.answered_by(world.target)
    assert (await world.cut_over(world.target))["key"] == "frame"
    assert await world.gates() == {source: "closed", target: "open"}
    await world.succeeds()
    await world.moved((target, world.launcher))
    await world.answered_by(world.launcher)
