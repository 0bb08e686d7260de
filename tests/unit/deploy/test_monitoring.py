"""Rules, dashboards, monitors and runbooks: about metrics that exist, and about each other."""

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from vmnet.lab import manifests, references

RUNBOOKS = references.DOCUMENTS / "runbooks"
SECTIONS = ["## Meaning", "## Impact", "## Diagnosis", "## Mitigation"]
SCRAPED = {"job", "instance", "node", "pod", "namespace"}
"""Labels that the scrape adds (monitors.yaml, tests/lab/test_monitoring.py)."""
FOREIGN = {"up"}
GROUPS = yaml.safe_load(references.RULES.read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"]: rule for rule in RULES if "record" in rule}
METRIC = re.compile(r"\b(?:vmnet|process)_[a-z0-9_]+\b(?!:)|\b[a-z_0-9]+(?::[a-z_0-9]+)+\b|\bup\b")
SELECTOR = re.compile(r"([a-z_0-9]+(?::[a-z_0-9]+)*){([^}]*)}")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')


def dashboard(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


DASHBOARDS = {path.stem: dashboard(path) for path in sorted((references.MONITORING / "dashboards").glob("*.json"))}


def queries(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


def fenced(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def expressions() -> list[str]:
    texts = [rule["expr"] for rule in RULES]
    for board in DASHBOARDS.values():
        texts += queries(board)
    for path in RUNBOOKS.glob("*.md"):
        texts += fenced(path, "promql")
    return texts


@functools.cache
def labels_of(metric: str) -> frozenset[str]:
    if metric in FOREIGN:
        return frozenset(SCRAPED)
    if metric in RECORDED:
        grouping = re.search(r"by \(([a-z_, ]+)\)", RECORDED[metric]["expr"])
        assert grouping, metric
        return frozenset(name.strip() for name in grouping[1].split(","))
    return references.samples()[metric] | SCRAPED


def test_every_metric_exists() -> None:
    known = {*references.samples(), *RECORDED, *FOREIGN}
    texts = [re.sub(r'"[^"]*"', '""', text) for text in expressions()]
    named = {name for text in texts for name in METRIC.findall(text)}
    assert named >= RECORDED.keys()
    assert not named - known


def test_prose_names_metrics_that_exist() -> None:
    families = {re.sub(r"_(total|info|bucket|sum|count)$", "", name) for name in references.samples()}
    known = {*references.samples(), *families}
    for path in references.DOCUMENTS.rglob("*.md"):
        for name in re.findall(r"`(vmnet_[a-z_]+)[`{]", path.read_text()):
            assert name in known or name in ("vmnet_dns",), f"{path.name}: {name}"


def test_selectors_name_labels_that_exist() -> None:
    for text in expressions():
        for metric, matchers in SELECTOR.findall(text):
            assert set(MATCHER.findall(matchers)) <= labels_of(metric), text


def test_buckets_that_are_named_exist() -> None:
    named = {
        (metric, bound)
        for text in expressions()
        for metric, matchers in SELECTOR.findall(text)
        for bound in re.findall(r'le="([^"]+)"', matchers)
    }
    assert named
    # Prometheus compares text: "1" and "1.0" are different buckets.
    assert {bound for _, bound in named} <= {"1.0", "+Inf"}


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_to_do(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("info", "warning", "critical")
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"
    used = set(re.findall(r"\$labels\.(\w+)", " ".join(alert["annotations"].values())))
    absent = "absent(" in alert["expr"]
    assert not (absent and used)


@pytest.mark.parametrize("path", sorted(RUNBOOKS.glob("*.md")), ids=lambda path: path.stem)
def test_a_runbook_is_whole(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert path.stem in ALERTS
    assert lines[0] == f"# {path.stem}"
    assert [line for line in lines if line.startswith("## ")] == SECTIONS
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_every_alert_has_its_runbook() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == ALERTS.keys()


def test_the_operators_rules_are_the_same() -> None:
    (item,) = manifests.documents((references.MONITORING / "prometheus-rule.yaml").read_text())
    assert item["spec"] == {"groups": GROUPS}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_sound(name: str) -> None:
    board = DASHBOARDS[name]
    assert board["uid"] == f"vmnet-{name}"
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    variables = {item["name"] for item in board["templating"]["list"]}
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        assert panel["targets"]
        assert panel["datasource"]["uid"] == "${datasource}"
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    used = {word for query in queries(board) for word in re.findall(r"\$(\w+)", query)} - {"__rate_interval"}
    assert used <= variables


@pytest.mark.parametrize("base", ["", "https://git.example.org/network/vmnet/src/"])
def test_runbooks_are_where_one_line_says(base: str, tmp_path: Path) -> None:
    shutil.copytree(manifests.DEPLOY, tmp_path / "deploy")
    folder = tmp_path / "deploy" / "overlays" / "monitoring"
    path = folder / "runbooks.yaml"
    path.write_text(path.read_text().replace('base: ""', f'base: "{base}"'))
    (rule,) = [item for item in manifests.documents(manifests.rendered(folder)) if item["kind"] == "PrometheusRule"]
    alerts = [alert for group in rule["spec"]["groups"] for alert in group["rules"] if "alert" in alert]
    assert len(alerts) > 20
    for alert in alerts:
        url = alert["annotations"]["runbook_url"]
        assert url == f"{base}docs/runbooks/{alert['alert']}.md"
        assert (references.DOCUMENTS.parent / url.removeprefix(base)).exists()


def test_the_overlay_adds_monitoring_to_the_base() -> None:
    base = manifests.documents(manifests.rendered())
    found = manifests.documents(manifests.rendered(references.MONITORING))
    added = {(item["kind"], item["metadata"]["name"]): item for item in found if item not in base}
    assert len(added) == len(found) - len(base)
    assert added.keys() == {
        ("ServiceMonitor", "vmnet-agent"),
        ("ServiceMonitor", "vmnet-controller"),
        ("PrometheusRule", "vmnet"),
        ("ConfigMap", "vmnet-dashboard-migrations"),
        ("ConfigMap", "vmnet-dashboard-networks"),
    }
    for (kind, name), item in added.items():
        assert item["metadata"]["namespace"] == "vmnet-system"
        if kind == "ConfigMap":
            assert item["metadata"]["labels"]["grafana_dashboard"] == "1"
            (text,) = item["data"].values()
            assert json.loads(text) == DASHBOARDS[name.removeprefix("vmnet-dashboard-")]
        if kind == "ServiceMonitor":
            _selects_a_service(item, base)


def _selects_a_service(monitor: dict[str, Any], objects: list[dict[str, Any]]) -> None:
    """One Service has both the labels and the port; its label is the job that the rules speak of."""
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["honorLabels"] is True
    (service,) = [
        item
        for item in objects
        if item["kind"] == "Service"
        and wanted <= item["metadata"]["labels"].items()
        and endpoint["port"] in [port["name"] for port in item["spec"]["ports"]]
    ]
    job = service["metadata"]["labels"][monitor["spec"]["jobLabel"]]
    assert f'job="{job}"' in references.RULES.read_text()
