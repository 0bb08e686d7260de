"""What a runtime may ask of the CNI plugin and what it gets: one whole agent, the real kernel, the default network by
Debian's plugins, calls as libcni makes them. A program that runs in namespaces of its own: ``python cni_node.py SHIM``.

The facts are the CNI specification's (1.1.0, and the older versions' where they differ).
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from vmnet.agent.agent import Agent
from vmnet.agent.cluster import Stores
from vmnet.kernel.linux import LinuxKernel
from vmnet.kube import api
from vmnet.kube.fake import FakeKube
from vmnet.kube.watch import ListWatch
from vmnet.model import names
from vmnet.model.configuration import assemble
from vmnet.model.names import NetworkId
from vmnet.model.network import Network, Role

SHIM = Path(sys.argv[1])
SOCKET = Path("/run/vmnet/cni.sock")
VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
TENANT = Network("red_tenant", NetworkId(1), role=Role.PRIMARY, subnets=(ip_network("10.20.0.0/16"),))
STORAGE = Network("red_storage", NetworkId(2), role=Role.SECONDARY, subnets=(ip_network("10.30.0.0/24"),))
BRIDGE = {
    "type": "bridge",
    "bridge": "cni0",
    "isDefaultGateway": True,
    "ipam": {"type": "host-local", "subnet": "10.244.1.0/24", "dataDir": "/run/addresses"},
}
Body = dict[str, Any]


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=60).stdout


class Pod:
    """A container with a namespace, a pod in the API, and what the runtime keeps of it."""

    def __init__(self, kube: FakeKube, number: int, *, asks: str = "") -> None:
        self.name, self.uid, self.container = f"pod-{number}", f"uid-{number}", f"container.{number}_x-y"
        self.netns = f"/run/netns/{self.name}"
        self.address = f"10.20.1.{number}"
        self.previous: Body = {}
        """The default network's result."""
        self.result: Body = {}
        ip("netns", "add", self.name)
        entry = {"ip_addresses": [f"{self.address}/16"], "mac_address": f"0a:58:0a:14:01:{number:02x}"}
        other = {"ip_addresses": [f"10.30.0.{number}/24"], "mac_address": f"0a:58:0a:1e:00:{number:02x}"}
        networks = json.dumps({"red/tenant": entry, "red/storage": other})
        metadata = {"namespace": "red", "name": self.name, "uid": self.uid, "labels": {}}
        annotations = {names.POD_NETWORKS_ANNOTATION: networks, **({names.NETWORKS_ANNOTATION: asks} if asks else {})}
        item = {"metadata": {**metadata, "annotations": annotations}, "spec": {"nodeName": "n1"}, "status": {}}
        kube.seed(api.PODS, item)

    def environment(self, command: str) -> dict[str, str]:
        return {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.container,
            "CNI_NETNS": self.netns,
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=red;K8S_POD_NAME={self.name};K8S_POD_UID={self.uid}",
            "CNI_PATH": "/usr/lib/cni",
        }

    def interfaces(self) -> set[str]:
        return {str(item["ifname"]) for item in json.loads(ip("-n", self.name, "-j", "link"))}


async def start(program: Path, environment: Mapping[str, str], config: bytes) -> tuple[int, bytes]:
    process = await asyncio.create_subprocess_exec(
        program,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={"PATH": "/usr/sbin:/usr/bin", **environment},
    )
    async with asyncio.timeout(90):
        output, _ = await process.communicate(config)
    return process.returncode or 0, output


async def call(environment: Mapping[str, str], config: Body | bytes, shim: Path = SHIM) -> tuple[int, Any]:
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    status, output = await start(shim, environment, text)
    return status, json.loads(output) if output else None


def chained(version: str, **more: Any) -> Body:
    """The plugin's configuration, as the runtime derives it from the chain."""
    return {"cniVersion": version, "name": "default", "type": "vmnet-cni", **more}


async def refused(environment: Mapping[str, str], config: Body | bytes, code: int, version: str | None = None) -> Body:
    """Every error is JSON of the specification's form, in the version of the request."""
    status, body = await call(environment, config)
    assert status == 1, body
    assert body["code"] == code, (body, environment)
    assert body["msg"]
    assert set(body) <= {"cniVersion", "code", "msg", "details"}
    if code == 5:
        # What could not be read names no version.
        return dict(body)
    wanted = version or (config.get("cniVersion", "1.1.0") if isinstance(config, dict) else "1.1.0")
    assert body["cniVersion"] == wanted, body
    return dict(body)


async def add(pod: Pod, version: str) -> Body:
    """The chain's ADD: Debian's bridge plugin, whose newest version is 1.0.0, then ours."""
    spoken = min(version, "1.0.0")
    status, output = await start(
        Path("/usr/lib/cni/bridge"),
        pod.environment("ADD"),
        json.dumps({"cniVersion": spoken, "name": "default", **BRIDGE}).encode(),
    )
    assert status == 0, output
    pod.previous = {**json.loads(output), "cniVersion": version}
    status, pod.result = await call(pod.environment("ADD"), chained(version, prevResult=pod.previous))
    assert status == 0, pod.result
    return pod.result


async def results_have_the_form_of_their_version(pod: Pod, version: str) -> None:
    result = await add(pod, version)
    assert result["cniVersion"] == version
    (index,) = [i for i, item in enumerate(result["interfaces"]) if item["name"] == "ovn-udn1"]
    mine = result["interfaces"][index]
    assert mine["sandbox"] == pod.netns
    assert ("mtu" in mine) == (version == "1.1.0")
    # What the default network's plugin said of its own stays.
    assert result["interfaces"][:index] == pod.previous["interfaces"]
    assert result["dns"] == pod.previous["dns"]
    default, added = result["ips"]
    assert result["interfaces"][default["interface"]]["name"] == "eth0"
    assert default["address"] == pod.previous["ips"][0]["address"]
    assert added["interface"] == index
    assert (added["address"], added["gateway"]) == (f"{pod.address}/16", "10.20.0.1")
    assert [item.get("version") for item in result["ips"]] == ([None] * 2 if version >= "1.0.0" else ["4", "4"])
    shown = json.loads(ip("-n", pod.name, "-j", "addr", "show", "ovn-udn1"))
    assert [item["local"] for item in shown[0]["addr_info"] if item["family"] == "inet"] == [pod.address]


async def checks(pod: Pod, version: str) -> None:
    config = chained(version, prevResult=pod.result)
    if version < "0.4.0":
        await refused(pod.environment("CHECK"), config, 1)
        return
    assert await call(pod.environment("CHECK"), config) == (0, None)
    await refused(pod.environment("CHECK"), chained(version), 7)
    ip("-n", pod.name, "addr", "del", f"{pod.address}/16", "dev", "ovn-udn1")
    ip("-n", pod.name, "link", "del", "ovn-udn1")
    await refused(pod.environment("CHECK"), config, 101)


async def deletes(pod: Pod, version: str) -> None:
    """Success, always and again: without a result, without a namespace, for a container that never was."""
    assert await call(pod.environment("DEL"), chained(version, prevResult=pod.result)) == (0, None)
    assert pod.interfaces() == {"lo", "eth0"}
    assert await call(pod.environment("DEL"), chained(version, prevResult=pod.result)) == (0, None)
    assert await call(pod.environment("DEL"), chained(version)) == (0, None)
    without = {key: value for key, value in pod.environment("DEL").items() if key not in ("CNI_NETNS", "CNI_ARGS")}
    assert await call(without, chained(version)) == (0, None)
    ip("netns", "del", pod.name)
    assert await call(pod.environment("DEL"), chained(version, prevResult=pod.result)) == (0, None)
    assert await call({**without, "CNI_CONTAINERID": "never"}, chained(version)) == (0, None)


async def a_namespace_that_went_first(pod: Pod, version: str) -> None:
    await add(pod, version)
    ip("netns", "del", pod.name)
    assert await call(pod.environment("DEL"), chained(version, prevResult=pod.result)) == (0, None)
    assert await call({**pod.environment("DEL"), "CNI_NETNS": ""}, chained(version)) == (0, None)


async def asks_for_the_version(version: str) -> None:
    status, body = await call({"CNI_COMMAND": "VERSION"}, {"cniVersion": version})
    assert status == 0
    assert body["cniVersion"] == version
    assert set(VERSIONS) <= set(body["supportedVersions"])


async def knows_what_a_version_has(version: str) -> None:
    for command, config in (("STATUS", chained(version)), ("GC", chained(version, **{VALID: []}))):
        if version == "1.1.0":
            continue
        await refused({"CNI_COMMAND": command}, config, 1)
    if version == "1.1.0":
        assert await call({"CNI_COMMAND": "STATUS"}, chained(version)) == (0, None)


VALID = "cni.dev/valid-attachments"


async def collects(kube: FakeKube, first: int) -> None:
    """What is not listed goes; without a list nothing does."""
    pods = [Pod(kube, first + n) for n in range(2)]
    for pod in pods:
        await add(pod, "1.1.0")
    await refused({"CNI_COMMAND": "GC"}, chained("1.1.0"), 7)
    await refused({"CNI_COMMAND": "GC"}, chained("1.1.0", **{VALID: [{"containerID": pods[0].container}]}), 7)
    assert [pod.interfaces() for pod in pods] == [{"lo", "eth0", "ovn-udn1"}] * 2
    kept = [{"containerID": pods[0].container, "ifname": "eth0"}]
    assert await call({"CNI_COMMAND": "GC", "CNI_PATH": "/usr/lib/cni"}, chained("1.1.0", **{VALID: kept})) == (0, None)
    assert [pod.interfaces() for pod in pods] == [{"lo", "eth0", "ovn-udn1"}, {"lo", "eth0"}]
    assert await call({"CNI_COMMAND": "GC"}, chained("1.1.0", **{VALID: []})) == (0, None)
    assert pods[0].interfaces() == {"lo", "eth0"}


async def attaches_one(pod: Pod, version: str) -> None:
    """A meta-plugin's calls: no result of a previous plugin, and one of its own."""
    config = {**json.loads(STORAGE.to_nad_config("red/storage")), "cniVersion": version}
    environment = {**pod.environment("ADD"), "CNI_IFNAME": "net1"}
    status, result = await call(environment, config)
    assert status == 0, result
    assert [item["name"] for item in result["interfaces"]] == ["net1"]
    assert result["cniVersion"] == version
    assert await call({**environment, "CNI_COMMAND": "DEL"}, config) == (0, None)
    assert pod.interfaces() == {"lo"}


async def refuses_what_is_wrong(pod: Pod) -> None:
    good, config = pod.environment("ADD"), chained("1.0.0", prevResult={"cniVersion": "1.0.0"})
    # 1: a version that is not spoken.
    for version in ("0.2.0", "1.2.0", "9", "x"):
        await refused(good, {**config, "cniVersion": version}, 1)
    # 4: the environment; the message names the variable.
    for name in ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"):
        for environment in ({**good, name: ""}, {key: value for key, value in good.items() if key != name}):
            assert name in (await refused(environment, config, 4))["msg"]
    wrong = {
        "CNI_CONTAINERID": ("../../etc/passwd", ".hidden", "a/b", "a b", "a\nb", "-x", "é"),
        "CNI_IFNAME": ("..", ".", "../x", "a/b", "a b", "a:b", "sixteen-letters-", "tab\t"),
        "CNI_NETNS": ("red", "../netns/red"),
        "CNI_ARGS": ("novalue", "=x"),
    }
    for name, values in wrong.items():
        for value in values:
            assert name in (await refused({**good, name: value}, config, 4))["msg"]
            if name in ("CNI_CONTAINERID", "CNI_IFNAME"):
                await refused({**pod.environment("DEL"), name: value}, config, 4)
    for command in ("", "MOVE", "add"):
        assert "CNI_COMMAND" in (await refused({**good, "CNI_COMMAND": command}, config, 4))["msg"]
    assert "CNI_COMMAND" in (await refused({}, config, 4))["msg"]
    # 6: what is no JSON object.
    for text in (b"", b"{", b"[]", b"1", b'{"cniVersion": "1.0.0", "name": "\xff"}'):
        await refused(good, text, 6)
    # 7: a configuration that cannot be.
    for change in ({"name": ""}, {"name": "../x"}, {"name": 1}, {"prevResult": []}, {"prevResult": None}):
        await refused(good, {**config, **change}, 7)
    # 5: more than there may be.
    await refused(good, {**config, "text": "x" * (1 << 20)}, 5)
    assert pod.interfaces() == {"lo"}


async def passes_on_what_is_not_its_own(version: str) -> None:
    """A container that is no pod's: the previous result, unchanged."""
    previous = {"cniVersion": version, "interfaces": [{"name": "eth0"}], "ips": [], "x.example/key": [1]}
    environment = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "bare", "CNI_NETNS": "/run/netns/x", "CNI_IFNAME": "eth0"}
    assert await call(environment, chained(version, prevResult=previous)) == (0, previous)


async def without_an_agent(pod: Pod) -> None:
    """Try again later; STATUS says that no ADD can be served; DEL succeeds, and is carried out later."""
    wait = {"VMNET_CNI_WAIT": "0.2"}
    config = chained("1.1.0", prevResult=pod.result)
    await refused({**pod.environment("ADD"), **wait}, config, 11)
    await refused({**pod.environment("CHECK"), **wait}, config, 11)
    await refused({"CNI_COMMAND": "GC", **wait}, chained("1.1.0", **{VALID: []}), 11)
    await refused({"CNI_COMMAND": "STATUS", **wait}, chained("1.1.0"), 50)
    assert pod.interfaces() == {"lo", "eth0", "ovn-udn1"}
    assert await call(pod.environment("DEL"), config) == (0, None)


async def status_follows_readiness(agent: Agent) -> None:
    """Error 50 carries the reason that /readyz gives; a network that is broken, as one is by now, makes no 51 of it."""
    stores = agent._stores.all()
    stores[0].synced.clear()
    reason = agent.not_ready()
    assert reason
    body = await refused({"CNI_COMMAND": "STATUS"}, chained("1.1.0"), 50)
    assert body["details"] == reason
    stores[0].synced.set()
    assert await call({"CNI_COMMAND": "STATUS"}, chained("1.1.0")) == (0, None)


@asynccontextmanager
async def running(kube: FakeKube) -> AsyncIterator[Agent]:
    kernel = LinuxKernel()
    kinds = (api.PODS, api.NODES, api.NAMESPACES, api.NADS)
    optional = {"machines": api.VMIS, "service_cidrs": api.SERVICE_CIDRS}
    stores = Stores(
        *(ListWatch(kube, kind) for kind in kinds),
        services=ListWatch(kube, api.SERVICES),
        endpoint_slices=ListWatch(kube, api.ENDPOINT_SLICES),
        policies=ListWatch(kube, api.POLICIES),
        **{name: ListWatch(kube, kind, optional=True) for name, kind in optional.items()},
    )
    agent = Agent(
        assemble({"agent.nodeName": "n1", "agent.kubeletCgroup": "", "agent.multus": "no"}), kernel, kube, stores
    )
    working = asyncio.create_task(agent.run())
    try:
        async with asyncio.timeout(60):
            while agent.not_ready() is not None:
                assert not working.done(), working.exception()
                await asyncio.sleep(0.02)
        yield agent
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await kernel.close()


def cluster() -> FakeKube:
    kube = FakeKube()
    address = {"addresses": [{"type": "InternalIP", "address": "172.30.0.11"}]}
    kube.seed(api.NODES, {"metadata": {"name": "n1", "annotations": {}}, "status": address})
    kube.seed(api.NAMESPACES, {"metadata": {"name": "red", "labels": {names.PRIMARY_NETWORK_LABEL: ""}}})
    for network in (TENANT, STORAGE):
        name = network.name.partition("_")[2]
        number = {names.NETWORK_ID_ANNOTATION: str(network.id)}
        config = network.to_nad_config(f"red/{name}")
        kube.seed(
            api.NADS,
            {"metadata": {"namespace": "red", "name": name, "annotations": number}, "spec": {"config": config}},
        )
    return kube


async def main() -> None:
    kube = cluster()
    async with running(kube) as agent:
        for number, version in enumerate(VERSIONS):
            await asks_for_the_version(version)
            await knows_what_a_version_has(version)
            await passes_on_what_is_not_its_own(version)
            pod = Pod(kube, 10 + number)
            await results_have_the_form_of_their_version(pod, version)
            await checks(pod, version)
            await deletes(pod, version)
        for number, version in enumerate((VERSIONS[0], VERSIONS[-1])):
            await a_namespace_that_went_first(Pod(kube, 20 + number), version)
            await attaches_one(Pod(kube, 30 + number, asks="storage@net1"), version)
        await refuses_what_is_wrong(Pod(kube, 40))
        await collects(kube, 50)
        await status_follows_readiness(agent)
        left = Pod(kube, 60)
        await add(left, "1.1.0")
    await without_an_agent(left)
    async with running(kube):
        # The DEL that found no agent was carried out before the agent said that it was ready.
        assert left.interfaces() == {"lo", "eth0"}


if __name__ == "__main__":
    asyncio.run(main())
