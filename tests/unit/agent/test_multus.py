import json
from pathlib import Path
from typing import Any

import pytest

from vmnet.agent.multus import Mode, Multus


def write(directory: Path, name: str, body: Any) -> None:
    (directory / name).write_text(body if isinstance(body, str) else json.dumps(body))


CHAIN = {"name": "default", "plugins": [{"type": "bridge"}, {"type": "vmnet-cni"}]}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, False),
        ({"10-lab.conflist": CHAIN}, False),
        ({"00-multus.conf": {"type": "multus"}, "10-lab.conflist": CHAIN}, True),
        ({"00-multus.conf": {"type": "multus-shim"}, "10-lab.conflist": CHAIN}, True),
        ({"00-multus.conflist": {"plugins": [{"type": "multus-cni"}]}}, True),
        ({"10-lab.conflist": CHAIN, "90-multus.conf": {"type": "multus"}}, False),
        ({"00-broken.conf": "{"}, False),
        ({"00-list.conf": "[]"}, False),
        ({"00-multus.bak": {"type": "multus"}, "10-lab.conflist": CHAIN}, False),
    ],
)
async def test_auto_looks_at_what_a_runtime_would_use(tmp_path: Path, files: dict[str, Any], expected: bool) -> None:
    for name, body in files.items():
        write(tmp_path, name, body)
    assert await Multus(Mode.AUTO, tmp_path).present() is expected


async def test_auto_learns_from_a_call_that_only_a_meta_plugin_makes(tmp_path: Path) -> None:
    found = Multus(Mode.AUTO, tmp_path)
    assert not await found.present()
    found.called()
    assert await found.present()


async def test_the_administrator_s_word_counts(tmp_path: Path) -> None:
    write(tmp_path, "00-multus.conf", {"type": "multus"})
    never = Multus(Mode.NO, tmp_path)
    never.called()
    assert not await never.present()
    assert await Multus(Mode.YES, tmp_path / "absent").present()
