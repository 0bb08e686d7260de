"""One suite, two kernels."""

import asyncio
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vmnet.kernel.fake import FakeKernel
from vmnet.lab import container
from vmnet.lab.init import AGENT
from vmnet.model.names import InterfaceName
from vmnet.plan.state import BridgeState

SUITE = Path(__file__).with_name("kernel_suite.py")
ENTER = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec"]
# A private /run, so that no namespace made here has a name outside.
PREPARE = 'mount -t tmpfs tmpfs /run; mkdir /run/netns; ip link set lo up; ip link add lan0 type bridge; exec "$0" "$@"'
# A node whose mounts a container follows, and the container: it cannot set a switch itself, and keeps what agents keep.
CONTAINER = """
mount --make-shared /run
exec unshare --mount --propagation slave sh -ec 'mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys
! ( echo 1 >/proc/sys/net/ipv4/ip_forward ) 2>/dev/null
exec setpriv --bounding-set=-all%s --inh-caps=-all --no-new-privs -- "$0" "$@"' "$0" "$@" /proc/$$/ns/mnt
"""


async def test_the_fake() -> None:
    specification = importlib.util.spec_from_file_location("kernel_suite", SUITE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    kernel = FakeKernel()
    kernel.node = replace(kernel.node, bridges={InterfaceName("lan0"): BridgeState(1500)})
    await module.suite(lambda: kernel, kernel.make_pod)


@pytest.mark.parametrize("place", ["node", "container"])
async def test_the_real_one(place: str) -> None:
    prepare = PREPARE
    if place == "container":
        context = container.context_of(*container.container_of(AGENT))
        kept = "".join(f",+{name.lower()}" for name in container.capabilities_of(context))
        # The node's first process must live on, for its mounts are entered by its number.
        prepare = PREPARE.replace('exec "$0" "$@"', (CONTAINER % kept).replace("exec unshare", "unshare", 1))
    process = await asyncio.create_subprocess_exec(
        *ENTER, prepare, sys.executable, str(SUITE), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0, output.decode()
