"""The server on real sockets, asked by dig and dnspython."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address, ip_network
from pathlib import Path

import dns.asyncquery
import dns.message
import dns.rcode
import pytest

from vmnet_dns.forward import Forwarder, Upstream
from vmnet_dns.server import CONNECTIONS_PER_CLIENT, Server
from vmnet_dns.zone import Record, View, address_records, alias_record, pointer_records

DEADLINE = 20
BLUE = "blue.ns.vm.cluster.local"


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.005)


def view(address: str = "192.168.0.5", subnet: str = "127.0.0.0/8") -> View:
    records = [
        *address_records(BLUE, [ip_address(address), ip_address("fd00::5")]),
        *pointer_records(BLUE, [ip_address(address)]),
        *address_records("many.cluster.local", [ip_address(f"10.0.0.{number}") for number in range(200)]),
    ]
    return View.make("net", subnets=[ip_network(subnet), ip_network("192.168.0.0/16")], records=records)


async def open_socket(family: int, stream: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


class Running:
    def __init__(self, server: Server, port: int) -> None:
        self.server = server
        self.port = port

    @property
    def counts(self) -> Counter[tuple[str, str, str]]:
        return Counter(self.server.tally.queries)


async def serve(view: View, forwarder: Forwarder | None = None, **options: object) -> Running:
    server = Server(view, forwarder, **options)  # type: ignore[arg-type]
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.setblocking(False)
    udp.bind(("127.0.0.1", 0))
    port = udp.getsockname()[1]
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    tcp.setblocking(False)
    tcp.bind(("127.0.0.1", port))
    tcp.listen()
    server.serve_udp(udp)
    await server.serve_tcp(tcp)
    return Running(server, port)


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    made = await serve(view())
    yield made
    await made.server.close()


async def dig(port: int, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "dig", "@127.0.0.1", "-p", str(port), "+time=5", "+tries=1", *arguments, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(DEADLINE):
        out, _ = await process.communicate()
    return out.decode()


async def test_dig_is_content(running: Running) -> None:
    assert (await dig(running.port, "+short", BLUE)).split() == ["192.168.0.5"]
    assert (await dig(running.port, "+short", BLUE, "AAAA")).split() == ["fd00::5"]
    assert (await dig(running.port, "+short", "-x", "192.168.0.5")).split() == [f"{BLUE}."]
    assert (await dig(running.port, "+short", "+tcp", BLUE)).split() == ["192.168.0.5"]
    assert len((await dig(running.port, "+short", "many.cluster.local")).split()) == 200
    assert "status: NXDOMAIN" in await dig(running.port, "nobody.cluster.local")
    search = await dig(running.port, "+search", "+domain=ns.vm.cluster.local", "+short", "blue")
    assert search.split() == ["192.168.0.5"]
    assert "status: REFUSED" in await dig(running.port, "example.org")
    assert running.counts["A", "NOERROR", "local"] == 5
    assert running.counts["A", "REFUSED", "refused"] == 1


async def test_many_datagrams_at_once_are_all_answered(running: Running) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        client.connect(("127.0.0.1", running.port))
        for number in range(200):
            client.send(dns.message.make_query(BLUE, "A", id=number).to_wire())
        seen: set[int] = set()
        async with asyncio.timeout(DEADLINE):
            while len(seen) < 200:
                wire = await asyncio.get_running_loop().sock_recv(client, 4096)
                seen.add(struct.unpack_from("!H", wire)[0])
    assert seen == set(range(200))


async def test_names_change_while_the_sockets_stay(running: Running) -> None:
    query = dns.message.make_query(BLUE, "A")
    for address in ("192.168.0.5", "192.168.0.6"):
        running.server.update(view(address))
        reply = await dns.asyncquery.udp(query, "127.0.0.1", port=running.port, timeout=DEADLINE)
        assert reply.answer[0][0].to_text() == address


async def test_clients_outside_the_network_are_refused() -> None:
    running = await serve(view(subnet="10.0.0.0/8"))
    reply = await dns.asyncquery.udp(
        dns.message.make_query(BLUE, "A"), "127.0.0.1", port=running.port, timeout=DEADLINE
    )
    assert reply.rcode() == dns.rcode.REFUSED
    running.server.update(view())
    reply = await dns.asyncquery.udp(
        dns.message.make_query(BLUE, "A"), "127.0.0.1", port=running.port, timeout=DEADLINE
    )
    assert reply.rcode() == dns.rcode.NOERROR
    await running.server.close()


async def test_noise_is_counted_and_harms_nobody(running: Running) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", running.port))
        for noise in (b"", b"x", b"\xff" * 500, bytes(12), bytes(4000)):
            client.send(noise)
    await until(lambda: sum(running.counts.values()) == 5)
    assert {outcome for _, _, outcome in running.counts} == {"malformed"}
    reply = await dns.asyncquery.udp(
        dns.message.make_query(BLUE, "A"), "127.0.0.1", port=running.port, timeout=DEADLINE
    )
    assert reply.answer


async def test_a_client_that_asks_too_much_is_not_answered() -> None:
    running = await serve(view(), local_rate=(0.001, 3))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", running.port))
        for _ in range(10):
            client.send(dns.message.make_query(BLUE, "A").to_wire())
    await until(lambda: sum(running.counts.values()) == 10)
    assert running.counts["A", "NOERROR", "local"] == 3
    assert running.counts["other", "other", "limited"] == 7
    await running.server.close()


async def test_one_tcp_connection_carries_many_queries_and_idles_out() -> None:
    running = await serve(view(), idle_seconds=0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    for number in range(3):
        wire = dns.message.make_query(BLUE, "A", id=number).to_wire()
        writer.write(struct.pack("!H", len(wire)) + wire)
    async with asyncio.timeout(DEADLINE):
        for number in range(3):
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            assert dns.message.from_wire(await reader.readexactly(length)).id == number
        assert await reader.read() == b""
    writer.close()
    await running.server.close()


async def test_half_a_query_and_noise_over_tcp_end_the_connection() -> None:
    running = await serve(view(), idle_seconds=0.3)
    for sent in (b"\x00", b"\x00\x20half", b"\x00\x02xx"):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(sent)
        async with asyncio.timeout(DEADLINE):
            assert await reader.read() == b""
        writer.close()
    await running.server.close()


async def test_connections_of_one_client_are_bounded(running: Running) -> None:
    held = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(CONNECTIONS_PER_CLIENT)]
    await until(lambda: sum(running.server._connections.values()) == CONNECTIONS_PER_CLIENT)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    async with asyncio.timeout(DEADLINE):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
    for _, other in [*held, (reader, writer)]:
        other.close()
    await until(lambda: not running.server._connections)


async def test_the_world_is_asked_and_its_answers_are_counted() -> None:
    world = await serve(
        View.make("world", domain="org", subnets=[ip_network("127.0.0.0/8")]).updated(
            address_records("www.example.org", [ip_address("192.0.2.80")])
        )
    )
    upstream = Upstream(ip_address("127.0.0.1"), world.port)
    running = await serve(view(), Forwarder([upstream], open_socket))
    for ask in (dns.asyncquery.udp, dns.asyncquery.udp, dns.asyncquery.tcp):
        query = dns.message.make_query("www.example.org", "A")
        reply = await ask(query, "127.0.0.1", port=running.port, timeout=DEADLINE)
        assert reply.answer[0][0].to_text() == "192.0.2.80"
    assert "status: NXDOMAIN" in await dig(running.port, "nobody.example.org")
    await world.server.close()
    failed = await dns.asyncquery.udp(
        dns.message.make_query("other.org", "A"), "127.0.0.1", port=running.port, timeout=DEADLINE
    )
    assert failed.rcode() == dns.rcode.SERVFAIL
    not_recursive = await dns.asyncquery.udp(
        dns.message.make_query("other.org", "A", flags=0), "127.0.0.1", port=running.port, timeout=DEADLINE
    )
    assert not_recursive.rcode() == dns.rcode.REFUSED
    assert running.counts == {
        ("A", "NOERROR", "forwarded"): 1,
        ("A", "NOERROR", "cached"): 2,
        ("A", "NXDOMAIN", "forwarded"): 1,
        ("A", "SERVFAIL", "failed"): 1,
        ("A", "REFUSED", "refused"): 1,
    }
    await running.server.close()


async def world_of(*records: Record) -> Running:
    return await serve(View.make("world", domain="org", subnets=[ip_network("127.0.0.0/8")], records=records))


async def test_an_alias_out_of_the_network_is_followed_in_the_world() -> None:
    world = await world_of(
        alias_record("www.example.org", "host.example.org"),
        *address_records("host.example.org", [ip_address("192.0.2.80")]),
    )
    of = view().updated([alias_record("ext.ns.svc.cluster.local", "www.example.org")])
    upstream = Upstream(ip_address("127.0.0.1"), world.port)
    running = await serve(of, Forwarder([upstream], open_socket))
    for outcome in ("forwarded", "cached"):
        told = await dig(running.port, "+short", "eXt.ns.svc.cluster.local")
        assert told.split() == ["www.example.org.", "host.example.org.", "192.0.2.80"]
        assert running.counts["A", "NOERROR", outcome] == 1
    why = await running.server.explain(dns.message.make_query("ext.ns.svc.cluster.local", "A").to_wire())
    assert (why.outcome, why.alias, why.upstream) == ("cached", "www.example.org.", f"127.0.0.1:{world.port}")
    await running.server.close()
    await world.server.close()


async def test_an_alias_of_the_world_into_the_cluster_tells_nothing() -> None:
    world = await serve(
        View.make(
            "world",
            domain="org",
            subnets=[ip_network("127.0.0.0/8")],
            records=[
                alias_record("evil.example.org", "web.red.svc.cluster.local"),
                *address_records("web.red.svc.cluster.local", [ip_address("10.96.0.9")]),
            ],
        )
    )
    running = await serve(view(), Forwarder([Upstream(ip_address("127.0.0.1"), world.port)], open_socket))
    for name in ("evil.example.org", "web.red.svc.cluster.local"):
        told = await dig(running.port, name)
        assert "status: NXDOMAIN" in told
        assert "10.96.0.9" not in told
    await running.server.close()
    await world.server.close()


async def test_a_slow_world_holds_up_nobody_on_the_same_connection() -> None:
    silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    silent.bind(("127.0.0.1", 0))
    upstream = Upstream(ip_address("127.0.0.1"), silent.getsockname()[1])
    running = await serve(view(), Forwarder([upstream], open_socket, try_seconds=2, total_seconds=2))
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    for number, name in enumerate(("example.org", BLUE, BLUE)):
        wire = dns.message.make_query(name, "A", id=number).to_wire()
        writer.write(struct.pack("!H", len(wire)) + wire)
    writer.write_eof()
    order = []
    async with asyncio.timeout(DEADLINE):
        for _ in range(3):
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            order.append(dns.message.from_wire(await reader.readexactly(length)).id)
        assert await reader.read() == b""
    assert order == [1, 2, 0]
    writer.close()
    silent.close()
    await running.server.close()


async def test_types_are_not_folded_with_the_name(running: Running) -> None:
    """65 (HTTPS) and 97 (unassigned) differ by the bit that tells A from a."""
    for _ in range(2):
        for kind in ("A", "TYPE65", "TYPE97"):
            told = await dig(running.port, "+noedns", BLUE.title(), kind)
            assert "status: NOERROR" in told
            assert ("ANSWER: 1" in told) == (kind == "A")


async def test_queries_are_logged_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    running = await serve(view(), log_queries=True)
    with caplog.at_level(logging.INFO, "vmnet_dns.queries"):
        for _ in range(2):
            await dig(running.port, "+short", BLUE)
        await dig(running.port, "example.org")
    lines = [record.getMessage() for record in caplog.records if record.name == "vmnet_dns.queries"]
    assert lines == [f"net 127.0.0.1 {BLUE}. 1 NOERROR local"] * 2 + ["net 127.0.0.1 example.org. 1 REFUSED refused"]
    await running.server.close()


async def test_a_change_is_in_the_next_answer_over_sockets(running: Running) -> None:
    one, two = ([*address_records("web.cluster.local", [ip_address(f"10.0.0.{last}")])] for last in (1, 2))
    running.server.view.change(one)
    for _ in range(3):
        assert (await dig(running.port, "+short", "web.cluster.local")).split() == ["10.0.0.1"]
    running.server.view.change(two, one)
    assert (await dig(running.port, "+short", "web.cluster.local")).split() == ["10.0.0.2"]
    running.server.view.change([], two)
    assert "status: NXDOMAIN" in await dig(running.port, "web.cluster.local")


async def test_closing_ends_what_is_under_way() -> None:
    silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    silent.bind(("127.0.0.1", 0))
    upstream = Upstream(ip_address("127.0.0.1"), silent.getsockname()[1])
    running = await serve(view(), Forwarder([upstream], open_socket))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", running.port))
        client.send(dns.message.make_query("example.org", "A").to_wire())
    _, writer = await asyncio.open_connection("127.0.0.1", running.port)
    await until(lambda: len(running.server._tasks) == 2)
    async with asyncio.timeout(DEADLINE):
        await running.server.close()
    assert not running.server._tasks
    writer.close()
    silent.close()
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", running.port)


async def test_the_program_serves_a_zone_file_and_reads_it_again(tmp_path: Path) -> None:
    zone = tmp_path / "zone.toml"
    text = 'subnets = ["127.0.0.0/8"]\n[[host]]\nnames = ["blue.cluster.local"]\naddresses = ["192.168.0.{}"]\n'
    zone.write_text(text.format(5))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import sys; from vmnet_dns.server import main; sys.exit(main())",
        str(zone), "--listen", "127.0.0.1:0", stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "dns")},
    )  # fmt: skip
    assert process.stderr is not None
    async with asyncio.timeout(DEADLINE):
        line = (await process.stderr.readline()).decode()
        port = int(line.rsplit(None, 1)[1])
        assert (await dig(port, "+short", "blue.cluster.local")).split() == ["192.168.0.5"]
        zone.write_text(text.format(6))
        process.send_signal(signal.SIGHUP)
        assert "read again" in (await process.stderr.readline()).decode()
        assert (await dig(port, "+short", "blue.cluster.local")).split() == ["192.168.0.6"]
        zone.write_text("broken = [")
        process.send_signal(signal.SIGHUP)
        assert "the old names stay" in (await process.stderr.readline()).decode()
        assert (await dig(port, "+short", "blue.cluster.local")).split() == ["192.168.0.6"]
        process.terminate()
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "A zone file is TOML"),
        (["ZONE", "--check"], 0, "2 records"),
        (["missing.toml"], 2, "missing.toml"),
        (["ZONE", "--listen", "nonsense"], 2, "nonsense"),
        (["ZONE", "--listen", "192.0.2.1:5353"], 1, "cannot listen"),
    ],
)
async def test_the_program_explains_itself(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    zone = tmp_path / "zone.toml"
    zone.write_text('[[host]]\nnames = ["blue.cluster.local"]\naddresses = ["192.168.0.5"]\n')
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import sys; from vmnet_dns.server import main; sys.exit(main())",
        *(str(zone) if item == "ZONE" else item for item in arguments),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "dns")},
    )  # fmt: skip
    async with asyncio.timeout(DEADLINE):
        out, _ = await process.communicate()
    assert process.returncode == code, out.decode()
    assert said in out.decode()
