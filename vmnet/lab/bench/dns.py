"""``make bench-dns``: the responder against Unbound and NSD, on the same core, with the same client, in turn.

Each serves the same 10,000 names in a network namespace of its own with nothing else in it, on one core; the client,
``asker.c``, has the other. It asks in mixed case and with EDNS. Measured are the processor time of a query and queries
a second when there is always something to answer, and the 99th percentile at a fixed rate while 100 records change a
second (NSD's zone does not: it knows no such change). Then one process serves 1,000 networks that nobody asks,
and a whole agent follows changes (``dns_changes``). dnsperf asks too, when there is always something to answer.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

from vmnet.lab.bench import dns_changes, resolver
from vmnet.lab.errors import LabError
from vmnet.lab.guest.probe import binary

ASKER: Final = Path(__file__).with_name("asker.c")
PORTS: Final = {"vmnet": 5301, "unbound": 5302, "nsd": 5303}
SERVER_CORE, CLIENT_CORE = "0", "1"
WINDOW: Final = "64"
"""Questions under way at once when there is always something to answer."""
FIRST: Final = ("chrt", "--fifo", "10")
"""For what is measured in microseconds on a machine with other work: server and client go before that."""
START_SECONDS: Final = 60.0
INSIDE: Final = "VMNET_BENCH_DNS_INSIDE"


@dataclass(slots=True)
class Figure:
    """One figure of every server. ``limit``: what ours may be of Unbound's; None: only told."""

    name: str
    unit: str
    limit: float | None
    at_least: bool = False
    found: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Ours to Unbound's, of medians."""
        if self.limit is None or not self.found.get("vmnet") or not self.found.get("unbound"):
            return None
        return statistics.median(self.found["vmnet"]) / statistics.median(self.found["unbound"])

    @property
    def met(self) -> bool | None:
        """Whether the ratio is what was asked for."""
        if self.limit is None or self.ratio is None:
            return None
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit


@dataclass(frozen=True, slots=True)
class Running:
    """A server that listens."""

    name: str
    process: subprocess.Popen[str]
    control: Path | None = None

    def cpu_seconds(self) -> float:
        """Of its process, threads and children too, to the nanosecond: ticks keep step with the questions."""
        pids = [self.process.pid]
        for pid in pids:
            with contextlib.suppress(FileNotFoundError):
                pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        total = 0
        for pid in pids:
            for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                with contextlib.suppress(FileNotFoundError):
                    total += int(task.read_text().split()[0])
        return total / 1e9


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Both cores always have something to do that gives way to all else.

    At some thousand questions a second a virtual processor sleeps between two of them or just does not, as it happens:
    waking it may cost whoever wakes it as much as the answer.
    """
    spin = ("chrt", "--idle", "0", "sh", "-c", "while :; do :; done")
    spinners = [subprocess.Popen(["taskset", "-c", core, *spin]) for core in (SERVER_CORE, CLIENT_CORE)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


@contextlib.contextmanager
def running(name: str, names: int, directory: Path, *, first: bool = False) -> Iterator[Running]:
    """A server with all names. Raises LabError.

    ``first``: it runs whenever it can, whatever else the machine does.
    """
    port, control = PORTS[name], None
    pinned = ["taskset", "-c", SERVER_CORE, *(FIRST if first else ())]
    if name == "vmnet":
        command = [*pinned, sys.executable, "-m", "vmnet.lab.bench.resolver"]
    elif name == "unbound":
        control = directory / "unbound.sock"
        command = [*pinned, "unbound", "-d", "-p", "-c", str(_unbound(names, port, control, directory))]
    else:
        command = [*pinned, "nsd", "-d", "-c", str(_nsd(names, port, directory))]
    with (directory / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            cwd=directory,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    try:
        if process.stdin is None:
            raise LabError(f"{name} has no standard input")
        if name == "vmnet":
            process.stdin.write(json.dumps({"names": names, "port": port}) + "\n")
            process.stdin.flush()
        _await_answer(name, process, port, directory)
        yield Running(name, process, control)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _await_answer(name: str, process: subprocess.Popen[str], port: int, directory: Path) -> None:
    query = bytes.fromhex("000101000001000000000000") + _wire(resolver.name(0)) + b"\x00\x01\x00\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.2)
        sock.connect(("127.0.0.1", port))
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError):
                sock.send(query)
                if sock.recv(512)[7] == 1:
                    return
            time.sleep(0.05)
    raise LabError(f"{name} does not answer: {(directory / f'{name}.log').read_text()[-400:]}")


def _mixed(name: str, seed: int) -> str:
    """Letters of both cases, by the bits of a number."""
    return "".join(item.upper() if seed >> at % 8 & 1 else item for at, item in enumerate(name))


def _wire(name: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode() for label in name.split(".")) + b"\x00"


def _unbound(names: int, port: int, control: Path, directory: Path) -> Path:
    data = "".join(f'local-data: "{resolver.name(at)}. 30 A {resolver.address(at)}"\n' for at in range(names))
    path = directory / "unbound.conf"
    path.write_text(
        f"""server:
interface: 127.0.0.1
port: {port}
do-daemonize: no
chroot: ""
username: ""
directory: "{directory}"
pidfile: ""
use-syslog: no
verbosity: 0
num-threads: 1
module-config: "iterator"
access-control: 127.0.0.0/8 allow
edns-buffer-size: 1232
so-rcvbuf: 1m
local-zone: "{resolver.DOMAIN}." static
{data}
remote-control:
control-enable: yes
control-interface: {control}
control-use-cert: no
"""
    )
    return path


def _nsd(names: int, port: int, directory: Path) -> Path:
    zone = directory / "bench.zone"
    data = "".join(f"{resolver.name(at)}. 30 IN A {resolver.address(at)}\n" for at in range(names))
    top = f"{resolver.DOMAIN}. 30 IN"
    zone.write_text(f"{top} SOA ns.{resolver.DOMAIN}. x. 1 3600 600 86400 5\n{top} NS ns.{resolver.DOMAIN}.\n{data}")
    path = directory / "nsd.conf"
    path.write_text(
        f"""server:
ip-address: 127.0.0.1@{port}
server-count: 1
username: ""
chroot: ""
zonesdir: "{directory}"
pidfile: ""
zonelistfile: "{directory}/zones.list"
xfrdfile: ""
xfrdir: "{directory}"
rrl-ratelimit: 0
remote-control:
control-enable: no
zone:
name: {resolver.DOMAIN}
zonefile: {zone}
"""
    )
    return path


@contextlib.contextmanager
def changing(server: Running, names: int, rate: float) -> Iterator[list[int]]:
    """Its records change so often a second, as it is told from the client's core: Unbound by its control socket, ours
    on its standard input, NSD not at all. The number of changes is the list's one item.
    """
    done, ended = [0], Event()
    tell = _teller(server)
    if tell is None:
        yield done
        return

    def work() -> None:
        os.sched_setaffinity(0, {int(CLIENT_CORE)})
        due, number, generation = time.monotonic(), 0, 1
        while not ended.is_set():
            tell(number, generation)
            done[0] += 1
            number = (number + 1) % names
            generation += number == 0
            due += 1 / rate
            ended.wait(max(0.0, due - time.monotonic()))

    thread = Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        ended.set()
        thread.join()


def _teller(server: Running) -> Callable[[int, int], None] | None:
    """How a server is told of a machine's other address."""
    control, stdin = server.control, server.process.stdin

    def order(text: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(control))
            sock.sendall(f"UBCT1 {text}\n".encode())
            while sock.recv(4096):
                pass

    def unbound(number: int, generation: int) -> None:
        order(f"local_data_remove {resolver.name(number)}.")
        order(f"local_data {resolver.name(number)}. 30 A {resolver.address(number, generation)}")

    def ours(number: int, generation: int) -> None:
        if stdin is not None:
            stdin.write(f"{number} {generation}\n")
            stdin.flush()

    if server.name == "vmnet":
        return ours
    return unbound if control is not None else None


def ask(
    asker: Path, server: Running, names: Path, window: str, seconds: float, seed: int, *, first: bool = False
) -> dict[str, float]:
    """What the client found, and ``cpu_us``: the server's processor time of a query. Raises LabError."""
    before = server.cpu_seconds()
    done = subprocess.run(
        [
            *("taskset", "-c", CLIENT_CORE, *(FIRST if first else ())),
            *(str(asker), "127.0.0.1", str(PORTS[server.name]), str(names), window, str(seconds), str(seed)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + seconds,
    )
    if done.returncode:
        raise LabError(f"asking {server.name}: {done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout)
    if not found["answered"]:
        raise LabError(f"{server.name} answered nothing: {done.stdout}")
    found["cpu_us"] = (server.cpu_seconds() - before) / found["answered"] * 1e6
    return found


def dnsperf(server: Running, queries: Path, seconds: float) -> float:
    """What Debian's dnsperf makes of it: queries a second. Raises LabError."""
    done = subprocess.run(
        [
            *("taskset", "-c", CLIENT_CORE, "dnsperf", "-s", "127.0.0.1", "-p", str(PORTS[server.name])),
            *("-d", str(queries), "-l", str(max(1, round(seconds))), "-q", WINDOW, "-c", "1", "-T", "1", "-e"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + seconds,
    )
    found = re.search(r"Queries per second:\s+([\d.]+)", done.stdout)
    codes = re.search(r"Response codes:\s+NOERROR \d+ \(100\.00%\)", done.stdout)
    if done.returncode or found is None or codes is None:
        raise LabError(f"dnsperf asks {server.name}: {done.stdout[-400:]} {done.stderr.strip()[-400:]}")
    return float(found[1])


def measure(
    names: int, rounds: int, seconds: float, ask_rate: int, rate: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """All servers in turn. Raises LabError."""
    figures = {
        "cpu_full": Figure("CPU per query, always busy", "µs", 1.5),
        "qps": Figure("queries per second", "1/s", 0.7, at_least=True),
        "dnsperf": Figure("queries per second, as dnsperf asks", "1/s", 0.7, at_least=True),
        "cpu_rate": Figure(f"CPU per query at {ask_rate}/s, {rate:g} records change a second, cores awake", "µs", 1.5),
        "cpu_sleepy": Figure(f"CPU per query at {ask_rate}/s, {rate:g} records change a second", "µs", None),
        "p50": Figure(f"p50 at {ask_rate}/s, {rate:g} records change a second", "µs", None),
        "p99": Figure(f"p99 at {ask_rate}/s, {rate:g} records change a second", "µs", 2.0),
        "unanswered": Figure("not, or not rightly, answered of all that", "1", None),
    }
    asker = binary(ASKER)
    with tempfile.TemporaryDirectory(prefix="vmnet-bench-dns-") as made:
        directory = Path(made)
        listed = directory / "names"
        listed.write_text("".join(f"{resolver.name(at)}\n" for at in range(names)))
        queries = directory / "queries"
        queries.write_text("".join(f"{_mixed(resolver.name(at), at)} A\n" for at in range(names)))
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            order = list(PORTS)[number % 3 :] + list(PORTS)[: number % 3]
            for name in order:
                with running(name, names, directory) as server:
                    # What was never asked is answered the slow way once; that is not what is measured.
                    ask(asker, server, listed, WINDOW, max(1.0, seconds / 2), number)
                    full = ask(asker, server, listed, WINDOW, seconds, number)
                    theirs = dnsperf(server, queries, seconds)
                with (
                    running(name, names, directory, first=True) as server,
                    changing(server, names, rate),
                ):
                    ask(asker, server, listed, WINDOW, max(1.0, seconds / 2), number, first=True)
                    steady = ask(asker, server, listed, f"0:{ask_rate}", seconds, number + rounds, first=True)
                    with awake():
                        ask(asker, server, listed, f"0:{ask_rate}", 0.5, number, first=True)
                        wakeful = ask(asker, server, listed, f"0:{ask_rate}", seconds, number + rounds, first=True)
                for key, value in (
                    ("cpu_full", full["cpu_us"]),
                    ("qps", full["per_second"]),
                    ("dnsperf", theirs),
                    ("cpu_rate", wakeful["cpu_us"]),
                    ("cpu_sleepy", steady["cpu_us"]),
                    ("p50", steady["p50_us"]),
                    ("p99", steady["p99_us"]),
                    ("unanswered", sum(item[key] for item in (full, steady, wakeful) for key in ("wrong", "lost"))),
                ):
                    figures[key].found.setdefault(name, []).append(value)
    return {
        "names": names,
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
        "figures": [
            {
                "name": item.name,
                "unit": item.unit,
                "limit": item.limit,
                "at_least": item.at_least,
                "found": item.found,
                "ratio": item.ratio,
                "met": item.met,
            }
            for item in figures.values()
        ],
    }


def many(networks: int, names: int) -> dict[str, Any]:
    """What networks cost that nobody asks. Raises LabError."""
    done = subprocess.run(
        [sys.executable, "-m", "vmnet.lab.bench.resolver"],
        input=json.dumps({"networks": networks, "names": names, "seconds": 10}),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        raise LabError(f"{networks} networks: {done.stderr.strip()[-400:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| what | vmnet | Unbound | NSD | vmnet to Unbound | asked for | met |", "|---|---|---|---|---|---|---|"]
    for item in report["figures"]:
        shown = " | ".join(_spread(item["found"].get(name, ())) for name in PORTS)
        ratio = f"{item['ratio']:.2f}" if item["limit"] is not None and item["ratio"] is not None else "—"
        asked = f"{'≥' if item['at_least'] else '≤'} {item['limit']}" if item["limit"] is not None else "—"
        met = {True: "yes", False: "no", None: "—"}[item["met"]]
        lines.append(f"| {item['name']} ({item['unit']}) | {shown} | {ratio} | {asked} | {met} |")
    if found := report.get("many"):
        lines += [
            "",
            f"| {found['networks']:,} networks with {found['names_each']} names each, in one process | |",
            "|---|---|",
            f"| memory per network | {found['octets_per_network'] / 1024:.1f} KiB |",
            f"| start (processor time) | {found['start_seconds']:.2f} s ({found['start_cpu_seconds']:.2f} s) |",
            f"| idle CPU | {found['idle_cpu_share'] * 100:.2f} % of a core |",
        ]
    if changes := report.get("changes"):
        lines += ["", "| from a change to the first right answer (ms) | p50 | p99 | most |", "|---|---|---|---|"]
        lines += [
            f"| {found['names']:,} names: {kind} | {one['p50_ms']:.1f} | {one['p99_ms']:.1f} | {one['max_ms']:.1f} |"
            for found in changes
            for kind, one in found["changes"].items()
        ]
    return "\n".join(lines)


def _spread(found: Sequence[float]) -> str:
    if not found:
        return "—"
    digits = 1 if statistics.median(found) < 100 else 0
    return f"{statistics.median(found):,.{digits}f} ({min(found):,.{digits}f}–{max(found):,.{digits}f})"


def main() -> None:
    """Entry point: in a network namespace of its own."""
    parser = argparse.ArgumentParser(prog="bench-dns", description=__doc__)
    parser.add_argument("--names", type=int, default=10_000, help="%(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement (%(default)s)")
    parser.add_argument("--ask-rate", type=int, default=5000, help="questions a second (%(default)s)")
    parser.add_argument("--change-rate", type=float, default=100.0, help="records changed a second (%(default)s)")
    parser.add_argument("--networks", type=int, default=1000, help="%(default)s")
    parser.add_argument("--changes", type=int, default=30, help="of each kind, of names of an agent (%(default)s)")
    parser.add_argument("--report", type=Path, default=Path("build/bench/dns.json"), help="%(default)s")
    arguments = parser.parse_args()
    if not os.environ.get(INSIDE):
        binary(ASKER)
        inside = ["unshare", "--net", sys.executable, "-m", "vmnet.lab.bench.dns", *sys.argv[1:]]
        sys.exit(subprocess.run(inside, env={**os.environ, INSIDE: "1"}, check=False).returncode)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

    def tell(text: str) -> None:
        print(f"==> {text}", file=sys.stderr, flush=True)

    found = measure(
        arguments.names, arguments.rounds, arguments.seconds, arguments.ask_rate, arguments.change_rate, tell
    )
    tell(f"{arguments.networks} networks")
    found["many"] = many(arguments.networks, 10)
    found["changes"] = []
    for names in (1000, 10_000):
        tell(f"changes of {names} names")
        found["changes"].append(dns_changes.measure(names, arguments.changes, FIRST))
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    print(f"\nreport: {arguments.report}")


if __name__ == "__main__":
    main()
