"""``make bench-ipam``: what an address costs, how fast a controller starts, and how many pods a second it serves.

Parsing with the standard library, measured in the same run, is the yardstick of a start: a controller that reads ten
thousand claims and pods has to parse them in any case. Both, and allocation, are told in processor time.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

import yaml

from vmnet.controller.cluster import WATCHED, Cluster
from vmnet.controller.controller import Controller
from vmnet.controller.ledger import Ledger
from vmnet.controller.pods import PodReconciler
from vmnet.controller.waiting import WaitingRoom
from vmnet.ipam.network_pools import NetworkPools
from vmnet.kube.api import (
    CLAIMS,
    CUDNS,
    NADS,
    NAMESPACES,
    PODS,
    VMIMS,
    VMIS,
    VMS,
    Handler,
    KubeError,
    Object,
    Resource,
    object_key,
)
from vmnet.kube.client import KubeClient
from vmnet.kube.events import Recorder
from vmnet.kube.fake import FakeKube
from vmnet.kube.watch import ListWatch
from vmnet.lab.errors import LabError
from vmnet.model import names
from vmnet.model.names import NetworkId
from vmnet.model.network import Network

ALLOCATE_LIMIT_US: Final = 5.0
FLAT_LIMIT: Final = 1.5
"""Cost at 99 % of the subnet to cost at 1 %."""
RELOAD_LIMIT: Final = 2.0
ROUND_TRIPS_LIMIT: Final = 1.0
SPACE: Final = "blue"
NETWORK: Final = "cluster_udn_tenant"
ATTACHMENT: Final = f"{SPACE}/tenant"
_ROOT: Final = Path(__file__).parents[3]
_CRDS: Final = Resource(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False
)
_ROUNDS: Final = 5
_DEADLINE_SECONDS: Final = 300.0


@dataclass(slots=True)
class Figure:
    """One result. ``limit``: the most that is asked for; None where nothing is."""

    name: str
    unit: str
    value: float
    limit: float | None = None

    @property
    def met(self) -> bool:
        """Whether it is what was asked for."""
        return self.limit is None or self.value <= self.limit


def allocation(subnet: str = "10.128.0.0/16") -> list[Figure]:
    """Cost of one address from the pool of a network, by how full the subnet is; the best of several rounds."""
    found = {}
    shares = (1, 25, 50, 75, 90, 99)
    for share in shares:
        found[share] = min(_allocation_at(subnet, share) for _ in range(_ROUNDS)) * 1e6
    figures = [Figure(f"allocate, /16 at {share} %", "µs", found[share], ALLOCATE_LIMIT_US) for share in shares]
    figures.append(Figure("allocate, 99 % to 1 %", "ratio", found[99] / found[1], FLAT_LIMIT))
    return figures


def _allocation_at(subnet: str, share: int, count: int = 600) -> float:
    pools = NetworkPools(Network("bench", NetworkId(1), subnets=(ip_network(subnet),)))
    filled = pools.capacity(4) * share // 100 - count // 2
    for number in range(filled):
        pools.allocate(f"owner {number}")
    # Holes everywhere, as after months: what was given back is spread over the whole subnet.
    for number in range(0, filled, max(1, filled // 200)):
        pools.release(f"owner {number}")
    owners = [f"new {number}" for number in range(count)]
    began = time.process_time()
    for owner in owners:
        pools.allocate(owner)
    return (time.process_time() - began) / count


def _written(count: int) -> tuple[str, str]:
    """Claims and pods, as JSON lists: every second pod is a machine's."""
    claims, pods = [], []
    for number in range(count):
        third, last = divmod(number + 10, 250)
        v4, v6 = f"10.128.{third}.{last + 1}/16", f"fd00:10::{number + 10:x}/64"
        machine = f"vm-{number}"
        owner = {"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "name": machine, "uid": f"uid-{number}"}
        claims.append(
            {
                "apiVersion": CLAIMS.api_version,
                "kind": CLAIMS.kind,
                "metadata": {
                    "name": f"{machine}.happy",
                    "namespace": SPACE,
                    "uid": f"claim-{number}",
                    "resourceVersion": str(number + 1),
                    "creationTimestamp": "2026-11-23T06:00:00Z",
                    "labels": {names.CLAIM_VM_LABEL: machine},
                    "finalizers": [names.CLAIM_FINALIZER],
                    "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
                },
                "spec": {"network": NETWORK, "interface": ""},
                "status": {"ips": [v4, v6], "ownerPod": {"name": f"pod-{number}"}},
            }
        )
        pods.append(_pod_of(number, claims[-1]))
    return json.dumps(claims), json.dumps(pods)


def _pod_of(number: int, claim: Object) -> Object:
    """Every second pod takes the claim's addresses; the others have their own."""
    claimed = number % 2 == 0
    third, last = divmod(number + 20_000, 250)
    own = [f"10.128.{third}.{last + 1}/16", f"fd00:10::{number + 20_000:x}/64"]
    ips = claim["status"]["ips"] if claimed else own
    octets = [int(item) for item in ips[0].partition("/")[0].split(".")]
    entry = {
        "ip_addresses": ips,
        "mac_address": "0a:58:" + ":".join(f"{octet:02x}" for octet in octets),
        "gateway_ips": ["10.128.0.1", "fd00:10::1"],
        "role": "primary",
    }
    annotations = {names.POD_NETWORKS_ANNOTATION: json.dumps({ATTACHMENT: entry})}
    labels = {"app": "bench"}
    if claimed:
        annotations[names.PRIMARY_CLAIM_ANNOTATION] = str(claim["metadata"]["name"])
        labels |= {names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE, names.CREATED_BY_LABEL: f"vmi-{number}"}
    variables = [{"name": f"VARIABLE_{item}", "value": "x" * 20} for item in range(12)]
    container = {
        "name": "main",
        "image": "registry.example.test/image:1",
        "env": variables,
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
        "volumeMounts": [{"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}],
    }
    kinds = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
    since = "2026-11-23T06:00:01Z"
    conditions = [{"type": kind, "status": "True", "lastTransitionTime": since} for kind in kinds]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"pod-{number}",
            "namespace": SPACE,
            "uid": f"pod-{number}",
            "resourceVersion": str(100_000 + number),
            "creationTimestamp": "2026-11-23T06:00:00Z",
            "labels": labels,
            "annotations": annotations,
        },
        "spec": {"nodeName": f"n{number % 50}", "containers": [container], "serviceAccountName": "default"},
        "status": {"phase": "Running", "conditions": conditions, "podIP": "10.244.1.2", "hostIP": "172.30.0.11"},
    }


class Listed:
    """An informer whose list has just been parsed. It watches nothing."""

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self.synced = asyncio.Event()
        self.failure: KubeError | None = None
        self._store: dict[str, Object] = {}
        self._handlers: list[Handler] = []

    def add_handler(self, handler: Handler) -> None:
        """Called by ``take`` with every object."""
        self._handlers.append(handler)

    def get(self, key: str) -> Object | None:
        """One object."""
        return self._store.get(key)

    def items(self) -> list[Object]:
        """All objects."""
        return list(self._store.values())

    async def run(self) -> None:
        """Nothing changes."""

    def take(self, items: list[Object]) -> None:
        """As a list-watch does with what it has listed."""
        for item in items:
            self._store[object_key(item)] = item
            for handler in self._handlers:
                handler(None, item)


def reload(count: int = 10_000) -> list[Figure]:
    """Parsing of that many claims and pods against taking them over: indexes, pools and who holds what."""
    claims_text, pods_text = _written(count)
    parsing, taking = [], []
    for _ in range(_ROUNDS):
        began = time.process_time()
        claims, pods = json.loads(claims_text), json.loads(pods_text)
        parsing.append(time.process_time() - began)
        taking.append(_take_over(claims, pods, count))
    return [
        Figure(f"parse {count:,} claims and {count:,} pods", "ms", statistics.median(parsing) * 1e3),
        Figure("take them over", "ms", statistics.median(taking) * 1e3),
        Figure("take over to parse", "ratio", statistics.median(taking) / statistics.median(parsing), RELOAD_LIMIT),
    ]


def _take_over(claims: list[Object], pods: list[Object], count: int) -> float:
    config = {
        "cniVersion": "1.1.0",
        "type": "vmnet",
        "name": NETWORK,
        "netAttachDefName": ATTACHMENT,
        "topology": "layer2",
        "role": "primary",
        "subnets": "10.128.0.0/16,fd00:10::/64",
        "allowPersistentIPs": True,
    }
    nad = {
        "metadata": {
            "name": "tenant",
            "namespace": SPACE,
            "uid": "nad",
            "annotations": {names.NETWORK_ID_ANNOTATION: "1"},
        },
        "spec": {"config": json.dumps(config)},
    }
    space = {"metadata": {"name": SPACE, "labels": {names.PRIMARY_NETWORK_LABEL: ""}}}
    kube = FakeKube()
    informers = {resource: Listed(resource) for resource in WATCHED}
    listed: dict[Resource, list[Object]] = {NAMESPACES: [space], NADS: [nad], CLAIMS: claims, PODS: pods}
    began = time.process_time()
    cluster = Cluster(informers)
    for resource, items in listed.items():
        informers[resource].take(items)
    ledger = Ledger(cluster)
    for attachment in cluster.attachments():
        ledger.open(attachment.network)
    reconciler = PodReconciler(kube, cluster, ledger, Recorder(kube, "bench"), WaitingRoom())
    reconciler.load()
    taken = time.process_time() - began
    pools = ledger.pools(next(cluster.attachments()).network)
    if pools.used(4) != count + count // 2:
        raise LabError(f"{pools.used(4)} addresses were taken over")
    return taken


class CountingClient(KubeClient):
    """The real client; counts what it writes."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.counts: Counter[str] = Counter()

    async def _request(self, method: str, path: str, **more: Any) -> Any:
        self.counts[f"{method} {path.split('/')[-2 if '/pods/' in path else -1]}"] += 1
        return await super()._request(method, path, **more)


@asynccontextmanager
async def _server(directory: Path) -> AsyncIterator[Path]:
    """The embedded API server, a process of its own; its kubeconfig."""
    kubeconfig = directory / "kubeconfig"
    reader, writer = os.pipe()
    arguments = ["--listen", "127.0.0.1:0", "--certificates", str(directory / "certificates")]
    arguments += ["--kubeconfig", str(kubeconfig), "--ready-fd", str(writer)]
    argv = [sys.executable, "-m", "vmnet.lab.apiserver", *arguments]
    with (directory / "apiserver.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*argv, pass_fds=[writer], stdout=log, stderr=log)
    os.close(writer)
    try:
        async with asyncio.timeout(_DEADLINE_SECONDS):
            said = await asyncio.to_thread(os.read, reader, 16)
        if not said:
            raise LabError((directory / "apiserver.log").read_text()[-800:])
        yield kubeconfig
    finally:
        os.close(reader)
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def pods(count: int = 1000) -> list[Figure]:
    """That many pods created at once on the embedded API server: until all are annotated, and what that cost."""
    with tempfile.TemporaryDirectory(prefix="vmnet-bench-") as directory:
        async with _server(Path(directory)) as kubeconfig:
            user = await KubeClient.connect(kubeconfig, user_agent="bench", request_seconds=120)
            own = await CountingClient.connect(kubeconfig, user_agent="vmnet-controller", request_seconds=120)
            try:
                return await _pods(user, own, count)
            finally:
                await own.close()
                await user.close()


async def _pods(user: KubeClient, own: CountingClient, count: int) -> list[Figure]:
    for path in sorted((_ROOT / "deploy" / "crds").glob("k8s.*.yaml")):
        await user.create(_CRDS, yaml.safe_load(path.read_text()))
    space = {"apiVersion": "v1", "kind": "Namespace"}
    await user.create(NAMESPACES, {**space, "metadata": {"name": SPACE, "labels": {names.PRIMARY_NETWORK_LABEL: ""}}})
    layer2 = {"role": "Primary", "subnets": ["10.128.0.0/16", "fd00:10::/64"], "ipam": {"lifecycle": "Persistent"}}
    spec = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": SPACE}},
        "network": {"topology": "Layer2", "layer2": layer2},
    }
    kind = {"apiVersion": CUDNS.api_version, "kind": CUDNS.kind}
    await user.create(CUDNS, {**kind, "metadata": {"name": "tenant"}, "spec": spec})
    optional = (VMS, VMIS, VMIMS)
    informers = {resource: ListWatch(own, resource, optional=resource in optional) for resource in WATCHED}
    controller = Controller(own, Cluster(informers))
    annotated = asyncio.Event()
    seen: set[str] = set()

    def follow(_: Object | None, new: Object | None) -> None:
        if new is not None and names.POD_NETWORKS_ANNOTATION in (new["metadata"].get("annotations") or {}):
            seen.add(new["metadata"]["name"])
            if len(seen) == count:
                annotated.set()

    tasks = [asyncio.create_task(informer.run()) for informer in informers.values()]
    tasks.append(asyncio.create_task(controller.run()))
    try:
        async with asyncio.timeout(_DEADLINE_SECONDS):
            await controller.ready.wait()
            while controller.cluster.attachment(ATTACHMENT) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            informers[PODS].add_handler(follow)
            own.counts.clear()
            began = time.monotonic()
            gate = asyncio.Semaphore(32)

            async def create(number: int) -> None:
                body = {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": f"pod-{number}"},
                    "spec": {"nodeName": "n1", "containers": [{"name": "main", "image": "none"}]},
                }
                async with gate:
                    await user.create(PODS, body, SPACE)

            async with asyncio.TaskGroup() as group:
                for number in range(count):
                    group.create_task(create(number))
            created = time.monotonic() - began
            await annotated.wait()
            taken = time.monotonic() - began
            while not controller.idle:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    trips = sum(number for what, number in own.counts.items() if not what.startswith("GET"))
    return [
        Figure(f"{count:,} pods created, by 32 at a time", "s", created),
        Figure(f"{count:,} pods created and annotated", "s", taken),
        Figure("pods annotated a second", "1/s", count / taken),
        Figure("API writes per pod", "", trips / count, ROUND_TRIPS_LIMIT),
    ]


def table(figures: list[Figure]) -> str:
    """Markdown."""
    lines = ["| what | measured | asked for | met |", "|---|---|---|---|"]
    for item in figures:
        asked = f"≤ {item.limit:g} {item.unit}".rstrip() if item.limit is not None else "—"
        met = "—" if item.limit is None else "yes" if item.met else "no"
        lines.append(f"| {item.name} | {item.value:,.2f} {item.unit} | {asked} | {met} |")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="bench-ipam", description=__doc__)
    parser.add_argument("--objects", type=int, default=10_000, help="claims, and pods, to take over (%(default)s)")
    parser.add_argument("--pods", type=int, default=1000, help="pods to create (%(default)s)")
    parser.add_argument("--report", type=Path, default=Path("build/bench/ipam.json"), help="%(default)s")
    arguments = parser.parse_args()
    steps: list[tuple[str, Callable[[], list[Figure]]]] = [
        ("allocate", allocation),
        ("take over", lambda: reload(arguments.objects)),
        ("create pods", lambda: asyncio.run(pods(arguments.pods))),
    ]
    figures = []
    for what, run in steps:
        print(f"==> {what}", file=sys.stderr, flush=True)
        figures += run()
    report = {
        "load_average": os.getloadavg()[0],
        "figures": [
            {"name": f.name, "unit": f.unit, "value": f.value, "limit": f.limit, "met": f.met} for f in figures
        ],
    }
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(json.dumps(report, indent=2) + "\n")
    print(table(figures))
    print(f"\nreport: {arguments.report}")


if __name__ == "__main__":
    main()
