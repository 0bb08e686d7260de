"""The shim as runtimes start it: by path, without a virtual environment, against a real Unix socket."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmnet.cni import call, request, shim
from vmnet.cni.call import Answer, Call
from vmnet.cni.errors import CniError, Code

SHIM = Path(shim.__file__)
CONFIG = {"cniVersion": "1.0.0", "name": "lab", "type": "vmnet-cni"}


async def run(tmp_path: Path, command: str, config: object = CONFIG, **extra: str) -> tuple[int, bytes, str]:
    process = await asyncio.create_subprocess_exec(
        str(SHIM),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={
            "PATH": os.environ["PATH"],
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": "c0ffee",
            "CNI_NETNS": "/run/netns/x",
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": "K8S_POD_NAMESPACE=red;K8S_POD_NAME=vm-0",
            "VMNET_CNI_SOCKET": str(tmp_path / "cni.sock"),
            "VMNET_CNI_DELETED": str(tmp_path / "vmnet" / "cni-deleted"),
            "VMNET_CNI_WAIT": "0.2",
            **extra,
        },
    )
    async with asyncio.timeout(30):
        output, errors = await process.communicate(json.dumps(config).encode())
    return process.returncode or 0, output, errors.decode()


async def serve(path: Path, handle: Callable[[Call], Answer | None]) -> asyncio.AbstractServer:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = handle(call.decode_call(await call.read_frame(reader, 5)))
        if answer is not None:
            await call.write_frame(writer, call.encode_answer(answer), 5)
        writer.close()

    return await asyncio.start_unix_server(connected, str(path))


async def test_add_carries_the_request_and_the_result(tmp_path: Path) -> None:
    seen: list[Call] = []

    def handle(asked: Call) -> Answer:
        seen.append(asked)
        return call.success({"cniVersion": "1.0.0", "ips": []})

    async with await serve(tmp_path / "cni.sock", handle):
        status, output, _ = await run(tmp_path, "ADD", {**CONFIG, "prevResult": {"text": 'ü "quoted" \\ \x1f'}})
    assert status == 0
    assert json.loads(output) == {"cniVersion": "1.0.0", "ips": []}
    asked = seen[0].request()
    assert asked.command is request.Command.ADD
    assert asked.previous_result == {"text": 'ü "quoted" \\ \x1f'}
    assert asked.container_id == "c0ffee"
    # Nothing of the runtime's own environment leaves the plugin.
    assert set(seen[0].environment) <= set(shim.VARIABLES)


async def test_an_error_of_the_agent_is_printed_and_its_status_kept(tmp_path: Path) -> None:
    refusal = call.failure(CniError(Code.UNKNOWN_CONTAINER, "no such pod"), "1.0.0")
    async with await serve(tmp_path / "cni.sock", lambda _: refusal):
        status, output, _ = await run(tmp_path, "ADD")
    assert status == 1
    assert json.loads(output)["code"] == 3


@pytest.mark.parametrize(("command", "code"), [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)])
async def test_without_an_agent_the_runtime_is_told_to_try_again(tmp_path: Path, command: str, code: int) -> None:
    started = time.monotonic()
    status, output, _ = await run(tmp_path, command)
    assert time.monotonic() - started >= 0.2
    assert status == 1
    body = json.loads(output)
    assert (body["code"], body["cniVersion"]) == (code, "1.0.0")


async def test_add_waits_for_an_agent_that_comes_late(tmp_path: Path) -> None:
    running = asyncio.ensure_future(run(tmp_path, "ADD", VMNET_CNI_WAIT="20"))
    await asyncio.sleep(0.2)
    assert not running.done()
    async with await serve(tmp_path / "cni.sock", lambda _: call.success({"ok": 1})):
        status, output, _ = await running
    assert (status, json.loads(output)) == (0, {"ok": 1})


async def test_del_never_waits_and_leaves_a_marker(tmp_path: Path) -> None:
    started = time.monotonic()
    status, output, errors = await run(tmp_path, "DEL", VMNET_CNI_WAIT="60")
    assert time.monotonic() - started < 10
    assert (status, output, errors) == (0, b"", "")
    directory = tmp_path / "vmnet" / "cni-deleted"
    assert [path.name for path in directory.iterdir()] == ["c0ffee@eth0"]
    left = call.decode_call((directory / "c0ffee@eth0").read_bytes()).request()
    assert left.command is request.Command.DEL
    assert left.container_id == "c0ffee"


async def test_del_succeeds_when_the_agent_dies_meanwhile(tmp_path: Path) -> None:
    async with await serve(tmp_path / "cni.sock", lambda _: None):
        status, _, _ = await run(tmp_path, "DEL")
    assert status == 0
    assert (tmp_path / "vmnet" / "cni-deleted" / "c0ffee@eth0").exists()


async def test_a_marker_cannot_be_written_elsewhere(tmp_path: Path) -> None:
    status, _, _ = await run(tmp_path, "DEL", CNI_CONTAINERID="../../escaped")
    assert status == 0
    assert not [name for folder in os.walk(tmp_path) for name in folder[2] if "escaped" in name]


async def test_version_needs_no_agent(tmp_path: Path) -> None:
    status, output, _ = await run(tmp_path, "VERSION", {"cniVersion": "1.1.0"})
    assert status == 0
    assert json.loads(output) == {"cniVersion": "1.1.0", "supportedVersions": list(request.SUPPORTED_VERSIONS)}


def test_shim_and_agent_agree() -> None:
    assert shim.MAX_FRAME == call.MAX_FRAME
    assert shim.DELETED_DIRECTORY == call.DELETED_DIRECTORY
    assert json.loads(shim.VERSIONS) == list(request.SUPPORTED_VERSIONS)
    environment = {"CNI_COMMAND": "ADD", "CNI_ARGS": 'x="é"'}
    config = '{"name": "naïve \\u0001"}'.encode()
    assert call.decode_call(shim.encode(environment, config)) == Call(environment, config)
