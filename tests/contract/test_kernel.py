"""One suite, two kernels."""

import asyncio
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

from vmnet.kernel.fake import FakeKernel
from vmnet.model.names import InterfaceName
from vmnet.plan.state import BridgeState

SUITE = Path(__file__).with_name("kernel_suite.py")
ENTER = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec"]
# A private /run, so that no namespace made here has a name outside.
PREPARE = 'mount -t tmpfs tmpfs /run; mkdir /run/netns; ip link set lo up; ip link add lan0 type bridge; exec "$0" "$@"'


async def test_the_fake() -> None:
    specification = importlib.util.spec_from_file_location("kernel_suite", SUITE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    kernel = FakeKernel()
    kernel.node = replace(kernel.node, bridges={InterfaceName("lan0"): BridgeState(1500)})
    await module.suite(lambda: kernel, kernel.make_pod)


async def test_the_real_one() -> None:
    process = await asyncio.create_subprocess_exec(
        *ENTER, PREPARE, sys.executable, str(SUITE), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0, output.decode()
