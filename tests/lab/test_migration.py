"""Live migrations of blue under traffic from red: one that works, and ones that are cut off in the middle."""

import json
from typing import Any

import pytest

from vmnet.lab.demo import BLUE, NETWORK, STALL_LIMIT_MS
from vmnet.lab.virt import kinds
from vmnet.model import names

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

CONTROLLER = "http://127.0.0.1:9411/metrics"
CLOCK_READING = 0.005
"""Seconds: QEMU tells its own times, and wall and monotonic clock are read one after the other."""
NETWORK_NAME = names.cudn_network_name(NETWORK)


def untouched(results: dict[str, dict[str, Any]], stall_ms: float) -> None:
    """No stream was reset, nothing stood still for longer."""
    for name, result in results.items():
        assert not result["errors"], (name, result)
        assert not result.get("resets"), (name, result)
        assert result["longest_gap_ms"] <= stall_ms, (name, result)
    assert not results["probe"]["duplicates"]


async def occurrences(world: Any, reason: str) -> int:
    """How often an event was recorded, however the API folds repetitions."""
    return sum(int(item.get("count") or 1) for item in await world.events(BLUE[0], reason))


async def record(world: Any) -> dict[str, Any]:
    """What the controller wrote about blue's last migration."""
    annotations = (await world.get("vmi", "-n", *BLUE))["metadata"]["annotations"]
    return dict(json.loads(annotations.get(names.MIGRATION_RECORD_ANNOTATION, "{}")))


async def test_a_migrated_machine_keeps_its_addresses_and_its_connections(healthy: Any) -> None:
    world = healthy
    before, source = await world.facts(BLUE), await world.node_of(BLUE)
    agents = {node: await world.agent_url(node) for node in ("n1", "n2", "n3")}
    series = {"namespace": BLUE[0], "name": BLUE[1], "network": NETWORK_NAME}
    sent = {
        node: {
            kind: await world.metric(f"{url}/metrics", "vmnet_announcements_total", **series, kind=kind)
            for kind in ("garp", "na", "ra")
        }
        for node, url in agents.items()
    }
    cut_overs = {
        node: await world.metric(f"{url}/metrics", "vmnet_migration_cut_over_seconds_count", **series)
        for node, url in agents.items()
    }
    migrated = await world.metric(CONTROLLER, "vmnet_migrations_total", **series, outcome="succeeded")
    events = await occurrences(world, "NetworkMigrated")

    async with world.traffic() as traffic:
        migration = await world.migrate()
        assert await world.migration_ends(migration) == "Succeeded"
        target = await world.node_of(BLUE)
        assert target != source
        await world.goes_on(traffic)
    untouched(traffic.results, STALL_LIMIT_MS)
    assert await world.facts(BLUE) == before

    async def cut_over() -> str:
        annotations = (await world.launcher(BLUE))["metadata"]["annotations"]
        return str(annotations.get(names.CUT_OVER_ANNOTATION, ""))

    seen = json.loads(await world.until("the target's agent says what it saw", cut_over))
    assert (seen["key"], seen["node"]) == ("frame", target)
    # Red's streams never rest: a port that is open carries a frame to blue in no time.
    assert seen["opened_at"] <= seen["first_frame_at"] < seen["opened_at"] + STALL_LIMIT_MS / 1000
    assert seen["announcements"] > 0

    async def counted() -> bool:
        found = await world.metric(CONTROLLER, "vmnet_migrations_total", **series, outcome="succeeded")
        return bool(found == migrated + 1)

    await world.until("the controller has counted the migration", counted)
    assert await occurrences(world, "NetworkMigrated") == events + 1
    written = await record(world)
    assert written["outcome"] == "succeeded"
    assert (written["from"]["node"], written["to"]["node"]) == (source, target)
    assert written["cutOver"]["key"] == "frame"
    assert written["addresses"] == [text.split("/")[0] for text in before["addresses"]]

    # Blue never rests either: what its ports saw holds QEMU's own pause, and ends when the first frame is through.
    assert written["cutOver"]["connections"]["way"] in ("streamed", "late")
    error = written["cutOver"]["lastFrameError"]
    paused = float((await world.get("vmi", "-n", *BLUE))["metadata"]["annotations"][kinds.PAUSE_ANNOTATION]) / 1000
    assert written["pauseSeconds"] >= paused - error - CLOCK_READING, written
    assert written["blackoutSeconds"] >= written["pauseSeconds"], written
    assert written["deliverySeconds"] <= written["blackoutSeconds"] + error, written

    url = f"{agents[target]}/metrics"
    count = await world.metric(url, "vmnet_migration_cut_over_seconds_count", **series, node=target, key="frame")
    assert count == cut_overs[target] + 1
    for part in ("pause", "blackout", "delivery"):
        assert await world.metric(url, f"vmnet_migration_{part}_seconds_count", **series, node=target) >= 1, part
    for kind, number in sent[target].items():
        now = await world.metric(url, "vmnet_announcements_total", **series, kind=kind)
        assert now > number, kind


EDGE = {
    "send, IPv4": ["send", "172.30.0.100", "7008", "400"],
    "receive, IPv4": ["receive", "172.30.0.100", "7009", "400"],
    "send, IPv6": ["send", "fd00:30::100", "7008", "400"],
    "receive, IPv6": ["receive", "fd00:30::100", "7009", "400"],
}


async def test_connections_to_the_outside_stay_with_their_node_wherever_the_machine_goes(healthy: Any) -> None:
    """Their translation is in one node's conntrack: what the machine sends goes back there, from every node."""
    world = healthy
    visited = [await world.node_of(BLUE)]
    async with world.streams(await world.scenario.guest(*BLUE), EDGE) as traffic:
        while len(visited) < 4:
            migration = await world.migrate()
            assert await world.migration_ends(migration) == "Succeeded"
            visited.append(await world.node_of(BLUE))
            assert visited[-1] != visited[-2]
            # Its console went along.
            traffic.guest = await world.scenario.guest(*BLUE)
            await world.goes_on(traffic)
        # What is new begins where the machine is.
        fresh = await traffic.guest.run(["probe", "send", "172.30.0.100", "7008", "1"])
        assert json.loads(fresh.stdout)["bytes"] > 0
    for name, result in traffic.results.items():
        assert not result["errors"], (visited, name, result)
        assert not result.get("resets"), (visited, name, result)
        assert result["longest_gap_ms"] <= STALL_LIMIT_MS, (visited, name, result)


async def kill_target(world: Any, source: str, migration: str) -> None:
    """Kill QEMU in the pod that receives the guest."""
    uid = (await world.get("vmim", "-n", BLUE[0], migration))["metadata"]["uid"]
    pods = await world.launchers(BLUE)
    (pod,) = [pod for pod in pods if pod["metadata"]["labels"].get(names.MIGRATION_JOB_LABEL) == uid]
    node = pod["spec"]["nodeName"]
    assert node != source
    found = await world.lab.exec(node, ["pgrep", "-f", f"^\\S*qemu-system.*{pod['metadata']['uid']}"])
    assert found.exit == 0, f"no QEMU in {pod['metadata']['name']}: {found}"
    assert (await world.lab.exec(node, ["kill", "-KILL", *found.stdout.split()])).exit == 0


@pytest.mark.parametrize("how", ["target killed", "cancelled"])
async def test_after_a_failed_migration_the_machine_goes_on_where_it_was(
    healthy: Any, a_slow_link: dict[str, Any], how: str
) -> None:
    world = healthy
    before, source = await world.facts(BLUE), await world.node_of(BLUE)
    pod = await world.launcher(BLUE)
    async with world.traffic() as traffic:
        await world.apply(a_slow_link)
        try:
            migration = await world.migrate()

            async def halfway() -> bool:
                phase = await world.phase(migration)
                assert phase not in ("Succeeded", "Failed", "gone"), phase
                state = (await world.get("vmi", "-n", *BLUE))["status"].get("migrationState", {})
                job = (await world.get("vmim", "-n", BLUE[0], migration))["metadata"]["uid"]
                return bool(phase == "Running" and state.get("migrationUid") == job and state.get("startTimestamp"))

            await world.until("the guest's memory is on its way", halfway)
            if how == "cancelled":
                await world.lab.kubectl("delete", "vmim", "-n", BLUE[0], migration, "--wait=false")
            else:
                await kill_target(world, source, migration)
            assert await world.migration_ends(migration) in ("Failed", "gone")
        finally:
            await world.lab.kubectl("delete", "migrationpolicy", "slow")
        assert await world.node_of(BLUE) == source
        assert (await world.launcher(BLUE))["metadata"]["uid"] == pod["metadata"]["uid"]
        await world.goes_on(traffic)
        assert await world.facts(BLUE) == before

        async def told() -> bool:
            return bool((await record(world)).get("outcome") == "failed")

        await world.until("the failure is on record", told)
        await world.event(BLUE[0], "NetworkMigrationFailed", BLUE[1], f"stays on {source}")

        again = await world.migrate()
        assert await world.migration_ends(again) == "Succeeded"
        await world.goes_on(traffic)
    untouched(traffic.results, STALL_LIMIT_MS)
    assert await world.node_of(BLUE) != source
    assert await world.facts(BLUE) == before
