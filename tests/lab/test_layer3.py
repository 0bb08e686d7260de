"""Layer3 networks as a tenant writes them: blue (both families) and green, on two nodes."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import pytest
import pytest_asyncio
import yaml

from vmnet.lab.errors import LabError
from vmnet.lab.lab import Lab
from vmnet.model import names

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

T = TypeVar("T")
IMAGE = "registry.k8s.io/e2e-test-images/agnhost:2.45"
TENANTS = {
    "blue": [{"cidr": "103.103.0.0/16", "hostSubnet": 24}, {"cidr": "fd20:103::/48"}],
    "green": [{"cidr": "203.203.0.0/16"}],
}


def tenant(name: str, subnets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A namespace with its network, and a pod on each node."""
    labels = {names.PRIMARY_NETWORK_LABEL: ""}
    layer3 = {"role": "Primary", "subnets": subnets}
    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}},
        {
            "apiVersion": "k8s.ovn.org/v1",
            "kind": "UserDefinedNetwork",
            "metadata": {"namespace": name, "name": f"{name}-network"},
            "spec": {"topology": "Layer3", "layer3": layer3},
        },
    ]
    return objects + [pod(name, f"{name}-{number}", node) for number, node in enumerate(("n1", "n2", "n1"))]


def pod(namespace: str, name: str, node: str) -> dict[str, Any]:
    """A pod that answers HTTP with its name."""
    container = {"name": "agnhost", "image": IMAGE, "args": ["netexec", "--http-port=8080", "--udp-port=-1"]}
    selector = {"kubernetes.io/hostname": node}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"containers": [container], "nodeSelector": selector, "terminationGracePeriodSeconds": 1},
    }


class Tenants:
    """What the tests ask about them."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    async def get(self, *arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.lab.kubectl("get", *arguments, "-o", "json"))
        return found

    async def apply(self, *objects: dict[str, Any]) -> None:
        await self.lab.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))

    async def addresses(self, namespace: str) -> dict[str, list[str]]:
        """Pod → its addresses on the network."""
        found = {}
        for item in (await self.get("pods", "-n", namespace))["items"]:
            entries = json.loads(item["metadata"]["annotations"][names.POD_NETWORKS_ANNOTATION])
            entry = entries[f"{namespace}/{namespace}-network"]
            found[item["metadata"]["name"]] = [text.split("/")[0] for text in entry["ip_addresses"]]
        return found

    async def unreached(self, namespace: str, name: str, addresses: list[str]) -> list[str]:
        """Those that do not answer a pod's ping."""
        script = 'for address in "$@"; do ping -c 1 -W 3 "$address" >/dev/null 2>&1 || echo "$address"; done'
        return (
            await self.lab.kubectl("exec", "-n", namespace, name, "--", "sh", "-c", script, "ping", *addresses)
        ).split()

    async def parts(self) -> dict[str, dict[str, list[str]]]:
        """Node → network → its part."""
        return {
            item["metadata"]["name"]: json.loads(
                item["metadata"]["annotations"].get(names.NODE_SUBNETS_ANNOTATION, "{}")
            )
            for item in (await self.get("nodes"))["items"]
        }

    async def links(self, node: str, namespace: str) -> dict[str, int]:
        """Interfaces of a tenant's network on a node, with their numbers: one that was made anew has another."""
        metadata = (await self.get("udn", "-n", namespace, f"{namespace}-network"))["metadata"]
        place = f"vmnet-{metadata['annotations'][names.NETWORK_ID_ANNOTATION]}"
        result = await self.lab.exec(node, ["ip", "-j", "-n", place, "link", "show"])
        assert result.exit == 0, result.stderr
        return {item["ifname"]: item["ifindex"] for item in json.loads(result.stdout)}

    async def until(self, what: str, look: Callable[[], Any]) -> None:
        try:
            async with asyncio.timeout(120):
                while not await look():
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise AssertionError(f"not reached: {what}") from None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tenants() -> AsyncIterator[Tenants]:
    async with Lab(name=f"layer3-{os.getpid()}", nodes=2, without=("virt",)) as lab:
        found = Tenants(lab)
        for name, subnets in TENANTS.items():
            await found.apply(*tenant(name, subnets))
        for name in TENANTS:
            await lab.kubectl("wait", "-n", name, "--for=condition=Ready", "pod", "--all", "--timeout=120s")
        yield found


async def test_pods_reach_their_network_on_both_nodes_and_no_other(tenants: Tenants) -> None:
    blue, green = await tenants.addresses("blue"), await tenants.addresses("green")
    for namespace, own, other in (("blue", blue, green), ("green", green, blue)):
        mine = [address for found in own.values() for address in found]
        theirs = [address for found in other.values() for address in found]
        for name in own:
            assert await tenants.unreached(namespace, name, mine) == [], f"{name} of {namespace}"
        assert await tenants.unreached(namespace, f"{namespace}-0", theirs) == theirs
    for address in blue["blue-1"]:
        url = f"http://[{address}]:8080" if ":" in address else f"http://{address}:8080"
        for path, says in (("hostname", "blue-1"), ("clientip", blue["blue-0"][":" in address])):
            answer = await tenants.lab.kubectl("exec", "-n", "blue", "blue-0", "--", "curl", "-sS", f"{url}/{path}")
            assert says in answer


async def test_the_parts_are_on_the_nodes_and_the_gateways_are_those_of_the_part(tenants: Tenants) -> None:
    parts = await tenants.parts()
    assert {node: {network: len(held) for network, held in found.items()} for node, found in parts.items()} == {
        node: {"blue_blue-network": 2, "green_green-network": 1} for node in ("n1", "n2")
    }
    gateways = [held[0].replace(".0/24", ".1") for held in (parts["n1"]["blue_blue-network"],)]
    routes = await tenants.lab.kubectl("exec", "-n", "blue", "blue-0", "--", "ip", "route", "show", "default")
    assert f"via {gateways[0]} dev {names.PRIMARY_INTERFACE}" in routes


async def test_names_are_answered_at_the_gateway_whichever_node_it_is(tenants: Tenants) -> None:
    blue = await tenants.addresses("blue")
    address = blue["blue-1"][0]
    name = f"{address.replace('.', '-')}.blue.pod.cluster.local"
    for asking in ("blue-0", "blue-1"):
        gateway = blue[asking][0].rpartition(".")[0] + ".1"
        query = ["dig", f"@{gateway}", "+short", "+time=5", name]
        assert (await tenants.lab.kubectl("exec", "-n", "blue", asking, "--", *query)).split() == [address]
        query = ["dig", f"@{gateway}", "+short", "+time=5", "-x", address]
        assert (await tenants.lab.kubectl("exec", "-n", "blue", asking, "--", *query)).split() == [f"{name}."]


async def test_agents_and_controller_that_start_anew_take_over_what_is_there(tenants: Tenants) -> None:
    before = [await tenants.links(node, "blue") for node in ("n1", "n2")], await tenants.parts()
    for process in ("agent-n1", "agent-n2", "controller"):
        await tenants.lab.kill(process, signal.SIGKILL)
        await tenants.lab.wait(process)
        await tenants.lab.restart(process)
    await tenants.apply(pod("blue", "blue-3", "n2"), pod("green", "green-3", "n2"))
    for name in TENANTS:
        await tenants.lab.kubectl("wait", "-n", name, "--for=condition=Ready", "pod", "--all", "--timeout=120s")
        addresses = await tenants.addresses(name)
        everyone = [address for found in addresses.values() for address in found]
        assert len(set(everyone)) == len(everyone)
        for pod_name in (f"{name}-0", f"{name}-3"):
            assert await tenants.unreached(name, pod_name, everyone) == []
    after = [await tenants.links(node, "blue") for node in ("n1", "n2")], await tenants.parts()
    assert after[1] == before[1]
    for was, now in zip(before[0], after[0], strict=True):
        assert was.items() <= now.items(), "nothing was made anew"


async def test_a_secondary_layer3_network_is_on_net1(tenants: Tenants) -> None:
    """A namespace without a primary network: the default route stays on eth0, the other node's part is a route."""
    network = {
        "apiVersion": "k8s.ovn.org/v1",
        "kind": "UserDefinedNetwork",
        "metadata": {"namespace": "plain", "name": "storage"},
        "spec": {
            "topology": "Layer3",
            "layer3": {"role": "Secondary", "subnets": [{"cidr": "10.77.0.0/16"}, {"cidr": "fd77::/48"}]},
        },
    }
    await tenants.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "plain"}}, network)
    pods = [pod("plain", f"plain-{number}", node) for number, node in enumerate(("n1", "n2"))]
    for item in pods:
        item["metadata"]["annotations"] = {names.NETWORKS_ANNOTATION: "storage"}
    await tenants.apply(*pods)
    await tenants.lab.kubectl("wait", "-n", "plain", "--for=condition=Ready", "pod", "--all", "--timeout=120s")
    entries = {}
    for item in (await tenants.get("pods", "-n", "plain"))["items"]:
        text = item["metadata"]["annotations"][names.POD_NETWORKS_ANNOTATION]
        entries[item["metadata"]["name"]] = json.loads(text)["plain/storage"]
    assert [route["dest"] for route in entries["plain-0"]["routes"]] == ["10.77.0.0/16", "fd77::/48"]
    addresses = {name: [text.split("/")[0] for text in entry["ip_addresses"]] for name, entry in entries.items()}
    everyone = [address for found in addresses.values() for address in found]
    for name in addresses:
        assert await tenants.unreached("plain", name, everyone) == []
        routes = await tenants.lab.kubectl("exec", "-n", "plain", name, "--", "ip", "route")
        assert "default via 10.244." in routes
        assert "10.77.0.0/16 via" in routes
    # It leads to itself alone.
    script = 'ip route replace 172.30.0.100 via "$1"; ping -c 1 -W 3 172.30.0.100'
    gateway = entries["plain-0"]["routes"][0]["nextHop"]
    with pytest.raises(LabError):
        await tenants.lab.kubectl("exec", "-n", "plain", "plain-0", "--", "sh", "-c", script, "ping", gateway)
    await tenants.lab.kubectl("delete", "namespace", "plain", "--timeout=90s")


async def test_a_network_that_goes_leaves_nothing(tenants: Tenants) -> None:
    await tenants.lab.kubectl("delete", "udn", "-n", "green", "green-network", "--wait=false")

    async def refused() -> bool:
        conditions = (await tenants.get("udn", "-n", "green", "green-network"))["status"]["conditions"]
        return any("cannot be deleted while pods use it" in item["message"] for item in conditions)

    await tenants.until("the condition names the pods", refused)
    await tenants.lab.kubectl("delete", "pod", "-n", "green", "--all")

    async def gone() -> bool:
        try:
            await tenants.get("udn", "-n", "green", "green-network")
        except LabError:
            parts = await tenants.parts()
            places = [await tenants.lab.exec(node, ["ip", "netns", "list"]) for node in parts]
            left = [line for place in places for line in place.stdout.split() if line.startswith("vmnet-")]
            return all(list(found) == ["blue_blue-network"] for found in parts.values()) and len(left) == 2
        return False

    await tenants.until("network, parts and namespaces of green are gone", gone)
    blue = await tenants.addresses("blue")
    assert await tenants.unreached("blue", "blue-0", [address for found in blue.values() for address in found]) == []
