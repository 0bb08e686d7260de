"""Carries out the workshop's commands: kubectl, on a terminal where it asks for one, and programs in hosts."""

import asyncio
import fcntl
import os
import pty
import shlex
import struct
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmnet.lab import kubectl
from vmnet.lab.errors import LabError
from vmnet.lab.lab import Lab
from vmnet.lab.workshop.steps import Outcome

MANIFESTS: Final = Path(__file__).parents[1] / "data" / "workshop"
TIMEOUT: Final = 200.0
ROWS, COLUMNS = 40, 160


async def run(lab: Lab, command: str) -> Outcome:
    """Run one command to its end. Raises LabError when it cannot be started or does not end."""
    host, sign, rest = command.partition("# ")
    if sign and host.isalnum():
        done = await lab.exec(host, shlex.split(rest), timeout=TIMEOUT)
        return Outcome(done.exit, done.stdout, done.stderr)
    words = shlex.split(command)
    if words[0] != "kubectl":
        raise LabError(f"a command of the workshop is kubectl's or a host's, not {command!r}")
    argv = [str(kubectl.find()), *words[1:]]
    environment = {**os.environ, "KUBECONFIG": str(lab.kubeconfig)}
    options = words[: words.index("--")] if "--" in words else words
    return await (_on_terminal if "-it" in options else _on_pipes)(argv, environment)


async def _on_pipes(argv: Sequence[str], environment: dict[str, str]) -> Outcome:
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        cwd=MANIFESTS,
    )
    try:
        async with asyncio.timeout(TIMEOUT):
            output, errors = await process.communicate()
    except (TimeoutError, asyncio.CancelledError) as error:
        process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise LabError(f"{shlex.join(argv)} did not end within {TIMEOUT:g} s") from None
        raise
    return Outcome(process.returncode or 0, output.decode(errors="replace"), errors.decode(errors="replace"))


async def _on_terminal(argv: Sequence[str], environment: dict[str, str]) -> Outcome:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    try:
        process = await asyncio.create_subprocess_exec(
            *("setsid", "--ctty", "--wait", *argv),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            cwd=MANIFESTS,
        )
    finally:
        os.close(slave)
    shown: list[bytes] = []
    reading = asyncio.create_task(asyncio.to_thread(_read_all, master, shown), name="terminal")
    try:
        async with asyncio.timeout(TIMEOUT):
            await process.wait()
            await reading
    except (TimeoutError, asyncio.CancelledError) as error:
        process.kill()
        await process.wait()
        await reading
        if isinstance(error, TimeoutError):
            raise LabError(f"{shlex.join(argv)} did not end within {TIMEOUT:g} s") from None
        raise
    finally:
        os.close(master)
    return Outcome(process.returncode or 0, b"".join(shown).decode(errors="replace").replace("\r\n", "\n"))


def _read_all(descriptor: int, shown: list[bytes]) -> None:
    """Everything that is written to a terminal until its last process is gone; blocks."""
    while True:
        try:
            data = os.read(descriptor, 65536)
        except OSError:  # EIO
            return
        if not data:
            return
        shown.append(data)
