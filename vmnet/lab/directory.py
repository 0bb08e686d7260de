"""The lab's directory, ``/run/vmnet-lab/<name>``: besides a listening socket, all that is visible of it outside."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from vmnet.lab.errors import LabError

ROOT: Final = Path("/run/vmnet-lab")
ENVIRONMENT_VARIABLE: Final = "VMNET_LAB_DIR"
"""In the environment of every process of the lab: its directory."""

_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?\Z")


@dataclass(frozen=True, slots=True)
class State:
    """``state.json``: which processes (numbers of the machine's own PID namespace) are this lab.

    ``launcher`` waits outside for ``init``, PID 1 of the lab. ``…_start`` is the start time in clock ticks since boot:
    with it a number that was reused is told from the original. With an external API ``api_port`` is 0 and ``relay`` the
    process that leads there; else ``relay`` is 0.
    """

    name: str
    launcher: int
    launcher_start: int
    init: int
    init_start: int
    nodes: int
    api_port: int
    relay: int = 0
    relay_start: int = 0


def start_time(pid: int) -> int | None:
    """Field 22 of ``/proc/<pid>/stat``; None when there is no such process (a zombie counts as none)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name, in parentheses, may hold spaces
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(frozen=True, slots=True)
class LabDirectory:
    """Paths of one lab."""

    path: Path

    @classmethod
    def of(cls, name: str) -> "LabDirectory":
        """The directory of lab ``name``, which need not exist. Raises LabError for a bad name."""
        if not _NAME.match(name):
            raise LabError(f"{name!r} is not a lab name", "use lower-case letters, digits and dashes, 32 at most")
        return cls(ROOT / name)

    @property
    def name(self) -> str:
        """The lab's name."""
        return self.path.name

    @property
    def kubeconfig(self) -> Path:
        """For clients on the machine: the API by its loopback port."""
        return self.path / "kubeconfig"

    @property
    def inner_kubeconfig(self) -> Path:
        """For clients inside the lab: the API by its fabric address."""
        return self.path / "inner-kubeconfig"

    @property
    def control_socket(self) -> Path:
        """Where the lab's init listens (``vmnet.lab.control``)."""
        return self.path / "control.sock"

    @property
    def api_socket(self) -> Path:
        """Where connections to an external API leave the lab (``vmnet.lab.relay``)."""
        return self.path / "api.sock"

    @property
    def logs(self) -> Path:
        """One file for each process."""
        return self.path / "logs"

    @property
    def pods(self) -> Path:
        """One directory for each pod, named for its uid."""
        return self.path / "pods"

    @property
    def certificates(self) -> Path:
        """The embedded API's keys."""
        return self.path / "certificates"

    @property
    def audit(self) -> Path:
        """What clients asked the embedded API for (``vmnet.lab.apiserver.audit``)."""
        return self.path / "audit.jsonl"

    def account(self, process: str) -> Path:
        """Kubeconfig of the service account that a process of ours runs as."""
        return self.path / f"{process}.kubeconfig"

    def node(self, name: str) -> Path:
        """What a node has to itself below /etc, /opt and /var/lib."""
        return self.path / "nodes" / name

    def pod(self, uid: str) -> Path:
        """Directory of one pod."""
        return self.pods / uid

    def log(self, process: str) -> Path:
        """Log of one process."""
        return self.logs / f"{process}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other ``up`` and ``down`` of this name away. Raises LabError when one of them is busy."""
        ROOT.mkdir(mode=0o755, parents=True, exist_ok=True)
        with open(ROOT / f".{self.name}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LabError(
                    f"another command is starting or stopping lab {self.name!r}", "wait for it to end, then try again"
                ) from None
            yield

    def create(self) -> None:
        """An empty directory, for root alone: it holds keys."""
        for path in (self.path, self.logs, self.pods):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def remove(self) -> None:
        """Remove everything. Nothing outside is mounted in it: the lab's mounts end with its mount namespace."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write_state(self, state: State) -> None:
        """Replace ``state.json``; readers see the old or the new one."""
        temporary = self.path / f".state.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(state), indent=2) + "\n")
        temporary.rename(self.path / "state.json")

    def read_state(self) -> State | None:
        """None when no lab was started here, or its start was cut off before it had processes."""
        try:
            return State(**json.loads((self.path / "state.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def alive(self) -> State | None:
        """The state, when the lab's init still runs; None for no lab and for a dead one's leftovers."""
        state = self.read_state()
        return state if state is not None and start_time(state.init) == state.init_start else None

    def log_tail(self, process: str, lines: int = 15) -> str:
        """The end of a process's log, for error messages."""
        try:
            text = self.log(process).read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])
