"""Tells everyone where a machine is after it has moved to this node: frames built before, sent on a schedule."""

import asyncio
import logging
import random
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from vmnet import metrics
from vmnet.announce import schedule
from vmnet.announce.announcement import Announcement, Kind, announcements
from vmnet.announce.schedule import Draw, Rounds
from vmnet.kernel.api import Kernel
from vmnet.model import names
from vmnet.model.endpoint import Endpoint
from vmnet.model.names import InterfaceName, MacAddress, NetworkId
from vmnet.model.network import Network
from vmnet.wire import arp
from vmnet.wire.ethernet import EtherType
from vmnet.wire.lease import lease_of
from vmnet.wire.malformed import Malformed

_LOG: Final = logging.getLogger(__name__)
_BATCH: Final = 64
_FRAME: Final = 2048


@dataclass(slots=True)
class _Prepared:
    """One endpoint: its frames, and how far they have been sent."""

    endpoint: Endpoint
    network: NetworkId
    announcements: tuple[Announcement, ...]
    rounds: Rounds = field(default=Rounds(()))
    sent: Counter[Kind] = field(default_factory=Counter)
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Announcer:
    """Announces machines of this node. Times are the running loop's clock.

    A reverse ARP for a machine that arrives over the fabric says that it has moved on: its announcements end at once,
    in whatever order the API tells the rest.
    """

    def __init__(
        self,
        kernel: Kernel,
        cluster_domain: str,
        *,
        draw: Draw = random.uniform,
        on_moved: Callable[[Endpoint], None] = lambda endpoint: None,
    ) -> None:
        """``on_moved``: told of an endpoint whose machine another node has announced, which has closed its port."""
        self._on_moved = on_moved
        self._kernel = kernel
        self._cluster_domain = cluster_domain
        self._draw = draw
        self._prepared: dict[InterfaceName, _Prepared] = {}
        self._sockets: dict[NetworkId, dict[InterfaceName, socket.socket]] = {}
        self._opening = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None

    async def prepare(self, network: Network, mtu: int, endpoint: Endpoint) -> None:
        """Build the frames and open the sockets that ``announce`` will need; ``mtu`` in octets. Raises KernelError.

        Safe to repeat: a series that runs goes on, with the new frames.
        """
        built = announcements(lease_of(network, endpoint, mtu, self._cluster_domain))
        async with self._opening:
            if network.id not in self._sockets:
                self._sockets[network.id] = await self._open(network)
        prepared = self._prepared.get(endpoint.port)
        if prepared is None:
            self._prepared[endpoint.port] = _Prepared(endpoint, network.id, built)
        else:
            prepared.endpoint, prepared.announcements = endpoint, built

    def announce(self, endpoint: Endpoint, now: float) -> int:
        """Start the series; its first round leaves before this returns. Gives the number of frames sent.

        While a series runs nothing new begins, so that both keys of one cut-over make one series.
        """
        prepared = self._prepared.get(endpoint.port)
        if prepared is None:
            _LOG.warning("%s/%s was not prepared: not announced", endpoint.pod.namespace, endpoint.pod.name)
            return 0
        if prepared.rounds.next_at() is not None:
            return 0
        prepared.rounds = schedule.announcement_rounds(now, self._draw)
        prepared.sent = Counter()
        prepared.over.clear()
        self._send_round(prepared, now)
        self._arm()
        return prepared.sent.total()

    def cancel(self, endpoint: Endpoint) -> None:
        """End a running series: the port is no longer the active one. It stays prepared."""
        prepared = self._prepared.get(endpoint.port)
        if prepared is not None:
            self._end(prepared)
            self._arm()

    def forget(self, endpoint: Endpoint) -> None:
        """The port is gone; the last one of a network takes its sockets along."""
        prepared = self._prepared.pop(endpoint.port, None)
        if prepared is None:
            return
        self._end(prepared)
        if all(other.network != prepared.network for other in self._prepared.values()):
            self._drop(prepared.network)
        self._arm()

    def remove(self, network_id: NetworkId) -> None:
        """Forget all ports of a network. To be called before its namespace is deleted, which an open socket would keep
        alive."""
        for prepared in tuple(self._prepared.values()):
            if prepared.network == network_id:
                self.forget(prepared.endpoint)
        self._drop(network_id)

    def sent(self, endpoint: Endpoint) -> Counter[Kind]:
        """Frames sent by kind in the endpoint's newest series."""
        prepared = self._prepared.get(endpoint.port)
        return Counter() if prepared is None else Counter(prepared.sent)

    async def settled(self, endpoint: Endpoint) -> Counter[Kind]:
        """Wait until the running series is over, at most some seconds; then as ``sent``."""
        prepared = self._prepared.get(endpoint.port)
        if prepared is None:
            return Counter()
        if prepared.rounds.next_at() is not None:
            await prepared.over.wait()
        return Counter(prepared.sent)

    def close(self) -> None:
        """End everything."""
        for prepared in self._prepared.values():
            self._end(prepared)
        self._prepared.clear()
        for network_id in tuple(self._sockets):
            self._drop(network_id)
        self._arm()

    async def _open(self, network: Network) -> dict[InterfaceName, socket.socket]:
        opened: dict[InterfaceName, socket.socket] = {}
        try:
            for interface in (names.VXLAN_L2, names.BRIDGE):
                opened[interface] = await self._kernel.packet_socket(
                    network.namespace, interface, protocols=(EtherType.RARP,)
                )
        except BaseException:
            for opened_socket in opened.values():
                opened_socket.close()
            raise
        opened[names.BRIDGE].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # only sends
        fabric = opened[names.VXLAN_L2]
        asyncio.get_running_loop().add_reader(fabric, self._receive, network.id, fabric)
        return opened

    def _drop(self, network_id: NetworkId) -> None:
        opened = self._sockets.pop(network_id, {})
        if opened:
            asyncio.get_running_loop().remove_reader(opened[names.VXLAN_L2])
        for opened_socket in opened.values():
            opened_socket.close()

    def _receive(self, network_id: NetworkId, fabric: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                frame, address = fabric.recvfrom(_FRAME)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._lose(network_id, error)
                return
            if address and address[2] == socket.PACKET_OUTGOING:
                continue
            try:
                self._moved_on(network_id, arp.decode(frame).sender_mac)
            except Malformed:
                metrics.MALFORMED.labels(self._network_name(network_id), "rarp").inc()

    def _moved_on(self, network_id: NetworkId, mac: MacAddress) -> None:
        for prepared in self._prepared.values():
            if prepared.network == network_id and prepared.endpoint.mac == mac:
                self._end(prepared)
                self._on_moved(prepared.endpoint)
        self._arm()

    def _network_name(self, network_id: NetworkId) -> str:
        return next((item.endpoint.network for item in self._prepared.values() if item.network == network_id), "")

    def _end(self, prepared: _Prepared) -> None:
        prepared.rounds = Rounds(())
        prepared.over.set()

    def _lose(self, network_id: NetworkId, error: OSError) -> None:
        """The interfaces went away below the sockets; the next ``prepare`` opens others."""
        _LOG.warning("network %s: announcements end: %s", self._network_name(network_id), error)
        self._drop(network_id)
        for prepared in self._prepared.values():
            if prepared.network == network_id:
                self._end(prepared)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        times = [at for prepared in self._prepared.values() if (at := prepared.rounds.next_at()) is not None]
        if times:
            self._timer = asyncio.get_running_loop().call_at(min(times), self._tick)

    def _tick(self) -> None:
        now = asyncio.get_running_loop().time()
        due = [prepared for prepared in self._prepared.values() if prepared.rounds.due(now)]
        for network_id in {prepared.network for prepared in due} & self._sockets.keys():
            # A loop that is late must not announce who has moved on meanwhile.
            self._receive(network_id, self._sockets[network_id][names.VXLAN_L2])
        for prepared in due:
            if prepared.rounds.due(now):
                self._send_round(prepared, now)
        self._arm()

    def _send_round(self, prepared: _Prepared, now: float) -> None:
        prepared.rounds = prepared.rounds.after(now)
        opened = self._sockets.get(prepared.network)
        if opened is None:
            self._end(prepared)
            return
        machine = prepared.endpoint.machine
        whole = not prepared.sent or prepared.rounds.next_at() is None
        for announcement in prepared.announcements:
            if not (whole or announcement.repeated):
                continue
            try:
                opened[announcement.interface].send(announcement.frame)
            except (BlockingIOError, InterruptedError):
                continue  # the queue is full; the next round says it again
            except OSError as error:
                self._lose(prepared.network, error)
                return
            prepared.sent[announcement.kind] += 1
            if machine is not None:
                labels = (machine.namespace, machine.name, prepared.endpoint.node, prepared.endpoint.network)
                metrics.ANNOUNCEMENTS.labels(*labels, announcement.kind.value).inc()
        if prepared.rounds.next_at() is None:
            prepared.over.set()
