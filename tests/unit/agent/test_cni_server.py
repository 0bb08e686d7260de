import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from vmnet.agent.cni_server import CniServer
from vmnet.cni import call, shim
from vmnet.cni.call import Answer
from vmnet.cni.errors import CniError, Code
from vmnet.cni.request import Request

CONFIG = {"cniVersion": "1.1.0", "name": "net", "type": "vmnet-cni", "prevResult": {}}
ADD = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "abc",
    "CNI_NETNS": "/run/netns/x",
    "CNI_IFNAME": "eth0",
    "CNI_ARGS": "K8S_POD_NAMESPACE=red;K8S_POD_NAME=red-0;K8S_POD_UID=u1",
}


async def handler(request: Request) -> Answer:
    if request.container_id == "broken":
        raise ZeroDivisionError("inside")
    if request.container_id == "later":
        raise CniError(Code.TRY_AGAIN_LATER, "no addresses yet for pod red/red-0")
    return call.success({"cniVersion": request.version, "pod": request.pod.name if request.pod else None})


@pytest.fixture
async def run_shim(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[tuple[int, dict[str, object]]]]]:
    server = CniServer(tmp_path / "run" / "cni.sock", handler)
    await server.start()

    async def run(**changes: str) -> tuple[int, dict[str, object]]:
        environment = {**ADD, **changes, "VMNET_CNI_SOCKET": str(tmp_path / "run" / "cni.sock"), "PATH": "/usr/bin"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-IS", shim.__file__, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(json.dumps(CONFIG).encode()), 60)
        return process.returncode or 0, json.loads(output)

    yield run
    await server.close()
    assert not (tmp_path / "run" / "cni.sock").exists()


async def test_the_real_shim_gets_the_handlers_answer(run_shim: Callable[..., Awaitable[tuple[int, object]]]) -> None:
    assert await run_shim() == (0, {"cniVersion": "1.1.0", "pod": "red-0"})


@pytest.mark.parametrize(("container", "code"), [("later", 11), ("broken", 100), ("..", 4)])
async def test_failures_are_cni_errors(
    run_shim: Callable[..., Awaitable[tuple[int, dict[str, object]]]], container: str, code: int
) -> None:
    status, body = await run_shim(CNI_CONTAINERID=container)
    assert status == 1
    assert body["code"] == code
    assert body["msg"]


async def test_garbage_on_the_socket_is_answered_with_an_error_and_hurts_nobody(tmp_path: Path) -> None:
    server = CniServer(tmp_path / "cni.sock", handler)
    await server.start()
    try:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "cni.sock")
        writer.write(call.frame(b"\xff not json"))
        answer = call.decode_answer(await call.read_frame(reader, 30))
        assert answer.exit_status == 1
        assert json.loads(answer.output)["code"] == int(Code.DECODING_FAILURE)
        writer.close()
        _, writer = await asyncio.open_unix_connection(tmp_path / "cni.sock")
        writer.write(b"\xff\xff\xff\xff")
        writer.close()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "cni.sock")
        await call.write_frame(writer, call.encode_call(call.Call(ADD, json.dumps(CONFIG).encode())), 30)
        assert call.decode_answer(await call.read_frame(reader, 30)).exit_status == 0
        writer.close()
    finally:
        await server.close()
