"""``vmnet config``: what can be decided, what is decided and by whom, and whether a file is sound."""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import yaml

from vmnet.cmd.sources import Setting, add_file_argument, read_file, settle, settled
from vmnet.model.configuration import OPTIONS, ConfigurationError, reference, schema, summary

HEADINGS: Final = ("KEY", "VALUE", "ORIGIN", "EXPLANATION")
_WIDTH: Final = 118
_EPILOG: Final = """\
A value comes from the first of: flag, environment, file (--config, $VMNET_CONFIG), default.

examples:
  vmnet config show                                   every value, who decided it, and what it means
  kubectl exec -n vmnet-system ds/vmnet-agent -- vmnet config show
  vmnet config show --default -o yaml > config.yaml   a file to begin with
  vmnet config check config.yaml                      before it goes into the ConfigMap vmnet-config
  vmnet config schema                                 JSON Schema of the file, for editors
  vmnet config reference                              all options, as Markdown
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.epilog = _EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser(
        "show",
        help="every value, who decided it, and what it means",
        description="Show what a vmnet process with this file and this environment is set to. What flags said to a"
        " running process is in its log.",
    )
    add_file_argument(show)
    show.add_argument("--default", action="store_true", help="as if there were neither file nor environment")
    show.add_argument("--changed", action="store_true", help="only what is not as by default")
    show.add_argument("-o", "--output", choices=("table", "json", "yaml"), default="table", help="(%(default)s)")
    check = actions.add_parser(
        "check", help="whether a file is sound", description="Tell everything that is wrong with a file; exit status 2."
    )
    check.add_argument("file", type=Path, help="a configuration file")
    actions.add_parser("schema", help="JSON Schema of the file", description="JSON Schema of the configuration file.")
    actions.add_parser("reference", help="all options, as Markdown", description="All options, as Markdown.")


async def run(arguments: argparse.Namespace) -> int:
    """Run it. Raises ConfigurationError, OSError."""
    if arguments.action == "check":
        values, problems = read_file(arguments.file)
        if problems:
            raise ConfigurationError(problems)
        settled(values)
        print(f"{arguments.file}: sound, decides {len(values)} of {len(OPTIONS)} values")
        return 0
    if arguments.action == "schema":
        print(json.dumps(schema(), indent=2))
        return 0
    if arguments.action == "reference":
        print(reference(), end="")
        return 0
    found = (settled({}) if arguments.default else settle(arguments)).settings
    if arguments.changed:
        found = tuple(item for item in found if item.origin.source != "default")
    if arguments.output == "json":
        print(json.dumps([described(item) for item in found], indent=2))
    elif arguments.output == "yaml":
        print(as_file(found), end="")
    elif found:
        print(table(found))
    else:
        print("Everything is as by default.", file=sys.stderr)
    return 0


def described(item: Setting) -> dict[str, Any]:
    """One setting as JSON."""
    option = item.option
    return {
        "key": option.path,
        "value": option.write(item.value),
        "origin": {"source": item.origin.source, "place": item.origin.place},
        "explanation": option.explanation,
        "allowed": option.allowed,
        "unit": option.unit,
        "default": option.write(option.default),
        "flag": option.flag,
        "variable": option.variables[0],
    }


def table(found: Iterable[Setting]) -> str:
    """For people: a line for each, and its explanation beside it."""
    rows = [(item.option.path, _short(item), str(item.origin), item.option.explanation) for item in found]
    widths = [max(len(row[column]) for row in (HEADINGS, *rows)) for column in range(3)]
    indent = " " * (sum(widths) + 6)
    lines = []
    for row in (HEADINGS, *rows):
        start = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        explained = textwrap.wrap(row[3], max(40, _WIDTH - len(indent)))
        lines.append(f"{start}  {explained[0]}")
        lines += [indent + line for line in explained[1:]]
    return "\n".join(lines)


def _short(item: Setting) -> str:
    unit = f" {item.option.unit}" if item.option.unit else ""
    return (item.option.text(item.value) + unit) or "-"


def as_file(found: Iterable[Setting]) -> str:
    """A configuration file that decides these values, explained; ``config check`` takes it."""
    lines: list[str] = []
    sections: dict[str, list[Setting]] = {}
    for item in found:
        sections.setdefault(item.option.section, []).append(item)
    for section, items in sections.items():
        lines += [f"# {summary(section)}", f"{section}:"]
        for item in items:
            text = f"{item.option.explanation}: {item.option.allowed} ({item.origin})"
            lines += [f"  # {line}" for line in textwrap.wrap(text, _WIDTH)]
            value = yaml.safe_dump(
                {item.option.key: item.option.write(item.value)}, allow_unicode=True, sort_keys=False, width=10**6
            )
            lines += [f"  {line}" for line in value.splitlines()]
    return "\n".join(lines) + "\n" if lines else "{}\n"
