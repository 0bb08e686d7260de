"""The annotation that opens ports of eth0."""

import pytest

from vmnet.agent.open_ports import parse
from vmnet.plan.lock import OpenPort, Protocol


def test_a_list_opens_what_it_names() -> None:
    text = "- protocol: tcp\n  port: 80\n- protocol: UDP\n  port: '53'\n- {protocol: sctp, port: 7}\n- protocol: icmp\n"
    assert parse(text) == {
        OpenPort(Protocol.TCP, 80),
        OpenPort(Protocol.UDP, 53),
        OpenPort(Protocol.SCTP, 7),
        OpenPort(Protocol.ICMP),
    }
    assert parse('[{"protocol": "tcp", "port": 65535}]') == {OpenPort(Protocol.TCP, 65535)}
    assert parse("") == parse("[]") == frozenset()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[{", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("protocol: tcp", "not a list"),
        ("[80]", "[0] is not a mapping"),
        ("[{port: 80}]", "[0].protocol"),
        ("[{protocol: tcp, port: 80}, {protocol: http, port: 80}]", "[1].protocol"),
        ("[{protocol: tcp}]", "[0].port"),
        ("[{protocol: tcp, port: 0}]", "[0].port"),
        ("[{protocol: tcp, port: 65536}]", "[0].port"),
        ("[{protocol: tcp, port: true}]", "[0].port"),
        ("[{protocol: tcp, port: 80.5}]", "[0].port"),
        ("[{protocol: tcp, port: http}]", "[0].port"),
        ("[{protocol: icmp, port: 8}]", "[0].port"),
    ],
)
def test_what_is_not_understood_is_named(text: str, field: str) -> None:
    with pytest.raises(ValueError, match="open-default-ports") as caught:
        parse(text)
    assert field in str(caught.value)
