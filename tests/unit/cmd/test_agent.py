import argparse

import pytest

from vmnet.agent.multus import Mode
from vmnet.cmd import agent


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    agent.add_arguments(parser)
    return parser.parse_args(["--node-name", "n1", *words])


def test_multus_is_looked_for_unless_the_administrator_says_otherwise() -> None:
    assert Mode(arguments().multus) is Mode.AUTO
    assert Mode(arguments("--multus", "no").multus) is Mode.NO
    assert str(arguments().cni_configurations) == "/etc/cni/net.d"


def test_physical_networks_have_bridges() -> None:
    found = arguments("--localnet", "physnet=br-ex", "--localnet", "storage=br1").localnet
    assert found == [("physnet", "br-ex"), ("storage", "br1")]


@pytest.mark.parametrize("text", ["physnet", "=br0", "physnet=", "physnet=a-name-that-is-too-long"])
def test_what_is_no_mapping_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("--localnet", text)
    assert "--localnet" in capsys.readouterr().err
