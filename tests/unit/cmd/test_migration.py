import asyncio
import json
from typing import Any

import pytest

from vmnet.cmd import migration
from vmnet.kube.api import VMIS
from vmnet.kube.fake import FakeKube
from vmnet.model import names

RECORD: dict[str, Any] = {
    "uid": "m1",
    "outcome": "succeeded",
    "reason": "",
    "mode": "PreCopy",
    "network": "cluster_udn_tenant",
    "from": {"node": "n1", "pod": "virt-launcher-blue-a"},
    "to": {"node": "n2", "pod": "virt-launcher-blue-b"},
    "addresses": ["192.168.0.5", "fd20::5"],
    "mac": "0a:58:c0:a8:00:05",
    "started": "2026-01-02T03:04:05Z",
    "ended": "2026-01-02T03:04:09Z",
    "pauseSeconds": 0.0009,
    "blackoutSeconds": 0.00123,
    "deliverySeconds": 0.0002,
    "cutOver": {
        "key": "frame",
        "openedAt": 10.0,
        "annotationAt": 10.25,
        "announcements": 12,
        "lastFrameError": 0.0003,
    },
}
ALONG = {"way": "streamed", "carried": 28, "handOverSeconds": 0.0123}


async def machine(kube: FakeKube, name: str, record: dict[str, Any] | None) -> None:
    annotations = {names.MIGRATION_RECORD_ANNOTATION: json.dumps(record)} if record else {}
    body = {"metadata": {"namespace": "blue", "name": name, "uid": name, "annotations": annotations}, "spec": {}}
    await kube.create(VMIS, body, "blue")


@pytest.fixture
async def kube() -> FakeKube:
    found = FakeKube()
    await machine(found, "moved", RECORD)
    await machine(found, "stayed", None)
    return found


async def test_the_list_has_a_line_for_each_machine_that_was_migrated(
    kube: FakeKube, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await migration.list_all(kube, None, as_json=False) == 0
    headings, line = capsys.readouterr().out.splitlines()
    assert headings.split() == list(migration.HEADINGS)
    assert line.split() == ["blue", "moved", "succeeded", "n1", "n2", "frame", "1.2", "ms", "2026-01-02T03:04:09Z"]
    assert await migration.list_all(kube, "blue", as_json=True) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found == {"namespace": "blue", "name": "moved", **RECORD}


async def test_an_empty_list_says_so_and_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert await migration.list_all(FakeKube(), "red", as_json=False) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "No machine in namespace red has a record of a migration.\n")
    assert await migration.list_all(FakeKube(), "red", as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == []


async def test_one_machine_s_record_is_shown_whole(kube: FakeKube, capsys: pytest.CaptureFixture[str]) -> None:
    assert await migration.show(kube, "blue", "moved", as_json=False) == 0
    found = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert found["to"].strip() == "n2 (pod virt-launcher-blue-b)"
    assert found["annotation after opening"].strip() == "250.0 ms"
    assert found["addresses"].strip() == "192.168.0.5, fd20::5"


@pytest.mark.parametrize(("name", "says"), [("nobody", "there is no"), ("stayed", "has not been migrated")])
async def test_what_is_not_there_is_an_error_with_the_next_step(
    kube: FakeKube, capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    assert await migration.show(kube, "blue", name, as_json=False) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["{", "[]", '{"cutOver": 3, "from": null, "uid": "x"}'])
async def test_a_record_that_cannot_be_read_breaks_nothing(
    kube: FakeKube, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    patch = {"metadata": {"annotations": {names.MIGRATION_RECORD_ANNOTATION: broken}}}
    await kube.patch(VMIS, "moved", patch, "blue")
    assert await migration.list_all(kube, None, as_json=False) == 0
    assert await migration.show(kube, "blue", "moved", as_json=False) == (0 if "uid" in broken else 1)
    capsys.readouterr()


async def test_watching_tells_of_what_ends_from_now_on(kube: FakeKube, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[dict[str, Any]] = []
    async with asyncio.timeout(30):
        task = asyncio.create_task(migration.watch(kube, None, as_json=True))
        number = 1
        while len(lines) < 2:
            # The watch may not have begun yet: go on until it has told of two.
            number += 1
            text = json.dumps({**RECORD, "uid": f"m{number}"})
            patch = {"metadata": {"annotations": {names.MIGRATION_RECORD_ANNOTATION: text}}}
            await kube.patch(VMIS, "moved", patch, "blue")
            await asyncio.sleep(0.01)
            lines += [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    told = [line["uid"] for line in lines]
    assert "m1" not in told, "what had ended before is not news"
    assert told == sorted(set(told), key=lambda uid: int(uid[1:]))


@pytest.mark.parametrize(
    ("along", "line"),
    [
        (ALONG, "28 (streamed) in 12.3 ms"),
        (ALONG | {"way": "unanswered", "carried": 3, "handOverSeconds": None}, "3 (unanswered)"),
        (ALONG | {"way": "nobody"}, "-"),
        (None, "-"),
    ],
)
async def test_what_came_along_is_told(
    kube: FakeKube, capsys: pytest.CaptureFixture[str], along: dict[str, Any] | None, line: str
) -> None:
    await machine(kube, "other", RECORD | {"cutOver": RECORD["cutOver"] | {"connections": along}})
    assert await migration.show(kube, "blue", "other", as_json=False) == 0
    found = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert found["connections"].strip() == line
