"""The whole controller against a reference model: random actions, random interleavings, lost answers and crashes.

``make soak`` runs a million steps of it.
"""

import copy
import json
import os
import types
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from vmnet.controller.cluster import WATCHED, Cluster
from vmnet.controller.controller import Controller
from vmnet.controller.ledger import Owner
from vmnet.ipam.network_pools import Allocation
from vmnet.kube.api import (
    CLAIMS,
    CUDNS,
    NAMESPACES,
    NODES,
    PODS,
    VMIS,
    VMS,
    Conflict,
    EventType,
    Handler,
    KubeError,
    NotFound,
    Object,
    Resource,
    Unavailable,
    object_key,
)
from vmnet.kube.fake import FakeKube
from vmnet.model import names
from vmnet.model.addresses import mac_for

SPACE: Final = "blue"
NETWORK: Final = "cluster_udn_tenant"
ATTACHMENT: Final = f"{SPACE}/tenant"
NOW: Final = datetime(2026, 11, 23, 12, tzinfo=UTC)
FREE_CHOICE: Final = {f"10.0.0.{last}" for last in (3, 4, 5, 6, 7, 12, 13, 14)}
"""What workloads get without naming it: .8 to .11 are reserved, .0, .1, .2 and .15 nobody's."""
NAMED: Final = FREE_CHOICE | {f"10.0.0.{last}" for last in (8, 9, 10, 11)}
STEPS: Final = int(os.environ.get("VMNET_SOAK_STEPS", "0"))
PARTS: Final = 2
"""Processes that the soak is shared among."""
PODS_AT_ONCE: Final = 7
MACHINES_AT_ONCE: Final = 5


@types.coroutine
def pause() -> Generator[None, None, None]:
    """Let the test decide what runs next."""
    yield


class Mirror:
    """An informer that sees a change when the test says so."""

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self.failure: KubeError | None = None
        self.synced = types.SimpleNamespace(is_set=lambda: True)
        self.pending: deque[tuple[EventType, Object]] = deque()
        self._store: dict[str, Object] = {}
        self._handlers: list[Handler] = []

    def fill(self, found: Iterable[Object]) -> None:
        self._store = {object_key(item): item for item in found}

    def add_handler(self, handler: Handler) -> None:
        self._handlers.append(handler)
        for item in tuple(self._store.values()):
            handler(None, item)

    def get(self, key: str) -> Object | None:
        return self._store.get(key)

    def items(self) -> Iterable[Object]:
        return self._store.values()

    async def run(self) -> None:
        raise NotImplementedError

    def deliver(self) -> None:
        kind, item = self.pending.popleft()
        key = object_key(item)
        old, new = self._store.get(key), None if kind is EventType.DELETED else item
        if new is not None:
            self._store[key] = new
        else:
            self._store.pop(key, None)
        for handler in self._handlers:
            handler(old, new)


class Api(FakeKube):
    """The test goes on before and after every call: other things happen meanwhile, and answers are lost."""

    def __init__(self) -> None:
        super().__init__(now=lambda: NOW)
        self.mirrors: dict[Resource, Mirror] = {}

    def _record(self, change: Any) -> None:
        mirror = self.mirrors.get(change.resource)
        if mirror is not None:
            mirror.pending.append((change.type, change.after))

    def _call(self, verb: str, resource: Resource, name: str, namespace: str | None) -> None:
        pass

    async def create(self, *arguments: Any, **more: Any) -> Any:
        return await self._between(super().create(*arguments, **more))

    async def patch(self, *arguments: Any, **more: Any) -> Any:
        return await self._between(super().patch(*arguments, **more))

    async def delete(self, *arguments: Any, **more: Any) -> None:
        await self._between(super().delete(*arguments, **more))

    async def _between(self, call: Any) -> Any:
        try:
            await pause()
            found = await call
        finally:
            call.close()
        await pause()
        return found

    def all(self, resource: Resource) -> list[Object]:
        return list(self._of(resource).values())


@dataclass
class Running:
    """A reconciliation under way."""

    kind: str
    key: str
    work: Any


class Process:
    """One controller and what it sees. Abandoned, it leaves everything as it is."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.mirrors = api.mirrors = {resource: Mirror(resource) for resource in WATCHED}
        for resource, mirror in self.mirrors.items():
            mirror.fill(api.all(resource))
        self.controller = Controller(api, Cluster(self.mirrors), lambda: NOW)  # type: ignore[arg-type]
        self.reconcilers = self.controller.reconcilers()
        self.running: list[Running] = []
        self.later: list[tuple[str, str]] = []
        _finish(self.controller.take_over())

    def choices(self) -> list[Any]:
        """What can happen next."""
        found: list[Any] = [mirror.deliver for mirror in self.mirrors.values() if mirror.pending]
        found += [lambda kind=kind: self._take(kind) for kind, queue in self.controller.queues.items() if len(queue)]
        found += [lambda item=item: self.advance(item) for item in self.running]
        return found

    def drain(self) -> None:
        """Let everything happen until nothing is left to do."""
        for _ in range(2):
            rounds = 0
            while choices := self.choices():
                rounds += 1
                assert rounds < 2000, "the controller does not come to rest"
                for choice in choices:
                    choice()
            later, self.later = self.later, []
            for kind, key in later:
                self.controller.queues[kind].add(key)
        assert not self.running

    def _take(self, kind: str) -> None:
        queue = self.controller.queues[kind]
        if len(queue):
            key = _finish(queue.get())
            self.advance(Running(kind, key, self.reconcilers[kind](key)), new=True)

    def advance(self, item: Running, *, new: bool = False, error: Exception | None = None) -> None:
        """On to the next pause of a reconciliation, or to its end."""
        if new:
            self.running.append(item)
        elif item not in self.running:
            return
        queue = self.controller.queues[item.kind]
        try:
            if error is None:
                item.work.send(None)
            else:
                item.work.throw(error)
        except StopIteration as done:
            again = done.value is not None
        except (Conflict, NotFound, Unavailable):
            again = True
        else:
            return
        self.running.remove(item)
        queue.done(item.key)
        if again:
            self.later.append((item.kind, item.key))

    def end(self) -> None:
        for item in self.running:
            item.work.close()


def _finish(work: Any) -> Any:
    """The result of a coroutine that nothing holds up."""
    while True:
        try:
            work.send(None)
        except StopIteration as done:
            return done.value


def _start() -> dict[Resource, list[Object]]:
    """A cluster with one network that nobody uses yet."""
    api = Api()
    labels = {"kubernetes.io/metadata.name": SPACE, names.PRIMARY_NETWORK_LABEL: ""}
    api.seed(NAMESPACES, {"metadata": {"name": SPACE, "labels": labels}, "status": {"phase": "Active"}})
    layer2 = {
        "role": "Primary",
        "subnets": ["10.0.0.0/28", "fd00:10::/124"],
        "reservedSubnets": ["10.0.0.8/30"],
        "ipam": {"lifecycle": "Persistent"},
    }
    network = {"topology": "Layer2", "layer2": layer2}
    selector = {"matchLabels": {"kubernetes.io/metadata.name": SPACE}}
    api.seed(CUDNS, {"metadata": {"name": "tenant"}, "spec": {"namespaceSelector": selector, "network": network}})
    for node in ("n1", "n2"):
        api.seed(NODES, {"metadata": {"name": node}})
    Process(api).drain()
    return {resource: api.all(resource) for resource in WATCHED}


@dataclass
class Wish:
    """What a pod or a machine asks for by name."""

    address: str | None = None
    mac: str | None = None

    @property
    def named(self) -> list[str]:
        return [self.address, f"fd00:10::{int(self.address.rpartition('.')[2]):x}"] if self.address else []


@dataclass
class MachineModel:
    """A VM, or one that is gone while its instance still runs."""

    vm: Object
    wish: Wish
    there: bool = True
    vmi: Object | None = None
    pods: list[Object] = field(default_factory=list)


class Against(RuleBasedStateMachine):
    """Who holds what is told from the API alone; the ledger must agree whenever there is nothing left to do."""

    before: dict[Resource, list[Object]] | None = None
    taken = 0
    crashes = 0
    lost = 0
    settled = 0

    def __init__(self) -> None:
        super().__init__()
        if Against.before is None:
            Against.before = _start()
        self.api = Api()
        for resource, found in Against.before.items():
            for item in found:
                self.api.seed(resource, copy.deepcopy(item))
        self.process = Process(self.api)
        self.pods: dict[int, tuple[Object, Wish]] = {}
        self.machines: dict[int, MachineModel] = {}
        self.kept: dict[str, tuple[str, ...]] = {}
        """uid of a claim or pod → what it was given."""
        self.number = 0

    @initialize()
    def begin(self) -> None:
        self.process.drain()

    # What users and KubeVirt do.

    @rule(slot=st.integers(0, PODS_AT_ONCE - 1), last=st.integers(0, 40), choices=st.binary(max_size=10))
    def pod_comes_or_goes(self, slot: int, last: int, choices: bytes) -> None:
        if slot in self.pods:
            pod, _ = self.pods.pop(slot)
            self._end(pod, vanish=bool(last % 2))
        else:
            wish = _wish(last)
            annotations = {}
            if self.api.peek(PODS, f"pod-{slot}", SPACE) is not None:
                # A name is free once the finished pod is gone.
                self.api.vanish(PODS, f"pod-{slot}", SPACE)
            if wish.address or wish.mac:
                element = {"name": "default", "namespace": SPACE}
                element |= {"ips": [f"{item}/28" for item in wish.named]} if wish.address else {}  # type: ignore[dict-item]
                element |= {"mac": wish.mac} if wish.mac else {}
                annotations[names.DEFAULT_NETWORK_ANNOTATION] = json.dumps([element])
            self.pods[slot] = self._pod(f"pod-{slot}", "n1", annotations=annotations), wish
        self._go_on(choices)

    @rule(slot=st.integers(0, MACHINES_AT_ONCE - 1), last=st.integers(0, 40), choices=st.binary(max_size=10))
    def machine_comes_or_goes(self, slot: int, last: int, choices: bytes) -> None:
        machine = self.machines.get(slot)
        if machine is None:
            self.machines[slot] = MachineModel(self._vm(f"vm-{slot}", _wish(last)), _wish(last))
        elif machine.there:
            machine.there = False
            self.api.vanish(VMS, f"vm-{slot}", SPACE)
            # Garbage collection; the finalizer holds the claim.
            for claim in self.api.all(CLAIMS):
                if claim["metadata"]["ownerReferences"][0]["uid"] == machine.vm["metadata"]["uid"]:
                    deleting = copy.deepcopy(claim)
                    deleting["metadata"]["deletionTimestamp"] = "2026-11-23T12:00:00Z"
                    self.api.seed(CLAIMS, deleting)
            if machine.vmi is None:
                del self.machines[slot]
        self._go_on(choices)

    @rule(slot=st.integers(0, MACHINES_AT_ONCE - 1), vanish=st.booleans(), choices=st.binary(max_size=10))
    def machine_starts_or_stops(self, slot: int, vanish: bool, choices: bytes) -> None:
        machine = self.machines.get(slot)
        if machine is not None and machine.vmi is not None:
            for pod in machine.pods:
                self._end(pod, vanish=vanish)
            self.api.vanish(VMIS, f"vm-{slot}", SPACE)
            machine.pods, machine.vmi = [], None
            if not machine.there:
                del self.machines[slot]
        elif machine is not None:
            vm = machine.vm
            template = vm["spec"]["template"]
            body = {
                "metadata": {
                    "name": vm["metadata"]["name"],
                    "namespace": SPACE,
                    "annotations": template["metadata"]["annotations"],
                    "ownerReferences": [_owned_by(vm, "VirtualMachine")],
                },
                "spec": template["spec"],
                "status": {"nodeName": "n1"},
            }
            machine.vmi = self.api.seed(VMIS, body)
            machine.pods = [self._launcher(machine.vmi, "n1")]
        self._go_on(choices)

    @rule(slot=st.integers(0, MACHINES_AT_ONCE - 1), choices=st.binary(max_size=10))
    def a_claim_is_removed_by_force(self, slot: int, choices: bytes) -> None:
        """Its machine goes on with what its pods have; they refer to the claim, as the webhook sees to."""
        machine = self.machines.get(slot)
        there = self.api.peek(CLAIMS, f"vm-{slot}.happy", SPACE)
        if machine is not None and machine.there and there is not None and all(map(_refers, machine.pods)):
            self.api.vanish(CLAIMS, f"vm-{slot}.happy", SPACE)
        self._go_on(choices)

    @rule(slot=st.integers(0, MACHINES_AT_ONCE - 1), succeeds=st.booleans(), choices=st.binary(max_size=10))
    def machine_migrates(self, slot: int, succeeds: bool, choices: bytes) -> None:
        machine = self.machines.get(slot)
        if machine is not None and machine.vmi is not None:
            if len(machine.pods) == 1:
                other = "n2" if machine.pods[0]["spec"]["nodeName"] == "n1" else "n1"
                machine.pods.append(self._launcher(machine.vmi, other, **{names.MIGRATION_JOB_LABEL: "job"}))
            elif succeeds:
                moved = copy.deepcopy(machine.vmi)
                moved["status"]["nodeName"] = machine.pods[1]["spec"]["nodeName"]
                machine.vmi = self.api.seed(VMIS, moved)
                self._end(machine.pods.pop(0))
            else:
                self._end(machine.pods.pop(1))
        self._go_on(choices)

    # What befalls the controller.

    @rule(choices=st.binary(min_size=1, max_size=40))
    def time_passes(self, choices: bytes) -> None:
        self._go_on(choices)

    @rule(index=st.integers(0, 7), choices=st.binary(max_size=10))
    def an_answer_is_lost(self, index: int, choices: bytes) -> None:
        """Before the call is carried out, or after it: nobody knows."""
        self._go_on(choices)
        if self.process.running:
            Against.lost += 1
            item = self.process.running[index % len(self.process.running)]
            self.process.advance(item, error=Unavailable("503: lost"))

    @rule()
    def the_controller_crashes(self) -> None:
        Against.taken += 1
        Against.crashes += 1
        self.process.end()
        self.process = Process(self.api)
        for resource, queue in (("machine", VMS), ("machine", VMIS), ("claim", CLAIMS), ("pod", PODS)):
            for item in self.api.all(queue):
                self.process.controller.queues[resource].add(object_key(item))

    @rule()
    def everything_is_done(self) -> None:
        Against.taken += 1
        Against.settled += 1
        self.process.drain()
        self._compare()

    def teardown(self) -> None:
        self.process.drain()
        self._compare()
        self.process.end()

    # The model.

    @invariant()
    def nothing_is_given_twice_or_changed(self) -> None:
        """At every moment, in the middle of whatever the controller does."""
        holders: dict[str, str] = {}
        for identity, uid, held in self._written():
            assert self.kept.setdefault(uid, held) == held
            for text in held:
                assert holders.setdefault(text, identity) == identity, f"{text} is given twice"

    def _written(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """(Who has it, uid of the object that says so, addresses and MAC) as it is written down."""
        for claim in self.api.all(CLAIMS):
            held = tuple(item.partition("/")[0] for item in (claim.get("status") or {}).get("ips") or [])
            if held:
                yield claim["metadata"]["ownerReferences"][0]["uid"], claim["metadata"]["uid"], held
        for pod in self._living():
            text = (pod["metadata"].get("annotations") or {}).get(names.POD_NETWORKS_ANNOTATION)
            if text:
                entry = json.loads(text)[ATTACHMENT]
                held = (*(item.partition("/")[0] for item in entry["ip_addresses"]), entry["mac_address"])
                machine = pod["metadata"]["labels"].get("test/machine")
                yield machine or pod["metadata"]["uid"], pod["metadata"]["uid"], held

    def _living(self) -> Iterator[Object]:
        return (pod for pod in self.api.all(PODS) if pod["status"]["phase"] == "Pending")

    def _compare(self) -> None:
        """Nothing is left to do: nothing is lost, and who has nothing cannot have it."""
        pools = self.process.controller.ledger._networks[NETWORK]
        expected: dict[Owner, set[str]] = {}
        for claim in self.api.all(CLAIMS):
            owner = Owner(f"claim {object_key(claim)}")
            ips = (claim.get("status") or {}).get("ips") or []
            held = pools.get(owner)
            if ips:
                expected[owner] = set(ips)
            elif claim["metadata"].get("deletionTimestamp") and held is not None:
                # What was about to be written may have been: it stays reserved for as long as the claim is there.
                expected[owner] = set(map(str, held.addresses))
        machines = {item.vm["metadata"]["name"]: item for item in self.machines.values()}
        claims = {claim["metadata"]["name"] for claim in self.api.all(CLAIMS)}
        # A VM that went before anybody saw it may have an instance, but nothing to own a claim.
        assert claims >= {f"{name}.happy" for name, machine in machines.items() if machine.there}
        assert claims <= {f"{name}.happy" for name in machines}
        had: dict[str, set[str]] = {}
        for pod in self._living():
            annotations = pod["metadata"].get("annotations") or {}
            claim_name = annotations.get(names.PRIMARY_CLAIM_ANNOTATION)
            if claim_name and self.api.peek(CLAIMS, claim_name, SPACE) is None:
                # Removed by force: what its machine's pods have, or were about to get, stays theirs until they end.
                gone = Owner(f"claim {SPACE}/{claim_name}")
                kept = pools.get(gone)
                if kept is not None:
                    expected[gone] = set(map(str, kept.addresses))
            text = annotations.get(names.POD_NETWORKS_ANNOTATION)
            if not text:
                continue
            had[pod["metadata"]["name"]] = set(json.loads(text)[ATTACHMENT]["ip_addresses"])
            if claim_name and self.api.peek(CLAIMS, claim_name, SPACE) is None:
                assert expected.get(gone) == had[pod["metadata"]["name"]], "a running machine has lost its addresses"
            if not pod["metadata"]["labels"].get("test/machine"):
                expected[Owner(f"pod {object_key(pod)} ({pod['metadata']['uid']})")] = had[pod["metadata"]["name"]]
        found = {owner: pools.get(Owner(owner)) for owner in pools.owners()}
        assert {owner: set(map(str, item.addresses)) for owner, item in found.items() if item} == expected
        assert pools.used(4) == pools.used(6) == len(expected)
        taken = {str(item.ip): owner for owner, held in found.items() if held for item in held.addresses}
        macs = {held.mac: owner for owner, held in found.items() if held}
        for name, machine in machines.items():
            claim = self.api.peek(CLAIMS, f"{name}.happy", SPACE)
            has = set(((claim or {}).get("status") or {}).get("ips") or []) or None
            if has is None and machine.there:
                _justified(machine.wish, taken, macs)
            for pod in machine.pods:
                # A machine that is gone, and had its claim taken away, runs on with what it has.
                assert had.get(pod["metadata"]["name"]) == has or (claim is None and not machine.there)
        for pod, wish in self.pods.values():
            if pod["metadata"]["name"] not in had:
                _justified(wish, taken, macs)

    # Objects.

    def _go_on(self, choices: bytes) -> None:
        Against.taken += 1
        for choice in choices:
            found = self.process.choices()
            if not found:
                return
            found[choice % len(found)]()

    def _pod(self, name: str, node: str, **metadata: Any) -> Object:
        metadata.setdefault("labels", {})
        body = {"metadata": {"name": name, "namespace": SPACE, **metadata}, "spec": {"nodeName": node}}
        return self.api.seed(PODS, {**body, "status": {"phase": "Pending"}})

    def _launcher(self, vmi: Object, node: str, **labels: str) -> Object:
        self.number += 1
        name, uid = vmi["metadata"]["name"], vmi["metadata"]["uid"]
        labels = {
            "kubevirt.io": "virt-launcher",
            names.CREATED_BY_LABEL: uid,
            "test/machine": vmi["metadata"]["ownerReferences"][0]["uid"],
            **labels,
        }
        owners = [_owned_by(vmi, "VirtualMachineInstance")]
        annotations = {names.DOMAIN_ANNOTATION: name}
        if self.number % 2:
            annotations[names.PRIMARY_CLAIM_ANNOTATION] = f"{name}.happy"
        made = {"labels": labels, "annotations": annotations, "ownerReferences": owners}
        return self._pod(f"launcher-{self.number}", node, **made)

    def _vm(self, name: str, wish: Wish) -> Object:
        interface = {"name": "happy", "binding": {"name": "l2bridge"}} | ({"macAddress": wish.mac} if wish.mac else {})
        annotations = {"network.kubevirt.io/addresses": json.dumps({"happy": wish.named})} if wish.address else {}
        template = {
            "metadata": {"annotations": annotations},
            "spec": {
                "domain": {"devices": {"interfaces": [interface]}},
                "networks": [{"name": "happy", "pod": {}}],
            },
        }
        return self.api.seed(VMS, {"metadata": {"name": name, "namespace": SPACE}, "spec": {"template": template}})

    def _end(self, pod: Object, *, vanish: bool = False) -> None:
        name = pod["metadata"]["name"]
        if vanish:
            self.api.vanish(PODS, name, SPACE)
            return
        found = self.api.peek(PODS, name, SPACE)
        assert found is not None
        found["status"]["phase"] = "Succeeded"
        self.api.seed(PODS, found)


def _refers(pod: Object) -> bool:
    return names.PRIMARY_CLAIM_ANNOTATION in pod["metadata"]["annotations"]


def _owned_by(item: Object, kind: str) -> Object:
    metadata = item["metadata"]
    made = {"apiVersion": "kubevirt.io/v1", "kind": kind, "name": metadata["name"], "uid": metadata["uid"]}
    return {**made, "controller": True}


def _wish(number: int) -> Wish:
    """Most ask for nothing; some for an address, usable or not, some for a MAC, some for both."""
    if number < 16:
        return Wish()
    if number < 32:
        return Wish(address=f"10.0.0.{number - 16}")
    mac = str(mac_for(ip_address(f"10.0.0.{number - 29}")))
    return Wish(mac=mac, address=f"10.0.0.{number - 30}" if number % 3 == 0 else None)


def _justified(wish: Wish, taken: dict[str, str], macs: dict[str, str]) -> None:
    """Why somebody who wants an address has none."""
    if wish.address:
        mac = wish.mac or str(mac_for(ip_address(wish.address)))
        held = any(item in taken for item in wish.named) or mac in macs
        assert wish.address not in NAMED or held, f"{wish} could be met"
    elif not (wish.mac and wish.mac in macs):
        free = FREE_CHOICE - taken.keys()
        usable = [item for item in free if wish.mac or str(mac_for(ip_address(item))) not in macs]
        v6 = [item for item in range(3, 16) if f"fd00:10::{item:x}" not in taken]
        assert not usable or not v6, f"{wish} could be met: {free}"


TestAgainstAModel = Against.TestCase
TestAgainstAModel.settings = settings(
    max_examples=30, stateful_step_count=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.skipif(not STEPS, reason="make soak")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_million_steps(part: int) -> None:
    """Until this part's share of them was taken; what came of it stays in ``build/soak``."""
    began = datetime.now(UTC)
    Against.taken = Against.crashes = Against.lost = Against.settled = 0
    while Against.taken < STEPS // PARTS:
        run_state_machine_as_test(
            Against,
            settings=settings(
                max_examples=500,
                stateful_step_count=100,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
        counts = {"steps": Against.taken, "crashes": Against.crashes, "lost answers": Against.lost}
        counts |= {"comparisons": Against.settled, "seconds": int((datetime.now(UTC) - began).total_seconds())}
        target = Path(f"build/soak/addresses-{part}.json")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(counts) + "\n")
    assert Against.taken >= STEPS // PARTS


def test_what_is_held_is_seen() -> None:
    """The comparison itself: an address that nobody holds any more, and one with two holders, are found."""
    machine = Against()
    machine.process.drain()
    machine.pods[0] = machine._pod("pod-0", "n1"), Wish()
    machine.process.drain()
    machine._compare()
    pools = machine.process.controller.ledger._networks[NETWORK]
    leaked = pools.allocate("nobody")  # type: ignore[union-attr]
    assert isinstance(leaked, Allocation)
    with pytest.raises(AssertionError):
        machine._compare()
    second = machine._pod("pod-1", "n1")
    entry = json.loads(machine.api.peek(PODS, "pod-0", SPACE)["metadata"]["annotations"][names.POD_NETWORKS_ANNOTATION])  # type: ignore[index]
    second["metadata"]["annotations"] = {names.POD_NETWORKS_ANNOTATION: json.dumps(entry)}
    machine.api.seed(PODS, second)
    with pytest.raises(AssertionError, match="given twice"):
        machine.nothing_is_given_twice_or_changed()
