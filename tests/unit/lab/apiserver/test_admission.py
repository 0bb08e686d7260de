"""Admission webhooks against what was recorded from the real server."""

import base64
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from vmnet.lab.apiserver.certificates import prepare
from vmnet.lab.apiserver.testing import running_server

Answer = Callable[[dict[str, Any]], dict[str, Any] | Awaitable[dict[str, Any]]]
MAPS = "/api/v1/namespaces/adm/configmaps"
TOUCH = [
    {"op": "add", "path": "/metadata/annotations", "value": {}},
    {"op": "add", "path": "/metadata/annotations/lab.example.test~1touched", "value": "CREATE"},
]


def patched(operations: Any) -> dict[str, Any]:
    return {
        "allowed": True,
        "patchType": "JSONPatch",
        "patch": base64.b64encode(json.dumps(operations).encode()).decode(),
        "warnings": ["touched by the lab webhook"],
    }


class Cluster:
    """The API server, and a webhook server that answers as the test says."""

    def __init__(self, session: aiohttp.ClientSession, url: str, token: str, hook: str, bundle: str) -> None:
        self.session, self.url, self.token, self.hook, self.bundle = session, url, token, hook, bundle
        self.asked: list[dict[str, Any]] = []
        self.answer: Answer = lambda request: {"allowed": True}

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any], str]:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": kind, "User-Agent": "recorder"}
        data = json.dumps(body).encode() if body is not None else None
        async with self.session.request(method, self.url + path, data=data, headers=headers, ssl=False) as answer:
            return answer.status, await answer.json(), answer.headers.get("Warning", "")

    async def configure(self, kind: str = "Mutating", **more: Any) -> None:
        hook = {
            "name": "hook.lab.example.test",
            "clientConfig": {"url": self.hook, "caBundle": self.bundle},
            "rules": [
                {
                    "apiGroups": [""],
                    "apiVersions": ["v1"],
                    "operations": ["CREATE", "UPDATE", "DELETE"],
                    "resources": ["configmaps"],
                }
            ],
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "adm"}},
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "timeoutSeconds": 2,
            **more,
        }
        group = "admissionregistration.k8s.io/v1"
        body = {"apiVersion": group, "kind": f"{kind}WebhookConfiguration", "metadata": {"name": "lab"}}
        path = f"/apis/{group}/{kind.lower()}webhookconfigurations"
        status, found, _ = await self.call("POST", path, {**body, "webhooks": [hook]})
        assert status == 201, found

    async def create(self, name: str, path: str = MAPS, **more: Any) -> tuple[int, dict[str, Any], str]:
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, **more}, "data": {"a": "1"}}
        return await self.call("POST", path, body)


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Cluster]:
    made: list[Cluster] = []

    async def review(request: web.Request) -> web.Response:
        asked = await request.json()
        made[0].asked.append(asked["request"])
        answer = made[0].answer(asked["request"])
        if not isinstance(answer, dict):
            answer = await answer
        body = {"uid": asked["request"]["uid"], **answer}
        return web.json_response({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": body})

    app = web.Application()
    app.router.add_post("/hook", review)
    runner = web.AppRunner(app)
    await runner.setup()
    certificates = prepare(directory / "hook", ["127.0.0.1"])
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=certificates.context())
    await site.start()
    port = runner.addresses[0][1]
    bundle = base64.b64encode(certificates.authority.read_bytes()).decode()
    try:
        async with running_server(directory) as server, aiohttp.ClientSession() as session:
            hook = f"https://127.0.0.1:{port}/hook"
            made.append(Cluster(session, server.url, server.tokens.admin, hook, bundle))
            for name in ("adm", "other"):
                await made[0].call("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
            yield made[0]
    finally:
        await runner.cleanup()


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path) as made:
        yield made


async def test_a_webhook_changes_what_is_created_and_owns_nothing(cluster: Cluster) -> None:
    cluster.answer = lambda request: patched(TOUCH)
    await cluster.configure()
    status, made, warning = await cluster.create("w1")
    assert (status, warning) == (201, '299 - "touched by the lab webhook"')
    assert made["metadata"]["annotations"] == {"lab.example.test/touched": "CREATE"}
    fields = made["metadata"]["managedFields"]
    assert [entry["fieldsV1"] for entry in fields] == [{"f:data": {".": {}, "f:a": {}}}]
    asked = cluster.asked[0]
    assert set(asked) == {
        *("uid", "kind", "resource", "requestKind", "requestResource", "name", "namespace", "operation", "userInfo"),
        *("object", "oldObject", "dryRun", "options"),
    }
    assert (asked["operation"], asked["oldObject"], asked["dryRun"]) == ("CREATE", None, False)
    assert asked["options"] == {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"}
    assert not {"uid", "creationTimestamp"} & set(asked["object"]["metadata"])
    _, stored, _ = await cluster.call("GET", f"{MAPS}/w1")
    assert stored == made


async def test_a_dry_run_is_sent_too_and_changes_nothing(cluster: Cluster) -> None:
    cluster.answer = lambda request: patched(TOUCH)
    await cluster.configure()
    status, made, _ = await cluster.create("w2", f"{MAPS}?dryRun=All")
    assert status == 201
    assert made["metadata"]["annotations"] == {"lab.example.test/touched": "CREATE"}
    assert cluster.asked[0]["dryRun"] is True
    assert (await cluster.call("GET", f"{MAPS}/w2"))[0] == 404


async def test_an_update_shows_both_objects(cluster: Cluster) -> None:
    await cluster.create("w1")
    cluster.answer = lambda request: patched(TOUCH)
    await cluster.configure()
    status, made, _ = await cluster.call("PATCH", f"{MAPS}/w1", {"data": {"a": "2"}})
    assert (status, made["data"]) == (200, {"a": "2"})
    assert "lab.example.test/touched" in made["metadata"]["annotations"]
    asked = cluster.asked[0]
    assert (asked["operation"], asked["object"]["data"], asked["oldObject"]["data"]) == (
        "UPDATE",
        {"a": "2"},
        {"a": "1"},
    )


async def test_a_deletion_cannot_be_changed(cluster: Cluster) -> None:
    await cluster.create("w3")
    cluster.answer = lambda request: patched(TOUCH)
    await cluster.configure()
    status, found, _ = await cluster.call("DELETE", f"{MAPS}/w3")
    text = 'admission webhook "hook.lab.example.test" attempted to modify the object, which is not supported for this '
    assert (status, found["message"]) == (500, f"Internal error occurred: {text}operation")
    assert cluster.asked[0]["object"] is None
    assert cluster.asked[0]["oldObject"]["data"] == {"a": "1"}


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        (
            {"allowed": False, "status": {"message": "the lab says no", "code": 418, "reason": "Teapot"}},
            418,
            'admission webhook "hook.lab.example.test" denied the request: the lab says no',
        ),
        ({"allowed": False}, 400, 'admission webhook "hook.lab.example.test" denied the request without explanation'),
        (
            patched([{"op": "replace", "path": "/data/none/x", "value": "1"}]),
            500,
            "Internal error occurred: replace operation does not apply: doc is missing path: /data/none/x: "
            "missing value",
        ),
    ],
)
async def test_what_is_not_allowed(cluster: Cluster, answer: Any, code: int, message: str) -> None:
    cluster.answer = lambda request: answer
    await cluster.configure()
    status, found, _ = await cluster.create("d1")
    assert (status, found["message"]) == (code, message)
    assert (await cluster.call("GET", f"{MAPS}/d1"))[0] == 404


async def test_a_validating_webhook_sees_what_the_mutating_ones_made(cluster: Cluster) -> None:
    cluster.answer = lambda request: patched(TOUCH) if len(cluster.asked) == 1 else {"allowed": False}
    await cluster.configure()
    await cluster.configure("Validating")
    status, _, _ = await cluster.create("v1")
    assert status == 400
    last = cluster.asked[-1]["object"]["metadata"]
    assert last["annotations"] == {"lab.example.test/touched": "CREATE"}
    assert "uid" in last


async def test_only_what_the_selectors_select_is_asked_about(cluster: Cluster) -> None:
    await cluster.configure(objectSelector={"matchLabels": {"app": "yes"}})
    await cluster.create("other", "/api/v1/namespaces/other/configmaps", labels={"app": "yes"})
    await cluster.create("unlabelled")
    assert not cluster.asked
    await cluster.create("labelled", labels={"app": "yes"})
    assert [item["name"] for item in cluster.asked] == ["labelled"]


@pytest.mark.parametrize(("policy", "code"), [("Fail", 500), ("Ignore", 201)])
async def test_a_webhook_that_is_away(cluster: Cluster, policy: str, code: int) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        url = f"https://127.0.0.1:{port}/x"
        config = {"url": url, "caBundle": cluster.bundle}
        await cluster.configure(clientConfig=config, failurePolicy=policy)
        status, found, _ = await cluster.create("away")
    assert status == code
    if code == 500:
        assert found["message"] == (
            'Internal error occurred: failed calling webhook "hook.lab.example.test": failed to call webhook: '
            f'Post "{url}?timeout=2s": dial tcp 127.0.0.1:{port}: connect: connection refused'
        )


@pytest.mark.parametrize(
    ("conditions", "policy", "asked", "code"),
    [
        (['object.metadata.name == "met"'], "Fail", True, 201),
        (['object.metadata.name == "other"'], "Fail", False, 201),
        (['object.metadata.name == "met"', 'request.operation == "UPDATE"'], "Fail", False, 201),
        (['object.data.missing == "x"', "false"], "Fail", False, 201),
        (['object.data.missing == "x"', "true"], "Fail", False, 500),
        (['object.data.missing == "x"', "true"], "Ignore", False, 201),
        (["oldObject == null"], "Fail", True, 201),
    ],
)
async def test_a_webhook_is_asked_about_what_meets_its_conditions(
    cluster: Cluster, conditions: list[str], policy: str, asked: bool, code: int
) -> None:
    named = [{"name": f"c{number}", "expression": text} for number, text in enumerate(conditions)]
    await cluster.configure(matchConditions=named, failurePolicy=policy)
    status, found, _ = await cluster.create("met")
    assert status == code, found
    assert [item["name"] for item in cluster.asked] == (["met"] if asked else [])
    if code == 500:
        assert "failed to evaluate match conditions" in found["message"]


async def test_a_condition_that_does_not_compile_is_refused(cluster: Cluster) -> None:
    group = "admissionregistration.k8s.io/v1"
    hook = {
        "name": "hook.lab.example.test",
        "clientConfig": {"url": cluster.hook},
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "matchConditions": [{"name": "wrong", "expression": "params.x == 1"}],
    }
    body = {"apiVersion": group, "kind": "ValidatingWebhookConfiguration", "metadata": {"name": "wrong"}}
    path = f"/apis/{group}/validatingwebhookconfigurations"
    status, found, _ = await cluster.call("POST", path, {**body, "webhooks": [hook]})
    assert status == 422
    assert found["details"]["causes"][0]["field"] == "webhooks[0].matchConditions[0].expression"


async def test_a_certificate_of_somebody_else_is_not_believed(cluster: Cluster, tmp_path: Path) -> None:
    other = prepare(tmp_path / "other", ["127.0.0.1"])
    bundle = base64.b64encode(other.authority.read_bytes()).decode()
    await cluster.configure(clientConfig={"url": cluster.hook, "caBundle": bundle})
    status, found, _ = await cluster.create("stranger")
    assert status == 500
    assert "failed calling webhook" in found["message"]
    assert not cluster.asked
