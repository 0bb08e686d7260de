"""A lab as tests, the demo and the commands use it."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from vmnet.lab import cgroups, control, kubectl, launch, prerequisites
from vmnet.lab.directory import LabDirectory, State
from vmnet.lab.errors import LabError
from vmnet.lab.guest.image import guest_image
from vmnet.lab.launch import Step
from vmnet.lab.relay import ExternalApi

CALL_TIMEOUT: Final = 30.0


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that ran to its end in one of the lab's hosts."""

    exit: int
    stdout: str
    stderr: str


def _silent(_: Step) -> None:
    return


class Lab:
    """``async with Lab(name="mine") as lab`` brings a lab up and takes it down again.

    ``attached`` gives a handle on one that is up. ``without`` leaves components out (``vmnet.lab.init.COMPONENTS``).
    ``kubeconfig`` leads to an API server, with its controllers and scheduler, that serves the lab from outside.
    """

    def __init__(
        self,
        name: str = "lab",
        nodes: int = 3,
        *,
        listener: Callable[[Step], None] = _silent,
        without: Sequence[str] = (),
        kubeconfig: Path | None = None,
    ) -> None:
        self.directory = LabDirectory.of(name)
        self._nodes = nodes
        self._listener = listener
        self._without = tuple(without)
        self._external_kubeconfig = kubeconfig

    @classmethod
    def attached(cls, name: str = "lab") -> "Lab":
        """A lab that is up. Raises LabError when it is not."""
        lab = cls(name)
        if lab.directory.alive() is None:
            raise LabError(f"lab {name!r} is not up", "start it with: vmnet lab up")
        return lab

    async def __aenter__(self) -> Self:
        await self.up(dies_with_caller=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.down()

    async def up(self, *, dies_with_caller: bool = False) -> State:
        """Bring it up. Raises LabError: it is up already, a prerequisite is missing, or the start failed."""
        external = await self._external_api()
        prerequisites.require()
        with self.directory.locked():
            if self.directory.alive() is not None:
                raise LabError(
                    f"lab {self.directory.name!r} is up already",
                    f"look at it with: vmnet lab status --name {self.directory.name}; end it with: vmnet lab down",
                )
            # Left by a lab that was killed: its processes and links ended with it, its files did not.
            await launch.end(self.directory)
            self._remove_cgroups_of_the_dead()
            self.directory.create()
            if "virt" not in self._without:
                await self._make_guest_image()
            return await launch.start(
                self.directory,
                self._nodes,
                self._listener,
                dies_with_caller=dies_with_caller,
                without=self._without,
                external=external,
            )

    def _remove_cgroups_of_the_dead(self) -> None:
        """Labs that were killed and never started again, such as those of tests."""
        for name in cgroups.labs():
            if name == self.directory.name:
                continue
            other = LabDirectory.of(name)
            try:
                with other.locked():
                    if other.alive() is None:
                        cgroups.remove_lab(name)
            except LabError:
                continue  # it is being started or stopped right now

    async def _external_api(self) -> ExternalApi | None:
        if self._external_kubeconfig is None:
            return None
        if "apiserver" in self._without:
            raise LabError("a lab without an API server does not use a kubeconfig", "leave one of both options out")
        external = ExternalApi.read(self._external_kubeconfig.absolute())
        await external.check(self._nodes)
        return external

    async def _make_guest_image(self) -> None:
        """Before the lab, which is sealed, begins: the kernel is a Debian package that has to be fetched once."""
        started = time.monotonic()
        self._listener(Step("guest image"))
        await asyncio.to_thread(guest_image)
        self._listener(Step("guest image", round(time.monotonic() - started, 2)))

    async def down(self) -> bool:
        """End it, whatever state it is in; returns whether it was running."""
        with self.directory.locked():
            state = self.directory.alive()
            if state is not None:
                await self._stop(state)
            return await launch.end(self.directory) or state is not None

    async def _stop(self, state: State) -> None:
        """Ask for an orderly end; the caller kills what does not follow."""
        try:
            await control.call(self.directory.control_socket, 5, "stop")
            descriptor = os.pidfd_open(state.init)
        except (LabError, ProcessLookupError):
            return
        try:
            await asyncio.to_thread(launch.wait_ended, descriptor, 10)
        finally:
            os.close(descriptor)

    # What is in it

    @property
    def kubeconfig(self) -> Path:
        """For clients on the machine."""
        return self.directory.kubeconfig

    @property
    def accelerator(self) -> str:
        """``kvm`` or ``tcg``, as the lab's probe guest found; empty before a VM was asked for."""
        path = self.directory.path / "accelerator"
        return path.read_text().strip() if path.exists() else ""

    def pod_directory(self, uid: str) -> Path:
        """Files of one pod: sockets of QEMU and console, logs of its containers."""
        return self.directory.pod(uid)

    # What can be done with it

    async def exec(self, host: str, argv: Sequence[str], *, timeout: float = 30, stdin: str = "") -> Completed:
        """Run a program in ``fabric``, ``outside`` or a node (``n1`` …). Raises LabError, not for its exit status."""
        body = await self._call("exec", timeout=timeout + 5, host=host, argv=list(argv), stdin=stdin, seconds=timeout)
        return Completed(body["exit"], body["stdout"], body["stderr"])

    async def spawn(self, name: str, host: str, argv: Sequence[str]) -> Path:
        """Start a program that runs until ``kill``; returns its log, with both outputs."""
        return Path((await self._call("spawn", name=name, host=host, argv=list(argv)))["log"])

    async def wait(self, name: str, *, timeout: float = 30) -> int:
        """Wait for a process to end; its exit status, negative for a signal. Raises LabError when it does not."""
        return int((await self._call("wait", timeout=timeout + 5, name=name, seconds=timeout))["exit"])

    async def restart(self, name: str) -> None:
        """Restart a process (``agent-n1``, ``controller`` …)."""
        await self._call("restart", name=name)

    async def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a process a signal."""
        await self._call("signal", name=name, signal=int(number))

    async def status(self) -> dict[str, Any]:
        """Hosts, processes and the API's address, as ``vmnet lab status -o json`` prints them."""
        return {"name": self.directory.name, "kubeconfig": str(self.kubeconfig), **await self._call("status")}

    async def failure(self) -> dict[str, Any]:
        """Wait until a process ends by itself: its status and the tail of its log. For ever, while all is well."""
        return await self._call("failure", timeout=24 * 3600)

    async def kubectl(self, *arguments: str, stdin: str = "", timeout: float = 150) -> str:
        """Output of kubectl. Raises LabError with its error message."""
        process = await asyncio.create_subprocess_exec(
            str(kubectl.find()),
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
        )
        try:
            async with asyncio.timeout(timeout):
                output, errors = await process.communicate(stdin.encode())
        except (TimeoutError, asyncio.CancelledError) as error:
            process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                raise LabError(f"kubectl {' '.join(arguments)} did not end within {timeout:g} s") from None
            raise
        if process.returncode != 0:
            raise LabError(f"kubectl {' '.join(arguments)}: {errors.decode(errors='replace').strip()}")
        return output.decode()

    async def _call(self, command: str, timeout: float = CALL_TIMEOUT, **arguments: Any) -> dict[str, Any]:
        return await control.call(self.directory.control_socket, timeout, command, **arguments)
