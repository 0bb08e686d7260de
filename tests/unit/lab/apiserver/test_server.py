"""The server as a process and over HTTP: listeners, watches, paging and clients that go away."""

import asyncio
import json
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from vmnet.lab.apiserver.server import ApiServer
from vmnet.lab.apiserver.testing import running_server


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ApiServer]:
    async with running_server(tmp_path) as found:
        yield found


@pytest.fixture
async def session(server: ApiServer) -> AsyncIterator[aiohttp.ClientSession]:
    context = ssl.create_default_context(cafile=server.certificates.authority)
    connector = aiohttp.TCPConnector(ssl=context, limit=0)
    headers = {"Authorization": f"Bearer {server.tokens.admin}"}
    async with aiohttp.ClientSession(server.url, connector=connector, headers=headers) as found:
        yield found


async def create(session: aiohttp.ClientSession, name: str) -> None:
    body = {"metadata": {"name": name}}
    async with session.post("/api/v1/namespaces/default/configmaps", json=body) as answer:
        assert answer.status == 201


async def test_the_process_serves_an_inherited_socket_and_says_when(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        reading, writing = os.pipe()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "vmnet.lab.apiserver",
            *("--inherit-fd", str(listener.fileno()), "--certificates", str(tmp_path / "pki")),
            *("--kubeconfig", str(tmp_path / "config"), "--service-cidr", "10.97.0.0/16,fd00:97::/112"),
            *("--ready-fd", str(writing)),
            pass_fds=(listener.fileno(), writing),
        )
    os.close(writing)
    try:
        loop = asyncio.get_running_loop()
        with os.fdopen(reading, "rb") as pipe:
            assert await asyncio.wait_for(loop.run_in_executor(None, pipe.readline), 60) == b"ready\n"
        context = ssl.create_default_context(cafile=tmp_path / "pki" / "ca.crt")
        token = (tmp_path / "pki" / "tokens.csv").read_text().split(",")[0]
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
            url = f"https://127.0.0.1:{port}/api/v1/namespaces/default/services/kubernetes"
            async with session.get(url, ssl=context) as answer:
                assert (await answer.json())["spec"]["clusterIP"] == "10.97.0.1"
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0


async def test_standard_objects_exist(server: ApiServer, session: aiohttp.ClientSession) -> None:
    async with session.get("/api/v1/namespaces") as answer:
        names = {item["metadata"]["name"] for item in (await answer.json())["items"]}
    assert names == {"default", "kube-system", "kube-public", "kube-node-lease"}


async def test_pages_are_of_one_moment(session: aiohttp.ClientSession) -> None:
    path = "/api/v1/namespaces/default/configmaps"
    for number in range(5):
        await create(session, f"c{number}")
    async with session.get(path, params={"limit": "2"}) as answer:
        first = await answer.json()
    assert first["metadata"]["remainingItemCount"] == 3
    await create(session, "c1a")
    names = [item["metadata"]["name"] for item in first["items"]]
    token = first["metadata"]["continue"]
    while token:
        async with session.get(path, params={"limit": "2", "continue": token}) as answer:
            page = await answer.json()
        assert page["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
        names += [item["metadata"]["name"] for item in page["items"]]
        token = page["metadata"].get("continue")
    assert names == ["c0", "c1", "c2", "c3", "c4"]


async def test_a_watch_list_ends_its_start_with_a_bookmark(session: aiohttp.ClientSession) -> None:
    await create(session, "before")
    query = {
        "watch": "1",
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
        "allowWatchBookmarks": "true",
    }
    async with session.get("/api/v1/namespaces/default/configmaps", params=query) as answer:
        first = json.loads(await answer.content.readline())
        mark = json.loads(await answer.content.readline())
        await create(session, "after")
        last = json.loads(await answer.content.readline())
    assert (first["type"], first["object"]["metadata"]["name"]) == ("ADDED", "before")
    assert mark["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
    assert (last["type"], last["object"]["metadata"]["name"]) == ("ADDED", "after")


async def test_a_watch_ends_when_asked_and_replays_what_was_missed(session: aiohttp.ClientSession) -> None:
    async with session.get("/api/v1/namespaces/default/configmaps") as answer:
        version = (await answer.json())["metadata"]["resourceVersion"]
    await create(session, "missed")
    query = {"watch": "1", "resourceVersion": version, "timeoutSeconds": "1"}
    async with session.get("/api/v1/namespaces/default/configmaps", params=query) as answer:
        lines = (await asyncio.wait_for(answer.read(), 10)).splitlines()
    assert [json.loads(line)["object"]["metadata"]["name"] for line in lines] == ["missed"]


async def test_watchers_that_go_away_are_forgotten(server: ApiServer, session: aiohttp.ClientSession) -> None:
    listeners = server.store.collection(("", "configmaps")).listeners
    answer = await session.get("/api/v1/configmaps", params={"watch": "1"})
    async with asyncio.timeout(10):
        while not listeners:
            await asyncio.sleep(0.01)
        answer.close()
        while listeners:
            await asyncio.sleep(0.01)


async def test_concurrent_writers_lose_to_the_first(session: aiohttp.ClientSession) -> None:
    await create(session, "one")
    path = "/api/v1/namespaces/default/configmaps/one"
    async with session.get(path) as answer:
        body = await answer.json()

    async def put(value: str) -> int:
        async with session.put(path, json={**body, "data": {"racer": value}}) as answer:
            return answer.status

    assert sorted(await asyncio.gather(*(put(str(number)) for number in range(4)))) == [200, 409, 409, 409]
