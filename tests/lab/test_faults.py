"""What goes wrong in the middle: a target that dies, agents and controller that are killed while connections run."""

import asyncio
import json
import os
import signal

import pytest

from vmnet.lab.demo import BLUE, RED, Scenario
from vmnet.lab.lab import Lab


async def _migrations(scenario: Scenario, lab: Lab) -> dict[str, str]:
    items = json.loads(await lab.kubectl("get", "vmim", "-n", BLUE[0], "-o", "json"))["items"]
    return {item["metadata"]["name"]: item.get("status", {}).get("phase", "") for item in items}


async def _kill_target(scenario: Scenario, lab: Lab, source: str) -> bool:
    """Kill QEMU in the target pod as soon as it waits for the guest; True when that was done."""
    pods = json.loads(await lab.kubectl("get", "pods", "-n", BLUE[0], "-l", "kubevirt.io=virt-launcher", "-o", "json"))
    for pod in pods["items"]:
        node = pod["spec"].get("nodeName")
        if node not in (None, source) and pod["status"].get("phase") == "Running":
            killed = await lab.exec(node, ["pkill", "-KILL", "-f", f"qemu-system.*{pod['metadata']['uid']}"])
            return killed.exit == 0
    return False


@pytest.mark.timeout(600)
async def test_connections_outlive_a_failed_migration_and_killed_processes() -> None:
    async with Lab(name=f"faults-{os.getpid()}") as lab:
        scenario = Scenario(lab, lambda _: None)
        await scenario.create()
        red, blue = await scenario.guest(*RED), await scenario.guest(*BLUE)
        addresses = await scenario.addresses(blue)
        address = next(text for text in addresses if "." in text).split("/")[0]
        source = await scenario.vmi(*BLUE, "{.status.nodeName}")
        await scenario.serve(blue)
        stream = await red.start(["probe", "--json-lines", "send", address, "7008", "600"])
        await scenario.until("the stream runs", lambda: scenario.all_run(red, [stream]))

        # The target's QEMU dies before the guest is there: the guest goes on where it is.
        await scenario.subresource(*BLUE, "migrate")
        await scenario.until("the target's QEMU is killed", lambda: _kill_target(scenario, lab, source), timeout=90)

        async def failed() -> bool:
            return set((await _migrations(scenario, lab)).values()) == {"Failed"}

        await scenario.until("the migration has failed", failed, timeout=120)
        assert await scenario.vmi(*BLUE, "{.status.nodeName}") == source
        assert await scenario.addresses(await scenario.guest(*BLUE)) == addresses

        # Killed, not stopped: what they made stays, and who starts again takes it over.
        for name in (f"agent-{source}", "controller"):
            await lab.kill(name, signal.SIGKILL)
            await lab.restart(name)
        node = next(host["ipv4"] for host in (await lab.status())["hosts"] if host["name"] == source)

        async def agent_is_ready() -> bool:
            return (await lab.exec("fabric", ["python3", "-c", _READY, f"http://{node}:9465/readyz"])).exit == 0

        await scenario.until("the agent has taken over", agent_is_ready)
        log = await asyncio.to_thread((lab.directory.path / "logs" / f"agent-{source}.log").read_text)
        assert "1 networks taken over" in log

        # And now it works: the stream that began before all of this runs on over the migration.
        await lab.kubectl("delete", "vmim", "--all", "-n", BLUE[0], "--wait=true", "--timeout=60s")
        await scenario.subresource(*BLUE, "migrate")
        await scenario.finished_migration()
        assert await scenario.vmi(*BLUE, "{.status.nodeName}") != source
        assert await scenario.addresses(await scenario.guest(*BLUE)) == addresses
        before = (await red.poll(stream)).stdout.count("\n")

        async def goes_on() -> bool:
            return (await red.poll(stream)).stdout.count("\n") >= before + 2

        await scenario.until("the stream goes on", goes_on)
        result = await red.finish(stream)
        assert result["resets"] == 0
        assert result["errors"] == 0
        claims = await scenario.claims()
        assert {claim["name"]: claim["ips"] for claim in claims}["blue-namespace/blue.happy"] == [
            f"{address}/16",
            next(text for text in addresses if ":" in text).split("/")[0] + "/64",
        ]


_READY = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)"
