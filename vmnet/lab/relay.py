"""An API server outside the lab: its kubeconfig, and the way to it out of the lab's sealed network namespace.

Two processes carry bytes; TLS goes through them end to end. ``fabric``, in the lab, listens where the embedded API
would and passes each connection on to a Unix socket in the lab's directory: those with a path cross namespaces.
``machine``, in the machine's own namespaces, takes it from there to the API. It ends when the lab's PID 1 does.
"""

import argparse
import asyncio
import base64
import copy
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import yaml

from vmnet.lab import topology
from vmnet.lab.directory import ENVIRONMENT_VARIABLE, LabDirectory
from vmnet.lab.errors import LabError

log = logging.getLogger(__name__)

MACHINE_LOG: Final = "api-relay-machine"
CHUNK: Final = 64 << 10
DIAL_SECONDS: Final = 10.0
PROBE_SECONDS: Final = 10.0
OWN_NODES: Final = "vmnet lab"
"""``status.nodeInfo.osImage`` of Nodes that a lab registered."""

_FILES: Final = (
    ("cluster", "certificate-authority"),
    ("user", "client-certificate"),
    ("user", "client-key"),
)
_REFUSED: Final = {
    "cluster": {"proxy-url": "the relay connects directly"},
    "user": {
        "exec": "the lab cannot run it in its sealed namespaces",
        "auth-provider": "the lab cannot run it in its sealed namespaces",
        "as": "the lab's components do not impersonate",
    },
}

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class ExternalApi:
    """One context of a kubeconfig. ``cluster`` and ``user`` are its parts with all files read into them."""

    path: Path
    server: str
    host: str
    port: int
    cluster: Mapping[str, Any]
    user: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "ExternalApi":
        """The current context. Raises LabError that names the field, and what to do."""
        body = _load(path)
        current = body.get("current-context")
        if not current:
            raise LabError(
                f"{path}: current-context is not set", f"set it: kubectl --kubeconfig {path} config use-context NAME"
            )
        context = _named(path, body, "contexts", "context", current)
        cluster = _named(path, body, "clusters", "cluster", context.get("cluster"))
        user = _named(path, body, "users", "user", context["user"]) if context.get("user") else {}
        for kind, part in (("cluster", cluster), ("user", user)):
            for field, reason in _REFUSED[kind].items():
                if part.get(field):
                    raise LabError(
                        f"{path}: {kind} {context[kind]!r} uses {kind}.{field}, which a lab cannot: {reason}",
                        "give a kubeconfig with a direct server and a token or client certificate",
                    )
        for kind, field in _FILES:
            _inline(path, cluster if kind == "cluster" else user, kind, field)
        if user.get("tokenFile"):
            user["token"] = _read(path, user.pop("tokenFile"), "user.tokenFile").decode(errors="replace").strip()
        server = str(cluster.get("server", ""))
        host, port = _target(path, server)
        return cls(path, server, host, port, cluster, user)

    async def check(self, nodes: int) -> None:
        """Ask it, before anything is made. Raises LabError: no answer, a refusal, or foreign nodes of our names."""
        # aiohttp and the kubernetes package: only who has an external API waits for their import.
        from vmnet.kube.api import NODES, KubeError
        from vmnet.kube.client import KubeClient

        wanted = {host.name for host in topology.nodes(nodes)}
        hint = f"see what this says: kubectl --kubeconfig {self.path} get nodes"
        try:
            async with asyncio.timeout(2 * PROBE_SECONDS):
                kube = await KubeClient.connect(self.path, user_agent="vmnet-lab", request_seconds=PROBE_SECONDS)
                try:
                    listed = await kube.list(NODES)
                finally:
                    await kube.close()
        except TimeoutError:
            raise LabError(f"the API {self.server} of {self.path} does not answer", hint) from None
        except (KubeError, OSError, ValueError) as error:
            raise LabError(f"the API {self.server} of {self.path} cannot be used: {error}", hint) from error
        for node in listed.items:
            name = node["metadata"]["name"]
            image = ((node.get("status") or {}).get("nodeInfo") or {}).get("osImage")
            if name in wanted and image != OWN_NODES:
                raise LabError(
                    f"the cluster at {self.server} has a node {name!r} that is not a lab's; the lab would overwrite it",
                    "give the lab an API server of its own, without nodes",
                )

    def write(self, directory: LabDirectory) -> None:
        """Write both kubeconfigs: for the machine with the server as it was given, for the lab with the relay's."""
        parts = urlsplit(self.server)
        inner = {
            **self.cluster,
            "server": parts._replace(netloc=f"{topology.FABRIC_IPV4}:{topology.API_PORT}").geturl(),
        }
        if parts.scheme == "https":
            # The certificate is the original host's.
            inner.setdefault("tls-server-name", self.host)
        for path, cluster in ((directory.kubeconfig, dict(self.cluster)), (directory.inner_kubeconfig, inner)):
            body = {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "lab", "cluster": cluster}],
                "users": [{"name": "lab", "user": dict(self.user)}],
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
                "current-context": "lab",
            }
            path.touch(mode=0o600)
            path.write_text(yaml.safe_dump(body))

    def start(self, directory: LabDirectory, listener: socket.socket, init: int) -> int:
        """Start the ``machine`` process; ``init`` is PID 1 of the lab. Returns its PID; the caller reaps it.

        In a session of its own: Ctrl-C is for the command that holds the lab, and the lab needs its API to the end.
        Raises LabError.
        """
        try:
            watched = os.pidfd_open(init)
        except ProcessLookupError:
            raise LabError(f"lab {directory.name!r} ended while it was starting") from None
        try:
            for descriptor in (listener.fileno(), watched):
                os.set_inheritable(descriptor, True)
            argv = [
                *(sys.executable, "-m", "vmnet.lab.relay", "machine"),
                *("--listener", str(listener.fileno()), "--init", str(watched)),
                *("--host", self.host, "--port", str(self.port)),
            ]
            return os.posix_spawn(
                sys.executable,
                argv,
                {**os.environ, ENVIRONMENT_VARIABLE: str(directory.path)},
                setsid=True,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (
                        os.POSIX_SPAWN_OPEN,
                        1,
                        str(directory.log(MACHINE_LOG)),
                        os.O_WRONLY | os.O_CREAT | os.O_APPEND,
                        0o600,
                    ),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
            )
        finally:
            os.set_inheritable(listener.fileno(), False)
            os.close(watched)


def listen(directory: LabDirectory) -> socket.socket:
    """The Unix socket between both processes, listening before either of them runs."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory.api_socket))
    listener.listen(128)
    return listener


def _load(path: Path) -> dict[str, Any]:
    try:
        body = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise LabError(
            f"the kubeconfig {path} cannot be read: {reason}", "give --kubeconfig the path of a kubeconfig file"
        ) from error
    except yaml.YAMLError as error:
        raise LabError(f"{path} is not YAML: {error}", "give --kubeconfig the path of a kubeconfig file") from error
    if not isinstance(body, dict):
        raise LabError(f"{path} is not a kubeconfig", "give --kubeconfig the path of a kubeconfig file")
    return body


def _named(path: Path, body: Mapping[str, Any], listing: str, field: str, name: object) -> dict[str, Any]:
    for item in body.get(listing) or ():
        if isinstance(item, dict) and item.get("name") == name and isinstance(item.get(field), dict):
            return copy.deepcopy(dict(item[field]))
    raise LabError(
        f"{path}: {listing} has no usable entry {name!r}", f"look at it with: kubectl --kubeconfig {path} config view"
    )


def _inline(path: Path, part: dict[str, Any], kind: str, field: str) -> None:
    """Replace a file's name by its content, which wins over the file when both are there."""
    name = part.pop(field, None)
    if name and not part.get(f"{field}-data"):
        part[f"{field}-data"] = base64.b64encode(_read(path, name, f"{kind}.{field}")).decode()


def _read(path: Path, name: object, field: str) -> bytes:
    # Relative names are relative to the kubeconfig.
    place = path.parent / str(name)
    try:
        return place.read_bytes()
    except OSError as error:
        raise LabError(
            f"{path}: {field}: {place} cannot be read: {error.strerror}", "correct the path in the kubeconfig"
        ) from error


def _target(path: Path, server: str) -> tuple[str, int]:
    try:
        parts = urlsplit(server)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("https", "http") or not host:
        raise LabError(f"{path}: cluster.server {server!r} is not a URL", "it reads https://HOST:PORT")
    return host, port or (443 if parts.scheme == "https" else 80)


# The processes


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def join(one: Streams, other: Streams) -> None:
    """Carry bytes both ways until both sides have ended, or one has failed; then close both."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_copy(one[0], other[1]), name="there")
            group.create_task(_copy(other[0], one[1]), name="back")
    except* OSError as error:
        log.debug("a connection ended: %s", error.exceptions)
    finally:
        one[1].close()
        other[1].close()


def _notice_dead_peer(writer: asyncio.StreamWriter) -> None:
    """The clients' own keep-alive ends at the relay: without this a watch on a lost API would hang."""
    found: socket.socket = writer.get_extra_info("socket")
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)


async def _machine(options: argparse.Namespace, stop: asyncio.Event) -> int:
    """Until the lab's PID 1 has ended."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                far = await asyncio.open_connection(options.host, options.port)
        except OSError as error:  # also TimeoutError
            log.warning("%s port %d: %s", options.host, options.port, error or "no answer")
            writer.close()
            return
        _notice_dead_peer(far[1])
        await join((reader, writer), far)

    listener = socket.socket(fileno=options.listener)
    listener.setblocking(False)
    asyncio.get_running_loop().add_reader(options.init, stop.set)
    server = await asyncio.start_unix_server(connected, sock=listener)
    await stop.wait()
    server.close()
    return 0


async def _fabric(options: argparse.Namespace, stop: asyncio.Event) -> int:
    """Until told; exit status 1 when the other process is gone, which the lab reports."""
    gone = False

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal gone
        try:
            far = await asyncio.open_unix_connection(str(options.socket))
        except (ConnectionRefusedError, FileNotFoundError) as error:
            log.error("the relay on the machine has ended: %s", error)
            gone = True
            stop.set()
            writer.close()
            return
        await join((reader, writer), far)

    server = await asyncio.start_server(connected, str(topology.FABRIC_IPV4), topology.API_PORT)
    os.write(options.ready_fd, b"ready\n")
    os.close(options.ready_fd)
    await stop.wait()
    server.close()
    return 1 if gone else 0


def parser() -> argparse.ArgumentParser:
    """The processes' options."""
    found = argparse.ArgumentParser(prog="python -m vmnet.lab.relay", description=__doc__)
    roles = found.add_subparsers(dest="role", required=True)
    machine = roles.add_parser("machine")
    machine.add_argument("--listener", type=int, required=True, help="descriptor of the listening Unix socket")
    machine.add_argument("--init", type=int, required=True, help="pidfd of the process to end with")
    machine.add_argument("--host", required=True)
    machine.add_argument("--port", type=int, required=True)
    machine.set_defaults(run=_machine)
    fabric = roles.add_parser("fabric")
    fabric.add_argument("--socket", type=Path, required=True)
    fabric.add_argument("--ready-fd", type=int, required=True, help="gets one line when connections are taken")
    fabric.set_defaults(run=_fabric)
    return found


async def _run(options: argparse.Namespace) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    status: int = await options.run(options, stop)
    return status


def main() -> None:
    """Run one of both."""
    options = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(asyncio.run(_run(options)))


if __name__ == "__main__":
    main()
