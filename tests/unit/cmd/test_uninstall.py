"""``vmnet uninstall --node`` on directories of its own."""

import asyncio
import json
from pathlib import Path

import pytest

from vmnet.agent.conflist import Conflist, shim
from vmnet.cmd import main, uninstall
from vmnet.kernel.fake import FakeKernel
from vmnet.model.names import InterfaceName, MacAddress, NamespaceName
from vmnet.plan.state import LinkState, NetworkState

LIST = {"name": "cbr0", "cniVersion": "0.3.1", "plugins": [{"type": "flannel"}]}


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: FakeKernel) -> list[str]:
    (tmp_path / "net.d").mkdir()
    (tmp_path / "net.d" / "10-flannel.conflist").write_text(json.dumps(LIST))
    Conflist(tmp_path / "net.d", tmp_path / "bin", shim()).look()
    # Never this machine's own kernel.
    monkeypatch.setattr(uninstall, "LinuxKernel", lambda: kernel)
    directories = ["--cni-conf-dir", str(tmp_path / "net.d"), "--cni-bin-dir", str(tmp_path / "bin")]
    results = ["--cni-results", str(tmp_path / "results")]
    return ["uninstall", "--node", *directories, *results, "--cni-socket", str(tmp_path / "cni.sock")]


def test_the_node_is_as_it_was(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(words) == 0
    assert "has no vmnet-cni any more" in capsys.readouterr().out
    assert json.loads((tmp_path / "net.d" / "10-flannel.conflist").read_text()) == LIST
    assert list((tmp_path / "bin").iterdir()) == []
    assert main.main(words) == 0
    assert "there is nothing of vmnet" in capsys.readouterr().out


def test_attached_pods_are_named(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kernel: FakeKernel
) -> None:
    namespace, port = NamespaceName("vmnet-7"), InterfaceName("p123456789abc")
    link = LinkState(port, MacAddress("0a:58:00:00:00:01"), 1400, up=True, kind="veth", alias="c0ffee/eth0")
    kernel.networks[namespace] = NetworkState(namespace, {port: link})
    assert main.main([*words, "-o", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "vmnet-7" in found["left"][0]
    assert "c0ffee" in found["left"][0]
    assert (tmp_path / "bin" / "vmnet-cni").exists()
    assert json.loads((tmp_path / "net.d" / "10-flannel.conflist").read_text()) == LIST


async def test_a_running_agent_would_put_it_back(words: list[str], tmp_path: Path) -> None:
    server = await asyncio.start_unix_server(lambda reader, writer: writer.close(), str(tmp_path / "cni.sock"))
    async with server:
        assert await asyncio.to_thread(main.main, words) == 1
    assert "vmnet-cni" in (tmp_path / "net.d" / "10-flannel.conflist").read_text()


def test_it_must_be_said_that_the_node_is_meant(words: list[str]) -> None:
    assert main.main([word for word in words if word != "--node"]) == 2
    assert "vmnet-cni" in (Path(words[3]) / "10-flannel.conflist").read_text()
