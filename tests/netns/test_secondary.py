"""Secondary networks on the real kernel: pods of two nodes, the lab's own kubelet and API, no Multus but its calls."""

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio

from vmnet.lab.errors import LabError
from vmnet.lab.lab import Completed, Lab
from vmnet.model import names

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]

AGNHOST = "registry.k8s.io/e2e-test-images/agnhost:2.53"
SECONDS = 120.0


def namespace(name: str, *, primary: bool = True) -> dict[str, Any]:
    labels = {names.PRIMARY_NETWORK_LABEL: ""} if primary else {}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def network(where: str, name: str, **layer2: Any) -> dict[str, Any]:
    return {
        "apiVersion": "k8s.ovn.org/v1",
        "kind": "UserDefinedNetwork",
        "metadata": {"name": name, "namespace": where},
        "spec": {"topology": "Layer2", "layer2": layer2},
    }


def localnet(name: str, **settings: Any) -> dict[str, Any]:
    block = {"role": "Secondary", "physicalNetworkName": "physnet", **settings}
    selector = {"matchLabels": {"kubernetes.io/metadata.name": "red"}}
    return {
        "apiVersion": "k8s.ovn.org/v1",
        "kind": "ClusterUserDefinedNetwork",
        "metadata": {"name": name},
        "spec": {"namespaceSelector": selector, "network": {"topology": "Localnet", "localnet": block}},
    }


def pod(where: str, name: str, node: str, networks: Any = None) -> dict[str, Any]:
    text = networks if isinstance(networks, str) else json.dumps(networks)
    annotations = {names.NETWORKS_ANNOTATION: text} if networks else {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": where, "annotations": annotations},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "main", "image": AGNHOST, "args": ["pause"]}],
        },
    }


class Cluster:
    """The lab, and what the tests ask of it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.before: dict[str, set[str]] = {}
        """What is on each node without any network."""

    async def apply(self, *items: dict[str, Any]) -> None:
        await self.lab.kubectl("apply", "-f", "-", stdin="\n".join(json.dumps(item) for item in items))

    async def ready(self, where: str, *pods: str) -> None:
        targets = [f"pod/{name}" for name in pods]
        await self.lab.kubectl("wait", "-n", where, "--for=condition=Ready", "--timeout=120s", *targets)

    async def get(self, *words: str) -> Any:
        return json.loads(await self.lab.kubectl("get", *words, "-o", "json"))

    async def annotation(self, where: str, name: str, key: str) -> Any:
        return json.loads((await self.get("pod", "-n", where, name))["metadata"]["annotations"][key])

    async def run(self, where: str, name: str, *argv: str) -> str:
        return await self.lab.kubectl("exec", "-n", where, name, "--", *argv)

    async def reaches(self, where: str, name: str, *ping: str) -> bool:
        try:
            await self.run(where, name, "ping", "-c", "1", "-W", "3", *ping)
        except LabError:
            return False
        return True

    async def delete(self, *words: str) -> None:
        await self.lab.kubectl("delete", "--timeout=90s", *words)

    async def until(self, look: Callable[[], Awaitable[object]], what: str) -> Any:
        last: object = None
        try:
            async with asyncio.timeout(SECONDS):
                while not (last := await look()):
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise AssertionError(f"{what}: {last!r}; {self.tails()}") from None
        return last

    def tails(self) -> str:
        return "\n".join(self.lab.directory.log_tail(name, 20) for name in ("agent-n1", "agent-n2", "controller"))

    async def sandbox(self, node: str, where: str, name: str) -> tuple[str, str]:
        """Container and network namespace of a pod, as its runtime's CNI cache has them."""
        uid = (await self.get("pod", "-n", where, name))["metadata"]["uid"]
        read = await self.lab.exec(node, ["sh", "-c", "cat /var/lib/cni/results/*"])
        decoder, text, found = json.JSONDecoder(), read.stdout.strip(), []
        while text:
            body, end = decoder.raw_decode(text)
            text = text[end:].strip()
            if ["K8S_POD_UID", uid] in body["cniArgs"]:
                inside = [item["sandbox"] for item in body["result"]["interfaces"] if item.get("sandbox")]
                found.append((str(body["containerId"]), str(inside[0])))
        assert len(found) == 1, found
        return found[0]

    async def delegate(self, node: str, where: str, name: str, nad: str, command: str, interface: str) -> Completed:
        """Call the plugin as Multus does: for one attachment, with the NAD's own configuration."""
        uid = (await self.get("pod", "-n", where, name))["metadata"]["uid"]
        container, netns = await self.sandbox(node, where, name)
        config = json.loads((await self.get("net-attach-def", "-n", where, nad))["spec"]["config"])
        if command == "CHECK":
            config["prevResult"] = {"cniVersion": "1.0.0", "interfaces": [], "ips": []}
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": netns,
            "CNI_IFNAME": interface,
            "CNI_ARGS": f"IgnoreUnknown=true;K8S_POD_NAMESPACE={where};K8S_POD_NAME={name};K8S_POD_UID={uid}",
            "CNI_PATH": "/opt/cni/bin",
        }
        words = [f"{key}={value}" for key, value in environment.items()]
        plugin = ["env", *words, "/opt/cni/bin/vmnet"]
        return await self.lab.exec(node, plugin, stdin=json.dumps({**config, "cniVersion": "1.0.0"}), timeout=120)

    async def traces(self, node: str) -> set[str]:
        """Kernel objects that networks leave on a node: namespaces, links, rules, tables, the VNIs it listens for."""
        found = set()
        for argv in (["ip", "netns", "list"], ["ip", "-o", "link"], ["ip", "-o", "-d", "rule"]):
            lines = (await self._output(node, argv)).splitlines()
            found |= {line for line in lines if any(word in line for word in _MARKS)}
        for line in (await self._output(node, ["nft", "list", "tables"])).splitlines():
            if "vmnet" in line and line not in _PERMANENT:
                found.add(line)
        # Tables that are there without networks: what a network puts into them.
        for identity, kind, name in _CONTENTS:
            shown = await self.lab.exec(node, ["nft", "list", kind, *identity.split(), name])
            if "elements" in shown.stdout:
                found.add(shown.stdout)
        return found

    async def _output(self, node: str, argv: list[str]) -> str:
        done = await self.lab.exec(node, argv)
        assert done.exit == 0, done.stderr
        return done.stdout


_PERMANENT = {"table inet vmnet", "table inet vmnet-services"}
_CONTENTS = [
    ("inet vmnet", "set", "vnis"),
    *(("inet vmnet-services", "map", f"{name}{family}") for name in ("ports", "external") for family in (4, 6)),
]
_MARKS = ("vmnet-", "vmj", "vmx", "vml", "vxlan")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    """Two nodes without machines, and in namespace red what every test, alone or beside others, begins with."""
    async with Lab(f"2-{secrets.token_hex(4)}", 2, without=("virt",)) as lab:
        found = Cluster(lab)
        for node in ("n1", "n2"):
            found.before[node] = await found.traces(node)
        await found.apply(
            namespace("red"),
            network("red", "tenant", role="Primary", subnets=["10.20.0.0/16"]),
            network("red", "storage", role="Secondary", subnets=["10.30.0.0/24", "fd00:30::/64"]),
            network("red", "bare", role="Secondary", ipam={"mode": "Disabled"}),
            pod("red", "a", "n1", "storage,bare@raw0"),
            pod("red", "b", "n2", [{"name": "storage", "ips": ["10.30.0.77/24", "fd00:30::77/64"]}, {"name": "bare"}]),
            pod("red", "plain", "n2"),
        )
        await found.ready("red", "a", "b", "plain")
        yield found


async def test_pods_of_two_nodes_meet_on_a_secondary_network(cluster: Cluster) -> None:
    status = await cluster.annotation("red", "a", names.NETWORK_STATUS_ANNOTATION)
    assert [(item["name"], item["interface"], item.get("default", False)) for item in status] == [
        ("default", "eth0", False),
        ("red/tenant", "ovn-udn1", True),
        ("red/storage", "net1", False),
        ("red/bare", "raw0", False),
    ]
    assert await cluster.reaches("red", "a", "10.30.0.77")
    assert await cluster.reaches("red", "a", "-6", "fd00:30::77")
    own = (await cluster.annotation("red", "a", names.POD_NETWORKS_ANNOTATION))["red/storage"]["ip_addresses"][0]
    assert await cluster.reaches("red", "b", own.partition("/")[0])
    # It changes nothing about the primary network, and only those who asked are on it.
    routes = await cluster.run("red", "a", "ip", "-o", "route", "show", "default")
    assert routes.split()[:5] == ["default", "via", "10.20.0.1", "dev", "ovn-udn1"], routes
    other = (await cluster.annotation("red", "b", names.POD_NETWORKS_ANNOTATION))["red/tenant"]["ip_address"]
    assert await cluster.reaches("red", "a", other.partition("/")[0])
    assert "net1" not in await cluster.run("red", "plain", "ip", "-o", "link")
    assert not await cluster.reaches("red", "plain", "10.30.0.77")


async def test_a_network_without_ipam_binds_the_mac_alone(cluster: Cluster) -> None:
    """The pods bring their own addresses."""
    await cluster.run("red", "a", "ip", "addr", "add", "10.99.0.1/24", "dev", "raw0")
    await cluster.run("red", "b", "ip", "addr", "add", "10.99.0.2/24", "dev", "net2")
    await cluster.until(lambda: cluster.reaches("red", "a", "10.99.0.2"), "own addresses carry traffic")
    mac = (await cluster.run("red", "a", "cat", "/sys/class/net/raw0/address")).strip()
    await cluster.run("red", "a", "ip", "link", "set", "dev", "raw0", "address", "02:00:00:00:00:99")
    assert not await cluster.reaches("red", "a", "10.99.0.2"), "a forged MAC does not pass"
    await cluster.run("red", "a", "ip", "link", "set", "dev", "raw0", "address", mac)
    await cluster.until(lambda: cluster.reaches("red", "a", "10.99.0.2"), "the honest MAC passes again")
    # With IPAM the address is bound too.
    await cluster.run("red", "a", "ip", "addr", "add", "10.30.0.200/24", "dev", "net1")
    assert not await cluster.reaches("red", "a", "-I", "10.30.0.200", "10.30.0.77")
    await cluster.run("red", "a", "ip", "addr", "del", "10.30.0.200/24", "dev", "net1")


async def test_a_namespace_without_a_primary_network_has_secondary_ones(cluster: Cluster) -> None:
    await cluster.apply(
        namespace("plain", primary=False),
        network("plain", "storage", role="Secondary", subnets=["10.30.0.0/24"]),
        pod("plain", "a", "n1", "storage"),
        pod("plain", "b", "n2", "storage"),
    )
    await cluster.ready("plain", "a", "b")
    status = await cluster.annotation("plain", "a", names.NETWORK_STATUS_ANNOTATION)
    assert [(item["interface"], item.get("default", False)) for item in status] == [("eth0", True), ("net1", False)]
    found = await cluster.annotation("plain", "b", names.POD_NETWORKS_ANNOTATION)
    assert await cluster.reaches("plain", "a", found["plain/storage"]["ip_address"].partition("/")[0])
    routes = await cluster.run("plain", "a", "ip", "-o", "route", "show", "default")
    assert "eth0" in routes
    assert not await cluster.reaches("plain", "a", "-I", "net1", "10.30.0.77"), "red's network of the same subnet"


async def test_a_nad_that_is_deleted_by_hand_returns_and_takes_nothing_along(cluster: Cluster) -> None:
    key = ("net-attach-def", "-n", "red", "storage")
    before = await cluster.get(*key)
    port = await cluster.run("red", "a", "cat", "/sys/class/net/net1/ifindex")
    stream = ["ping", "-i", "0.2", "-c", "40", "-W", "3", "10.30.0.77"]
    pinging = asyncio.create_task(cluster.run("red", "a", *stream))
    await cluster.delete(*key, "--wait=false")

    async def returned() -> bool:
        return any(
            item["metadata"]["name"] == "storage" and item["metadata"]["uid"] != before["metadata"]["uid"]
            for item in (await cluster.get("net-attach-def", "-n", "red"))["items"]
        )

    await cluster.until(returned, "the NAD returns")
    assert " 0% packet loss" in await pinging
    assert await cluster.run("red", "a", "cat", "/sys/class/net/net1/ifindex") == port
    assert (await cluster.get(*key))["spec"] == before["spec"]


async def test_a_localnet_network_is_the_nodes_own_segment(cluster: Cluster) -> None:
    """Pods of both nodes and a host that knows nothing of vmnet meet on the physical network."""
    await cluster.apply(
        localnet("lan", subnets=["10.103.0.0/24"], excludeSubnets=["10.103.0.0/28"]),
        localnet("tagged", subnets=["10.104.0.0/24"], vlan={"mode": "Access", "access": {"id": 100}}),
        localnet("nowhere", subnets=["10.105.0.0/24"], physicalNetworkName="other"),
        pod("red", "l1", "n1", "lan"),
        pod("red", "l2", "n2", [{"name": "lan", "ips": ["10.103.0.99/24"]}]),
    )
    await cluster.ready("red", "l1", "l2")
    found = (await cluster.annotation("red", "l1", names.POD_NETWORKS_ANNOTATION))["red/lan"]
    assert found["ip_address"] == "10.103.0.16/24", "the first that is not excluded"
    assert await cluster.reaches("red", "l1", "10.103.0.99")
    done = await cluster.lab.exec("outside", ["ip", "addr", "add", "10.103.0.1/24", "dev", "eth1"])
    assert done.exit == 0, done.stderr
    assert await cluster.reaches("red", "l1", "10.103.0.1")
    done = await cluster.lab.exec("outside", ["ping", "-c", "1", "-W", "3", "10.103.0.99"], timeout=30)
    assert done.exit == 0, done.stdout
    # Port security is the same as anywhere.
    await cluster.run("red", "l1", "ip", "addr", "add", "10.103.0.200/24", "dev", "net1")
    assert not await cluster.reaches("red", "l1", "-I", "10.103.0.200", "10.103.0.1")
    assert (await cluster.run("red", "l1", "cat", "/sys/class/net/net1/mtu")).strip() == "1500"
    # What a node cannot carry is refused with the reason; this kernel's bridges do not filter VLANs.
    await cluster.apply(pod("red", "l3", "n1", "tagged"), pod("red", "l4", "n1", "nowhere"))
    events = ("events", "-n", "red")

    async def told(about: str, text: str) -> bool:
        return any(
            item["involvedObject"]["name"] == about and text in item["message"]
            for item in (await cluster.get(*events))["items"]
        )

    await cluster.until(lambda: told("l3", "does not filter VLANs and cannot carry VLAN 100"), "the tag is refused")
    await cluster.until(lambda: told("l4", "physical network other has no bridge"), "no bridge, no network")
    await cluster.delete("pod", "-n", "red", "l1", "l2", "l3", "l4")
    await cluster.delete("cudn", "lan", "tagged", "nowhere")


async def test_a_machine_s_pod_is_told_its_address_by_dhcp_and_no_router(cluster: Cluster) -> None:
    """What a launcher pod is: its guest asks, and the node answers."""
    launcher = pod("red", "launcher", "n2", "storage")
    launcher["metadata"]["labels"] = {names.LAUNCHER_LABEL: names.LAUNCHER_LABEL_VALUE}
    launcher["metadata"]["annotations"][names.DOMAIN_ANNOTATION] = "vm"
    await cluster.apply(launcher)
    await cluster.ready("red", "launcher")
    own = (await cluster.annotation("red", "launcher", names.POD_NETWORKS_ANNOTATION))["red/storage"]["ip_addresses"][0]
    ask = (
        'file=$(mktemp) && printf "#!/bin/sh\\nenv" >$file && chmod +x $file && '
        "busybox udhcpc -f -q -n -t 10 -i net1 -s $file; rm $file"
    )
    told = await cluster.run("red", "launcher", "sh", "-c", ask)
    lease = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
    assert lease["ip"] == own.partition("/")[0]
    assert (lease["mask"], lease["serverid"]) == ("24", "169.254.1.1")
    assert lease.keys().isdisjoint({"router", "dns", "domain"})
    await cluster.delete("pod", "-n", "red", "launcher")


async def test_a_meta_plugin_s_calls_make_and_remove_one_interface(cluster: Cluster) -> None:
    removed = await cluster.delegate("n1", "red", "a", "storage", "DEL", "net1")
    assert removed.exit == 0, removed.stdout
    links = await cluster.run("red", "a", "ip", "-o", "link")
    assert "net1" not in links
    assert {"raw0", "ovn-udn1"} <= {line.split(":")[1].strip().partition("@")[0] for line in links.splitlines()}
    assert (await cluster.delegate("n1", "red", "a", "storage", "CHECK", "net1")).exit == 1
    added = await cluster.delegate("n1", "red", "a", "storage", "ADD", "store0")
    assert added.exit == 0, added.stdout
    result = json.loads(added.stdout)
    assert [item["name"] for item in result["interfaces"]] == ["store0"]
    assert not any("gateway" in item for item in result["ips"])
    assert await cluster.reaches("red", "a", "10.30.0.77")
    assert (await cluster.delegate("n1", "red", "a", "storage", "CHECK", "store0")).exit == 0
    # The name that the runtime chose outlives the agent.
    await cluster.lab.restart("agent-n1")
    await cluster.until(lambda: _passes(cluster, "store0"), "CHECK passes after the agent's restart")
    assert await cluster.reaches("red", "a", "10.30.0.77")
    refused = await cluster.delegate("n1", "red", "a", "tenant", "ADD", "net9")
    assert "is a primary network" in refused.stdout
    # A node on which a meta-plugin has called leaves these networks, and network-status, to it.
    await cluster.apply(pod("red", "c", "n1", "storage"))
    await cluster.ready("red", "c")
    found = (await cluster.get("pod", "-n", "red", "c"))["metadata"]["annotations"]
    assert names.NETWORK_STATUS_ANNOTATION not in found
    assert "red/storage" in json.loads(found[names.POD_NETWORKS_ANNOTATION]), "its addresses are there for the call"
    assert "net1" not in await cluster.run("red", "c", "ip", "-o", "link")
    assert (await cluster.delegate("n1", "red", "c", "storage", "ADD", "net1")).exit == 0
    assert await cluster.reaches("red", "c", "10.30.0.77")


async def _passes(cluster: Cluster, interface: str) -> bool:
    return (await cluster.delegate("n1", "red", "a", "storage", "CHECK", interface)).exit == 0


async def test_nothing_is_left_on_any_node(cluster: Cluster) -> None:
    await cluster.delete("namespace", "red", "plain", "--ignore-not-found")
    for node in ("n1", "n2"):

        async def clean(node: str = node) -> bool:
            return await cluster.traces(node) <= cluster.before[node]

        try:
            await cluster.until(clean, f"{node} is clean")
        except AssertionError as error:
            left = await cluster.traces(node) - cluster.before[node]
            raise AssertionError(f"{node}: {left}") from error
