"""How an administrator's command reaches the cluster: the same kubeconfig and context for the API and for kubectl."""

import argparse
import asyncio
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmnet.inspect.errors import InspectionError
from vmnet.kube.client import KubeClient
from vmnet.model.configuration import BY_PATH

KUBECTL: Final = "kubectl"
_NAMESPACE: Final = BY_PATH["controller.namespace"]
_END_SECONDS: Final = 5.0
"""For a kubectl that was ended to be gone."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A kubectl that ran to its end."""

    exit: int
    stdout: bytes
    stderr: str


@dataclass(frozen=True, slots=True)
class Connection:
    """Which cluster is meant. ``kubeconfig`` None is $KUBECONFIG, then ~/.kube/config; ``context`` None the current."""

    kubeconfig: Path | None = None
    context: str | None = None
    namespace: str = str(_NAMESPACE.default)
    """Where vmnet's own pods are."""

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Connection":
        """What ``add_arguments`` has asked for."""
        return cls(arguments.kubeconfig, arguments.context, arguments.system_namespace)

    async def kube(self, user_agent: str) -> KubeClient:
        """A client of the API; the caller closes it. Raises KubeError."""
        return await KubeClient.connect(self.kubeconfig, user_agent=user_agent, context=self.context)

    def words(self, *arguments: str) -> tuple[str, ...]:
        """A kubectl command for this cluster. Raises InspectionError without kubectl."""
        chosen: list[str] = []
        if self.kubeconfig is not None:
            chosen += ["--kubeconfig", str(self.kubeconfig)]
        if self.context is not None:
            chosen += ["--context", self.context]
        return (program(), *chosen, *arguments)

    async def kubectl(self, arguments: Sequence[str], seconds: float, *, stdin: bytes = b"") -> Completed:
        """Run kubectl to its end. Raises InspectionError without kubectl, TimeoutError after ``seconds``."""
        words = self.words(*arguments)
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise InspectionError(f"{words[0]} could not be started: {error.strerror}") from error
        try:
            async with asyncio.timeout(seconds):
                output, errors = await process.communicate(stdin or None)
        finally:
            # Also after Ctrl-C: nobody reads what it would still say.
            if process.returncode is None:
                process.kill()
                async with asyncio.timeout(_END_SECONDS):
                    await process.wait()
        return Completed(process.returncode or 0, output, errors.decode(errors="replace").strip())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that looks at a cluster."""
    parser.add_argument(
        "--kubeconfig", type=Path, help="file to connect with (default: $KUBECONFIG, then ~/.kube/config)"
    )
    parser.add_argument("--context", help="context of that file (default: its current one)")
    parser.add_argument(
        "--system-namespace",
        default=_NAMESPACE.default,
        metavar="NAMESPACE",
        help="where vmnet's controllers and agents are (%(default)s)",
    )


def program() -> str:
    """The shell's kubectl, else the one that was installed beside this interpreter. Raises InspectionError."""
    found = shutil.which(KUBECTL)
    if found:
        return found
    packaged = Path(sys.executable).parent / KUBECTL
    if os.access(packaged, os.X_OK):
        return str(packaged)
    raise InspectionError("there is no kubectl on this machine", "nodes are looked at through kubectl exec: install it")
