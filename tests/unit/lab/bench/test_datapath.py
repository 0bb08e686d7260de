import json
import subprocess

import pytest

from vmnet.lab.bench.datapath import METER, Measurement, table
from vmnet.lab.guest.probe import binary


def test_a_ratio_is_of_medians_and_is_judged_on_its_side() -> None:
    rate = Measurement("rate", "1/s", 0.9, at_least=True, ours=[80.0, 90.0, 1000.0], bare=[100.0, 100.0, 5.0])
    assert (rate.ratio, rate.met) == (0.9, True)
    delay = Measurement("delay", "µs", 1.15, at_least=False, ours=[12.0], bare=[10.0])
    assert (delay.ratio, delay.met) == (1.2, False)


def test_the_table_says_what_was_asked_for_and_whether_it_was_met() -> None:
    item = {"name": "delay", "unit": "µs", "ours": [12.0], "bare": [10.0], "ratio": 1.2, "limit": 1.15}
    assert table({"measurements": [{**item, "at_least": False, "met": False}]}).splitlines()[2] == (
        "| delay (µs) | 12 (12–12) | 10 (10–10) | 1.20 | ≤ 1.15 | no |"
    )


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_meter_measures_itself(address: str) -> None:
    meter = str(binary(METER))
    script = f"""
        ip link set lo up
        "{meter}" serve 7100 & server=$!
        for try in $(seq 100); do "{meter}" rtt {address} 7100 1 >/dev/null 2>&1 && break; sleep 0.1; done
        "{meter}" rtt {address} 7100 100 && "{meter}" packets {address} 7100 0.2 && "{meter}" connect {address} 7100 50
        result=$?; kill $server; exit $result
    """
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    rtt, packets, connections = map(json.loads, done.stdout.splitlines())
    assert rtt["count"] + rtt["lost"] == 100
    assert 0 < rtt["p50_us"] <= rtt["p99_us"]
    assert 0 < packets["arrived"] <= packets["sent"]
    assert connections["opened"] == 50
