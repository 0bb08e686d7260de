"""IPAMClaim (``k8s.cni.cncf.io/v1alpha1``): the addresses that belong to a machine."""

from dataclasses import dataclass

from vmnet.model.addresses import IPInterface


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim: ``network`` is the NAD config's ``name``; ``ips`` is empty until it is filled."""

    namespace: str
    name: str
    network: str
    ips: tuple[IPInterface, ...] = ()
    owner_pod: str | None = None
