"""Agent and controller are killed while machines run; what they made goes on, and their successors take it over."""

import json
import re
import signal
from typing import Any

import pytest

from vmnet.lab.demo import BLUE, NETWORK
from vmnet.model import names
from vmnet.model.names import NetworkId

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

GREEN = (BLUE[0], "green")


async def links(world: Any, node: str) -> dict[str, int]:
    """Interfaces of the network on a node, with their numbers: one that was made anew has another."""
    metadata = (await world.get("cudn", NETWORK))["metadata"]
    number = NetworkId(int(metadata["annotations"][names.NETWORK_ID_ANNOTATION]))
    result = await world.lab.exec(node, ["ip", "-j", "-n", names.network_namespace(number), "link", "show"])
    assert result.exit == 0, result.stderr
    return {item["ifname"]: item["ifindex"] for item in json.loads(result.stdout)}


async def test_connections_do_not_notice_that_the_agent_was_killed(healthy: Any) -> None:
    world = healthy
    node, before = await world.node_of(BLUE), await world.facts(BLUE)
    agent = f"agent-{node}"
    made = await links(world, node)
    said = len(world.log(agent))
    async with world.traffic() as traffic:
        await world.lab.kill(agent, signal.SIGKILL)
        await world.lab.wait(agent)
        await world.goes_on(traffic)
        await world.lab.restart(agent)
        url = await world.agent_url(node)
        await world.until("the next agent is ready", lambda: world.answers(f"{url}/readyz"))
        await world.goes_on(traffic)
    for name, result in traffic.results.items():
        assert not result["errors"], (name, result)
        assert not result.get("resets"), (name, result)
        assert result["longest_gap_ms"] < 1000, (name, result)
    (taken,) = re.findall(rf"node {node}: (\d+) networks taken over", world.log(agent)[said:])
    assert int(taken) >= 1
    assert await links(world, node) == made
    assert await world.facts(BLUE) == before

    # The successor serves a migration away from its node like its predecessor.
    async with world.traffic() as traffic:
        assert await world.migration_ends(await world.migrate()) == "Succeeded"
        await world.goes_on(traffic)
    assert not any(result.get("resets") or result["errors"] for result in traffic.results.values()), traffic.results
    assert await world.node_of(BLUE) != node
    assert await world.facts(BLUE) == before


async def test_a_machine_made_while_the_controller_is_away_gets_its_addresses_when_it_is_back(healthy: Any) -> None:
    world = healthy
    blue = await world.get("vm", "-n", *BLUE)
    await world.lab.kill("controller", signal.SIGKILL)
    await world.lab.wait("controller")
    try:
        await world.apply(
            {
                "apiVersion": "kubevirt.io/v1",
                "kind": "VirtualMachine",
                "metadata": {"namespace": GREEN[0], "name": GREEN[1]},
                "spec": {"runStrategy": "Always", "template": {"spec": blue["spec"]["template"]["spec"]}},
            }
        )

        async def instances() -> Any:
            found = (await world.get("vmi", "-n", GREEN[0]))["items"]
            return [item for item in found if item["metadata"]["name"] == GREEN[1]]

        await world.until("green has an instance", instances)
        # Nobody vouches for a machine's pod meanwhile; a pod that is no machine's is created as ever.
        assert not await world.launchers(GREEN)
        plain = {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": GREEN[0], "name": "plain"}}
        await world.apply({**plain, "spec": {"containers": [{"name": "main", "image": "agnhost"}]}})
        await world.lab.kubectl("delete", "pod", "-n", GREEN[0], "plain", "--wait=false")
        await world.lab.restart("controller")
        addresses = await world.until("green runs", lambda: _addresses(world), 150)
        (pod,) = await world.launchers(GREEN)
        assert pod["metadata"]["annotations"][names.PRIMARY_CLAIM_ANNOTATION] == f"{GREEN[1]}.happy"
        taken = await world.facts(BLUE)
        assert not set(addresses) & set(taken["addresses"])
        claim = await world.get("ipamclaim", "-n", GREEN[0], f"{GREEN[1]}.happy")
        assert sorted(text.split("/")[0] for text in claim["status"]["ips"]) == sorted(
            text.split("/")[0] for text in addresses
        )
        # Names are the agents' business: blue's, on whichever node, knows the newcomer.
        guest = await world.scenario.guest(*BLUE)
        assert (await guest.run(["probe", "resolve", "green", "A"])).stdout.split() == [addresses[0].split("/")[0]]
    finally:
        statuses = {item["name"]: item for item in (await world.lab.status())["processes"]}
        if statuses["controller"]["exit"] is not None:
            await world.lab.restart("controller")
        await world.lab.kubectl("delete", "vm", "-n", *GREEN, "--wait=true", "--timeout=90s")

    async def released() -> bool:
        claims = (await world.get("ipamclaims", "-n", GREEN[0]))["items"]
        return [item["metadata"]["name"] for item in claims] == ["blue.happy"]

    await world.until("green's claim goes with it", released)


async def _addresses(world: Any) -> list[str]:
    """Green's addresses once it runs."""
    if (await world.scenario.vmi(*GREEN, "{.status.phase}")) != "Running":
        return []
    return list(await world.scenario.addresses(await world.scenario.guest(*GREEN)))
