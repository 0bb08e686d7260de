"""The lab without its API: real namespaces, and what stays behind when it is killed (nothing)."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from vmnet.lab import cgroups
from vmnet.lab.directory import LabDirectory, State
from vmnet.lab.errors import LabError
from vmnet.lab.lab import Lab

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

WITHOUT = ("apiserver", "agent")


def unique_name() -> str:
    return f"t-{secrets.token_hex(4)}"


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    async with Lab(unique_name(), 2, without=WITHOUT) as up:
        yield up


@pytest.fixture
def name() -> Iterator[str]:
    """A lab's name; whatever a test leaves of it is ended."""
    made = unique_name()
    yield made
    asyncio.run(Lab(made).down())


def processes_of(state: State) -> dict[int, str]:
    """All processes in the PID namespaces of a lab, by number and state letter."""
    marker = f"VMNET_LAB_DIR={LabDirectory.of(state.name).path}".encode()
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            if marker in (path / "environ").read_bytes().split(b"\0"):
                found[int(path.name)] = (path / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def assert_nothing_is_left(state: State) -> None:
    until(lambda: not processes_of(state), f"processes are left: {processes_of(state)}")
    name = state.name
    assert name not in Path("/proc/self/mountinfo").read_text()
    links = subprocess.run(["ip", "-j", "link"], capture_output=True, check=True, timeout=20).stdout
    assert not [link for link in json.loads(links) if link["ifname"].startswith("ul")]


async def test_everybody_on_the_fabric_reaches_everybody(lab: Lab) -> None:
    for host in ("fabric", "n1", "n2", "outside"):
        for address in ("172.30.0.1", "172.30.0.11", "172.30.0.12", "172.30.0.100", "fd00:30::12", "fd00:30::100"):
            done = await lab.exec(host, ["ping", "-c", "1", "-W", "2", address])
            assert done.exit == 0, f"{host} → {address}: {done.stdout}"


async def test_outside_serves_and_sees_who_asks(lab: Lab) -> None:
    done = await lab.exec("n1", ["curl", "-s", "http://172.30.0.100/"])
    assert json.loads(done.stdout) == {"client": "172.30.0.11", "path": "/"}
    done = await lab.exec("n2", ["curl", "-sg", "http://[fd00:30::100]/"])
    assert json.loads(done.stdout)["client"] == "fd00:30::12"
    done = await lab.exec("n1", ["dig", "+short", "+timeout=2", "www.outside.test", "AAAA"])
    assert done.stdout.strip() == "fd00:30::100"
    done = await lab.exec(
        "n1",
        ["curl", "-s", "--max-time", "2", "-o", "/dev/null", "-w", "%{size_download}", "http://172.30.0.100/stream"],
    )
    # The stream has no end and keeps its pace: 800 kB/s, measured over the two seconds that curl allows.
    assert 500_000 < int(done.stdout) < 2_500_000


async def test_outside_knows_no_way_to_pods(lab: Lab) -> None:
    done = await lab.exec("outside", ["ping", "-c", "1", "-W", "1", "10.244.1.1"])
    assert done.exit != 0
    assert (await lab.exec("outside", ["ip", "route", "get", "10.244.1.1"])).exit != 0


async def test_each_node_has_its_own_directories(lab: Lab) -> None:
    for path in ("/run/marker", "/etc/cni/net.d/marker", "/opt/cni/bin/marker", "/var/lib/cni/marker"):
        assert (await lab.exec("n1", ["touch", path])).exit == 0
        assert (await lab.exec("n2", ["test", "-e", path])).exit == 1
        assert (await lab.exec("fabric", ["test", "-e", path])).exit == 1
        assert not os.path.exists(path)  # noqa: ASYNC240
    assert (await lab.exec("n1", ["hostname"])).stdout.strip() == "n1"
    assert (await lab.exec("n1", ["ip", "netns", "add", "mine"])).exit == 0
    assert "mine" not in (await lab.exec("n2", ["ip", "netns"])).stdout


async def test_processes_can_be_started_signalled_and_waited_for(lab: Lab) -> None:
    log = await lab.spawn(
        "listener", "n1", ["sh", "-c", "trap 'echo ended; exit 7' TERM; echo up; while :; do sleep 0.1; done"]
    )
    until(lambda: "up" in log.read_text(), "it did not start")
    await lab.kill("listener", signal.SIGTERM)
    assert await lab.wait("listener") == 7
    assert log.read_text() == "up\nended\n"
    with pytest.raises(LabError, match="no process"):
        await lab.kill("nobody")
    with pytest.raises(LabError, match="no host"):
        await lab.exec("n9", ["true"])


async def test_a_process_that_ends_by_itself_is_reported(lab: Lab) -> None:
    waiting = asyncio.ensure_future(lab.failure())
    await lab.spawn("faulty", "n1", ["sh", "-c", "echo the reason >&2; exit 3"])
    failed = await asyncio.wait_for(waiting, 20)
    assert (failed["name"], failed["exit"], failed["tail"]) == ("faulty", 3, "the reason")
    status = await lab.status()
    assert [item["name"] for item in status["processes"] if item["failed"]] == ["faulty"]


async def test_two_labs_live_side_by_side(lab: Lab) -> None:
    async with Lab(unique_name(), 1, without=WITHOUT) as other:
        for each in (lab, other):
            assert (await each.exec("n1", ["curl", "-s", "http://172.30.0.100/"])).exit == 0
        assert other.directory.path != lab.directory.path
    assert (await lab.exec("n1", ["true"])).exit == 0


async def test_up_twice_is_refused_and_down_is_idempotent(name: str) -> None:
    lab = Lab(name, 1, without=WITHOUT)
    state = await lab.up()
    with pytest.raises(LabError, match="up already"):
        await Lab(name, 1, without=WITHOUT).up()
    assert await lab.down() is True
    assert await lab.down() is False
    assert not lab.directory.path.exists()
    assert_nothing_is_left(state)


@pytest.mark.parametrize("victim", ["init", "launcher"])
async def test_after_kill_9_nothing_is_left_and_up_works_again(name: str, victim: str) -> None:
    lab = Lab(name, 1, without=WITHOUT)
    state = await lab.up()
    assert len(processes_of(state)) >= 4
    os.kill(getattr(state, victim), signal.SIGKILL)
    assert_nothing_is_left(state)
    # The last of init to go is its entry in the process table, after all that it held.
    until(lambda: lab.directory.alive() is None, "init is still there")
    with pytest.raises(LabError, match="is not up"):
        Lab.attached(name)
    again = await lab.up()
    assert again.init != state.init
    assert (await Lab.attached(name).exec("n1", ["true"])).exit == 0


async def test_a_start_removes_the_cgroups_of_labs_that_were_killed(name: str) -> None:
    root = cgroups.hierarchy()
    if root is None:
        pytest.skip("this machine has no cgroup v2")
    dead = unique_name()
    (root / cgroups.ROOT / dead / "n1" / cgroups.KUBELET).mkdir(parents=True)
    assert dead in cgroups.labs()
    async with Lab(name, 1, without=WITHOUT) as up:
        assert dead not in cgroups.labs()
        mounted = await up.exec("n1", ["findmnt", "-n", "-o", "FSTYPE", str(cgroups.MOUNT)])
        assert mounted.stdout.split()[-1] == "cgroup2"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_lab_dies_with_the_command_that_holds_it(name: str, number: int) -> None:
    code = f"""
import asyncio
from vmnet.lab.lab import Lab
async def main():
    async with Lab({name!r}, 1, without={WITHOUT!r}) as lab:
        print("up", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        state = LabDirectory.of(name).alive()
        assert state is not None
        process.send_signal(number)
        process.wait(30)
    assert_nothing_is_left(state)
    assert LabDirectory.of(name).alive() is None


def test_a_start_that_is_killed_half_way_leaves_nothing(name: str) -> None:
    """Without the noted processes nobody could end them: they must notice that their starter is gone."""
    code = f"""
import asyncio, os, signal
from vmnet.lab.lab import Lab
async def main():
    await Lab({name!r}, 1, listener=lambda _: os.kill(os.getpid(), signal.SIGKILL), without={WITHOUT!r}).up()
asyncio.run(main())
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert process.returncode == -signal.SIGKILL
    state = State(name, 0, 0, 0, 0, 1, 0)
    assert_nothing_is_left(state)


async def test_a_failed_start_says_why_and_leaves_only_its_logs(name: str) -> None:
    lab = Lab(name, 0, without=WITHOUT)
    with pytest.raises(LabError, match="0 nodes"):
        await lab.up()
    state = lab.directory.read_state()
    assert state is not None
    assert_nothing_is_left(state)
    assert lab.directory.log("init").exists()
