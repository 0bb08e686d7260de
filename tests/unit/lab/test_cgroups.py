"""Where the machine has cgroup v2, and the removal of what a lab left there."""

import subprocess
from pathlib import Path

import pytest

from vmnet.lab import cgroups

HYBRID = """\
24 18 0:21 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
30 24 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 24 0:30 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
"""
UNIFIED = "35 24 0:30 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup rw,nsdelegate\n"
PART = "35 24 0:30 /docker/4711 /sys/fs/cgroup rw,relatime - cgroup2 cgroup rw\n"


@pytest.mark.parametrize(
    ("mountinfo", "expected"),
    [
        (HYBRID, Path("/sys/fs/cgroup/unified")),
        (UNIFIED, Path("/sys/fs/cgroup")),
        (PART, None),
        (PART + HYBRID, Path("/sys/fs/cgroup/unified")),
        ("", None),
    ],
)
def test_the_hierarchy_is_found_where_it_is_mounted_whole(mountinfo: str, expected: Path | None) -> None:
    assert cgroups.hierarchy(mountinfo) == expected


def test_a_kubelet_has_a_cgroup_of_its_own_on_every_node_of_every_lab() -> None:
    assert str(cgroups.kubelet("mine", "n2")) == "/sys/fs/cgroup/vmnet-lab/mine/n2/kubelet.service"
    paths = {cgroups.kubelet(lab, node) for lab in ("a", "b") for node in ("n1", "n2")}
    assert len(paths) == 4


def test_this_process_is_no_kubelet() -> None:
    assert cgroups.pods() is None


def test_a_tree_is_removed_from_its_leaves_on(tmp_path: Path) -> None:
    (tmp_path / "lab" / "n1" / "kubelet.service").mkdir(parents=True)
    (tmp_path / "lab" / "n2" / "kubepods" / "uid").mkdir(parents=True)
    assert cgroups.remove(tmp_path / "lab") is True
    assert not (tmp_path / "lab").exists()
    assert cgroups.remove(tmp_path / "lab") is True


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    # A directory that is not empty refuses rmdir as a cgroup with processes does.
    (tmp_path / "lab" / "n1").mkdir(parents=True)
    (tmp_path / "lab" / "n1" / "busy").touch()
    assert cgroups.remove(tmp_path / "lab") is False
    assert (tmp_path / "lab" / "n1" / "busy").exists()


def test_a_command_writes_itself_into_the_cgroup_before_it_begins(tmp_path: Path) -> None:
    words = cgroups.entering(tmp_path)
    argv = [*words, "printf", "%s|", "a b", "$c"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "a b|$c|"
    assert (tmp_path / "cgroup.procs").read_text() == "0\n"
    assert cgroups.entering(None) == ()


def test_a_command_does_not_run_outside_the_cgroup_that_it_was_meant_for(tmp_path: Path) -> None:
    words = cgroups.entering(tmp_path / "gone")
    assert subprocess.run([*words, "true"], capture_output=True, check=False, timeout=30).returncode != 0
