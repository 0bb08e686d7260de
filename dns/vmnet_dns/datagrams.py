"""Many datagrams by one system call: ``recvmmsg`` and ``sendmmsg`` (Linux), on memory that is used again and again.

A client's address is never taken apart: it lies where the kernel wrote it, and the answer's header points there.
"""

import ctypes
import errno
import os
import socket
import sys
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final

SIZE: Final = 4096
"""Longest query; of a longer one the end is cut off, and it is malformed."""
NAME: Final = 28
"""Octets of sockaddr_in6; sockaddr_in takes 16 of them."""
_DONTWAIT: Final = 0x40


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    _fields_ = (("header", _Header), ("length", ctypes.c_uint32))


_C: Final = ctypes.CDLL(None, use_errno=True)


class _Half:
    """Messages, their vectors and buffers for one direction."""

    def __init__(self, count: int, size: int, names: Any) -> None:
        messages, vectors = bytearray(count * ctypes.sizeof(_Message)), bytearray(count * ctypes.sizeof(_Vector))
        octets = bytearray(count * size)
        self.messages = (_Message * count).from_buffer(messages)
        filled = (_Vector * count).from_buffer(vectors)
        base, name = ctypes.addressof(ctypes.c_char.from_buffer(octets)), ctypes.addressof(names)
        for at in range(count):
            filled[at] = _Vector(base + at * size, size)
            header = self.messages[at].header
            header.name, header.name_length = name + at * NAME, NAME
            header.vectors, header.vector_count = ctypes.addressof(filled) + at * ctypes.sizeof(_Vector), 1
        # The same memory as numbers: what ctypes does for every access to a field takes longer than all the rest.
        self.octets = memoryview(octets)
        self.numbers = memoryview(messages).cast("I")
        self.pointers = memoryview(messages).cast("L")
        self.lengths = memoryview(vectors).cast("L")


class Batch:
    """Up to ``count`` queries and their answers. One serves all sockets of a process, one after another.

    Query ``at`` is ``queries[at * SIZE : at * SIZE + numbers[at * STRIDE + LENGTH]]``; whoever is in no hurry calls
    ``query``.
    """

    STRIDE: Final = ctypes.sizeof(_Message) // 4
    LENGTH: Final = _Message.length.offset // 4
    _NAME_LENGTH: Final = _Header.name_length.offset // 4
    POINTER_STRIDE: Final = ctypes.sizeof(_Message) // ctypes.sizeof(ctypes.c_void_p)
    VECTOR_STRIDE: Final = ctypes.sizeof(_Vector) // ctypes.sizeof(ctypes.c_void_p)

    def __init__(self, count: int) -> None:
        self.count = count
        octets = bytearray(count * NAME)
        names = ctypes.c_char.from_buffer(octets)
        self.names = memoryview(octets)
        self._name_base = ctypes.addressof(names)
        self._in = _Half(count, SIZE, names)
        self._out = _Half(count, SIZE, names)
        self.queries, self.numbers = self._in.octets, self._in.numbers
        self.answers, self._pointers, self._lengths = self._out.octets, self._out.pointers, self._out.lengths
        self._waiting = 0
        self._taken = 0
        """Queries of the last call: the kernel has overwritten the room for their clients' addresses."""

    def receive(self, descriptor: int) -> int:
        """Take what has come; 0: nothing. Raises OSError: an ICMP error that an earlier answer caused, for example."""
        numbers, stride, at = self.numbers, self.STRIDE, self._NAME_LENGTH
        for number in range(self._taken):
            numbers[number * stride + at] = NAME
        self._taken = 0
        found: int = _C.recvmmsg(descriptor, self._in.messages, self.count, _DONTWAIT, None)
        if found < 0:
            number = ctypes.get_errno()
            if number in (errno.EAGAIN, errno.EINTR):
                return 0
            raise OSError(number, os.strerror(number))
        self._taken = found
        return found

    def query(self, at: int) -> bytes:
        """One query's octets."""
        start = at * SIZE
        return self.queries[start : start + self.numbers[at * self.STRIDE + self.LENGTH]].tobytes()

    def client(self, at: int, family: int) -> tuple[str, int] | tuple[str, int, int, int]:
        """A client's address as the socket module has it."""
        name = self.names[at * NAME : (at + 1) * NAME].tobytes()
        port = int.from_bytes(name[2:4], "big")
        if family == socket.AF_INET:
            return str(IPv4Address(name[4:8])), port
        scope = int.from_bytes(name[24:28], sys.byteorder)
        return str(IPv6Address(name[8:24])), port, 0, scope

    def answer(self, at: int, wire: bytes) -> None:
        """Put down the answer to query ``at``; ``send`` sends it. At most SIZE octets."""
        out, length = self._waiting, len(wire)
        self.answers[out * SIZE : out * SIZE + length] = wire
        self._lengths[out * self.VECTOR_STRIDE + 1] = length
        self._pointers[out * self.POINTER_STRIDE] = self._name_base + at * NAME
        self._waiting = out + 1

    def send(self, descriptor: int, family: int) -> list[OSError]:
        """Send the answers. One that cannot be sent is lost, as datagrams are, and told; the others go."""
        waiting, self._waiting = self._waiting, 0
        length = 16 if family == socket.AF_INET else NAME
        numbers, stride, at = self._out.numbers, self.STRIDE, self._NAME_LENGTH
        for number in range(waiting):
            numbers[number * stride + at] = length
        errors: list[OSError] = []
        sent = 0
        while sent < waiting:
            done: int = _C.sendmmsg(
                descriptor,
                ctypes.byref(self._out.messages, sent * ctypes.sizeof(_Message)),
                waiting - sent,
                _DONTWAIT,
            )
            if done < 0:
                number = ctypes.get_errno()
                errors.append(OSError(number, os.strerror(number)))
                done = 1
            sent += done
        return errors
