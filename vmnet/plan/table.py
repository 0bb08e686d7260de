"""One nftables table as a value, and the script that turns one value into the next.

Services, policy and whatever else needs a table of its own describe what they want as a ``Table``; nobody writes
``add element`` by hand. A table carries its own digest, as the name of an empty chain, so that an agent which starts
can tell without reading elements back that the kernel holds exactly what it wants. Where a change only adds, the chain
with the former digest stays, and the one that was made last counts: whoever deletes or changes anything waits until
every processor has left the old rules (14 ms idle and 45 ms busy, beside 3 ms), and a pod would wait with it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

TABLE_PREFIX: Final = "vmnet-"
"""Names of tables made here begin with it; the fixed tables of ``plan.firewall`` are called ``vmnet``."""
DIGEST_PREFIX: Final = "state_"
MOST_MARKS: Final = 256
"""Digests of former states that a table may carry besides its own."""

Marks = tuple[str, ...]
"""Digests that a table in the kernel carries, oldest first; the last one tells what it holds."""


@dataclass(frozen=True, slots=True)
class Chain:
    """``hook``: ``type … hook … priority …; policy …;`` of a base chain, empty for a regular one."""

    rules: tuple[str, ...] = ()
    hook: str = ""


@dataclass(frozen=True)
class Elements:
    """A set, or a map when ``is_map``. ``header``: type, flags, size as nft writes them, each ended by ``;``.

    An element is written as nft reads it; a map's maps its key, as written, to the text after the colon. None: the
    packet path fills it, and it is left alone for as long as its header stays. Whoever keeps a set that has not changed
    for the next table spares both looking through it.
    """

    header: str
    elements: Mapping[str, str] | frozenset[str] | None = frozenset()

    @property
    def is_map(self) -> bool:
        """Whether elements have values."""
        return isinstance(self.elements, Mapping)

    @cached_property
    def digest(self) -> str:
        """Over everything in it, whatever its order."""
        text = "\n".join((self.header, _kind(self), *sorted(self.texts())))
        return hashlib.sha256(text.encode()).hexdigest()

    def extends(self, before: "Elements") -> bool:
        """Whether it has every element that ``before`` has, as it is there."""
        if self is before or self.elements is None or before.elements is None:
            return True
        if isinstance(self.elements, Mapping) and isinstance(before.elements, Mapping):
            return before.elements.items() <= self.elements.items()
        if isinstance(self.elements, Mapping) or isinstance(before.elements, Mapping):
            return False
        return before.elements <= self.elements

    def texts(self) -> frozenset[str]:
        """Every element as nft reads it."""
        if isinstance(self.elements, Mapping):
            return frozenset(f"{key} : {value}" for key, value in self.elements.items())
        return self.elements or frozenset()


@dataclass(frozen=True)
class Table:
    """``family`` ``inet`` or ``netdev``; ``name`` begins with ``vmnet-``. Sets and chains keep their order.

    ``bridged``: it must see frames that the bridge forwards (br_netfilter).
    """

    family: str
    name: str
    sets: Mapping[str, Elements] = field(default_factory=dict)
    chains: Mapping[str, Chain] = field(default_factory=dict)
    bridged: bool = False

    @property
    def identity(self) -> str:
        """Family and name, as every command names it."""
        return f"{self.family} {self.name}"

    @cached_property
    def digest(self) -> str:
        """12 hex digits over everything in it."""
        lines = [f"{name} {item.digest}" for name, item in self.sets.items()]
        for name, chain in self.chains.items():
            lines += [f"{name} {chain.hook}", *(f"  {rule}" for rule in chain.rules)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]

    @property
    def _mark(self) -> str:
        return f"{DIGEST_PREFIX}{self.digest}"

    def whole(self) -> str:
        """Script that makes it, whatever of it was there before, in one transaction."""
        return f"add table {self.identity}\ndelete table {self.identity}\nadd table {self.identity}\n{self._content()}"

    def fresh(self) -> str:
        """Script that makes it where there is none, and fails where there is one."""
        return f"create table {self.identity}\n{self._content()}"

    def _content(self) -> str:
        return "\n".join((*self._body(), f"add chain {self.identity} {self._mark}")) + "\n"

    def change(self, before: "Table", marks: Marks = ()) -> str:
        """Script that turns ``before``, which the kernel holds, into this one; empty when they are equal.

        ``marks``: what the kernel's table carries, if that is more than the digest of ``before``.
        """
        if before.digest == self.digest:
            return ""
        if self._redeclared(before):
            return self.whole()
        marks = marks or (before.digest,)
        gone_marks = () if self._kept(before, marks) else marks
        # A digest that comes back needs a chain that is made last.
        lines = [f"delete chain {self.identity} {DIGEST_PREFIX}{mark}" for mark in gone_marks]
        lines.append(f"add chain {self.identity} {self._mark}")
        for name, chain in self.chains.items():
            if name not in before.chains:
                lines.append(f"add chain {self.identity} {name}" + (f" {{ {chain.hook} }}" if chain.hook else ""))
        for name, elements in self.sets.items():
            if name not in before.sets:
                lines.append(f"add {_kind(elements)} {self.identity} {name} {{ {elements.header} }}")
        nothing = Elements("")
        changed = {
            name: (before.sets.get(name, nothing).texts(), elements.texts())
            for name, elements in self.sets.items()
            if name not in before.sets or before.sets[name].digest != elements.digest
        }
        for name, (old, new) in changed.items():
            lines += _elements("delete", self.identity, name, old - new)
        for name, (old, new) in changed.items():
            lines += _elements("add", self.identity, name, new - old)
        for name, chain in self.chains.items():
            known = before.chains.get(name)
            if known is not None and known.rules != chain.rules:
                lines.append(f"flush chain {self.identity} {name}")
            if known is None or known.rules != chain.rules:
                lines += [f"add rule {self.identity} {name} {rule}" for rule in chain.rules]
        gone = [name for name in before.chains if name not in self.chains]
        # The kernel may have taken a base chain away with its device: what is not there cannot be deleted.
        lines += [f"add chain {self.identity} {name}" for name in gone if before.chains[name].hook]
        lines += [f"flush chain {self.identity} {name}" for name in gone]
        lines += [
            f"delete {_kind(old)} {self.identity} {name}" for name, old in before.sets.items() if name not in self.sets
        ]
        lines += [f"delete chain {self.identity} {name}" for name in gone]
        return "\n".join(lines) + "\n"

    def marks(self, before: "Table | None", marks: Marks) -> Marks:
        """What the kernel's table carries once it holds this one.

        ``before``: what it held; None when it was made anew. ``marks``: what it carried then.
        """
        if before is not None and before.digest == self.digest:
            return marks or (self.digest,)
        if before is None or self._redeclared(before) or not self._kept(before, marks or (before.digest,)):
            return (self.digest,)
        return (*(marks or (before.digest,)), self.digest)

    def _kept(self, before: "Table", marks: Marks) -> bool:
        """Whether the former marks stay: nothing else is deleted either."""
        return self.digest not in marks and len(marks) <= MOST_MARKS and self._extends(before)

    def _extends(self, before: "Table") -> bool:
        """Whether this one has all that ``before`` has, and more."""
        sets = all(name in self.sets and self.sets[name].extends(item) for name, item in before.sets.items())
        return sets and all(
            name in self.chains and self.chains[name].rules == chain.rules for name, chain in before.chains.items()
        )

    def _redeclared(self, before: "Table") -> bool:
        """Whether something keeps its name but not its declaration: that cannot be changed in place."""
        sets = (name for name in self.sets if name in before.sets)
        chains = (name for name in self.chains if name in before.chains)
        return any(_declaration(self.sets[name]) != _declaration(before.sets[name]) for name in sets) or any(
            self.chains[name].hook != before.chains[name].hook for name in chains
        )

    def _body(self) -> Iterable[str]:
        """Commands, each for one thing: a chain that a block names a second time is changed, and a change waits."""
        for name, chain in self.chains.items():
            # Before the sets: elements of verdict maps name them.
            yield f"add chain {self.identity} {name}" + (f" {{ {chain.hook} }}" if chain.hook else "")
        for name, item in self.sets.items():
            texts = item.texts()
            elements = f" elements = {{ {', '.join(texts)} }};" if texts else ""
            yield f"add {_kind(item)} {self.identity} {name} {{ {item.header}{elements} }}"
        for name, chain in self.chains.items():
            yield from (f"add rule {self.identity} {name} {rule}" for rule in chain.rules)


def removal(identity: str) -> str:
    """Script that removes a table. Fine when it is gone already."""
    return f"add table {identity}\ndelete table {identity}\n"


def _declaration(elements: Elements) -> tuple[str, bool]:
    return elements.header, elements.is_map


def _kind(elements: Elements) -> str:
    return "map" if elements.is_map else "set"


def _elements(verb: str, identity: str, name: str, texts: Iterable[str]) -> list[str]:
    found = ", ".join(sorted(texts))
    return [f"{verb} element {identity} {name} {{ {found} }}"] if found else []
