"""What runs inside a network's namespace while the network is on this node, behind one shape."""

from collections.abc import Callable, Iterable

from vmnet.agent.guests import GuestServices
from vmnet.agent.responder import Names, Responders
from vmnet.model.endpoint import Endpoint
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role


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

    def __init__(self, responders: Responders, names: Callable[[str], Names]) -> None:
        self._responders = responders
        self._names = names

    async def follow(
        self, network: Network, mtu: int, local: Iterable[Endpoint], everywhere: Iterable[Endpoint]
    ) -> None:
        """Open the responder, or see that it is right. Names that come and go meanwhile do not wait for this.

        Only primary networks have a gateway that a responder could listen on, and names.
        """
        if network.role is not Role.PRIMARY:
            return
        if not self._responders.serves(network):
            await self._responders.serve(network, self._names(network.name))
            # What has changed while the sockets were opened was nobody's yet; from now on names are followed.
            self._responders.follow(network.name, lambda: self._names(network.name))

    async def leave(self, network_id: NetworkId) -> None:
        """The network leaves this node."""
        await self._responders.remove(network_id)
