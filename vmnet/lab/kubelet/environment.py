"""Environment, arguments, resolver and hosts of a pod's containers, from its spec."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmnet.kube.api import Object

_REFERENCE: Final = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.\-]*)\)")
_SUBSCRIPT: Final = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]\Z")


class Unresolvable(Exception):
    """A container refers to something that is not there; the message names it."""


@dataclass(frozen=True, slots=True)
class PodFacts:
    """What ``fieldRef`` may ask for besides the pod itself."""

    node: str
    node_addresses: tuple[str, ...]
    addresses: tuple[str, ...]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """``$(NAME)`` by its value, ``$$`` by ``$``; an unknown name stays as it is."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        return "$" if name is None else variables.get(name, match.group(0))

    return _REFERENCE.sub(value, text)


def variables(
    container: Mapping[str, Any], pod: Object, facts: PodFacts, base: Mapping[str, str], sources: Mapping[str, Object]
) -> dict[str, str]:
    """The container's environment on top of ``base``. ``sources``: ``configmaps/<name>``, ``secrets/<name>`` → data.

    Raises Unresolvable.
    """
    result = dict(base)
    for item in container.get("envFrom") or []:
        for kind, key in (("configmaps", "configMapRef"), ("secrets", "secretRef")):
            if key in item:
                data = _source(sources, kind, item[key])
                result |= {item.get("prefix", "") + name: value for name, value in (data or {}).items()}
    for item in container.get("env") or []:
        if "valueFrom" in item:
            value = _value_from(item["valueFrom"], pod, facts, sources)
            if value is not None:
                result[item["name"]] = value
        else:
            result[item["name"]] = expand(item.get("value") or "", result)
    return result


def referenced_sources(pod: Object) -> set[str]:
    """ConfigMaps and Secrets that the containers' environments need: ``configmaps/<name>``, ``secrets/<name>``."""
    found = set()
    for container in (*pod["spec"]["containers"], *(pod["spec"].get("initContainers") or [])):
        for item in container.get("envFrom") or []:
            found |= {f"configmaps/{item['configMapRef']['name']}"} if "configMapRef" in item else set()
            found |= {f"secrets/{item['secretRef']['name']}"} if "secretRef" in item else set()
        for item in container.get("env") or []:
            origin = item.get("valueFrom") or {}
            found |= {f"configmaps/{origin['configMapKeyRef']['name']}"} if "configMapKeyRef" in origin else set()
            found |= {f"secrets/{origin['secretKeyRef']['name']}"} if "secretKeyRef" in origin else set()
    return found


def _value_from(origin: Mapping[str, Any], pod: Object, facts: PodFacts, sources: Mapping[str, Object]) -> str | None:
    if "fieldRef" in origin:
        return field(origin["fieldRef"]["fieldPath"], pod, facts)
    for kind, key in (("configmaps", "configMapKeyRef"), ("secrets", "secretKeyRef")):
        if key in origin:
            reference = origin[key]
            data = _source(sources, kind, reference)
            if data is not None and reference["key"] in data:
                return str(data[reference["key"]])
            if reference.get("optional"):
                return None
            raise Unresolvable(f"key {reference['key']!r} not found in {kind} {reference['name']!r}")
    raise Unresolvable(f"the lab's kubelet cannot resolve {sorted(origin)} in an environment")


def _source(sources: Mapping[str, Object], kind: str, reference: Mapping[str, Any]) -> Object | None:
    data = sources.get(f"{kind}/{reference['name']}")
    if data is None and not reference.get("optional"):
        raise Unresolvable(f"{kind} {reference['name']!r} not found")
    return data


def field(path: str, pod: Object, facts: PodFacts) -> str:
    """Value of a downward-API field path. Raises Unresolvable."""
    metadata, spec = pod["metadata"], pod["spec"]
    match = _SUBSCRIPT.match(path)
    if match:
        return str((metadata.get(match.group(1)) or {}).get(match.group(2), ""))
    known = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": facts.node,
        "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
        "status.hostIP": facts.node_addresses[0],
        "status.hostIPs": ",".join(facts.node_addresses),
        "status.podIP": facts.addresses[0] if facts.addresses else "",
        "status.podIPs": ",".join(facts.addresses),
    }
    if path not in known:
        raise Unresolvable(f"fieldPath {path!r} is not known")
    return str(known[path])


def hostname(pod: Object) -> str:
    """The pod's host name: ``spec.hostname``, else its name, at most 63 characters."""
    return str(pod["spec"].get("hostname") or pod["metadata"]["name"])[:63].rstrip("-.")


def resolver(pod: Object, cluster_dns: Sequence[str], domain: str, node_resolver: str) -> str:
    """Contents of /etc/resolv.conf, by ``dnsPolicy`` and ``dnsConfig``."""
    spec = pod["spec"]
    policy = spec.get("dnsPolicy", "ClusterFirst")
    if policy == "Default" or (policy == "ClusterFirst" and spec.get("hostNetwork")):
        lines = node_resolver.splitlines()
    elif policy == "None":
        lines = []
    else:
        search = f"{pod['metadata']['namespace']}.svc.{domain} svc.{domain} {domain}"
        lines = [f"search {search}", *(f"nameserver {server}" for server in cluster_dns), "options ndots:5"]
    config = spec.get("dnsConfig") or {}
    lines += [f"nameserver {server}" for server in config.get("nameservers") or []]
    if config.get("searches"):
        before = next((line for line in lines if line.startswith("search ")), "search")
        lines = [line for line in lines if line is not before]
        lines.insert(0, " ".join([before, *config["searches"]]))
    options = [
        item["name"] + (f":{item['value']}" if item.get("value") else "") for item in config.get("options") or []
    ]
    lines += [f"options {' '.join(options)}"] if options else []
    return "".join(f"{line}\n" for line in lines)


def write_hosts(path: Path, pod: Object, addresses: Sequence[str]) -> None:
    """/etc/hosts of a pod."""
    name = hostname(pod)
    subdomain = pod["spec"].get("subdomain")
    names = f"{name}.{subdomain}.{pod['metadata']['namespace']}.svc.cluster.local\t{name}" if subdomain else name
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    lines += [f"{address}\t{names}" for address in addresses]
    for alias in pod["spec"].get("hostAliases") or []:
        lines.append("\t".join([alias["ip"], *(alias.get("hostnames") or [])]))
    path.write_text("".join(f"{line}\n" for line in lines))
