"""What the command says of an archive, and how it fetches metrics."""

import argparse
import json

import pytest
from aiohttp import web

from vmnet.cmd import sysdump
from vmnet.inspect.archive import Entry


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sysdump.add_arguments(parser)
    return parser.parse_args(words)


def test_what_could_not_be_had_is_told_once_for_each_reason() -> None:
    missed = [Entry(f"nodes/{node}/node/vlan.json", "bridge", error="not\nsupported") for node in ("n1", "n2", "n3")]
    missed.append(Entry("", "list events", error="refused"))
    assert sysdump.told(missed) == [
        "nodes/n1/node/vlan.json and 2 like it: not supported",
        "list events: refused",
    ]


async def test_metrics_are_printed_as_they_are_served(capsys: pytest.CaptureFixture[str]) -> None:
    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text="vmnet_x 1.0\n")

    application = web.Application()
    application.add_routes([web.get("/metrics", metrics)])
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        assert await sysdump.run(arguments("--metrics-of", f"http://{host}:{port}/metrics")) == 0
        assert capsys.readouterr().out == "vmnet_x 1.0\n"
        assert await sysdump.run(arguments("--metrics-of", f"http://{host}:{port}/nothing")) == 1
        assert "404" in capsys.readouterr().err
    finally:
        await runner.cleanup()


async def test_what_a_node_has_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert await sysdump.run(arguments("--local")) == 0
    outputs = {item["path"]: item for item in json.loads(capsys.readouterr().out)["outputs"]}
    assert "node/links.json" in outputs
