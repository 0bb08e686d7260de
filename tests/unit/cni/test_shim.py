"""Both shims as runtimes start them: by path, without a virtual environment, against a real Unix socket."""

import asyncio
import json
import os
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from vmnet.cni import call, request, shim
from vmnet.cni.call import Answer, Call
from vmnet.cni.errors import CniError, Code

ROOT = Path(shim.__file__).parents[2]
CONFIG = {"cniVersion": "1.0.0", "name": "lab", "type": "vmnet-cni"}
Run = Callable[..., Awaitable[tuple[int, bytes, str]]]


@pytest.fixture(scope="session")
def static_shim() -> Path:
    """The C shim, built from what the source is now."""
    subprocess.run(["make", "-s", "build/vmnet-cni"], cwd=ROOT, check=True, timeout=100)
    return ROOT / "build" / "vmnet-cni"


@pytest.fixture(params=["python", "c"])
def run(request: pytest.FixtureRequest, static_shim: Path) -> Run:
    path = static_shim if request.param == "c" else Path(shim.__file__)

    async def run_one(tmp_path: Path, command: str, config: object = CONFIG, **extra: str) -> tuple[int, bytes, str]:
        return await execute(path, tmp_path, command, config, **extra)

    return run_one


async def execute(
    path: Path, tmp_path: Path, command: str, config: object = CONFIG, **extra: str
) -> tuple[int, bytes, str]:
    given = extra.pop("VMNET_TEST_STDIN", None)
    process = await asyncio.create_subprocess_exec(
        str(path),
        stdin=asyncio.subprocess.PIPE if given is None else int(given),
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
        text = config if isinstance(config, bytes) else json.dumps(config, ensure_ascii=False).encode()
        output, errors = await process.communicate(text if given is None else None)
    return process.returncode or 0, output, errors.decode()


async def serve(path: Path, handle: Callable[[Call], Answer | None]) -> asyncio.AbstractServer:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = handle(call.decode_call(await call.read_frame(reader, 5)))
        if answer is not None:
            await call.write_frame(writer, call.encode_answer(answer), 5)
        writer.close()

    return await asyncio.start_unix_server(connected, str(path))


async def test_add_carries_the_request_and_the_result(run: Run, tmp_path: Path) -> None:
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


async def test_an_error_of_the_agent_is_printed_and_its_status_kept(run: Run, tmp_path: Path) -> None:
    refusal = call.failure(CniError(Code.UNKNOWN_CONTAINER, "no such pod"), "1.0.0")
    async with await serve(tmp_path / "cni.sock", lambda _: refusal):
        status, output, _ = await run(tmp_path, "ADD")
    assert status == 1
    assert json.loads(output)["code"] == 3


@pytest.mark.parametrize(("command", "code"), [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)])
async def test_without_an_agent_the_runtime_is_told_to_try_again(
    run: Run, tmp_path: Path, command: str, code: int
) -> None:
    started = time.monotonic()
    status, output, _ = await run(tmp_path, command)
    assert time.monotonic() - started >= 0.2
    assert status == 1
    body = json.loads(output)
    assert (body["code"], body["cniVersion"]) == (code, "1.0.0")


async def test_add_waits_for_an_agent_that_comes_late(run: Run, tmp_path: Path) -> None:
    running = asyncio.ensure_future(run(tmp_path, "ADD", VMNET_CNI_WAIT="20"))
    await asyncio.sleep(0.2)
    assert not running.done()
    async with await serve(tmp_path / "cni.sock", lambda _: call.success({"ok": 1})):
        status, output, _ = await running
    assert (status, json.loads(output)) == (0, {"ok": 1})


async def test_del_never_waits_and_leaves_a_marker(run: Run, tmp_path: Path) -> None:
    started = time.monotonic()
    status, output, errors = await run(tmp_path, "DEL", VMNET_CNI_WAIT="60")
    assert time.monotonic() - started < 10
    assert (status, output, errors) == (0, b"", "")
    directory = tmp_path / "vmnet" / "cni-deleted"
    assert [path.name for path in directory.iterdir()] == ["c0ffee@eth0"]
    left = call.decode_call((directory / "c0ffee@eth0").read_bytes()).request()
    assert left.command is request.Command.DEL
    assert left.container_id == "c0ffee"


async def test_del_succeeds_when_the_agent_dies_meanwhile(run: Run, tmp_path: Path) -> None:
    async with await serve(tmp_path / "cni.sock", lambda _: None):
        status, _, _ = await run(tmp_path, "DEL")
    assert status == 0
    assert (tmp_path / "vmnet" / "cni-deleted" / "c0ffee@eth0").exists()


async def test_a_marker_cannot_be_written_elsewhere(run: Run, tmp_path: Path) -> None:
    status, _, _ = await run(tmp_path, "DEL", CNI_CONTAINERID="../../escaped")
    assert status == 0
    assert not [name for folder in os.walk(tmp_path) for name in folder[2] if "escaped" in name]


async def test_version_needs_no_agent(run: Run, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("command", ["", "MOVE", "A", "ADD DEL", "add"])
async def test_a_command_that_is_none_needs_no_agent(run: Run, tmp_path: Path, command: str) -> None:
    status, output, _ = await run(tmp_path, command, VMNET_CNI_WAIT="60")
    assert status == 1
    assert json.loads(output) == {
        "cniVersion": "1.0.0",
        "code": 4,
        "msg": "CNI_COMMAND is not known",
        "details": command,
    }


@pytest.mark.parametrize(
    ("config", "version"),
    [
        (b'{"prevResult": {"cniVersion": "0.3.1"}, "cniVersion": "0.4.0"}', "0.4.0"),
        (b'{"a": "\\"cniVersion\\": \\"9.9.9", "cniVersion" : "1.0.0"}', "1.0.0"),
        (b'{"name": "x"}', "1.1.0"),
        (b'{"cniVersion": 1}', "1.1.0"),
        (b"", "1.1.0"),
        (b"[]", "1.1.0"),
    ],
)
async def test_the_version_is_the_configurations_own(run: Run, tmp_path: Path, config: bytes, version: str) -> None:
    status, output, _ = await run(tmp_path, "VERSION", config)
    assert (status, json.loads(output)["cniVersion"]) == (0, version)


async def test_an_endless_configuration_is_refused(run: Run, tmp_path: Path) -> None:
    status, output, _ = await run(tmp_path, "ADD", b" " * (shim.MAX_FRAME + 1))
    assert (status, json.loads(output)["code"]) == (1, 5)
    # It fits, but no longer when it is quoted.
    status, output, _ = await run(tmp_path, "ADD", b"\n" * (shim.MAX_FRAME - 10))
    assert (status, json.loads(output)["code"]) == (1, 5)


async def test_a_long_configuration_and_a_long_answer_pass(run: Run, tmp_path: Path) -> None:
    text = "x" * 900_000
    async with await serve(tmp_path / "cni.sock", lambda asked: call.success(json.loads(asked.config))):
        status, output, _ = await run(tmp_path, "ADD", {**CONFIG, "text": text})
    assert (status, json.loads(output)) == (0, {**CONFIG, "text": text})


async def test_bytes_that_are_no_text_stay_wrong(run: Run, tmp_path: Path) -> None:
    seen: list[CniError] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with pytest.raises(CniError) as caught:
            call.decode_call(await call.read_frame(reader, 5))
        seen.append(caught.value)
        await call.write_frame(writer, call.encode_answer(call.failure(caught.value)), 5)
        writer.close()

    async with await asyncio.start_unix_server(connected, str(tmp_path / "cni.sock")):
        status, output, _ = await run(tmp_path, "ADD", b'{"name": "\xff"}')
    assert (status, json.loads(output)["code"]) == (1, 6)
    assert [error.code for error in seen] == [Code.DECODING_FAILURE]


async def test_standard_input_that_never_ends_is_not_waited_for(run: Run, tmp_path: Path) -> None:
    read, write = os.pipe()
    try:
        # The shim inherits the reading end; nobody closes the other.
        status, output, _ = await run(tmp_path, "ADD", VMNET_TEST_STDIN=str(read))
    finally:
        os.close(read)
        os.close(write)
    assert (status, json.loads(output)["code"]) == (1, 5)


@pytest.mark.parametrize(("command", "code"), [("ADD", 11), ("STATUS", 50)])
async def test_an_answer_that_breaks_off_is_none(run: Run, tmp_path: Path, command: str, code: int) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await call.read_frame(reader, 5)
        writer.write(b"\0\0\0\x09\0{}")
        writer.close()

    async with await asyncio.start_unix_server(connected, str(tmp_path / "cni.sock")):
        status, output, _ = await run(tmp_path, command)
    assert (status, json.loads(output)["code"]) == (1, code)


async def test_del_waits_for_an_agent_that_is_busy(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "cni.sock")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        running = asyncio.ensure_future(run(tmp_path, "DEL"))
        accepted = [await asyncio.to_thread(listener.accept)]
        accepted.append(await asyncio.to_thread(listener.accept))
        accepted[1][0].settimeout(30)
        size = int.from_bytes(await asyncio.to_thread(accepted[1][0].recv, 4, socket.MSG_WAITALL), "big")
        await asyncio.to_thread(accepted[1][0].recv, size, socket.MSG_WAITALL)
        accepted[1][0].sendall(b"\0\0\0\x01\0")
        assert (await running)[0] == 0
        for connection, _ in accepted:
            connection.close()
    assert not (tmp_path / "vmnet").exists()


async def test_a_path_that_is_no_sockets_name_is_an_error(run: Run, tmp_path: Path) -> None:
    status, output, _ = await run(tmp_path, "ADD", VMNET_CNI_SOCKET="/" + "x" * 200)
    assert (status, json.loads(output)["code"]) == (1, 11)
