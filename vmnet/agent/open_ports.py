"""The annotation by which a pod opens ports of its eth0."""

from typing import Any, Final

import yaml

from vmnet.model import names
from vmnet.plan.lock import OpenPort, Protocol

LAST_PORT: Final = 65535
_PROTOCOLS: Final = ", ".join(Protocol)


def parse(text: str) -> frozenset[OpenPort]:
    """What a list of ``{protocol, port}`` in YAML opens; nothing when it is empty. ICMP has no port.

    Raises ValueError that names the bad field: then nothing of it is to be opened.
    """
    where = names.OPEN_PORTS_ANNOTATION
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} is not YAML: {reason}") from error
    if found is None:
        return frozenset()
    if not isinstance(found, list):
        raise ValueError(f"{where} is not a list")
    return frozenset(_opening(item, f"{where}[{index}]") for index, item in enumerate(found))


def _opening(item: Any, where: str) -> OpenPort:
    if not isinstance(item, dict):
        raise ValueError(f"{where} is not a mapping of protocol and port")
    try:
        protocol = Protocol(str(item.get("protocol")).lower())
    except ValueError:
        raise ValueError(f"{where}.protocol: {item.get('protocol')!r} is none of {_PROTOCOLS}") from None
    port = item.get("port")
    if protocol is Protocol.ICMP:
        if port not in (None, ""):
            raise ValueError(f"{where}.port: icmp has no ports")
        return OpenPort(protocol)
    # A manifest may quote it; True is an int, and no port.
    number = int(port) if isinstance(port, str) and port.isascii() and port.isdecimal() and len(port) <= 5 else port
    if isinstance(number, bool) or not isinstance(number, int) or not 0 < number <= LAST_PORT:
        raise ValueError(f"{where}.port: {port!r} is not a port (1-{LAST_PORT})")
    return OpenPort(protocol, number)
