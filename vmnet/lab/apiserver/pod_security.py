"""The Pod Security Standards and the admission that enforces them by a namespace's labels, worded as the real server's.

Pods are judged when they are made. Templates of workloads, which the real server warns of too, are not.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from vmnet.lab.apiserver.resources import ResourceInfo
from vmnet.lab.apiserver.status import forbidden

Pod = Mapping[str, Any]
"""``metadata`` and ``spec`` of a pod or of a template."""

PRIVILEGED: Final = "privileged"
BASELINE: Final = "baseline"
RESTRICTED: Final = "restricted"
LEVELS: Final = (PRIVILEGED, BASELINE, RESTRICTED)

_BASELINE_CAPABILITIES: Final = frozenset(
    {
        *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE"),
        *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
    }
)
_SAFE_SYSCTLS: Final = frozenset(
    {
        *("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start"),
        *("net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports"),
        *("net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl"),
        *("net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"),
    }
)
_SAFE_VOLUMES: Final = frozenset(
    {
        *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"),
        "image",
    }
)
_PROFILES: Final = ("RuntimeDefault", "Localhost")


def violations(pod: Pod, level: str) -> list[str]:
    """What of a pod a level forbids, one text for each of its rules; empty when the pod may be."""
    checks = {PRIVILEGED: (), BASELINE: _BASELINE, RESTRICTED: (*_BASELINE, *_RESTRICTED)}[level]
    found = (check(pod["spec"]) for check in checks)
    return [text for text in found if text]


_LABEL: Final = "pod-security.kubernetes.io/"


def concerned(info: ResourceInfo, operation: str, subresource: str, namespace: Pod | None) -> bool:
    """Whether a write makes a pod where a level is enforced or warned of; ``namespace`` is the one it is in."""
    labels = (namespace or {}).get("metadata", {}).get("labels") or {}
    making = info.storage_key == ("", "pods") and (operation, subresource) == ("CREATE", "")
    return making and any(labels.get(_LABEL + mode, PRIVILEGED) != PRIVILEGED for mode in ("enforce", "warn"))


def check(info: ResourceInfo, pod: Pod, namespace: Pod, warnings: list[str]) -> None:
    """Judge a new pod by its namespace's labels. Raises ApiError (403)."""
    labels = namespace["metadata"].get("labels") or {}
    for mode in ("enforce", "warn"):
        level = labels.get(_LABEL + mode, PRIVILEGED)
        version = labels.get(f"{_LABEL}{mode}-version", "latest")
        # A level that nobody knows is the strictest.
        found = violations(pod, level if level in LEVELS else RESTRICTED)
        text = f'PodSecurity "{level}:{version}": {", ".join(found)}'
        if found and mode == "enforce":
            raise forbidden(info, str(pod["metadata"]["name"]), f"violates {text}")
        if found:
            warnings.append(f"would violate {text}")


def _containers(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [item for kind in ("initContainers", "containers", "ephemeralContainers") for item in spec.get(kind) or ()]


def _context(item: Mapping[str, Any]) -> Mapping[str, Any]:
    return item.get("securityContext") or {}


def _named(items: Iterable[Mapping[str, Any]]) -> str:
    names = [f'"{item["name"]}"' for item in items]
    return f"container{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _where(spec: Mapping[str, Any], wrong: Callable[[Mapping[str, Any]], bool]) -> str:
    """The containers that are wrong; empty when none is."""
    found = [item for item in _containers(spec) if wrong(_context(item))]
    return _named(found) if found else ""


def _host_namespaces(spec: Mapping[str, Any]) -> str:
    found = [f"{name}=true" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    return f"host namespaces ({', '.join(found)})" if found else ""


def _privileged(spec: Mapping[str, Any]) -> str:
    where = _where(spec, lambda context: bool(context.get("privileged")))
    return f"privileged ({where} must not set securityContext.privileged=true)" if where else ""


def _added(context: Mapping[str, Any]) -> set[str]:
    return set((context.get("capabilities") or {}).get("add") or ())


def _baseline_capabilities(spec: Mapping[str, Any]) -> str:
    where = _where(spec, lambda context: bool(_added(context) - _BASELINE_CAPABILITIES))
    extra = sorted({name for item in _containers(spec) for name in _added(_context(item)) - _BASELINE_CAPABILITIES})
    shown = ", ".join(f'"{name}"' for name in extra)
    return f"non-default capabilities ({where} must not include {shown} in securityContext.capabilities.add)" if where else ""  # fmt: skip  # noqa: E501


def _host_paths(spec: Mapping[str, Any]) -> str:
    found = [f'"{volume["name"]}"' for volume in spec.get("volumes") or () if "hostPath" in volume]
    return f"hostPath volumes (volume{'s' if len(found) > 1 else ''} {', '.join(found)})" if found else ""


def _host_ports(spec: Mapping[str, Any]) -> str:
    using = [item for item in _containers(spec) if any(port.get("hostPort") for port in item.get("ports") or ())]
    ports = sorted({port["hostPort"] for item in using for port in item.get("ports") or () if port.get("hostPort")})
    shown = ", ".join(str(port) for port in ports)
    return f"hostPort ({_named(using)} use{'' if len(using) > 1 else 's'} hostPort{'s' if len(ports) > 1 else ''} {shown})" if using else ""  # fmt: skip  # noqa: E501


def _proc_mount(spec: Mapping[str, Any]) -> str:
    where = _where(spec, lambda context: context.get("procMount") not in (None, "Default"))
    return f'procMount ({where} must not set securityContext.procMount to "Unmasked")' if where else ""


def _sysctls(spec: Mapping[str, Any]) -> str:
    names = [item["name"] for item in _context(spec).get("sysctls") or () if item["name"] not in _SAFE_SYSCTLS]
    return f"forbidden sysctls ({', '.join(names)})" if names else ""


def _unconfined(spec: Mapping[str, Any]) -> str:
    def wrong(context: Mapping[str, Any]) -> bool:
        return (context.get("seccompProfile") or {}).get("type") == "Unconfined"

    where = ["pod"] if wrong(_context(spec)) else []
    where += [found] if (found := _where(spec, wrong)) else []
    text = 'must not set securityContext.seccompProfile.type to "Unconfined"'
    return f"seccompProfile ({' and '.join(where)} {text})" if where else ""


def _escalation(spec: Mapping[str, Any]) -> str:
    where = _where(spec, lambda context: context.get("allowPrivilegeEscalation") is not False)
    text = "must set securityContext.allowPrivilegeEscalation=false"
    return f"allowPrivilegeEscalation != false ({where} {text})" if where else ""


def _restricted_capabilities(spec: Mapping[str, Any]) -> str:
    def keeps(context: Mapping[str, Any]) -> bool:
        return "ALL" not in ((context.get("capabilities") or {}).get("drop") or ())

    texts = []
    if where := _where(spec, keeps):
        texts.append(f'{where} must set securityContext.capabilities.drop=["ALL"]')
    if where := _where(spec, lambda context: bool(_added(context) - {"NET_BIND_SERVICE"})):
        extra = sorted({name for item in _containers(spec) for name in _added(_context(item))} - {"NET_BIND_SERVICE"})
        shown = ", ".join(f'"{name}"' for name in extra)
        texts.append(f"{where} must not include {shown} in securityContext.capabilities.add")
    return f"unrestricted capabilities ({'; '.join(texts)})" if texts else ""


def _volumes(spec: Mapping[str, Any]) -> str:
    def kind(volume: Mapping[str, Any]) -> str:
        return next((name for name in volume if name != "name"), "emptyDir")

    bad = [volume for volume in spec.get("volumes") or () if kind(volume) not in _SAFE_VOLUMES]
    names, kinds = ", ".join(f'"{item["name"]}"' for item in bad), sorted({kind(item) for item in bad})
    shown = ", ".join(f'"{name}"' for name in kinds)
    more = len(bad) > 1
    return f"restricted volume types (volume{'s' if more else ''} {names} use{'' if more else 's'} restricted volume type{'s' if len(kinds) > 1 else ''} {shown})" if bad else ""  # fmt: skip  # noqa: E501


def _non_root(spec: Mapping[str, Any]) -> str:
    pod = _context(spec).get("runAsNonRoot")
    where = _where(spec, lambda context: not context.get("runAsNonRoot", pod))
    if not where:
        return ""
    return f"runAsNonRoot != true (pod or {where} must set securityContext.runAsNonRoot=true)"


def _root_user(spec: Mapping[str, Any]) -> str:
    where = ["pod"] if _context(spec).get("runAsUser") == 0 else []
    where += [found] if (found := _where(spec, lambda context: context.get("runAsUser") == 0)) else []
    return f"runAsUser=0 ({' and '.join(where)} must not set runAsUser=0)" if where else ""


def _seccomp(spec: Mapping[str, Any]) -> str:
    def of(context: Mapping[str, Any]) -> Any:
        return (context.get("seccompProfile") or {}).get("type")

    pod = of(_context(spec))
    where = _where(spec, lambda context: (of(context) or pod) not in _PROFILES)
    if not where:
        return ""
    text = 'must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost"'
    return f"seccompProfile (pod or {where} {text})"


_BASELINE: Final = (
    *(_host_namespaces, _privileged, _baseline_capabilities, _host_paths, _host_ports, _proc_mount, _sysctls),
    _unconfined,
)
_RESTRICTED: Final = (_escalation, _restricted_capabilities, _volumes, _non_root, _root_user, _seccomp)
