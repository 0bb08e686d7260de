"""Configuration and authentication of the client; its conversation is tested in test_watch and the contract suite."""

import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from vmnet.kube.api import PODS, Forbidden, KubeError, PatchType, Unavailable
from vmnet.kube.client import KubeClient


class Server:
    """Remembers requests; accepts only ``token``."""

    def __init__(self) -> None:
        self.url = ""
        self.token = "right"
        self.seen: list[tuple[str, str, dict[str, str], dict[str, str], Any]] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read() or b"null")
        self.seen.append((request.method, request.path, dict(request.query), dict(request.headers), body))
        if request.headers.get("Authorization", "").lower() != f"bearer {self.token}":
            return web.json_response({"kind": "Status", "code": 401, "message": "Unauthorized"}, status=401)
        return web.json_response({"kind": "Pod", "metadata": {"name": "red"}})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", made.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    made.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    yield made
    await runner.cleanup()


def kubeconfig(path: Path, url: str, user: dict[str, Any]) -> Path:
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": {"server": url}}],
                "users": [{"name": "u", "user": user}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )
    return path


async def test_the_token_of_the_kubeconfig_is_sent_and_patches_say_what_they_are(
    tmp_path: Path, server: Server
) -> None:
    client = await KubeClient.connect(kubeconfig(tmp_path / "k", server.url, {"token": "right"}), user_agent="vmnet/1")
    await client.patch(PODS, "red", [{"op": "add"}], "ns", type=PatchType.JSON)
    await client.patch(PODS, "red", {"a": 1}, "ns", type=PatchType.APPLY, field_manager="vmnet", force=True)
    await client.delete(PODS, "red", "ns", uid="u1", grace_seconds=0)
    await client.close()
    (_, path, _, headers, _), (_, _, query, applied, _), (_, _, _, _, options) = server.seen
    assert path == "/api/v1/namespaces/ns/pods/red"
    assert headers["Content-Type"] == "application/json-patch+json"
    assert headers["User-Agent"] == "vmnet/1"
    assert applied["Content-Type"] == "application/apply-patch+yaml"
    assert query == {"fieldManager": "vmnet", "force": "true"}
    assert options["preconditions"] == {"uid": "u1"}
    assert options["gracePeriodSeconds"] == 0


async def test_the_environment_names_the_kubeconfig(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "k", server.url, {"token": "right"})))
    client = await KubeClient.connect(None, user_agent="vmnet")
    assert (await client.get(PODS, "red", "ns"))["kind"] == "Pod"
    await client.close()


async def test_a_refused_token_is_read_again_once(tmp_path: Path, server: Server) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    client = await KubeClient.connect(
        kubeconfig(tmp_path / "k", server.url, {"tokenFile": str(token)}), user_agent="vmnet"
    )
    token.write_text("right")
    await client.get(PODS, "red", "ns")
    server.token = "another"
    with pytest.raises(Forbidden, match="401"):
        await client.get(PODS, "red", "ns")
    assert len(server.seen) == 4
    await client.close()


async def test_an_exec_plugin_gives_the_token(tmp_path: Path, server: Server) -> None:
    plugin = tmp_path / "plugin"
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "right"},
    }
    plugin.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(credential)}\nEND\n")
    plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
    user = {
        "exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin), "interactiveMode": "Never"}
    }
    client = await KubeClient.connect(kubeconfig(tmp_path / "k", server.url, user), user_agent="vmnet")
    await client.get(PODS, "red", "ns")
    await client.close()


async def test_no_configuration_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(KubeError, match="missing"):
        await KubeClient.connect(tmp_path / "missing", user_agent="vmnet")
    (tmp_path / "odd").write_text("a: [")
    with pytest.raises(KubeError, match="odd"):
        await KubeClient.connect(tmp_path / "odd", user_agent="vmnet")


async def test_a_refused_connection_is_unavailable() -> None:
    client = KubeClient("http://127.0.0.1:1", user_agent="vmnet")
    with pytest.raises(Unavailable, match="GET /api/v1/pods"):
        await client.list(PODS)
    await client.close()
