"""Looks, again and again, whether each network of this node can carry what it is there for, and has it mended.

What is found is told at once: as a metric, in the log, as an event on the Node, and to whoever asks over HTTP. A
network that is broken leaves the node ready: the others work, and a new pod of that one mends it too.
"""

import asyncio
import logging
import secrets
import struct
import time
from collections.abc import Callable
from typing import Final, Literal

from vmnet import metrics
from vmnet.agent.networks import Networks
from vmnet.kernel.api import Gone, Kernel, KernelError
from vmnet.kube.api import Object
from vmnet.kube.events import Recorder
from vmnet.model.addresses import IPAddress
from vmnet.model.network import Network, Role
from vmnet.plan.health import Fault, Part
from vmnet_dns import message

log = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 3.0
"""The gateway is asked on this machine: what is later than this does not come."""
MEND_SECONDS: Final = 1.0
"""After a fault the network is looked at again this soon, for mending was asked for; then twice as late each time."""
SHARE: Final = 0.05
"""Of the time, at most, that looking takes: a node with very many networks looks less often."""
LONGEST_LOOK: Final = 0.5
"""Seconds that count for that share: what takes longer waits for others."""
_DNS_PORT: Final = 53
_SOA: Final = 6
_IN: Final = 1
_TWICE: Final = frozenset({Part.POD, Part.ANSWER})
"""What a pod that ends, or a machine that is busy, looks like for a moment: told when it is found a second time."""


class SelfTest:
    """One node's."""

    def __init__(
        self,
        kernel: Kernel,
        networks: Networks,
        recorder: Recorder,
        mend: Callable[[str], None],
        mend_node: Callable[[], None],
        *,
        node: Callable[[], Object | None],
        domain: str,
        period: float,
        answers: Callable[[Network], bool] = lambda network: network.role is Role.PRIMARY,
    ) -> None:
        """``mend``: asks for a network to be rendered. ``node``: the Node, to write events on. ``period``: seconds."""
        self._kernel = kernel
        self._networks = networks
        self._recorder = recorder
        self._mend = mend
        self._mend_node = mend_node
        self._node = node
        self._domain = domain
        self._period = period
        self._answers = answers
        self._found: dict[str, tuple[Fault, ...]] = {}
        """What the last look found, by network; the node's own under the empty name."""
        self._told: dict[str, tuple[Fault, ...]] = {}
        self._tries: dict[str, int] = {}

    def node_faults(self) -> tuple[Fault, ...]:
        """What is wrong with the node's own namespace, as of the last look."""
        return self._told.get("", ())

    def report(self) -> dict[str, list[str]]:
        """Networks that were looked at, each with what is wrong with it."""
        return {name: [fault.says for fault in found] for name, found in sorted(self._told.items()) if name}

    async def now(self, name: str) -> tuple[Fault, ...]:
        """What is wrong with a network (or, for the empty name, the node) at this moment; nothing is told or mended.

        What for a moment looks like a fault counts if the last look saw it too. Raises KernelError.
        """
        faults = await self._examine(name)
        before = self._found.get(name, ())
        return tuple(fault for fault in faults or () if fault.part not in _TWICE or fault in before)

    async def run(self) -> None:
        """Look until cancelled. The networks of a node take turns."""
        due: dict[str, float] = {}
        while True:
            now = time.monotonic()
            present = {"", *self._networks.known()}
            for gone in due.keys() - present:
                del due[gone]
                self._forget(gone)
            for place, name in enumerate(sorted(present - due.keys())):
                # Networks that are new together are not looked at together ever after.
                due[name] = now + (place % 16) * min(self._period, 30.0) / 16 if due else now
            name = min(due, key=lambda item: due[item])
            if due[name] > now:
                # New networks are seen at the latest after a second.
                await asyncio.sleep(min(due[name] - now, 1.0))
                continue
            faults = await self.look(name)
            took = time.monotonic() - now
            due[name] = time.monotonic() + (min(self._period, self._again(name)) if faults else self._period)
            await asyncio.sleep(min(took, LONGEST_LOOK) * (1 / SHARE - 1))

    async def look(self, name: str) -> tuple[Fault, ...]:
        """One look at a network (or, for the empty name, at the node), with all that follows; what is wrong."""
        try:
            faults = await self._examine(name)
        except Gone:
            return self._told.get(name, ())  # it goes away, or comes again: the next look tells
        except KernelError as error:
            log.warning("%s could not be looked at: %s", _called(name), error)
            return self._told.get(name, ())
        if faults is None:
            self._forget(name)
            return ()
        before, self._found[name] = self._found.get(name, ()), faults
        certain = tuple(fault for fault in faults if fault.part not in _TWICE or fault in before)
        await self._tell(name, certain)
        if faults:
            self._mend(name) if name else self._mend_node()
        return faults

    async def _examine(self, name: str) -> tuple[Fault, ...] | None:
        if not name:
            return await self._networks.examine_node()
        found = await self._networks.examine(name)
        network = self._networks.present(name)
        if found == () and network is not None and self._answers(network):
            silent = [gateway for gateway in network.gateways if not await self._answered(network, gateway)]
            return tuple(Fault(Part.ANSWER, f"gateway {gateway} does not answer DNS") for gateway in silent)
        return found

    async def _answered(self, network: Network, gateway: IPAddress) -> bool:
        """Whether the responder at a gateway's address answers somebody in the network's namespace."""
        identifier = secrets.token_bytes(2)
        header = identifier + struct.pack("!HHHHH", 0, 1, 0, 0, 0)
        query = header + message.encode_name(self._domain) + struct.pack("!HH", _SOA, _IN)
        opened = await self._kernel.udp_socket(network.namespace, gateway, 0)
        loop = asyncio.get_running_loop()
        with opened:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await loop.sock_sendto(opened, query, (str(gateway), _DNS_PORT))
                    while (await loop.sock_recv(opened, 2048))[:2] != identifier:
                        pass
            except (TimeoutError, OSError):
                return False
        return True

    async def _tell(self, name: str, faults: tuple[Fault, ...]) -> None:
        before = self._told.get(name)
        self._told[name] = faults
        if name:
            metrics.NETWORK_HEALTHY.labels(name, self._networks.node_name).set(0 if faults else 1)
        if not faults:
            self._tries.pop(name, None)
            if before:
                log.info("%s is whole again", _called(name))
                await self._event("NetworkMended", f"{_called(name)} is whole again", "Normal")
            return
        if faults == before:
            return
        for fault in set(faults) - set(before or ()):
            metrics.NETWORK_FAULTS.labels(name, self._networks.node_name, fault.part.value).inc()
        says = "; ".join(fault.says for fault in faults)
        log.warning("%s is broken, and is being mended: %s", _called(name), says)
        step = "if it is not mended in a minute: vmnet status, docs/runbooks/VmnetNetworkBroken.md"
        await self._event("NetworkBroken", f"{_called(name)} is broken, and is being mended: {says}", "Warning", step)

    async def _event(self, reason: str, says: str, kind: Literal["Normal", "Warning"], step: str = "") -> None:
        node = self._node()
        if node is not None:
            await self._recorder.event({"apiVersion": "v1", "kind": "Node", **node}, reason, says, kind, next_step=step)

    def _again(self, name: str) -> float:
        tries = self._tries[name] = self._tries.get(name, 0) + 1
        return float(MEND_SECONDS * 2 ** min(tries - 1, 10))

    def _forget(self, name: str) -> None:
        self._found.pop(name, None)
        self._told.pop(name, None)
        self._tries.pop(name, None)
        metrics.forget_network_health(name, self._networks.node_name)


def _called(name: str) -> str:
    return f"network {name}" if name else "the node's part of all networks"
