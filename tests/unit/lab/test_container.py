"""What a manifest's security context means for a process."""

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
