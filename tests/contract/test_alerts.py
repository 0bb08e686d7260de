"""The rules before Prometheus' own judge: they are sound, and every alert fires when it should and only then."""

import asyncio
from pathlib import Path

import pytest
import yaml

from vmnet.lab import references

CASES = Path(__file__).parents[1] / "data" / "alerts"
SECONDS = 100
ALERTS = {
    rule["alert"]
    for group in yaml.safe_load(references.RULES.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


async def promtool(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        "promtool", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), SECONDS)
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_the_rules_are_sound() -> None:
    status, output = await promtool("check", "rules", str(references.RULES))
    assert status == 0, output


def test_every_alert_has_its_cases() -> None:
    assert {path.stem for path in CASES.glob("*.yaml")} == ALERTS


@pytest.mark.parametrize("path", sorted(CASES.glob("*.yaml")), ids=lambda path: path.stem)
def test_cases_say_when_it_fires_and_when_not(path: Path) -> None:
    found = yaml.safe_load(path.read_text())
    (rules,) = found["rule_files"]
    assert (path.parent / rules).resolve() == references.RULES.resolve()
    checks = [[check["exp_alerts"] for check in test["alert_rule_test"]] for test in found["tests"]]
    assert {check["alertname"] for test in found["tests"] for check in test["alert_rule_test"]} == {path.stem}
    assert any(any(alerts) for alerts in checks)
    assert any(not any(alerts) for alerts in checks)


async def test_alerts_fire_when_they_should_and_only_then() -> None:
    status, output = await promtool("test", "rules", *map(str, sorted(CASES.glob("*.yaml"))))
    assert status == 0, output
    assert output.count("SUCCESS") == len(ALERTS)
