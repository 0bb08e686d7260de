import io
import json
from pathlib import Path

from rich.console import Console

from vmnet.lab.report import Lookup, Report, Stream, show, write


def report() -> Report:
    return Report(
        from_node="n1",
        to_node="n2",
        addresses_before=["192.168.0.3/16", "fd20::4/128"],
        addresses_after=["192.168.0.3/16", "fd20::4/128"],
        addresses_after_restart=["192.168.0.9/16"],
        tcp_streams=[Stream("red→blue", 10, 0, 12.0, True), Stream("blue→outside", 1, 1, 0.0, False)],
        dns=[Lookup("red", "blue.blue-namespace", "A", "192.168.0.3", ["192.168.0.9"])],
        claims=[{"name": "blue-namespace/blue.happy", "ips": ["192.168.0.3/16"]}],
        problems=["addresses changed"],
    )


def test_json_has_the_names_readers_expect(tmp_path: Path) -> None:
    write(report(), tmp_path / "demo" / "report.json")
    body = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert (body["from"], body["to"]) == ("n1", "n2")
    assert body["dns"][0]["ok"] is False
    assert body["qemu_pause_ms"] is None, "a figure that was not seen is not made up"


def test_a_person_sees_what_failed() -> None:
    out = io.StringIO()
    show(report(), Path("build/demo/report.json"), Console(file=out, width=200, emoji=False))
    text = out.getvalue()
    assert "FAILED" in text
    assert "fd20::4/128" in text, "a colon pair is no emoji"
    assert "addresses changed" in text
    assert "broke" in text
