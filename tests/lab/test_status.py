"""``vmnet status`` and ``vmnet sysdump`` on a cluster that is well, and on one with one fault after the other."""

import asyncio
import base64
import json
import sys
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from vmnet.model import names

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]

NAMESPACE, NODE = "seen", "n2"
NETWORK_NAME = names.udn_network_name(NAMESPACE, "net")
SYSTEM = "vmnet-system"
PLANTED = "hunter2-Zx81-planted"
ENCODED = base64.b64encode(PLANTED.encode()).decode()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def seen(world: Any) -> AsyncIterator[Any]:
    """The lab, with a network that one pod is on."""
    block = {"role": "Primary", "subnets": ["10.91.0.0/16"]}
    spec = {"nodeName": NODE, "containers": [{"name": "c", "image": "pause"}], "terminationGracePeriodSeconds": 1}
    async with world.namespace(NAMESPACE):
        await world.apply(
            {
                "apiVersion": "k8s.ovn.org/v1",
                "kind": "UserDefinedNetwork",
                "metadata": {"name": "net", "namespace": NAMESPACE},
                "spec": {"topology": "Layer2", "layer2": block},
            },
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": NAMESPACE}, "spec": spec},
        )
        await world.lab.kubectl("wait", "-n", NAMESPACE, "pod/p", "--for=condition=Ready", "--timeout=120s")
        yield world


async def vmnet(world: Any, *words: str, timeout: float = 240) -> tuple[int, str, str]:
    """A command of the administrator's shell, outside the lab: (exit status, output, errors)."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vmnet.cmd", *words, "--kubeconfig", str(world.lab.kubeconfig)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    return process.returncode or 0, output.decode(), errors.decode()


async def looked(world: Any) -> dict[str, Any]:
    """One look; its exit status says what the findings say, whatever other tests have left."""
    status, output, errors = await vmnet(world, "status", "-o", "json")
    assert output, errors
    report: dict[str, Any] = json.loads(output)
    grades = {item["grade"] for item in report["findings"]}
    assert status == (1 if "broken" in grades else 2 if "unknown" in grades else 0)
    assert all(item["nextStep"] for item in report["findings"])
    return report


async def found(world: Any, about: str, says: str, again: Callable[[], Awaitable[Any]] | None = None) -> None:
    """Wait until it is found broken. ``again``: breaks it anew, for agents mend."""

    async def look() -> bool:
        if again is not None:
            await again()
        return any(
            item["about"] == about and says in item["says"] and item["grade"] == "broken"
            for item in (await looked(world))["findings"]
        )

    await world.until(f"status finds about {about}: {says}", look, 180)


async def mended(world: Any, about: str) -> None:
    """Wait until nothing is found about it any more."""

    async def look() -> bool:
        return all(item["about"] != about for item in (await looked(world))["findings"])

    await world.until(f"status finds nothing about {about}", look, 180)


async def test_each_fault_is_named_with_its_reason_until_it_is_mended(seen: Any) -> None:
    world = seen
    for about in ("controller", *(f"node n{number}" for number in (1, 2, 3)), f"network {NETWORK_NAME}"):
        await mended(world, about)
    report = await looked(world)
    lines = {line["about"]: line for name in ("components", "nodes", "networks", "claims") for line in report[name]}
    assert lines["controller"]["leader"]
    assert {"node n1", "node n2", "node n3"} <= lines.keys()
    network = lines[f"network {NETWORK_NAME}"]
    assert (network["endpoints"], network["nodes"]) == (1, [NODE])
    assert network["ports"] == {"open": 1, "standby": 0, "moved": 0}
    assert all(item["observedGeneration"] == network["generation"] for item in network["conditions"])

    # A network that has lost its gateway's address.
    namespace = f"vmnet-{network['id']}"

    async def without_gateway() -> None:
        await world.lab.exec(NODE, ["ip", "-n", namespace, "address", "del", "10.91.0.1/16", "dev", "br0"])

    says = f"on node {NODE}: br0 lacks gateway address 10.91.0.1"
    await found(world, f"network {NETWORK_NAME}", says, without_gateway)
    await mended(world, f"network {NETWORK_NAME}")

    # A node whose default network's configuration is gone, and with it the plugin's place.
    directory = "/etc/cni/net.d"
    listed = (await world.lab.exec("n3", ["ls", directory])).stdout.split()
    (name,) = (item for item in listed if item.endswith(".conflist"))
    kept = (await world.lab.exec("n3", ["cat", f"{directory}/{name}"])).stdout
    await world.lab.exec("n3", ["rm", f"{directory}/{name}"])
    try:
        await found(world, "node n3", "has no configuration of a default network yet")
    finally:
        await world.lab.exec("n3", ["tee", f"{directory}/{name}"], stdin=kept)
    await mended(world, "node n3")

    # A node without a running agent.
    await world.lab.kill("agent-n3")
    try:
        await found(world, "node n3", "the agent does not run: its container ended with exit status 137")
        status, output, errors = await vmnet(world, "status", "--wait", "--timeout", "1")
        assert (status, "NODES" in output, "waiting: " in errors) == (1, True, True)
    finally:
        await world.lab.restart("agent-n3")
    await mended(world, "node n3")


async def test_who_cannot_look_is_told_so(seen: Any, tmp_path: Path) -> None:
    configuration = tmp_path / "kubeconfig"
    body = yaml.safe_load(seen.lab.kubeconfig.read_text())
    body["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    configuration.write_text(yaml.safe_dump(body))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vmnet.cmd", "status", "--kubeconfig", str(configuration)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(120):
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"kubectl get nodes" in errors


def plants(namespace: str) -> list[dict[str, Any]]:
    """Objects with secrets of several kinds, where an archive looks."""

    def item(version: str, kind: str, where: str, **parts: Any) -> dict[str, Any]:
        return {"apiVersion": version, "kind": kind, "metadata": {"name": "planted", "namespace": where}, **parts}

    cloud = {"userData": f"#cloud-config\npassword: {PLANTED}\n", "networkData": PLANTED}
    disks = [
        {"name": "ci", "cloudInitNoCloud": cloud},
        {"name": "cd", "cloudInitConfigDrive": {"userDataBase64": ENCODED}},
    ]
    domain = {"resources": {"requests": {"memory": "64Mi"}}, "devices": {}}
    machine = {"template": {"spec": {"domain": domain, "volumes": disks}}, "runStrategy": "Halted"}
    environment = [{"name": "DB_PASSWORD", "value": PLANTED}, {"name": "PLAIN", "value": "kept-in-the-archive"}]
    command = ["sleep", "infinity"]
    container = {"name": "c", "image": "pause", "command": command, "args": [], "env": environment}
    event = {
        "involvedObject": {"kind": "Pod", "name": "planted", "namespace": namespace},
        "reason": "Planted",
        "message": f"cannot pull from https://me:{PLANTED}@registry.example/x with Authorization: Bearer {PLANTED}",
        "type": "Warning",
    }
    return [
        item("v1", "Secret", SYSTEM, data={"tls.key": ENCODED}),
        item("v1", "Secret", namespace, stringData={"password": PLANTED}),
        item("v1", "ConfigMap", SYSTEM, data={"config.yaml": f"shared: {{}}\napi-token: {PLANTED}\n"}),
        item("v1", "Pod", namespace, spec={"containers": [container], "nodeSelector": {"no": "such"}}),
        item("kubevirt.io/v1", "VirtualMachine", namespace, spec=machine),
        item("v1", "Event", namespace, **event),
    ]


async def test_an_archive_has_everything_but_secrets(seen: Any, tmp_path: Path) -> None:
    world = seen
    path = tmp_path / "dump.tar.gz"
    objects = plants(NAMESPACE)
    await world.apply(*objects)
    try:
        status, output, errors = await vmnet(world, "sysdump", "-o", str(path))
        assert status == 0, errors
        assert output.strip() == str(path)
        assert "sysdump: nodes" in errors
        again, _, refusal = await vmnet(world, "sysdump", "-o", str(path))
        assert again == 1
        assert "exists already" in refusal
    finally:
        await world.lab.kubectl("delete", "-f", "-", "--wait=false", stdin=yaml.safe_dump_all(objects))
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path, filter="data")
    root = tmp_path / "dump"
    files = {str(item.relative_to(root)): item.read_bytes() for item in root.rglob("*") if item.is_file()}
    user = yaml.safe_load(world.lab.kubeconfig.read_text())["users"][0]["user"]
    credentials = [str(value).encode() for key, value in user.items() if key in ("token", "client-key-data")]
    assert credentials
    for name, content in files.items():
        for secret in (PLANTED.encode(), ENCODED.encode(), b"PRIVATE KEY-----", *credentials):
            assert secret not in content, name
    assert b"kept-in-the-archive" in files["objects/pods.json"]
    assert b'"tls.key": "[redacted]"' in files["objects/secrets.json"]
    assert b"Planted" in files["objects/events.json"]

    manifest = json.loads(files["MANIFEST.json"])
    assert {item["path"] for item in manifest["files"]} == files.keys() - {"MANIFEST.json"}
    assert all(item["how"] for item in manifest["files"])
    # A kernel without VLAN filters says so; nothing else fails.
    failed = {item["path"]: item["error"] for item in manifest["failed"]}
    assert all(path.endswith("/vlan.json") for path in failed), failed
    number = (await world.get("udn", "-n", NAMESPACE, "net"))["metadata"]["annotations"]
    namespace = f"vmnet-{number[names.NETWORK_ID_ANNOTATION]}"
    for kernel in ("links.json", "ruleset.json", "fdb.json", "sysctls.txt"):
        assert files[f"nodes/{NODE}/{namespace}/{kernel}"], kernel
    assert "net/bridge" in files[f"nodes/{NODE}/{namespace}/sysctls.txt"].decode()
    assert any(link["ifname"] == "br0" for link in json.loads(files[f"nodes/{NODE}/{namespace}/links.json"]))
    assert json.loads(files[f"nodes/{NODE}/node/ruleset.json"])["nftables"]
    assert b"vmnet_network_healthy" in files["metrics/vmnet-agent-n1.txt"]
    assert b"vmnet_leading" in files["metrics/vmnet-controller-n1.txt"]
    assert files["logs/vmnet-agent-n1.agent.log"]
    assert files["logs/vmnet-controller-n1.controller.log"]
    assert json.loads(files["status.json"])["nodes"]


async def test_a_deleted_pod_of_ours_is_a_process_that_begins_anew(seen: Any) -> None:
    world, pod = seen, "vmnet-agent-n2"
    before = (await world.get("pod", "-n", SYSTEM, pod))["metadata"]["uid"]
    await world.lab.kubectl("delete", "pod", "-n", SYSTEM, pod, "--wait=false")

    async def anew() -> bool:
        items = (await world.get("pods", "-n", SYSTEM))["items"]
        now = next((item for item in items if item["metadata"]["name"] == pod), None)
        return now is not None and now["metadata"]["uid"] != before

    await world.until(f"{pod} is another one", anew, 120)
    await mended(world, "node n2")
