"""Sockets of guests' networks. Every function here runs inside the namespace that the socket shall belong to."""

import ctypes
import errno
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from vmnet.model.names import InterfaceName

GONE: Final = frozenset({errno.ENODEV, errno.ENXIO, errno.ENOENT})
ETH_P_ALL: Final = 0x0003
SO_ATTACH_FILTER: Final = 26
"""asm-generic/socket.h; Python's socket module does not name it."""
RECEIVE_BUFFER: Final = 1 << 20
BACKLOG: Final = 128

_IPV4, _IPV6, _UDP, _ICMPV6, _ROUTER_SOLICITATION = 0x0800, 0x86DD, 17, 58, 133

Instruction = tuple[int, int, int, int]
"""Classic BPF: code, jump if true, jump if false, operand (linux/filter.h)."""

_LOAD_HALF, _LOAD_BYTE, _LOAD_HALF_INDEXED, _LOAD_HEADER_LENGTH = 0x28, 0x30, 0x48, 0xB1
_EQUAL, _ANY_BIT, _RETURN = 0x15, 0x45, 0x06
_ACCEPT: Final = 0xFFFFFFFF


def packet_socket(interface: InterfaceName, protocols: tuple[int, ...], udp_ports: tuple[int, ...]) -> socket.socket:
    """See ``Kernel.packet_socket``. The filter is in place before the socket can receive."""
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    try:
        program = frame_filter(protocols, udp_ports)
        if program:
            attach_filter(opened, program)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        opened.bind((interface, ETH_P_ALL))
    except BaseException:
        opened.close()
        raise
    return opened


def udp_socket(address: IPv4Address | IPv6Address, port: int) -> socket.socket:
    """See ``Kernel.udp_socket``."""
    return _bound(address, port, socket.SOCK_DGRAM)


def tcp_listener(address: IPv4Address | IPv6Address, port: int) -> socket.socket:
    """See ``Kernel.tcp_listener``."""
    opened = _bound(address, port, socket.SOCK_STREAM)
    try:
        opened.listen(BACKLOG)
    except BaseException:
        opened.close()
        raise
    return opened


def tcp_socket(family: int) -> socket.socket:
    """See ``Kernel.tcp_socket``."""
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)


def _bound(address: IPv4Address | IPv6Address, port: int, kind: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    opened = socket.socket(family, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        if kind == socket.SOCK_STREAM:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind((str(address), port))
    except BaseException:
        opened.close()
        raise
    return opened


def frame_filter(protocols: Sequence[int], udp_ports: Sequence[int]) -> tuple[Instruction, ...]:
    """Classic BPF that passes the given EtherTypes, and of IP only UDP to the given ports and router solicitations.

    Empty when everything passes. Fragments other than the first carry no ports and are not passed.
    """
    if not protocols and not udp_ports:
        return ()
    program: list[tuple[int, str | int, str | int, int] | str] = [(_LOAD_HALF, 0, 0, 12)]
    for protocol in protocols or (_IPV4, _IPV6):
        special = {_IPV4: "ipv4", _IPV6: "ipv6"}.get(protocol) if udp_ports else None
        program.append((_EQUAL, special or "accept", 0, protocol))
    program.append((_EQUAL, "drop", "drop", 0))
    if udp_ports:
        ports: list[tuple[int, str | int, str | int, int]] = [(_EQUAL, "accept", 0, port) for port in udp_ports]
        program += [
            "ipv4",
            (_LOAD_BYTE, 0, 0, 23),
            (_EQUAL, 0, "drop", _UDP),
            (_LOAD_HALF, 0, 0, 20),
            (_ANY_BIT, "drop", 0, 0x1FFF),
            (_LOAD_HEADER_LENGTH, 0, 0, 14),
            (_LOAD_HALF_INDEXED, 0, 0, 16),
            *ports,
            (_EQUAL, "drop", "drop", 0),
            "ipv6",
            (_LOAD_BYTE, 0, 0, 20),
            (_EQUAL, "udp6", 0, _UDP),
            (_EQUAL, 0, "drop", _ICMPV6),
            (_LOAD_BYTE, 0, 0, 54),
            (_EQUAL, "accept", "drop", _ROUTER_SOLICITATION),
            "udp6",
            (_LOAD_HALF, 0, 0, 56),
            *ports,
        ]
    program += ["drop", (_RETURN, 0, 0, 0), "accept", (_RETURN, 0, 0, _ACCEPT)]
    return _assemble(program)


def _assemble(program: list[tuple[int, str | int, str | int, int] | str]) -> tuple[Instruction, ...]:
    """Turn labels into forward offsets; 0 means the next instruction."""
    places: dict[str, int] = {}
    instructions: list[tuple[int, str | int, str | int, int]] = []
    for item in program:
        if isinstance(item, str):
            places[item] = len(instructions)
        else:
            instructions.append(item)

    def offset(label: str | int, here: int) -> int:
        return label if isinstance(label, int) else places[label] - here - 1

    return tuple(
        (code, offset(true, here), offset(false, here), operand)
        for here, (code, true, false, operand) in enumerate(instructions)
    )


def attach_filter(opened: socket.socket, program: Sequence[Instruction]) -> None:
    """Have the kernel drop what the program does not pass. Raises OSError."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    opened.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(buffer)))
