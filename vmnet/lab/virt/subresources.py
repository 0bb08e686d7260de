"""``subresources.kubevirt.io/v1``, virt-api's role: what ``virtctl`` calls. Mounted in the embedded API server.

Requests and answers are those recorded of the real ``virtctl`` and virt-api: PUT with a small JSON body, 202 with an
empty one; the console is a websocket with the subprotocol ``plain.kubevirt.io`` and binary frames.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from aiohttp import WSMsgType, web

from vmnet.kube.api import PODS, VMIMS, VMIS, VMS, Invalid, Kube, KubeError, NotFound, Object, PatchType
from vmnet.kube.client import KubeClient
from vmnet.lab.apiserver.requests import parse_path
from vmnet.lab.apiserver.resources import ResourceInfo
from vmnet.lab.apiserver.server import ApiServer
from vmnet.lab.apiserver.status import ApiError, bad_request
from vmnet.lab.errors import LabError
from vmnet.lab.virt import domains, kinds, machines, qemu
from vmnet.lab.virt.instances import current_pod, pods_selector
from vmnet.lab.virt.migrations import active_jobs
from vmnet.lab.virt.qmp import QemuError, Qmp

GROUP: Final = "subresources.kubevirt.io"
VERSIONS: Final = ("v1", "v1alpha3")
SUBPROTOCOL: Final = "plain.kubevirt.io"

_VM_CALLS: Final = ("start", "stop", "restart", "migrate")
_VMI_CALLS: Final = ("console", "pause", "unpause")

Call = Callable[[str, str, dict[str, Any]], Awaitable[int]]


def resources(version: str) -> tuple[ResourceInfo, ...]:
    """What discovery shows of the group."""
    return (
        ResourceInfo(
            GROUP, version, "virtualmachines", "virtualmachine", "VirtualMachine", verbs=(), subresources=_VM_CALLS
        ),
        ResourceInfo(
            GROUP,
            version,
            "virtualmachineinstances",
            "virtualmachineinstance",
            "VirtualMachineInstance",
            verbs=(),
            subresources=_VMI_CALLS,
        ),
    )


def mount(server: ApiServer, kubeconfig: Path) -> "Subresources":
    """Serve the group from ``server``; ``kubeconfig`` leads back to it and is read at the first request."""

    async def connect() -> Kube:
        return await KubeClient.connect(kubeconfig, user_agent="virt-api")

    found = Subresources(connect)
    for version in VERSIONS:
        server.mount(GROUP, version, resources(version), found)
    return found


async def on_machine(kubeconfig: Path, namespace: str, name: str, verb: str) -> None:
    """What virt-api would write for ``verb`` of a VirtualMachine, to an API that has no such group. Raises LabError."""

    async def connect() -> Kube:
        return await KubeClient.connect(kubeconfig, user_agent="virt-api")

    calls = Subresources(connect)
    try:
        await calls.on_machine(namespace, name, verb)
    except (ApiError, KubeError) as error:
        raise LabError(f"{verb} of VirtualMachine {namespace}/{name}: {error}") from error
    finally:
        await calls.close()


class Subresources:
    """Answers requests below ``/apis/subresources.kubevirt.io/``."""

    def __init__(self, connect: Callable[[], Awaitable[Kube]]) -> None:
        self._connect = connect
        self._kube: Kube | None = None
        self._connecting = asyncio.Lock()
        self._calls: dict[tuple[str, str], Call] = {
            ("virtualmachines", "start"): self._start,
            ("virtualmachines", "stop"): self._stop,
            ("virtualmachines", "restart"): self._restart,
            ("virtualmachines", "migrate"): self._migrate,
            ("virtualmachineinstances", "pause"): self._pause,
            ("virtualmachineinstances", "unpause"): self._unpause,
        }

    async def close(self) -> None:
        """Give up the connection to the API."""
        if self._kube is not None:
            await self._kube.close()
            self._kube = None

    async def _api(self) -> Kube:
        async with self._connecting:
            if self._kube is None:
                self._kube = await self._connect()
            return self._kube

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        """One request. Raises ApiError."""
        target = parse_path(request.path)
        if target is None or not target.name:
            raise ApiError(404, "NotFound", "the server could not find the requested resource", {})
        if (target.plural, target.subresource) == ("virtualmachineinstances", "console"):
            return await self._console(request, target.namespace, target.name)
        call = self._calls.get((target.plural, target.subresource))
        if call is None:
            raise ApiError(404, "NotFound", "the server could not find the requested resource", {})
        if request.method != "PUT":
            raise ApiError(
                405, "MethodNotAllowed", "the server does not allow this method on the requested resource", {}
            )
        try:
            code = await call(target.namespace, target.name, await _body(request))
        except NotFound as error:
            raise ApiError(404, "NotFound", str(error), error.status.get("details") or {}) from error
        except KubeError as error:
            raise _internal(str(error)) from error
        return web.Response(status=code)

    async def on_machine(self, namespace: str, name: str, verb: str) -> None:
        """``start``, ``stop``, ``restart`` or ``migrate`` without a request. Raises ApiError and KubeError."""
        await self._calls["virtualmachines", verb](namespace, name, {})

    # Machines

    async def _start(self, namespace: str, name: str, body: dict[str, Any]) -> int:
        kube = await self._api()
        vm = await kube.get(VMS, name, namespace)
        strategy = machines.run_strategy(vm)
        vmi = await self._instance(namespace, name)
        if vmi is not None and kinds.phase(vmi) not in kinds.FINAL:
            raise _conflict(name, "VM is already running")
        if strategy == "Halted":
            await self._set_strategy(vm, "Always")
        elif strategy in ("Manual", "RerunOnFailure"):
            await self._request(vm, [{"action": "Start"}])
        else:
            raise _conflict(name, f"{strategy} does not support manual start requests")
        return 202

    async def _stop(self, namespace: str, name: str, body: dict[str, Any]) -> int:
        kube = await self._api()
        vm = await kube.get(VMS, name, namespace)
        strategy = machines.run_strategy(vm)
        vmi = await self._instance(namespace, name)
        if strategy in ("Always", "RerunOnFailure"):
            await self._set_strategy(vm, "Halted")
        elif vmi is None or kinds.phase(vmi) in kinds.FINAL:
            raise _conflict(name, "VM is not running")
        elif strategy == "Manual":
            await self._request(vm, [{"action": "Stop", "uid": vmi["metadata"]["uid"]}])
        return 202

    async def _restart(self, namespace: str, name: str, body: dict[str, Any]) -> int:
        kube = await self._api()
        vm = await kube.get(VMS, name, namespace)
        vmi = await self._instance(namespace, name)
        if machines.run_strategy(vm) == "Halted":
            raise _conflict(name, "Halted does not support manual restart requests")
        if vmi is None or kinds.phase(vmi) in kinds.FINAL:
            raise _conflict(name, "VM is not running")
        await self._request(vm, [{"action": "Stop", "uid": vmi["metadata"]["uid"]}, {"action": "Start"}])
        return 202

    async def _migrate(self, namespace: str, name: str, body: dict[str, Any]) -> int:
        kube = await self._api()
        await kube.get(VMS, name, namespace)
        vmi = await self._instance(namespace, name)
        if vmi is None or kinds.phase(vmi) != "Running":
            raise _conflict(name, "VM is not running")
        spec: Object = {"vmiName": name}
        if body.get("addedNodeSelector"):
            spec["addedNodeSelector"] = body["addedNodeSelector"]
        job: Object = {
            "apiVersion": kinds.API_VERSION,
            "kind": VMIMS.kind,
            "metadata": {
                "generateName": "kubevirt-migrate-vm-",
                "namespace": namespace,
                "labels": {kinds.VMI_NAME_LABEL: name},
                "finalizers": [kinds.VMIM_FINALIZER],
            },
            "spec": spec,
        }
        for other in await active_jobs(kube, job):
            uid = other["metadata"]["uid"]
            raise _internal(
                'admission webhook "migration-create-validator.kubevirt.io" denied the request: in-flight migration '
                f"detected. Active migration job ({uid}) is currently already in progress for VMI {name}."
            )
        await kube.create(VMIMS, job, namespace)
        return 202

    async def _set_strategy(self, vm: Object, strategy: str) -> None:
        spec = vm["spec"]
        operations: list[Object]
        if "runStrategy" in spec:
            path = "/spec/runStrategy"
            operations = [
                {"op": "test", "path": path, "value": spec["runStrategy"]},
                {"op": "replace", "path": path, "value": strategy},
            ]
        else:
            path, value = "/spec/running", strategy == "Always"
            operations = [{"op": "add", "path": path, "value": value}]
        await self._patch(vm, operations)

    async def _request(self, vm: Object, wanted: list[Object]) -> None:
        old = (vm.get("status") or {}).get("stateChangeRequests")
        if old:
            raise _conflict(vm["metadata"]["name"], "a state change of this VM is in progress")
        path = "/status/stateChangeRequests"
        operations: list[Object] = [
            {"op": "test", "path": path, "value": None},
            {"op": "add", "path": path, "value": wanted},
        ]
        await self._patch(vm, operations, "status")

    async def _patch(self, vm: Object, operations: list[Object], subresource: str | None = None) -> None:
        kube, metadata = await self._api(), vm["metadata"]
        try:
            await kube.patch(
                VMS,
                metadata["name"],
                operations,
                metadata["namespace"],
                type=PatchType.JSON,
                subresource=subresource,
            )
        except Invalid:
            raise _conflict(metadata["name"], "the VM was changed meanwhile; try again") from None

    async def _instance(self, namespace: str, name: str) -> Object | None:
        try:
            return await (await self._api()).get(VMIS, name, namespace)
        except NotFound:
            return None

    # Instances

    async def _pause(self, namespace: str, name: str, body: dict[str, Any]) -> int:
        vmi = await (await self._api()).get(VMIS, name, namespace)
        if kinds.is_true(vmi, "Paused"):
            raise _conflict(name, "VMI is already paused")
        await self._command(vmi, "stop")
        return 200

    async def _unpause(self, namespace: str, name: str, body: dict[str, Any]) -> int:
        vmi = await (await self._api()).get(VMIS, name, namespace)
        if not kinds.is_true(vmi, "Paused"):
            raise _conflict(name, "VMI is not paused")
        await self._command(vmi, "cont")
        return 200

    async def _command(self, vmi: Object, command: str) -> None:
        place = await self._place(vmi)
        try:
            async with await Qmp.connect(place / qemu.API_QMP_SOCKET, timeout=5) as monitor:
                await monitor.execute(command)
        except QemuError as error:
            raise _internal(str(error)) from error

    async def _place(self, vmi: Object) -> Path:
        """Directory of the pod the guest is in. Raises ApiError."""
        name, namespace = vmi["metadata"]["name"], vmi["metadata"]["namespace"]
        if kinds.phase(vmi) != "Running":
            raise _conflict(name, f"VMI is {kinds.phase(vmi) or 'not there yet'}, not Running")
        listed = await (await self._api()).list(PODS, namespace, labels=pods_selector(vmi["metadata"]["uid"]))
        pod = current_pod(vmi, list(listed.items))
        if pod is None:
            raise _internal(f"no pod of {name} found on its node")
        return domains.pod_directory(pod["metadata"]["uid"])

    async def _console(self, request: web.Request, namespace: str, name: str) -> web.StreamResponse:
        try:
            vmi = await (await self._api()).get(VMIS, name, namespace)
        except NotFound as error:
            raise ApiError(404, "NotFound", str(error), error.status.get("details") or {}) from error
        place = await self._place(vmi)
        try:
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_unix_connection(str(place / qemu.CONSOLE_SOCKET))
        except (OSError, TimeoutError) as error:
            raise _internal(f"the console of {name} cannot be opened: {error}") from error
        websocket = web.WebSocketResponse(protocols=(SUBPROTOCOL,), heartbeat=30)
        await websocket.prepare(request)
        try:
            async with asyncio.TaskGroup() as group:
                outward = group.create_task(_outward(reader, websocket))
                async for message in websocket:
                    if message.type in (WSMsgType.BINARY, WSMsgType.TEXT):
                        data = message.data
                        writer.write(data if isinstance(data, bytes) else data.encode())
                        await writer.drain()
                outward.cancel()
        except* ConnectionError:
            pass  # one side hung up, which is how consoles end
        finally:
            writer.close()
        return websocket


async def _outward(reader: asyncio.StreamReader, websocket: web.WebSocketResponse) -> None:
    while data := await reader.read(65536):
        await websocket.send_bytes(data)
    await websocket.close()


async def _body(request: web.Request) -> dict[str, Any]:
    text = await request.text()
    if not text.strip():
        return {}
    try:
        body = json.loads(text)
    except ValueError as error:
        raise bad_request(f"the request's body is not JSON: {error}") from error
    return body if isinstance(body, dict) else {}


def _internal(message: str) -> ApiError:
    text = f"Internal error occurred: {message}"
    return ApiError(500, "InternalError", text, {"causes": [{"message": message}]})


def _conflict(name: str, message: str) -> ApiError:
    text = f'Operation cannot be fulfilled on virtualmachine.kubevirt.io "{name}": {message}'
    return ApiError(409, "Conflict", text, {"name": name, "group": "kubevirt.io", "kind": "virtualmachines"})
