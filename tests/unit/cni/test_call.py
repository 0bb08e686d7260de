"""The wire format: what one side encodes the other decodes, and nothing malformed gets through."""

import asyncio

import pytest

from vmnet.cni import call
from vmnet.cni.call import Answer, Call
from vmnet.cni.errors import CniError, Code


def test_calls_and_answers_survive_the_wire() -> None:
    asked = Call({"CNI_COMMAND": "ADD", "CNI_ARGS": 'a="b"'}, '{"name": "ü"}'.encode())
    assert call.decode_call(call.encode_call(asked)) == asked
    for answer in (call.success({"ips": []}), call.success(), call.failure(CniError(Code.INTERNAL, "no"))):
        assert call.decode_answer(call.encode_answer(answer)) == answer
    assert call.success() == Answer(0, b"")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"environment": 3, "config": ""}', b'{"environment": {}}', b"\xff"]
)
def test_a_malformed_call_is_a_decoding_failure(body: bytes) -> None:
    with pytest.raises(CniError) as caught:
        call.decode_call(body)
    assert caught.value.code is Code.DECODING_FAILURE


async def test_frames_are_read_whole() -> None:
    reader = asyncio.StreamReader()
    for byte in call.frame(b"hello"):
        reader.feed_data(bytes([byte]))
    assert await call.read_frame(reader, 1) == b"hello"


@pytest.mark.parametrize("data", [b"", b"\x00\x00", b"\x00\x00\x00\x05hell", b"\xff\xff\xff\xff"])
async def test_cut_off_and_oversized_frames_are_errors(data: bytes) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    with pytest.raises(CniError) as caught:
        await call.read_frame(reader, 1)
    assert caught.value.code is Code.IO_FAILURE


async def test_a_silent_peer_is_given_up() -> None:
    with pytest.raises(CniError, match="within"):
        await call.read_frame(asyncio.StreamReader(), 0.01)


def test_an_oversized_body_is_not_sent() -> None:
    with pytest.raises(CniError):
        call.frame(bytes(call.MAX_FRAME + 1))
