"""The node's CNI configurations, as text: which one pods are made by, and this plugin's place at the end of its chain.

A runtime uses the first file by name (containerd and CRI-O alike). Where that is Multus', the network that Multus
delegates to is the first one that is not. A list (``plugins``) gets this plugin as its last; a single plugin's
configuration cannot hold another one, so a list of both is put before it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from vmnet.cni.request import SUPPORTED_VERSIONS

PLUGIN: Final = "vmnet-cni"
"""``type`` in the chain."""
WRAPPER: Final = "00-vmnet.conflist"
"""The list around a single plugin's configuration. Multus' file, 00-multus.conf, comes before it."""
WRAPS: Final = "wraps"
"""Key of this plugin's entry in the wrapper: the file that the list was made of."""
EXTENSIONS: Final = (".conf", ".conflist", ".json")
"""What runtimes read."""
CHAINS_SINCE: Final = "0.3.1"
"""A configuration that names an older version, or none, is given this one when it becomes part of a list."""

_MAX_SIZE: Final = 1 << 20


class Unusable(Exception):
    """A configuration that this plugin cannot be chained into; the message says why."""


def parse(text: bytes) -> dict[str, Any]:
    """A configuration. Raises Unusable."""
    if len(text) > _MAX_SIZE:
        raise Unusable(f"{len(text)} bytes are too many")
    try:
        body = json.loads(text)
    except ValueError as error:
        raise Unusable(f"it is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Unusable("it is not a JSON object")
    return body


def render(body: Mapping[str, Any]) -> bytes:
    """Text of a configuration."""
    return json.dumps(body, indent=2, ensure_ascii=False).encode() + b"\n"


def candidates(names: Iterable[str]) -> list[str]:
    """Files that a runtime reads, in its order, without this plugin's own."""
    return sorted(name for name in names if name.endswith(EXTENSIONS) and name != WRAPPER)


def is_list(body: Mapping[str, Any]) -> bool:
    """Whether it is a list of plugins rather than one plugin's configuration."""
    return "plugins" in body


def is_multus(body: Mapping[str, Any]) -> bool:
    """Whether it calls Multus, which calls the default network's plugins."""
    return any(str(plugin.get("type", "")).startswith("multus") for plugin in _plugins(body))


def copies(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Configurations that Multus' own file holds copies of (``delegates``): the first is the default network's."""
    found = [plugin.get("delegates") for plugin in _plugins(body)]
    return [item for items in found if isinstance(items, list) for item in items if isinstance(item, dict)]


def passed_by(body: Mapping[str, Any], name: str) -> str | None:
    """Why Multus does not call what file ``name`` says; None when it does.

    It may hold a copy of an older state of it, or name another file (``clusterNetwork``)."""
    held = copies(body)
    if held:
        return (
            None if has_plugin(held[0]) else f"it holds a copy of the default network's configuration without {PLUGIN}"
        )
    for plugin in _plugins(body):
        named = plugin.get("clusterNetwork")
        if isinstance(named, str) and named.endswith(EXTENSIONS) and PurePosixPath(named).name != name:
            return f"it calls {named}"
    return None


def has_plugin(body: Mapping[str, Any]) -> bool:
    """Whether this plugin is anywhere in it."""
    return any(plugin.get("type") == PLUGIN for plugin in _plugins(body))


def chained(body: Mapping[str, Any]) -> dict[str, Any]:
    """A list with this plugin once, at its end; everything else as it was. Raises Unusable."""
    plugins = _plugins(body)
    others = [plugin for plugin in plugins if plugin.get("type") != PLUGIN]
    if not others:
        raise Unusable("it has no plugin that makes the default network")
    _check_versions(body)
    mine = [plugin for plugin in plugins if plugin.get("type") == PLUGIN]
    return {**body, "plugins": [*others, mine[-1] if mine else {"type": PLUGIN}]}


def unchained(body: Mapping[str, Any]) -> dict[str, Any]:
    """A list without this plugin."""
    return {**body, "plugins": [plugin for plugin in _plugins(body) if plugin.get("type") != PLUGIN]}


def wrapped(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A list of the plugin of file ``name`` and this one. Raises Unusable."""
    if not isinstance(body.get("type"), str) or not isinstance(body.get("name"), str):
        raise Unusable("it has no type or no name")
    version = body.get("cniVersion")
    usable = isinstance(version, str) and version not in ("", "0.1.0", "0.2.0")
    found = {
        "cniVersion": version if usable else CHAINS_SINCE,
        "name": body["name"],
        "plugins": [dict(body), {"type": PLUGIN, WRAPS: name}],
    }
    _check_versions(found)
    return found


def _plugins(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    plugins = body.get("plugins") if is_list(body) else [body]
    return [item for item in plugins if isinstance(item, dict)] if isinstance(plugins, list) else []


def _check_versions(body: Mapping[str, Any]) -> None:
    """With a version that this plugin does not speak, no pod of the node could start."""
    offered = [body.get("cniVersion", "0.2.0"), *(body.get("cniVersions") or ())]
    if not any(version in SUPPORTED_VERSIONS for version in offered):
        raise Unusable(f"cniVersion {offered[0]} is not one of {', '.join(SUPPORTED_VERSIONS)}")
