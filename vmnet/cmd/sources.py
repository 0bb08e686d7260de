"""Where the configuration's values come from: default, then file, environment and flag, each over the one before.

All that is wrong is told at once: which key, in which line, variable or flag, and what is allowed there.
"""

import argparse
import difflib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from vmnet.model.configuration import (
    BY_PATH,
    OPTIONS,
    SECTIONS,
    Choice,
    Configuration,
    ConfigurationError,
    Option,
    assemble,
    options_of,
)

log = logging.getLogger(__name__)

FILE_VARIABLE: Final = "VMNET_CONFIG"
MAX_FILE: Final = 1 << 20
"""Octets; a ConfigMap has no more (its objects' limit in etcd)."""
_SERVICE_LINK: Final = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_\w+)?)?)$")
"""Variables that the kubelet makes of Services' names (vmnet-controller-metrics, …): not ours."""
_SECTIONS: Final = tuple(f"VMNET_{section.upper()}_" for section in SECTIONS if section != "shared")
_OTHERS: Final = ("VMNET_LAB_", "VMNET_CNI_")
"""Variables of the lab and the CNI plugin begin with these."""
_NEARLY: Final = 0.85
"""How alike a variable and an option's must be to be meant for each other: one or two letters are otherwise."""
_YAML: Final = "tag:yaml.org,2002:"
_JSON_TYPES: Final = {"string": "str", "integer": "int", "boolean": "bool"}
_WORDS: Final = {
    "str": "text",
    "int": "a whole number",
    "bool": "true or false",
    "float": "a number with a fraction",
    "null": "nothing",
    "seq": "a list",
    "map": "a mapping",
    "timestamp": "a date",
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Who decided a value. ``source``: default, file, environment or flag; ``place``: line, variable or flag."""

    source: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.source} {self.place}".rstrip()


@dataclass(frozen=True, slots=True)
class Setting:
    """One option as it is set."""

    option: Option
    value: Any
    origin: Origin


@dataclass(frozen=True, slots=True)
class Settled:
    """The configuration, and who decided each value of it."""

    configuration: Configuration
    settings: tuple[Setting, ...]

    def tell(self, *sections: str) -> None:
        """Log what is not as by default."""
        for found in self.settings:
            if found.origin.source != "default" and found.option.section in sections:
                log.info("%s: %s (%s)", found.option.path, found.option.write(found.value), found.origin)


class _Once(argparse.Action):
    """An option's flag: one value, or several that are gathered."""

    def __init__(self, *arguments: Any, option: Option, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.option = option

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        given: dict[str, list[str]] = getattr(namespace, "flags", None) or {}
        texts = given.get(self.option.path, []) if self.option.shape != "one" else []
        text = ("false" if str(flag).startswith("--no-") else "true") if self.option.switch else str(values)
        try:
            self.option.read([*texts, text])
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        namespace.flags = {**given, self.option.path: [*texts, text]}


def add_arguments(parser: argparse.ArgumentParser, *sections: str) -> None:
    """``--config``, and the flag of every option of these sections."""
    add_file_argument(parser)
    parser.set_defaults(flags={})
    for found in (found for section in sections for found in options_of(SECTIONS[section])):
        default = found.text(found.default) or ("" if found.default is None else "none")
        notes = [
            "may be repeated" if found.shape != "one" else "",
            f"default: {default}" if default else "",
            found.unit,
            ", ".join(f"${variable}" for variable in found.variables),
            f"{found.path} in the file",
        ]
        flags = [found.flag, f"--no-{found.flag.removeprefix('--')}"] if found.switch else [found.flag]
        parser.add_argument(
            *flags,
            action=_Once,
            option=found,
            dest=f"flag {found.path}",
            default=argparse.SUPPRESS,
            nargs=0 if found.switch else None,
            metavar=None if found.switch else found.kind.metavar,
            help=f"{found.explanation} ({'; '.join(filter(None, notes))})".replace("%", "%%"),
        )


def add_file_argument(parser: argparse.ArgumentParser) -> None:
    """``--config``."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"YAML file with the configuration (default: ${FILE_VARIABLE})"
    )


def settle(arguments: argparse.Namespace, environment: Mapping[str, str] | None = None) -> Settled:
    """What holds for a process that was started so. Raises ConfigurationError, OSError (the file)."""
    environment = os.environ if environment is None else environment
    problems: list[str] = []
    found: dict[str, tuple[Any, Origin]] = {}
    path = getattr(arguments, "config", None) or (Path(environment[FILE_VARIABLE]) if _named(environment) else None)
    if path is not None:
        values, wrong = read_file(path)
        found |= values
        problems += wrong
    values, wrong = read_environment(environment)
    found |= values
    problems += wrong
    for name, texts in (getattr(arguments, "flags", None) or {}).items():
        found[name] = (BY_PATH[name].read(texts), Origin("flag", BY_PATH[name].flag))
    if problems:
        raise ConfigurationError(problems)
    return settled(found)


def settled(found: Mapping[str, tuple[Any, Origin]]) -> Settled:
    """These values by path and their origins, and defaults for the rest. Raises ConfigurationError."""
    configuration = assemble({name: value for name, (value, _) in found.items()})
    settings = (
        Setting(item, configuration.value(item), found[item.path][1] if item.path in found else Origin("default"))
        for item in OPTIONS
    )
    return Settled(configuration, tuple(settings))


def _named(environment: Mapping[str, str]) -> bool:
    return bool(environment.get(FILE_VARIABLE))


def read_environment(environment: Mapping[str, str]) -> tuple[dict[str, tuple[Any, Origin]], list[str]]:
    """Values by path, and what is wrong.

    A variable that no option has is wrong where it begins like those of a section, or is nearly one of an option's. The
    kubelet's, and other programs' that begin with VMNET_, are not ours.
    """
    found: dict[str, tuple[Any, Origin]] = {}
    problems = []
    for item in OPTIONS:
        for variable in item.variables:
            if variable not in environment:
                continue
            try:
                found[item.path] = (item.read_variable(environment[variable]), Origin("environment", variable))
            except ValueError as error:
                problems.append(f"variable {variable} ({item.path}): {error}")
            break
    known = {variable for item in OPTIONS for variable in item.variables} | {FILE_VARIABLE}
    for variable in sorted(environment.keys() - known):
        ours = variable.startswith(_SECTIONS) or (
            variable.startswith("VMNET_")
            and not variable.startswith(_OTHERS)
            and difflib.get_close_matches(variable, known, 1, _NEARLY)
        )
        if ours and not _SERVICE_LINK.search(variable):
            problems.append(f"variable {variable}: there is no such option{_nearest(variable, known)}")
    return found, problems


def read_file(path: Path) -> tuple[dict[str, tuple[Any, Origin]], list[str]]:
    """Values by path, and what is wrong. Raises OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        return {}, [f"{path}: larger than {MAX_FILE} octets"]
    return read_text(data, str(path))


def read_text(data: bytes, name: str) -> tuple[dict[str, tuple[Any, Origin]], list[str]]:
    """The content of a file; ``name`` is told in problems and origins."""
    try:
        root = yaml.compose(data.decode(), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        return {}, [f"{name}: not UTF-8 at octet {error.start}"]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        return {}, [f"{place}: not YAML: {error.problem or error.context}"]
    except (yaml.YAMLError, RecursionError) as error:
        return {}, [f"{name}: not YAML: {str(error).splitlines()[0] if str(error) else type(error).__name__}"]
    reading = _Reading(name)
    if root is not None and not _empty(root):
        reading.document(root)
    return reading.found, reading.problems


class _Reading:
    """One file that is read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.found: dict[str, tuple[Any, Origin]] = {}
        self.problems: list[str] = []

    def document(self, root: yaml.Node) -> None:
        for section, value in self._entries(root, "the file", tuple(SECTIONS)):
            if _empty(value):
                continue
            keys = {item.key: item for item in OPTIONS if item.section == section}
            for key, node in self._entries(value, section, tuple(keys)):
                self._option(keys[key], node)

    def _option(self, item: Option, node: yaml.Node) -> None:
        try:
            value = _value(item, node)
        except ValueError as error:
            self._wrong(node, f"{item.path}: {error}")
        else:
            self.found[item.path] = (value, Origin("file", self._place(node)))

    def _entries(self, node: yaml.Node, what: str, known: Sequence[str]) -> list[tuple[str, yaml.Node]]:
        """Keys that are known and there once, with what they have."""
        if not isinstance(node, yaml.MappingNode):
            self._wrong(node, f"{what} is {_word(node)}, not a mapping with {', '.join(known)}")
            return []
        entries: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else _word(key)
            if name not in known:
                inside = "" if what == "the file" else f"{what}."
                self._wrong(
                    key, f"{inside}{name}: there is no such key{_nearest(name, known)}; {what} has {', '.join(known)}"
                )
            elif name in entries:
                self._wrong(key, f"{name} is there twice")
            else:
                entries[name] = value
        return list(entries.items())

    def _place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def _wrong(self, node: yaml.Node, problem: str) -> None:
        self.problems.append(f"{self._place(node)}: {problem}")


def _value(item: Option, node: yaml.Node) -> Any:
    if _empty(node) and item.default is None:
        return None
    if item.shape == "one":
        return item.read([_text(item, node)])
    if item.shape == "list":
        if not isinstance(node, yaml.SequenceNode):
            raise ValueError(f"{_word(node)} is not {item.allowed}")
        return item.read([_text(item, entry) for entry in node.value])
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{_word(node)} is not {item.allowed}")
    return item.read([f"{_text(item, key)}={_text(item, value)}" for key, value in node.value])


def _text(item: Option, node: yaml.Node) -> str:
    """A scalar of the right type, as its kind reads it. Raises ValueError."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{_word(node)} is not {item.kind.allowed}")
    tag, wanted = node.tag.removeprefix(_YAML), _JSON_TYPES[item.kind.json]
    if isinstance(item.kind, Choice):
        # YAML 1.1 takes a plain no for false; where words are chosen from, it is a word.
        return str(node.value)
    if tag != wanted:
        raise ValueError(f"{node.value!r} is {_word(node)}, not {item.allowed}")
    if tag == "int":
        return str(yaml.SafeLoader("").construct_yaml_int(node))
    return str(node.value)


def _empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == f"{_YAML}null"


def _word(node: yaml.Node) -> str:
    tag = str(node.tag).removeprefix(_YAML)
    return _WORDS.get(tag, f"of type {tag}")


def _nearest(name: str, known: Sequence[str] | set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 1)
    return f" (is it {near[0]}?)" if near else ""
