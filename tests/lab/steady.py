"""A program for a pod: sends numbered datagrams at a fixed rate, and tells which of those it is sent never came.

``python3 -c … PORT PEER PEER-PORT RATE``. Asked on UDP port 127.0.0.1:PORT+1 for ``count`` it tells how many have come;
told to ``stop`` it sends no more, waits for what is still on its way, prints what it has seen and ends. What comes late
has come: a machine that others keep busy is no network that loses.
"""

import contextlib
import json
import select
import socket
import struct
import sys
import time

NUMBER = struct.Struct("!cQ")
LINGER = 5.0
"""Seconds that a datagram may still be on its way after the last was sent."""


def main() -> None:
    port, peer, peer_port, rate = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    peer = peer if ":" in peer else f"::ffff:{peer}"
    data, control = (socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET6, socket.AF_INET))
    data.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    with contextlib.suppress(PermissionError):
        # A receiver that waits for its processor must not lose what the network has brought.
        data.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_RCVBUFFORCE", 33), 1 << 26)
    data.bind(("::", port))
    control.bind(("127.0.0.1", port + 1))
    for opened in (data, control):
        opened.setblocking(False)
    came: set[int] = set()
    sent, ended, last, refused = 0, 0.0, -1, 0
    started = told = time.monotonic()
    while True:
        now = time.monotonic()
        while not ended and sent < (now - started) * rate:
            try:
                data.sendto(NUMBER.pack(b"n", sent), (peer, peer_port))
            except (ConnectionRefusedError, BlockingIOError):
                refused += 1
                break
            sent += 1
        if ended and now - told > 0.05:
            told = now
            with contextlib.suppress(ConnectionRefusedError, BlockingIOError):
                data.sendto(NUMBER.pack(b"e", sent), (peer, peer_port))
        if ended and now - ended > 1 and last >= 0:
            missing = sorted(set(range(min(came), last)) - came)
            if not missing or now - ended > LINGER:
                break
        readable, _, _ = select.select([data, control], [], [], 0.05 if ended else 0.5 / rate)
        if data in readable:
            with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                while True:
                    kind, number = NUMBER.unpack(data.recv(64))
                    if kind == b"n":
                        came.add(number)
                    else:
                        last = number
        if control in readable:
            word, asking = control.recvfrom(64)
            if word == b"stop" and not ended:
                ended = now
            control.sendto(str(len(came)).encode(), asking)
    print(
        json.dumps({"sent": sent, "came": len(came), "lost": len(missing), "missing": missing[:20], "refused": refused})
    )


main()
