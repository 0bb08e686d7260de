"""Whether Multus attaches this node's pods to their secondary networks, or whether that is left to this agent."""

import asyncio
import json
import logging
from enum import StrEnum
from pathlib import Path

from vmnet.model.configuration import CNI_CONFIGURATIONS

log = logging.getLogger(__name__)


class Mode(StrEnum):
    """What the administrator says."""

    AUTO = "auto"
    """Multus is there when the node's first CNI configuration is Multus', or once it has called us."""
    YES = "yes"
    NO = "no"


class Multus:
    """Asked on every ADD: Multus may be installed while pods run."""

    def __init__(self, mode: Mode = Mode.AUTO, directory: Path = CNI_CONFIGURATIONS) -> None:
        self._mode = mode
        self._directory = directory
        self._seen = False
        self._read: tuple[int, bool] | None = None
        """When the directory last changed, and what was found then."""

    def called(self) -> None:
        """A call came that only a meta-plugin makes: for one attachment, with its definition as configuration."""
        if not self._seen:
            log.info("secondary networks are attached by a meta-plugin (Multus)")
        self._seen = True

    async def present(self) -> bool:
        """Whether it is installed on this node."""
        if self._mode is not Mode.AUTO:
            return self._mode is Mode.YES
        return self._seen or await asyncio.to_thread(self._look)

    def _look(self) -> bool:
        try:
            changed = self._directory.stat().st_mtime_ns
        except OSError:
            return False
        # Installers rename their file into place, which changes the directory.
        if self._read is None or self._read[0] != changed:
            self._read = changed, _first_is_multus(self._directory)
        return self._read[1]


def _first_is_multus(directory: Path) -> bool:
    """A runtime uses the first configuration by file name."""
    paths = sorted(path for path in directory.glob("*") if path.suffix in (".conf", ".conflist", ".json"))
    if not paths:
        return False
    try:
        body = json.loads(paths[0].read_text())
        plugins = body.get("plugins", [body])
        return any(str(plugin.get("type", "")).startswith("multus") for plugin in plugins)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("%s cannot be read: %r", paths[0], error)
        return False
