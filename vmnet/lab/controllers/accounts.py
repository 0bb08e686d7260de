"""Every namespace has a service account ``default``."""

from vmnet.kube.api import NAMESPACES, AlreadyExists, Forbidden, Kube, NotFound
from vmnet.lab.controllers.cluster import SERVICE_ACCOUNTS, Informers, is_terminating


class Accounts:
    """Reconciles namespaces by name."""

    def __init__(self, kube: Kube, informers: Informers) -> None:
        self._kube = kube
        self._informers = informers

    async def reconcile(self, namespace: str) -> float | None:
        """Create the account where it is missing."""
        found = self._informers[NAMESPACES].get(namespace)
        if found is None or is_terminating(found):
            return None
        if self._informers[SERVICE_ACCOUNTS].get(f"{namespace}/default") is not None:
            return None
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
        try:
            await self._kube.create(SERVICE_ACCOUNTS, account, namespace)
        except (AlreadyExists, NotFound, Forbidden):
            # It is there already, or the namespace went meanwhile.
            return None
        return None
