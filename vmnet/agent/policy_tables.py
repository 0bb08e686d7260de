"""NetworkPolicy on this node: which pods, namespaces and policies each network's tables are made from."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final

from vmnet.agent import facts
from vmnet.agent.cluster import Cluster, Stores
from vmnet.kube.api import POLICIES, Kube, Object, object_key
from vmnet.kube.events import Recorder
from vmnet.model.endpoint import NodeNetwork
from vmnet.model.policy import Misread, Policy, Protocol, parse
from vmnet.plan.policy import Member, NamedPort, NetworkPolicies
from vmnet.plan.table import Table

log = logging.getLogger(__name__)

REASON: Final = "NetworkPolicyMisread"


class PolicyTables:
    """A ``TableSource``. A network's policies are those of the namespaces that have pods on it.

    Make it after the ``Cluster``, whose word on who is an endpoint it takes: both listen to the same stores.
    """

    def __init__(
        self, kube: Kube, stores: Stores, cluster: Cluster, node_name: str, on_network: Callable[[str], None]
    ) -> None:
        self._kube = kube
        self._stores = stores
        self._cluster = cluster
        self._node_name = node_name
        self._on_network = on_network
        self._recorder = Recorder(kube, "vmnet-agent", host=node_name)
        self._networks: dict[str, NetworkPolicies] = {}
        self._placed: dict[str, str] = {}
        """Pods that are members: the network of each."""
        self._pods: dict[str, set[str]] = {}
        """Keys of a namespace's pods."""
        self._policies: dict[str, dict[str, Policy]] = {}
        """By namespace, then by name."""
        self._misread: dict[str, str] = {}
        """What is wrong with policies, by their keys."""
        self._told: dict[str, str] = {}
        self._untold: asyncio.Queue[str] = asyncio.Queue()
        self._awaiting: set[asyncio.Event] = set()
        stores.namespaces.add_handler(self._namespace_changed)
        stores.nads.add_handler(self._nad_changed)
        stores.policies.add_handler(self._policy_changed)
        stores.pods.add_handler(self._pod_changed)

    def network_tables(self, desired: NodeNetwork) -> tuple[Table, ...]:
        """Tables that isolate this node's ports; none while no policy selects one of them."""
        policies = self._networks.get(desired.network.name)
        return policies.tables(port.endpoint for port in desired.ports) if policies is not None else ()

    def node_tables(self, rendered: Mapping[str, NodeNetwork]) -> tuple[Table, ...]:
        """None: policies hold inside networks."""
        return ()

    def demands(self, network: str) -> bool:
        """Never: without a port there is nothing to isolate."""
        return False

    async def wait_for_policies(self, namespace: str) -> None:
        """Return once the store has every policy that the namespace has now. Raises KubeError; may wait for ever.

        Pods and policies come by different watches: a pod may be seen before a policy that is older than it.
        """
        listed = (await self._kube.list(POLICIES, namespace)).items
        changed = asyncio.Event()
        self._awaiting.add(changed)
        try:
            while any(_behind(self._stores.policies.get(object_key(item)), item) for item in listed):
                await changed.wait()
                changed.clear()
        finally:
            self._awaiting.discard(changed)

    async def tell(self) -> None:
        """Write events on policies that cannot be understood, until cancelled."""
        while True:
            key = await self._untold.get()
            item, message = self._stores.policies.get(key), self._misread.get(key)
            if item is None or message is None or self._told.get(key) == message:
                continue
            self._told[key] = message
            about = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", **item}
            await self._recorder.event(
                about,
                REASON,
                f"{message}; nothing of it is opened",
                "Warning",
                next_step="mend that field: kubectl explain networkpolicy.spec",
            )

    # Following

    def _pod_changed(self, old: Object | None, new: Object | None) -> None:
        item = facts.subject(old, new)
        keys = self._pods.setdefault(item["metadata"]["namespace"], set())
        (keys.add if new else keys.discard)(object_key(item))
        self._place(object_key(item))

    def _nad_changed(self, old: Object | None, new: Object | None) -> None:
        for key in sorted(self._pods.get(facts.subject(old, new)["metadata"]["namespace"], ())):
            self._place(key)

    def _namespace_changed(self, old: Object | None, new: Object | None) -> None:
        name = facts.subject(old, new)["metadata"]["name"]
        for network, policies in self._networks.items():
            if name in policies.namespaces():
                found = policies.put_namespace(name, facts.labels(new)) if new else policies.drop_namespace(name)
                self._notify(network, found)

    def _policy_changed(self, old: Object | None, new: Object | None) -> None:
        item = facts.subject(old, new)
        namespace, name, key = item["metadata"]["namespace"], item["metadata"]["name"], object_key(item)
        self._misread.pop(key, None)
        found = self._read(new) if new is not None else None
        known = self._policies.setdefault(namespace, {})
        if key not in self._misread:
            self._told.pop(key, None)
        if found is None:
            known.pop(name, None)
        else:
            known[name] = found
        for network, policies in self._networks.items():
            if namespace in policies.namespaces():
                different = policies.put_policy(name, found) if found else policies.drop_policy(namespace, name)
                self._notify(network, different)
        if any(self._here(pod) for pod in self._pods.get(namespace, ())):
            self._untold.put_nowait(key)
        for waiting in self._awaiting:
            waiting.set()

    def _read(self, item: Object) -> Policy | None:
        """The policy, or what is to stand for one that cannot be understood."""
        try:
            return parse(item)
        except Misread as error:
            log.warning("NetworkPolicy %s: %s", object_key(item), error)
            self._misread[object_key(item)] = str(error)
            return error.closed

    def _place(self, key: str) -> None:
        """Put a pod where the cluster says it is, as it is now."""
        endpoint, pod = self._cluster.endpoint(key), self._stores.pods.get(key)
        before = self._placed.get(key)
        namespace, _, name = key.partition("/")
        if before is not None and (endpoint is None or endpoint.network != before):
            del self._placed[key]
            found = self._networks[before]
            self._notify(before, found.drop_member(namespace, name))
            if namespace not in found.namespaces():
                self._leave(found, namespace)
        if endpoint is None or pod is None:
            return
        policies = self._networks.setdefault(endpoint.network, NetworkPolicies())
        if namespace not in policies.namespaces():
            self._join(policies, namespace)
        self._placed[key] = endpoint.network
        member = Member(endpoint.pod, dict(facts.labels(pod)), endpoint.all_addresses, named_ports(pod))
        self._notify(endpoint.network, policies.put_member(member))
        if before is None and self._here(key):
            for policy in self._policies.get(namespace, ()):
                if f"{namespace}/{policy}" in self._misread:
                    self._untold.put_nowait(f"{namespace}/{policy}")

    def _join(self, policies: NetworkPolicies, namespace: str) -> None:
        """A namespace has its first pod on a network."""
        item = self._stores.namespaces.get(namespace)
        if item is not None:
            policies.put_namespace(namespace, facts.labels(item))
        for name, policy in self._policies.get(namespace, {}).items():
            policies.put_policy(name, policy)

    def _leave(self, policies: NetworkPolicies, namespace: str) -> None:
        """Its last one is gone."""
        for name in self._policies.get(namespace, {}):
            policies.drop_policy(namespace, name)
        policies.drop_namespace(namespace)

    def _here(self, key: str) -> bool:
        endpoint = self._cluster.endpoint(key)
        return endpoint is not None and endpoint.node == self._node_name

    def _notify(self, network: str, different: bool) -> None:
        if different:
            self._on_network(network)


def _behind(held: Object | None, listed: Object) -> bool:
    """Whether the store has not reached this state of a policy yet."""
    if held is None or held["metadata"].get("uid") != listed["metadata"].get("uid"):
        return True
    versions = [str(item["metadata"].get("resourceVersion")) for item in (held, listed)]
    if all(version.isdecimal() for version in versions):
        return int(versions[0]) < int(versions[1])
    return versions[0] != versions[1]


def named_ports(pod: Object) -> frozenset[NamedPort]:
    """Ports that a pod's containers, and the init containers that go on running, give names to."""
    spec = pod.get("spec") or {}
    sidecars = [item for item in spec.get("initContainers") or () if item.get("restartPolicy") == "Always"]
    found = set()
    for container in (*(spec.get("containers") or ()), *sidecars):
        for port in container.get("ports") or ():
            protocol = port.get("protocol") or Protocol.TCP
            if port.get("name") and protocol in tuple(Protocol):
                found.add((str(port["name"]), Protocol(protocol), int(port["containerPort"])))
    return frozenset(found)
