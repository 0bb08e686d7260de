"""Namespaces of the lab's hosts: a process that holds each, and the words that run a program in it.

``python -m vmnet.lab.nodes NAME DIRECTORY`` makes the namespaces, prepares the mounts, prints ``ready`` and sleeps.
"""

import asyncio
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmnet.lab import cgroups, namespaces, topology
from vmnet.lab.directory import LabDirectory
from vmnet.lab.errors import LabError

OWN_DIRECTORIES: Final = ("/etc/cni/net.d", "/opt/cni/bin", "/var/lib/cni")
"""What every node has to itself, besides /run."""


@dataclass(frozen=True, slots=True)
class Held:
    """A host's namespaces, by the process that holds them (a number of the lab's PID namespace)."""

    name: str
    pid: int

    @property
    def prefix(self) -> tuple[str, ...]:
        """Words before a command that shall run there."""
        base = f"/proc/{self.pid}/ns"
        return ("nsenter", f"--net={base}/net", f"--mount={base}/mnt", f"--uts={base}/uts", "--")


def private_run(directory: Path) -> None:
    """An empty /run for this mount namespace, with the lab's directory at its usual place. Raises OSError."""
    # The machine's named network namespaces would stay alive as long as this copy of their mounts.
    if " /run/netns " in Path("/proc/self/mountinfo").read_text():
        namespaces.unmount("/run/netns")
    # Prepared aside and then moved into place: afterwards the old /run cannot be reached any more.
    staging = directory / ".run"
    staging.mkdir(exist_ok=True)
    namespaces.mount("tmpfs", staging, "tmpfs", data="mode=0755")
    for name in ("netns", "vmnet", "lock"):
        (staging / name).mkdir()
    inner = staging / directory.relative_to("/run")
    inner.mkdir(parents=True)
    namespaces.bind(directory, inner)
    namespaces.mount(staging, "/run", flags=namespaces.MS_MOVE)


def prepare(name: str, directory: LabDirectory) -> None:
    """Turn this process into the holder of a host's namespaces. Raises OSError."""
    namespaces.unshare(namespaces.CLONE_NEWNET | namespaces.CLONE_NEWNS | namespaces.CLONE_NEWUTS)
    namespaces.make_mounts_private()
    socket.sethostname(name)
    cgroups.mount_sys()
    own = directory.node(name)
    for path in OWN_DIRECTORIES if name != topology.OUTSIDE else ():
        mine = own / path.lstrip("/").replace("/", "-")
        mine.mkdir(parents=True, exist_ok=True)
        namespaces.bind(mine, path)
    own.mkdir(parents=True, exist_ok=True)
    resolver = own / "resolv.conf"
    resolver.write_text(f"nameserver {topology.OUTSIDE_HOST.ipv4}\noptions timeout:1 attempts:2\n")
    if Path("/etc/resolv.conf").exists():
        namespaces.bind(resolver, Path("/etc/resolv.conf").resolve())
    private_run(directory.path)
    # As systemd makes it on a node: containers follow what is mounted in /run/netns.
    namespaces.mount("none", "/run", flags=namespaces.MS_SHARED)
    topology.set_sysctls(name)


def make_mount_points() -> None:
    """The places that nodes mount their own directories on; the machine may have no CNI and so not have them."""
    for path in OWN_DIRECTORIES:
        Path(path).mkdir(parents=True, exist_ok=True)


async def hold(name: str, directory: LabDirectory, timeout: float = 20) -> Held:
    """Start a holder and wait until its namespaces are prepared. Raises LabError with its message."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "vmnet.lab.nodes",
        name,
        str(directory.path),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    if process.stdout is None or process.stderr is None:
        raise LabError(f"host {name}: no pipe to its process")
    try:
        async with asyncio.timeout(timeout):
            line = await process.stdout.readline()
            if line != b"ready\n":
                errors = (await process.stderr.read()).decode(errors="replace")
                await process.wait()
                raise LabError(f"host {name} could not be made: {errors.strip()}")
    except TimeoutError:
        process.kill()
        raise LabError(f"host {name} was not made within {timeout:g} s") from None
    return Held(name, process.pid)


def main() -> None:
    """Entry point of the holder."""
    name, directory = sys.argv[1], LabDirectory(Path(sys.argv[2]))
    prepare(name, directory)
    print("ready", flush=True)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    # An interpreter's memory is not needed to hold namespaces.
    os.execvp("sleep", ["sleep", "infinity"])  # noqa: S606


if __name__ == "__main__":
    main()
