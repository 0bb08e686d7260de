"""DHCPv4 messages: against scapy, both directions, and against anything a guest may send."""

from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP

from vmnet.model.names import MacAddress
from vmnet.wire import dhcp4
from vmnet.wire.dhcp4 import Message, MessageType, Option
from vmnet.wire.malformed import Malformed

MAC = MacAddress("0a:58:c0:a8:00:05")
CHADDR = bytes.fromhex("0a58c0a80005") + bytes(10)


def from_scapy(*options: object, **fields: object) -> bytes:
    chosen: dict[str, object] = {"op": 1, "xid": 0x01020304, "chaddr": CHADDR} | fields
    return bytes(BOOTP(**chosen) / DHCP(options=[*options, "end"]))


def test_what_scapy_builds_is_read() -> None:
    message = dhcp4.decode(
        from_scapy(
            ("message-type", "request"),
            ("requested_addr", "192.168.0.5"),
            ("server_id", "192.168.0.1"),
            ("client_id", b"\x01" + CHADDR[:6]),
            ("max_dhcp_size", 1472),
            ("param_req_list", [1, 3, 6, 119]),
            flags=0x8000,
            secs=7,
        )
    )
    assert message.type == MessageType.REQUEST
    assert (message.transaction, message.mac, message.broadcast, message.seconds) == (0x01020304, MAC, True, 7)
    assert message.requested == IPv4Address("192.168.0.5")
    assert message.server == IPv4Address("192.168.0.1")
    assert message.options[Option.CLIENT_IDENTIFIER] == b"\x01" + CHADDR[:6]
    assert message.parameters == bytes([1, 3, 6, 119])
    assert message.limit == 1444
    assert not message.reply


def test_scapy_reads_what_is_meant() -> None:
    offer = Message(
        type=MessageType.OFFER,
        transaction=9,
        mac=MAC,
        reply=True,
        your=IPv4Address("192.168.0.5"),
        options={
            Option.SERVER: IPv4Address("192.168.0.1").packed,
            Option.LEASE_TIME: (86400).to_bytes(4, "big"),
            Option.SUBNET_MASK: IPv4Address("255.255.0.0").packed,
            Option.MTU: (1400).to_bytes(2, "big"),
            Option.HOSTNAME: b"blue",
        },
    )
    data = dhcp4.encode(offer)
    assert len(data) >= dhcp4.MINIMUM
    seen = BOOTP(data)
    assert (seen.op, seen.xid, seen.yiaddr, seen.chaddr[:6]) == (2, 9, "192.168.0.5", CHADDR[:6])
    options = {item[0]: item[1] for item in seen[DHCP].options if isinstance(item, tuple)}
    assert options["message-type"] == 2
    assert options["server_id"] == "192.168.0.1"
    assert options["lease_time"] == 86400
    assert options["subnet_mask"] == "255.255.0.0"
    assert options["interface-mtu"] == 1400
    assert options["hostname"] == b"blue"
    assert dhcp4.decode(data) == offer


def test_long_options_are_split_and_joined() -> None:
    message = Message(MessageType.OFFER, 1, MAC, options={Option.SEARCH: bytes(range(256)) * 2})
    data = dhcp4.encode(message, limit=1472)
    assert dhcp4.decode(data) == message
    assert data.count(b"\x77\xff") == 2, "255 + 255 + 2 octets"


def test_expendable_options_go_last_one_first() -> None:
    options = {
        Option.ROUTER: bytes(4),
        Option.DOMAIN: bytes(100),
        Option.HOSTNAME: bytes(100),
        Option.SEARCH: bytes(150),
    }
    message = Message(MessageType.OFFER, 1, MAC, options=options)
    expendable = (Option.DOMAIN, Option.HOSTNAME, Option.SEARCH)
    data = dhcp4.encode(message, dhcp4.DEFAULT_LIMIT, expendable)
    assert len(data) <= dhcp4.DEFAULT_LIMIT
    assert list(dhcp4.decode(data).options) == [Option.ROUTER, Option.DOMAIN, Option.HOSTNAME]
    assert list(dhcp4.decode(dhcp4.encode(message, 1472, expendable)).options) == list(options)
    with pytest.raises(ValueError):
        dhcp4.encode(message)


def test_overloaded_fields_hold_options() -> None:
    data = bytearray(from_scapy(("message-type", "discover"), (52, b"\x03")))
    data[108:112] = b"\x0c\x02fi"
    data[112] = 255
    data[44:48] = b"\x0c\x02le"
    data[48] = 255
    assert dhcp4.decode(bytes(data)).options[Option.HOSTNAME] == b"file"


def test_a_missing_end_is_forgiven() -> None:
    data = from_scapy(("message-type", "discover"))
    assert dhcp4.decode(data.removesuffix(b"\xff")).type == MessageType.DISCOVER


@pytest.mark.parametrize(
    "data",
    [
        from_scapy(("message-type", "discover"))[:239],
        from_scapy(("message-type", "discover"), op=3),
        from_scapy(("message-type", "discover"), htype=6),
        from_scapy(("message-type", "discover"), hlen=16),
        from_scapy(("message-type", "discover"), options=b"\0\0\0\0"),
        from_scapy(),
        from_scapy((53, b"\x09")),
        from_scapy((53, b"")),
        from_scapy((53, b"\x01\x01")),
        from_scapy(("message-type", "discover"), ("message-type", "discover")),
        from_scapy(("message-type", "discover"), (50, b"\x01\x02\x03")),
        from_scapy(("message-type", "discover"), (54, b"\x01\x02\x03\x04\x05")),
        from_scapy(("message-type", "discover"), (57, b"\x01")),
        from_scapy(("message-type", "discover"), (80, b"\x01")),
        from_scapy(("message-type", "discover"), (52, b"\x04")),
        from_scapy(("message-type", "discover"), (61, bytes(241))),
        from_scapy(("message-type", "discover"))[:-1] + b"\x0c",
        from_scapy(("message-type", "discover"))[:-1] + b"\x0c\x05four",
    ],
)
def test_odd_messages_are_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        dhcp4.decode(data)


OPTIONS = st.dictionaries(
    st.integers(1, 254).filter(lambda code: code not in (50, 51, 52, 53, 54, 57, 61, 80)),
    st.binary(min_size=1, max_size=40),
    max_size=8,
)
ADDRESSES = st.integers(0, 0xFFFFFFFF).map(IPv4Address)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.builds(
        Message,
        type=st.sampled_from(MessageType),
        transaction=st.integers(0, 0xFFFFFFFF),
        mac=st.just(MAC),
        reply=st.booleans(),
        hops=st.integers(0, 255),
        seconds=st.integers(0, 0xFFFF),
        broadcast=st.booleans(),
        client=ADDRESSES,
        your=ADDRESSES,
        relay=ADDRESSES,
        options=OPTIONS,
    )
)
def test_messages_come_back(message: Message) -> None:
    assert dhcp4.decode(dhcp4.encode(message, limit=1472)) == message


GOOD = from_scapy(
    ("message-type", "request"), ("requested_addr", "192.168.0.5"), ("hostname", b"blue"), ("param_req_list", [1, 3])
)


@settings(derandomize=True, deadline=None, max_examples=600)
@given(st.integers(0, len(GOOD)), st.binary(min_size=1, max_size=8), st.integers(0, 20))
def test_nothing_else_is_raised(offset: int, value: bytes, cut: int) -> None:
    broken = GOOD[:offset] + value + GOOD[offset + len(value) :]
    try:
        message = dhcp4.decode(broken[: len(broken) - cut])
    except Malformed:
        return
    _ = (message.requested, message.server, message.limit, message.parameters)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(max_size=120))
def test_nothing_else_is_raised_by_noise(tail: bytes) -> None:
    try:
        dhcp4.decode(GOOD[:240] + tail)
    except Malformed:
        return
