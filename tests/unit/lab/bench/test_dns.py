import json
import subprocess
import sys
from pathlib import Path

from vmnet.lab.bench.dns import ASKER, PORTS, Figure, table
from vmnet.lab.bench.resolver import address, name
from vmnet.lab.guest.probe import binary


def test_a_ratio_is_of_medians_and_is_judged_on_its_side() -> None:
    cpu = Figure("cpu", "µs", 1.5, found={"vmnet": [9.0, 15.0, 90.0], "unbound": [10.0, 10.0, 1.0]})
    assert (cpu.ratio, cpu.met) == (1.5, True)
    qps = Figure("qps", "1/s", 0.7, at_least=True, found={"vmnet": [6.0], "unbound": [10.0]})
    assert (qps.ratio, qps.met) == (0.6, False)
    assert Figure("p50", "µs", None, found={"vmnet": [6.0], "unbound": [0.0]}).met is None


def test_the_table_says_what_was_asked_for_and_whether_it_was_met() -> None:
    found = {"vmnet": [12.0], "unbound": [10.0], "nsd": [8.0]}
    item = {"name": "cpu", "unit": "µs", "found": found, "ratio": 1.2, "limit": 1.5, "at_least": False, "met": True}
    many = {
        "networks": 1000,
        "names_each": 10,
        "octets_per_network": 20480,
        "start_seconds": 1.5,
        "start_cpu_seconds": 1.0,
        "idle_cpu_share": 0.001,
    }
    one = {"number": 3, "p50_ms": 1.5, "p99_ms": 16.0, "max_ms": 17.25}
    changes = [{"names": 1000, "changes": {"new, watched": one}}]
    lines = table({"figures": [item], "many": many, "changes": changes}).splitlines()
    assert lines[2] == "| cpu (µs) | 12.0 (12.0–12.0) | 10.0 (10.0–10.0) | 8.0 (8.0–8.0) | 1.20 | ≤ 1.5 | yes |"
    assert "| memory per network | 20.0 KiB |" in lines
    assert lines[-1] == "| 1,000 names: new, watched | 1.5 | 16.0 | 17.2 |"


def test_a_changed_record_has_another_address() -> None:
    assert len({address(number, generation) for number in (0, 1, 9999) for generation in (0, 1, 2)}) == 9


def test_the_client_and_a_changing_responder_understand_each_other(tmp_path: Path) -> None:
    names = tmp_path / "names"
    names.write_text("".join(f"{name(number)}\n" for number in range(50)))
    asked = json.dumps({"names": 50, "port": PORTS["vmnet"]})
    said = tmp_path / "said"
    changes = "for at in $(seq 60); do echo $((at % 50)) $((1 + at / 50)); sleep 0.01; done"
    script = f"""
        ip link set lo up
        {{ echo '{asked}'; {changes}; }} | "{sys.executable}" -m vmnet.lab.bench.resolver > "{said}" & server=$!
        for try in $(seq 300); do grep -q ready "{said}" && break; sleep 0.1; done
        "{binary(ASKER)}" 127.0.0.1 {PORTS["vmnet"]} "{names}" 8 0.3 1
        "{binary(ASKER)}" 127.0.0.1 {PORTS["vmnet"]} "{names}" 0:500 0.3 2
        result=$?; kill $server; exit $result
    """
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        found = json.loads(line)
        assert found["answered"] > 0
        assert found["wrong"] == 0
        assert found["answered"] + found["lost"] == found["sent"]
