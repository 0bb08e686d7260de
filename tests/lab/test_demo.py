"""The demo's scenario, as a new user runs it: real guests, a real migration, and a report whose figures were seen."""

import json
import os
from pathlib import Path

import pytest

from vmnet.lab import demo
from vmnet.lab.lab import Lab


@pytest.mark.timeout(420)
async def test_the_demo_passes_and_its_report_says_what_was_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[str] = []
    async with Lab(name=f"demo-{os.getpid()}") as lab:
        status = await demo.run(lab, report=tmp_path / "report.json", step=steps.append)
        metrics = await lab.exec("fabric", ["python3", "-c", _FETCH, "http://172.30.0.11:9465/metrics"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["problems"] == []
    assert status == 0
    assert report["from"] != report["to"]
    assert report["addresses_before"] == report["addresses_after"] == report["addresses_after_restart"]
    assert report["gateway_mac_before"] == report["gateway_mac_after"] == "0a:58:c0:a8:00:01"
    assert report["qemu_pause_ms"] > 0
    assert report["probes_sent"] > 1000
    assert 0 < report["probe_gap_ms"] < demo.STALL_LIMIT_MS
    assert report["probes_duplicated"] == 0
    assert {stream["name"] for stream in report["tcp_streams"]} == {"red→blue", "blue→red", "blue→outside"}
    for stream in report["tcp_streams"]:
        assert stream["bytes"] > 0
        assert stream["survived"] or stream["name"] == "blue→outside"
    assert all(report["announcements"][kind] > 0 for kind in ("garp", "na", "ra"))
    assert len(report["dns"]) == 8
    assert all(item["ok"] for item in report["dns"])
    assert {claim["name"] for claim in report["claims"]} == {"red-namespace/red.happy", "blue-namespace/blue.happy"}
    assert report["vmi_interfaces"][0]["podInterfaceName"] == "ovn-udn1"
    assert "passed" in capsys.readouterr().out
    assert steps
    for name in ("vmnet_cni_request_seconds", "vmnet_dns_requests_total", "vmnet_dhcp_requests_total"):
        assert name in metrics.stdout


_FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=30).read().decode())"
