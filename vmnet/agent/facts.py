"""What API objects say, as values: attachments, endpoints, and which pod of a machine is the live one. Pure."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmnet.kube.api import Object
from vmnet.model import addresses, names, parts
from vmnet.model.endpoint import Endpoint, MachineReference, Node, PodReference
from vmnet.model.names import InterfaceName
from vmnet.model.network import Network, from_nad
from vmnet.model.selection import Selection, selections

log = logging.getLogger(__name__)

FINISHED_PHASES = frozenset({"Succeeded", "Failed"})
MIRROR_ANNOTATION: Final = "kubernetes.io/config.mirror"
"""On the mirror pod of a static pod: the static pod's uid."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A NAD that is ours: ``key`` is ``<namespace>/<nad>``, the key of the pod-networks annotation."""

    key: str
    network: Network


def attachment(nad: Object) -> Attachment | None:
    """The network of a NAD; None when it is not ours or is being deleted. Raises ValueError naming the bad field."""
    network = from_nad(nad)
    if network is None:
        return None
    return Attachment(f"{nad['metadata']['namespace']}/{nad['metadata']['name']}", network)


def subject(old: Object | None, new: Object | None) -> Object:
    """The object that a change is about: its newest state. Raises ValueError when there is neither."""
    item = new or old
    if item is None:
        raise ValueError("a change needs an old or a new object")
    return item


def pod_reference(pod: Object) -> PodReference:
    """Identity of a pod."""
    metadata = pod["metadata"]
    return PodReference(metadata["namespace"], metadata["name"], metadata["uid"])


def annotations(item: Object) -> Mapping[str, str]:
    """Annotations, empty when there are none."""
    return item["metadata"].get("annotations") or {}


def labels(item: Object) -> Mapping[str, str]:
    """Labels, empty when there are none."""
    return item["metadata"].get("labels") or {}


def node_of(pod: Object) -> str:
    """Node a pod is bound to, or an empty string. Never the nodeName *label*: it names the source until switch-over."""
    return str(pod.get("spec", {}).get("nodeName") or "")


def alive(pod: Object) -> bool:
    """False once the pod has finished: completed launcher pods linger."""
    return pod.get("status", {}).get("phase") not in FINISHED_PHASES


def machine_of(pod: Object) -> MachineReference | None:
    """The VM that a virt-launcher pod runs."""
    if labels(pod).get(names.LAUNCHER_LABEL) != names.LAUNCHER_LABEL_VALUE:
        return None
    domain = annotations(pod).get(names.DOMAIN_ANNOTATION)
    return MachineReference(pod["metadata"]["namespace"], domain) if domain else None


def allocation(pod: Object, key: str) -> Mapping[str, Any] | None:
    """Entry ``key`` of the pod-networks annotation; None when it is not there yet. Raises ValueError for bad JSON."""
    text = annotations(pod).get(names.POD_NETWORKS_ANNOTATION)
    if not text:
        return None
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"annotation {names.POD_NETWORKS_ANNOTATION} is not JSON: {error}") from error
    entry = entries.get(key) if isinstance(entries, dict) else None
    return entry if isinstance(entry, dict) else None


def attached(pod: Object) -> frozenset[str]:
    """NADs by which a pod has something; none where the annotation cannot be read."""
    try:
        entries = json.loads(annotations(pod).get(names.POD_NETWORKS_ANNOTATION) or "{}")
    except json.JSONDecodeError:
        return frozenset()
    return frozenset(key for key in entries if "/" in key) if isinstance(entries, dict) else frozenset()


def secondaries(pod: Object) -> tuple[Selection, ...]:
    """The secondary networks that a pod asks for and may have. Raises ValueError for a bad annotation."""
    metadata = pod["metadata"]
    return tuple(found for found in selections(metadata) if found.usable_from(metadata["namespace"]))


def is_pod(pod: Object, uid: str | None) -> bool:
    """Whether this object is the pod that a container runtime calls ``uid`` (None: it does not say).

    Of a static pod the runtime knows the uid that kubelet made up, the API the one of its mirror.
    """
    static = annotations(pod).get(MIRROR_ANNOTATION)
    return uid in (None, pod["metadata"]["uid"]) or (static is not None and uid == static)


def endpoint(pod: Object, found: Attachment, interface: InterfaceName = names.PRIMARY_INTERFACE) -> Endpoint | None:
    """The endpoint of a pod on a network; None while nothing is allocated. Raises ValueError for a bad annotation."""
    entry = allocation(pod, found.key)
    if entry is None or not node_of(pod):
        return None
    try:
        # A network without IPAM gives a MAC only.
        texts = entry.get("ip_addresses") or ([entry["ip_address"]] if found.network.subnets else [])
        mac = addresses.parse_mac(entry["mac_address"])
        interfaces = sorted((addresses.interface(text) for text in texts), key=lambda item: item.version)
    except (KeyError, TypeError) as error:
        raise ValueError(f"annotation {names.POD_NETWORKS_ANNOTATION}, entry {found.key}: lacks {error}") from error
    if mac.startswith(names.ROUTER_MAC_PREFIX):
        raise ValueError(f"annotation {names.POD_NETWORKS_ANNOTATION}, entry {found.key}: {mac} is a router's")
    machine = machine_of(pod)
    return Endpoint(
        pod=pod_reference(pod),
        network=found.network.name,
        node=node_of(pod),
        mac=mac,
        addresses=tuple(interfaces),
        interface=interface,
        machine=machine,
        hostname=machine.name if machine else str(pod["spec"].get("hostname") or pod["metadata"]["name"]),
    )


def node(item: Object) -> Node | None:
    """A node with its underlay address: the first InternalIP, IPv4 before IPv6; None when it has none.

    Raises ValueError for an address that is none.
    """
    found = []
    for entry in item.get("status", {}).get("addresses") or []:
        if entry.get("type") == "InternalIP":
            found.append(addresses.address(entry["address"]))
    if not found:
        return None
    try:
        subnets = tuple(sorted(parts.parts_of(annotations(item)).items()))
    except ValueError as error:
        log.warning("node %s: %s", item["metadata"]["name"], error)
        subnets = ()
    address = min(found, key=lambda value: value.version)
    spec = item.get("spec") or {}
    texts = spec.get("podCIDRs") or [text for text in [spec.get("podCIDR")] if text]
    pods = tuple(addresses.network(text) for text in texts)
    return Node(item["metadata"]["name"], address, parts.number_of(annotations(item)), subnets, pods)


def migration_state(vmi: Object | None) -> Mapping[str, Any]:
    """``status.migrationState`` of a VMI, empty when there is none."""
    state = ((vmi or {}).get("status") or {}).get("migrationState")
    return state if isinstance(state, dict) else {}


def live_pod(pods: Iterable[Object], vmi: Object | None) -> Object | None:
    """Which of a machine's pods holds the guest, as far as the API knows.

    One living pod is the one. Of two, the migration target is it once KubeVirt says that its domain runs there
    (ready-timestamp, or ``status.nodeName`` moved) and the migration has not failed; until then it is the source.
    A pod keeps ``migrationJobUID`` and the ready-timestamp for life, so they count only for the pod that the VMI's
    present ``migrationState`` names as target.
    """
    living = sorted(filter(alive, pods), key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))
    if len(living) <= 1:
        return living[0] if living else None
    state = migration_state(vmi)
    where = ((vmi or {}).get("status") or {}).get("nodeName")
    target = next((pod for pod in living if pod["metadata"]["name"] == state.get("targetPod")), None)
    source = next((pod for pod in living if pod["metadata"]["name"] == state.get("sourcePod")), None)
    if target is None or source is None:
        # Hand-off has not happened: the machine is where the VMI says, else in its oldest pod.
        return next((pod for pod in living if node_of(pod) == where), living[0])
    if state.get("failed"):
        return source
    ready = names.TARGET_READY_ANNOTATION in annotations(target)
    return target if ready or where == node_of(target) else source


def settled(pods: Iterable[Object], vmi: Object | None) -> bool:
    """True when no migration is under way, as far as the stores agree: the API's word about the place is final.

    A single pod on another node than the VMI names means that one store is behind the other; of more than two, one has
    come that the VMI does not know yet, or one has gone that its store still holds.
    """
    living = [pod for pod in pods if alive(pod)]
    if len(living) > 2:
        return False
    if len(living) <= 1:
        where = ((vmi or {}).get("status") or {}).get("nodeName")
        return not living or where in (None, "", node_of(living[0]))
    state = migration_state(vmi)
    living_names = {pod["metadata"]["name"] for pod in living}
    return bool(state.get("completed")) and {state.get("targetPod"), state.get("sourcePod")} <= living_names


def unrivalled(own: Object, pods: Iterable[Object]) -> bool:
    """True when no other pod of a machine can hold the guest: all others have finished or not begun."""
    others = (pod for pod in pods if alive(pod) and pod["metadata"]["uid"] != own["metadata"]["uid"])
    return alive(own) and all(pod.get("status", {}).get("phase") == "Pending" for pod in others)


def source_node(own: Object, pods: Iterable[Object], vmi: Object | None) -> str:
    """Node that a machine is coming, or last came, to its pod ``own`` from; empty when it began there.

    The VMI tells of its last migration only; a pod that was once a target keeps what its agent wrote on it.
    """
    state = migration_state(vmi)
    if state.get("targetPod") == own["metadata"]["name"]:
        return str(state.get("sourceNode") or "")
    try:
        seen = json.loads(annotations(own).get(names.CUT_OVER_ANNOTATION) or "{}")
    except json.JSONDecodeError:
        seen = {}
    if isinstance(seen, dict) and seen.get("source"):
        return str(seen["source"])
    if state.get("sourcePod") == own["metadata"]["name"]:
        return ""
    live = live_pod(pods, vmi)
    # Not handed over yet: the guest is where it was.
    return node_of(live) if live is not None and live["metadata"]["uid"] != own["metadata"]["uid"] else ""


def is_source(pod_name: str, vmi: Object | None) -> bool:
    """Whether the VMI's present migration leaves this pod."""
    return migration_state(vmi).get("sourcePod") == pod_name


def interface_on_pod_network(machine: Object) -> str | None:
    """Name, in the specification of a VMI, of the interface on its pod's own network; None when it has none."""
    for entry in (machine.get("spec") or {}).get("networks") or []:
        if "pod" in entry:
            return str(entry["name"])
    return None
