"""What a manifest's security context means for a process."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmnet.lab import container
from vmnet.lab.errors import LabError
from vmnet.lab.init import AGENT, CONTROLLER


def test_the_containers_context_goes_before_its_pods() -> None:
    pod = {"securityContext": {"runAsUser": 1, "runAsGroup": 2}}
    assert container.context_of({"securityContext": {"runAsUser": 3}}, pod) == {"runAsUser": 3, "runAsGroup": 2}


@pytest.mark.parametrize("context", [{"privileged": True}])
def test_privileged_containers_are_refused(context: dict[str, Any]) -> None:
    with pytest.raises(LabError, match="privileged"):
        container.context_of({"securityContext": context}, {})


@pytest.mark.parametrize("found", [{}, {"capabilities": {"add": ["NET_RAW"]}}, {"capabilities": {"drop": ["CHOWN"]}}])
def test_a_runtimes_default_capabilities_are_refused(found: dict[str, Any]) -> None:
    with pytest.raises(LabError, match="default capabilities"):
        container.capabilities_of(found)


def test_user_and_capabilities_are_a_command() -> None:
    kept = {"drop": ["ALL"], "add": ["NET_RAW", "NET_ADMIN"]}
    assert container.identity({"runAsUser": 0, "capabilities": kept}) == [
        *("setpriv", "--bounding-set=-all,+net_admin,+net_raw", "--inh-caps=-all", "--")
    ]
    none = {"runAsUser": 7, "capabilities": {"drop": ["ALL"]}, "allowPrivilegeEscalation": False}
    assert container.identity(none) == [
        *("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--reuid=7", "--regid=7", "--clear-groups"),
        *("--no-new-privs", "--"),
    ]


def test_the_command_is_the_manifests() -> None:
    assert container.command_of({"command": ["nice", "vmnet"]}, ["python", "-m", "x"]) == ["nice", "python", "-m", "x"]
    assert container.command_of({}, ["python"]) == ["python"]
    with pytest.raises(LabError, match="starts sh"):
        container.command_of({"command": ["sh"]}, [])


def test_our_manifests_are_understood() -> None:
    agent, controller = (container.context_of(*container.container_of(path)) for path in (AGENT, CONTROLLER))
    assert "SYS_ADMIN" in container.capabilities_of(agent)
    assert container.capabilities_of(controller) == []
    assert container.identity(controller)[-2:] == ["--no-new-privs", "--"]


REVEAL = """
import os, sys
from pathlib import Path
from vmnet.lab import container
paths = [Path(text) for text in sys.argv[1:]]
container.make_mounts({}, {}, paths)
os.setgid(65532); os.setuid(65532)
print([(path / "here").read_text() for path in paths])
"""


@pytest.fixture
def closed() -> Iterator[Path]:
    """A directory that only its owner may enter, and not below /tmp."""
    with tempfile.TemporaryDirectory(dir="/run") as name:
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_tree_is_seen_by_everybody_wherever_it_is(tmp_path: Path, closed: Path) -> None:
    """Below /tmp, which containers have for themselves; below a directory that is its owner's; and one in another."""
    paths = [tmp_path / "open", closed / "tree", closed / "tree" / "inner", closed / "other" / "deep"]
    for path in paths:
        path.mkdir(parents=True)
        (path / "here").write_text(path.name)
    repository = Path(container.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", REVEAL, *map(str, paths)], cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([path.name for path in paths])
