"""The real kernel verifies the program and runs it; a pair of interfaces in a namespace carries the frames."""

import asyncio
import os
import secrets
import subprocess
import time
from collections.abc import Iterator

import pytest

from vmnet.kernel.api import Gone
from vmnet.kernel.linux import LinuxKernel
from vmnet.model.names import InterfaceName, MacAddress, NamespaceName

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

# The sign bit of the word that is compared is set.
GUEST, OTHER = MacAddress("fa:58:c0:a8:00:05"), MacAddress("fa:58:c0:a8:00:06")


def frame(source: MacAddress) -> bytes:
    return b"\xff" * 6 + bytes.fromhex(source.replace(":", "")) + b"\x88\xb5" + bytes(46)


@pytest.fixture
def segment() -> Iterator[NamespaceName]:
    name = NamespaceName(f"stamp-{secrets.token_hex(4)}")
    words = ["ip", "link", "add", "port", "netns", name, "type", "veth", "peer", "guest", "netns", name]
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(words, check=True)
        for device in ("port", "guest"):
            subprocess.run(["ip", "-n", name, "link", "set", device, "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


async def test_the_guest_s_own_frames_are_stamped_on_their_way_in(segment: NamespaceName) -> None:
    kernel = LinuxKernel()
    port, guest = InterfaceName("port"), InterfaceName("guest")
    stamp = await kernel.last_frame(segment, port, GUEST)
    outside, inside = [await kernel.packet_socket(segment, device) for device in (guest, port)]
    try:
        assert stamp.seen() is None
        outside.send(frame(OTHER))  # of another source
        inside.send(frame(GUEST))  # towards the guest
        assert stamp.seen() is None
        last = 0.0
        for _ in range(2):
            before = time.time()
            outside.send(frame(GUEST))
            deadline = time.monotonic() + 60
            while (stamp.seen() or 0.0) <= last + 0.001:
                assert time.monotonic() < deadline
            found = stamp.seen()
            assert found is not None
            # The two clocks are read one after the other.
            assert before - 0.01 <= found <= time.time() + 0.01
            last = found
            await asyncio.sleep(0.01)  # further apart than the two clocks' readings
    finally:
        stamp.close()
        stamp.close()
        for opened in (outside, inside):
            opened.close()
        await kernel.close()


async def test_an_interface_that_is_not_there_is_gone(segment: NamespaceName) -> None:
    kernel = LinuxKernel()
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises(Gone):
            await kernel.last_frame(segment, InterfaceName("nothing"), GUEST)
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 1  # the thread's own namespace
    finally:
        await kernel.close()
