"""One suite, two shims: the CNI specification, against one agent on the real kernel."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from vmnet.cni import shim

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("cni_node.py")
ENTER = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec"]
# A private /run, so that no namespace made here has a name outside.
PREPARE = (
    "mount -t tmpfs tmpfs /run; mkdir /run/netns; ip link set lo up; ip link add eth0 type veth peer fabric0; "
    'ip addr add 172.30.0.11/24 dev eth0; ip link set eth0 up; ip link set fabric0 up; exec "$0" "$@"'
)


@pytest.mark.parametrize("kind", ["python", "c"])
async def test_conformance(kind: str) -> None:
    if kind == "c":
        subprocess.run(["make", "-s", "build/vmnet-cni"], cwd=ROOT, check=True, timeout=100)  # noqa: ASYNC221
    path = ROOT / "build" / "vmnet-cni" if kind == "c" else Path(shim.__file__)
    process = await asyncio.create_subprocess_exec(
        *ENTER,
        PREPARE,
        sys.executable,
        str(PROGRAM),
        str(path),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 110)
    assert process.returncode == 0, output.decode()
