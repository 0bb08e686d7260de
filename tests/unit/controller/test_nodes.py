from typing import Any

from vmnet.kube.api import NODES, Conflict
from vmnet.model import names


async def test_every_node_has_a_number_of_its_own(world: Any) -> None:
    for name in ("n1", "n2", "n3"):
        world.node(name)
    async with world.controller():
        await world.until(lambda: world.number("n1") and world.number("n2") and world.number("n3"))
        world.node("n4")
        await world.until(lambda: world.number("n4"))
    assert sorted(world.number(f"n{number}") for number in (1, 2, 3, 4)) == [1, 2, 3, 4]


async def test_numbers_that_are_written_down_are_kept(world: Any) -> None:
    world.node("n1", 7)
    world.node("n2")
    async with world.controller() as controller:
        assert await world.until(lambda: world.number("n2")) == 8
        # A node that comes with a number, as one that was restored.
        world.node("n3", 20)
        world.node("n4")
        assert await world.until(lambda: world.number("n4"))
        await world.settled(controller)
    assert world.number("n1") == 7
    assert world.number("n3") == 20


async def test_of_two_nodes_with_one_number_the_older_keeps_it(world: Any) -> None:
    world.node("a-younger", 3, creationTimestamp="2026-11-23T10:00:00Z")
    world.node("b-older", 3, creationTimestamp="2026-11-23T09:00:00Z")
    async with world.controller():
        assert await world.until(lambda: world.number("a-younger") != 3 and world.number("a-younger")) == 4
    assert world.number("b-older") == 3


async def test_a_number_that_somebody_changes_or_removes_is_written_again(world: Any) -> None:
    world.node("n1")
    async with world.controller() as controller:
        await world.until(lambda: world.number("n1") == 1)
        for value in ("9", None, "none"):
            await world.kube.patch(NODES, "n1", {"metadata": {"annotations": {names.NODE_NUMBER_ANNOTATION: value}}})
            await world.settled(controller)
            assert world.kube.peek(NODES, "n1")["metadata"]["annotations"][names.NODE_NUMBER_ANNOTATION] == "1"


async def test_the_number_of_a_node_that_is_gone_is_given_late(world: Any) -> None:
    world.node("n1")
    async with world.controller() as controller:
        await world.until(lambda: world.number("n1"))
        world.kube.vanish(NODES, "n1")
        await world.settled(controller)
        world.node("n2")
        assert await world.until(lambda: world.number("n2")) == 2


async def test_a_write_that_met_another_is_tried_again(world: Any) -> None:
    world.node("n1")
    patch, refused = world.kube.patch, 0

    async def contested(resource: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal refused
        if resource is NODES and refused < 2:
            refused += 1
            assert arguments[1]["metadata"]["resourceVersion"]
            raise Conflict("somebody was faster")
        return await patch(resource, *arguments, **more)

    world.kube.patch = contested
    async with world.controller():
        assert await world.until(lambda: world.number("n1")) == 1
    assert refused == 2
