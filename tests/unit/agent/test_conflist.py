"""Real directories, and the default network's installer at work in them at the same time."""

import asyncio
import base64
import json
import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmnet.agent import conflist
from vmnet.agent.conflist import Conflist
from vmnet.cni import chain
from vmnet.kernel import exchange

PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
FLANNEL: dict[str, Any] = {"name": "cbr0", "cniVersion": "0.3.1", "plugins": [{"type": "flannel"}, PORTMAP]}
CILIUM: dict[str, Any] = {"name": "cilium", "cniVersion": "0.3.1", "plugins": [{"type": "cilium-cni"}]}
SINGLE: dict[str, Any] = {"name": "old", "cniVersion": "0.4.0", "type": "macvlan", "ipam": {"type": "dhcp"}}
MULTUS: dict[str, Any] = {"name": "multus-cni-network", "type": "multus-shim", "clusterNetwork": "/x"}
SECONDS = 60.0


class Node:
    """A node's two directories."""

    def __init__(self, directory: Path) -> None:
        self.configurations, self.programs, self.shim = directory / "net.d", directory / "bin", directory / "shim"
        self.configurations.mkdir()
        self.shim.write_bytes(b"#!/bin/true\n")
        self.networks: list[str] = []
        self.results = directory / "results"
        self.conflist = self.agent()

    def agent(self, *, remove: bool = False) -> Conflist:
        return Conflist(
            self.configurations,
            self.programs,
            self.shim,
            remove=remove,
            networks=lambda: self.networks,
            results=self.results,
        )

    def write(self, name: str, body: Any) -> Path:
        """In place, as cp does."""
        path = self.configurations / name
        path.write_text(body if isinstance(body, str) else json.dumps(body))
        return path

    def rename(self, name: str, body: Any) -> None:
        """As careful installers do."""
        self.write(f"{name}.temp", body).replace(self.configurations / name)

    def read(self, name: str) -> Any:
        return json.loads((self.configurations / name).read_bytes())

    def types(self, name: str) -> list[str]:
        return [str(plugin["type"]) for plugin in self.read(name)["plugins"]]

    def names(self) -> set[str]:
        return set(os.listdir(self.configurations))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_program_and_entry_are_put_in_place_once(node: Node) -> None:
    path = node.write("10-flannel.conflist", FLANNEL)
    path.chmod(0o600)
    assert node.conflist.look() == conflist.LOOK_AGAIN
    assert node.conflist.problem is None
    assert node.read("10-flannel.conflist") == chain.chained(FLANNEL)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {name: (node.programs / name).read_bytes() for name in os.listdir(node.programs)} == {
        "vmnet-cni": b"#!/bin/true\n",
        "vmnet": b"#!/bin/true\n",
    }
    assert all(os.access(node.programs / name, os.X_OK) for name in ("vmnet", "vmnet-cni"))
    seen = [entry.stat() for folder in (node.configurations, node.programs) for entry in sorted(folder.iterdir())]
    node.conflist.look()
    node.agent().look()
    again = [entry.stat() for folder in (node.configurations, node.programs) for entry in sorted(folder.iterdir())]
    assert [(item.st_ino, item.st_mtime_ns) for item in again] == [(item.st_ino, item.st_mtime_ns) for item in seen]


def test_a_new_program_replaces_the_old_one_and_not_under_a_running_one(node: Node) -> None:
    node.write("10-flannel.conflist", FLANNEL)
    node.conflist.look()
    running = (node.programs / "vmnet-cni").open("rb")
    node.shim.write_bytes(b"#!/bin/false\n")
    node.conflist.look()
    assert (node.programs / "vmnet-cni").read_bytes() == b"#!/bin/false\n"
    assert running.read() == b"#!/bin/true\n"
    running.close()
    (node.programs / "vmnet").chmod(0o644)
    node.conflist.look()
    assert os.access(node.programs / "vmnet", os.X_OK)


def test_an_edit_of_the_default_network_is_kept_and_chained_anew(node: Node) -> None:
    node.write("10-flannel.conflist", FLANNEL)
    node.conflist.look()
    edited = {**FLANNEL, "cniVersion": "1.0.0", "plugins": [{"type": "flannel", "delegate": {"mtu": 1400}}]}
    node.rename("10-flannel.conflist", edited)
    node.conflist.look()
    assert node.read("10-flannel.conflist") == chain.chained(edited)
    # Somebody else chained a plugin behind this one.
    istio = {**edited, "plugins": [*edited["plugins"], {"type": "vmnet-cni"}, {"type": "istio-cni"}]}
    node.rename("10-flannel.conflist", istio)
    node.conflist.look()
    assert node.types("10-flannel.conflist") == ["flannel", "istio-cni", "vmnet-cni"]


def test_the_first_file_counts_and_another_default_network_may_come(node: Node) -> None:
    node.write("10-flannel.conflist", FLANNEL)
    node.write("99-other.conflist", CILIUM)
    node.conflist.look()
    assert node.types("99-other.conflist") == ["cilium-cni"]
    node.rename("05-cilium.conflist", CILIUM)
    node.conflist.look()
    assert node.types("05-cilium.conflist") == ["cilium-cni", "vmnet-cni"]


def test_multus_stays_first_and_its_default_network_is_chained_into(node: Node) -> None:
    node.write("00-multus.conf", MULTUS)
    node.conflist.look()
    assert "no configuration of a default network" in str(node.conflist.problem)
    node.write("10-flannel.conflist", FLANNEL)
    node.conflist.look()
    assert node.conflist.problem is None
    assert node.read("00-multus.conf") == MULTUS
    assert node.types("10-flannel.conflist") == ["flannel", "portmap", "vmnet-cni"]


def test_a_multus_that_does_not_see_the_change_is_told_and_not_left_without_a_program(node: Node) -> None:
    """Multus may hold a copy of the default network's configuration, made when it started."""
    node.write("10-flannel.conflist", FLANNEL)
    node.write("00-multus.conf", {"name": "m", "type": "multus", "delegates": [FLANNEL]})
    node.conflist.look()
    assert "restart Multus" in str(node.conflist.problem)
    node.rename("00-multus.conf", {"name": "m", "type": "multus", "delegates": [node.read("10-flannel.conflist")]})
    node.conflist.look()
    assert node.conflist.problem is None
    found = node.agent(remove=True).take_out()
    assert node.read("10-flannel.conflist") == FLANNEL
    assert "restart Multus" in found.left[0]
    assert (node.programs / "vmnet-cni").exists()
    node.rename("00-multus.conf", {"name": "m", "type": "multus", "delegates": [FLANNEL]})
    assert node.agent(remove=True).take_out().left == ()
    assert os.listdir(node.programs) == []
    # Or it names a file, which was the first when it started.
    (node.configurations / "10-flannel.conflist").unlink()
    node.write("10-old.conf", SINGLE)
    node.rename("00-multus.conf", {**MULTUS, "clusterNetwork": "/host/etc/cni/net.d/10-old.conf"})
    node.conflist.look()
    assert "it calls /host/etc/cni/net.d/10-old.conf" in str(node.conflist.problem)
    node.rename("00-multus.conf", {**MULTUS, "clusterNetwork": "/host/etc/cni/net.d/00-vmnet.conflist"})
    node.conflist.look()
    assert node.conflist.problem is None


def test_a_single_plugins_file_gets_a_list_before_it(node: Node) -> None:
    node.write("00-multus.conf", MULTUS)
    node.write("10-old.conf", SINGLE)
    node.conflist.look()
    assert node.conflist.problem is None
    assert sorted(node.names()) == ["00-multus.conf", "00-vmnet.conflist", "10-old.conf"]
    assert node.read("10-old.conf") == SINGLE
    assert node.read("00-vmnet.conflist")["plugins"][0] == SINGLE
    node.rename("10-old.conf", {**SINGLE, "mtu": 1400})
    node.conflist.look()
    assert node.read("00-vmnet.conflist")["plugins"][0]["mtu"] == 1400
    # The installer learns of lists.
    node.rename("10-old.conflist", FLANNEL)
    (node.configurations / "10-old.conf").unlink()
    node.conflist.look()
    assert node.names() == {"00-multus.conf", "10-old.conflist"}
    assert node.types("10-old.conflist") == ["flannel", "portmap", "vmnet-cni"]
    (node.configurations / "10-old.conflist").unlink()
    node.write("10-old.conf", SINGLE)
    node.conflist.look()
    (node.configurations / "10-old.conf").unlink()
    node.conflist.look()
    assert node.names() == {"00-multus.conf"}


@pytest.mark.parametrize("text", ["", '{"name": "cbr0", "plug', "[]", json.dumps({**FLANNEL, "cniVersion": "3.0.0"})])
def test_what_cannot_be_chained_into_is_left_and_told(node: Node, text: str) -> None:
    node.write("10-flannel.conflist", text)
    node.write("20-other.conflist", CILIUM)
    assert node.conflist.look() == conflist.LOOK_SOON
    assert str(node.configurations / "10-flannel.conflist") in str(node.conflist.problem)
    assert (node.configurations / "10-flannel.conflist").read_text() == text
    # The runtime does not go on to the next file either.
    assert node.types("20-other.conflist") == ["cilium-cni"]
    node.write("10-flannel.conflist", FLANNEL)
    assert node.conflist.look() == conflist.LOOK_AGAIN
    assert node.conflist.problem is None


def test_it_does_not_quarrel_for_ever(node: Node) -> None:
    """Cilium with cni.exclusive takes out at once what others put in."""
    for _ in range(conflist.QUARREL):
        node.rename("05-cilium.conflist", CILIUM)
        node.conflist.look()
        assert node.types("05-cilium.conflist") == ["cilium-cni", "vmnet-cni"]
    node.rename("05-cilium.conflist", CILIUM)
    node.conflist.look()
    assert node.types("05-cilium.conflist") == ["cilium-cni"]
    assert "cni.exclusive=false" in str(node.conflist.problem)


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    shim = tmp_path / "shim"
    shim.write_text("")
    found = Conflist(tmp_path / "none", tmp_path / "bin", shim)
    found.look()
    assert "no configuration" in str(found.problem)
    found = Conflist(tmp_path / "none", tmp_path / "bin", tmp_path / "nothing")
    found.look()
    assert "cannot be installed" in str(found.problem)


def test_what_was_written_between_look_and_trade_goes_back(node: Node) -> None:
    path = node.write("10-flannel.conflist", FLANNEL)
    read = path.read_bytes()
    node.rename("10-flannel.conflist", CILIUM)
    assert not conflist._replace(path, read, b"{}")
    assert node.read("10-flannel.conflist") == CILIUM
    # In place, and only begun: the writer's file is the one that stays.
    writer = path.open("w")
    assert not conflist._replace(path, read, b"{}")
    writer.write(json.dumps(FLANNEL))
    writer.close()
    assert node.read("10-flannel.conflist") == FLANNEL
    path.unlink()
    assert not conflist._replace(path, read, b"{}")
    assert node.names() == set()


def test_without_exchange_what_was_written_since_the_look_stays(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems may not have it; this machine's do."""

    def refuse(first: Path, second: Path) -> None:
        raise exchange.NoExchange(f"{first} {second}")

    monkeypatch.setattr(exchange, "exchange", refuse)
    path = node.write("10-flannel.conflist", FLANNEL)
    assert not conflist._replace(path, b"other", b"{}")
    assert node.read("10-flannel.conflist") == FLANNEL
    node.conflist.look()
    assert node.read("10-flannel.conflist") == chain.chained(FLANNEL)
    assert node.names() == {"10-flannel.conflist"}


@pytest.mark.parametrize("careful", [True, False])
def test_a_hundred_rewrites_at_the_same_time_lose_nothing(node: Node, careful: bool) -> None:
    """The last edit stays, whatever the moment; and a file that others rename into place is whole at every moment."""
    node.rename("10-flannel.conflist", FLANNEL)
    ended, broken = threading.Event(), []

    def installer() -> None:
        for number in range(100):
            (node.rename if careful else node.write)("10-flannel.conflist", {**FLANNEL, "edit": number})
        ended.set()

    def runtime() -> None:
        while not ended.is_set():
            try:
                node.read("10-flannel.conflist")
            except ValueError as error:
                broken.append(error)

    threads = [threading.Thread(target=installer), threading.Thread(target=runtime)]
    for thread in threads:
        thread.start()
    while not ended.is_set():
        node.agent().look()
    for thread in threads:
        thread.join()
    node.agent().look()
    assert node.read("10-flannel.conflist") == chain.chained({**FLANNEL, "edit": 99})
    assert not (careful and broken)
    assert node.names() == {"10-flannel.conflist"}


def dies(act: Callable[[], object], line: int) -> bool:
    """Whether a process that carries out ``act`` died before its ``line``-th line in this module's files."""
    child = os.fork()
    if child == 0:
        left = line

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if os.path.basename(frame.f_code.co_filename) not in ("conflist.py", "exchange.py"):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os._exit(9)
            return trace

        sys.settrace(trace)
        try:
            act()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize(("name", "body"), [("10-flannel.conflist", FLANNEL), ("10-old.conf", SINGLE)])
@pytest.mark.parametrize("remove", [False, True])
def test_an_agent_that_dies_at_any_line_leaves_whole_files(node: Node, name: str, body: Any, remove: bool) -> None:
    line = 0
    while True:
        line += 1
        for path in [*node.configurations.iterdir(), *(node.programs.iterdir() if node.programs.exists() else ())]:
            path.unlink()
        node.write(name, body)
        if remove:
            node.agent().look()
        died = dies(node.agent(remove=remove).look, line)
        for found in chain.candidates(node.names()) + [chain.WRAPPER] * (chain.WRAPPER in node.names()):
            whole = node.read(found)
            assert (chain.unchained(whole) if chain.is_list(body) else whole) == body or found == chain.WRAPPER
        node.agent(remove=remove).look()
        first = chain.WRAPPER if name.endswith(".conf") and not remove else name
        assert chain.has_plugin(node.read(first)) is not remove, line
        assert node.read(name) == (chain.chained(body) if chain.is_list(body) and not remove else body)
        assert node.names() == {name, first}
        assert set(os.listdir(node.programs)) == (set() if remove else {"vmnet", "vmnet-cni"})
        if not died:
            break
    assert line > 20


def test_taking_it_out_leaves_what_was_there(node: Node) -> None:
    node.write("00-multus.conf", MULTUS)
    node.write("10-flannel.conflist", FLANNEL)
    node.conflist.look()
    node.write("05-old.conf", SINGLE)
    node.conflist.look()
    assert chain.WRAPPER in node.names()
    found = node.agent(remove=True).take_out()
    assert len(found.done) == 4
    assert found.left == ()
    assert node.names() == {"00-multus.conf", "05-old.conf", "10-flannel.conflist"}
    assert [node.read(name) for name in sorted(node.names())] == [MULTUS, SINGLE, FLANNEL]
    assert os.listdir(node.programs) == []
    assert node.agent(remove=True).take_out().done == ()


def test_the_program_stays_while_pods_need_it_to_be_deleted(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.write("10-flannel.conflist", FLANNEL)
    node.conflist.look()
    node.networks = ["red_tenant", "blue_tenant"]
    leaving = node.agent(remove=True)
    leaving.look()
    assert leaving.problem is None
    assert node.read("10-flannel.conflist") == FLANNEL
    assert set(os.listdir(node.programs)) == {"vmnet", "vmnet-cni"}
    assert "blue_tenant, red_tenant" in caplog.text
    # A default network's installer that brings an older file back does not bring the plugin back.
    node.write("10-flannel.conflist", chain.chained(FLANNEL))
    node.networks = []
    leaving.look()
    assert node.read("10-flannel.conflist") == FLANNEL
    assert os.listdir(node.programs) == []


def test_the_program_stays_while_a_runtime_remembers_it(node: Node) -> None:
    """CRI-O deletes an attachment by the configuration that it was made by."""
    node.write("10-flannel.conflist", FLANNEL)
    node.conflist.look()
    node.results.mkdir()
    text = (node.configurations / "10-flannel.conflist").read_bytes()
    record = {"kind": "cniCacheV1", "containerId": "c", "config": base64.b64encode(text).decode()}
    (node.results / "cbr0-c-eth0").write_text(json.dumps(record))
    (node.results / "plain").write_text(json.dumps({"config": chain.chained(FLANNEL)}))
    without = {"config": base64.b64encode(json.dumps(FLANNEL).encode()).decode()}
    (node.results / "other").write_text(json.dumps(without))
    (node.results / "broken").write_text("{")
    found = node.agent(remove=True).take_out()
    assert "remembers 2 attachments" in found.kept[0]
    assert (node.programs / "vmnet-cni").exists()
    for name in ("cbr0-c-eth0", "plain"):
        (node.results / name).unlink()
    assert node.agent(remove=True).take_out().kept == ()
    assert os.listdir(node.programs) == []


def test_a_list_of_this_plugin_alone_is_left_for_the_administrator(node: Node) -> None:
    alone = {"name": "x", "cniVersion": "1.0.0", "plugins": [{"type": "vmnet-cni"}]}
    node.write("10-x.conflist", alone)
    found = node.agent(remove=True).take_out()
    assert "by hand" in found.left[0]
    assert node.read("10-x.conflist") == alone


@pytest.mark.parametrize(
    ("mode", "inside", "installs"),
    [("auto", True, True), ("auto", False, False), ("yes", False, True), ("no", True, False), ("remove", False, True)],
)
def test_on_its_own_only_in_a_cluster(monkeypatch: pytest.MonkeyPatch, mode: str, inside: bool, installs: bool) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    if inside:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    assert conflist.installs(mode) is installs


async def test_edits_are_followed_while_it_runs(node: Node) -> None:
    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(SECONDS):
            while not condition():
                await asyncio.sleep(0.005)

    running = asyncio.create_task(node.conflist.run())
    await until(lambda: "no configuration" in str(node.conflist.problem))
    node.rename("10-flannel.conflist", FLANNEL)
    await until(lambda: node.read("10-flannel.conflist") == chain.chained(FLANNEL))
    await until(lambda: node.conflist.problem is None)
    edited = {**FLANNEL, "name": "cbr1"}
    node.rename("10-flannel.conflist", edited)
    await until(lambda: node.read("10-flannel.conflist") == chain.chained(edited))
    (node.programs / "vmnet-cni").unlink()
    node.rename("05-cilium.conflist", CILIUM)
    await until(lambda: node.types("05-cilium.conflist") == ["cilium-cni", "vmnet-cni"])
    await until(lambda: (node.programs / "vmnet-cni").exists())
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
