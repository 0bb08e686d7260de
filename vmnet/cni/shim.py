#!/usr/bin/python3 -IS
"""vmnet-cni: the CNI plugin. It carries each request to the node's agent and holds no logic of its own.

It is started once per interface and pod, so start-up time is its whole cost: only the interpreter's built-in C modules
are imported, and it runs by path, outside any virtual environment. The wire format is described in ``vmnet.cni.call``.
"""

import _socket
import select
import sys
import time
from _json import encode_basestring_ascii as quote

SOCKET = "/run/vmnet/cni.sock"
DELETED_DIRECTORY = "/run/vmnet/cni-deleted"
MAX_FRAME = 1 << 20
WAIT = 60.0
"""Seconds that a request other than DEL waits for the agent to be there. kubelet gives a pod sandbox four minutes."""
ANSWER_WAIT = 120.0
"""Seconds for the agent's answer: ADD waits for the controller's allocation."""
DEL_WAIT = 10.0
"""Seconds for the answer to DEL; after that the agent catches up by itself."""
POLL = 0.05
VERSIONS = '["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]'

EAGAIN = 11
COMMANDS = ("ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION")
VARIABLES = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH")


class NoAgent(Exception):
    """The agent is not there, or went away before it answered."""


def main() -> int:
    """Answer one request: prints to standard output, returns the exit status."""
    from posix import environ  # os would import two dozen modules

    environment = {key.decode("ascii", "replace"): decoded(value) for key, value in environ.items()}
    command = environment.get("CNI_COMMAND", "")
    path = environment.get("VMNET_CNI_SOCKET", SOCKET)
    wait = float(environment.get("VMNET_CNI_WAIT", WAIT))
    try:
        config = read_configuration(wait)
    except OSError as error:
        return fail(
            b"", 5, "the network configuration cannot be read from standard input", error.strerror or str(error)
        )
    if len(config) > MAX_FRAME:
        return fail(config, 5, "the network configuration is too large")
    if command not in COMMANDS:
        return fail(config, 4, "CNI_COMMAND is not known", command)
    if command == "VERSION":
        return answer_version(config)
    body = encode(environment, config)
    if len(body) > MAX_FRAME:
        return fail(config, 5, "the network configuration is too large")
    try:
        if command == "DEL":
            answer = exchange(connect(path, 0.0, DEL_WAIT), body, DEL_WAIT)
        else:
            answer = exchange(connect(path, wait, ANSWER_WAIT), body, ANSWER_WAIT)
    except NoAgent as error:
        if command == "DEL":
            # DEL must not wait: a node whose agent is gone could otherwise never drain.
            leave_marker(environment, body)
            return 0
        if command == "STATUS":
            return fail(config, 50, f"vmnet agent is not serving on {path}", str(error))
        return fail(config, 11, f"vmnet agent is not serving on {path}", str(error))
    sys.stdout.buffer.write(answer[1:])
    sys.stdout.buffer.flush()
    return answer[0]


def decoded(value: bytes) -> str:
    """Text for the agent: bytes that are not UTF-8 stay wrong, and it says so."""
    return value.decode("utf-8", "surrogateescape")


def read_configuration(wait: float) -> bytes:
    """Standard input, up to one byte more than there may be. Raises OSError, also when it does not end in time."""
    from posix import read

    deadline = time.monotonic() + wait
    found = b""
    waiting = select.poll()
    waiting.register(0, select.POLLIN)
    while len(found) <= MAX_FRAME:
        if not waiting.poll(max(deadline - time.monotonic(), 0) * 1000 + 1):
            raise TimeoutError("Operation timed out")
        chunk = read(0, MAX_FRAME + 1 - len(found))
        if not chunk:
            break
        found += chunk
    return found


def encode(environment: dict[str, str], config: bytes) -> bytes:
    """Body of the call."""
    pairs = ",".join(f"{quote(key)}:{quote(environment[key])}" for key in VARIABLES if key in environment)
    return f'{{"environment":{{{pairs}}},"config":{quote(decoded(config))}}}'.encode()


def connect(path: str, wait: float, answer_wait: float = ANSWER_WAIT) -> _socket.socket:
    """A connection to the agent: an absent one is waited for up to ``wait`` seconds, one that is there and has a full
    backlog up to ``answer_wait``. Raises NoAgent."""
    start = time.monotonic()
    while True:
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(path)
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() >= start + (answer_wait if error.errno == EAGAIN else wait):
                raise NoAgent(error.strerror or str(error)) from None
        time.sleep(POLL)


def exchange(connection: _socket.socket, body: bytes, wait: float) -> bytes:
    """Send the call, return the answer's body. Raises NoAgent."""
    deadline = time.monotonic() + wait
    try:
        connection.settimeout(wait)
        connection.sendall(len(body).to_bytes(4, "big") + body)
        size = int.from_bytes(receive(connection, 4, deadline), "big")
        if not 1 <= size <= MAX_FRAME:
            raise NoAgent(f"answer of {size} bytes")
        return receive(connection, size, deadline)
    except OSError as error:
        raise NoAgent(error.strerror or str(error)) from None
    finally:
        connection.close()


def receive(connection: _socket.socket, size: int, deadline: float) -> bytes:
    """Exactly ``size`` bytes. Raises NoAgent, OSError (also at the deadline)."""
    found = b""
    while len(found) < size:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        chunk = connection.recv(size - len(found))
        if not chunk:
            raise NoAgent("the connection was closed before the answer")
        found += chunk
    return found


def answer_version(config: bytes) -> int:
    """VERSION needs no agent."""
    print(f'{{"cniVersion":{quote(version_of(config))},"supportedVersions":{VERSIONS}}}')
    return 0


def fail(config: bytes, code: int, message: str, details: str = "") -> int:
    """Print a CNI error."""
    start = f'"cniVersion":{quote(version_of(config))},"code":{code}'
    print(f'{{{start},"msg":{quote(message)},"details":{quote(details)}}}')
    return 1


def version_of(config: bytes) -> str:
    """``cniVersion`` of a configuration; json is imported only here, off the common path."""
    sys.path[:] = [path for path in sys.path if path]
    import json

    try:
        version = json.loads(config)["cniVersion"]
    except (ValueError, KeyError, TypeError):
        return "1.1.0"
    return version if isinstance(version, str) else "1.1.0"


def leave_marker(environment: dict[str, str], body: bytes) -> None:
    """Tell the agent's next start which interface went away meanwhile; the file appears complete or not at all."""
    import posix

    directory = environment.get("VMNET_CNI_DELETED", DELETED_DIRECTORY)
    name = environment.get("CNI_CONTAINERID", "")
    plain = name.replace(".", "").replace("_", "").replace("-", "")
    if not name or not name[0].isalnum() or not plain.isalnum() or not name.isascii():
        return
    interface = environment.get("CNI_IFNAME", "")
    if interface and "/" not in interface:
        name += f"@{interface}"
    try:
        make_directory(directory)
        temporary = f"{directory}/.{name}.{posix.getpid()}"
        with open(temporary, "wb") as file:
            file.write(body)
        posix.rename(temporary, f"{directory}/{name}")
    except OSError as error:
        # Not fatal: the agent also compares what it holds with the pods that exist.
        print(f"vmnet-cni: cannot note the deletion of {name}: {error}", file=sys.stderr)


def make_directory(path: str) -> None:
    """``mkdir -p`` of the last two levels."""
    import posix

    for directory in (path.rpartition("/")[0], path):
        try:
            posix.mkdir(directory, 0o755)
        except FileExistsError:
            continue


if __name__ == "__main__":
    sys.exit(main())
