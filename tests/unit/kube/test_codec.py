import json
from datetime import UTC, datetime

import pytest

from vmnet.kube import codec
from vmnet.kube.api import (
    PODS,
    AlreadyExists,
    Conflict,
    EventType,
    Expired,
    Forbidden,
    Invalid,
    KubeError,
    NotFound,
    Unavailable,
)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, Invalid), (401, Forbidden), (403, Forbidden), (404, NotFound), (409, Conflict), (410, Expired),
        (422, Invalid), (429, Unavailable), (500, Unavailable), (503, Unavailable), (504, Unavailable),
        (302, KubeError),
    ],
)  # fmt: skip
def test_each_code_has_its_error(code: int, kind: type[KubeError]) -> None:
    error = codec.decode_error(code, json.dumps({"kind": "Status", "message": "why", "code": code}).encode())
    assert type(error) is kind
    assert error.code == code
    assert str(error) == f"{code}: why"
    assert error.status["kind"] == "Status"


def test_already_exists_is_a_conflict_of_its_own() -> None:
    body = {"kind": "Status", "reason": "AlreadyExists", "message": "there"}
    assert type(codec.decode_error(409, json.dumps(body).encode())) is AlreadyExists


def test_plain_text_and_other_json_are_the_message() -> None:
    assert str(codec.decode_error(502, b"bad gateway\n")) == "502: bad gateway"
    assert codec.decode_error(500, b'{"error": "x"}').status == {}
    assert str(codec.decode_error(500, b"")) == "500: no message"


def test_the_servers_wish_to_be_left_alone_is_kept() -> None:
    assert codec.retry_after(codec.decode_error(429, b"slow down", "7")) == 7
    body = json.dumps({"kind": "Status", "details": {"retryAfterSeconds": 3}}).encode()
    assert codec.retry_after(codec.decode_error(429, body, "7")) == 3
    assert codec.retry_after(codec.decode_error(500, b"")) == 0


def test_events() -> None:
    event = codec.decode_event(b'{"type":"ADDED","object":{"metadata":{"name":"a"}}}', PODS)
    assert event.type is EventType.ADDED
    assert (event.object["apiVersion"], event.object["kind"]) == ("v1", "Pod")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"type":"ERROR","object":{"kind":"Status","code":410}}', Expired),
        (b'{"type":"ERROR","object":{"kind":"Status"}}', Unavailable),
        (b'{"kind":"Status","code":403}', Forbidden),
        (b'{"type":"ODD","object":{}}', Unavailable),
        (b'{"type":"ADDED","object":"text"}', Unavailable),
        (b'"text"', Unavailable),
        (b"upstream error", Unavailable),
        (b"\xff\xfe", Unavailable),
    ],
)
def test_what_is_no_event_is_an_error(line: bytes, kind: type[KubeError]) -> None:
    with pytest.raises(kind):
        codec.decode_event(line, PODS)


def test_times() -> None:
    moment = datetime(2026, 11, 23, 6, 49, 28, 123456, tzinfo=UTC)
    assert codec.encode_time(moment) == "2026-11-23T06:49:28Z"
    assert codec.encode_micro_time(moment) == "2026-11-23T06:49:28.123456Z"
    assert codec.decode_time(codec.encode_micro_time(moment)) == moment
    assert codec.decode_time("2026-11-23T06:49:28") == moment.replace(microsecond=0)
