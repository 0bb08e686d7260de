"""Every command of the README and the documents is run by a test, or the reason why none can is here.

``console`` blocks are run as they stand (test_docs.py those of the pages, test_monitoring.py those of the runbooks).
``sh`` blocks are what a reader types elsewhere: on a node, in a clone of the repository, on a cluster. They are run
here, in the lab of red and blue, with its names where the text has placeholders.
"""

import asyncio
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from vmnet.cmd import main
from vmnet.lab import kubectl
from vmnet.lab.demo import NETWORK, RED
from vmnet.lab.topology import METRICS_PORT
from vmnet.model import names
from vmnet.model.names import NetworkId

pytestmark = [pytest.mark.timeout(300)]

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
KINDS: Final = {"console", "sh", "yaml", "promql", "json", "text"}
_RESPONDER: Final = "tests/unit/vmnet_dns/test_server.py runs the program, on a port that is free"
EXCUSED: Final = {
    "make demo": "tests/lab/test_demo.py is this scenario; the target installs, and runs it",
    "make workshop": "tests/lab/test_workshop.py is this command",
    "make test": "it is what runs this test",
    "make lint": "make test begins with it",
    ".venv/bin/pytest tests/unit/plan -n0": "a part of make test",
    ".venv/bin/pytest tests/netns/test_datapath.py": "a part of make test",
    ".venv/bin/vmnet lab up": "the fixture of these tests does it",
    ".venv/bin/vmnet lab down": "the fixture of these tests does it",
    "kubectl -n vmnet-system rollout status daemonset/vmnet-agent": "in the lab agents are processes, not pods",
    "kubectl get daemonset -n vmnet-system vmnet-agent": "in the lab agents are processes, not pods",
    "python -m vmnet_dns zone.toml --listen 127.0.0.1:5353 --upstream 1.1.1.1 --allow 127.0.0.0/8": _RESPONDER,
    "python -m vmnet_dns --help": _RESPONDER,
    "kubectl get servicemonitors -n vmnet-system --show-labels": "needs the Prometheus operator's definitions",
}
"""Commands that no test runs as they stand, and why."""
INSTALLS: Final = re.compile(r"kubectl apply --server-side (?:-k (deploy/\S*)|-f deploy/install\.yaml)")
"""tests/contract/test_deploy.py does these, on an API server of their own: the lab has its own webhook."""
_BLOCK: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE: Final = re.compile(r"`((?:vmnet|make) [a-z][^`\n]*)`")


def blocks(path: Path, kind: str) -> Iterator[str]:
    """Texts of a page's blocks of a kind."""
    return (text for found, text in _BLOCK.findall(path.read_text()) if found == kind)


def shell_commands() -> list[str]:
    """The commands of all ``sh`` blocks, without the comments behind them, each once."""
    lines = [line for path in PAGES for text in blocks(path, "sh") for line in text.splitlines()]
    return list(dict.fromkeys(stripped for line in lines if (stripped := re.sub(r"\s+#.*", "", line).strip())))


def test_every_block_is_of_a_known_kind() -> None:
    for path in PAGES:
        kinds = {kind for kind, _ in _BLOCK.findall(path.read_text())}
        assert kinds <= KINDS, path


def test_what_is_not_run_is_in_the_documents_and_what_is_installed_exists() -> None:
    assert set(EXCUSED) <= set(shell_commands())
    for command in shell_commands():
        if (found := INSTALLS.fullmatch(command)) and found[1]:
            assert (ROOT / found[1] / "kustomization.yaml").exists(), command


def test_figures_and_samples_hold_no_commands() -> None:
    for path in PAGES:
        for kind in ("text", "json", "yaml"):
            for text in blocks(path, kind):
                assert not re.search(r"^(\$|kubectl|make|vmnet|virtctl) ", text, re.MULTILINE), (path, text)


def test_commands_within_sentences_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    names = {command.name for command in main.COMMANDS} | {"lab"}
    for path in PAGES:
        for command in _INLINE.findall(_BLOCK.sub("", path.read_text())):
            program, word, *_ = command.split()
            assert word in (targets if program == "make" else names), (path, command)


@pytest.mark.asyncio(loop_scope="session")
async def test_commands_of_the_shell_blocks_run(world: Any, tmp_path: Path) -> None:
    lab = f"{sys.executable} -m vmnet.cmd lab"
    (tmp_path / "kubectl").symlink_to(kubectl.find())
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "KUBECONFIG": str(world.lab.kubeconfig),
    }
    node = await world.node_of(RED)
    url = await world.agent_url(node)
    # ClusterUserDefinedNetwork of the demo: the one network that is on red's node.
    (network,) = (await world.get("cudn"))["items"]
    identity = NetworkId(int(network["metadata"]["annotations"][names.NETWORK_ID_ANNOTATION]))
    replaced = {
        f"http://NODE_ADDRESS:{METRICS_PORT}": url,
        "www.example.org": "www.outside.test",
        "NETWORK ": f"{names.cudn_network_name(NETWORK)} ",
        "blue-namespace_happy-tenant ": f"{names.cudn_network_name(NETWORK)} ",
        "vmnet-1 ": f"{names.network_namespace(identity)} ",
    }
    for command in shell_commands():
        if command in EXCUSED or INSTALLS.fullmatch(command):
            continue
        text = command
        for placeholder, value in replaced.items():
            text = text.replace(placeholder, value)
        if found := re.match(r"\.venv/bin/vmnet lab (\w+) ?(.*)", text):
            text = f"{lab} {found[1]} --name {world.lab.directory.name} {found[2]}"
        elif "tcpdump" in text:
            await _captures(world, node, text)
            continue
        elif not text.startswith("kubectl "):
            text = f"{lab} exec --name {world.lab.directory.name} {node} -- {_here(text)}"
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", text),
            cwd=ROOT,
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        # What leaves a console; nobody else reads it.
        output, errors = await asyncio.wait_for(process.communicate(b"\x1d"), 150)
        assert process.returncode == 0, (command, text, output.decode(), errors)
        assert output or errors, (command, text)


def _here(command: str) -> str:
    """The same, with this tree's vmnet."""
    return re.sub(r"^vmnet ", f"{sys.executable} -m vmnet.cmd ", command)


async def _captures(world: Any, node: str, command: str) -> None:
    """A capture goes on until it is ended: it must have begun."""
    log = await world.lab.spawn("captures", node, ["bash", "-c", f"exec {command}"])

    async def listens() -> bool:
        return "listening on br0" in log.read_text()

    try:
        await world.until(f"{command} listens", listens)
    finally:
        await world.lab.kill("captures")
        await world.lab.wait("captures")
