"""The wire format between the CNI shim and the agent, on the Unix stream socket ``names.CNI_SOCKET``.

One connection carries one call: a frame from the shim, a frame back. A frame is its length (4 bytes, big-endian) and
its body. The call's body is a JSON object ``{"environment": {"CNI_COMMAND": …}, "config": "<standard input>"}``; the
answer's body is one byte, the plugin's exit status, followed by what the plugin prints (a CNI result, a CNI error, or
nothing). The shim (``vmnet.cni.shim``) has an implementation of its own, because it must start fast.
"""

import asyncio
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmnet.cni import request
from vmnet.cni.errors import CniError, Code
from vmnet.cni.request import Request

MAX_FRAME: Final = 1 << 20
"""Bytes of a body; the largest legitimate one is a GC with some thousand attachments."""
DELETED_DIRECTORY: Final = "/run/vmnet/cni-deleted"
"""Where a DEL that found no agent leaves its call: the body, in a file named for container and interface."""

_LENGTH: Final = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class Call:
    """What the shim was started with, unparsed."""

    environment: Mapping[str, str]
    config: bytes

    def request(self) -> Request:
        """Parse and validate. Raises CniError."""
        return request.parse(self.environment, self.config)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the shim shall print, and its exit status."""

    exit_status: int
    output: bytes = b""


def success(result: Mapping[str, Any] | None = None) -> Answer:
    """The answer to a request that succeeded; ADD has a result, the others none."""
    return Answer(0, b"" if result is None else json.dumps(result).encode())


def failure(error: CniError, version: str = "1.1.0") -> Answer:
    """The answer to a request that failed; ``version`` is the request's cniVersion."""
    return Answer(1, error.to_json(version))


def encode_call(call: Call) -> bytes:
    """Body of a call."""
    return json.dumps({"environment": dict(call.environment), "config": call.config.decode()}).encode()


def decode_call(body: bytes) -> Call:
    """Raises CniError(DECODING_FAILURE)."""
    try:
        message = json.loads(body)
        environment = {str(key): str(value) for key, value in message["environment"].items()}
        "".join(environment.values()).encode()  # A shim passes bytes that are not UTF-8 on as lone surrogates.
        return Call(environment, str(message["config"]).encode())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CniError(Code.DECODING_FAILURE, "malformed call from the CNI shim", repr(error)) from None


def encode_answer(answer: Answer) -> bytes:
    """Body of an answer."""
    return bytes([answer.exit_status]) + answer.output


def decode_answer(body: bytes) -> Answer:
    """Raises CniError(DECODING_FAILURE)."""
    if not body:
        raise CniError(Code.DECODING_FAILURE, "empty answer from the agent")
    return Answer(body[0], body[1:])


def frame(body: bytes) -> bytes:
    """Body with its length. Raises CniError(IO_FAILURE) when it is too long."""
    if len(body) > MAX_FRAME:
        raise CniError(Code.IO_FAILURE, f"CNI message of {len(body)} bytes is over {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader, timeout: float) -> bytes:
    """Body of the next frame. Raises CniError(IO_FAILURE) when it is too long, cut off or late."""
    try:
        async with asyncio.timeout(timeout):
            (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
            if length > MAX_FRAME:
                raise CniError(Code.IO_FAILURE, f"CNI message of {length} bytes is over {MAX_FRAME}")
            return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise CniError(Code.IO_FAILURE, "the CNI message ended early", repr(error)) from None
    except TimeoutError:
        raise CniError(Code.IO_FAILURE, f"no CNI message within {timeout:g} s") from None


async def write_frame(writer: asyncio.StreamWriter, body: bytes, timeout: float) -> None:
    """Send one frame. Raises CniError(IO_FAILURE) when the peer is gone or does not read."""
    try:
        async with asyncio.timeout(timeout):
            writer.write(frame(body))
            await writer.drain()
    except ConnectionError as error:
        raise CniError(Code.IO_FAILURE, "the peer closed the CNI connection", repr(error)) from None
    except TimeoutError:
        raise CniError(Code.IO_FAILURE, f"the peer did not read within {timeout:g} s") from None
