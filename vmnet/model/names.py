"""Every name that the kernel, Kubernetes or another program sees, and how it is derived.

Interface names are at most 15 characters (IFNAMSIZ - 1); all of them are made here.
"""

import hashlib
from typing import Final, NewType

NetworkId = NewType("NetworkId", int)
"""Cluster-wide number of a network, 1 … 2**23 - 1. It is the VNI of the L2 segment."""
MacAddress = NewType("MacAddress", str)
"""Lower case, colon separated: ``0a:58:c0:a8:00:05``."""
InterfaceName = NewType("InterfaceName", str)
NamespaceName = NewType("NamespaceName", str)
"""Name of a network namespace below ``/run/netns``."""

# In the pod (contract: KubeVirt finds the primary interface by this name).
PRIMARY_INTERFACE: Final = InterfaceName("ovn-udn1")
DEFAULT_INTERFACE: Final = InterfaceName("eth0")

# In the network namespace of a node.
BRIDGE: Final = InterfaceName("br0")
VXLAN_L2: Final = InterfaceName("vx0")
"""The segment's way to the other nodes: a VXLAN, or on a Localnet network a veth into the node's own bridge."""
VXLAN_L3: Final = InterfaceName("rt0")
UPLINK: Final = InterfaceName("up0")

# Kubernetes: labels, annotations, finalizers (docs/architecture.md, "Names").
NETWORK_PROTECTION_FINALIZER: Final = "k8s.ovn.org/user-defined-network-protection"
"""On UDNs, CUDNs and their NADs: a network goes when no pod uses it any more."""
PRIMARY_NETWORK_LABEL: Final = "k8s.ovn.org/primary-user-defined-network"
"""On namespaces, at creation: pods here have a primary network, and do not start without one."""
NAD_LABEL: Final = "k8s.ovn.org/user-defined-network"
"""On the NADs that the controller makes for networks."""
NETWORK_ID_ANNOTATION: Final = "k8s.ovn.org/network-id"
"""Decimal NetworkId; on the UDN / CUDN (where it is allocated) and copied to each of its NADs."""
NODE_NUMBER_ANNOTATION: Final = "k8s.ovn.org/node-id"
"""Decimal; on each Node, given by the controller, never given twice among living nodes."""
SYSTEM_NAMESPACE: Final = "vmnet-system"
AGENT_ACCOUNT: Final = "vmnet-agent"
"""Where controllers and agents run, and the agents' service account."""
NODE_TAINT: Final = "node.vmnet.io/agent-not-ready"
"""Taint of Nodes that came with it: pods wait for the node's agent, when the controller takes it away."""
NODE_SUBNETS_ANNOTATION: Final = "k8s.ovn.org/node-subnets"
"""JSON on each Node: Layer3 network name → list of the CIDRs that are this node's part of it."""
POD_NETWORKS_ANNOTATION: Final = "k8s.ovn.org/pod-networks"
"""JSON on pods: NAD → addresses, MAC, gateways and role, written by the controller; CNI ADD waits for it."""
NETWORKS_ANNOTATION: Final = "k8s.v1.cni.cncf.io/networks"
"""On pods: the secondary networks that they ask for (``model.selection``)."""
NETWORK_STATUS_ANNOTATION: Final = "k8s.v1.cni.cncf.io/network-status"
"""JSON on pods: their interfaces as they are, written by the agent, or by Multus where it is installed."""
PRIMARY_CLAIM_ANNOTATION: Final = "k8s.ovn.org/primary-udn-ipamclaim"
"""On machines' pods: the IPAMClaim with the addresses in the primary network."""
DEFAULT_NETWORK_ANNOTATION: Final = "v1.multus-cni.io/default-network"
"""JSON on pods, about the primary network: the claim, and the addresses or MAC, that are asked for."""
OPEN_PORTS_ANNOTATION: Final = "k8s.ovn.org/open-default-ports"
"""YAML on pods: what passes the lock on their eth0."""
CLAIM_FINALIZER: Final = "kubevirt.io/persistent-ipam"
"""On IPAMClaims: the addresses are kept until VM and VMI are gone."""
CLAIM_VM_LABEL: Final = "kubevirt.io/vm"
"""On IPAMClaims: the name of the machine."""
LAUNCHER_LABEL: Final = "kubevirt.io"
"""On pods, `virt-launcher`: they run a machine."""
LAUNCHER_LABEL_VALUE: Final = "virt-launcher"
DOMAIN_ANNOTATION: Final = "kubevirt.io/domain"
"""On machines' pods: the name of the machine."""
CREATED_BY_LABEL: Final = "kubevirt.io/created-by"
"""On machines' pods: the UID of the VMI."""
MIGRATION_JOB_LABEL: Final = "kubevirt.io/migrationJobUID"
"""On machines' pods: the migration whose target they are."""
TARGET_READY_ANNOTATION: Final = "kubevirt.io/migration-target-ready-timestamp"
"""On target pods, written by KubeVirt: the guest runs here. The second key of the port, after the guest's own frame."""
MIGRATION_RECORD_ANNOTATION: Final = "vmnet.io/last-migration"
"""JSON of the newest migration record, on the VMI."""

CUT_OVER_ANNOTATION: Final = "vmnet.io/cut-over"
"""JSON of ``model.migration.CutOver``, written by the target's agent on the target pod."""

MIRROR_CONTROLLER: Final = "endpointslice-mirror-controller.k8s.ovn.org"
"""``endpointslice.kubernetes.io/managed-by`` of the EndpointSlices with the network's addresses."""
MIRRORED_SERVICE_LABEL: Final = "k8s.ovn.org/service-name"
"""On mirrored EndpointSlices: their Service (by `kubernetes.io/service-name` kube-proxy would take them)."""
SOURCE_SLICE_ANNOTATION: Final = "k8s.ovn.org/source-endpointslice"
"""On mirrored EndpointSlices: the slice that they mirror."""
SLICE_NETWORK_ANNOTATION: Final = "k8s.ovn.org/endpointslice-network"
"""On mirrored EndpointSlices: the network of their addresses."""

AGENT_SIGNER: Final = "vmnet.io/agent"
"""``signerName`` of the requests for agents' certificates."""

CNI_TYPE: Final = "vmnet"
CNI_SOCKET: Final = "/run/vmnet/cni.sock"
FIELD_MANAGER_CONTROLLER: Final = "vmnet-controller"
FIELD_MANAGER_AGENT: Final = "vmnet-agent"

ROUTER_MAC_PREFIX: Final = "0a:59:"
"""MACs of nodes' routers begin with it; no workload may have such a one."""
LOCALNET_PREFIX: Final = "vml"
"""Node ends of the veths between Localnet networks and the nodes' own bridges begin with it."""
JOIN_PREFIX: Final = "vmj"
"""Node ends of join veths begin with it."""
VXLAN_PORT: Final = 4789
PEERS_PORT: Final = 9466
"""TCP port at which agents answer each other."""
"""RFC 7348 section 4.1."""
L3_VNI_BIT: Final = 1 << 23
HOME_MARK: Final = 1 << 24
"""Packet and connection mark, and routing table, of what belongs to another node's router: + that node's number."""
MAX_NETWORK_ID: Final = L3_VNI_BIT - 1


def udn_network_name(namespace: str, name: str) -> str:
    """Network name of a UserDefinedNetwork: ``<namespace>_<name>``."""
    return f"{namespace}_{name}"


def cudn_network_name(name: str) -> str:
    """Network name of a ClusterUserDefinedNetwork: ``cluster_udn_<name>``."""
    return f"cluster_udn_{name}"


def network_namespace(network_id: NetworkId) -> NamespaceName:
    """Network namespace of a network on any node: ``vmnet-<id>``."""
    return NamespaceName(f"vmnet-{network_id}")


def port_interface(pod_uid: str, interface: str) -> InterfaceName:
    """Port on ``br0`` of one pod interface: ``p`` and 12 hex digits of SHA-256 of ``<uid>/<interface>``."""
    return InterfaceName("p" + hashlib.sha256(f"{pod_uid}/{interface}".encode()).hexdigest()[:12])


def join_interface(network_id: NetworkId) -> InterfaceName:
    """Node end of the join veth: ``vmj<id>`` (at most 10 characters)."""
    return InterfaceName(f"{JOIN_PREFIX}{network_id}")


def localnet_interface(network_id: NetworkId) -> InterfaceName:
    """Node end of a Localnet network's veth, a port of the node's own bridge: ``vml<id>`` (at most 10 characters)."""
    return InterfaceName(f"{LOCALNET_PREFIX}{network_id}")


def router_mac(node: str) -> MacAddress:
    """MAC of a node's router on the fabric, never the anycast gateway's: ``0a:59:`` + SHA-256(node)[:4]."""
    digest = hashlib.sha256(node.encode()).digest()
    return MacAddress(ROUTER_MAC_PREFIX + ":".join(f"{byte:02x}" for byte in digest[:4]))


def claim_name(vm: str, network: str) -> str:
    """IPAMClaim of one VM network: ``<vm>.<name of the network in the VM spec>``, lower-cased."""
    return f"{vm}.{network}".lower()
