"""QEMU: its command line, the choice of accelerator, and a live migration from monitor to monitor."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmnet.lab.errors import LabError
from vmnet.lab.guest import packages
from vmnet.lab.guest.image import GuestImage
from vmnet.lab.virt.qmp import Event, QemuError, Qmp

PROGRAM: Final = "qemu-system-x86_64"
GUESTS_FIRST: Final = ("nice", "-n", "-15")
"""A lab's nodes share the processors that each would have to itself: the cluster's own work waits for guests and what
measures them, not they for it."""
MACHINE: Final = "pc-q35-7.2"
"""Named by version, so that both ends of a migration are sure to be the same machine."""
MINIMUM_MEMORY_MIB: Final = 96
_MEMORY_STEP_KIB: Final = 8
"""QEMU rounds a guest's memory up to a multiple of this."""
KVM_BOOT_LIMIT: Final = 10.0
READY: Final = b"guest ready"
"""What the guest says on its console when its init is done."""

QMP_SOCKET: Final = "qmp.sock"
"""Monitor for virt-handler; the launcher has its own, because a monitor serves one client at a time."""
LAUNCHER_QMP_SOCKET: Final = "launcher-qmp.sock"
API_QMP_SOCKET: Final = "api-qmp.sock"
"""Monitor for the subresources (pause, unpause)."""
CONSOLE_SOCKET: Final = "console.sock"
AGENT_SOCKET: Final = "agent.sock"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """``name``: kvm or tcg; ``reason`` says in words how that was found."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Card:
    """A further network card: the tap device it is on, in the network namespace QEMU runs in; ``mtu`` in octets."""

    tap: str
    mac: str
    mtu: int


@dataclass(frozen=True, slots=True)
class Machine:
    """One guest. Sockets and logs go to ``directory``; ``mtu`` in octets; ``incoming``: wait for a migration.

    ``tap``: name of the tap device in the network namespace QEMU runs in; None for no network.
    """

    name: str
    directory: Path
    image: GuestImage
    accelerator: str
    memory_mib: int = 128
    mac: str = "02:00:00:00:00:01"
    tap: str | None = None
    mtu: int = 1500
    uuid: str = ""
    incoming: bool = False
    kernel_arguments: tuple[str, ...] = ()
    console_socket: str = CONSOLE_SOCKET
    agent_socket: str = AGENT_SOCKET
    more_cards: tuple[Card, ...] = ()
    """After the one that ``tap`` describes."""

    @property
    def cards(self) -> tuple[Card, ...]:
        """All network cards, in the guest's order."""
        first = () if self.tap is None else (Card(self.tap, self.mac, self.mtu),)
        return (*first, *self.more_cards)


def command_line(machine: Machine) -> list[str]:
    """What starts ``machine``."""
    place = machine.directory
    arguments = [
        PROGRAM,
        *("-name", machine.name),
        *("-machine", MACHINE),
        *("-accel", machine.accelerator),
        *("-cpu", "host" if machine.accelerator == "kvm" else "max"),
        *("-smp", "1"),
        *("-m", f"{memory_kib(machine)}k"),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-kernel", str(machine.image.kernel)),
        *("-initrd", str(machine.image.initramfs)),
        *("-append", " ".join(kernel_arguments(machine))),
        *_socket("console", place / machine.console_socket, logfile=place / "console.log"),
        *("-serial", "chardev:console"),
        *("-device", "virtio-serial-pci"),
        *_socket("agent", place / machine.agent_socket),
        *("-device", "virtserialport,chardev=agent,name=vmnet.agent"),
        *_socket("qmp", place / QMP_SOCKET),
        *("-mon", "chardev=qmp,mode=control"),
        *_socket("launcher", place / LAUNCHER_QMP_SOCKET),
        *("-mon", "chardev=launcher,mode=control"),
        *_socket("api", place / API_QMP_SOCKET),
        *("-mon", "chardev=api,mode=control"),
    ]
    if machine.uuid:
        arguments += ["-uuid", machine.uuid]
    for number, card in enumerate(machine.cards):
        arguments += [
            *("-netdev", f"tap,id=net{number},ifname={card.tap},script=no,downscript=no"),
            # romfile: no network boot, so no option ROM has to be loaded or migrated.
            *("-device", f"virtio-net-pci,netdev=net{number},mac={card.mac},host_mtu={card.mtu},romfile="),
        ]
    if machine.incoming:
        arguments += ["-incoming", "defer"]
    return arguments


def memory_kib(machine: Machine) -> int:
    """The guest's memory in KiB; with TCG a little more than asked for, or its migrations would lose writes.

    QEMU 7.2 reads the dirty bitmap of a block of whole 256 KiB (64 pages, a word of the bitmap) by a short cut that
    does not reset the TLB of an emulated processor, so later writes to pages it has open are not noticed. A block that
    ends in the middle of a word is read the long way, which does.
    """
    size = max(machine.memory_mib, MINIMUM_MEMORY_MIB) * 1024
    return size + _MEMORY_STEP_KIB if machine.accelerator == "tcg" else size


def kernel_arguments(machine: Machine) -> list[str]:
    """The guest's kernel command line."""
    return ["console=ttyS0", "quiet", "net.ifnames=0", f"vmnet.hostname={machine.name}", *machine.kernel_arguments]


def _socket(name: str, path: Path, logfile: Path | None = None) -> list[str]:
    # A comma in a value is doubled (QEMU's option syntax).
    value = f"socket,id={name},path={str(path).replace(',', ',,')},server=on,wait=off"
    if logfile is not None:
        value += f",logfile={str(logfile).replace(',', ',,')}"
    return ["-chardev", value]


# The accelerator


def choose_accelerator(image: GuestImage) -> Accelerator:
    """KVM if a guest boots with it within ``KVM_BOOT_LIMIT`` seconds, else TCG. The answer is kept for this machine."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Accelerator("tcg", "there is no /dev/kvm")
    if shutil.which(PROGRAM) is None:
        raise LabError(f"{PROGRAM} is not installed", "run: vmnet lab prerequisites --install")
    cache = packages.cache_directory()
    path = cache / f"accelerator-{_machine_identity(image)}.json"
    with packages.locked(cache):
        try:
            found = json.loads(path.read_text())
            return Accelerator(found["name"], found["reason"])
        except (FileNotFoundError, ValueError, KeyError):
            pass
        found = _try_kvm(image)
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(json.dumps({"name": found.name, "reason": found.reason}) + "\n")
        temporary.rename(path)
        return found


def _machine_identity(image: GuestImage) -> str:
    """Changes when the kernel here, this boot of it, QEMU or the guest changes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    version = packages.run([PROGRAM, "--version"])
    return hashlib.sha256(f"{os.uname()}{boot}{version}{image.identity}".encode()).hexdigest()[:16]


def _try_kvm(image: GuestImage) -> Accelerator:
    with tempfile.TemporaryDirectory(prefix="vmnet-kvm-") as text:
        machine = Machine("kvm", Path(text), image, "kvm")
        process = subprocess.Popen(
            command_line(machine), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            log = Path(text) / "console.log"
            if _says_ready(process, log):
                return Accelerator("kvm", "a guest boots with it")
            if process.poll() is not None:
                errors = process.stderr.read() if process.stderr else b""
                words = errors.decode(errors="replace").strip().splitlines() or ["no message"]
                return Accelerator("tcg", f"QEMU cannot use KVM: {words[-1]}")
            return Accelerator("tcg", f"a guest did not boot with KVM within {KVM_BOOT_LIMIT:g} s")
        finally:
            process.kill()
            process.wait()
            if process.stderr:
                process.stderr.close()


def _says_ready(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Follow the console's log until the guest is up, QEMU ends, or the time is over."""
    waited = 0.0
    while waited < KVM_BOOT_LIMIT:
        if log.exists() and READY in log.read_bytes():
            return True
        try:
            process.wait(timeout=0.1)
            return False
        except subprocess.TimeoutExpired:
            waited += 0.1
    return False


# Migration

POST_COPY: Final = "postcopy-ram"
ENDED: Final = ("completed", "failed", "cancelled", "postcopy-paused")
"""States that a migration does not leave by itself; the last is what a post-copy is in whose connection broke."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to migrate. ``downtime_ms``: the longest pause aimed at; ``bandwidth``: octets a second, 0 for no limit."""

    post_copy: bool = False
    downtime_ms: int = 50
    bandwidth: int = 0
    auto_converge: bool = False


async def _configure(monitor: Qmp, settings: Settings) -> None:
    wanted = {"events": True, POST_COPY: settings.post_copy, "auto-converge": settings.auto_converge}
    await monitor.execute(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": state} for name, state in wanted.items()],
    )
    # The announcements of the target (QEMU's RARPs) keep their defaults: at 0, 50, 200, 450 and 800 ms.
    parameters: dict[str, Any] = {"downtime-limit": settings.downtime_ms}
    # QEMU 7.2 takes 0 as a limit, and starts with one of 128 MiB/s.
    parameters["max-bandwidth"] = settings.bandwidth or 2**40
    await monitor.execute("migrate-set-parameters", **parameters)


async def receive(monitor: Qmp, connection: socket.socket, settings: Settings = Settings()) -> None:
    """Let a QEMU that was started with ``incoming`` read its guest from ``connection``. Raises QemuError.

    QEMU gets the socket itself, so neither end of the stream passes through this process.
    """
    await _configure(monitor, settings)
    await monitor.execute("getfd", connection.fileno(), fdname="migration")
    await monitor.execute("migrate-incoming", uri="fd:migration")


async def send(monitor: Qmp, connection: socket.socket, settings: Settings = Settings()) -> None:
    """Start sending a running guest over ``connection``; ``finished`` waits for its end. Raises QemuError."""
    await _configure(monitor, settings)
    await monitor.execute("getfd", connection.fileno(), fdname="migration")
    await monitor.execute("migrate", uri="fd:migration")


def is_migration(event: Event, *states: str) -> bool:
    """Whether it reports one of these states of a migration."""
    return event.name == "MIGRATION" and event.data.get("status") in states


async def allow_downtime(monitor: Qmp, milliseconds: int) -> None:
    """Let a running migration pause the guest for longer, so that it comes to an end. Raises QemuError."""
    await monitor.execute("migrate-set-parameters", **{"downtime-limit": milliseconds})


async def finished(monitor: Qmp, timeout: float, since: int = 0) -> str:
    """The state a migration ends in, one of ``ENDED``. Raises QemuError at the timeout."""
    event = await monitor.wait_for(lambda event: is_migration(event, *ENDED), timeout, since=since)
    return str(event.data["status"])


async def migration_status(monitor: Qmp) -> str:
    """The state of the newest migration; empty when there was none. Raises QemuError."""
    return str((await monitor.execute("query-migrate")).get("status") or "")


async def failure(monitor: Qmp) -> str:
    """QEMU's words for the migration that failed."""
    try:
        state = await monitor.execute("query-migrate")
    except QemuError as error:
        return str(error)
    return str(state.get("error-desc") or state.get("status") or "no message")


async def start(machine: Machine, prefix: Sequence[str] = ()) -> asyncio.subprocess.Process:
    """Start QEMU; ``prefix`` enters a namespace first. Its words go to ``qemu.log`` in the machine's directory."""
    machine.directory.mkdir(parents=True, exist_ok=True)
    log = os.open(machine.directory / "qemu.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # A guest without its launcher would run on with nobody to answer for it.
        leash = ("setpriv", "--pdeathsig", "KILL", "--")
        argv = [*leash, *GUESTS_FIRST, *prefix, *command_line(machine)]
        return await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log)
    finally:
        os.close(log)


async def end(process: asyncio.subprocess.Process, timeout: float = 5) -> int:
    """SIGTERM, then SIGKILL; returns the exit status."""
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout):
                await process.wait()
        except TimeoutError:
            process.kill()
    return await process.wait()
