"""The runtime side of CNI: real plugin processes (scripts), the real file layout."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vmnet.lab.kubelet import network
from vmnet.lab.kubelet.network import Attachment, Network, NetworkError

PLUGIN = f"""#!{sys.executable}
import json, os, pathlib, sys
here = pathlib.Path(os.environ["CNI_PATH"].split(":")[0])
body = json.load(sys.stdin)
command = os.environ["CNI_COMMAND"]
seen = {{k: v for k, v in os.environ.items() if k.startswith("CNI_")}}
with open(here / "calls", "a") as calls:
    call = [body["type"], command, body.get("prevResult"), seen, body["name"], body["cniVersion"]]
    print(json.dumps(call), file=calls)
if (here / ("refuse-" + body["type"])).exists() and command in ("ADD", "CHECK", "STATUS"):
    print(json.dumps({{"code": 11, "msg": "later", "details": "really"}}))
    sys.exit(1)
if command == "ADD":
    previous = body.get("prevResult") or {{"ips": []}}
    ips = [*previous["ips"], {{"address": body["gives"], "interface": 0}}]
    print(json.dumps({{"cniVersion": "1.0.0", "interfaces": [{{"name": "eth0", "sandbox": "x"}}], "ips": ips}}))
"""

ATTACHMENT = Attachment("c0ffee", "/run/netns/x", network.pod_args("red", "p", "u", "c0ffee"))


@pytest.fixture
def node(tmp_path: Path) -> Network:
    for folder in ("bin", "net.d", "cache"):
        (tmp_path / folder).mkdir()
    for name in ("first", "second"):
        (tmp_path / "bin" / name).write_text(PLUGIN)
        (tmp_path / "bin" / name).chmod(0o755)
    configure(tmp_path)
    return Network(tmp_path / "net.d", [tmp_path / "bin"], tmp_path / "cache", timeout=20)


def configure(tmp_path: Path, version: str = "1.0.0") -> None:
    plugins = [{"type": "first", "gives": "10.0.0.1/24"}, {"type": "second", "gives": "10.0.0.2/24"}]
    body = {"cniVersion": version, "name": "lab", "plugins": plugins}
    (tmp_path / "net.d" / "10-lab.conflist").write_text(json.dumps(body))


def calls(tmp_path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (tmp_path / "bin" / "calls").read_text().splitlines()]


async def test_add_chains_and_del_runs_backwards(node: Network, tmp_path: Path) -> None:
    result = await node.add(ATTACHMENT)
    assert network.addresses(result) == ("10.0.0.1", "10.0.0.2")
    await node.check(ATTACHMENT)
    # DEL uses what ADD used, not what is configured now.
    (tmp_path / "net.d" / "10-lab.conflist").unlink()
    await node.delete(ATTACHMENT)
    seen = calls(tmp_path)
    assert [call[:2] for call in seen] == [
        ["first", "ADD"],
        ["second", "ADD"],
        ["first", "CHECK"],
        ["second", "CHECK"],
        ["second", "DEL"],
        ["first", "DEL"],
    ]
    assert seen[0][2] is None
    assert [ip["address"] for ip in seen[1][2]["ips"]] == ["10.0.0.1/24"]
    assert all(call[2] == result for call in seen[2:])
    assert seen[0][3]["CNI_ARGS"].startswith("IgnoreUnknown=1;K8S_POD_NAMESPACE=red;K8S_POD_NAME=p;")
    assert seen[0][4:] == ["lab", "1.0.0"]
    assert not list((tmp_path / "cache").iterdir())


async def test_a_refusal_carries_its_code_and_del_still_works(node: Network, tmp_path: Path) -> None:
    (tmp_path / "bin" / "refuse-second").touch()
    with pytest.raises(NetworkError, match="'second' failed .add.: later; really") as caught:
        await node.add(ATTACHMENT)
    assert caught.value.code == 11
    await node.delete(ATTACHMENT)
    assert [call[:2] for call in calls(tmp_path)][-2:] == [["second", "DEL"], ["first", "DEL"]]


async def test_check_needs_an_add(node: Network) -> None:
    with pytest.raises(NetworkError, match="no cached result"):
        await node.check(ATTACHMENT)


async def test_status_exists_from_1_1_on(node: Network, tmp_path: Path) -> None:
    (tmp_path / "bin" / "refuse-second").touch()
    await node.status()
    configure(tmp_path, "1.1.0")
    with pytest.raises(NetworkError, match="status"):
        await node.status()


async def test_faults_of_the_node_are_named(node: Network, tmp_path: Path) -> None:
    (tmp_path / "bin" / "second").unlink()
    with pytest.raises(NetworkError, match="failed to find plugin 'second'"):
        await node.add(ATTACHMENT)
    (tmp_path / "net.d" / "10-lab.conflist").write_text("{")
    with pytest.raises(NetworkError, match="malformed"):
        await node.add(ATTACHMENT)
    (tmp_path / "net.d" / "10-lab.conflist").unlink()
    with pytest.raises(NetworkError, match="no network configuration"):
        await node.status()


async def test_a_plugin_that_hangs_is_killed(node: Network, tmp_path: Path) -> None:
    (tmp_path / "bin" / "first").write_text("#!/bin/sh\nexec sleep 60\n")
    slow = Network(tmp_path / "net.d", [tmp_path / "bin"], tmp_path / "cache", timeout=0.2)
    with pytest.raises(NetworkError, match="did not end"):
        await slow.add(ATTACHMENT)


async def test_a_plugin_that_speaks_no_json(node: Network, tmp_path: Path) -> None:
    (tmp_path / "bin" / "first").write_text("#!/bin/sh\necho boom >&2; exit 2\n")
    with pytest.raises(NetworkError, match="boom"):
        await node.add(ATTACHMENT)
    (tmp_path / "bin" / "first").write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(NetworkError, match="no JSON"):
        await node.add(ATTACHMENT)


def test_only_the_pods_own_default_interface_counts() -> None:
    result = {
        "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "x"}, {"name": "ovn-udn1", "sandbox": "x"}],
        "ips": [{"address": "10.244.1.2/24", "interface": 1}, {"address": "192.168.0.5/16", "interface": 2}],
    }
    assert network.addresses(result) == ("10.244.1.2",)
