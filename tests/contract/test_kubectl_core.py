"""Unmodified kubectl against the embedded API: what people type every day, with the machine's binary and PyPI's."""

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from vmnet.lab.apiserver.resources import ResourceInfo
from vmnet.lab.apiserver.server import ApiServer
from vmnet.lab.apiserver.testing import Kubectl, running_server

BINARIES = [
    path
    for path in dict.fromkeys((shutil.which("kubectl", path="/usr/bin"), str(Path(sys.executable).parent / "kubectl")))
    if path and Path(path).exists()
]

THINGS = """
apiVersion: v1
kind: ConfigMap
metadata: {name: cfg}
data: {a: "1", b: "1"}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, image: "registry.example.test/c:1"}]}
"""

DEFINITION = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: gadgets.lab.example.test}
spec:
  group: lab.example.test
  scope: Namespaced
  names: {plural: gadgets, singular: gadget, kind: Gadget, shortNames: [gd]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    additionalPrinterColumns:
    - {name: Size, type: integer, jsonPath: .spec.size}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            required: [size]
            properties:
              size: {type: integer, minimum: 1, maximum: 10}
              mode: {type: string, default: fast}
              id: {type: string, x-kubernetes-validations: [{rule: self == oldSelf, message: id is immutable}]}
          status:
            type: object
            properties:
              phase: {type: string}
"""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ApiServer]:
    async with running_server(tmp_path) as found:
        yield found


@pytest.fixture(params=BINARIES, ids=lambda path: "machine" if path.startswith("/usr") else "pypi")
async def kubectl(server: ApiServer, tmp_path: Path, request: pytest.FixtureRequest) -> Kubectl:
    found = Kubectl(server, tmp_path, request.param)
    await found.check("create", "namespace", "t")
    await found.check("config", "set-context", "--current", "--namespace=t")
    return found


async def get(kubectl: Kubectl, *arguments: str) -> Any:
    return json.loads(await kubectl.check("get", *arguments, "-o", "json"))


async def test_apply_get_change_and_delete(kubectl: Kubectl) -> None:
    created = await kubectl.check("apply", "-f", "-", stdin=THINGS)
    assert created.splitlines() == ["configmap/cfg created", "service/web created", "deployment.apps/web created"]
    again = await kubectl.check("apply", "-f", "-", stdin=THINGS)
    assert all(line.endswith("unchanged") for line in again.splitlines())
    changed = await kubectl.check("apply", "-f", "-", stdin=THINGS.replace('a: "1", b: "1"', 'a: "2"'))
    assert "configmap/cfg configured" in changed
    assert (await get(kubectl, "cm", "cfg"))["data"] == {"a": "2"}
    deployment = await get(kubectl, "deploy", "web")
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": "25%", "maxUnavailable": "25%"}
    assert (await get(kubectl, "svc", "web"))["spec"]["clusterIP"].startswith("10.96.")
    await kubectl.check("delete", "-f", "-", stdin=THINGS)
    assert (await kubectl("get", "cm", "cfg")).stderr == 'Error from server (NotFound): configmaps "cfg" not found\n'


async def test_server_side_apply_with_conflicts(kubectl: Kubectl) -> None:
    text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: cfg}\ndata: {a: '%s'}\n"
    await kubectl.check("apply", "--server-side", "-f", "-", stdin=text % 1)
    refused = await kubectl("apply", "--server-side", "--field-manager=two", "-f", "-", stdin=text % 2)
    assert refused.exit == 1
    assert 'conflict with "kubectl": .data.a' in refused.stderr
    arguments = ("apply", "--server-side", "--field-manager=two", "--force-conflicts", "-f", "-")
    await kubectl.check(*arguments, stdin=text % 2)
    found = await get(kubectl, "cm", "cfg", "--show-managed-fields")
    assert [entry["manager"] for entry in found["metadata"]["managedFields"]] == ["two"]


async def test_client_side_apply_goes_over_to_server_side(kubectl: Kubectl) -> None:
    await kubectl.check("apply", "-f", "-", stdin=THINGS)
    await kubectl.check("apply", "--server-side", "-f", "-", stdin=THINGS)
    found = await get(kubectl, "deploy", "web", "--show-managed-fields")
    managers = {entry["manager"] for entry in found["metadata"]["managedFields"]}
    assert managers == {"kubectl", "kubectl-last-applied"}


async def test_edits_of_one_object(kubectl: Kubectl) -> None:
    await kubectl.check("apply", "-f", "-", stdin=THINGS)
    await kubectl.check("label", "cm", "cfg", "tier=a")
    await kubectl.check("annotate", "cm", "cfg", "note=b")
    await kubectl.check("patch", "cm", "cfg", "--type=merge", "-p", '{"data":{"c":"1","a":null}}')
    await kubectl.check("patch", "cm", "cfg", "--type=json", "-p", '[{"op":"add","path":"/data/d","value":"1"}]')
    await kubectl.check(
        "patch", "deploy", "web", "-p", '{"spec":{"template":{"spec":{"containers":[{"name":"d","image":"i:1"}]}}}}'
    )
    await kubectl.check("scale", "deploy", "web", "--replicas=3")
    await kubectl.check("set", "image", "deploy/web", "c=i:2")
    config, deployment = await get(kubectl, "cm", "cfg"), await get(kubectl, "deploy", "web")
    assert config["data"] == {"b": "1", "c": "1", "d": "1"}
    assert config["metadata"]["labels"] == {"tier": "a"}
    assert deployment["spec"]["replicas"] == 3
    images = {item["name"]: item["image"] for item in deployment["spec"]["template"]["spec"]["containers"]}
    assert images == {"c": "i:2", "d": "i:1"}
    config["data"] = {"replaced": "1"}
    await kubectl.check("replace", "-f", "-", stdin=json.dumps(config))
    stale = await kubectl("replace", "-f", "-", stdin=json.dumps(config))
    assert "the object has been modified" in stale.stderr


async def test_output_forms(kubectl: Kubectl) -> None:
    await kubectl.check("apply", "-f", "-", stdin=THINGS)
    assert (await kubectl.check("get", "cm", "cfg", "-o", "jsonpath={.data.a}")) == "1"
    assert (await kubectl.check("get", "cm,svc", "-o", "name")).splitlines() == ["configmap/cfg", "service/web"]
    assert "name: cfg" in await kubectl.check("get", "cm", "cfg", "-o", "yaml")
    lines = (await kubectl.check("get", "svc", "-o", "wide")).splitlines()
    assert lines[0].split() == ["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE", "SELECTOR"]
    assert lines[1].split()[0] == "web"
    assert (await kubectl.check("get", "ns", "t", "--no-headers")).split()[:2] == ["t", "Active"]
    assert "deployment.apps/web" in await kubectl.check("get", "all")
    assert (await kubectl.check("get", "cm", "-l", "none=x", "-o", "name")) == ""
    assert (await kubectl.check("get", "cm", "--field-selector", "metadata.name=cfg", "-o", "name")) != ""


async def test_watching_and_waiting(kubectl: Kubectl) -> None:
    await kubectl.check("run", "p", "--image=registry.example.test/c:1")
    watch = await kubectl.start("get", "pods", "-w", "--no-headers", "-o", "custom-columns=P:.status.phase")
    wait = await kubectl.start("wait", "pod/p", "--for=condition=Ready", "--timeout=20s")
    assert watch.stdout is not None
    try:
        async with asyncio.timeout(20):
            assert (await watch.stdout.readline()).strip() == b"Pending"
            status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
            await kubectl.check(
                "patch", "pod", "p", "--subresource=status", "--type=merge", "-p", json.dumps({"status": status})
            )
            assert (await watch.stdout.readline()).strip() == b"Running"
            out, err = await wait.communicate()
            assert out == b"pod/p condition met\n", err
    finally:
        for process in (watch, wait):
            if process.returncode is None:
                process.kill()
            await process.wait()
    gone = await kubectl.start("wait", "pod/p", "--for=delete", "--timeout=20s")
    await kubectl.check("delete", "pod", "p")
    assert await asyncio.wait_for(gone.wait(), 20) == 0


async def test_finalizers_owners_and_namespaces(kubectl: Kubectl, server: ApiServer) -> None:
    await kubectl.check("create", "configmap", "owner")
    uid = (await get(kubectl, "cm", "owner"))["metadata"]["uid"]
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid}
    for name, finalizers in (("child", []), ("held", ["lab.example.test/hold"])):
        metadata = {"name": name, "ownerReferences": [owner], "finalizers": finalizers}
        body = json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})
        await kubectl.check("create", "-f", "-", stdin=body)
    await kubectl.check("delete", "cm", "owner")
    await kubectl.check("wait", "cm/child", "--for=delete", "--timeout=10s")
    assert "deletionTimestamp" in (await get(kubectl, "cm", "held"))["metadata"]
    await kubectl.check("delete", "ns", "t", "--wait=false")
    status = (await get(kubectl, "ns", "t"))["status"]
    assert status["phase"] == "Terminating"
    refused = await kubectl("create", "configmap", "late")
    assert "because it is being terminated" in refused.stderr
    await kubectl.check("patch", "cm", "held", "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
    await kubectl.check("wait", "ns/t", "--for=delete", "--timeout=10s")
    assert not list(server.store.items(("", "configmaps"), "t"))


async def test_describe_events_and_explain(kubectl: Kubectl) -> None:
    await kubectl.check("run", "p", "--image=registry.example.test/c:1")
    pod = await get(kubectl, "pod", "p")
    reference = {"kind": "Pod", "name": "p", "namespace": "t", "uid": pod["metadata"]["uid"], "apiVersion": "v1"}
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": "p.1"},
        "involvedObject": reference,
        "reason": "Migrated",
        "message": "moved to n2",
        "type": "Normal",
        "count": 1,
        "firstTimestamp": pod["metadata"]["creationTimestamp"],
        "lastTimestamp": pod["metadata"]["creationTimestamp"],
        "source": {"component": "vmnet"},
    }
    await kubectl.check("create", "-f", "-", stdin=json.dumps(event))
    described = await kubectl.check("describe", "pod", "p")
    assert "moved to n2" in described
    assert "moved to n2" in await kubectl.check("events")
    assert "Migrated" in await kubectl.check("get", "events")
    assert "FIELD: containers" in await kubectl.check("explain", "pod.spec.containers")


async def test_custom_resources(kubectl: Kubectl) -> None:
    await kubectl.check("apply", "-f", "-", stdin=DEFINITION)
    await kubectl.check("wait", "crd/gadgets.lab.example.test", "--for=condition=Established", "--timeout=10s")
    gadget: dict[str, Any] = {
        "apiVersion": "lab.example.test/v1",
        "kind": "Gadget",
        "metadata": {"name": "g"},
        "spec": {"size": 3, "id": "one"},
    }
    await kubectl.check("apply", "-f", "-", stdin=json.dumps(gadget))
    assert (await get(kubectl, "gd", "g"))["spec"] == {"size": 3, "id": "one", "mode": "fast"}
    assert (await kubectl.check("get", "gd", "--no-headers")).split()[:2] == ["g", "3"]
    refused = await kubectl("patch", "gd", "g", "--type=merge", "-p", '{"spec":{"id":"two"}}')
    assert "id is immutable" in refused.stderr
    refused = await kubectl("patch", "gd", "g", "--type=merge", "-p", '{"spec":{"size":70}}')
    assert "spec.size in body should be less than or equal to 10" in refused.stderr
    await kubectl.check("patch", "gd", "g", "--subresource=status", "--type=merge", "-p", '{"status":{"phase":"Up"}}')
    found = await get(kubectl, "gd", "g")
    assert (found["status"], found["metadata"]["generation"]) == ({"phase": "Up"}, 1)
    unknown = {**gadget, "metadata": {"name": "h"}, "spec": {"size": 1, "colour": "red"}}
    refused = await kubectl("create", "-f", "-", stdin=json.dumps(unknown))
    assert 'unknown field "spec.colour"' in refused.stderr
    await kubectl.check("apply", "--server-side", "--field-manager=m", "-f", "-", stdin=json.dumps(gadget))
    await kubectl.check("delete", "crd", "gadgets.lab.example.test", timeout=20)
    assert (await kubectl("get", "gadgets")).exit == 1


async def test_identities(kubectl: Kubectl) -> None:
    assert (await kubectl.check("auth", "can-i", "create", "pods")).strip() == "yes"
    await kubectl.check("create", "serviceaccount", "robot")
    token = (await kubectl.check("create", "token", "robot")).strip()
    found = await kubectl.check("auth", "whoami", f"--token={token}", "-o", "jsonpath={.status.userInfo.username}")
    assert found == "system:serviceaccount:t:robot"
    refused = await kubectl("get", "pods", "--token=wrong")
    assert refused.exit == 1
    assert "Unauthorized" in refused.stderr or "logged in" in refused.stderr


async def test_dry_runs_and_diff(kubectl: Kubectl) -> None:
    await kubectl.check("apply", "-f", "-", stdin=THINGS)
    changed = THINGS.replace('a: "1"', 'a: "2"')
    await kubectl.check("apply", "--dry-run=server", "-f", "-", stdin=changed)
    assert (await get(kubectl, "cm", "cfg"))["data"]["a"] == "1"
    found = await kubectl("diff", "-f", "-", stdin=changed)
    assert found.exit == 1
    assert '+  a: "2"' in found.stdout


async def test_a_mounted_group_answers_and_is_discovered(kubectl: Kubectl, server: ApiServer) -> None:
    asked: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(f"{request.method} {request.path}")
        return web.json_response({"apiVersion": "sub.example.test/v1", "kind": "Answer", "metadata": {"name": "x"}})

    info = ResourceInfo(
        "sub.example.test", "v1", "machines", "machine", "Machine", verbs=("get",), subresources=("start",)
    )
    server.mount("sub.example.test", "v1", [info], handle)
    path = "/apis/sub.example.test/v1/namespaces/t/machines/m/start"
    assert "Answer" in await kubectl.check("get", "--raw", path)
    assert asked == [f"GET {path}"]
    assert "machines" in await kubectl.check("api-resources", "--api-group=sub.example.test")


async def test_logs_and_exec_reach_the_node(kubectl: Kubectl, server: ApiServer) -> None:
    """The node's HTTP server is a stand-in that speaks the websocket protocol of ``kubectl exec``."""
    seen: list[tuple[str, str]] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append((request.path, request.headers["Authorization"]))
        if request.path.endswith("/log"):
            return web.Response(text="line one\nline two\n")
        socket = web.WebSocketResponse(protocols=("v5.channel.k8s.io",))
        await socket.prepare(request)
        words = " ".join(request.query.getall("command"))
        await socket.send_bytes(b"\x01" + f"ran {words}\n".encode())
        await socket.send_bytes(b"\x03" + json.dumps({"metadata": {}, "status": "Success"}).encode())
        await socket.close()
        return socket

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": "n1"},
            "status": {
                "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
                "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
            },
        }
        await kubectl.check("create", "-f", "-", stdin=json.dumps(node))
        overrides = '{"spec":{"nodeName":"n1"}}'
        await kubectl.check("run", "p", "--image=i", f"--overrides={overrides}")
        assert await kubectl.check("logs", "p") == "line one\nline two\n"
        assert await kubectl.check("exec", "p", "--", "ls", "-l") == "ran ls -l\n"
    finally:
        await runner.cleanup()
    assert {path.rsplit("/", 1)[1] for path, _ in seen} == {"log", "exec"}
    assert {header for _, header in seen} == {f"Bearer {server.tokens.admin}"}


async def test_a_change_reaches_watchers_at_once(server: ApiServer) -> None:
    """Median over 50 changes with ten watchers: far below what a person or a controller notices."""
    headers = {"Authorization": f"Bearer {server.tokens.admin}"}
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(ssl=False, limit=0)) as session:
        base = f"{server.url}/api/v1/namespaces/default/configmaps"
        watches = [await session.get(f"{base}?watch=1&resourceVersion={server.store.version}") for _ in range(10)]
        info = server.registry.lookup("", "v1", "configmaps")
        assert info is not None
        delays: list[float] = []
        for number in range(50):
            metadata = {"name": f"c{number}", "namespace": "default", "uid": f"u{number}"}
            body = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": metadata}
            start = loop.time()
            server.store.put(info.storage_key, body)
            async with asyncio.timeout(5):
                await asyncio.gather(*(watch.content.readline() for watch in watches))
            delays.append(loop.time() - start)
        for watch in watches:
            watch.close()
    print(f"median {sorted(delays)[25] * 1e6:.0f} µs")
    assert sorted(delays)[25] < 0.05
