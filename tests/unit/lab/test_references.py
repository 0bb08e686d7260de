"""What is made from the code is current, and says what it should."""

from pathlib import Path

import pytest

from vmnet.lab import references


@pytest.mark.parametrize("path", sorted(references.made()), ids=lambda path: path.name)
def test_it_is_current(path: Path) -> None:
    assert path.read_text() == references.made()[path], "run: make references"


def test_samples_are_named_as_prometheus_shows_them() -> None:
    found = references.samples()
    assert found["vmnet_migrations_total"] == {"namespace", "name", "node", "network", "outcome"}
    assert found["vmnet_cni_request_seconds_bucket"] == {"command", "result", "le"}
    assert found["vmnet_dns_requests_total"] == {"network", "type", "rcode", "outcome"}
    assert found["vmnet_build_info"] == {"version"}
    assert found["process_open_fds"] == frozenset()
    assert "vmnet_migrations" not in found


def test_metrics_say_who_serves_them() -> None:
    rows = {line.split("`")[1]: line for line in references.metrics_reference().splitlines() if line.startswith("| `")}
    assert "| agent |" in rows["vmnet_cni_request_seconds"]
    assert "| controller |" in rows["vmnet_network_addresses_used"]
    assert "| agent |" in rows["vmnet_dns_requests_total"]
    assert "| agent and controller |" in rows["vmnet_ready"]


def test_fields_of_definitions_are_found_to_the_last() -> None:
    text = references.definitions_reference()
    assert "| `spec.layer2.ipam.lifecycle` | string |" in text
    assert "`spec.network.layer3.subnets[].cidr`" in text
    assert "| `metadata`" not in text


def test_an_annotation_must_be_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = tmp_path / "names.py"
    names.write_text('X_LABEL: Final = "example.org/x"\n"""What ``x`` is."""\nY_PORT: Final = 1\n')
    monkeypatch.setattr(references, "_NAMES", names)
    assert "| `example.org/x` | label | What `x` is. |" in references.annotations_reference()
    names.write_text('X_LABEL: Final = "example.org/x"\nY_PORT: Final = 1\n')
    with pytest.raises(ValueError, match="X_LABEL is not explained"):
        references.annotations_reference()
