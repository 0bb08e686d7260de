"""The scenario against its manifests and its own rules; that it holds is shown by tests/lab/test_workshop.py."""

import re
import shlex

import pytest
import yaml

from vmnet.lab.errors import LabError
from vmnet.lab.workshop.commands import MANIFESTS
from vmnet.lab.workshop.run import chosen
from vmnet.lab.workshop.scenario import SECTIONS
from vmnet.lab.workshop.steps import Step

STEPS = [step for section in SECTIONS for step in section.steps]
HOSTS = {"n1", "n2", "n3", "outside"}
KNOWN = re.compile(
    r"<(udn6?|udns|eth0|net[12]|node|hostip|freeip|cluster6?|balancer6?|port|health):[a-z0-9-]+/[a-z0-9=-]+>"
)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.title)
def test_each_command_can_be_carried_out(step: Step) -> None:
    host, sign, rest = step.command.partition("# ")
    words = shlex.split(rest if sign and "kubectl" not in host else step.command)
    assert words[0] == "kubectl" or host in HOSTS or KNOWN.fullmatch(host), step.command
    for text in (step.command, *step.check.texts_of()):
        assert not re.search(r"<[a-z0-9]+:", KNOWN.sub("", text)), text
    for name in re.findall(r"-f (\S+\.yaml)", step.command):
        assert (MANIFESTS / name).exists(), name


def test_every_manifest_is_used_and_well_formed() -> None:
    used = {name for step in STEPS for name in re.findall(r"-f (\S+\.yaml)", step.command)}
    assert used == {path.name for path in MANIFESTS.iterdir()}
    for name in used:
        for item in yaml.safe_load_all((MANIFESTS / name).read_text()):
            assert {"apiVersion", "kind", "metadata"} <= set(item), name


def test_each_step_says_what_it_expects() -> None:
    assert all(step.title and step.expectation for step in STEPS)


def test_sections_are_numbered_in_order_and_come_after_earlier_ones() -> None:
    numbers = [section.number for section in SECTIONS]
    assert numbers == list(range(len(SECTIONS)))
    assert all(number < section.number for section in SECTIONS for number in section.after)


def test_a_section_brings_what_it_needs() -> None:
    assert [section.number for section in chosen(SECTIONS, [6])] == [0, 3, 6]
    assert chosen(SECTIONS, []) == list(SECTIONS)
    with pytest.raises(LabError, match="no section 99"):
        chosen(SECTIONS, [99])
