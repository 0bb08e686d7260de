"""What virt-controller creates: a machine's instance and its launcher pods, as the real one was recorded to do it."""

import copy
import json
import sys
import uuid
from collections.abc import Mapping
from typing import Any, Final

from vmnet.kube.api import Object
from vmnet.lab.virt import kinds, plumbing
from vmnet.lab.virt.launcher import POD_NETWORK
from vmnet.lab.virt.qemu import MINIMUM_MEMORY_MIB
from vmnet.model import names

_UNITS: Final = {
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "": 1,
}
_OVERHEAD: Final = 64 * 2**20
"""Memory of the launcher and of QEMU beside the guest's."""
_FIRMWARE: Final = uuid.UUID("6f1d4b0c-4c57-4e6b-9f0b-0c6c2b7f7d41")
"""Name space for firmware identities that follow from the machine's identity."""
DEFAULT_GRACE_SECONDS: Final = 30


def octets(quantity: str) -> int:
    """A Kubernetes quantity of memory. Raises ValueError."""
    text = str(quantity).strip()
    digits = text.rstrip("KMGTik")
    return int(float(digits) * _UNITS[text[len(digits) :]])


def memory_of(vmi: Object) -> str:
    """The guest's memory as the instance asks for it, else the least that boots."""
    domain = vmi["spec"].get("domain") or {}
    requests = (domain.get("resources") or {}).get("requests") or {}
    limits = (domain.get("resources") or {}).get("limits") or {}
    guest = (domain.get("memory") or {}).get("guest")
    return str(guest or requests.get("memory") or limits.get("memory") or f"{MINIMUM_MEMORY_MIB}Mi")


def instance_of(vm: Object) -> Object:
    """The VirtualMachineInstance of a VirtualMachine, with the defaults that admission adds to it."""
    metadata, template = vm["metadata"], vm["spec"]["template"]
    generation = str(metadata.get("generation", 1))
    own = template.get("metadata") or {}
    vmi: Object = {
        "apiVersion": kinds.API_VERSION,
        "kind": "VirtualMachineInstance",
        "metadata": {
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "annotations": {**(own.get("annotations") or {}), kinds.GENERATION_ANNOTATION: generation},
            "finalizers": [kinds.VM_FINALIZER],
            "ownerReferences": kinds.owned_by(vm, "VirtualMachine"),
        },
        "spec": copy.deepcopy(template["spec"]),
        "status": {"virtualMachineRevisionName": f"revision-start-vm-{metadata['uid']}-{generation}"},
    }
    if own.get("labels"):
        vmi["metadata"]["labels"] = dict(own["labels"])
    firmware = vmi["spec"].setdefault("domain", {}).setdefault("firmware", {})
    firmware.setdefault("uuid", str(uuid.uuid5(_FIRMWARE, metadata["uid"])))
    firmware.setdefault("serial", str(uuid.uuid5(_FIRMWARE, f"{metadata['uid']}/serial")))
    complete(vmi)
    return vmi


def complete(vmi: Object) -> None:
    """What admission adds to a new instance: finalizer, defaults, first phase."""
    finalizers = vmi["metadata"].setdefault("finalizers", [])
    for name in (kinds.VM_FINALIZER, kinds.FOREGROUND_FINALIZER):
        if name not in finalizers:
            finalizers.append(name)
    spec = vmi["spec"]
    spec.setdefault("architecture", "amd64")
    spec.setdefault("evictionStrategy", "None")
    domain = spec.setdefault("domain", {})
    domain.setdefault("devices", {})
    domain.setdefault("machine", {}).setdefault("type", "q35")
    domain.setdefault("cpu", {"cores": 1, "maxSockets": 4, "model": "host-model", "sockets": 1, "threads": 1})
    domain.setdefault("features", {}).setdefault("acpi", {"enabled": True})
    memory = memory_of(vmi)
    domain.setdefault("memory", {}).setdefault("guest", memory)
    domain.setdefault("resources", {}).setdefault("requests", {}).setdefault("memory", memory)
    status = vmi.setdefault("status", {})
    status.setdefault("currentCPUTopology", {"cores": 1, "sockets": 1, "threads": 1})
    status.setdefault("guestOSInfo", {})
    status.setdefault("memory", dict.fromkeys(("guestAtBoot", "guestCurrent", "guestRequested"), memory))
    # The real one runs the guest as a user of its own; here it is root, which makes tap devices.
    status["runtimeUser"] = 0
    if not kinds.phase(vmi):
        kinds.set_phase(vmi, "Pending")


def launcher_pod(vmi: Object, memory_overhead: str) -> Object:
    """The pod that a new instance runs in."""
    metadata, spec = vmi["metadata"], vmi["spec"]
    hostname = str(spec.get("hostname") or metadata["name"])[:63].rstrip("-.")
    inherited = {
        key: value
        for key, value in (metadata.get("annotations") or {}).items()
        if key not in kinds.OBSERVED_ANNOTATIONS
        and key != kinds.PAUSE_ANNOTATION
        # What vmnet's controller notes on the instance is about the instance alone.
        and not key.startswith(("vmnet.io/", "kubectl.kubernetes.io/"))
    }
    freezer = ["/usr/bin/virt-freezer", "", "--name", metadata["name"], "--namespace", metadata["namespace"]]
    thaw, freeze = ([freezer[0], word, *freezer[2:]] for word in ("--unfreeze", "--freeze"))
    pod: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": f"virt-launcher-{metadata['name']}-",
            "namespace": metadata["namespace"],
            "labels": {
                **(metadata.get("labels") or {}),
                names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE,
                names.CREATED_BY_LABEL: metadata["uid"],
                kinds.VM_NAME_LABEL: hostname,
                kinds.VMI_ID_LABEL: metadata["name"][:63],
            },
            "annotations": {
                **inherited,
                "descheduler.alpha.kubernetes.io/request-evict-only": "",
                "kubectl.kubernetes.io/default-container": "compute",
                names.DOMAIN_ANNOTATION: metadata["name"],
                "kubevirt.io/memory-overhead-bytes": memory_overhead,
                "kubevirt.io/migrationTransportUnix": "true",
                "post.hook.backup.velero.io/command": json.dumps(thaw),
                "post.hook.backup.velero.io/container": "compute",
                "pre.hook.backup.velero.io/command": json.dumps(freeze),
                "pre.hook.backup.velero.io/container": "compute",
                "pre.hook.backup.velero.io/timeout": "60s",
            },
            "ownerReferences": kinds.owned_by(vmi, "VirtualMachineInstance"),
        },
        "spec": _pod_spec(vmi, hostname),
    }
    for key in (kinds.NODE_NAME_LABEL, kinds.TARGET_NODE_LABEL):
        pod["metadata"]["labels"].pop(key, None)
    asked = multus_request(vmi)
    if asked:
        pod["metadata"]["annotations"][names.NETWORKS_ANNOTATION] = json.dumps(asked, separators=(",", ":"))
    return pod


def multus_request(vmi: Object) -> list[Object]:
    """What a launcher pod asks Multus for: for each network an interface whose name follows from the network's."""
    devices = (vmi["spec"].get("domain") or {}).get("devices") or {}
    macs = {item["name"]: item.get("macAddress") for item in devices.get("interfaces") or []}
    found = []
    for network in vmi["spec"].get("networks") or []:
        attachment = str((network.get("multus") or {}).get("networkName") or "")
        if not attachment:
            continue
        namespace, _, name = attachment.rpartition("/")
        element: Object = {"name": name, "namespace": namespace or vmi["metadata"]["namespace"]}
        if macs.get(network["name"]):
            element["mac"] = macs[network["name"]]
        found.append({**element, "interface": plumbing.hashed_name(network["name"])})
    return found


def _card_arguments(vmi: Object) -> list[str]:
    """The launcher's options that say which interface of the pod each card of the guest is on, in the guest's order."""
    devices = (vmi["spec"].get("domain") or {}).get("devices") or {}
    order = [item["name"] for item in devices.get("interfaces") or []]
    networks = [item for item in vmi["spec"].get("networks") or [] if "pod" in item or "multus" in item]
    networks.sort(key=lambda item: order.index(item["name"]) if item["name"] in order else len(order))
    names_of = [POD_NETWORK if "pod" in item else plumbing.hashed_name(item["name"]) for item in networks]
    return [word for name in names_of for word in ("--interface", name)] if names_of != [POD_NETWORK] else []


def _pod_spec(vmi: Object, hostname: str) -> Object:
    metadata, spec = vmi["metadata"], vmi["spec"]
    affinity: Object = copy.deepcopy(spec.get("affinity") or {})
    required = affinity.setdefault("nodeAffinity", {}).setdefault(
        "requiredDuringSchedulingIgnoredDuringExecution", {"nodeSelectorTerms": [{}]}
    )
    for term in required["nodeSelectorTerms"]:
        term.setdefault("matchExpressions", []).append(
            {"key": "node-labeller.kubevirt.io/obsolete-host-model", "operator": "DoesNotExist"}
        )
    grace = spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS)
    memory = octets(memory_of(vmi))
    result: Object = {
        "affinity": affinity,
        "automountServiceAccountToken": False,
        "containers": [
            {
                "name": "compute",
                "image": kinds.LAUNCHER_IMAGE,
                "imagePullPolicy": "IfNotPresent",
                # The lab has no images: its kubelet runs the command on the machine's own files.
                "command": [sys.executable, "-m", "vmnet.lab.virt.launcher"],
                "args": [
                    *("--name", metadata["name"], "--namespace", metadata["namespace"], "--uid", metadata["uid"]),
                    *("--memory", str(-(-memory // 2**20)), "--firmware-uuid", _firmware(vmi)),
                    *("--hostname", hostname, "--grace-period-seconds", str(grace)),
                    *_card_arguments(vmi),
                ],
                "env": [
                    {"name": "POD_NAME", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}}
                ],
                "resources": {"requests": {"cpu": "100m", "memory": str(memory + _OVERHEAD)}},
                "terminationMessagePolicy": "FallbackToLogsOnError",
            }
        ],
        "dnsPolicy": spec.get("dnsPolicy", "ClusterFirst"),
        "enableServiceLinks": False,
        "hostname": hostname,
        "nodeSelector": {
            "kubernetes.io/arch": "amd64",
            kinds.SCHEDULABLE_LABEL: "true",
            **(spec.get("nodeSelector") or {}),
        },
        "readinessGates": [{"conditionType": kinds.UNPAUSED_GATE}],
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace + 15 if grace else 30,
    }
    if spec.get("subdomain"):
        result["subdomain"] = spec["subdomain"]
    if spec.get("tolerations"):
        result["tolerations"] = copy.deepcopy(spec["tolerations"])
    if spec.get("dnsConfig"):
        result["dnsConfig"] = copy.deepcopy(spec["dnsConfig"])
    if spec.get("topologySpreadConstraints"):
        result["topologySpreadConstraints"] = copy.deepcopy(spec["topologySpreadConstraints"])
    return result


def _firmware(vmi: Object) -> str:
    firmware = (vmi["spec"].get("domain") or {}).get("firmware") or {}
    return str(firmware.get("uuid") or uuid.uuid5(_FIRMWARE, vmi["metadata"]["uid"]))


def overhead() -> str:
    """Memory beside the guest's, in octets, as the instance's status says it."""
    return str(_OVERHEAD)


def target_pod(vmi: Object, migration: Object) -> Object:
    """The pod that an instance is migrated to."""
    pod = launcher_pod(vmi, overhead())
    metadata, spec = pod["metadata"], pod["spec"]
    metadata["labels"][names.MIGRATION_JOB_LABEL] = migration["metadata"]["uid"]
    # Until the switch-over this label names the source's node.
    metadata["labels"][kinds.NODE_NAME_LABEL] = str((vmi.get("status") or {}).get("nodeName") or "")
    metadata["annotations"][kinds.JOB_NAME_ANNOTATION] = migration["metadata"]["name"]
    terms = (
        spec["affinity"]
        .setdefault("podAntiAffinity", {})
        .setdefault("requiredDuringSchedulingIgnoredDuringExecution", [])
    )
    terms.append(
        {
            "labelSelector": {"matchLabels": {names.CREATED_BY_LABEL: vmi["metadata"]["uid"]}},
            "topologyKey": "kubernetes.io/hostname",
        }
    )
    spec["nodeSelector"] |= (migration["spec"].get("addedNodeSelector")) or {}
    spec["containers"][0]["args"].append("--incoming")
    return pod


DEFAULT_CONFIGURATION: Final[Mapping[str, Any]] = {
    "allowAutoConverge": False,
    "allowPostCopy": False,
    "allowWorkloadDisruption": False,
    "bandwidthPerMigration": "0",
    "completionTimeoutPerGiB": 150,
    "maxDowntimeMs": 900,
    "nodeDrainTaintKey": "kubevirt.io/drain",
    "parallelMigrationsPerCluster": 5,
    "parallelOutboundMigrationsPerNode": 2,
    "progressTimeout": 150,
    "unsafeMigrationOverride": False,
    "utilityVolumesTimeout": 150,
}


def configuration(policy: Object | None) -> Object:
    """``migrationConfiguration`` of a migration, with what a MigrationPolicy says put over the defaults."""
    result = dict(DEFAULT_CONFIGURATION)
    for key, value in ((policy or {}).get("spec") or {}).items():
        if key != "selectors":
            result[key] = value
    if (policy or {}).get("spec", {}).get("allowPostCopy") and "allowWorkloadDisruption" not in (policy or {})["spec"]:
        result["allowWorkloadDisruption"] = True
    return result


def matching_policy(policies: list[Object], vmi: Object, namespace: Object) -> Object | None:
    """The policy that selects the instance by most labels; of equals, the first by name."""
    best: tuple[int, str, Object] | None = None
    for policy in policies:
        selectors = (policy.get("spec") or {}).get("selectors") or {}
        wanted = (
            (selectors.get("virtualMachineInstanceSelector") or {}, kinds.labels(vmi)),
            (selectors.get("namespaceSelector") or {}, kinds.labels(namespace)),
        )
        if not any(selector for selector, _ in wanted):
            continue
        if any(present.get(key) != value for selector, present in wanted for key, value in selector.items()):
            continue
        rank = (-sum(len(selector) for selector, _ in wanted), policy["metadata"]["name"])
        if best is None or rank < best[:2]:
            best = (*rank, policy)
    return best[2] if best else None
