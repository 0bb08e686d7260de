"""``vmnet status --local``, by the agent's socket; the cluster's half is tried in the lab."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vmnet.agent.inspection import Inspection
from vmnet.cmd import status

GOOD: dict[str, Any] = {
    "node": "n1",
    "version": "0.1.0",
    "notReady": [],
    "cniConfiguration": {"path": "/etc/cni/net.d/10-lab.conflist", "problem": None},
    "watches": [{"kind": "pods", "synced": True, "failure": None}],
    "failing": [],
    "faults": [],
    "networks": [{"name": "red", "faults": [], "ports": [{"state": "open"}, {"state": "standby"}]}],
}


async def run(path: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    return await status.run(parser.parse_args(["--local", "--socket", str(path), *words]))


async def ask(path: Path, answer: dict[str, Any], *words: str) -> int:
    """What the command makes of an answer."""

    async def answerer(_: Mapping[str, Any]) -> dict[str, Any]:
        return answer

    inspection = Inspection(path, {"status": answerer})
    await inspection.start()
    try:
        return await run(path, *words)
    finally:
        await inspection.close()


async def test_a_node_that_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await ask(tmp_path / "a.sock", GOOD) == 0
    told = capsys.readouterr().out
    assert "node n1: agent 0.1.0, ready" in told
    assert "network red: 2 ports, 1 standby" in told
    assert await ask(tmp_path / "a.sock", GOOD, "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == GOOD


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"notReady": ["not listed yet: pods"]}, "not ready: not listed yet: pods"),
        ({"faults": ["the node's table is gone"]}, "broken: the node's table is gone"),
        ({"networks": [{"name": "red", "faults": ["br0 is gone"], "ports": []}]}, "broken: br0 is gone"),
    ],
)
async def test_what_is_wrong_is_told_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], says: str
) -> None:
    assert await ask(tmp_path / "a.sock", {**GOOD, **changes}) == 1
    assert says in capsys.readouterr().out


async def test_without_an_agent_it_could_not_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert await run(tmp_path / "none.sock") == 2
    assert "no agent at" in capsys.readouterr().err
