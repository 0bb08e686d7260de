"""Connections come along with a machine: what its old node's conntrack knows is told to the new node's agent.

The target's agent asks the source's from the moment its port is staged, and writes what it is told before the guest
comes (``plan.carried`` says what and how). When the guest's first frame has come, it takes over at once what it could
not have had before, tells the source, and gets what is left. The kernel's gate waits for none of this: only flows of
which an entry is still to come are held, for a limited time.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from vmnet import metrics
from vmnet.agent.cluster import Cluster
from vmnet.agent.networks import Networks, NotReady
from vmnet.agent.peers import Away, Link, Peers
from vmnet.kernel.api import Gone, Kernel, KernelError, LastFrame
from vmnet.model import migration
from vmnet.model.addresses import IPAddress
from vmnet.model.connection import Connection, Flow, Outcome
from vmnet.model.endpoint import Endpoint, MachineReference, Node
from vmnet.model.migration import Carried, Way
from vmnet.model.names import InterfaceName, NamespaceName
from vmnet.model.network import Network
from vmnet.plan import carried, edge, ops, policy
from vmnet.plan.carried import Segment
from vmnet.runtime.tasks import TaskSet
from vmnet.wire.handover import Arrived, Ask, Done, Left, Told, When

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 0.5
"""Between two looks at a moving machine's connections."""
SILENCE_SECONDS: Final = 15.0
"""A source that tells nothing for so long, not even that, is away."""
FINISH_SECONDS: Final = 2.0
"""For the exchange after the guest's first frame."""
AGAIN_SECONDS: Final = 1.0
LATE_SECONDS: Final = 60.0
"""After the guest has come, a source that was away is asked for so long."""
ASKED_SECONDS: Final = 3600.0
"""A migration that takes longer is asked for anew."""
CLOCK_ROUNDS: Final = 5
"""The source's clock is read so often; what took the least time tells most exactly."""
_DEPARTED: Final = 1024
"""Machines that have left, of which it is remembered when."""
_HOLD_AGAIN: Final = carried.HOLD_SECONDS / 3
_REPEAT_SECONDS: Final = 60.0
"""What has been told is told again, for its time runs on the target too."""


@dataclass(slots=True)
class _Coming:
    """A machine that is on its way to a port of this node."""

    network: Network
    endpoint: Endpoint
    machine: MachineReference
    segment: Segment
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    placed: dict[Flow, Connection] = field(default_factory=dict)
    living: set[Flow] | None = None
    """What the source has told since it knows that the guest is here."""
    exchanges: int = 0
    """How often a source was told so: the second time it does not tell of what it gave up the first."""
    waiting: dict[Flow, Connection] = field(default_factory=dict)
    """To be written only when the guest is here: until then this node sees them as the backend does."""
    services: dict[Flow, Connection] = field(default_factory=dict)
    way: Way = Way.NOBODY
    held_at: float = 0.0
    seconds: float | None = None
    admitted: bool = False
    last_frame: migration.LastFrame | None = None


class Holds:
    """What holds connections between two nodes' entries: there for as long as a migration needs it."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._users: dict[NamespaceName, set[object]] = {}

    async def hold(
        self, network: Network, user: object, services: Sequence[Connection], arriving: Iterable[IPAddress] = ()
    ) -> None:
        """Hold, for a limited time. Raises KernelError."""
        self._users.setdefault(network.namespace, set()).add(user)
        script = carried.hold_script(services, arriving)
        await self._kernel.apply([ops.LoadFirewall(network.namespace, script)])

    async def release(self, network: Network, user: object) -> None:
        """One migration is over; nobody else's holds end with it."""
        users = self._users.get(network.namespace, set())
        if user not in users:
            return
        users.discard(user)
        if not users:
            del self._users[network.namespace]
            try:
                await self._kernel.apply([ops.LoadFirewall(network.namespace, carried.release_script())])
            except KernelError as error:
                log.info("connections in %s are held until their time is over: %s", network.namespace, error)


class Arrivals:
    """Machines that come to this node."""

    def __init__(self, kernel: Kernel, cluster: Cluster, networks: Networks, peers: Peers, holds: Holds) -> None:
        self._holds = holds
        self._kernel = kernel
        self._cluster = cluster
        self._networks = networks
        self._peers = peers
        self._coming: dict[InterfaceName, _Coming] = {}
        self._running: dict[InterfaceName, asyncio.Task[None]] = {}
        self._tasks = TaskSet()

    def expect(self, network: Network, endpoint: Endpoint) -> None:
        """A machine's port is ready: from now on its connections are asked for."""
        machine = endpoint.machine
        if machine is None or not network.persistent or not network.joined or endpoint.port in self._coming:
            return
        segment = Segment.of(network, (item.ip for item in endpoint.addresses))
        coming = _Coming(network, endpoint, machine, segment)
        self._coming[endpoint.port] = coming
        self._tasks.start(self._receive(coming), f"connections of {machine.namespace}/{machine.name}")

    def arrived(self, endpoint: Endpoint) -> None:
        """Its guest runs here. Never waits."""
        coming = self._coming.get(endpoint.port)
        if coming is not None:
            coming.arrived.set()

    async def settled(self, endpoint: Endpoint, seconds: float) -> Carried:
        """What came along, as far as it is known after so long at most."""
        coming = self._coming.get(endpoint.port)
        if coming is None:
            return Carried()
        try:
            async with asyncio.timeout(seconds):
                await coming.over.wait()
        except TimeoutError:
            log.info("connections of %s are still being asked for", endpoint.machine)
        return Carried(coming.way, len(coming.placed), coming.seconds)

    def last_frame(self, endpoint: Endpoint) -> migration.LastFrame | None:
        """When the guest spoke last at its old node, once ``settled``; None: nobody knows."""
        coming = self._coming.get(endpoint.port)
        return None if coming is None else coming.last_frame

    def forget(self, endpoint: Endpoint) -> None:
        """The port is gone. What was written for a guest that never came goes too."""
        coming = self._coming.pop(endpoint.port, None)
        if coming is None:
            return
        task = self._running.pop(endpoint.port, None)
        if task is not None:
            task.cancel()
        if coming.placed and not coming.arrived.is_set():
            self._tasks.start(self._undo(coming), f"connections of {endpoint.pod.name} are forgotten")

    async def close(self) -> None:
        """What is written stays."""
        await self._tasks.close()

    async def _undo(self, coming: _Coming) -> None:
        try:
            await self._kernel.forget_connections(coming.network.namespace, tuple(coming.placed))
        except Gone as error:
            log.debug("%s", error)

    async def _receive(self, coming: _Coming) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._running[coming.endpoint.port] = task
        loop = asyncio.get_running_loop()
        until: float | None = None
        try:
            while until is None or loop.time() < until:
                source = self._cluster.came_from(coming.endpoint)
                try:
                    if source is not None:
                        async with self._peers.dial(source) as link:
                            await self._follow(coming, link)
                        # Nothing waits for what is only told of.
                        await self._holds.release(coming.network, coming.endpoint.port)
                        await self._ask_when(coming, source)
                        return
                    if coming.arrived.is_set():
                        return  # it began here
                except (Away, KernelError, NotReady) as error:
                    log.info("connections of %s/%s: %s", coming.machine.namespace, coming.machine.name, error)
                if coming.arrived.is_set() and until is None:
                    until = loop.time() + LATE_SECONDS
                    coming.way = Way.UNANSWERED
                    coming.over.set()
                    await self._admit(coming)
                await _first(coming.arrived, AGAIN_SECONDS, until is None)
        finally:
            coming.over.set()
            self._running.pop(coming.endpoint.port, None)
            await asyncio.shield(self._holds.release(coming.network, coming.endpoint.port))

    async def _ask_when(self, coming: _Coming, source: Node) -> None:
        """When the guest's last frame left the other node, by this node's clock (the source's is read as by NTP)."""
        told: list[migration.LastFrame] = []
        try:
            async with self._peers.dial(source) as link:
                for _ in range(CLOCK_ROUNDS):
                    asked = time.time()
                    await link.send(When(coming.machine, coming.network.name))
                    answer = await link.receive(FINISH_SECONDS)
                    answered = time.time()
                    if not isinstance(answer, Left) or answer.last is None:
                        break
                    behind = (asked + answered) / 2 - answer.now
                    told.append(migration.LastFrame(answer.last + behind, max(0.0, answered - asked) / 2))
        except Away as error:
            log.debug("last frame of %s: %s", coming.machine, error)
        coming.last_frame = min(told, key=lambda item: item.error, default=None)

    async def _follow(self, coming: _Coming, link: Link) -> None:
        """Take what the source tells, until it has told all. Raises Away, KernelError."""
        await link.send(Ask(coming.machine, coming.network.name))
        told = asyncio.create_task(self._told(coming, link), name=f"told by {link.node}")
        arrival = asyncio.create_task(coming.arrived.wait(), name=f"arrival of {coming.machine.name}")
        try:
            await asyncio.wait((told, arrival), return_when=asyncio.FIRST_COMPLETED)
            if told.done():
                await told
                return
            started = asyncio.get_running_loop().time()
            late = coming.over.is_set()
            # The other agent's part takes longer.
            coming.living = set()
            coming.exchanges += 1
            await link.send(Arrived())
            await self._place_waiting(coming)
            await asyncio.wait((told,), timeout=FINISH_SECONDS)
            if not told.done():
                late = True
                await self._admit(coming)
            await told
            await self._forget_ended(coming)
            coming.seconds = asyncio.get_running_loop().time() - started
            coming.way = Way.LATE if late else Way.STREAMED
            labels = (coming.machine.namespace, coming.machine.name, self._networks.node_name, coming.network.name)
            metrics.MIGRATION_CONNECTIONS.labels(*labels, coming.way.value).inc(len(coming.placed))
            metrics.MIGRATION_HAND_OVER.labels(*labels).observe(coming.seconds)
        finally:
            for task in (told, arrival):
                task.cancel()
            await asyncio.gather(told, arrival, return_exceptions=True)

    async def _told(self, coming: _Coming, link: Link) -> None:
        while True:
            message = await link.receive(SILENCE_SECONDS)
            match message:
                case Told(connections):
                    await self._take(coming, connections)
                case Done():
                    return
                case _:
                    raise Away(f"agent of {link.node} says what it should not: {type(message).__name__}")

    async def _take(self, coming: _Coming, told: Iterable[Connection]) -> None:
        home = edge.mark(self._networks.this_node().number or 0)
        try:
            found = [carried.incoming(coming.segment, item, home) for item in told]
        except ValueError as error:
            raise Away(f"connections of {coming.machine}: {error}") from error
        wanted = [item for item in found if item is not None]
        if coming.living is not None:
            coming.living |= {item.original for item in wanted}
        if len(coming.placed) + len(coming.waiting) + len(wanted) > 2 * carried.CONNECTIONS_LIMIT:
            raise Away(f"too many connections of {coming.machine}")
        services = {item.original: item for item in carried.services(wanted)}
        changed = not services.keys() <= coming.services.keys()
        coming.services |= services
        here = self._here(coming.network)
        later = {key: item for key, item in services.items() if item.reply.source in here}
        # First what is quick, for the guest may come at any moment.
        coming.waiting |= later
        await self._place(coming, [item for item in wanted if item.original not in later])
        if coming.arrived.is_set():
            await self._place_waiting(coming)
        await self._hold(coming, changed)
        await self._networks.reach_homes(coming.network, {item.mark for item in wanted if item.mark})

    def _here(self, network: Network) -> frozenset[IPAddress]:
        """Addresses of this node's own endpoints."""
        own = (found for found in self._cluster.endpoints(network.name) if found.node == self._networks.node_name)
        return frozenset(item.ip for endpoint in own for item in endpoint.addresses)

    async def _hold(self, coming: _Coming, changed: bool) -> None:
        now = asyncio.get_running_loop().time()
        if changed or now - coming.held_at > _HOLD_AGAIN:
            coming.held_at = now
            services = tuple(coming.services.values())
            await self._holds.hold(coming.network, coming.endpoint.port, services, coming.segment.addresses)

    async def _forget_ended(self, coming: _Coming) -> None:
        """What has ended on the source while it was told would be remembered here for days."""
        if coming.living is None or coming.exchanges > 1:
            return
        ended = [key for key in coming.placed if key not in coming.living]
        for key in ended:
            del coming.placed[key]
        if ended:
            await self._kernel.forget_connections(coming.network.namespace, ended)

    async def _place_waiting(self, coming: _Coming) -> None:
        """The guest is here: now this node translates what its own backends answer."""
        waiting = tuple(coming.waiting.values())
        coming.waiting.clear()
        await self._place(coming, waiting)

    async def _place(self, coming: _Coming, entries: Iterable[Connection]) -> None:
        wanted = tuple(entries)
        if not wanted:
            return
        outcomes = await self._kernel.put_connections(coming.network.namespace, wanted)
        for item, outcome in zip(wanted, outcomes, strict=True):
            if outcome is Outcome.PLACED:
                coming.placed[item.original] = item
            elif outcome is Outcome.REFUSED:
                log.warning("the kernel does not take %s, answered by %s", item.original, item.reply)

    async def _admit(self, coming: _Coming) -> None:
        """Nobody tells what the policies should know: for a while they admit what looks like a connection's middle."""
        if coming.admitted or not self._networks.holds(coming.network, f"inet {policy.NAME}"):
            return
        coming.admitted = True
        script = policy.arrived_script(coming.segment.addresses)
        await self._kernel.apply([ops.LoadFirewall(coming.network.namespace, script)])


class Departures:
    """Machines that leave this node: answers the agents of the nodes that they go to."""

    def __init__(self, kernel: Kernel, cluster: Cluster, networks: Networks, holds: Holds) -> None:
        self._holds = holds
        self._kernel = kernel
        self._cluster = cluster
        self._networks = networks
        self._last_frames: OrderedDict[tuple[MachineReference, str, str], float] = OrderedDict()
        """When a machine spoke last, by the network and the node to which it has gone."""

    async def answer(self, link: Link) -> None:
        """One agent's question, until it has what it needs. Raises Away."""
        ask = await link.receive(SILENCE_SECONDS)
        if isinstance(ask, When):
            await self._say_when(link, ask)
            return
        if not isinstance(ask, Ask):
            raise Away(f"agent of {link.node} asks nothing")
        leaving = self._leaving(ask, link.node)
        if leaving is None:
            log.warning("agent of %s asks for machine %s, which does not go there", link.node, ask.machine)
            return
        network, segment = leaving
        stamp = await self._stamp(network, ask.machine)
        try:
            async with asyncio.timeout(ASKED_SECONDS):
                await self._tell(link, network, segment, stamp, ask)
        except TimeoutError:
            log.info("machine %s takes very long to leave for %s", ask.machine, link.node)
        except (KernelError, NotReady) as error:
            log.warning("connections of machine %s for %s: %s", ask.machine, link.node, error)
        finally:
            if stamp is not None:
                stamp.close()
            await asyncio.shield(self._holds.release(network, link))

    async def _stamp(self, network: Network, machine: MachineReference) -> LastFrame | None:
        """Have the kernel note when the machine speaks here; None where it cannot, or the machine has no port here."""
        own = (item for item in self._cluster.endpoints(network.name) if item.machine == machine)
        here = next((item for item in own if item.node == self._networks.node_name), None)
        if here is None:
            return None
        try:
            return await self._kernel.last_frame(network.namespace, here.port, here.mac)
        except KernelError as error:
            log.info("nobody notes when machine %s leaves: %s", machine, error)
            return None

    def _note(self, stamp: LastFrame | None, key: tuple[MachineReference, str, str]) -> None:
        """The machine has left: what was seen last stays known for a while."""
        self._last_frames.pop(key, None)
        try:
            seen = None if stamp is None else stamp.seen()
        except OSError as error:
            log.info("nobody knows when machine %s left: %s", key[0], error)
            return
        if seen is not None:
            self._last_frames[key] = seen
            if len(self._last_frames) > _DEPARTED:
                self._last_frames.popitem(last=False)

    async def _say_when(self, link: Link, ask: When) -> None:
        for _ in range(CLOCK_ROUNDS):
            await link.send(Left(self._last_frames.get((ask.machine, ask.network, link.node)), time.time()))
            again = await link.receive(SILENCE_SECONDS)
            if again != ask:
                raise Away(f"agent of {link.node} asks something else")

    def _leaving(self, ask: Ask, node: str) -> tuple[Network, Segment] | None:
        """What the asking node may know: of a machine that has, by the API, a pod there. Its pod here may be gone."""
        found = self._cluster.attachment_of(ask.network)
        endpoints = self._cluster.endpoints(ask.network)
        there = next((item for item in endpoints if item.machine == ask.machine and item.node == node), None)
        if found is None or there is None or node == self._networks.node_name:
            return None
        return found.network, Segment.of(found.network, (item.ip for item in there.addresses))

    async def _tell(self, link: Link, network: Network, segment: Segment, stamp: LastFrame | None, ask: Ask) -> None:
        home = edge.mark(self._networks.this_node().number or 0)
        loop = asyncio.get_running_loop()
        known: dict[Flow, tuple[Connection, float]] = {}
        held_at = 0.0
        # A read that is cut off in the middle of a line would lose it.
        reading = asyncio.create_task(link.receive(ASKED_SECONDS), name=f"asked by {link.node}")
        try:
            while not reading.done():
                found, now = await self._look(network, segment, home), loop.time()
                fresh = [item for item in found if _changed(known.get(item.original), item, now)]
                present = {item.original for item in found}
                known = {key: value for key, value in known.items() if key in present}
                known |= {item.original: (item, now) for item in fresh}
                await link.send(Told(tuple(fresh)))
                services = carried.services(found)
                if services and (carried.services(fresh) or now - held_at > _HOLD_AGAIN):
                    held_at = now
                    await self._holds.hold(network, link, services)
                await asyncio.wait((reading,), timeout=LOOK_SECONDS)
            if not isinstance(await reading, Arrived):
                raise Away(f"agent of {link.node} says what it should not")
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        self._note(stamp, (ask.machine, ask.network, link.node))
        # What is held on both nodes until then comes first; then whatever has come since the last look.
        told = carried.services(item for item, _ in known.values())
        await self._give_up(network, told)
        found = await self._look(network, segment, home)
        services = carried.services(found)
        # All that there is, whether it was told before or not: what is not among it has ended.
        await link.send(Told((*told, *found)))
        await self._give_up(network, services)
        gone = {item.original for item in (*told, *services)}
        await link.send(Done(len(gone)))
        log.info("%d connections have gone to %s, %d with their translation", len(known), link.node, len(gone))

    async def _give_up(self, network: Network, services: Sequence[Connection]) -> None:
        """From now on another node translates these; a backend that is here speaks with the machine itself."""
        if not services:
            return
        here = {
            item.ip
            for endpoint in self._cluster.endpoints(network.name)
            if endpoint.node == self._networks.node_name
            for item in endpoint.addresses
        }
        await self._kernel.forget_connections(network.namespace, [item.original for item in services])
        kept = [carried.handed_over(item) for item in services if item.reply.source in here]
        await self._kernel.put_connections(network.namespace, kept)

    async def _look(self, network: Network, segment: Segment, home: int) -> tuple[Connection, ...]:
        addresses = tuple(sorted(segment.addresses, key=str))
        return carried.outgoing(segment, await self._kernel.connections_of(network.namespace, addresses), home)


def _changed(before: tuple[Connection, float] | None, now: Connection, at: float) -> bool:
    """Whether a connection is to be told: its time alone makes no difference for a while."""
    if before is None or at - before[1] > _REPEAT_SECONDS:
        return True
    known = before[0]
    same = (known.reply, known.status, known.mark, known.tcp) == (now.reply, now.status, now.mark, now.tcp)
    return not same


async def _first(event: asyncio.Event, seconds: float, attentive: bool) -> None:
    """Wait so long, or (``attentive``) until the event."""
    if not attentive or event.is_set():
        await asyncio.sleep(seconds)
        return
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
