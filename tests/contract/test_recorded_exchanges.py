"""The embedded API answers as the real server did: recorded exchanges are sent again and the answers compared.

The slices in ``tests/data/kubernetes`` were recorded from kube-apiserver 1.36 (fields that do not matter here left
out). Identities, times and resourceVersions differ from run to run; they are mapped or masked.
"""

import asyncio
import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from vmnet.lab.apiserver.server import ApiServer
from vmnet.lab.apiserver.testing import running_server

DATA = Path(__file__).parents[1] / "data" / "kubernetes"

_UID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_MASKED = ("uid", "resourceVersion", "creationTimestamp", "deletionTimestamp", "lastTransitionTime", "continue")

_AGE = re.compile(r"^\d+[smhd](\d+[sm])?$")
_ALLOCATED = re.compile(r"10\.96\.[1-9]\d*\.\d+|3[0-2]\d{3}")

# Lines whose difference is known and meant, by slice. Each says why.
KNOWN: dict[str, dict[int, str]] = {
    "concurrency_deletion": {
        25: "a generated name",
        26: "a generated name",
        85: "the collector works at once; the recorded one took a while",
        93: "the collector works at once; the recorded one took a while",
        116: "the namespace is emptied at once; the recorded controller took a while",
    },
    "services": {34: "no IPAddress objects are kept"},
    "watch": {
        41: "Go shows empty structs in a bookmark",
        51: "the row of a bookmark has no cells",
        66: "the decoding error is worded by another library",
    },
    "custom_resources": {
        4: "a Go structure as text",
        15: "the definition is established at once; the recorded one took a while",
        16: "the definition is established at once; the recorded one took a while",
        31: "the definition is gone at once; the recorded one took a while",
        32: "the definition is gone at once; the recorded one took a while",
        33: "the definition is gone at once; the recorded one took a while",
        36: "a hash of the storage's own",
        62: "3.0 is taken for an integer",
        70: "errors of two fields stand in another order",
        95: "rules are checked although the name is missing",
        97: "the other version's field is not known, so it is not warned of",
        110: "a plain y is no truth value to this YAML reader",
        242: "the definition is gone at once; the recorded one took a while",
        243: "the definition is gone at once; the recorded one took a while",
        244: "the definition is gone at once; the recorded one took a while",
    },
    "errors": {
        72: "YAML is the same, quoted in another way",
        85: "YAML is the same, quoted in another way",
        108: "the recorder sent the word null; here the body is empty",
        109: "the recorder sent a quoted string; here it is a bare one",
        125: "conversion errors name Go types",
        214: "answers that are not kept have no field owners",
        219: "answers that are not kept have no field owners",
        221: "answers that are not kept have no field owners",
        222: "a token",
        223: "a token",
    },
}


# Lines before which the recorder had the storage forget its history.
COMPACTED: dict[str, int] = {"watch": 85}


class Mapping:
    """What the recorded identities are called in this run."""

    def __init__(self) -> None:
        self.uids: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.names: dict[str, str] = {}

    def learn(self, recorded: Any, found: Any) -> None:
        """Pair up what two answers to the same request say."""
        if isinstance(recorded, dict) and isinstance(found, dict):
            for key, value in recorded.items():
                if key not in found:
                    continue
                if key == "uid" and isinstance(value, str):
                    self.uids.setdefault(value, found[key])
                elif key == "resourceVersion" and isinstance(value, str):
                    self.versions[value] = found[key]
                elif key == "name" and recorded.get("generateName") and value != found[key]:
                    self.names[value] = found[key]
                else:
                    self.learn(value, found[key])
        elif isinstance(recorded, list) and isinstance(found, list):
            for one, other in zip(recorded, found, strict=False):
                self.learn(one, other)

    def text(self, text: str) -> str:
        """A recorded text as this run would write it."""
        for recorded, found in (*self.uids.items(), *self.names.items()):
            text = text.replace(recorded, found)
        return text

    def body(self, value: Any) -> Any:
        """A recorded request body as this run would send it."""
        if isinstance(value, dict):
            if value.get("path") == "/metadata/resourceVersion":
                return {**value, "value": self.versions.get(value["value"], value["value"])}
            return {
                self.text(key): self.versions.get(item, item)
                if key == "resourceVersion" and isinstance(item, str)
                else self.body(item)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.body(item) for item in value]
        return self.text(value) if isinstance(value, str) else value

    def path(self, path: str) -> str:
        """A recorded path as this run would ask for."""

        def version(match: re.Match[str]) -> str:
            return f"resourceVersion={self.versions.get(match[1], match[1])}"

        def token(match: re.Match[str]) -> str:
            try:
                content = json.loads(base64.urlsafe_b64decode(match[1] + "=" * (-len(match[1]) % 4)))
            except ValueError:
                return match[0]
            content["rv"] = int(self.versions.get(str(content["rv"]), content["rv"]))
            encoded = base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")
            return f"continue={encoded}"

        path = re.sub(r"resourceVersion=(\d+)", version, self.text(path))
        return re.sub(r"continue=([\w-]+)", token, path)


def masked(value: Any) -> Any:
    """An answer without what differs from run to run."""
    if isinstance(value, dict):
        found = {}
        for key, item in value.items():
            if key == "time" and "fieldsType" in value:
                continue
            if key in _MASKED and isinstance(item, str):
                item = "*"
            shown = masked(item)
            if key in ("clusterIP", "clusterIPs", "nodePort", "healthCheckNodePort"):
                shown = _ALLOCATED.sub("ALLOCATED", json.dumps(shown))
            if key == "description" and "priority" in value:
                shown = "*"
            if key == "cells":
                shown = [_AGE.sub("AGE", cell) if isinstance(cell, str) else cell for cell in shown]
            if key in ("volumes", "volumeMounts") and not shown:
                continue
            if key == "name" and value.get("generateName"):
                shown = "*"
            found[_UID.sub("UID", key)] = shown
        return found
    if isinstance(value, list):
        if value and isinstance(value[0], dict) and "fieldsType" in value[0]:
            # Entries of the same second are ordered by name, so their order depends on how fast requests follow.
            value = sorted(value, key=lambda item: (item["manager"], item["operation"], item.get("subresource", "")))
        # The volume with a service account's token is not mounted in the lab's pods.
        return [masked(item) for item in value if not _is_token_volume(item)]
    if isinstance(value, str):
        text = _TIME.sub("TIME", _UID.sub("UID", value))
        text = re.sub(r"in record \(\d+\)", "in record (N)", text)
        text = re.sub(r"current: \d+", "current: N", text)
        text = re.sub(r"resource version: (\d+) \(\d+\)", r"resource version: \1 (N)", text)
        # The patched object is shown in an order of fields that is the real server's own.
        return re.sub(
            r'Invalid value: "\{.*\}": (?=json|strict|no kind|unable|parsing)', "Invalid value: OBJECT: ", text
        )
    return value


def _is_token_volume(item: Any) -> bool:
    return isinstance(item, dict) and str(item.get("name", "")).startswith("kube-api-access-")


def differences(recorded: Any, found: Any, path: str = "") -> Iterator[str]:
    """Where two answers differ."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        for key in sorted(recorded.keys() | found.keys()):
            if key not in found:
                yield f"{path}.{key}: missing, was {json.dumps(recorded[key])[:300]}"
            elif key not in recorded:
                yield f"{path}.{key}: not recorded, is {json.dumps(found[key])[:300]}"
            else:
                yield from differences(recorded[key], found[key], f"{path}.{key}")
    elif isinstance(recorded, list) and isinstance(found, list):
        if len(recorded) != len(found):
            yield f"{path}: {len(recorded)} items, are {len(found)}: {json.dumps(found)[:300]}"
        for position, (one, other) in enumerate(zip(recorded, found, strict=False)):
            yield from differences(one, other, f"{path}[{position}]")
    elif recorded != found:
        yield f"{path}: was {json.dumps(recorded)[:500]}, is {json.dumps(found)[:500]}"


def by_object(events: list[Any]) -> dict[str, list[Any]]:
    """Watch events of each object; what happens to two of them has no order that would be promised."""
    found: dict[str, list[Any]] = {}
    for event in events:
        rows = event["object"].get("rows") or [event]
        metadata = (rows[0]["object"] or {}).get("metadata", {})
        found.setdefault(metadata.get("generateName") or metadata.get("name") or event["type"], []).append(event)
    return found


class Replay:
    """Sends one slice to one server."""

    def __init__(self, server: ApiServer, session: aiohttp.ClientSession, compacted: int | None) -> None:
        self.server = server
        self.compacted = compacted
        self.session = session
        self.mapping = Mapping()
        self.found: list[tuple[int, str]] = []
        self.watches: list[tuple[float, asyncio.Task[None]]] = []

    def note(self, line: int, text: str) -> None:
        self.found.append((line, text))

    async def send(self, method: str, path: str, body: Any, headers: dict[str, str]) -> aiohttp.ClientResponse:
        data = None
        if isinstance(body, str):
            data = body.encode()
        elif body is not None:
            data = json.dumps(self.mapping.body(body)).encode()
        url = URL(self.server.url + self.mapping.path(path), encoded=True)
        headers = {"Authorization": f"Bearer {self.server.tokens.admin}", "User-Agent": "Python/3", **headers}
        return await self.session.request(
            method, url, data=data, headers=headers, skip_auto_headers=["Content-Type", "Accept"]
        )

    async def run(self, exchanges: list[dict[str, Any]]) -> None:
        for position, exchange in enumerate(exchanges):
            for end, task in self.watches:
                if end <= exchange["t"]:
                    await task
            if exchange["line"] == self.compacted:
                self.server.store.compact()
            if isinstance(exchange["response_body"], list):
                task = asyncio.ensure_future(self.watch(exchange))
                await asyncio.sleep(0.05)
                following = exchanges[position + 1]["t"] if position + 1 < len(exchanges) else exchange["t_end"]
                if following >= exchange["t_end"]:
                    await task
                else:
                    self.watches.append((exchange["t_end"], task))
            elif exchange["cmd"] != "raw: until gone":
                await self.exchange(exchange)
        for _, task in self.watches:
            await task

    async def exchange(self, exchange: dict[str, Any]) -> None:
        line, headers = exchange["line"], dict(exchange["request_headers"])
        body, recorded = exchange["request_body"], exchange["response_body"]
        made = re.match(r"kubectl create ns (\S+)", exchange["cmd"])
        if made:
            # What kubectl sent was protobuf, which has tests of its own.
            body, recorded = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": made[1]}}, None
            headers = {"Content-Type": "application/json", "User-Agent": "kubectl-create"}
        elif exchange["cmd"].startswith("kubectl create cm body"):
            body, recorded = {"kind": "ConfigMap", "metadata": {"name": "body"}, "data": {"a": "b"}}, None
            headers = {"Content-Type": "application/json", "User-Agent": "kubectl-create"}
        if "protobuf" in headers.get("Accept", ""):
            headers["Accept"], recorded = "application/json", None
        async with await self.send(exchange["method"], exchange["path"], body, headers) as answer:
            content = await answer.read()
            try:
                found = json.loads(content)
            except ValueError:
                found = content.decode()
            if answer.status != exchange["status"]:
                self.note(line, f"status was {exchange['status']}, is {answer.status}: {content.decode()[:600]}")
            elif recorded is not None and "omitted" not in recorded:
                self.mapping.learn(recorded, found)
                for text in differences(masked(recorded), masked(found)):
                    self.note(line, text)
            wanted = exchange["response_headers"].get("Warning", [])
            warnings = [wanted] if isinstance(wanted, str) else wanted
            if warnings != answer.headers.getall("Warning", []):
                self.note(line, f"warnings were {warnings}, are {answer.headers.getall('Warning', [])}")
        if made:
            await self.furnish(made[1])

    async def furnish(self, namespace: str) -> None:
        """Make what the real cluster's controllers make in every namespace."""
        text = (
            "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as "
            "the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of "
            "Kubernetes clusters."
        )
        annotations = {"kubernetes.io/description": text}
        certificate = {"metadata": {"name": "kube-root-ca.crt", "annotations": annotations}, "data": {"ca.crt": ""}}
        headers = {"Content-Type": "application/json", "User-Agent": "kube-controller-manager"}
        for plural, body in (
            ("configmaps", certificate),
            ("serviceaccounts", {"metadata": {"name": "default"}}),
        ):
            async with await self.send("POST", f"/api/v1/namespaces/{namespace}/{plural}", body, headers) as answer:
                assert answer.status == 201

    async def watch(self, exchange: dict[str, Any]) -> None:
        line, recorded = exchange["line"], exchange["response_body"]
        path = re.sub(r"timeoutSeconds=\d+", "timeoutSeconds=1", exchange["path"])
        if "timeoutSeconds" in exchange["path"] and exchange["t_end"] - exchange["t"] > 3:
            path = exchange["path"]
        found: list[Any] = []
        async with await self.send("GET", path, None, dict(exchange["request_headers"])) as answer:
            if answer.status != exchange["status"]:
                self.note(line, f"status was {exchange['status']}, is {answer.status}")
                return
            try:
                async with asyncio.timeout(8 if recorded else 0.3):
                    while len(found) < len(recorded) or not recorded:
                        content = await answer.content.readline()
                        if not content:
                            break
                        found.append(json.loads(content))
            except TimeoutError:
                pass
        if len(found) == len(recorded):
            self.mapping.learn(by_object(recorded), by_object(found))
        for text in differences(by_object(masked(recorded)), by_object(masked(found))):
            self.note(line, f"watch: {text}")


@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*.jsonl")))
async def test_answers_are_those_of_the_real_server(name: str, tmp_path: Path) -> None:
    exchanges = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    async with running_server(tmp_path) as server:
        connector = aiohttp.TCPConnector(ssl=False, limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            replay = Replay(server, session, COMPACTED.get(name))
            await replay.run(exchanges)
    known = KNOWN.get(name, {})
    unexpected = [f"{name}:{line} {text}" for line, text in replay.found if line not in known]
    assert not unexpected, "\n".join(unexpected)
