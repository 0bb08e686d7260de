"""The node's kernel is left half-made at every point, and the next agent completes it."""

import asyncio
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("recovery.py")
ENTER = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec"]
# A private /run, so that no namespace made here has a name outside.
PREPARE = 'mount -t tmpfs tmpfs /run; mkdir /run/netns; ip link set lo up; exec "$0" "$@"'


@pytest.mark.parametrize(
    "case",
    [
        "death_while_a_network_is_made",
        "death_while_a_layer3_network_is_made",
        "death_while_a_secondary_network_is_made",
        "death_while_a_localnet_network_is_made",
        "death_while_a_port_is_made",
        "a_port_goes_while_its_state_changes",
        "a_network_comes_back_at_once",
        "a_thousand_machines",
    ],
)
async def test_recovery(case: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *ENTER,
        PREPARE,
        sys.executable,
        str(PROGRAM),
        case,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0, output.decode()
