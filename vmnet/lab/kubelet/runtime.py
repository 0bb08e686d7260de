"""kubelet's side of a pod's sandbox: make one, find one again, run containers in it, end it."""

import asyncio
import json
import logging
import os
import select
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from vmnet.lab.kubelet.sandbox import MAX_LINE, ContainerState, SandboxConfig

log = logging.getLogger(__name__)

CALL_TIMEOUT: Final = 10.0
CREATE_TIMEOUT: Final = 30.0


class RuntimeFault(Exception):
    """A sandbox or container could not be made, or the sandbox is gone; the message says which and why."""


class Sandbox:
    """A connection to a pod's PID 1. ``pid`` is its number here; ``containers`` is kept current by ``follow``."""

    def __init__(self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int) -> None:
        self.path = path
        self.pid = pid
        self.containers: dict[str, ContainerState] = {}
        self._reader = reader
        self._writer = writer
        self._lock = asyncio.Lock()

    @classmethod
    async def create(cls, config: SandboxConfig, log_path: Path) -> "Sandbox":
        """Start PID 1 of a new pod. Raises RuntimeFault."""
        with open(log_path, "ab") as errors:  # noqa: ASYNC230 - a local file, opened once
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "vmnet.lab.kubelet.sandbox"),
                stdin=asyncio.subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(CREATE_TIMEOUT):
                await process.communicate(json.dumps(asdict(config)).encode())
        except TimeoutError:
            process.kill()
            raise RuntimeFault(f"the sandbox was not made within {CREATE_TIMEOUT:g} s") from None
        if process.returncode != 0:
            raise RuntimeFault(f"the sandbox could not be made: {_last_line(log_path)}")
        return await cls.connect(Path(config.socket))

    @classmethod
    async def connect(cls, path: Path) -> "Sandbox":
        """Find a sandbox that runs. Raises RuntimeFault when none listens there."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                reader, writer = await asyncio.open_unix_connection(str(path), limit=MAX_LINE)
        except (OSError, TimeoutError) as error:
            raise RuntimeFault(f"no sandbox at {path}: {error}") from error
        peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, _, _ = struct.unpack("3i", peer)
        return cls(path, reader, writer, pid)

    async def start(
        self, identifier: str, argv: Sequence[str], environment: Mapping[str, str], directory: str, log_path: Path
    ) -> int:
        """Run a container; its process number inside the pod. Raises RuntimeFault."""
        # Found here: the pod's PID 1 has a PATH of its own, and "no such file" should name the program.
        program = shutil.which(argv[0], path=environment.get("PATH"))
        if program is None:
            raise RuntimeFault(f"exec: {argv[0]!r}: no such file or directory")
        answer = await self._call(
            call="start",
            id=identifier,
            argv=[program, *argv[1:]],
            environment=dict(environment),
            directory=directory,
            log=str(log_path),
        )
        return int(answer["pid"])

    async def signal(self, identifier: str, number: int) -> None:
        """Signal a container's process group; nothing happens when it has ended. Raises RuntimeFault."""
        await self._call(call="signal", id=identifier, number=int(number))

    async def follow(self, changed: Callable[[], None]) -> None:
        """Keep ``containers`` current and call ``changed`` after each change; returns when the sandbox is gone."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(self.path), limit=MAX_LINE)
        except OSError:
            changed()
            return
        try:
            writer.write(json.dumps({"call": "watch"}).encode() + b"\n")
            await writer.drain()
            while line := await reader.readline():
                self._adopt(json.loads(line))
                changed()
        except ConnectionError as error:
            log.info("%s: %s", self.path, error)
        finally:
            writer.close()
            changed()

    async def refresh(self) -> None:
        """Read ``containers`` once. Raises RuntimeFault."""
        reader, writer = await asyncio.open_unix_connection(str(self.path), limit=MAX_LINE)
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                writer.write(json.dumps({"call": "watch"}).encode() + b"\n")
                self._adopt(json.loads(await reader.readline()))
        except (OSError, TimeoutError, ValueError) as error:
            raise RuntimeFault(f"{self.path}: {error}") from error
        finally:
            writer.close()

    def enter(self, *, network_only: bool = False) -> tuple[str, ...]:
        """Words before a command that shall run in the pod."""
        base = f"/proc/{self.pid}/ns"
        if network_only:
            return ("nsenter", f"--net={base}/net", "--")
        return ("nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--ipc", "--pid", "--")

    async def stop(self) -> None:
        """Kill PID 1, and with it the whole pod; returns when the kernel has ended it."""
        self.close()
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            if not await asyncio.to_thread(_ended, descriptor, CALL_TIMEOUT):
                raise RuntimeFault(f"the processes of {self.path.parent} do not end")
        except ProcessLookupError:
            return
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Give up the connection; the pod goes on."""
        self._writer.close()

    def _adopt(self, message: Mapping[str, Any]) -> None:
        self.containers = {key: ContainerState(**state) for key, state in message.get("containers", {}).items()}

    async def _call(self, **body: Any) -> dict[str, Any]:
        try:
            async with self._lock, asyncio.timeout(CALL_TIMEOUT):
                self._writer.write(json.dumps(body).encode() + b"\n")
                await self._writer.drain()
                line = await self._reader.readline()
        except (OSError, TimeoutError) as error:
            raise RuntimeFault(f"the sandbox does not answer: {error!r}") from error
        if not line:
            raise RuntimeFault("the sandbox is gone")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeFault(answer["error"])
        return answer


def _ended(descriptor: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


async def make_network_namespace(name: str) -> str:
    """A namespace with its loopback up; the path that CNI is given. Raises RuntimeFault."""
    await _ip("netns", "add", name)
    await _ip("-n", name, "link", "set", "lo", "up")
    return f"/run/netns/{name}"


async def remove_network_namespace(path: str) -> None:
    """``ip netns del``; one that is gone is fine. Raises RuntimeFault."""
    if Path(path).exists():  # noqa: ASYNC240 - no disk behind it
        await _ip("netns", "del", path.rpartition("/")[2])


async def _ip(*words: str) -> None:
    process = await asyncio.create_subprocess_exec(
        "ip", *words, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(CALL_TIMEOUT):
            _, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        raise RuntimeFault(f"ip {' '.join(words)} did not end within {CALL_TIMEOUT:g} s") from None
    if process.returncode != 0:
        raise RuntimeFault(f"ip {' '.join(words)}: {errors.decode(errors='replace').strip()}")
