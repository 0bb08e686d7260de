"""``vmnet lab …``: what an administrator types. The output is for people; ``status -o json`` is for programs."""

import argparse
import asyncio
import importlib
import json
import os
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from vmnet.lab import kubectl, prerequisites
from vmnet.lab.errors import LabError
from vmnet.lab.init import COMPONENTS
from vmnet.lab.lab import Lab
from vmnet.lab.launch import Step

REPORTS: Final = Path("build/demo")
WORKSHOP_REPORT: Final = Path("build/workshop/report.json")

_console: Final = Console(stderr=True, highlight=False)
_output: Final = Console(highlight=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``vmnet lab``."""
    commands = parser.add_subparsers(dest="lab_command", metavar="COMMAND", required=True)
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--name", default="lab", help="which lab, when there are several (default: lab)")
    started = argparse.ArgumentParser(add_help=False)
    started.add_argument("--nodes", type=int, default=3, help="how many nodes (default: 3)")
    started.add_argument(
        "--without", action="append", default=[], choices=COMPONENTS, help="leave a component out (may be repeated)"
    )

    started.add_argument(
        "--kubeconfig",
        type=Path,
        metavar="FILE",
        help="use the API server of FILE's current context, with its controllers and scheduler, instead of the lab's "
        "own; it should be a cluster without nodes: the lab writes its definitions and the nodes n1, n2, … there, and "
        "they stay when the lab ends",
    )

    def add(
        name: str, run: Callable[[argparse.Namespace], Awaitable[int]], text: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=parents)
        command.set_defaults(lab_run=run)
        return command

    demo = add("demo", run_demo, "bring a lab up, live-migrate a VM under traffic, report, tear down", named, started)
    demo.add_argument("--report", type=Path, default=REPORTS / "report.json", help="where the JSON report goes")
    demo.add_argument("--keep", action="store_true", help="leave the lab up afterwards")
    workshop = add(
        "workshop", run_workshop, "pods on user-defined networks, command by command, with what each must show", named
    )
    workshop.add_argument("--report", type=Path, default=WORKSHOP_REPORT, help="where the JSON report goes")
    workshop.add_argument("--keep", action="store_true", help="leave the lab up afterwards")
    workshop.add_argument("--on", metavar="LAB", help="use a lab that is up, and leave it up")
    workshop.add_argument(
        "--section", type=int, action="append", default=[], help="only this section and what it needs (repeatable)"
    )
    add("up", run_up, "bring a lab up; it stays until `vmnet lab down`", named, started)
    add("down", run_down, "end a lab and everything in it; says so when there is none", named)
    status = add("status", run_status, "hosts and processes of a lab", named)
    status.add_argument("-o", "--output", choices=("table", "json"), default="table")
    kubectl_command = add(
        "kubectl", run_kubectl, "run kubectl against the lab: vmnet lab kubectl -- get pods -A", named
    )
    kubectl_command.add_argument("words", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS")
    console = add("console", run_console, "serial console of a VM; ctrl-] leaves", named)
    console.add_argument("vm", metavar="VM")
    console.add_argument("-n", "--namespace", default="default")
    execute = add("exec", run_exec, "run a program in a host of the lab: vmnet lab exec n1 -- ip route", named)
    execute.add_argument("host", help="fabric, outside, n1, n2, …")
    execute.add_argument("words", nargs=argparse.REMAINDER, metavar="-- PROGRAM")
    restart = add("restart", run_restart, "restart one process of the lab (see status)", named)
    restart.add_argument("process")
    needed = add("prerequisites", run_prerequisites, "check what a lab needs of this machine")
    needed.add_argument("--install", action="store_true", help="install missing Debian packages")


async def run(arguments: argparse.Namespace) -> int:
    """Run the chosen ``vmnet lab`` command. Raises LabError."""
    status: int = await arguments.lab_run(arguments)
    return status


class Steps:
    """Shows steps while they run, on a terminal with a spinner, else as lines."""

    def __init__(self) -> None:
        self._live = _console.is_terminal
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=_console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def tell(self, step: Step) -> None:
        """A step began or ended."""
        if not self._live:
            if step.seconds is not None:
                _console.print(f"✓ {step.name} ({step.seconds:.1f} s)")
        elif step.seconds is None:
            self._tasks[step.name] = self._progress.add_task(step.name, total=1)
        else:
            self._progress.update(self._tasks[step.name], completed=1)

    def doing(self, text: str) -> None:
        """What is being done now, in one line that the next one replaces; who does it prints how it went."""
        for task in self._progress.tasks:
            self._progress.remove_task(task.id)
        if self._live:
            self._progress.add_task(text, total=1)

    def say(self, text: str) -> None:
        """Something that has no measured end: the previous such step is over."""
        if not self._live:
            _console.print(f"… {text}")
            return
        for task in self._progress.tasks:
            if not task.finished:
                self._progress.update(task.id, completed=1)
        self._progress.add_task(text, total=1)


def _lab(arguments: argparse.Namespace, steps: Steps) -> Lab:
    return Lab(
        arguments.name,
        arguments.nodes,
        listener=steps.tell,
        without=arguments.without,
        kubeconfig=arguments.kubeconfig,
    )


async def run_up(arguments: argparse.Namespace) -> int:
    """``vmnet lab up``."""
    with Steps() as steps:
        lab = _lab(arguments, steps)
        await lab.up()
    option = "" if arguments.name == "lab" else f" --name {arguments.name}"
    _output.print(f"lab [bold]{arguments.name}[/] is up: {arguments.nodes} nodes")
    _output.print(f"  export KUBECONFIG={lab.kubeconfig}", soft_wrap=True)
    _output.print(f"  vmnet lab kubectl{option} -- get nodes -o wide\n  vmnet lab down{option}", soft_wrap=True)
    return 0


async def run_down(arguments: argparse.Namespace) -> int:
    """``vmnet lab down``."""
    lab = Lab(arguments.name)
    with _console.status(f"ending lab {arguments.name}"):
        ran = await lab.down()
    _output.print(f"lab {arguments.name} is down" if ran else f"lab {arguments.name} was not up")
    return 0


async def run_status(arguments: argparse.Namespace) -> int:
    """``vmnet lab status``: exit status 1 when a process has failed."""
    status = await Lab.attached(arguments.name).status()
    failed = [item for item in status["processes"] if item["failed"]]
    if arguments.output == "json":
        print(json.dumps(status, indent=2))
        return 1 if failed else 0
    _output.print(f"lab {status['name']}  API {status['api']}  KUBECONFIG={status['kubeconfig']}", soft_wrap=True)
    hosts = Table("HOST", "IPV4", "IPV6", box=None, pad_edge=False)
    for host in status["hosts"]:
        hosts.add_row(host["name"], host["ipv4"], host["ipv6"])
    processes = Table("PROCESS", "HOST", "STATE", "STARTS", "LOG", box=None, pad_edge=False)
    for item in status["processes"]:
        processes.add_row(item["name"], item["host"], _state(item), str(item["starts"]), item["log"])
    _output.print(hosts)
    _output.print()
    _output.print(processes)
    return 1 if failed else 0


def _state(item: dict[str, Any]) -> str:
    if item["exit"] is None:
        return f"running {item['seconds']:.0f} s"
    if item["expected"]:
        return "stopped"
    return f"[red]failed, exit status {item['exit']}[/]"


async def run_kubectl(arguments: argparse.Namespace) -> int:
    """``vmnet lab kubectl``: becomes kubectl."""
    lab = Lab.attached(arguments.name)
    return _run_attached([str(kubectl.find()), *_words(arguments)], {"KUBECONFIG": str(lab.kubeconfig)})


def _words(arguments: argparse.Namespace) -> list[str]:
    words: list[str] = arguments.words
    return words[1:] if words[:1] == ["--"] else words


def _run_attached(argv: list[str], environment: dict[str, str]) -> int:
    """Run a program on this terminal; Ctrl-C is the program's."""
    process = subprocess.Popen(argv, env={**os.environ, **environment})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


async def run_exec(arguments: argparse.Namespace) -> int:
    """``vmnet lab exec``."""
    words = _words(arguments)
    if not words:
        raise LabError("no program given", "for example: vmnet lab exec n1 -- ip route")
    done = await Lab.attached(arguments.name).exec(arguments.host, words, timeout=600)
    print(done.stdout, end="")
    _console.out(done.stderr, end="", highlight=False)
    return done.exit


async def run_restart(arguments: argparse.Namespace) -> int:
    """``vmnet lab restart``."""
    await Lab.attached(arguments.name).restart(arguments.process)
    _output.print(f"{arguments.process} restarted")
    return 0


async def run_console(arguments: argparse.Namespace) -> int:
    """``vmnet lab console``: the terminal of a VM, by the socket in its pod's directory."""
    from vmnet.lab import console

    lab = Lab.attached(arguments.name)
    path = await console.find_socket(lab, arguments.namespace, arguments.vm)
    _console.print(f"console of {arguments.namespace}/{arguments.vm}; ctrl-] leaves")
    await console.attach(path)
    return 0


async def run_prerequisites(arguments: argparse.Namespace) -> int:
    """``vmnet lab prerequisites``: exit status 1 while something is missing."""
    if arguments.install:
        packages = sorted({problem.package for problem in prerequisites.missing_programs() if problem.package})
        if packages:
            with _console.status(f"installing {' '.join(packages)}") as status:
                await prerequisites.install(packages, lambda line: status.update(f"apt-get: {line[:100]}"))
    problems = prerequisites.find_problems()
    for problem in problems:
        _output.print(f"[red]missing[/] {problem.what}\n  → {problem.remedy}", soft_wrap=True)
    if not problems:
        _output.print("this machine has all that a lab needs")
    return 1 if problems else 0


async def run_demo(arguments: argparse.Namespace) -> int:
    """``vmnet lab demo``: exit status 1 when the scenario found a fault."""
    demo = importlib.import_module("vmnet.lab.demo")
    with Steps() as steps:
        lab = _lab(arguments, steps)
        await lab.up(dies_with_caller=not arguments.keep)
        try:
            status: int = await _unless_failed(lab, demo.run(lab, report=arguments.report, step=steps.say))
        finally:
            if not arguments.keep:
                steps.say("tear the lab down")
                await lab.down()
    return status


async def run_workshop(arguments: argparse.Namespace) -> int:
    """``vmnet lab workshop``: exit status 1 when a step did not show what it must."""
    workshop = importlib.import_module("vmnet.lab.workshop.run")
    options = {"path": arguments.report, "only": arguments.section, "console": _console}
    with Steps() as steps:
        if arguments.on:
            lab = Lab.attached(arguments.on)
            return int(await workshop.run(lab, step=steps.doing, **options))
        lab = Lab(arguments.name, 3, listener=steps.tell, without=("virt",))
        await lab.up(dies_with_caller=not arguments.keep)
        try:
            return await _unless_failed(lab, workshop.run(lab, step=steps.doing, **options))
        finally:
            if not arguments.keep:
                steps.say("tear the lab down")
                await lab.down()


async def _unless_failed(lab: Lab, scenario: Awaitable[int]) -> int:
    """The scenario's exit status. Raises LabError as soon as a process of the lab ends by itself."""
    running = asyncio.ensure_future(scenario)
    failing = asyncio.ensure_future(lab.failure())
    try:
        await asyncio.wait({running, failing}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        failed = failing.result()
        raise LabError(
            f"process {failed['name']} of the lab ended by itself, exit status {failed['exit']}\n{failed['tail']}"
        )
    finally:
        running.cancel()
        failing.cancel()
        await asyncio.gather(running, failing, return_exceptions=True)
