"""Commands on pipes and on a terminal."""

import pytest

from vmnet.lab.errors import LabError
from vmnet.lab.lab import Lab
from vmnet.lab.workshop.commands import run


async def test_both_outputs_and_the_exit_status() -> None:
    lab = Lab("unused")
    outcome = await run(lab, "kubectl version --client")
    assert outcome.exit == 0
    assert "Client Version" in outcome.stdout
    outcome = await run(lab, "kubectl no-such-command")
    assert outcome.exit == 1
    assert "no-such-command" in outcome.stderr


async def test_a_terminal_shows_both_in_one() -> None:
    # ``-it`` is an option of kubectl's exec; here its refusal is what the terminal shows.
    outcome = await run(Lab("unused"), "kubectl version --client -it")
    assert outcome.exit != 0
    assert "unknown shorthand flag" in outcome.stdout
    assert "\r" not in outcome.stdout


async def test_nothing_else_is_run() -> None:
    with pytest.raises(LabError, match="kubectl's or a host's"):
        await run(Lab("unused"), "rm -rf x")
