"""What a node's kernel has, by the tools that are there."""

from pathlib import Path

import pytest

from vmnet.inspect import node_state


async def test_every_command_has_an_output_or_a_reason(tmp_path: Path) -> None:
    (tmp_path / "vmnet-7").touch()
    (tmp_path / "cni-1").touch()
    found = {item.path: item for item in await node_state.read(tmp_path)}
    assert found.keys() == {f"{place}/{name}" for place in ("node", "vmnet-7") for name in node_state.COMMANDS}
    assert '"ifname":"lo"' in found["node/links.json"].text.replace(" ", "")
    assert found["node/links.json"].how == "ip -d -s -j link show"
    # There is no such namespace: each command says so, and none is left out.
    assert all(item.error and not item.text for path, item in found.items() if path.startswith("vmnet-7/"))


async def test_what_is_long_is_cut_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_state, "LIMIT", 5)
    monkeypatch.setattr(node_state, "COMMANDS", {"x": ("printf", "12345678")})
    (found,) = await node_state.read(tmp_path)
    assert found.as_json() == {"path": "node/x", "how": "printf 12345678", "text": "12345", "cut": 3, "error": ""}


async def test_a_command_that_hangs_or_is_not_there_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_state, "SECONDS", 0.05)
    monkeypatch.setattr(node_state, "COMMANDS", {"hangs": ("sleep", "1000"), "lacks": ("no-such-program",)})
    found = {item.path: item.error for item in await node_state.read(tmp_path)}
    assert found["node/hangs"].startswith("it did not end within")
    assert found["node/lacks"].startswith("no-such-program: ")
