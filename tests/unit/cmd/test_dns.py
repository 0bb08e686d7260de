import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from vmnet.cmd import dns

FOUND = {
    "network": "happy",
    "name": "ext.red.svc.cluster.local",
    "type": "A",
    "rcode": "NOERROR",
    "outcome": "cached",
    "answers": [{"name": "www.example.org.", "type": "A", "ttl": 20, "data": "192.0.2.1"}],
    "zone": None,
    "alias": "www.example.org.",
    "upstream": "10.0.0.53:53",
    "upstreams": ["10.0.0.53:53"],
    "ageSeconds": 10,
}


async def run(socket: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    dns.add_arguments(parser)
    return await dns.run(
        parser.parse_args(["query", "happy", "ext.red.svc.cluster.local", "--socket", str(socket), *words])
    )


async def answering(path: Path, answer: dict[str, Any]) -> tuple[asyncio.Server, list[dict[str, Any]]]:
    asked: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(json.loads(await reader.readline()))
        writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()

    return await asyncio.start_unix_server(serve, path=path), asked


async def test_the_answer_and_where_it_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dns.sock"
    server, asked = await answering(path, FOUND)
    async with server:
        assert await run(path, "-t", "AAAA") == 0
        assert asked == [{"ask": "dns", "network": "happy", "name": "ext.red.svc.cluster.local", "type": "AAAA"}]
        told = capsys.readouterr().out
        assert "cached: asked of the world before" in told
        assert "answered by: 10.0.0.53:53, 10 s ago" in told
        assert "alias out of this network: www.example.org." in told
        assert await run(path, "-o", "json") == 0
        assert json.loads(capsys.readouterr().out) == FOUND


async def test_a_name_without_records_and_a_network_that_is_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dns.sock"
    server, _ = await answering(path, {**FOUND, "answers": [], "outcome": "local", "rcode": "NXDOMAIN"})
    async with server:
        assert await run(path) == 1
    path.unlink(missing_ok=True)
    server, _ = await answering(path, {"error": "network happy is not on this node", "elsewhere": True})
    async with server:
        assert await run(path) == 2
    told = capsys.readouterr().err
    assert "not on this node" in told
    assert "kubectl exec -n vmnet-system" in told


async def test_no_agent_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"(?s)no agent at .*kubectl exec -n vmnet-system"):
        await run(tmp_path / "dns.sock")
