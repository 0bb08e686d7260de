"""A VM's serial console on this terminal."""

import asyncio
import json
import os
import sys
import termios
import tty
from pathlib import Path
from typing import Final

from vmnet.lab.errors import LabError
from vmnet.lab.lab import Lab

ESCAPE: Final = b"\x1d"
"""ctrl-], as telnet and virtctl use."""


async def find_socket(lab: Lab, namespace: str, vm: str) -> Path:
    """The console socket of the pod that runs the VM now. Raises LabError."""
    vmi = json.loads(await lab.kubectl("get", "vmi", vm, "-n", namespace, "-o", "json"))
    node = vmi.get("status", {}).get("nodeName", "")
    selector = f"kubevirt.io/created-by={vmi['metadata']['uid']}"
    pods = json.loads(await lab.kubectl("get", "pods", "-n", namespace, "-l", selector, "-o", "json"))["items"]
    for pod in pods:
        path = lab.pod_directory(pod["metadata"]["uid"]) / "console.sock"
        if pod["spec"].get("nodeName") == node and pod["status"].get("phase") == "Running" and path.exists():
            return path
    raise LabError(
        f"VM {namespace}/{vm} has no console: it is {vmi.get('status', {}).get('phase', 'not scheduled')}",
        f"vmnet lab kubectl -- describe vmi {vm} -n {namespace}",
    )


async def attach(path: Path) -> None:
    """Join terminal and socket until ctrl-], or the end of either. Raises LabError when nothing listens."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError as error:
        raise LabError(f"console {path}: {error}") from error
    descriptor = sys.stdin.fileno()
    attributes = termios.tcgetattr(descriptor) if os.isatty(descriptor) else None
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def typed() -> None:
        data = os.read(descriptor, 1024)
        before, escape, _ = data.partition(ESCAPE)
        if before:
            writer.write(before)
        if escape or not data:
            ended.set()

    async def show() -> None:
        while data := await reader.read(4096):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        ended.set()

    try:
        if attributes is not None:
            tty.setraw(descriptor)
        loop.add_reader(descriptor, typed)
        async with asyncio.TaskGroup() as group:
            showing = group.create_task(show())
            await ended.wait()
            showing.cancel()
    finally:
        loop.remove_reader(descriptor)
        if attributes is not None:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, attributes)
        writer.close()
