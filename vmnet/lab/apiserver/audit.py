"""What clients asked for, each thing once: what rights a component really uses can be read from it.

A line is ``{"user", "agent", "verb", "group", "resource", "subresource", "namespace", "name", "path", "allowed"}``.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vmnet.lab.apiserver.authentication import User
from vmnet.lab.apiserver.authorization import Attributes


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that a user asked for."""

    user: str
    agent: str
    asked: Attributes
    allowed: bool


class Audit:
    """Notes each line when it comes for the first time; also in a file, as JSON lines, where one is named."""

    def __init__(self, path: Path | None = None) -> None:
        self._file = path.open("a", buffering=1) if path else None
        self.lines: dict[Line, None] = {}

    def note(self, user: User, agent: str, asked: Attributes, *, allowed: bool) -> None:
        """Somebody asked."""
        line = Line(user.name, agent.partition(" ")[0], asked, allowed)
        if line in self.lines:
            return
        self.lines[line] = None
        if self._file is not None:
            found = {"user": line.user, "agent": line.agent, **asdict(line.asked), "allowed": line.allowed}
            print(json.dumps({key: value for key, value in found.items() if value != ""}), file=self._file)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def used(lines: Iterable[Line], rights: Iterable[tuple[str, str, str, str]]) -> set[tuple[str, str, str, str]]:
    """The rights that lines take: verb, group, resource, and the name where one of ``rights`` is for one name alone."""
    narrow = {right[:3] for right in rights if right[3]}
    found = set()
    for line in lines:
        right = (line.asked.verb, line.asked.group, line.asked.full_resource)
        found.add((*right, line.asked.name if right in narrow else ""))
    return found


def read(path: Path) -> Iterator[Line]:
    """The lines of a file."""
    for text in path.read_text().splitlines():
        found = json.loads(text)
        user, agent, allowed = (found.pop(name, "") for name in ("user", "agent", "allowed"))
        yield Line(user, agent, Attributes(**found), allowed)
