"""One CNI request: a plugin's environment and standard input, parsed and validated once (CNI specification 1.1)."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from vmnet.cni.errors import CniError, Code
from vmnet.model.endpoint import PodReference

SUPPORTED_VERSIONS: Final = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

SINCE: Final[Mapping[str, tuple[int, ...]]] = {"CHECK": (0, 4, 0), "STATUS": (1, 1, 0), "GC": (1, 1, 0)}
"""The version of the specification that brought a command: configurations of older ones do not have it."""

_IDENTIFIER: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*\Z")
_MAX_INTERFACE_NAME: Final = 15


class Command(StrEnum):
    """``CNI_COMMAND``. VERSION is answered by the shim."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    STATUS = "STATUS"
    GC = "GC"


@dataclass(frozen=True, slots=True, order=True)
class Attachment:
    """One entry of ``cni.dev/valid-attachments``: everything else is garbage."""

    container_id: str
    interface: str


@dataclass(frozen=True, slots=True)
class Request:
    """A valid request. ``netns`` is empty where the command allows it (DEL of a vanished container, STATUS, GC)."""

    command: Command
    version: str
    """``cniVersion`` of the configuration; results and errors are answered in it."""
    container_id: str = ""
    netns: str = ""
    ifname: str = ""
    args: Mapping[str, str] = field(default_factory=dict)
    """``CNI_ARGS``, e.g. K8S_POD_NAMESPACE, K8S_POD_NAME, K8S_POD_UID."""
    config: Mapping[str, Any] = field(default_factory=dict)
    previous_result: Mapping[str, Any] | None = None
    valid_attachments: tuple[Attachment, ...] = ()

    @property
    def network(self) -> str:
        """``name`` of the network configuration."""
        return str(self.config.get("name", ""))

    @property
    def attachment(self) -> str | None:
        """``<namespace>/<nad>`` when a meta-plugin asks for one attachment, with its definition as configuration; None
        for a call of the chain that every pod passes."""
        return str(self.config.get("netAttachDefName") or "") or None

    @property
    def pod(self) -> PodReference | None:
        """The pod of this container; None when the runtime is not a Kubernetes one. ``uid`` may be empty."""
        namespace, name = self.args.get("K8S_POD_NAMESPACE"), self.args.get("K8S_POD_NAME")
        if not namespace or not name:
            return None
        return PodReference(namespace, name, self.args.get("K8S_POD_UID", ""))


def parse(environment: Mapping[str, str], config: bytes) -> Request:
    """Validate a request. Raises CniError with the code that the specification gives to each fault."""
    command = _command(environment)
    body = _config(config)
    version = body.get("cniVersion", "0.2.0")
    if version not in SUPPORTED_VERSIONS:
        raise CniError(
            Code.INCOMPATIBLE_VERSION,
            f"cniVersion {version!r} is not supported",
            f"supported: {', '.join(SUPPORTED_VERSIONS)}",
        )
    since = SINCE.get(command, (0,))
    if tuple(map(int, version.split("."))) < since:
        raise CniError(
            Code.INCOMPATIBLE_VERSION,
            f"cniVersion {version} has no {command}",
            f"{command} came with {'.'.join(map(str, since))}",
        )
    container_id, netns, ifname = _attachment(command, environment)
    previous = _previous_result(body)
    # A meta-plugin's ADD of one attachment is the first of its own chain.
    chained = command is Command.ADD and not body.get("netAttachDefName")
    if previous is None and (chained or command is Command.CHECK):
        raise CniError(
            Code.INVALID_CONFIG,
            f"{command} needs prevResult in the network configuration",
            "this plugin is chained: the configuration's first plugin is the default network's",
        )
    return Request(
        command=command,
        version=version,
        container_id=container_id,
        netns=netns,
        ifname=ifname,
        args=parse_args(environment.get("CNI_ARGS", "")),
        config=body,
        previous_result=previous,
        valid_attachments=_valid_attachments(body) if command is Command.GC else (),
    )


def version_of(config: bytes) -> str:
    """``cniVersion`` of a configuration, valid or not, for the answer; 1.1.0 where it names none."""
    try:
        version = json.loads(config)["cniVersion"]
    except (ValueError, KeyError, TypeError):
        return "1.1.0"
    return version if isinstance(version, str) else "1.1.0"


def parse_args(text: str) -> dict[str, str]:
    """``A=1;B=2`` as a dict. Raises CniError(INVALID_ENVIRONMENT)."""
    found = {}
    for item in filter(None, text.split(";")):
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_ARGS: {item!r} is not KEY=VALUE")
        found[key] = value
    return found


def _command(environment: Mapping[str, str]) -> Command:
    text = environment.get("CNI_COMMAND", "")
    try:
        return Command(text)
    except ValueError:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_COMMAND {text!r} is not known") from None


def _config(config: bytes) -> dict[str, Any]:
    try:
        body = json.loads(config)
    except ValueError as error:
        raise CniError(Code.DECODING_FAILURE, "the network configuration is not JSON", str(error)) from None
    if not isinstance(body, dict):
        raise CniError(Code.DECODING_FAILURE, "the network configuration is not a JSON object")
    name = body.get("name", "")
    if not isinstance(name, str) or not _IDENTIFIER.match(name):
        raise CniError(Code.INVALID_CONFIG, f"name {name!r} is not a network's name")
    return body


def _attachment(command: Command, environment: Mapping[str, str]) -> tuple[str, str, str]:
    container_id = environment.get("CNI_CONTAINERID", "")
    netns = environment.get("CNI_NETNS", "")
    ifname = environment.get("CNI_IFNAME", "")
    if command in (Command.STATUS, Command.GC):
        return "", "", ""
    if not _IDENTIFIER.match(container_id):
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_CONTAINERID {container_id!r} is not a container id")
    # A runtime may call DEL after the namespace is gone, with an empty CNI_NETNS.
    if not netns and command is not Command.DEL:
        raise CniError(Code.INVALID_ENVIRONMENT, "CNI_NETNS is empty")
    if netns and not netns.startswith("/") and command is not Command.DEL:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_NETNS {netns!r} is not a path")
    wrong = any(character in "/:" or character.isspace() for character in ifname)
    if wrong or not 1 <= len(ifname.encode()) <= _MAX_INTERFACE_NAME or ifname in (".", ".."):
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_IFNAME {ifname!r} is not an interface name")
    return container_id, netns, ifname


def _previous_result(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    previous = body.get("prevResult")
    if previous is None:
        return None
    if not isinstance(previous, dict):
        raise CniError(Code.INVALID_CONFIG, "prevResult is not a JSON object")
    for key in ("interfaces", "ips", "routes"):
        items = previous.get(key)
        if items is not None and not (isinstance(items, list) and all(isinstance(item, dict) for item in items)):
            raise CniError(Code.INVALID_CONFIG, f"prevResult.{key} is not a list of objects")
    return previous


def _valid_attachments(body: Mapping[str, Any]) -> tuple[Attachment, ...]:
    items = body.get("cni.dev/valid-attachments")
    # Absent is not empty: without the list a GC would free what is in use.
    if not isinstance(items, list):
        raise CniError(Code.INVALID_CONFIG, "GC needs the list cni.dev/valid-attachments")
    try:
        return tuple(Attachment(str(item["containerID"]), str(item["ifname"])) for item in items)
    except (TypeError, KeyError):
        raise CniError(
            Code.INVALID_CONFIG, "cni.dev/valid-attachments: each entry needs containerID and ifname"
        ) from None
