"""Cut-over of migrating machines on this node.

The kernel does the urgent part by itself: the guest's first RARP opens the target's port, closes the source's and
repoints every bridge (``plan.firewall``). The agent, woken by the same frame, makes permanent what the frame did,
announces the machine, measures, and acts in the frame's place when KubeVirt's word comes first.
"""

import asyncio
import json
import logging
import socket
import struct
import time
from dataclasses import asdict, dataclass
from typing import Final

from vmnet import metrics
from vmnet.agent import facts
from vmnet.agent.announcer import Announcer
from vmnet.agent.carry import Arrivals
from vmnet.agent.cluster import Cluster
from vmnet.agent.networks import Networks
from vmnet.kernel.api import Kernel, KernelError
from vmnet.kube.api import PODS, Kube, KubeError
from vmnet.model import addresses, names
from vmnet.model.endpoint import Endpoint, MachineReference, PodReference, PortState
from vmnet.model.migration import CutOver, Key, LastFrame
from vmnet.model.names import InterfaceName
from vmnet.model.network import Network
from vmnet.runtime.tasks import TaskSet

log = logging.getLogger(__name__)

RARP: Final = 0x8035
SO_TIMESTAMPNS: Final = 35
"""asm-generic/socket.h; Python's socket module does not name it."""
FIRST_FRAME_TIMEOUT: Final = 10.0
"""Seconds to wait for a frame towards the guest before the record is written without one."""
CONNECTIONS_TIMEOUT: Final = 5.0
"""Seconds that the record waits for the connections that come along."""
_BATCH: Final = 64
_DISCOVERY: Final = tuple(bytes([number]) for number in range(133, 137))
"""ICMPv6 types of neighbour and router discovery (RFC 4861 section 4)."""
_TIMESPEC: Final = struct.Struct("qq")


@dataclass(slots=True)
class _Staged:
    """A standby port: sockets that wait for its guest's RARP and for the first frame to it."""

    network: Network
    endpoint: Endpoint
    frames: socket.socket
    key: Key | None = None
    opened_at: float = 0.0
    frame_at: float | None = None
    annotation_at: float | None = None
    first_frame_at: float | None = None
    first_frame: asyncio.Event | None = None


class CutOvers:
    """Standby ports of this node, and the machines that leave it."""

    def __init__(
        self,
        kernel: Kernel,
        kube: Kube,
        cluster: Cluster,
        networks: Networks,
        announcer: Announcer,
        arrivals: Arrivals,
    ) -> None:
        self._kernel = kernel
        self._kube = kube
        self._cluster = cluster
        self._networks = networks
        self._announcer = announcer
        self._arrivals = arrivals
        self._staged: dict[InterfaceName, _Staged] = {}
        self._tasks = TaskSet()
        self._gone: dict[MachineReference, float] = {}

    async def stage(self, network: Network, mtu: int, endpoint: Endpoint, state: PortState) -> None:
        """Make ready for a machine's port: frames to announce it are built now, not at cut-over. Raises KernelError."""
        if endpoint.machine is None or not network.stretched:
            return
        await self._announcer.prepare(network, mtu, endpoint)
        if state is PortState.ACTIVE or endpoint.port in self._staged:
            return
        frames = await self._kernel.packet_socket(network.namespace, endpoint.port)
        frames.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        staged = _Staged(network, endpoint, frames, first_frame=asyncio.Event())
        self._staged[endpoint.port] = staged
        asyncio.get_running_loop().add_reader(frames, self._receive, staged)
        self._arrivals.expect(network, endpoint)

    def catch_up(self, network: Network, endpoint: Endpoint) -> None:
        """A guest's frame opened its port while no agent ran: announce the machine now, and write down what is known.

        Call it after ``stage``. A port whose record is there already is left alone.
        """
        machine, pod = endpoint.machine, self._cluster.pod(f"{endpoint.pod.namespace}/{endpoint.pod.name}")
        if machine is None or pod is None or names.CUT_OVER_ANNOTATION in facts.annotations(pod):
            return
        self._announcer.announce(endpoint, asyncio.get_running_loop().time())
        log.info("machine %s/%s: its frame opened the port before this agent ran", *machine_names(machine))
        self._arrivals.expect(network, endpoint)
        self._arrivals.arrived(endpoint)
        self._tasks.start(self._record_missed(network, endpoint, machine), f"record {machine.namespace}/{machine.name}")

    async def _record_missed(self, network: Network, endpoint: Endpoint, machine: MachineReference) -> None:
        sent = await self._announcer.settled(endpoint)
        came_along = await self._arrivals.settled(endpoint, CONNECTIONS_TIMEOUT)
        last_frame = self._arrivals.last_frame(endpoint)
        node = self._networks.node_name
        cut_over = CutOver(
            machine,
            network.name,
            node,
            Key.FRAME,
            opened_at=None,
            announcements=sent.total(),
            source=self._source(endpoint),
            carried=came_along,
            last_frame=last_frame,
        )
        await self._write(endpoint.pod, cut_over)

    def _source(self, endpoint: Endpoint) -> str:
        node = self._cluster.came_from(endpoint)
        return node.name if node is not None else ""

    def forget(self, endpoint: Endpoint) -> None:
        """The port is gone."""
        self._arrivals.forget(endpoint)
        self._announcer.forget(endpoint)
        staged = self._staged.pop(endpoint.port, None)
        if staged is not None:
            self._stop_listening(staged)

    async def close(self) -> None:
        """Give up sockets and tasks; the kernel's gate goes on without an agent."""
        for staged in self._staged.values():
            self._stop_listening(staged)
        self._staged.clear()
        await self._tasks.close()

    async def reconcile(self, reference: MachineReference) -> float | None:
        """Compare what the API says of a machine with what the kernel's gate did, and act where they must agree.

        Seconds after which to look again, None: when something changes.

        The kernel is ahead of the API during a migration: the API's word closes or opens a port only when it is later
        knowledge (ready-timestamp, the VMI's node, a failure), never because it has not heard of the frame yet.
        """
        pods = self._cluster.machine_pods(reference)
        if pods:
            self._gone.pop(reference, None)
        for pod in pods:
            for endpoint in self._cluster.endpoints_of(f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"):
                found = self._cluster.attachment_of(endpoint.network)
                here = endpoint.node == self._networks.node_name
                if found is not None and found.network.stretched and here:
                    await self._reconcile_port(found.network, endpoint)
        return None if pods or self._cluster.machine(reference) is not None else self._forget_series(reference)

    def _forget_series(self, reference: MachineReference) -> float | None:
        """The machine has gone; what is measured of it goes later."""
        now = asyncio.get_running_loop().time()
        left = self._gone.setdefault(reference, now) + metrics.FORGET_SECONDS - now
        if left > 0:
            return left
        del self._gone[reference]
        metrics.forget_machine(reference.namespace, reference.name)
        return None

    async def _reconcile_port(self, network: Network, endpoint: Endpoint) -> None:
        gate = await self._networks.gate(network, endpoint)
        if gate is None or endpoint.machine is None:
            return
        live = self._cluster.is_live(endpoint)
        settled = self._cluster.settled(endpoint.machine)
        staged = self._staged.get(endpoint.port)
        if live and not gate.open:
            if gate.waiting and staged is not None and staged.key is None:
                # KubeVirt says the guest runs here, and no frame of its own has opened the port.
                staged.annotation_at = time.time()
                await self._open(staged, Key.ANNOTATION, staged.annotation_at)
            elif settled or self._cluster.unrivalled(endpoint):
                # It came back: the other pod died, or the migration failed after the guest had spoken there. The next
                # migration may have begun already; until its pod runs, the guest can only be here.
                await self._networks.open(network, endpoint)
                self._announcer.announce(endpoint, asyncio.get_running_loop().time())
        elif live and staged is not None and staged.key is not None and staged.annotation_at is None:
            staged.annotation_at = time.time()
        elif not live and gate.open and (settled or self._cluster.is_source(endpoint)):
            # A target whose guest has spoken is open before the API knows, even before the store that names the
            # migration; so only a pod that is named as source closes before the migration is over.
            await self._networks.close_moved(network, endpoint)
            self._announcer.cancel(endpoint)

    # The frame

    def _receive(self, staged: _Staged) -> None:
        for _ in range(_BATCH):
            try:
                frame, ancillary, _, address = staged.frames.recvmsg(64, 64)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                log.info("port %s: %s", staged.endpoint.port, error)
                self._stop_listening(staged)
                return
            outgoing = address[2] == socket.PACKET_OUTGOING
            if outgoing:
                if staged.key is not None and staged.first_frame_at is None and _is_traffic(frame, staged.endpoint):
                    staged.first_frame_at = _time(ancillary)
                    if staged.first_frame is not None:
                        staged.first_frame.set()
                    self._stop_listening(staged)
                    return
                continue
            if staged.frame_at is None and _is_rarp_of(frame, staged.endpoint):
                self._arrivals.arrived(staged.endpoint)
                staged.frame_at = _time(ancillary)
                if staged.key is None:
                    self._tasks.start(
                        self._open(staged, Key.FRAME, staged.frame_at), f"cut-over {staged.endpoint.pod.name}"
                    )

    async def _open(self, staged: _Staged, key: Key, at: float) -> None:
        """One of the keys came: the first one counts."""
        if staged.key is not None:
            return
        staged.key, staged.opened_at = key, at
        self._arrivals.arrived(staged.endpoint)
        endpoint = staged.endpoint
        try:
            if key is Key.ANNOTATION:
                await self._networks.open(staged.network, endpoint)
                staged.opened_at = time.time()
            else:
                await self._networks.reassert(staged.network, endpoint)
        except KernelError as error:
            log.error("machine %s: cut-over on port %s: %s", endpoint.machine, endpoint.port, error)
            staged.key = None
            raise
        self._announcer.announce(endpoint, asyncio.get_running_loop().time())
        machine = endpoint.machine
        if machine is not None:
            labels = (machine.namespace, machine.name, self._networks.node_name, staged.network.name)
            metrics.MIGRATION_CUT_OVER.labels(*labels, key.value).observe(max(0.0, time.time() - at))
            log.info("machine %s/%s: port opened by its %s", machine.namespace, machine.name, key.value)
            self._tasks.start(self._record(staged, machine), f"record {machine.namespace}/{machine.name}")

    async def _record(self, staged: _Staged, machine: MachineReference) -> None:
        """Write what was seen onto the target pod, once the announcements are over."""
        if staged.first_frame is not None:
            try:
                await asyncio.wait_for(staged.first_frame.wait(), FIRST_FRAME_TIMEOUT)
            except TimeoutError:
                log.info("machine %s/%s: no frame towards it within %g s", *machine_names(machine), FIRST_FRAME_TIMEOUT)
        sent = await self._announcer.settled(staged.endpoint)
        came_along = await self._arrivals.settled(staged.endpoint, CONNECTIONS_TIMEOUT)
        last_frame = self._arrivals.last_frame(staged.endpoint)
        self._measure(staged, machine, last_frame)
        cut_over = CutOver(
            machine=machine,
            network=staged.network.name,
            node=self._networks.node_name,
            key=staged.key or Key.FRAME,
            opened_at=staged.opened_at,
            frame_at=staged.frame_at,
            annotation_at=staged.annotation_at,
            first_frame_at=staged.first_frame_at,
            announcements=sent.total(),
            source=self._source(staged.endpoint),
            last_frame=last_frame,
            carried=came_along,
        )
        await self._write(staged.endpoint.pod, cut_over)
        self._stop_listening(staged)
        self._staged.pop(staged.endpoint.port, None)

    def _measure(self, staged: _Staged, machine: MachineReference, last_frame: LastFrame | None) -> None:
        """Count how long each part took; what nobody saw counts nowhere."""
        labels = (machine.namespace, machine.name, self._networks.node_name, staged.network.name)
        left_at = None if last_frame is None else last_frame.at
        for metric, begun, ended in (
            (metrics.MIGRATION_DELIVERY, staged.opened_at, staged.first_frame_at),
            (metrics.MIGRATION_PAUSE, left_at, staged.frame_at),
            (metrics.MIGRATION_BLACKOUT, left_at, staged.first_frame_at),
        ):
            if begun is not None and ended is not None:
                metric.labels(*labels).observe(max(0.0, ended - begun))

    async def _write(self, pod: PodReference, cut_over: CutOver) -> None:
        endpoints = self._cluster.endpoints_of(f"{pod.namespace}/{pod.name}")
        if endpoints and endpoints[0].network != cut_over.network:
            # One record for each migration: of the primary network, or else the first that the machine names.
            return
        body = {"metadata": {"uid": pod.uid, "annotations": {names.CUT_OVER_ANNOTATION: json.dumps(asdict(cut_over))}}}
        try:
            await self._kube.patch(PODS, pod.name, body, pod.namespace)
        except KubeError as error:
            log.warning("pod %s/%s: the record of its cut-over is not written: %s", pod.namespace, pod.name, error)

    def _stop_listening(self, staged: _Staged) -> None:
        if staged.frames.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(staged.frames)
            staged.frames.close()


def machine_names(machine: MachineReference) -> tuple[str, str]:
    """Namespace and name, for log lines."""
    return machine.namespace, machine.name


def _is_traffic(frame: bytes, endpoint: Endpoint) -> bool:
    """False for what the agent itself sends to a guest that has just arrived: ARP, RARP and neighbour discovery."""
    kind = frame[12:14]
    discovery = kind == b"\x86\xdd" and frame[20:21] == b"\x3a" and frame[54:55] in _DISCOVERY
    return kind not in (b"\x08\x06", b"\x80\x35") and not discovery and frame[6:12] != addresses.mac_bytes(endpoint.mac)


def _is_rarp_of(frame: bytes, endpoint: Endpoint) -> bool:
    """A RARP from the machine's own MAC: the same test as the kernel's gate makes."""
    return frame[12:14] == RARP.to_bytes(2, "big") and frame[6:12] == addresses.mac_bytes(endpoint.mac)


def _time(ancillary: list[tuple[int, int, bytes]]) -> float:
    """Kernel receive time of a frame, seconds since the epoch; the present when the kernel gave none."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS and len(data) >= _TIMESPEC.size:
            seconds, nanoseconds = _TIMESPEC.unpack_from(data)
            return float(seconds + nanoseconds / 1e9)
    return time.time()
