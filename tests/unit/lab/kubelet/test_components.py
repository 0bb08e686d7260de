"""Pods of the lab's processes, as the API sees them."""

import os
import time
from pathlib import Path

import pytest

from vmnet.lab.container import CREDENTIALS
from vmnet.lab.directory import LabDirectory
from vmnet.lab.errors import LabError
from vmnet.lab.kubelet.components import ANNOTATION, ComponentPod, components, pod_of

ADDRESSES = ("172.30.0.11", "fd00:30::11")


def agent(directory: Path, **process: object) -> ComponentPod:
    """The agent of n1, whose process is so."""
    (component, _) = components("n1")
    pod = pod_of(component, "n1", "node-uid", "vmnet-system")
    pod["metadata"]["uid"] = "uid"
    facts = {"pid": os.getpid(), "seconds": 10.0, "exit": None, "starts": 1, **process}
    return ComponentPod(component, LabDirectory(directory), pod, facts)


def test_each_node_shows_its_agent_and_the_first_the_controller() -> None:
    assert [item.process for item in components("n1")] == ["agent-n1", "controller"]
    assert [item.process for item in components("n2")] == ["agent-n2"]
    assert components("elsewhere") == ()


def test_pods_are_those_of_the_manifests() -> None:
    made = [pod_of(item, "n1", "uid", "vmnet-system") for item in components("n1")]
    names = [item["metadata"]["name"] for item in made]
    assert names == ["vmnet-agent-n1", "vmnet-controller-n1"]
    for item, process in zip(made, ("agent-n1", "controller"), strict=True):
        name = item["metadata"]["name"].removesuffix("-n1")
        assert item["metadata"]["labels"]["app.kubernetes.io/name"] == name
        assert item["metadata"]["annotations"][ANNOTATION] == process
        assert item["spec"]["serviceAccountName"] == name
        assert item["spec"]["nodeName"] == "n1"
        # Volumes of a node's directories mean nothing for a process that sees them all.
        assert "volumes" not in item["spec"]


def test_a_pod_is_as_ready_as_its_process(tmp_path: Path) -> None:
    entry = agent(tmp_path)
    entry.ready = True
    now = time.time()
    found = entry.status(ADDRESSES, now)
    assert found["phase"] == "Running"
    assert found["podIP"] == "172.30.0.11"
    assert {item["type"]: item["status"] for item in found["conditions"]}["Ready"] == "True"
    entry.pod["status"] = found
    assert entry.status(ADDRESSES, now + 5) == found  # nothing to write
    entry.process = {"pid": 1, "seconds": 12.0, "exit": -9, "starts": 3}
    entry.ready = False
    ended = entry.status(ADDRESSES, now + 10)
    (container,) = ended["containerStatuses"]
    assert container["restartCount"] == 2
    assert container["state"]["terminated"]["exitCode"] == 137
    assert {item["type"]: item["status"] for item in ended["conditions"]}["Ready"] == "False"
    entry.pod["status"] = ended
    assert entry.status(ADDRESSES, now + 99)["containerStatuses"] == ended["containerStatuses"]


def test_what_is_executed_has_the_environment_and_the_account_of_the_process(tmp_path: Path) -> None:
    entry = agent(tmp_path)
    assert entry.container_environment("agent")["PATH"] == os.environ["PATH"]
    assert entry.container_environment("agent")["KUBECONFIG"] == CREDENTIALS
    entry.directory.account("agent-n1").touch()
    assert f"{tmp_path / 'agent-n1.kubeconfig'}={CREDENTIALS}" in entry.entering
    assert str(entry.component.manifest) in entry.entering
    assert entry.runs("agent")
    entry.process = {"pid": 2**22 + 1, "seconds": 1.0, "exit": 0, "starts": 1}
    assert not entry.runs("agent")
    with pytest.raises(LabError, match="process agent-n1 has ended"):
        entry.container_environment("agent")
