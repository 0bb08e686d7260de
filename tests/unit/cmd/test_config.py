"""``vmnet config``, as an administrator types it."""

import json
from pathlib import Path
from typing import Any

import pytest

from vmnet.cmd import main
from vmnet.model.configuration import OPTIONS, SECTIONS


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in OPTIONS:
        for variable in (*option.variables, "VMNET_CONFIG"):
            monkeypatch.delenv(variable, raising=False)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main.main(["config", "show", "-o", "json", *words]) == 0
    return {item["key"]: item for item in json.loads(capsys.readouterr().out)}


def test_each_value_has_an_origin_and_an_explanation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("dns: {ttl: 10}\nagent:\n  localnets: {physnet: br0}\n")
    monkeypatch.setenv("VMNET_CONFIG", str(path))
    monkeypatch.setenv("VMNET_LOG_LEVEL", "WARNING")
    found = shown(capsys)
    assert found.keys() == {option.path for option in OPTIONS}
    assert all(item["explanation"] and item["allowed"] for item in found.values())
    assert found["dns.ttl"]["value"] == 10
    assert found["dns.ttl"]["origin"] == {"source": "file", "place": f"{path}:1"}
    assert found["agent.localnets"]["value"] == {"physnet": "br0"}
    assert found["shared.logLevel"]["origin"] == {"source": "environment", "place": "VMNET_LOG_LEVEL"}
    assert found["agent.multus"]["origin"] == {"source": "default", "place": ""}
    assert shown(capsys, "--changed").keys() == {"dns.ttl", "agent.localnets", "shared.logLevel"}
    assert {item["origin"]["source"] for item in shown(capsys, "--default").values()} == {"default"}
    assert main.main(["config", "show"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("KEY")
    assert all(option.path in table for option in OPTIONS)
    assert max(map(len, table.splitlines())) < 160 + len(str(path))


def test_the_default_file_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["config", "show", "--default", "-o", "yaml"]) == 0
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert main.main(["config", "check", str(path)]) == 0
    assert f"decides {len(OPTIONS)} of {len(OPTIONS)} values" in capsys.readouterr().out
    found = shown(capsys, "--config", str(path))
    assert {item["origin"]["source"] for item in found.values()} == {"file"}
    assert {key: item["value"] for key, item in found.items()} == {key: item["default"] for key, item in found.items()}


def test_a_file_that_is_wrong_is_told_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("dns:\n  ttl: 99\n  tll: 5\n")
    for words in (["config", "check", str(path)], ["config", "show", "--config", str(path)]):
        assert main.main(words) == main.MISUSED
        first, second, hint = capsys.readouterr().err.splitlines()
        assert first.startswith("vmnet config: ")
        assert second.startswith("vmnet config: ")
        assert {f"{path}:2", f"{path}:3"} == {line.split(": ")[1] for line in (first, second)}
        assert "vmnet config show --default" in hint
    assert main.main(["config", "check", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err


def test_the_reference_and_the_schema_know_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["config", "reference"]) == 0
    reference = capsys.readouterr().out
    for option in OPTIONS:
        (line,) = (line for line in reference.splitlines() if line.startswith(f"| `{option.path}` |"))
        assert option.flag in line
        assert all(variable in line for variable in option.variables)
        assert line.replace("\\|", "").count("|") == 7
    assert main.main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"].keys() == SECTIONS.keys()


def test_a_log_level_that_is_none_is_told_to_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VMNET_LOG_LEVEL", "loud")
    assert main.main(["config", "show"]) == main.MISUSED
    assert "VMNET_LOG_LEVEL" in capsys.readouterr().err
