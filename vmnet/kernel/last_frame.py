"""When the last frame with a given source came in by an interface: a stamp that the kernel itself keeps.

An eBPF program on a packet socket writes the time into a map and passes nothing on, so that frames wake nobody and
fill no queue, however many there are, and a process that is stopped meanwhile misses none.
"""

import ctypes
import errno
import os
import platform
import socket
import struct
import time
from typing import Final

from vmnet.kernel import packets
from vmnet.kernel.api import LastFrame
from vmnet.model import addresses
from vmnet.model.names import InterfaceName, MacAddress

_NUMBERS: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
"""Of the system call bpf(2), by machine."""
_SO_ATTACH_BPF: Final = 50
"""asm-generic/socket.h; Python's socket module does not name it."""
_MAP_CREATE, _MAP_LOOKUP, _PROG_LOAD = 0, 1, 5
_ARRAY, _SOCKET_FILTER = 2, 1
_ATTRIBUTES: Final = 128
"""Octets of ``union bpf_attr``, as far as any of these commands reads it; what is beyond is zero."""
_LIBC: Final = ctypes.CDLL(None, use_errno=True)

# Registers, and offsets of linux/bpf.h: the packet's type in ``struct __sk_buff``.
_R0, _R1, _R2, _R6, _R7, _FRAME = 0, 1, 2, 6, 7, 10
_PACKET_TYPE: Final = 4
_LOOKUP_ELEMENT, _KTIME = 1, 5


class KernelLastFrame(LastFrame):
    """See ``Kernel.last_frame``."""

    def __init__(self, opened: socket.socket, stamps: int) -> None:
        self._opened = opened
        self._stamps = stamps

    def seen(self) -> float | None:
        """See ``LastFrame``."""
        key, value = ctypes.create_string_buffer(4), ctypes.create_string_buffer(8)
        _bpf(_MAP_LOOKUP, struct.pack("IIQQQ", self._stamps, 0, ctypes.addressof(key), ctypes.addressof(value), 0))
        (nanoseconds,) = struct.unpack("Q", value.raw)
        return None if not nanoseconds else time.time() - (time.monotonic() - nanoseconds / 1e9)

    def close(self) -> None:
        """See ``LastFrame``."""
        if self._stamps >= 0:
            self._opened.close()
            os.close(self._stamps)
            self._stamps = -1


def last_frame(interface: InterfaceName, mac: MacAddress) -> KernelLastFrame:
    """Runs inside the interface's network namespace. Raises OSError."""
    stamps = _bpf(_MAP_CREATE, struct.pack("IIIII", _ARRAY, 4, 8, 1, 0))
    try:
        program = _load(_program(stamps, addresses.mac_bytes(mac)))
        try:
            opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
            try:
                # Before it is bound: no frame passes that is not looked at.
                opened.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_BPF, program)
                opened.bind((interface, packets.ETH_P_ALL))
            except BaseException:
                opened.close()
                raise
        finally:
            os.close(program)
    except BaseException:
        os.close(stamps)
        raise
    return KernelLastFrame(opened, stamps)


def _program(stamps: int, mac: bytes) -> bytes:
    """If the frame comes in and has this source, write the time (CLOCK_MONOTONIC, ns); keep nothing of it."""
    high, low = struct.unpack("!iH", mac)
    end = 17  # the last two instructions, to which all jumps lead
    found: list[tuple[int, int, int, int, int]] = []

    def add(code: int, to: int = 0, source: int = 0, offset: int = 0, operand: int = 0) -> None:
        found.append((code, to, source, offset, operand))

    def leave(code: int, operand: int) -> None:
        add(code, _R0, 0, end - len(found) - 1, operand)

    add(0xBF, _R6, _R1)  # LD_ABS finds the frame by R6
    add(0x61, _R0, _R1, _PACKET_TYPE)
    leave(0x15, socket.PACKET_OUTGOING)  # if equal
    add(0x20, operand=6)  # a word, in host order
    leave(0x56, high)  # if not equal, as 32 bits
    add(0x28, operand=10)  # a half word
    leave(0x56, low)
    add(0x62, _FRAME, 0, -4, 0)  # the key, on the stack
    add(0x18, _R1, 1, 0, stamps)  # R1 = the map; two instructions wide
    add(0)
    add(0xBF, _R2, _FRAME)
    add(0x07, _R2, 0, 0, -4)
    add(0x85, operand=_LOOKUP_ELEMENT)
    leave(0x15, 0)
    add(0xBF, _R7, _R0)
    add(0x85, operand=_KTIME)
    add(0x7B, _R7, _R0)
    add(0xB7, _R0)
    add(0x95)
    return b"".join(
        struct.pack("<BBhi", code, to | source << 4, offset, operand) for code, to, source, offset, operand in found
    )


def _load(program: bytes) -> int:
    code, licence = ctypes.create_string_buffer(program, len(program)), ctypes.create_string_buffer(b"Apache-2.0")
    counts = (_SOCKET_FILTER, len(program) // 8)
    return _bpf(_PROG_LOAD, struct.pack("IIQQIIQ", *counts, ctypes.addressof(code), ctypes.addressof(licence), 0, 0, 0))


def _bpf(command: int, attributes: bytes) -> int:
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"bpf on {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, _ATTRIBUTES)
    result = int(_LIBC.syscall(number, command, buffer, _ATTRIBUTES))
    if result < 0:
        found = ctypes.get_errno()
        raise OSError(found, f"bpf: {os.strerror(found)}")
    return result
