"""The life of machines on a primary and a secondary Layer2 network, looked at from inside the guests.

One lab, two machines and an instance without one, each with a card on either network. Whatever befalls them, the guest
keeps addresses, lease, gateway, names and MTU; and while it only moves, its connections too.
"""

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
import yaml

from vmnet.lab.demo import STALL_LIMIT_MS, Scenario
from vmnet.lab.guest import packages, probe
from vmnet.lab.guest.agent import AgentError, GuestAgent
from vmnet.lab.lab import Lab
from vmnet.lab.topology import METRICS_PORT
from vmnet.model import names

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

SPACE = "life"
LIVES = "lives"
"""The headless Service under which the machines have names like pods."""
GATEWAY = "10.77.0.1"
GATEWAY6 = "fd77::1"
GATEWAY_MAC = "0a:58:0a:4d:00:01"
SEARCH = f"{SPACE}.vm.cluster.local vm.cluster.local {SPACE}.svc.cluster.local svc.cluster.local cluster.local"
NODES = ("n1", "n2", "n3")
WHOLE = "IPsAllocated"
FETCH = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)"
LOOK = r"""
for card in eth0 eth1; do
    echo "mac $card $(cat /sys/class/net/$card/address)"
    echo "mtu $card $(cat /sys/class/net/$card/mtu)"
    ip -o addr show dev $card scope global | awk -v card=$card '{print "address", card, $4}'
done
ip -4 route show default | awk '{print "default4", $3, $5}'
ip -6 route show default | awk '{print "default6", $3, $5}'
ip -6 neigh show dev eth0 | awk '/^fe80.* router /{print "router6", $1}'
ip -6 route show proto kernel | awk '/^fd7[78]::\/64/{print "segment6", $1, $3}'
mac='{for (i = 1; i < NF; i++) if ($i == "lladdr") print name, $(i + 1)}'
ping -c 1 -W 5 GATEWAY >/dev/null; ip -4 neigh show GATEWAY | awk -v name=gateway4 "$mac"
ping -6 -c 1 -W 5 GATEWAY6 >/dev/null; ip -6 neigh show fe80::1 dev eth0 | awk -v name=gateway6 "$mac"
awk '{print "resolver", $0}' /etc/resolv.conf
echo "hostname $(hostname)"
for kind in A AAAA; do echo "self $kind $(probe resolve "$(hostname).life" $kind)"; done
""".replace("GATEWAY6", GATEWAY6).replace("GATEWAY", GATEWAY)
LOST = {"nak", "leasefail", "EXPIRE6", "EXPIRE", "NAK", "NOCARRIER", "STOPPED", "FAIL"}
"""What a DHCP client calls the end of a lease, or the lack of one."""


def machine(name: str, kind: str = "VirtualMachine") -> dict[str, Any]:
    """A machine with a card on each network; both cards take what the networks give them."""
    binding = {"name": "l2bridge"}
    spec = {
        "domain": {
            "devices": {"disks": [], "interfaces": [{"name": item, "binding": binding} for item in ("net", "flat")]},
            "resources": {"requests": {"memory": "128Mi"}},
        },
        "networks": [{"name": "net", "pod": {}}, {"name": "flat", "multus": {"networkName": f"{SPACE}/flat"}}],
        "subdomain": LIVES,
        "terminationGracePeriodSeconds": 5,
    }
    body = {"runStrategy": "Always", "template": {"spec": spec}} if kind == "VirtualMachine" else spec
    return {
        "apiVersion": "kubevirt.io/v1",
        "kind": kind,
        "metadata": {"namespace": SPACE, "name": name},
        "spec": body,
    }


def network(name: str, role: str, *subnets: str) -> dict[str, Any]:
    """A Layer2 network that keeps its machines' addresses."""
    layer2 = {"role": role, "subnets": list(subnets), "ipam": {"lifecycle": "Persistent"}}
    return {
        "apiVersion": "k8s.ovn.org/v1",
        "kind": "UserDefinedNetwork",
        "metadata": {"namespace": SPACE, "name": name},
        "spec": {"topology": "Layer2", "layer2": layer2},
    }


@dataclass(slots=True)
class Streams:
    """What the peer sends to one machine and hears of it."""

    peer: GuestAgent
    jobs: dict[str, str]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def counts(self) -> dict[str, int]:
        """Octets or answers so far. Fails when one has ended."""
        found = {}
        for name, job in self.jobs.items():
            state = await self.peer.poll(job)
            assert state.running, f"{name} ended: {state.stderr} {state.stdout[-300:]}"
            lines = state.stdout.splitlines()
            last = json.loads(lines[-1]) if lines else {}
            found[name] = int(last.get("bytes", last.get("received", 0)))
        return found

    async def finish(self) -> None:
        """End them."""
        for name, job in self.jobs.items():
            if name not in self.results:
                self.results[name] = await self.peer.finish(job)

    def untouched(self) -> None:
        """No reset, nothing lost its connection, nothing stood still for long."""
        for name, result in self.results.items():
            assert not result["errors"], (name, result)
            assert not result.get("resets"), (name, result)
            assert result["longest_gap_ms"] <= STALL_LIMIT_MS, (name, result)


class Life:
    """The lab, its machines and the peer: a pod on both networks."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.scenario = Scenario(lab, lambda _: None)
        self.peer = GuestAgent(lab.directory.path / "peer.sock")
        self.guests: dict[str, GuestAgent] = {}
        """By the uid of the pod that runs them."""
        self.program = ""
        """The probe, where the peer finds it."""

    # Objects

    async def get(self, *words: str) -> Any:
        return json.loads(await self.lab.kubectl("get", "-n", SPACE, *words, "-o", "json"))

    async def apply(self, *objects: dict[str, Any]) -> None:
        await self.lab.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))

    async def until(self, what: str, look: Callable[[], Awaitable[Any]], timeout: float = 240) -> Any:
        return await self.scenario.until(what, look, timeout=timeout)

    async def create(self) -> None:
        labels = {names.PRIMARY_NETWORK_LABEL: ""}
        await self.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE, "labels": labels}},
            network("net", "Primary", "10.77.0.0/16", "fd77::/64"),
            network("flat", "Secondary", "10.78.0.0/24", "fd78::/64"),
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"namespace": SPACE, "name": LIVES},
                "spec": {
                    "clusterIP": "None",
                    "selector": {"kubevirt.io": "virt-launcher"},
                    "ports": [{"name": "ssh", "port": 22}],
                },
            },
        )
        for name in ("net", "flat"):
            await self.lab.kubectl("wait", "-n", SPACE, f"udn/{name}", "--for=condition=NetworkReady", "--timeout=60s")
        self.program = str(await asyncio.to_thread(probe.compiled, packages.cache_directory()))
        command = [self.program, "agent", "--listen", str(self.peer.socket_path)]
        await self.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "namespace": SPACE,
                    "name": "peer",
                    "annotations": {names.NETWORKS_ANNOTATION: "flat"},
                },
                "spec": {
                    "nodeName": "n1",
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{"name": "main", "image": "none", "command": command}],
                },
            },
            machine("one"),
            machine("two"),
            machine("alone", "VirtualMachineInstance"),
        )
        await self.lab.kubectl("wait", "-n", SPACE, "pod/peer", "--for=condition=Ready", "--timeout=140s")
        await self.peer.ready(60)

    # Machines

    async def listed(self) -> dict[str, list[Any]]:
        """Instances, pods and claims, by kind, as they are at one moment: each kubectl costs more than a migration."""
        found: dict[str, list[Any]] = {"VirtualMachineInstance": [], "Pod": [], "IPAMClaim": []}
        for item in (await self.get("vmi,pods,ipamclaims"))["items"]:
            found[item["kind"]].append(item)
        return found

    async def vmi(self, name: str) -> Any:
        found = (await self.get("vmi", "--field-selector", f"metadata.name={name}"))["items"]
        return found[0] if found else None

    async def node(self, name: str) -> str:
        return str((await self.vmi(name))["status"]["nodeName"])

    async def pods(self, name: str) -> list[Any]:
        items = (await self.get("pods", "-l", "kubevirt.io=virt-launcher"))["items"]
        return [pod for pod in items if pod["metadata"]["annotations"][names.DOMAIN_ANNOTATION] == name]

    async def running(self, name: str, other_than: str = "") -> tuple[Any, list[Any]] | None:
        """The pod that runs a machine's instance, and its claims; None while there is none."""
        listed = await self.listed()
        vmi = next((item for item in listed["VirtualMachineInstance"] if item["metadata"]["name"] == name), None)
        if vmi is None or vmi["metadata"]["uid"] == other_than or vmi["status"].get("phase") != "Running":
            return None
        for pod in listed["Pod"]:
            here = pod["spec"].get("nodeName") == vmi["status"]["nodeName"] and pod["status"].get("phase") == "Running"
            if here and pod["metadata"].get("labels", {}).get(names.CREATED_BY_LABEL) == vmi["metadata"]["uid"]:
                return pod, [item for item in listed["IPAMClaim"] if item["metadata"]["name"].startswith(f"{name}.")]
        return None

    async def guest(self, name: str, other_than: str = "") -> GuestAgent:
        """Of the running instance; it has addresses on both networks, and answers streams."""
        pod, _ = await self.until(f"{name} runs", lambda: self.running(name, other_than))
        return await self.guest_in(pod)

    async def guest_in(self, pod: Any) -> GuestAgent:
        uid = pod["metadata"]["uid"]
        guest = self.guests.setdefault(uid, GuestAgent(self.lab.pod_directory(uid) / "agent.sock"))
        await guest.ready(240)
        text = ""

        async def configured() -> bool:
            nonlocal text
            look = "ip -o addr show scope global; ip -6 route show; netstat -ltn; cat /etc/resolv.conf"
            text = (await guest.run(["sh", "-c", look], timeout=20)).stdout
            # A client sets its address first and tells of the servers last.
            served = all(f"nameserver {server}\n" in text for server in (GATEWAY, GATEWAY6))
            routed = "default via fe80::1" in text and "fd78::/64 dev eth1" in text
            return len(set(re.findall(r"(eth[01]) +(inet6?) ", text))) == 4 and routed and served

        await self.until(
            "both cards have both families, the kernel its router, and the resolver its servers", configured
        )
        if ":7008 " not in text:
            await self.scenario.serve(guest)
        return guest

    async def facts(self, name: str) -> dict[str, Any]:
        """What must not change, as the guest sees it; and that the API says the same."""
        guest = await self.guest(name)
        result = await guest.run(["sh", "-c", LOOK], timeout=60)
        found: dict[str, Any] = {}
        for line in result.stdout.splitlines():
            key, _, value = line.strip().partition(" ")
            found.setdefault(key, []).append(value)
        found = {key: sorted(value) for key, value in found.items()}
        mtu = {"eth0": "1450", "eth1": "1450"}
        assert found["mtu"] == sorted(f"{card} {value}" for card, value in mtu.items()), found
        assert found["default4"] == [f"{GATEWAY} eth0"], found
        assert found["default6"] == ["fe80::1 eth0"], found
        assert found["router6"] == ["fe80::1"], found
        assert found["segment6"] == ["fd77::/64 eth0", "fd78::/64 eth1"], found
        assert found["gateway4"] == found["gateway6"] == [GATEWAY_MAC], found
        servers = sorted([f"search {SEARCH}", f"nameserver {GATEWAY}", f"nameserver {GATEWAY6}"])
        assert found["resolver"] == servers, found
        assert found["hostname"] == [name], found
        cards: dict[str, list[str]] = {"eth0": [], "eth1": []}
        for text in found["address"]:
            cards[text.split()[0]].append(text.split()[1].split("/")[0])
        assert found["self"] == [f"A {cards['eth0'][0]}", f"AAAA {cards['eth0'][1]}"], found
        await self.until(f"the claims say what {name} has", lambda: self._said(name, cards))
        return found

    async def _said(self, name: str, cards: dict[str, list[str]]) -> bool:
        """The claims have the cards' addresses, and name the pod that runs the machine."""
        found = await self.running(name)
        if found is None:
            return False
        pod, claims = found
        assert len(claims) == len(cards)
        for card, network in (("eth0", "net"), ("eth1", "flat")):
            (claim,) = [item for item in claims if item["metadata"]["name"] == f"{name}.{network}"]
            assert sorted(text.split("/")[0] for text in claim["status"]["ips"]) == sorted(cards[card]), (card, claim)
            (condition,) = [item for item in claim["status"]["conditions"] if item["type"] == WHOLE]
            assert (condition["status"], condition["reason"]) == ("True", "SuccessfulAllocation")
            if claim["status"].get("ownerPod", {}).get("name") != pod["metadata"]["name"]:
                return False
        return True

    async def leases(self, guest: GuestAgent) -> dict[tuple[str, str], list[tuple[str, str, str]]]:
        """(Card, family) → (reason, server, address) of all that happened to the lease since the guest booted."""
        found: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
        for line in (await guest.run(["cat", "/run/leases"])).stdout.splitlines():
            _, card, reason, *rest = line.split()
            family = "4" if reason.islower() else "6"
            server, address = (*rest, "", "")[:2]
            found.setdefault((card, family), []).append((reason, server, address))
        return found

    async def renewed(self, name: str) -> None:
        """Every lease is renewed, by the server that gave it, and none was ever lost or refused."""
        guest = await self.guest(name)
        before = await self.leases(guest)
        await guest.run(["killall", "-USR1", "udhcpc", "dhcpcd"])

        async def done() -> bool:
            now = await self.leases(guest)
            return all(
                any(reason in ("renew", "bound", "RENEW6", "REBIND6") for reason, _, _ in now[key][len(before[key]) :])
                for key in before
            )

        await self.until(f"{name}'s leases are renewed", done)
        events = await self.leases(guest)
        assert set(events) == {("eth0", "4"), ("eth0", "6"), ("eth1", "4"), ("eth1", "6")}
        for key, happened in events.items():
            reasons = [reason for reason, _, _ in happened]
            # Before the first one a client may see the link come up.
            assert not LOST & set(reasons[min(map(reasons.index, {"bound", "BOUND6"} & set(reasons))) :]), (
                key,
                happened,
            )
            assert reasons.count("deconfig") == (1 if key[1] == "4" else 0), (key, happened)
            assert reasons.count("bound") + reasons.count("BOUND6") == 1, (key, happened)
            given = [item for item in happened if item[0] in ("bound", "renew", "BOUND6", "RENEW6", "REBIND6")]
            assert len({item[1:] for item in given}) == 1, (key, happened)

    # Traffic

    @asynccontextmanager
    async def streams(self, name: str, *kinds: str) -> AsyncIterator[Streams]:
        """From the peer to a machine, while the block runs."""
        guest = await self.guest(name)
        listed = (await guest.run(["ip", "-o", "addr", "show", "scope", "global"])).stdout
        found = {
            (card, family): address for card, family, address in re.findall(r"(eth[01]) +(inet6?) ([^ /]+)", listed)
        }
        commands = {
            "probe": ["udp", found["eth0", "inet"], "7007", "200", "600"],
            "primary": ["send", found["eth0", "inet"], "7008", "600"],
            "primary, IPv6": ["receive", found["eth0", "inet6"], "7009", "600"],
            "secondary": ["send", found["eth1", "inet"], "7008", "600"],
            "probe, secondary": ["udp", found["eth1", "inet"], "7007", "200", "600"],
        }
        wanted = kinds or tuple(commands)
        jobs = {kind: await self.peer.start([self.program, "--json-lines", *commands[kind]]) for kind in wanted}
        running = Streams(self.peer, jobs)
        try:
            await self.goes_on(running)
            yield running
        finally:
            await running.finish()

    async def goes_on(self, streams: Streams) -> None:
        """Each gets more across than now, twice: the first step may tell of what was on its way."""
        for _ in range(2):
            before = await streams.counts()

            async def more(before: dict[str, int] = before) -> bool:
                now = await streams.counts()
                return all(now[name] > count for name, count in before.items())

            await self.until("the streams get on", more)

    @asynccontextmanager
    async def steady(self, name: str) -> AsyncIterator[Streams]:
        """Around what a machine must not notice."""
        before = await self.facts(name)
        async with self.streams(name) as streams:
            yield streams
            await self.goes_on(streams)
        streams.untouched()
        assert await self.facts(name) == before
        await self.renewed(name)

    # Migrations

    async def migrate(self, name: str) -> str:
        """Ask for a migration; returns the name of the object."""
        body = {
            "apiVersion": "kubevirt.io/v1",
            "kind": "VirtualMachineInstanceMigration",
            "metadata": {"generateName": f"{name}-", "namespace": SPACE},
            "spec": {"vmiName": name},
        }
        made = await self.lab.kubectl("create", "-f", "-", "-o", "name", stdin=yaml.safe_dump(body))
        return made.strip().split("/")[-1]

    async def phase(self, migration: str) -> str:
        found = await self.lab.kubectl(
            "get", "vmim", "-n", SPACE, migration, "--ignore-not-found", "-o", "jsonpath={.status.phase}{'/'}"
        )
        return found.strip().rstrip("/") if found.strip() else "gone"

    async def ended(self, migration: str) -> str:
        async def over() -> str:
            phase = await self.phase(migration)
            return phase if phase in ("Succeeded", "Failed", "gone") else ""

        return str(await self.until(f"{migration} is over", over, 300))

    async def moved(self, name: str) -> str:
        """Migrate and wait; returns the node where the machine is then."""
        before = await self.node(name)
        assert await self.ended(await self.migrate(name)) == "Succeeded"
        after = await self.node(name)
        assert after != before
        return after

    @asynccontextmanager
    async def policy(self, **settings: Any) -> AsyncIterator[None]:
        """A MigrationPolicy for all machines here."""
        selector = {"namespaceSelector": {"kubernetes.io/metadata.name": SPACE}}
        await self.apply(
            {
                "apiVersion": "migrations.kubevirt.io/v1alpha1",
                "kind": "MigrationPolicy",
                "metadata": {"name": "life"},
                "spec": {"selectors": selector, **settings},
            }
        )
        try:
            yield
        finally:
            await self.lab.kubectl("delete", "migrationpolicy", "life")

    async def halfway(self, name: str, migration: str) -> Any:
        """Wait until the guest's memory is on its way; returns the target pod."""
        uid = (await self.get("vmim", migration))["metadata"]["uid"]

        async def sending() -> bool:
            phase = await self.phase(migration)
            assert phase not in ("Succeeded", "Failed", "gone"), phase
            state = (await self.vmi(name))["status"].get("migrationState", {})
            return bool(phase == "Running" and state.get("migrationUid") == uid and state.get("startTimestamp"))

        await self.until("the guest's memory is on its way", sending)
        (target,) = [
            pod for pod in await self.pods(name) if pod["metadata"]["labels"].get(names.MIGRATION_JOB_LABEL) == uid
        ]
        return target

    @asynccontextmanager
    async def closed(self, *nodes: str) -> AsyncIterator[None]:
        """These nodes take no new pods."""
        await self.lab.kubectl("cordon", *nodes)
        try:
            yield
        finally:
            await self.lab.kubectl("uncordon", *nodes)

    async def kill_qemu(self, pod: Any) -> None:
        node, uid = pod["spec"]["nodeName"], pod["metadata"]["uid"]
        found = await self.lab.exec(node, ["pgrep", "-f", f"^\\S*qemu-system.*{uid}"])
        assert found.exit == 0, f"no QEMU in {pod['metadata']['name']}: {found}"
        assert (await self.lab.exec(node, ["kill", "-KILL", *found.stdout.split()])).exit == 0

    async def agent_again(self, node: str) -> None:
        """Start a node's agent again, and wait until it has taken over: names are its business, too."""
        await self.lab.restart(f"agent-{node}")
        host = next(item for item in (await self.lab.status())["hosts"] if item["name"] == node)
        url = f"http://{host['ipv4']}:{METRICS_PORT}/readyz"

        async def ready() -> bool:
            return (await self.lab.exec("fabric", ["python3", "-c", FETCH, url])).exit == 0

        await self.until(f"the agent of {node} has taken over", ready)

    async def no_claims(self, name: str) -> bool:
        return not [
            item for item in (await self.get("ipamclaim"))["items"] if item["metadata"]["name"].startswith(f"{name}.")
        ]

    def tails(self) -> Iterator[tuple[str, str]]:
        for path in sorted((self.lab.directory.path / "logs").glob("*.log")):
            if path.name.startswith(("agent-", "controller", "virt-", "kubelet-")):
                yield path.name, self.lab.directory.log_tail(path.stem, 40)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def life() -> AsyncIterator[Life]:
    """The lab with all three machines up."""
    async with Lab(name=f"life-{os.getpid()}") as lab:
        found = Life(lab)
        await found.create()
        for name in ("one", "two", "alone"):
            await found.guest(name)
        yield found


@pytest.mark.parametrize("name", ["one", "two", "alone"])
async def test_a_machine_starts(life: Life, name: str) -> None:
    await life.facts(name)
    await life.renewed(name)


async def test_machines_have_names_under_a_headless_service_like_pods(life: Life) -> None:
    """``hostname.subdomain.namespace.svc``, with the network's address: the lab has no other."""
    asking = await life.guest("one")
    for name in ("two", "alone"):
        (wanted,) = (await (await life.guest(name)).run(["probe", "resolve", f"{name}.{SPACE}", "A"])).stdout.split()

        async def named(name: str = name, wanted: str = wanted) -> bool:
            words = ["probe", "resolve", f"{name}.{LIVES}.{SPACE}.svc.cluster.local", "A"]
            return list((await asking.run(words)).stdout.split()) == [wanted]

        await life.until(f"{name} has its name under the Service", named)


@pytest.mark.parametrize("name", ["one", "alone"])
async def test_pre_copy(life: Life, name: str) -> None:
    async with life.steady(name):
        await life.moved(name)


async def test_post_copy(life: Life) -> None:
    settings = {"allowPostCopy": True, "completionTimeoutPerGiB": 1, "bandwidthPerMigration": "4Mi"}
    async with life.steady("one"), life.policy(**settings):
        await life.moved("one")
        assert (await life.vmi("one"))["status"]["migrationState"]["mode"] == "PostCopy"


@pytest.mark.parametrize("how", ["target killed", "cancelled"])
async def test_a_failed_migration(life: Life, how: str) -> None:
    source = await life.node("one")
    async with life.steady("one"):
        async with life.policy(bandwidthPerMigration="1Mi"):
            migration = await life.migrate("one")
            target = await life.halfway("one", migration)
            if how == "cancelled":
                await life.lab.kubectl("delete", "vmim", "-n", SPACE, migration, "--wait=false")
            else:
                await life.kill_qemu(target)
            assert await life.ended(migration) in ("Failed", "gone")
        assert await life.node("one") == source


async def test_a_target_whose_agent_is_dead_gets_nothing(life: Life) -> None:
    """The target's pod gets no network, the migration is given up, and the next one works."""
    source = await life.node("one")
    target, other = [node for node in NODES if node != source]
    async with life.steady("one"), life.closed(other):
        await life.lab.kill(f"agent-{target}", signal.SIGKILL)
        try:
            await life.lab.wait(f"agent-{target}")
            migration = await life.migrate("one")

            async def waits() -> bool:
                pods = [pod for pod in await life.pods("one") if pod["spec"].get("nodeName") == target]
                return any(pod["status"]["phase"] == "Pending" for pod in pods)

            await life.until("the target's pod waits for its network", waits)
            await life.lab.kubectl("delete", "vmim", "-n", SPACE, migration, "--wait=false")
            assert await life.ended(migration) in ("Failed", "gone")
            assert await life.node("one") == source
        finally:
            await life.agent_again(target)
        assert await life.moved("one") == target


async def test_a_target_whose_agent_dies_on_the_way(life: Life) -> None:
    """The guest's own frame opens the port: nobody has to be there."""
    source = await life.node("one")
    target, other = [node for node in NODES if node != source]
    async with life.steady("one"), life.closed(other), life.policy(bandwidthPerMigration="8Mi"):
        migration = await life.migrate("one")
        await life.halfway("one", migration)
        await life.lab.kill(f"agent-{target}", signal.SIGKILL)
        try:
            await life.lab.wait(f"agent-{target}")
            assert await life.ended(migration) == "Succeeded"
            assert await life.node("one") == target
        finally:
            await life.agent_again(target)


async def test_there_and_back(life: Life) -> None:
    source = await life.node("one")
    target, other = [node for node in NODES if node != source]
    async with life.steady("one"), life.closed(other):
        assert await life.moved("one") == target
        assert await life.moved("one") == source


async def test_two_migrations_without_a_pause(life: Life) -> None:
    async with life.steady("one"):
        await life.moved("one")
        await life.moved("one")


async def test_two_machines_at_once(life: Life) -> None:
    async with life.steady("one"), life.steady("two"):
        await asyncio.gather(life.moved("one"), life.moved("two"))


async def test_the_guest_reboots(life: Life) -> None:
    before = await life.facts("one")
    async with life.streams("one", "probe", "probe, secondary") as streams:
        guest = await life.guest("one")
        boot = ["cat", "/proc/sys/kernel/random/boot_id"]
        former = (await guest.run(boot)).stdout
        await guest.start(["reboot", "-f"])

        async def another_boot() -> bool:
            await guest.ready(240)
            try:
                return (await guest.run(boot)).stdout not in ("", former)
            except AgentError:
                return False  # the old kernel took the job, the new one is asked for it

        await life.until("the guest has booted again", another_boot)
        await life.guest("one")
        await life.goes_on(streams)
    assert await life.facts("one") == before
    await life.renewed("one")


@pytest.mark.parametrize(("name", "how"), [("one", "stop and start"), ("two", "restart")])
async def test_a_machine_is_started_again(life: Life, name: str, how: str) -> None:
    before, former = await life.facts(name), (await life.vmi(name))["metadata"]["uid"]
    async with life.streams(name, "probe", "probe, secondary") as streams:
        if how == "restart":
            await life.scenario.subresource(SPACE, name, "restart")
        else:
            await life.scenario.subresource(SPACE, name, "stop")
            await life.lab.kubectl("wait", "-n", SPACE, f"vmi/{name}", "--for=delete", "--timeout=140s")
            assert not await life.no_claims(name)
            await life.scenario.subresource(SPACE, name, "start")
        await life.guest(name, other_than=former)
        await life.goes_on(streams)
    assert await life.facts(name) == before
    await life.renewed(name)


async def test_deleted_during_a_migration_and_created_again(life: Life) -> None:
    former = (await life.vmi("two"))["metadata"]["uid"]
    async with life.policy(bandwidthPerMigration="1Mi"):
        migration = await life.migrate("two")
        await life.halfway("two", migration)
        await life.lab.kubectl("delete", "vm", "-n", SPACE, "two", "--wait=true", "--timeout=140s")
    await life.until("the claims of two are gone", lambda: life.no_claims("two"))
    pods = {pod["metadata"]["uid"] for pod in await life.pods("two")}
    await life.apply(machine("two"))
    await life.guest("two", other_than=former)
    await life.facts("two")
    await life.renewed("two")
    assert not pods & {pod["metadata"]["uid"] for pod in await life.pods("two") if pod["status"]["phase"] == "Running"}


async def test_an_instance_without_a_machine_releases_its_addresses_when_it_goes(life: Life) -> None:
    await life.facts("alone")
    await life.lab.kubectl("delete", "vmi", "-n", SPACE, "alone", "--wait=true", "--timeout=140s")
    await life.until("its claims are gone", lambda: life.no_claims("alone"))


async def test_a_node_is_lost(life: Life) -> None:
    """All that ran there is gone at once; the administrator says so, and the machine comes up elsewhere."""
    if await life.node("one") == "n1":
        await life.moved("one")
    before, former, node = await life.facts("one"), (await life.vmi("one"))["metadata"]["uid"], await life.node("one")
    (pod,) = [
        pod for pod in await life.pods("one") if pod["spec"]["nodeName"] == node and pod["status"]["phase"] == "Running"
    ]
    processes = [f"{what}-{node}" for what in ("virt-handler", "kubelet", "agent")]
    async with life.streams("one", "probe", "probe, secondary") as streams, life.closed(node):
        for process in processes:
            await life.lab.kill(process, signal.SIGKILL)
        await life.kill_qemu(pod)
        await life.lab.exec(node, ["ip", "link", "set", "eth0", "down"])
        try:
            await life.lab.kubectl("delete", "pod", "-n", SPACE, pod["metadata"]["name"], "--force", "--grace-period=0")
            await life.guest("one", other_than=former)
            assert await life.node("one") != node
            await life.goes_on(streams)
        finally:
            await life.lab.exec(node, ["ip", "link", "set", "eth0", "up"])
            await life.agent_again(node)
            for process in processes[:2]:
                await life.lab.restart(process)
    assert await life.facts("one") == before
    await life.renewed("one")
