"""What the administrator decides: one frozen object, and the table that everything about it comes from.

Each field carries its option: what it means, which values it takes, its unit, its flag and its environment variable.
The command line, the configuration file, ``vmnet config`` and the reference are made from these alone. Where a value
comes from (default < file < environment < flag) is ``vmnet.cmd.sources``' matter.
"""

# ruff: noqa: RUF009 - option() is dataclasses.field() with the metadata spelt out

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any, ClassVar, Final, Literal
from urllib.parse import urlsplit

from vmnet.model import addresses, names
from vmnet.model.addresses import IPNetwork

MAX_INTERFACE_NAME: Final = 15
MAX_PORT: Final = 65535
DEFAULT_SERVICES: Final = ("default/kubernetes", "kube-system/kube-dns")
"""Services of the cluster that every network may use; the node's own kube-proxy serves them."""
CNI_CONFIGURATIONS: Final = Path("/etc/cni/net.d")

Shape = Literal["one", "list", "map"]
_DOMAIN: Final = re.compile(
    r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*"
)
"""Labels of at most 63 octets, 253 together (RFC 1035 section 2.3.4)."""
_OBJECT: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_NAMESPACE: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class ConfigurationError(Exception):
    """Values that cannot be: each problem names its place (line, variable or flag), the key, and what is allowed."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where something is served. ``host``: an address or a name; empty for every address of the machine."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Kind(ABC):
    """Values of one type: their text in flags and variables, their JSON in files."""

    json: ClassVar[str] = "string"
    """JSON type of one value."""
    metavar: str
    allowed: str
    """What is allowed, to end a sentence."""

    @abstractmethod
    def read(self, text: str) -> Any:
        """The value of a text. Raises ValueError."""

    def write(self, value: Any) -> Any:
        """The value as JSON has it. ``read`` of its ``text`` gives the value."""
        return str(value)

    def text(self, value: Any) -> str:
        """The value as flags and variables have it."""
        return str(self.write(value))

    def schema(self) -> dict[str, Any]:
        """JSON Schema, as far as it can say."""
        return {"type": self.json}


class Text(Kind):
    """A string that a pattern matches in full."""

    def __init__(self, pattern: re.Pattern[str], metavar: str, allowed: str) -> None:
        self.pattern, self.metavar, self.allowed = pattern, metavar, allowed

    def read(self, text: str) -> str:
        if not self.pattern.fullmatch(text):
            raise ValueError(f"{text!r} is not {self.allowed}")
        return text


class Choice(Kind):
    """One of some words, in whichever case."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.metavar, self.allowed = "{" + ",".join(words) + "}", "one of " + ", ".join(words)

    def read(self, text: str) -> str:
        if text.lower() not in self.words:
            raise ValueError(f"{text!r} is not {self.allowed}")
        return text.lower()

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.words)}


class Integer(Kind):
    """A whole number from ``low`` to ``high``, both included."""

    json = "integer"

    def __init__(self, low: int, high: int, metavar: str = "NUMBER") -> None:
        self.low, self.high, self.metavar = low, high, metavar
        self.allowed = f"a whole number from {low} to {high}"

    def read(self, text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or not self.low <= int(text) <= self.high:
            raise ValueError(f"{text!r} is not {self.allowed}")
        return int(text)

    def write(self, value: Any) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": self.json, "minimum": self.low, "maximum": self.high}


class Boolean(Kind):
    """Yes or no. In variables also 1 and 0, yes and no."""

    json = "boolean"
    metavar = "{true,false}"
    allowed = "true or false"

    def read(self, text: str) -> bool:
        if text.lower() in ("true", "yes", "1"):
            return True
        if text.lower() in ("false", "no", "0"):
            return False
        raise ValueError(f"{text!r} is not {self.allowed}")

    def write(self, value: Any) -> Any:
        return value

    def text(self, value: Any) -> str:
        return "true" if value else "false"


class FilePath(Kind):
    """A path of this machine."""

    metavar = "PATH"
    allowed = "a path"

    def read(self, text: str) -> Path:
        if not text or "\0" in text:
            raise ValueError(f"{text!r} is not {self.allowed}")
        return Path(text)


class Listen(Kind):
    """HOST:PORT to listen on."""

    metavar = "HOST:PORT"
    allowed = "HOST:PORT (IPv6 addresses in brackets, ports from 1 to 65535)"

    def read(self, text: str) -> ListenAddress:
        host, separator, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        host = host[1:-1] if bracketed else host
        try:
            number = int(port) if re.fullmatch(r"[0-9]{1,5}", port) else 0
            if bracketed:
                IPv6Address(host)
            elif not separator or (host and not _DOMAIN.fullmatch(host.lower())):
                raise ValueError(host)
            if not 0 < number <= MAX_PORT:
                raise ValueError(port)
        except ValueError:
            raise ValueError(f"{text!r} is not {self.allowed}") from None
        return ListenAddress(host, number)


class Url(Kind):
    """https://HOST:PORT."""

    metavar = "URL"
    allowed = "https://HOST[:PORT], with nothing behind"

    def read(self, text: str) -> str:
        try:
            found = urlsplit(text)
            sound = found.scheme == "https" and bool(found.hostname) and found.port != 0 and "@" not in found.netloc
        except ValueError:
            sound = False
        if not sound or found.path or found.query or found.fragment or text != f"https://{found.netloc}":
            raise ValueError(f"{text!r} is not {self.allowed}")
        return text


class Cidr(Kind):
    """A range of addresses."""

    metavar = "CIDR"
    allowed = "a CIDR whose host bits are zero, e.g. 10.96.0.0/16"

    def read(self, text: str) -> IPNetwork:
        try:
            return addresses.network(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {self.allowed}") from None


class ServiceName(Kind):
    """A Service of the cluster."""

    metavar = "NAMESPACE/NAME"
    allowed = "NAMESPACE/NAME"

    def read(self, text: str) -> str:
        namespace, _, name = text.partition("/")
        if not _NAMESPACE.fullmatch(namespace) or not _OBJECT.fullmatch(name):
            raise ValueError(f"{text!r} is not {self.allowed}")
        return text


class UpstreamServer(Kind):
    """A DNS server, for a domain or for all names."""

    metavar = "[DOMAIN=]ADDRESS[:PORT]"
    allowed = "[DOMAIN=]ADDRESS[:PORT] (IPv6 addresses with a port in brackets)"

    def read(self, text: str) -> str:
        domain, separator, server = text.rpartition("=")
        host, port = server, "53"
        if server.startswith("["):
            host, _, rest = server[1:].partition("]")
            port = rest.removeprefix(":") if rest else port
        elif server.count(":") == 1:
            host, _, port = server.partition(":")
        try:
            addresses.address(host)
            known = bool(re.fullmatch(r"[0-9]{1,5}", port)) and 0 < int(port) <= MAX_PORT
        except ValueError:
            known = False
        if not known or (separator and not _DOMAIN.fullmatch(domain.lower().removesuffix("."))):
            raise ValueError(f"{text!r} is not {self.allowed}")
        return text


class PhysicalBridge(Kind):
    """A physical network and the bridge that carries it."""

    metavar = "PHYSICAL=BRIDGE"
    allowed = f"PHYSICAL=BRIDGE (a bridge's name has at most {MAX_INTERFACE_NAME} characters)"

    def read(self, text: str) -> tuple[str, str]:
        physical, separator, bridge = text.partition("=")
        sound = physical and bridge and not re.search(r"[\s/,=]", bridge) and not re.search(r"[\s,]", physical)
        if not separator or not sound or len(bridge.encode()) > MAX_INTERFACE_NAME:
            raise ValueError(f"{text!r} is not {self.allowed}")
        return physical, bridge

    def write(self, value: Any) -> Any:
        return "=".join(value)


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that can be decided: a field of a section, with all its names."""

    section: str
    name: str
    kind: Kind
    default: Any
    explanation: str
    flag: str
    variables: tuple[str, ...]
    """Environment variables; the first that is set counts."""
    unit: str = ""
    shape: Shape = "one"
    switch: bool = False
    """The flag has no value, and a twin ``--no-…``."""

    @property
    def key(self) -> str:
        """Name in the file, within its section: the field's, in camel case."""
        first, *others = self.name.split("_")
        return first + "".join(word.capitalize() for word in others)

    @property
    def path(self) -> str:
        """``section.key``."""
        return f"{self.section}.{self.key}"

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        kind = self.kind.allowed
        one = kind + (f" ({self.unit})" if self.unit else "")
        return {"one": one, "list": f"a list, each {one}", "map": f"a mapping, each {one}"}[self.shape]

    def read(self, texts: Iterable[str]) -> Any:
        """The value of the flag's or variable's words. Raises ValueError."""
        found = tuple(self.kind.read(text) for text in texts)
        if self.shape == "one":
            return found[-1]
        if self.shape == "map" and len({key for key, _ in found}) < len(found):
            raise ValueError("a name is there twice")
        return found

    def read_variable(self, text: str) -> Any:
        """The value of an environment variable; commas part the items of lists and mappings. Raises ValueError."""
        words = [text] if self.shape == "one" else [word.strip() for word in text.split(",") if word.strip()]
        return self.read(words)

    def write(self, value: Any) -> Any:
        """The value as the file has it."""
        if value is None:
            return None
        if self.shape == "one":
            return self.kind.write(value)
        return dict(value) if self.shape == "map" else [self.kind.write(item) for item in value]

    def text(self, value: Any) -> str:
        """The value as its variable has it; nothing where there is none."""
        if value is None:
            return ""
        return self.kind.text(value) if self.shape == "one" else ",".join(self.kind.text(item) for item in value)

    def check(self, value: Any) -> None:
        """Raises ValueError unless it is a value that ``read`` could have given."""
        if value is None and self.default is None:
            return
        items = (value,) if self.shape == "one" else value
        try:
            again = tuple(self.kind.read(self.kind.text(item)) for item in items)
            same = again == tuple(items) and all(type(a) is type(b) for a, b in zip(again, items, strict=True))
        except (TypeError, AttributeError, ValueError):
            same = False
        if not same or (self.shape != "one" and not isinstance(value, tuple)):
            raise ValueError(f"{value!r} is not {self.allowed}")

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the value in the file."""
        one = self.kind.schema()
        if self.default is None and "type" in one:
            one = {**one, "type": [one["type"], "null"]}
        found: dict[str, Any] = {
            "one": one,
            "list": {"type": "array", "items": one},
            "map": {"type": "object", "additionalProperties": {"type": "string"}},
        }[self.shape]
        return {"description": self.explanation, "default": self.write(self.default), **found}


def option(
    kind: Kind,
    default: Any,
    explanation: str,
    flag: str,
    *,
    unit: str = "",
    shape: Shape = "one",
    also: str = "",
    switch: bool = False,
) -> Any:
    """A field of a section. ``also``: an environment variable besides the one that follows from the field's name."""
    described = {
        "kind": kind,
        "explanation": explanation,
        "flag": flag,
        "unit": unit,
        "shape": shape,
        "also": also,
        "switch": switch,
    }
    return field(default=default, metadata=described)


class _Section:
    """Checks itself: a section with a value that is not allowed cannot be made. Raises ConfigurationError."""

    __slots__ = ()

    def __post_init__(self) -> None:
        problems = []
        for found in options_of(type(self)):
            try:
                found.check(getattr(self, found.name))
            except ValueError as error:
                problems.append(f"{found.path}: {error}")
        if problems:
            raise ConfigurationError(problems)


def options_of(section: type[Any]) -> tuple[Option, ...]:
    """The options of a section, in order."""
    name = section.__name__.lower()
    prefix = "VMNET_" if section is Shared else f"VMNET_{name.upper()}_"
    return tuple(
        Option(
            section=name,
            name=item.name,
            kind=item.metadata["kind"],
            default=item.default,
            explanation=item.metadata["explanation"],
            flag=item.metadata["flag"],
            variables=tuple(filter(None, (prefix + item.name.upper(), item.metadata["also"]))),
            unit=item.metadata["unit"],
            shape=item.metadata["shape"],
            switch=item.metadata["switch"],
        )
        for item in fields(section)
    )


@dataclass(frozen=True, slots=True)
class Shared(_Section):
    """What controller and agents must agree on, or both need."""

    cluster_domain: str = option(
        Text(_DOMAIN, "DOMAIN", "a DNS domain in lower case, e.g. cluster.local"),
        "cluster.local",
        "DNS domain of the cluster, as the kubelets have it",
        "--cluster-domain",
    )
    kubeconfig: Path | None = option(
        FilePath(),
        None,
        "file to connect to the API server with; where there is none $KUBECONFIG, then the pod's service account",
        "--kubeconfig",
    )
    log_level: str = option(
        Choice("debug", "info", "warning", "error"), "info", "least severity of what is logged", "--log-level"
    )


@dataclass(frozen=True, slots=True)
class Controller(_Section):
    """``vmnet controller``."""

    namespace: str = option(
        Text(_NAMESPACE, "NAMESPACE", "the name of a namespace"),
        names.SYSTEM_NAMESPACE,
        "where the leader's lease, the certificates' secrets and the webhook's Service are",
        "--namespace",
    )
    metrics_address: ListenAddress = option(
        Listen(), ListenAddress("127.0.0.1", 9411), "where /metrics, /livez and /readyz are served", "--metrics-address"
    )
    webhook_address: ListenAddress | None = option(
        Listen(),
        None,
        "where the webhook on virt-launcher pods is served, over TLS; where there is none it is not served",
        "--webhook-address",
    )
    webhook_url: str | None = option(
        Url(), None, "how the API server reaches the webhook where it cannot use a Service", "--webhook-url"
    )


@dataclass(frozen=True, slots=True)
class Agent(_Section):
    """``vmnet agent``, one on each node."""

    node_name: str | None = option(
        Text(_OBJECT, "NAME", "the name of a Node"),
        None,
        "the Node that the agent runs on; an agent must be told",
        "--node-name",
        also="NODE_NAME",
    )
    metrics_address: ListenAddress = option(
        Listen(), ListenAddress("127.0.0.1", 9465), "where /metrics, /livez and /readyz are served", "--metrics-address"
    )
    default_services: tuple[str, ...] = option(
        ServiceName(),
        DEFAULT_SERVICES,
        "Services of the cluster that every network may use",
        "--default-service",
        shape="list",
    )
    service_ranges: tuple[IPNetwork, ...] = option(
        Cidr(),
        (),
        "ranges of cluster addresses besides those of the API's ServiceCIDR objects (Kubernetes 1.33); what nobody has"
        " of them is refused in every network",
        "--service-range",
        shape="list",
    )
    udp_port_for_vxlan: int = option(
        Integer(1, 65535, "PORT"),
        names.VXLAN_PORT,
        "UDP port of the tunnels between nodes, the same on all of them; where it is another one than before, the agent"
        " makes its node's tunnels anew, and hears no node that has not changed yet",
        "--vxlan-port",
    )
    tcp_port_for_agents: int = option(
        Integer(1, 65535, "PORT"),
        names.PEERS_PORT,
        "TCP port of the node's address at which agents hand over connections of machines that migrate, the same on"
        " all nodes",
        "--peers-port",
    )
    cni_socket: Path = option(
        FilePath(), Path(names.CNI_SOCKET), "Unix socket on which the CNI plugin reaches the agent", "--cni-socket"
    )
    cni_configurations: Path = option(
        FilePath(), CNI_CONFIGURATIONS, "directory of the node's CNI configurations", "--cni-conf-dir"
    )
    cni_programs: Path = option(
        FilePath(), Path("/opt/cni/bin"), "directory of the node's CNI plugins", "--cni-bin-dir"
    )
    install_cni: str = option(
        Choice("auto", "yes", "no", "remove"),
        "auto",
        "whether the agent installs the CNI plugin and keeps it at the end of the node's chain, or out of it: auto is"
        " yes in a pod, and no elsewhere",
        "--install-cni",
    )
    multus: str = option(
        Choice("auto", "yes", "no"),
        "auto",
        "whether Multus attaches pods to secondary networks; without it the agent does",
        "--multus",
    )
    localnets: tuple[tuple[str, str], ...] = option(
        PhysicalBridge(),
        (),
        "bridge of the node that carries a physical network of Localnet topology",
        "--localnet",
        shape="map",
    )
    node_mounts: Path | None = option(
        FilePath(),
        None,
        "the node's mount namespace, where the agent has one of its own, as in a container that is not privileged;"
        " networks' namespaces are made, and switches of the kernel set, in it",
        "--node-mounts",
    )
    kubelet_cgroup: str | None = option(
        Text(re.compile(r"(/[^\0\n]*)?"), "PATH", "a path from the root of the control groups, or empty"),
        None,
        "control group (version 2) of the kubelet, as /proc/<pid>/cgroup shows it: only it reaches eth0 of pods that"
        " have a network of their own; where it is not set it is looked for, and empty lets every process of root",
        "--kubelet-cgroup",
    )
    resync_seconds: int = option(
        Integer(5, 86400, "SECONDS"),
        300,
        "every network and the node are looked at again this often: what somebody changed by hand heals without an"
        " event",
        "--resync",
        unit="seconds",
    )
    self_test_seconds: int = option(
        Integer(1, 3600, "SECONDS"),
        30,
        "every network of the node is tested this often: links, gateway, tables",
        "--self-test",
        unit="seconds",
    )


@dataclass(frozen=True, slots=True)
class Dns(_Section):
    """The responder in every network, which the agent runs."""

    upstreams: tuple[str, ...] = option(
        UpstreamServer(),
        (),
        "servers that names outside the cluster domain, or in one domain, are forwarded to; where there is none the"
        " cluster's own DNS, kube-system/kube-dns",
        "--dns-upstream",
        shape="list",
    )
    ttl: int = option(
        Integer(5, 30, "SECONDS"),
        30,
        "time to live of machines' and pods' names; of Services it is 5",
        "--dns-ttl",
        unit="seconds",
    )
    log_queries: bool = option(Boolean(), False, "one line of log for every query", "--log-dns-queries", switch=True)
    socket: Path = option(
        FilePath(),
        Path("/run/vmnet/agent.sock"),
        "Unix socket on which commands on the node ask the agent: vmnet dns query, vmnet status --local",
        "--dns-socket",
    )


@dataclass(frozen=True, slots=True)
class Configuration:
    """All sections."""

    shared: Shared = field(default_factory=Shared)
    controller: Controller = field(default_factory=Controller)
    agent: Agent = field(default_factory=Agent)
    dns: Dns = field(default_factory=Dns)

    def value(self, found: Option) -> Any:
        """What an option is set to."""
        return getattr(getattr(self, found.section), found.name)


SECTIONS: Final[Mapping[str, type[Any]]] = {"shared": Shared, "controller": Controller, "agent": Agent, "dns": Dns}
OPTIONS: Final = tuple(found for section in SECTIONS.values() for found in options_of(section))
BY_PATH: Final = {found.path: found for found in OPTIONS}


def assemble(values: Mapping[str, Any]) -> Configuration:
    """The configuration with these values, by path; the rest are defaults. Raises ConfigurationError."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for path, value in values.items():
        found = BY_PATH[path]
        parts[found.section][found.name] = value
    return Configuration(**{name: section(**parts[name]) for name, section in SECTIONS.items()})


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the configuration file."""
    sections = {}
    for name, section in SECTIONS.items():
        properties = {found.key: found.schema() for found in options_of(section)}
        sections[name] = {"type": "object", "additionalProperties": False, "properties": properties}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vmnet configuration",
        "type": "object",
        "additionalProperties": False,
        "properties": sections,
    }


def reference() -> str:
    """All options, as Markdown: a table for each section."""
    lines: list[str] = []
    for section in SECTIONS:
        lines += [f"## {section}", "", summary(section), ""]
        lines += ["| key | default | allowed | flag | variable | meaning |", "|---|---|---|---|---|---|"]
        for option in (option for option in OPTIONS if option.section == section):
            cells = (
                f"`{option.path}`",
                f"`{json.dumps(option.write(option.default))}`",
                option.allowed,
                f"`{option.flag}`",
                ", ".join(f"`{variable}`" for variable in option.variables),
                option.explanation,
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def summary(section: str) -> str:
    """What a section is about."""
    return str(SECTIONS[section].__doc__).strip().splitlines()[0]
