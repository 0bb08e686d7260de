"""What runs inside a network's namespace while the network is on this node, behind one shape."""

from collections.abc import Callable, Iterable

from vmnet.agent.guests import GuestServices
from vmnet.agent.responder import Responders
from vmnet.model.endpoint import Endpoint
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role
from vmnet_dns.zone import Record


class AddressService:
    """DHCPv4, DHCPv6 and router advertisements for the machines of this node."""

    def __init__(self, guests: GuestServices) -> None:
        self._guests = guests

    async def follow(
        self, network: Network, mtu: int, local: Iterable[Endpoint], everywhere: Iterable[Endpoint]
    ) -> None:
        """Guests of other nodes are served there."""
        await self._guests.update(network, mtu, local)

    async def leave(self, network_id: NetworkId) -> None:
        """The network leaves this node."""
        self._guests.remove(network_id)


class NameService:
    """The network's DNS responder: it knows every endpoint, wherever it runs."""

    def __init__(self, responders: Responders, records: Callable[[str], Iterable[Record]] = lambda network: ()) -> None:
        self._responders = responders
        self._records = records
        """Names of a network besides its endpoints'."""

    async def follow(
        self, network: Network, mtu: int, local: Iterable[Endpoint], everywhere: Iterable[Endpoint]
    ) -> None:
        """A standby copy of a machine has its addresses already, so the live ones are all there is.

        Only primary networks have a gateway that a responder could listen on, and names.
        """
        if network.role is not Role.PRIMARY:
            return
        await self._responders.update(network, everywhere, self._records(network.name))

    async def leave(self, network_id: NetworkId) -> None:
        """The network leaves this node."""
        await self._responders.remove(network_id)
