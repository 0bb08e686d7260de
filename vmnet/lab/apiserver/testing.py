"""For tests: a server on 127.0.0.1 in the test's own event loop, and kubectl against it."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmnet.lab.apiserver.server import ApiServer


@asynccontextmanager
async def running_server(directory: Path, **options: Any) -> AsyncIterator[ApiServer]:
    """An ``ApiServer`` (``options`` are its own) that has started; it stops with the block."""
    server = ApiServer(directory / "apiserver", **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended."""

    exit: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Kubectl:
    """A kubectl binary that talks to one server. ``directory`` takes its kubeconfig and caches."""

    server: ApiServer
    directory: Path
    binary: str = "kubectl"

    def environment(self) -> dict[str, str]:
        """Its environment: nothing of the user's own configuration."""
        config = self.directory / "kubeconfig"
        if not config.exists():
            self.server.kubeconfig(config)
        return {**os.environ, "KUBECONFIG": str(config), "HOME": str(self.directory)}

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """Start a command whose output is read as it comes (``get -w``)."""
        return await asyncio.create_subprocess_exec(
            self.binary,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment(),
        )

    async def __call__(self, *arguments: str, stdin: str = "", timeout: float = 30.0) -> Result:
        """Run a command to its end. Raises TimeoutError."""
        process = await asyncio.create_subprocess_exec(
            self.binary,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment(),
        )
        try:
            async with asyncio.timeout(timeout):
                out, err = await process.communicate(stdin.encode())
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
        return Result(process.returncode or 0, out.decode(), err.decode())

    async def check(self, *arguments: str, stdin: str = "", timeout: float = 30.0) -> str:
        """Run a command that must succeed; its output. Raises AssertionError."""
        found = await self(*arguments, stdin=stdin, timeout=timeout)
        if found.exit != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)}: exit {found.exit}\n{found.stdout}{found.stderr}")
        return found.stdout
