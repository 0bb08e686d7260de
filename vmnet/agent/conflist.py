"""This plugin's place on the node: its program in the CNI directory, its entry at the end of the node's chain.

The default network's installer owns the configuration and may write it anew at any time, so the directory is followed
for as long as the agent runs. Every write is a rename: a runtime, or an agent that takes over after a crash, finds a
whole configuration. What somebody else wrote at the same moment is never lost: the two files trade places, and when
what comes out is not what was read, they trade back.
"""

import asyncio
import base64
import json
import logging
import os
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from vmnet.cni import chain
from vmnet.cni import shim as python_shim
from vmnet.cni.chain import Unusable
from vmnet.kernel import exchange
from vmnet.kernel.exchange import NoExchange
from vmnet.kernel.file_events import DirectoryEvents
from vmnet.model import names
from vmnet.model.removal import Removal

log = logging.getLogger(__name__)

PROGRAMS: Final = (chain.PLUGIN, names.CNI_TYPE)
"""The node's own chain calls the one, Multus the other, by the type in a NAD's configuration."""
LOOK_AGAIN: Final = 60.0
"""Seconds after which the directory is looked at although no change was told."""
LOOK_SOON: Final = 1.0
"""Seconds, while something is in the way: a file that is being written is whole soon."""
QUARREL: Final = 5
"""So many times within ``QUARREL_SECONDS`` the entry is put back at once; then somebody takes it out on purpose."""
QUARREL_SECONDS: Final = 60.0
QUARREL_PAUSE: Final = 10.0

RESULTS: Final = Path("/var/lib/cni/results")
"""Where runtimes keep, for each attachment, the configuration that it was made by (libcni's cache)."""

_NEW: Final = ".vmnet-new"
_TRADES: Final = 16


def installs(mode: str) -> bool:
    """Whether this agent has to do with the node's CNI directories at all (``agent.installCni``)."""
    return mode in ("yes", "remove") or (mode == "auto" and "KUBERNETES_SERVICE_HOST" in os.environ)


def shim() -> Path:
    """The program to install: the static one, or, where it was not built, the one in Python."""
    static = Path(sys.prefix) / "libexec" / chain.PLUGIN
    return static if static.exists() else Path(python_shim.__file__)


class Conflist:
    """One node's CNI configuration directory and program directory."""

    def __init__(
        self,
        configurations: Path,
        programs: Path,
        program: Path,
        *,
        remove: bool = False,
        networks: Callable[[], Iterable[str]] = tuple,
        results: Path = RESULTS,
    ) -> None:
        """``program`` is copied; ``remove``: keep the plugin out instead of in; ``networks`` are those that
        the node has pods on."""
        self._configurations = configurations
        self._programs = programs
        self._program = program
        self._remove = remove
        self._networks = networks
        self._results = results
        self._writes: deque[float] = deque(maxlen=QUARREL)
        self._told: object = None
        self.problem: str | None = None if remove else "the CNI plugin is not chained yet"
        """Why pods are not made with this plugin now, None when they are."""
        self.path: Path | None = None
        """The configuration that pods are made by, as of the last look; None before there is one."""

    def described(self) -> dict[str, str | None]:
        """For an administrator: which configuration, and what is in the way."""
        return {"path": str(self.path) if self.path is not None else None, "problem": self.problem}

    async def run(self) -> None:
        """Follow the directory until cancelled."""
        events = DirectoryEvents(self._configurations)
        try:
            while True:
                pause = await asyncio.to_thread(self.look)
                await events.changed(pause)
        finally:
            events.close()

    def look(self) -> float:
        """Put everything in its place; returns the seconds after which to look again."""
        try:
            if self._remove:
                self._tell(self.take_out())
                return LOOK_AGAIN
            self._recover()
            for name in PROGRAMS:
                self._install(name)
            self.problem = self._chain()
        except PermissionError as error:
            # Of root's capabilities an agent keeps few; CAP_DAC_OVERRIDE is not among them.
            self.problem = f"the CNI plugin cannot be installed: {error}: the directory must be root's"
        except OSError as error:
            self.problem = f"the CNI plugin cannot be installed: {error}"
        if self.problem is not None and self.problem != self._told:
            log.warning("%s", self.problem)
        self._told = self.problem
        return LOOK_AGAIN if self.problem is None else LOOK_SOON

    def take_out(self) -> Removal:
        """Remove the entry from every list, then the program. Raises OSError."""
        self._recover()
        done, left, kept = [], [], []
        for name in self._files():
            path = self._configurations / name
            with suppress(Unusable, FileNotFoundError):
                text = path.read_bytes()
                body = chain.parse(text)
                if any(chain.has_plugin(copy) for copy in chain.copies(body)):
                    left.append(f"{path} holds a copy of the chain with {chain.PLUGIN}: restart Multus")
                if not chain.has_plugin(body):
                    continue
                rest = chain.unchained(body) if chain.is_list(body) else {}
                if name == chain.WRAPPER:
                    path.unlink()
                    done.append(f"{path} is removed")
                elif not rest.get("plugins"):
                    left.append(f"{path} has no other plugin: remove it by hand")
                elif _replace(path.resolve(), text, chain.render(rest)):
                    done.append(f"{path} has no {chain.PLUGIN} any more")
                else:
                    left.append(f"{path} was written by somebody else at the same moment: try again")
        attached = sorted(self._networks())
        if attached:
            left.append(
                f"pods on this node are attached to {', '.join(attached)}: their interfaces go with the pods, and until"
                f" then the runtime needs {' and '.join(str(self._programs / name) for name in PROGRAMS)} to delete"
                " them. Delete or move the pods"
            )
        remembered = self._remembered()
        if remembered:
            kept.append(
                f"the runtime remembers {remembered} attachments that were made with {chain.PLUGIN}, and CRI-O calls it"
                f" when it deletes them: until then {self._programs / chain.PLUGIN} stays"
            )
        if not left and not kept:
            for name in PROGRAMS:
                with suppress(FileNotFoundError):
                    (self._programs / name).unlink()
                    done.append(f"{self._programs / name} is removed")
        return Removal(tuple(done), tuple(left), tuple(kept))

    def _remembered(self) -> int:
        """Attachments that the runtime keeps, as long as they are, with this plugin in their chain."""
        try:
            return sum(_names_plugin(path) for path in self._results.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def _tell(self, removal: Removal) -> None:
        for sentence in removal.done:
            log.info("%s", sentence)
        remains = (*removal.left, *removal.kept)
        if remains != self._told:
            for sentence in remains:
                log.warning("%s", sentence)
        self._told = remains

    def _files(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._configurations) if name.endswith(chain.EXTENSIONS))
        except FileNotFoundError:
            return []

    def _install(self, name: str) -> None:
        """The program under one of its names, if it is not that already."""
        target, wanted = self._programs / name, self._program.read_bytes()
        with suppress(FileNotFoundError):
            if target.read_bytes() == wanted and stat.S_IMODE(target.stat().st_mode) == 0o755:
                return
        self._programs.mkdir(parents=True, exist_ok=True)
        _write(_aside(target), wanted, 0o755).replace(target)
        log.info("%s is installed", target)

    def _chain(self) -> str | None:
        """The entry in the configuration that pods are made by; returns what is in the way."""
        multus: tuple[Path, dict[str, Any]] | None = None
        for name in chain.candidates(self._files()):
            path = self._configurations / name
            try:
                text = path.read_bytes()
                body = chain.parse(text)
                if chain.is_multus(body):
                    multus = multus or (path, body)
                    continue
                self.path = path
                if chain.is_list(body):
                    problem = self._put(path, text, body)
                    if problem is None:
                        # Only now: until here the wrapper was what pods were made by.
                        self._unwrap()
                else:
                    problem, name = self._wrap(path, body), chain.WRAPPER
                if problem is None and multus is not None:
                    passed = chain.passed_by(multus[1], name)
                    problem = f"{multus[0]}: {passed}: restart Multus" if passed else None
                return problem
            except FileNotFoundError:
                return f"{path} went away"
            except Unusable as error:
                return f"{path}: {error}"
        self._unwrap()
        return f"{self._configurations} has no configuration of a default network yet"

    def _put(self, path: Path, text: bytes, body: dict[str, Any]) -> str | None:
        wanted = chain.chained(body)
        if wanted == body:
            return None
        quarrel = self._quarrel()
        if quarrel is not None:
            return (
                f"{path}: somebody keeps taking {chain.PLUGIN} out of it ({quarrel}); with Cilium, set"
                " cni.exclusive=false"
            )
        if not _replace(path.resolve(), text, chain.render(wanted)):
            return f"{path} is being written by somebody else"
        self._writes.append(time.monotonic())
        log.info("%s ends with %s", path, chain.PLUGIN)
        return None

    def _wrap(self, path: Path, body: dict[str, Any]) -> str | None:
        wanted, wrapper = chain.render(chain.wrapped(body, path.name)), self._configurations / chain.WRAPPER
        if not wrapper.name < path.name:
            return f"{path} is no list, and no list can come before it: rename it to 10-{path.name}"
        with suppress(FileNotFoundError):
            if wrapper.read_bytes() == wanted:
                return None
        _write(_aside(wrapper), wanted, 0o644).replace(wrapper)
        log.info("%s is a list of %s and %s", wrapper, path, chain.PLUGIN)
        return None

    def _unwrap(self) -> None:
        with suppress(FileNotFoundError):
            (self._configurations / chain.WRAPPER).unlink()

    def _quarrel(self) -> str | None:
        """Why to wait before the entry is put back again."""
        if len(self._writes) < QUARREL:
            return None
        passed = time.monotonic() - self._writes[0]
        if passed > QUARREL_SECONDS or time.monotonic() - self._writes[-1] > QUARREL_PAUSE:
            return None
        return f"{QUARREL} times in {passed:.0f} s"

    def _recover(self) -> None:
        """What an agent that died between two steps left aside."""
        for directory in (self._configurations, self._programs):
            with suppress(FileNotFoundError):
                for name in os.listdir(directory):
                    if name.startswith(".") and name.endswith(_NEW):
                        _settle(directory / name, directory / name[1 : -len(_NEW)])


def _names_plugin(path: Path) -> bool:
    """Whether a record has this plugin in its configuration: in base64, as libcni writes it, or as it is."""
    with suppress(OSError, ValueError):
        config = json.loads(path.read_bytes()).get("config")
        text = base64.b64decode(config) if isinstance(config, str) else json.dumps(config).encode()
        return f'"{chain.PLUGIN}"'.encode() in text
    return False


def _settle(aside: Path, path: Path) -> None:
    """A file of this agent's own is dropped. One that came out of a trade belongs to somebody else: the newer stays."""
    with suppress(Unusable, UnicodeDecodeError, FileNotFoundError):
        foreign = path.name.endswith(chain.EXTENSIONS) and not chain.has_plugin(chain.parse(aside.read_bytes()))
        if foreign and (not path.exists() or aside.stat().st_mtime_ns > path.stat().st_mtime_ns):
            aside.replace(path)
            return
    aside.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    """Where a new version is prepared: in the same directory, under a name that no runtime reads."""
    return path.with_name(f".{path.name}{_NEW}")


def _write(path: Path, content: bytes, mode: int) -> Path:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    return path


def _replace(path: Path, read: bytes, wanted: bytes) -> bool:
    """Put ``wanted`` where ``read`` was; False, with everything as others left it, when it is not that any more."""
    aside = _aside(path)
    try:
        found = path.stat()
        _write(aside, wanted, stat.S_IMODE(found.st_mode))
        with suppress(PermissionError):  # An agent without CAP_CHOWN: then it is root's.
            os.chown(aside, found.st_uid, found.st_gid)
        exchange.exchange(aside, path)
        if aside.read_bytes() == read:
            return True
        # Somebody wrote meanwhile, perhaps is still writing: theirs goes back to its name, and what comes out must be
        # ours, or else it is newer still.
        expected = wanted
        for _ in range(_TRADES):
            theirs = aside.read_bytes()
            exchange.exchange(aside, path)
            if aside.read_bytes() == expected:
                break
            expected = theirs
        return False
    except NoExchange:
        # The best that is left: the time between this look and the rename.
        if path.read_bytes() != read:
            return False
        aside.replace(path)
        return True
    except FileNotFoundError:
        return False
    finally:
        aside.unlink(missing_ok=True)
