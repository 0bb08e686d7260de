"""One suite, two kernels."""

import asyncio
import importlib.util
import sys
from pathlib import Path

from vmnet.kernel.fake import FakeKernel

SUITE = Path(__file__).with_name("kernel_suite.py")
ENTER = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec"]
# A private /run, so that no namespace made here has a name outside.
PREPARE = 'mount -t tmpfs tmpfs /run; mkdir /run/netns; ip link set lo up; exec "$0" "$@"'


async def test_the_fake() -> None:
    specification = importlib.util.spec_from_file_location("kernel_suite", SUITE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    kernel = FakeKernel()
    await module.suite(lambda: kernel, kernel.make_pod)


async def test_the_real_one() -> None:
    process = await asyncio.create_subprocess_exec(
        *ENTER, PREPARE, sys.executable, str(SUITE), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0, output.decode()
