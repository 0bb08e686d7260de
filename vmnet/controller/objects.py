"""What API objects say: pods, claims, virtual machines. Pure readers over plain JSON."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmnet.kube.api import Object
from vmnet.model import addresses, names
from vmnet.model.addresses import IPAddress, IPInterface
from vmnet.model.names import MacAddress
from vmnet.model.selection import selections

FINISHED_PHASES: Final = frozenset({"Succeeded", "Failed"})
REQUESTED_ADDRESSES_ANNOTATION: Final = "network.kubevirt.io/addresses"
"""On the VMI and its pods: JSON object, network name in the VM spec → list of addresses."""
VMI_KIND: Final = "VirtualMachineInstance"
VM_KIND: Final = "VirtualMachine"


def annotations(item: Object) -> Mapping[str, str]:
    """Annotations, empty when there are none."""
    return item["metadata"].get("annotations") or {}


def labels(item: Object) -> Mapping[str, str]:
    """Labels, empty when there are none."""
    return item["metadata"].get("labels") or {}


def finalizers(item: Object) -> list[str]:
    """Finalizers, empty when there are none."""
    return list(item["metadata"].get("finalizers") or [])


def namespace_of(item: Object) -> str:
    """Namespace, empty for cluster-scoped objects."""
    return str(item["metadata"].get("namespace") or "")


def deleting(item: Object) -> bool:
    """True once deletion was asked for."""
    return bool(item["metadata"].get("deletionTimestamp"))


def owner_reference(item: Object, *, controller: bool = True) -> Mapping[str, Any] | None:
    """The controlling owner reference (or the first one)."""
    references = item["metadata"].get("ownerReferences") or []
    found = next((reference for reference in references if reference.get("controller")), None)
    return found if found is not None or controller else next(iter(references), None)


def seniority(item: Object) -> tuple[str, str]:
    """Sorts the oldest object first."""
    metadata = item["metadata"]
    return str(metadata.get("creationTimestamp") or ""), str(metadata["name"])


def node_of(pod: Object) -> str:
    """Node that a pod is bound to, or an empty string."""
    return str((pod.get("spec") or {}).get("nodeName") or "")


def alive(pod: Object) -> bool:
    """False once the pod has finished: completed launcher pods linger."""
    return (pod.get("status") or {}).get("phase") not in FINISHED_PHASES


def host_network(pod: Object) -> bool:
    """True for pods that live in the node's own network."""
    return bool((pod.get("spec") or {}).get("hostNetwork"))


def is_agent(pod: Object) -> bool:
    """A pod of the agents' service account."""
    return (pod.get("spec") or {}).get("serviceAccountName") == names.AGENT_ACCOUNT


def ready(pod: Object) -> bool:
    """Living, and its condition Ready is true."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return alive(pod) and any(item.get("type") == "Ready" and item.get("status") == "True" for item in conditions)


def is_launcher(pod: Object) -> bool:
    """True for pods that hold a virtual machine."""
    return labels(pod).get(names.LAUNCHER_LABEL) == names.LAUNCHER_LABEL_VALUE


def pod_networks(pod: Object) -> dict[str, Any]:
    """The pod-networks annotation; empty when absent. Raises ValueError when it is not a JSON object."""
    text = annotations(pod).get(names.POD_NETWORKS_ANNOTATION)
    if not text:
        return {}
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"annotation {names.POD_NETWORKS_ANNOTATION} is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"annotation {names.POD_NETWORKS_ANNOTATION} is not a JSON object")
    return entries


@dataclass(frozen=True, slots=True)
class Allocated:
    """One entry of the pod-networks annotation."""

    addresses: tuple[IPInterface, ...]
    mac: MacAddress


def allocated(pod: Object, key: str, *, addressed: bool = True) -> Allocated | None:
    """Entry ``<namespace>/<nad>`` of the pod-networks annotation. Raises ValueError when it cannot be read.

    ``addressed``: the network gives addresses; an entry without any is none then.
    """
    entry = pod_networks(pod).get(key)
    if not isinstance(entry, dict):
        return None
    texts = entry.get("ip_addresses") or [entry[field] for field in ("ip_address",) if field in entry]
    mac = entry.get("mac_address")
    if not isinstance(mac, str) or (addressed and not texts):
        return None
    return Allocated(tuple(addresses.interface(text) for text in texts), addresses.parse_mac(mac))


@dataclass(frozen=True, slots=True)
class Request:
    """A static request: addresses and MAC that somebody named, and the claim that shall hold them."""

    addresses: tuple[IPAddress, ...] = ()
    mac: MacAddress | None = None
    claim: str | None = None


def pod_request(pod: Object) -> Request:
    """Static request of a pod's primary network (``v1.multus-cni.io/default-network``). Raises ValueError."""
    claim = annotations(pod).get(names.PRIMARY_CLAIM_ANNOTATION) or None
    text = annotations(pod).get(names.DEFAULT_NETWORK_ANNOTATION)
    if not text or not text.lstrip().startswith("["):
        # Multus also allows a plain network name there: it names a network, it requests no address.
        return Request(claim=claim)
    try:
        elements = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"annotation {names.DEFAULT_NETWORK_ANNOTATION} is not JSON: {error}") from error
    if len(elements) != 1 or not isinstance(elements[0], dict):
        raise ValueError(f"annotation {names.DEFAULT_NETWORK_ANNOTATION} must be a list of one element")
    element = elements[0]
    return Request(
        addresses=tuple(addresses.interface(text).ip for text in element.get("ips") or []),
        mac=addresses.parse_mac(element["mac"]) if element.get("mac") else None,
        claim=claim or element.get("ipam-claim-reference") or None,
    )


def secondary_request(pod: Object, key: str) -> Request | None:
    """What a pod asks for on the secondary network ``<namespace>/<nad>``; None when it does not ask for that network.

    Raises ValueError.
    """
    for found in selections(pod["metadata"]):
        if found.key == key:
            return Request(found.addresses, found.mac, found.claim)
    return None


def machine_spec(item: Object) -> Mapping[str, Any]:
    """``spec`` of a VMI, or of the VMI that a VM would create."""
    spec: Mapping[str, Any] = item.get("spec") or {}
    if item.get("kind") == VM_KIND or "template" in spec:
        return (spec.get("template") or {}).get("spec") or {}
    return spec


def machine_annotations(item: Object) -> Mapping[str, str]:
    """Annotations of a VMI, or of the VMI that a VM would create."""
    if item.get("kind") == VM_KIND or "template" in (item.get("spec") or {}):
        template = (item.get("spec") or {}).get("template") or {}
        return (template.get("metadata") or {}).get("annotations") or {}
    return annotations(item)


def machine_key(claim: Object) -> str | None:
    """``<namespace>/<name>`` of the VM or VMI that owns a claim."""
    reference = owner_reference(claim, controller=False)
    if reference is None or reference.get("kind") not in (VM_KIND, VMI_KIND):
        return None
    return f"{namespace_of(claim)}/{reference['name']}"


def machine_uids(vmi: Object) -> set[str]:
    """Who may own the claim of a VMI: itself and its VM."""
    parent = owner_reference(vmi)
    return {str(vmi["metadata"].get("uid")), *([str(parent.get("uid"))] if parent is not None else [])}


def machine_networks(item: Object) -> dict[str, str | None]:
    """Names of the networks in the spec of a VM or VMI, each with its ``<namespace>/<nad>``; None: the pod's own."""
    found: dict[str, str | None] = {}
    for entry in machine_spec(item).get("networks") or []:
        attachment = str((entry.get("multus") or {}).get("networkName") or "")
        if "pod" in entry:
            found[str(entry["name"])] = None
        elif attachment:
            found[str(entry["name"])] = attachment if "/" in attachment else f"{namespace_of(item)}/{attachment}"
    return found


def network_name_of(item: Object, key: str | None) -> str | None:
    """Name, in the spec of a VM or VMI, of the network ``<namespace>/<nad>``, or of the pod's primary one (None)."""
    return next((name for name, found in machine_networks(item).items() if found == key), None)


def primary_network_name(item: Object) -> str | None:
    """Name, in the spec of a VM or VMI, of the interface on the pod's primary network."""
    return network_name_of(item, None)


def machine_request(item: Object, network: str) -> Request:
    """Static request of a VM or VMI for its network of that name. Raises ValueError."""
    text = machine_annotations(item).get(REQUESTED_ADDRESSES_ANNOTATION)
    texts: list[str] = []
    if text:
        try:
            wanted = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"annotation {REQUESTED_ADDRESSES_ANNOTATION} is not JSON: {error}") from error
        texts = list(wanted.get(network) or []) if isinstance(wanted, dict) else []
    devices = (machine_spec(item).get("domain") or {}).get("devices") or {}
    mac = next(
        (entry.get("macAddress") for entry in devices.get("interfaces") or [] if entry.get("name") == network), None
    )
    return Request(
        addresses=tuple(addresses.interface(text).ip for text in texts),
        mac=addresses.parse_mac(mac) if mac else None,
    )


def claim_addresses(claim: Object) -> tuple[IPInterface, ...]:
    """``status.ips`` of an IPAMClaim. Raises ValueError."""
    return tuple(addresses.interface(text) for text in (claim.get("status") or {}).get("ips") or [])


def selects(selector: Mapping[str, Any], found: Mapping[str, str]) -> bool:
    """Whether a label selector selects these labels. An empty selector selects everything."""
    for key, value in (selector.get("matchLabels") or {}).items():
        if found.get(key) != value:
            return False
    for requirement in selector.get("matchExpressions") or []:
        key, values = requirement["key"], requirement.get("values") or []
        match requirement["operator"]:
            case "In":
                holds = key in found and found[key] in values
            case "NotIn":
                holds = key not in found or found[key] not in values
            case "Exists":
                holds = key in found
            case "DoesNotExist":
                holds = key not in found
            case operator:
                raise ValueError(f"namespaceSelector: {operator!r} is not an operator")
        if not holds:
            return False
    return True


def shortened(items: Iterable[str], most: int = 10) -> str:
    """A list for a message: sorted, comma-joined, at most ``most`` of them named."""
    listed = sorted(items)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
