"""What this agent knows of itself and its node, for ``vmnet status``: networks are looked at when it is asked.

What the kernel has is looked at then and there; a node with very many networks answers, for those that it does not come
to in time, what its self-test has found last.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

from vmnet.agent.cluster import Stores
from vmnet.agent.networks import Networks
from vmnet.agent.self_test import SelfTest
from vmnet.kernel.api import Gone, Kernel, KernelError
from vmnet.model.endpoint import Endpoint
from vmnet.model.network import Network
from vmnet.plan.state import NetworkState
from vmnet.runtime.queue import KeyedQueue

LOOK_SECONDS: Final = 10.0
"""For looking at networks; what is left then has the last self-test's result."""


class SelfReport:
    """One agent's."""

    def __init__(
        self,
        kernel: Kernel,
        networks: Networks,
        self_test: SelfTest,
        stores: Stores,
        queues: Mapping[str, KeyedQueue],
        *,
        missing: Callable[[], Sequence[str]],
        chained: Callable[[], Mapping[str, str | None]] | None,
    ) -> None:
        """``queues`` by the kind of their keys. ``missing``: what keeps the agent from being ready. ``chained``: the
        plugin's place in the node's chain; None where somebody else has put it there."""
        self._kernel = kernel
        self._networks = networks
        self._self_test = self_test
        self._stores = stores
        self._queues = queues
        self._missing = missing
        self._chained = chained
        self._began = time.time()

    async def answer(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """The report, as JSON has it; the fields of ``vmnet status --local -o json``."""
        until = time.monotonic() + LOOK_SECONDS
        networks = [await self._network(name, until) for name in sorted(self._networks.known())]
        return {
            "node": self._networks.node_name,
            "version": version("vmnet"),
            "pid": os.getpid(),
            "startedAt": self._began,
            "notReady": list(self._missing()),
            "cniConfiguration": dict(self._chained()) if self._chained is not None else None,
            "watches": [
                {
                    "kind": store.resource.plural,
                    "synced": store.synced.is_set(),
                    "failure": str(store.failure) if store.failure is not None else None,
                }
                for store in self._stores.all()
            ],
            "failing": [
                {"kind": kind, "key": key, "times": times, "error": why}
                for kind, queue in self._queues.items()
                for key, (times, why) in sorted(queue.failing().items())
            ],
            "faults": await self._node_faults(),
            "networks": networks,
        }

    async def _node_faults(self) -> list[str]:
        try:
            return [fault.says for fault in await self._self_test.now("")]
        except KernelError as error:
            return [f"the node cannot be looked at: {error}"]

    async def _network(self, name: str, until: float) -> dict[str, Any]:
        network = self._networks.present(name)
        if time.monotonic() > until:
            told = self._self_test.report().get(name)
            return {**_described(name, network), "looked": "self-test", "faults": told or []}
        try:
            faults = [fault.says for fault in await self._self_test.now(name)]
            observed = await self._kernel.observe_network(network.namespace) if network is not None else None
        except Gone:
            return {**_described(name, network), "looked": "now", "faults": []}  # it goes away, or comes
        except KernelError as error:
            return {**_described(name, network), "looked": "now", "faults": [f"it cannot be looked at: {error}"]}
        return {
            **_described(name, network),
            "looked": "now",
            "faults": faults,
            "ports": _ports(observed, self._networks.attached(name)) if observed is not None else [],
        }


def _described(name: str, network: Network | None) -> dict[str, Any]:
    if network is None:
        return {"name": name, "present": False}
    return {
        "name": name,
        "present": True,
        "id": network.id,
        "namespace": network.namespace,
        "topology": network.topology.value,
        "role": network.role.value,
        "subnets": [str(subnet) for subnet in network.subnets],
        "gateways": [str(gateway) for gateway in network.gateways],
    }


def _ports(observed: NetworkState, endpoints: Iterable[Endpoint]) -> list[dict[str, Any]]:
    """Each port: whose it is, and whether it carries frames (``open``), waits for its guest (``standby``) or was closed
    because its guest is elsewhere (``moved``)."""
    owners = {endpoint.port: endpoint for endpoint in endpoints}
    found = []
    for link in sorted(observed.ports(), key=lambda item: item.name):
        owner = owners.get(link.name)
        if observed.waits(link.name):
            state = "standby"
        elif owner is not None and owner.mac in observed.moved:
            state = "moved"
        else:
            state = "open"
        found.append(
            {
                "port": link.name,
                "state": state,
                "pod": f"{owner.pod.namespace}/{owner.pod.name}" if owner is not None else None,
                "machine": f"{owner.machine.namespace}/{owner.machine.name}"
                if owner is not None and owner.machine is not None
                else None,
                "mac": owner.mac if owner is not None else None,
                "addresses": [str(item.ip) for item in owner.addresses] if owner is not None else [],
            }
        )
    return found
