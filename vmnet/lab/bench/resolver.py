"""One responder alone in its process, for ``make bench-dns``: answers, and changes records as it is told meanwhile.

``python -m vmnet.lab.bench.resolver`` with a JSON description on the first line of standard input. It says ``ready``
when it listens; with ``networks`` above one it serves as many networks on sockets of their own and says what they cost.
"""

import asyncio
import gc
import json
import os
import socket
import sys
import time
from io import FileIO
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Final

import uvloop

from vmnet_dns.server import Server
from vmnet_dns.zone import Record, View, address_records

DOMAIN: Final = "bench.test"


def name(number: int) -> str:
    """Of a machine."""
    return f"vm{number}.ns{number % 100}.vm.{DOMAIN}"


def address(number: int, generation: int = 0) -> str:
    """Of a machine; another in every generation."""
    return f"10.{number >> 16 & 255 | (generation % 100) << 1}.{number >> 8 & 255}.{number & 255}"


def records(number: int, generation: int = 0) -> list[Record]:
    """Of a machine."""
    return address_records(name(number), [ip_address(address(number, generation))])


def resident() -> int:
    """Memory of this process that is in RAM, octets."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def follow_changes(view: View) -> None:
    """Give machines other addresses as standard input says: a number and a generation on each line."""
    descriptor, rest = sys.stdin.fileno(), b""

    def read() -> None:
        nonlocal rest
        found = os.read(descriptor, 4096)
        if not found:
            asyncio.get_running_loop().remove_reader(descriptor)
        *lines, rest = (rest + found).split(b"\n")
        for line in lines:
            number, generation = map(int, line.split())
            view.change(records(number, generation), records(number, generation - 1))

    os.set_blocking(descriptor, False)
    asyncio.get_running_loop().add_reader(descriptor, read)


async def one(names: int, port: int) -> None:
    """Serve until killed."""
    found = [record for number in range(names) for record in records(number)]
    view = View.make("bench", domain=DOMAIN, subnets=[ip_network("127.0.0.0/8")], records=found)
    server = Server(view, local_rate=(1e9, 1e9))
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", port))
    server.serve_udp(sock)
    gc.freeze()  # as the responder that runs by itself does
    print("ready", flush=True)
    follow_changes(view)
    await asyncio.Event().wait()


async def many(networks: int, names: int, seconds: float) -> dict[str, Any]:
    """Serve many networks for a while that nobody asks."""
    before, began, worked = resident(), time.monotonic(), time.process_time()
    servers = []
    for network in range(networks):
        found = [record for number in range(names) for record in records(number)]
        server = Server(View.make(f"net{network}", domain=DOMAIN, subnets=[ip_network("10.0.0.0/8")], records=found))
        host = f"127.{network >> 16 & 255}.{network >> 8 & 255}.{network & 255}"
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.setblocking(False)
        datagrams.bind((host, 5300))
        server.serve_udp(datagrams)
        stream = socket.create_server((host, 5300))
        stream.setblocking(False)
        await server.serve_tcp(stream)
        servers.append(server)
    started, start_work = time.monotonic() - began, time.process_time() - worked
    memory = resident() - before
    worked = time.process_time()
    await asyncio.sleep(seconds)
    idle = (time.process_time() - worked) / seconds
    for server in servers:
        await server.close()
    return {
        "networks": networks,
        "names_each": names,
        "octets_per_network": memory // networks,
        "start_seconds": started,
        "start_cpu_seconds": start_work,
        "idle_cpu_share": idle,
    }


def main() -> None:
    """Entry point."""
    with FileIO(sys.stdin.fileno(), closefd=False) as unbuffered:  # what follows is the event loop's to read
        asked = json.loads(unbuffered.readline())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if asked.get("networks"):
            print(json.dumps(runner.run(many(asked["networks"], asked["names"], asked["seconds"]))))
        else:
            runner.run(one(asked["names"], asked["port"]))


if __name__ == "__main__":
    main()
