"""Tables, held to those of a real API server: the recorded rows beside the objects they show."""

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from vmnet.lab.apiserver import tables
from vmnet.lab.apiserver.resources import Registry, ResourceInfo

DATA = Path(__file__).parents[3] / "data" / "kubernetes" / "schema"
RECORDED = json.loads(gzip.decompress((DATA / "tables.json.gz").read_bytes()))["tables"]
DEFINITION = json.loads(gzip.decompress((DATA / "definitions.json.gz").read_bytes()))["definition"]
TIMES = {"Age", "Last Seen", "First Seen", "Since", "Duration"}
NOW = datetime(2026, 11, 23, 7, 30, tzinfo=UTC)


def _info(table: dict[str, Any]) -> tuple[ResourceInfo, dict[str, Any] | None]:
    known = Registry().lookup(table["group"], table["version"], table["plural"])
    if known is not None:
        return known, None
    versions = {version["name"]: version for version in DEFINITION["spec"]["versions"]}
    plain = {"name": "v1"}
    kind = table["plural"].removesuffix("s").capitalize()
    info = ResourceInfo(table["group"], table["version"], table["plural"], kind.lower(), kind)
    return info, versions[table["version"]] if table["plural"] == "gadgets" else plain


def _timeless(columns: list[dict[str, Any]], cells: list[Any]) -> list[Any]:
    return [cell for column, cell in zip(columns, cells, strict=True) if column["name"] not in TIMES]


@pytest.mark.parametrize("table", RECORDED, ids=lambda table: f"{table['at']} {table['plural']}")
def test_as_recorded(table: dict[str, Any]) -> None:
    info, definition = _info(table)
    objects = [row["object"] for row in table["rows"]]
    found = tables.table(info, definition, objects, {"resourceVersion": "1"}, now=NOW)
    columns = [{key: column[key] for key in table["columns"][0]} for column in found["columnDefinitions"]]
    assert columns == table["columns"]
    for row, recorded in zip(found["rows"], table["rows"], strict=True):
        assert _timeless(columns, row["cells"]) == _timeless(columns, recorded["cells"])
        assert row.get("conditions") == recorded["conditions"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "<invalid>"),
        (-0.5, "0s"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (125, "2m5s"),
        (600, "10m"),
        (3 * 3600, "3h"),
        (3 * 3600 + 60, "3h1m"),
        (9 * 3600 + 60, "9h"),
        (50 * 3600, "2d2h"),
        (9 * 86400, "9d"),
        (800 * 86400, "2y70d"),
        (9 * 365 * 86400, "9y"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert tables.human_duration(seconds) == text


def _status(**status: Any) -> tuple[str, str, int]:
    spec = status.pop("spec", {"containers": [{"name": "a"}, {"name": "b"}]})
    metadata = status.pop("metadata", {"name": "p"})
    return tables.pod_status({"metadata": metadata, "spec": spec, "status": status})[:3]


def _container(**state: Any) -> dict[str, Any]:
    more = {key: state.pop(key) for key in ("ready", "restartCount", "name", "started") if key in state}
    return {"name": "a", "state": state, **more}


def test_pods_that_are_in_trouble() -> None:
    waiting = _container(waiting={"reason": "CrashLoopBackOff"}, restartCount=4)
    running = _container(running={}, ready=True)
    assert _status(phase="Running", containerStatuses=[waiting, running]) == ("CrashLoopBackOff", "1/2", 4)
    ended = _container(terminated={"exitCode": 3})
    assert _status(phase="Failed", containerStatuses=[ended]) == ("ExitCode:3", "0/2", 0)
    assert _status(phase="Failed", reason="Evicted")[0] == "Evicted"
    assert _status(phase="Running", metadata={"name": "p", "deletionTimestamp": "x"})[0] == "Terminating"


def test_pods_that_start() -> None:
    spec = {"containers": [{"name": "a"}], "initContainers": [{"name": "i"}, {"name": "j"}]}
    first = _container(name="i", running={})
    assert _status(phase="Pending", spec=spec, initContainerStatuses=[first])[0] == "Init:0/2"
    done = _container(name="i", terminated={"exitCode": 0})
    broken = _container(name="j", terminated={"exitCode": 1, "reason": "Error"})
    assert _status(phase="Pending", spec=spec, initContainerStatuses=[done, broken])[0] == "Init:Error"


def test_rows_carry_what_is_asked_for() -> None:
    info = Registry().lookup("", "v1", "configmaps")
    assert info is not None
    item = {
        "kind": "ConfigMap",
        "metadata": {"name": "a", "creationTimestamp": "2026-11-23T07:29:00Z"},
        "data": {"x": ""},
    }
    shown = {
        include: tables.table(info, None, [item], {}, include, False, now=NOW) for include in ("None", "Object", "")
    }
    assert shown["None"]["rows"][0] == {"cells": ["a", 1, "60s"], "object": None}
    assert shown["Object"]["rows"][0]["object"] == item
    assert shown[""]["rows"][0]["object"]["kind"] == "PartialObjectMetadata"
    assert shown[""]["columnDefinitions"] is None


def test_custom_columns() -> None:
    columns = [
        {"name": "N", "type": "integer", "jsonPath": ".spec.n"},
        {"name": "All", "type": "string", "jsonPath": ".spec.list"},
        {"name": "One", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].status"},
        {"name": "When", "type": "date", "jsonPath": ".spec.when"},
        {"name": "On", "type": "boolean", "jsonPath": ".spec.on"},
        {"name": "Odd", "type": "string", "jsonPath": "[[["},
    ]
    info = ResourceInfo("g.test", "v1", "things", "thing", "Thing")
    item = {
        "metadata": {"name": "a"},
        "spec": {"n": 3, "list": [1, "x"], "when": "2026-11-22T07:30:00Z", "on": True},
        "status": {"conditions": [{"type": "Other", "status": "x"}, {"type": "Ready", "status": "True"}]},
    }
    found = tables.table(info, {"additionalPrinterColumns": columns}, [item, {"metadata": {"name": "b"}}], {}, now=NOW)
    assert found["rows"][0]["cells"] == ["a", 3, '[1,"x"]', "True", "24h", True, None]
    assert found["rows"][1]["cells"] == ["b", *[None] * 6]
