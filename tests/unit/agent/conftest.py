"""What an agent sees of the API, written by the test."""

import json
from typing import Any, cast

import pytest

from vmnet.agent.cluster import Cluster, Stores
from vmnet.kube.api import (
    ENDPOINT_SLICES,
    NADS,
    NAMESPACES,
    NODES,
    PODS,
    POLICIES,
    SERVICES,
    VMIS,
    Object,
)
from vmnet.kube.fake import FakeInformer
from vmnet.model import names
from vmnet.model.endpoint import MachineReference
from vmnet.model.network import Network

KINDS = (PODS, NODES, NAMESPACES, NADS, VMIS, SERVICES, ENDPOINT_SLICES, POLICIES)


class Api:
    """The stores of one agent, its index over them, and whom the index told to look again."""

    def __init__(self) -> None:
        self.stores = {kind: FakeInformer(kind) for kind in KINDS}
        self.networks: list[str] = []
        self.machines: list[MachineReference] = []
        self.informers = Stores(*(cast(Any, self.stores[kind]) for kind in KINDS))
        self.cluster = Cluster(
            self.informers,
            on_network=self.networks.append,
            on_machine=self.machines.append,
        )

    def namespace(self, name: str, *, labelled: bool = True) -> None:
        labels = {names.PRIMARY_NETWORK_LABEL: ""} if labelled else {}
        self.stores[NAMESPACES].put({"metadata": {"name": name, "labels": labels}})

    def node(self, name: str, address: str, **annotations: str) -> None:
        item = {
            "metadata": {"name": name, "annotations": annotations},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]},
        }
        self.stores[NODES].put(item)

    def nad(self, key: str, network: Network) -> None:
        namespace, _, name = key.partition("/")
        number = {names.NETWORK_ID_ANNOTATION: str(network.id)}
        self.stores[NADS].put(
            {
                "metadata": {"namespace": namespace, "name": name, "annotations": number},
                "spec": {"config": network.to_nad_config(key)},
            }
        )

    def pod(
        self,
        key: str,
        node: str = "n1",
        *,
        asks: Any = None,
        uid: str | None = None,
        machine: str | None = None,
        phase: str = "Running",
        annotations: dict[str, str] | None = None,
        **allocated: str | list[str],
    ) -> Object:
        """``allocated``: NAD (``__`` for the slash) → its addresses; the MAC follows from place and name."""
        namespace, _, name = key.partition("/")
        entries = {}
        for place, (nad, found) in enumerate(allocated.items()):
            ips = found if isinstance(found, list) else [found] if found else []
            entries[nad.replace("__", "/")] = {
                "ip_addresses": ips,
                "mac_address": f"0a:58:00:00:{place:02x}:{len(name):02x}",
            }
        metadata: dict[str, Any] = {
            "namespace": namespace,
            "name": name,
            "uid": uid or f"uid-{name}",
            "annotations": {names.POD_NETWORKS_ANNOTATION: json.dumps(entries), **(annotations or {})},
            "labels": {},
        }
        if asks:
            metadata["annotations"][names.NETWORKS_ANNOTATION] = asks if isinstance(asks, str) else json.dumps(asks)
        if machine:
            metadata["labels"] = {names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE}
            metadata["annotations"][names.DOMAIN_ANNOTATION] = machine
        item = {"metadata": metadata, "spec": {"nodeName": node}, "status": {"phase": phase}}
        self.stores[PODS].put(item)
        return item


@pytest.fixture
def api() -> Api:
    return Api()
