"""DHCPv4 messages (RFC 2131) and their options (RFC 2132)."""

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import IPv4Address
from typing import Final

from vmnet.model.addresses import mac_bytes
from vmnet.model.names import MacAddress
from vmnet.wire import ethernet
from vmnet.wire.malformed import Malformed

SERVER_PORT: Final = 67  # RFC 2131 section 4.1
CLIENT_PORT: Final = 68
UNSPECIFIED: Final = IPv4Address(0)
LIMITED_BROADCAST: Final = IPv4Address("255.255.255.255")

BOOT_REQUEST: Final = 1  # RFC 2131 section 2
BOOT_REPLY: Final = 2
MINIMUM: Final = 300  # RFC 1542 section 2.1: size of a BOOTP message
DEFAULT_LIMIT: Final = 548
"""Largest message every client takes: 576 octets less IP and UDP headers (RFC 2131 section 2)."""

_HEADER: Final = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s4s")
_COOKIE: Final = b"\x63\x82\x53\x63"  # RFC 2131 section 3
_ETHERNET: Final = 1
_BROADCAST: Final = 0x8000  # RFC 2131 section 2, figure 2
_PAD: Final = 0  # RFC 2132 section 3.1
_END: Final = 255  # RFC 2132 section 3.2
_MAX_IDENTIFIER: Final = 240
"""Octets of a client identifier. RFC 4361 needs 135; any reply must have room to echo it."""
_CHUNK: Final = 255  # longest value one option holds; longer ones are split (RFC 3396)


class MessageType(IntEnum):
    """RFC 2132 section 9.6."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


class Option(IntEnum):
    """The options this package reads or writes."""

    SUBNET_MASK = 1  # RFC 2132 section 3.3
    ROUTER = 3  # RFC 2132 section 3.5
    DNS = 6  # RFC 2132 section 3.8
    HOSTNAME = 12  # RFC 2132 section 3.14
    DOMAIN = 15  # RFC 2132 section 3.17
    MTU = 26  # RFC 2132 section 5.1
    BROADCAST = 28  # RFC 2132 section 5.3
    REQUESTED_ADDRESS = 50  # RFC 2132 section 9.1
    LEASE_TIME = 51  # RFC 2132 section 9.2
    OVERLOAD = 52  # RFC 2132 section 9.3
    MESSAGE_TYPE = 53  # RFC 2132 section 9.6
    SERVER = 54  # RFC 2132 section 9.7
    PARAMETERS = 55  # RFC 2132 section 9.8
    MESSAGE = 56  # RFC 2132 section 9.9
    MAXIMUM_SIZE = 57  # RFC 2132 section 9.10
    RENEWAL_TIME = 58  # RFC 2132 section 9.11
    REBINDING_TIME = 59  # RFC 2132 section 9.12
    CLIENT_IDENTIFIER = 61  # RFC 2132 section 9.14
    RAPID_COMMIT = 80  # RFC 4039 section 4
    RELAY_INFORMATION = 82  # RFC 3046 section 2.0
    SEARCH = 119  # RFC 3397 section 2
    ROUTES = 121  # RFC 3442


# Options whose size is fixed; reading checks them, so that nobody else has to.
_SIZES: Final = {
    Option.MESSAGE_TYPE: 1,
    Option.REQUESTED_ADDRESS: 4,
    Option.SERVER: 4,
    Option.LEASE_TIME: 4,
    Option.MAXIMUM_SIZE: 2,
    Option.RAPID_COMMIT: 0,
}


@dataclass(frozen=True, slots=True)
class Message:
    """One message. ``options`` holds all but the message type, in order; addresses are ``0.0.0.0`` where unset."""

    type: MessageType
    transaction: int
    mac: MacAddress
    reply: bool = False
    hops: int = 0
    seconds: int = 0
    broadcast: bool = False
    client: IPv4Address = UNSPECIFIED
    """``ciaddr``: what the client uses already."""
    your: IPv4Address = UNSPECIFIED
    """``yiaddr``: what the server gives."""
    next_server: IPv4Address = UNSPECIFIED
    relay: IPv4Address = UNSPECIFIED
    """``giaddr``."""
    options: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def requested(self) -> IPv4Address | None:
        """Address in the requested-address option."""
        return self._address(Option.REQUESTED_ADDRESS)

    @property
    def server(self) -> IPv4Address | None:
        """Server identifier."""
        return self._address(Option.SERVER)

    @property
    def parameters(self) -> bytes:
        """Codes of the options the client asks for, one octet each."""
        return self.options.get(Option.PARAMETERS, b"")

    @property
    def limit(self) -> int:
        """Largest DHCP message in octets that the client takes, without IP and UDP headers."""
        data = self.options.get(Option.MAXIMUM_SIZE)
        return DEFAULT_LIMIT if data is None else max(DEFAULT_LIMIT, int.from_bytes(data, "big") - 28)

    def _address(self, option: Option) -> IPv4Address | None:
        data = self.options.get(option)
        return None if data is None else IPv4Address(data)


def encode(message: Message, limit: int = DEFAULT_LIMIT, expendable: Collection[int] = ()) -> bytes:
    """The message in at most ``limit`` octets; ``expendable`` options go when there is no room, the last ones first.

    Raises ValueError when the others alone are too long.
    """
    head = _HEADER.pack(
        BOOT_REPLY if message.reply else BOOT_REQUEST,
        _ETHERNET,
        6,
        message.hops,
        message.transaction,
        message.seconds,
        _BROADCAST * message.broadcast,
        message.client.packed,
        message.your.packed,
        message.next_server.packed,
        message.relay.packed,
        mac_bytes(message.mac),  # struct pads with zeros
        b"",
        b"",
        _COOKIE,
    )
    parts = {code: _encode_option(code, data) for code, data in message.options.items()}
    room = limit - len(head) - 3 - 1  # message type, end
    for code in reversed(tuple(parts)):
        if sum(map(len, parts.values())) <= room:
            break
        if code in expendable:
            del parts[code]
    else:
        if sum(map(len, parts.values())) > room:
            raise ValueError(f"options do not fit into {limit} octets")
    body = _encode_option(Option.MESSAGE_TYPE, bytes([message.type])) + b"".join(parts.values()) + bytes([_END])
    return (head + body).ljust(MINIMUM, b"\0")


def decode(data: bytes) -> Message:
    """The message in a UDP payload. Raises Malformed; plain BOOTP, without a message type, is Malformed too."""
    if len(data) < _HEADER.size:
        raise Malformed(f"DHCP message of {len(data)} octets")
    (
        operation,
        hardware,
        size,
        hops,
        transaction,
        seconds,
        flags,
        client,
        your,
        server,
        relay,
        address,
        name,
        file,
        cookie,
    ) = _HEADER.unpack_from(data)
    if operation not in (BOOT_REQUEST, BOOT_REPLY):
        raise Malformed(f"BOOTP operation {operation}")
    if (hardware, size) != (_ETHERNET, 6):
        raise Malformed(f"hardware type {hardware} with addresses of {size} octets")
    if cookie != _COOKIE:
        raise Malformed("no DHCP cookie")
    options = _decode_options(data[_HEADER.size :])
    overload = options.pop(Option.OVERLOAD, b"\0")
    if len(overload) != 1 or overload[0] > 3:
        raise Malformed("bad option overload")
    for bit, area in ((1, file), (2, name)):  # RFC 2131 section 4.1: first file, then sname
        if overload[0] & bit:
            for code, value in _decode_options(area).items():
                options[code] = options.get(code, b"") + value
    for code, expected in _SIZES.items():
        if code in options and len(options[code]) != expected:
            raise Malformed(f"option {code.value} has {len(options[code])} octets, not {expected}")
    if len(options.get(Option.CLIENT_IDENTIFIER, b"")) > _MAX_IDENTIFIER:
        raise Malformed(f"client identifier of more than {_MAX_IDENTIFIER} octets")
    kind = options.pop(Option.MESSAGE_TYPE, None)
    if kind is None:
        raise Malformed("no message type")
    try:
        message_type = MessageType(kind[0])
    except ValueError:
        raise Malformed(f"message type {kind[0]}") from None
    return Message(
        type=message_type,
        transaction=transaction,
        mac=ethernet.mac(address[:6]),
        reply=operation == BOOT_REPLY,
        hops=hops,
        seconds=seconds,
        broadcast=bool(flags & _BROADCAST),
        client=IPv4Address(client),
        your=IPv4Address(your),
        next_server=IPv4Address(server),
        relay=IPv4Address(relay),
        options=options,
    )


def _encode_option(code: int, data: bytes) -> bytes:
    chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)] or [b""]
    return b"".join(bytes([code, len(chunk)]) + chunk for chunk in chunks)


def _decode_options(data: bytes) -> dict[int, bytes]:
    """Options by code; one that occurs more than once is one long option (RFC 3396). The end option may be missing."""
    options: dict[int, bytes] = {}
    offset = 0
    while offset < len(data) and data[offset] != _END:
        code = data[offset]
        if code == _PAD:
            offset += 1
            continue
        if offset + 2 > len(data):
            raise Malformed(f"option {code} ends early")
        value = data[offset + 2 : offset + 2 + data[offset + 1]]
        if len(value) != data[offset + 1]:
            raise Malformed(f"option {code} ends early")
        options[code] = options.get(code, b"") + value
        offset += 2 + len(value)
    return options
