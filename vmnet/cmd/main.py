"""The ``vmnet`` command. A subcommand is a module with ``add_arguments(parser)`` and ``async run(arguments) -> int``.

Only the module of the subcommand that was asked for is imported: the agent must not pay for the lab's imports.
"""

import argparse
import asyncio
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmnet.inspect.errors import InspectionError
from vmnet.kube.api import KubeError
from vmnet.lab.errors import LabError
from vmnet.model.configuration import BY_PATH, ConfigurationError
from vmnet.runtime.tasks import first_failure

MISUSED: Final = 2
"""Exit status after words or a configuration that cannot be, as argparse has it."""
INTERRUPTED: Final = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells expect."""


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand; ``module`` is imported when it is used."""

    name: str
    module: str
    summary: str
    description: str = ""


COMMANDS: Final = (
    Command(
        "lab",
        "vmnet.lab.commands",
        "a whole cluster on this machine: try vmnet, test it, see a live migration",
        "Nodes are network namespaces, VMs are QEMU guests, the API speaks Kubernetes. Start with: vmnet lab demo",
    ),
    Command(
        "controller",
        "vmnet.cmd.controller",
        "allocates addresses and reconciles networks (one per cluster; runs as a Deployment)",
    ),
    Command("agent", "vmnet.cmd.agent", "owns one node's datapath (one per node; runs as a DaemonSet)"),
    Command(
        "uninstall",
        "vmnet.cmd.uninstall",
        "takes the CNI plugin out of this node, and says what it has to leave",
    ),
    Command(
        "status",
        "vmnet.cmd.status",
        "every component, node and network: what is broken, why, and the next step",
    ),
    Command(
        "sysdump",
        "vmnet.cmd.sysdump",
        "one redacted archive: status, objects, logs, metrics and kernels, for whoever looks for a fault",
    ),
    Command("migration", "vmnet.cmd.migration", "what live migrations did to their machines' network"),
    Command("dns", "vmnet.cmd.dns", "what a network's DNS answers, and why (on a node)"),
    Command("config", "vmnet.cmd.config", "what can be decided, what is decided and by whom"),
)

EPILOG: Final = """\
examples:
  vmnet lab demo                                  bring a lab up, live-migrate a VM under traffic, report, tear down
  vmnet lab workshop                              pods on user-defined networks, command by command, each step checked
  vmnet lab up                                    a lab that stays
  vmnet lab kubectl -- get pods -A                kubectl, talking to it
  vmnet lab console blue -n blue-namespace        the serial console of a VM (ctrl-] leaves)
  vmnet status --wait                             until every component, node and network is well
  vmnet migration list                            every machine's last migration, and what it cost
  vmnet config show                               every option's value, who decided it, what it means
  vmnet controller --kubeconfig ~/.kube/config    the controller, outside a cluster
  vmnet COMMAND --help                            everything about one command
"""


def parser(chosen: str | None) -> tuple[argparse.ArgumentParser, Any]:
    """The parser, and the imported module of the command ``chosen`` (None for no or an unknown command)."""
    top = argparse.ArgumentParser(
        prog="vmnet",
        description="User-defined networks for Kubernetes pods and KubeVirt VMs that live migration does not disturb.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module = None
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description or command.summary[0].upper() + command.summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if command.name == chosen:
            module = importlib.import_module(command.module)
            module.add_arguments(sub)
    return top, module


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Errors are one or two lines that say what to do next."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    top, module = parser(chosen)
    arguments = top.parse_args(words)
    try:
        logging.basicConfig(
            level=_log_level(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        return int(asyncio.run(module.run(arguments)))
    except ConfigurationError as error:
        for problem in error.problems:
            print(f"vmnet {arguments.command}: {problem}", file=sys.stderr)
        print("  → all options: vmnet config show --default", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except (LabError, InspectionError, KubeError, OSError, ExceptionGroup) as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        return report(words, error)


def _log_level() -> str:
    """Of every command; controller and agent may be told otherwise by file or flag. Raises ConfigurationError."""
    option = BY_PATH["shared.logLevel"]
    (variable,) = option.variables
    try:
        return str(option.read_variable(os.environ.get(variable, option.default))).upper()
    except ValueError as error:
        raise ConfigurationError([f"variable {variable} ({option.path}): {error}"]) from error


def report(words: Sequence[str], error: BaseException) -> int:
    """Print what failed and what to do next; returns the exit status."""
    error = first_failure(error)  # what the administrator can act on
    name = " ".join(["vmnet", *[word for word in words[:2] if not word.startswith("-")]])
    print(f"{name}: {describe(error)}", file=sys.stderr)
    next_step = next_step_after(error)
    if next_step:
        print(f"  → {next_step}", file=sys.stderr)
    return 1


def describe(error: BaseException) -> str:
    """One line that names the object."""
    if isinstance(error, LabError | InspectionError | KubeError | OSError):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"


def next_step_after(error: BaseException) -> str:
    """What the administrator can do about it; empty when only the message helps."""
    if isinstance(error, LabError | InspectionError):
        return error.next_step
    if isinstance(error, KubeError) and error.code == 0:
        return "is the API server up, and does --kubeconfig (or KUBECONFIG) name it?"
    if isinstance(error, KubeError) and error.code == 403:
        return "check the service account's role: deploy/ has the one that vmnet needs"
    if isinstance(error, PermissionError):
        return "run as root"
    if not isinstance(error, OSError):
        return "set VMNET_LOG_LEVEL=DEBUG to see where"
    return ""


if __name__ == "__main__":
    sys.exit(main())
