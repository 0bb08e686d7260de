"""The kubelet's control group."""

from pathlib import Path

import pytest

from vmnet.kernel import cgroups

KUBELET = "0::/system.slice/kubelet.service\n"


def process(root: Path, pid: str, group: str, name: str, network: str) -> None:
    folder = root / pid
    (folder / "ns").mkdir(parents=True)
    (folder / "cgroup").write_text(group)
    (folder / "comm").write_text(f"{name}\n")
    target = root / f"net-{network}"
    target.touch()
    (folder / "ns" / "net").symlink_to(target)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc and a hierarchy of its own; this process is in the network namespace ``here``."""
    monkeypatch.setattr(cgroups, "PROCESSES", tmp_path / "proc")
    monkeypatch.setattr(cgroups, "MOUNT", tmp_path / "cgroup")
    (tmp_path / "cgroup" / "system.slice" / "kubelet.service").mkdir(parents=True)
    (tmp_path / "cgroup" / "kubelet.slice").mkdir()
    (tmp_path / "cgroup" / "cgroup.controllers").touch()
    process(tmp_path / "proc", "self", "0::/\n", "vmnet", "here")
    return tmp_path


def test_the_kubelet_of_this_network_namespace_is_found(machine: Path) -> None:
    assert cgroups.kubelet() is None
    process(machine / "proc", "10", KUBELET.replace("system", "other"), "kubelet", "elsewhere")
    process(machine / "proc", "11", "1:name=systemd:/x\n0::/system.slice/kubelet.service\n", "python3", "here")
    found = cgroups.kubelet()
    assert found is not None
    assert found.path == "system.slice/kubelet.service"
    assert found.inode == (machine / "cgroup" / found.path).stat().st_ino
    assert cgroups.kubelet("/kubelet.slice") == cgroups.at("kubelet.slice")


def test_a_kubelet_by_name_is_found_in_whatever_unit(machine: Path) -> None:
    process(machine / "proc", "12", "0::/kubelet.slice\n", "kubelet", "here")
    found = cgroups.kubelet()
    assert found is not None
    assert found.path == "kubelet.slice"


def test_what_holds_everything_tells_nothing(machine: Path) -> None:
    process(machine / "proc", "13", "0::/\n", "kubelet", "here")
    assert cgroups.kubelet() is None
    assert cgroups.kubelet("/") is None
    assert cgroups.kubelet("/no/such") is None
    (machine / "cgroup" / "cgroup.controllers").unlink()
    assert cgroups.kubelet("/kubelet.slice") is None
