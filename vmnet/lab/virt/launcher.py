"""virt-launcher's role, the process of a machine's pod: wires the network, runs QEMU, ends with it.

virt-handler drives QEMU through ``qmp.sock`` in the pod's directory. Exit status: 0 when the guest was shut down,
stopped or migrated away, 1 when QEMU failed.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from vmnet.lab.errors import LabError
from vmnet.lab.guest.image import guest_image
from vmnet.lab.virt import plumbing, qemu
from vmnet.lab.virt.ports import AgentPort, Console
from vmnet.lab.virt.qemu import Card, Machine
from vmnet.lab.virt.qmp import QemuError, Qmp
from vmnet.model import names
from vmnet.runtime.tasks import TaskScope

log = logging.getLogger(__name__)

POD_DIRECTORY_VARIABLE: Final = "VMNET_LAB_POD_DIR"
POD_NETWORK: Final = "pod"
_QEMU_CONSOLE: Final = "qemu-console.sock"
_QEMU_AGENT: Final = "qemu-agent.sock"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = argparse.ArgumentParser(prog="python -m vmnet.lab.virt.launcher", description=__doc__)
    found.add_argument("--name", required=True)
    found.add_argument("--namespace", required=True)
    found.add_argument("--uid", required=True, help="of the VirtualMachineInstance")
    found.add_argument("--memory", type=int, default=128, metavar="MIB")
    found.add_argument("--firmware-uuid", default="")
    found.add_argument("--hostname", default="")
    found.add_argument("--grace-period-seconds", type=float, default=30)
    found.add_argument(
        "--interface",
        action="append",
        dest="interfaces",
        metavar="NAME",
        help=f"of the pod, one for each of the guest's cards, in order; {POD_NETWORK} stands for the pod's own network",
    )
    found.add_argument("--incoming", action="store_true", help="wait for a migration")
    return found


def prepare(options: argparse.Namespace, directory: Path) -> Machine:
    """Wire the network and describe the guest. Raises LabError."""
    image = guest_image()
    accelerator = qemu.choose_accelerator(image)
    log.info("accelerator: %s (%s)", accelerator.name, accelerator.reason)
    own = names.PRIMARY_INTERFACE if plumbing.exists(names.PRIMARY_INTERFACE) else names.DEFAULT_INTERFACE
    cards = []
    for name in options.interfaces or [POD_NETWORK]:
        wiring = plumbing.wire(own if name == POD_NETWORK else name)
        log.info("%s is wired to %s, MAC %s, MTU %d", wiring.interface, wiring.tap, wiring.mac, wiring.mtu)
        cards.append(Card(wiring.tap, wiring.mac, wiring.mtu))
    first, *more = cards
    return Machine(
        name=options.hostname or options.name,
        directory=directory,
        image=image,
        accelerator=accelerator.name,
        memory_mib=options.memory,
        mac=first.mac,
        mtu=first.mtu,
        tap=first.tap,
        more_cards=tuple(more),
        uuid=options.firmware_uuid,
        incoming=options.incoming,
        console_socket=_QEMU_CONSOLE,
        agent_socket=_QEMU_AGENT,
    )


async def run(machine: Machine, grace: float) -> int:
    """Run the guest to its end; returns the exit status."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    process = await qemu.start(machine)
    try:
        async with TaskScope() as scope:
            place = machine.directory
            scope.start(Console().run(place / _QEMU_CONSOLE, place / qemu.CONSOLE_SOCKET), "console")
            scope.start(AgentPort().run(place / _QEMU_AGENT, place / qemu.AGENT_SOCKET), "agent port")
            scope.start(_end_when_told(stop, place, grace, process), "stop")
            status = await process.wait()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    log.info("QEMU ended, exit status %d", status)
    if status != 0:
        log.error("QEMU's last words: %s", _tail(machine.directory / "qemu.log"))
    return 0 if status == 0 else 1


async def _end_when_told(stop: asyncio.Event, place: Path, grace: float, process: asyncio.subprocess.Process) -> None:
    """On SIGTERM: press the power button, and after the grace period pull the plug."""
    await stop.wait()
    log.info("asked to end: the guest has %g s", grace)
    try:
        async with asyncio.timeout(grace), await Qmp.connect(place / qemu.LAUNCHER_QMP_SOCKET, timeout=2) as monitor:
            status = await monitor.execute("query-status")
            if status["status"] != "running":
                await monitor.execute("quit")
            while not monitor.closed.is_set():
                await monitor.execute("system_powerdown")
                # A guest that is still booting does not hear it the first time.
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await monitor.closed.wait()
    except (TimeoutError, QemuError) as error:
        log.warning("the guest does not end by itself: %s", error or "out of time")
    if process.returncode is None:
        process.terminate()


def _tail(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[-1000:].strip()
    except FileNotFoundError:
        return ""


def main() -> None:
    """Entry point."""
    options = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    directory = os.environ.get(POD_DIRECTORY_VARIABLE)
    if not directory:
        sys.exit(f"{POD_DIRECTORY_VARIABLE} is not set: this is for pods of the lab")
    try:
        machine = prepare(options, Path(directory))
        status = asyncio.run(run(machine, options.grace_period_seconds))
    except LabError as error:
        log.error("%s%s", error, f" ({error.next_step})" if error.next_step else "")
        sys.exit(1)
    sys.exit(status)


if __name__ == "__main__":
    main()
