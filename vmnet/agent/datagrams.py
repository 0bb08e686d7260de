"""Leads datagrams away from backends that have gone.

A new table is for new connections; conntrack takes whoever goes on sending datagrams for an old one, for ever. So when
a backend goes, after the tables that do without it, its entries are deleted; and when there is something new to ask
for, those of who asked too early. An agent that starts looks once at what happened while there was none.
"""

import logging
from collections.abc import Callable, Iterable, Mapping

from vmnet.kernel.api import Kernel
from vmnet.model import names
from vmnet.model.endpoint import Endpoint
from vmnet.model.names import NetworkId
from vmnet.model.network import Network
from vmnet.plan.services import Place, astray, stale

log = logging.getLogger(__name__)

Backends = Mapping[Place, frozenset[Place]]
Ways = tuple[Mapping[Place, Place], Mapping[tuple[int, int], Place]]
"""Where the node leads: by external address, and by family and node port."""


class Datagrams:
    """A ``NetworkService``: it is told after a network's tables have been loaded."""

    def __init__(
        self, kernel: Kernel, backends: Callable[[str], Backends], ways: Callable[[], Ways] = lambda: ({}, {})
    ) -> None:
        """``backends``: of a network, who may answer datagrams, by what may be asked for; ``ways``: the node's."""
        self._ways = ways
        self._known_ways: Ways | None = None
        self._kernel = kernel
        self._backends = backends
        self._known: dict[NetworkId, Backends] = {}
        self._spared: set[NetworkId] = set()
        """Networks where a machine's entries were left: it may be between two pods, or on its way out."""

    async def follow(
        self, network: Network, mtu: int, local: Iterable[Endpoint], everywhere: Iterable[Endpoint]
    ) -> None:
        """Delete the entries that lead to who may not answer any more. Raises KernelError.

        A machine that migrates is for a moment no endpoint of its Services, and afterwards is not on the node that its
        flows came in by (policy Local): they go on for as long as it has its address.
        """
        wanted, before = self._backends(network.name), self._known.get(network.id)
        if before is None:
            look = bool(wanted)
        else:
            look = (
                network.id in self._spared
                or not wanted.keys() <= before.keys()  # who asked before it was there is remembered as not led anywhere
                or any(answering - wanted.get(asked, frozenset()) for asked, answering in before.items())
            )
        if look:
            namespace = names.network_namespace(network.id)
            former = before.keys() - wanted.keys() if before is not None else frozenset[Place]()
            found = stale(await self._kernel.datagrams(namespace), wanted, former)
            machines = {
                item.ip for endpoint in everywhere if endpoint.machine is not None for item in endpoint.addresses
            }
            spared = {entry for entry in found if entry.backend in machines and (entry.asked, entry.port) not in former}
            (self._spared.add if spared else self._spared.discard)(network.id)
            found -= spared
            if found:
                count = await self._kernel.forget_datagrams(namespace, found)
                log.info("network %s: %d flows of datagrams have lost their backend", network.name, count)
        self._known[network.id] = wanted

    async def follow_node(self) -> None:
        """Delete the node's own entries that lead into a network that has lost the node port or the external address.

        Told after the node's tables have been loaded. Raises KernelError.
        """
        wanted, before = self._ways(), self._known_ways
        lost = before is None or not (before[0].items() <= wanted[0].items() and before[1].items() <= wanted[1].items())
        if lost:
            found = astray(await self._kernel.datagrams(None), *wanted)
            if found:
                count = await self._kernel.forget_datagrams(None, found)
                log.info("node: %d flows of datagrams have lost their way into a network", count)
        self._known_ways = wanted

    async def leave(self, network_id: NetworkId) -> None:
        """Its conntrack goes with its namespace."""
        self._known.pop(network_id, None)
        self._spared.discard(network_id)
