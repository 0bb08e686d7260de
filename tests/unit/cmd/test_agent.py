import argparse

import pytest

from vmnet.agent.multus import Mode
from vmnet.cmd import agent, main, sources
from vmnet.model.configuration import Configuration


def settled(*words: str) -> Configuration:
    parser = argparse.ArgumentParser()
    agent.add_arguments(parser)
    return sources.settle(parser.parse_args(["--node-name", "n1", *words]), {}).configuration


def test_multus_is_looked_for_unless_the_administrator_says_otherwise() -> None:
    assert Mode(settled().agent.multus) is Mode.AUTO
    assert Mode(settled("--multus", "no").agent.multus) is Mode.NO
    assert str(settled().agent.cni_configurations) == "/etc/cni/net.d"


def test_physical_networks_have_bridges() -> None:
    found = settled("--localnet", "physnet=br-ex", "--localnet", "storage=br1").agent.localnets
    assert found == (("physnet", "br-ex"), ("storage", "br1"))


def test_an_agent_must_be_told_its_node(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NODE_NAME", raising=False)
    assert main.main(["agent"]) == main.MISUSED
    said = capsys.readouterr().err
    assert "agent.nodeName is not set: --node-name, or $VMNET_AGENT_NODE_NAME or $NODE_NAME" in said
