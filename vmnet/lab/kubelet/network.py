"""Pod networks, as a container runtime makes them: the node's CNI configuration list, run plugin by plugin.

Follows the CNI specification 1.1, sections 2 to 4: the chain passes ``prevResult`` on, the result is cached for CHECK
and DEL, and DEL runs the chain backwards. Configuration is read again for every ADD.
"""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

CONFIGURATION: Final = Path("/etc/cni/net.d")
BINARIES: Final = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))
CACHE: Final = Path("/var/lib/cni/results")
TIMEOUT: Final = 220.0
"""Seconds for one plugin; kubelet gives a sandbox four minutes in all."""
INTERFACE: Final = "eth0"


class NetworkError(Exception):
    """A plugin refused, could not be run, or the node has no configuration. ``code`` is the CNI code, 0 without one."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Attachment:
    """What identifies one pod's attachment to every plugin."""

    container_id: str
    netns: str
    args: tuple[tuple[str, str], ...]
    """CNI_ARGS in order."""
    interface: str = INTERFACE

    def environment(self, command: str) -> dict[str, str]:
        """The plugin's environment."""
        return {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.container_id,
            "CNI_NETNS": self.netns,
            "CNI_IFNAME": self.interface,
            "CNI_ARGS": ";".join(f"{key}={value}" for key, value in self.args),
        }


def pod_args(namespace: str, name: str, uid: str, container_id: str) -> tuple[tuple[str, str], ...]:
    """What a container runtime tells plugins of a Kubernetes pod."""
    return (
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", namespace),
        ("K8S_POD_NAME", name),
        ("K8S_POD_INFRA_CONTAINER_ID", container_id),
        ("K8S_POD_UID", uid),
    )


@dataclass(frozen=True, slots=True)
class ConfigurationList:
    """One ``.conflist``."""

    name: str
    version: str
    plugins: tuple[Mapping[str, Any], ...]


def read_configuration(directory: Path = CONFIGURATION) -> ConfigurationList:
    """The first configuration by file name. Raises NetworkError when there is none, or it is malformed."""
    paths = sorted(path for path in directory.glob("*.conf*") if path.suffix in (".conflist", ".conf"))
    if not paths:
        raise NetworkError(f"no network configuration in {directory}: the CNI plugin is not installed yet")
    try:
        body = json.loads(paths[0].read_text())
        plugins = body["plugins"] if paths[0].suffix == ".conflist" else [body]
        if not plugins or not all(isinstance(plugin["type"], str) for plugin in plugins):
            raise ValueError("every plugin needs a type")
        return ConfigurationList(body["name"], body.get("cniVersion", "0.2.0"), tuple(plugins))
    except (ValueError, KeyError, TypeError) as error:
        raise NetworkError(f"{paths[0]}: malformed network configuration: {error!r}") from None


class Network:
    """The CNI side of one node."""

    def __init__(
        self,
        configuration: Path = CONFIGURATION,
        binaries: Sequence[Path] = BINARIES,
        cache: Path = CACHE,
        timeout: float = TIMEOUT,
    ) -> None:
        self._configuration = configuration
        self._binaries = tuple(binaries)
        self._cache = cache
        self._timeout = timeout

    async def add(self, attachment: Attachment) -> Mapping[str, Any]:
        """Attach a pod; returns the last plugin's result. After NetworkError the caller must ``delete``."""
        wanted = read_configuration(self._configuration)
        result: Mapping[str, Any] | None = None
        for plugin in wanted.plugins:
            answer = await self._run(wanted, plugin, "ADD", attachment, result)
            if answer is None:
                raise NetworkError(f"plugin {plugin['type']} printed no result")
            result = answer
        self._remember(wanted, attachment, result or {})
        return result or {}

    async def check(self, attachment: Attachment) -> None:
        """Raises NetworkError when a plugin finds the attachment different from what ADD made."""
        wanted, result = self._recall(attachment)
        if wanted is None or result is None:
            raise NetworkError(f"no cached result for container {attachment.container_id}")
        for plugin in wanted.plugins:
            await self._run(wanted, plugin, "CHECK", attachment, result)

    async def delete(self, attachment: Attachment) -> None:
        """Detach; succeeds also when nothing was attached. Raises NetworkError when a plugin refuses: try again."""
        wanted, result = self._recall(attachment)
        if wanted is None:
            # An ADD that failed cached nothing; the plugins that had succeeded must still clean up.
            wanted = read_configuration(self._configuration)
        for plugin in reversed(wanted.plugins):
            await self._run(wanted, plugin, "DEL", attachment, result)
        self._path(attachment).unlink(missing_ok=True)

    async def status(self) -> None:
        """Raises NetworkError when an ADD could not be served now. Versions before 1.1 have no STATUS: then silent."""
        wanted = read_configuration(self._configuration)
        if tuple(int(part) for part in wanted.version.split(".")) < (1, 1):
            return
        for plugin in wanted.plugins:
            await self._run(wanted, plugin, "STATUS", None, None)

    async def _run(
        self,
        wanted: ConfigurationList,
        plugin: Mapping[str, Any],
        command: str,
        attachment: Attachment | None,
        previous: Mapping[str, Any] | None,
    ) -> Mapping[str, Any] | None:
        program = self._find(plugin["type"])
        body = {**plugin, "name": wanted.name, "cniVersion": wanted.version}
        if previous is not None:
            body["prevResult"] = previous
        environment = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "CNI_PATH": ":".join(str(path) for path in self._binaries),
            **(attachment.environment(command) if attachment else {"CNI_COMMAND": command}),
        }
        try:
            process = await asyncio.create_subprocess_exec(
                str(program),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
            )
        except OSError as error:
            raise NetworkError(f"plugin {program}: {error}") from error
        try:
            async with asyncio.timeout(self._timeout):
                output, errors = await process.communicate(json.dumps(body).encode())
        except (TimeoutError, asyncio.CancelledError) as error:
            process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                raise NetworkError(
                    f"plugin type={plugin['type']!r}: {command} did not end within {self._timeout:g} s"
                ) from None
            raise
        if process.returncode != 0:
            raise _failure(plugin["type"], command, output, errors)
        if not output.strip():
            return None
        try:
            result = json.loads(output)
        except ValueError:
            raise NetworkError(f"plugin type={plugin['type']!r}: {command} printed no JSON: {output[:200]!r}") from None
        return result if isinstance(result, dict) else None

    def _find(self, kind: str) -> Path:
        if "/" in kind:
            raise NetworkError(f"plugin type {kind!r} is not a file name")
        for directory in self._binaries:
            if os.access(directory / kind, os.X_OK):
                return directory / kind
        places = ", ".join(str(path) for path in self._binaries)
        raise NetworkError(f"failed to find plugin {kind!r} in {places}")

    def _path(self, attachment: Attachment) -> Path:
        return self._cache / f"{attachment.container_id}-{attachment.interface}"

    def _remember(self, wanted: ConfigurationList, attachment: Attachment, result: Mapping[str, Any]) -> None:
        body = {
            "kind": "cniCacheV1",
            "containerId": attachment.container_id,
            "ifName": attachment.interface,
            "cniArgs": [list(pair) for pair in attachment.args],
            "config": {"name": wanted.name, "cniVersion": wanted.version, "plugins": list(wanted.plugins)},
            "result": result,
        }
        self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self._cache / f".{attachment.container_id}-{attachment.interface}"
        temporary.write_text(json.dumps(body))
        temporary.rename(self._path(attachment))

    def _recall(self, attachment: Attachment) -> tuple[ConfigurationList | None, Mapping[str, Any] | None]:
        try:
            body = json.loads(self._path(attachment).read_text())
        except (FileNotFoundError, ValueError):
            return None, None
        config = body["config"]
        return ConfigurationList(config["name"], config["cniVersion"], tuple(config["plugins"])), body["result"]


def _failure(kind: str, command: str, output: bytes, errors: bytes) -> NetworkError:
    """What a plugin printed when it failed, as an error that names it."""
    try:
        body = json.loads(output)
        message, code = str(body["msg"]), int(body["code"])
        if body.get("details"):
            message += f"; {body['details']}"
    except (ValueError, KeyError, TypeError):
        text = (errors or output).decode(errors="replace").strip()
        message, code = text[-500:] or "no message", 0
    return NetworkError(f"plugin type={kind!r} failed ({command.lower()}): {message}", code)


def addresses(result: Mapping[str, Any], interface: str = INTERFACE) -> tuple[str, ...]:
    """The pod's addresses (without prefix): those of ``interface`` inside the sandbox, as containerd reports them."""
    interfaces = result.get("interfaces") or []
    indices = {i for i, item in enumerate(interfaces) if item.get("name") == interface and item.get("sandbox")}
    return tuple(
        str(item["address"]).split("/")[0]
        for item in result.get("ips") or []
        if item.get("interface") is None or item["interface"] in indices
    )
