import json
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnet.model.connection import TCP, UDP, Connection, Flow, TcpState
from vmnet.model.endpoint import MachineReference
from vmnet.wire import handover
from vmnet.wire.handover import LINE_LIMIT, Arrived, Ask, Done, Left, Told, When

FLOW = Flow(TCP, ip_address("192.168.0.5"), 1000, ip_address("10.96.0.7"), 80)
REPLY = Flow(TCP, ip_address("192.168.0.9"), 8080, ip_address("192.168.0.5"), 1000)
ONE = Connection(FLOW, REPLY, 6, 300, 0x1000002, TcpState(3, (7, 9), (11, 3)), labels=b"\1\2")
SIX = Flow(UDP, ip_address("fd00::5"), 7, ip_address("fd00::6"), 9)
TWO = Connection(SIX, SIX.reversed(), 0, 30)


@pytest.mark.parametrize(
    "message",
    [
        Ask(MachineReference("blue", "vm"), "net"),
        Told(),
        Told((ONE, TWO)),
        Arrived(),
        Done(),
        Done(7),
        When(MachineReference("blue", "vm"), "net"),
        Left(None, 1795426800.25),
        Left(1795426800.125, 1795426800.25),
    ],
)
def test_what_one_says_the_other_understands(message: handover.Message) -> None:
    lines = list(handover.encode(message))
    assert [handover.decode(line) for line in lines] == [message]
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)


def test_many_connections_take_several_lines_that_fit() -> None:
    lines = list(handover.encode(Told((ONE,) * 1000)))
    assert all(len(line) < LINE_LIMIT for line in lines)
    told = [handover.decode(line) for line in lines]
    assert sum(len(item.connections) for item in told if isinstance(item, Told)) == 1000


NAMES = (
    *("protocol", "source", "source_port", "destination", "destination_port"),
    *("back_source", "back_port", "back_destination", "back_destination_port"),
    *("status", "timeout", "mark", "state", "scale0", "scale1", "flags0", "flags1", "labels"),
)


def row(**changes: Any) -> list[Any]:
    (line,) = handover.encode(Told((ONE,)))
    fields = dict(zip(NAMES, json.loads(line)["told"][0], strict=True))
    assert changes.keys() <= fields.keys()
    return list((fields | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": -1},
        {"protocol": True},
        {"protocol": "6"},
        {"source": 3232235525},
        {"source": "192.168.0.999"},
        {"source": "fe80::1%eth0", "destination": "fe80::2"},
        {"source": "fd00::1"},
        {"source_port": 65536},
        {"source_port": 1.0},
        {"timeout": -1},
        {"mark": 1 << 32},
        {"state": None},
        {"labels": "zz"},
        {"labels": "00" * 17},
    ],
)
def test_a_connection_that_is_none_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        handover.decode(json.dumps({"told": [row(**changes)]}).encode())


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"ask":["a","b"]}',
        b'{"ask":["a","b",""]}',
        b'{"ask":["a","b",5]}',
        b'{"told":{}}',
        b'{"told":[[1]]}',
        b'{"arrived":1}',
        b'{"done":-1}',
        b'{"done":true}',
        b'{"done":1,"told":[]}',
        b'{"else":1}',
        b"[" * 50000,
        b'{"told":[' + b" " * LINE_LIMIT + b"]}",
    ],
)
def test_what_is_no_message_is_an_error(line: bytes) -> None:
    with pytest.raises(ValueError):
        handover.decode(line)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.sampled_from(("ask", "told", "done")), inner),
    max_leaves=30,
)


@given(st.one_of(st.binary(max_size=300), JSON.map(lambda value: json.dumps(value).encode())))
def test_anything_at_all_is_a_message_or_a_value_error(line: bytes) -> None:
    try:
        found = handover.decode(line)
    except ValueError:
        return
    assert isinstance(found, Ask | Told | Arrived | Done)


@given(st.lists(st.one_of(st.integers(), st.text(max_size=8), st.none()), min_size=17, max_size=18))
def test_any_row_is_a_connection_or_a_value_error(fields: list[Any]) -> None:
    try:
        handover.decode(json.dumps({"told": [fields]}).encode())
    except ValueError:
        return
