"""What the lab needs of the machine, checked before anything is created.

The kernel is asked by doing: ``python -m vmnet.lab.prerequisites`` makes one of each device in throw-away namespaces.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from vmnet.lab import kubectl
from vmnet.lab.errors import LabError

PACKAGES: Final = {
    "ip": "iproute2",
    "bridge": "iproute2",
    "nft": "nftables",
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "gcc": "gcc",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "/usr/lib/cni/host-local": "containernetworking-plugins",
    "/usr/include/stdio.h": "libc6-dev",
    "tcpdump": "tcpdump",
    "conntrack": "conntrack",
    "curl": "curl",
    "ping": "iputils-ping",
}
"""Programs and files the lab uses, and the Debian packages they come from."""

MODULES: Final = (
    *("bridge", "veth", "vxlan", "tun", "br_netfilter", "kvm"),
    *("nf_tables", "nft_chain_nat", "nft_fwd_netdev", "nf_conntrack"),
)
NAMESPACES: Final = ("net", "mnt", "pid", "uts", "ipc", "user")
INSTALL: Final = "run: vmnet lab prerequisites --install"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is missing and what to do about it; ``package`` is the Debian package that brings it."""

    what: str
    remedy: str
    package: str = ""


def require() -> None:
    """Raises LabError that lists all problems; nothing has been created then."""
    problems = find_problems()
    if not problems:
        return
    what = "\n".join(f"  - {problem.what}" for problem in problems)
    remedies = dict.fromkeys(problem.remedy for problem in problems)
    raise LabError(f"this machine lacks what a lab needs:\n{what}", "; ".join(remedies))


def find_problems() -> list[Problem]:
    """All problems. When the first ones make the rest meaningless, only those."""
    if os.geteuid() != 0:
        return [Problem("root: network namespaces and links need it", "run as root (sudo)")]
    missing = [
        Problem(f"Linux {name} namespaces", "use a kernel with CONFIG_NAMESPACES and all its kinds")
        for name in NAMESPACES
        if not Path("/proc/self/ns", name).exists()
    ]
    if missing:
        return missing
    missing = missing_programs()
    if any(problem.package in ("iproute2", "nftables", "util-linux") for problem in missing):
        return missing
    load_modules()
    return [*missing, *_kernel_problems()]


def missing_programs() -> list[Problem]:
    """Programs that are not installed."""
    found = []
    for program, package in PACKAGES.items():
        present = Path(program).exists() if program.startswith("/") else shutil.which(program, path=_path())
        if not present:
            found.append(Problem(f"{program} (Debian package {package})", INSTALL, package))
    try:
        kubectl.find()
    except LabError as error:
        found.append(Problem(str(error), error.next_step))
    return found


def _path() -> str:
    # A user's PATH may lack the directories of administration programs.
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def load_modules() -> None:
    """Load what the kernel has as modules; in namespaces it would not do so by itself. Failures show in the probe."""
    if not Path("/proc/modules").exists() or shutil.which("modprobe", path=_path()) is None:
        return
    for module in MODULES:
        subprocess.run(["modprobe", "--quiet", module], check=False, timeout=20, env={**os.environ, "PATH": _path()})


def _kernel_problems() -> list[Problem]:
    """Ask the kernel for one of each device, in namespaces that end with the probe."""
    argv = ["unshare", "--fork", "--kill-child", "--pid", "--mount", "--net", "--uts", "--ipc", "--mount-proc", "--"]
    probe = subprocess.run(
        [*argv, sys.executable, "-m", "vmnet.lab.prerequisites"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        return [
            Problem(
                f"permission to make namespaces ({reason})",
                "run on a machine, or in a container with all capabilities and without a seccomp profile",
            )
        ]
    return [Problem(**item) for item in json.loads(probe.stdout)]


def probe() -> list[Problem]:
    """Called inside throw-away namespaces."""
    found = []
    for what, argv in (
        ("bridge", ["ip", "link", "add", "probe0", "type", "bridge"]),
        ("veth", ["ip", "link", "add", "probe1", "type", "veth", "peer", "name", "probe2"]),
        ("vxlan", ["ip", "link", "add", "probe3", "type", "vxlan", "id", "1", "dstport", "4789", "local", "127.0.0.1"]),
    ):
        if message := _failure(argv):
            found.append(
                Problem(f"kernel support for {what} links ({message})", f"load or build the kernel module {what}")
            )
    if message := _failure(["nft", "-f", "-"], _NFT_PROBE):
        found.append(
            Problem(
                f"kernel support for nftables ({message})",
                "load or build nf_tables, nft_chain_nat, nft_fwd_netdev, nf_conntrack",
            )
        )
    tun = Path("/dev/net/tun")
    if not tun.exists():
        found.append(
            Problem("/dev/net/tun: VMs need tap devices", "modprobe tun, or in a container pass the device in")
        )
    elif message := _failure(["ip", "tuntap", "add", "probe5", "mode", "tap"]):
        found.append(Problem(f"a usable /dev/net/tun ({message})", "give the container access to the device"))
    if not Path("/proc/sys/net/bridge").exists():
        found.append(
            Problem(
                "the kernel's bridge netfilter (/proc/sys/net/bridge)", "load or build the kernel module br_netfilter"
            )
        )
    return found


_NFT_PROBE: Final = """\
table inet probe {
  set known { type ether_addr; flags dynamic, timeout; }
  chain postrouting { type nat hook postrouting priority srcnat; ip saddr 10.0.0.0/8 snat ip to 192.0.2.1; }
  chain forward { type filter hook forward priority filter; ct state established accept; }
}
table netdev probe {
  chain ingress { type filter hook ingress device "probe1" priority 0; ether type arp accept; fwd to "probe2"; }
  chain egress { type filter hook egress device "probe1" priority 0; ether type arp accept; }
}
"""


def _failure(argv: Sequence[str], stdin: str = "") -> str:
    """The first line of the program's error message; empty when it succeeded."""
    done = subprocess.run(
        argv, input=stdin, capture_output=True, text=True, timeout=30, check=False, env={**os.environ, "PATH": _path()}
    )
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]


async def install(packages: Sequence[str], tell: Callable[[str], None]) -> None:
    """Install Debian packages; ``tell`` is given apt's lines. Raises LabError."""
    if shutil.which("apt-get") is None:
        raise LabError(
            f"no apt-get here to install {', '.join(packages)}", "install them with this machine's own package manager"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": _path()}
    for argv in (
        ["apt-get", "-q", "update"],
        ["apt-get", "-q", "install", "--yes", "--no-install-recommends", *packages],
    ):
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
        )
        last = ""
        if process.stdout is None:
            raise LabError("no pipe to apt-get")
        try:
            async with asyncio.timeout(900):
                async for line in process.stdout:
                    last = line.decode(errors="replace").rstrip()
                    tell(last)
                await process.wait()
        except TimeoutError:
            process.kill()
            raise LabError(f"{' '.join(argv[:3])} did not end within 15 minutes: {last}") from None
        if process.returncode != 0:
            raise LabError(f"{' '.join(argv)} failed: {last}", "see its messages above")


def main() -> None:
    """Entry point of the probe."""
    print(json.dumps([asdict(problem) for problem in probe()]))


if __name__ == "__main__":
    main()
