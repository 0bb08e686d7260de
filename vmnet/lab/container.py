"""Runs a program as the container of a manifest of ``deploy/`` runs, on the machine's own files.

``python -m vmnet.lab.container MANIFEST [--secret SOURCE=PATH] -- WORD …`` becomes the manifest's command, with the
words in the place of ``vmnet`` and of the arguments. What a container runtime makes of the manifest's
``securityContext`` and volumes is done here by the same system calls: user, capabilities, ``no_new_privs``, seccomp,
mounts and their propagation, a control-group namespace, a read-only root and a read-only ``/proc/sys``. So what a
process needs and does not have fails in the lab, too. Not made: PID, user and network namespaces (agents have the
node's), the image, the device rules.
"""

import argparse
import ctypes
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from vmnet.lab import namespaces
from vmnet.lab.errors import LabError

PROGRAM: Final = "vmnet"
TEMPORARY: Final = Path("/tmp")
CREDENTIALS: Final = "/tmp/kubeconfig"
"""Where a confined process has its credentials, which it alone can read."""
READ_ONLY: Final = ("/proc/sys", "/proc/bus", "/proc/fs", "/proc/irq")
"""What runtimes let nobody write who is not privileged."""
REFUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "": (
        *("add_key", "keyctl", "request_key", "userfaultfd", "pivot_root", "kexec_load", "kexec_file_load", "reboot"),
        *("init_module", "finit_module", "delete_module", "iopl", "ioperm", "settimeofday", "clock_settime", "swapon"),
        *("swapoff", "acct", "open_by_handle_at", "mbind", "set_mempolicy", "move_pages", "migrate_pages", "vhangup"),
        *("nfsservctl", "uselib", "ustat", "sysfs", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    ),
    "SYS_ADMIN": (
        *(
            "bpf",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
        ),
        *("move_mount", "open_tree", "perf_event_open", "quotactl", "quotactl_fd", "setdomainname", "sethostname"),
        *("setns", "syslog", "umount2", "unshare"),
    ),
    "SYS_CHROOT": ("chroot",),
    "SYS_PTRACE": ("kcmp", "pidfd_getfd", "process_madvise", "process_vm_readv", "process_vm_writev"),
}
"""System calls that ``RuntimeDefault`` (containerd's) does not allow, by the capability that allows them."""

_ALLOW: Final = 0x7FFF0000
_EPERM: Final = 0x00050001
"""linux/seccomp.h: SECCOMP_RET_ALLOW, and SECCOMP_RET_ERRNO with EPERM."""
_NO_NEW_PRIVILEGES: Final = 3
"""seccomp.h of libseccomp: SCMP_FLTATR_CTL_NNP, which it would set."""
_MOUNT_SETATTR: Final = 442
_AT_FDCWD: Final = -100
_AT_RECURSIVE: Final = 0x8000
_RDONLY: Final = 1


def container_of(manifest: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The one container of a manifest, and its pod's spec. Raises LabError when there are several."""
    pod = yaml.safe_load(manifest.read_text())["spec"]["template"]["spec"]
    if len(pod["containers"]) != 1:
        raise LabError(f"{manifest} has {len(pod['containers'])} containers, not one")
    return pod["containers"][0], pod


def context_of(container: Mapping[str, Any], pod: Mapping[str, Any]) -> dict[str, Any]:
    """The container's security context, and what it has of its pod's. Raises LabError when it is privileged."""
    context = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
    if context.get("privileged"):
        raise LabError("a privileged container is not what this makes")
    return context


def command_of(container: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """The container's command, with ``words`` in the place of ``vmnet``. Raises LabError when it starts another."""
    *before, program = container.get("command", [PROGRAM])
    if program != PROGRAM:
        raise LabError(f"the manifest starts {program}, not {PROGRAM}")
    return [*before, *words]


def capabilities_of(context: Mapping[str, Any]) -> list[str]:
    """What is kept, as ``SYS_ADMIN``. Raises LabError when not all others are dropped."""
    found = context.get("capabilities", {})
    if found.get("drop") != ["ALL"]:
        raise LabError("the manifest keeps a runtime's default capabilities")
    return sorted(found.get("add", []))


def identity(context: Mapping[str, Any]) -> list[str]:
    """Words before a command that runs with the context's user and capabilities."""
    user = int(context["runAsUser"])
    group = int(context.get("runAsGroup", user))
    kept = "".join(f",+{name.lower()}" for name in capabilities_of(context))
    words = ["setpriv", f"--bounding-set=-all{kept}", "--inh-caps=-all"]
    if user:
        words += [f"--reuid={user}", f"--regid={group}", "--clear-groups"]
    if context.get("allowPrivilegeEscalation") is False:
        words.append("--no-new-privs")
    return [*words, "--"]


def make_mounts(container: Mapping[str, Any], pod: Mapping[str, Any], readable: Iterable[Path]) -> None:
    """The container's mount and control-group namespace. ``readable`` stands for the image. Raises OSError."""
    namespaces.unshare(namespaces.CLONE_NEWNS | namespaces.CLONE_NEWCGROUP)
    namespaces.mount("none", "/", flags=namespaces.MS_REC | namespaces.MS_SLAVE)
    volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
    mounted = [(mount, volumes[mount["name"]]) for mount in container.get("volumeMounts", ())]
    for mount, volume in mounted:
        if "hostPath" in volume:
            source, target = Path(volume["hostPath"]["path"]), mount["mountPath"]
            source.mkdir(parents=True, exist_ok=True)
            namespaces.mount(source, target, flags=namespaces.MS_BIND | namespaces.MS_REC)
            if mount.get("mountPropagation") != "HostToContainer":
                namespaces.mount("none", target, flags=namespaces.MS_REC | namespaces.MS_PRIVATE)
    held = {path: os.open(path, os.O_PATH) for path in sorted({path.resolve() for path in readable})}
    namespaces.mount("tmpfs", TEMPORARY, "tmpfs", data="mode=1777")
    for path, descriptor in held.items():
        _reveal(path, descriptor)
        os.close(descriptor)
    for name in READ_ONLY:
        namespaces.bind(name, name)
    _set_read_only("/", recursive=True)
    for target in ("/proc", str(TEMPORARY)):
        _set_read_only(target, False)
    for mount, volume in mounted:
        if "hostPath" in volume and not mount.get("readOnly"):
            _set_read_only(mount["mountPath"], False, recursive=True)


def _set_read_only(target: str, wanted: bool = True, recursive: bool = False) -> None:
    attributes = (ctypes.c_uint64 * 4)(_RDONLY if wanted else 0, 0 if wanted else _RDONLY, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    size = ctypes.sizeof(attributes)
    number = ctypes.CDLL(None, use_errno=True).syscall
    if number(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), flags, ctypes.byref(attributes), size):
        raise OSError(ctypes.get_errno(), f"mount_setattr {target}: {os.strerror(ctypes.get_errno())}")


def _reveal(path: Path, descriptor: int) -> None:
    """Let everybody reach a directory, which ``descriptor`` still names where a mount has hidden it.

    A place above it that its owner keeps to himself, such as /root, is hidden by an empty one.
    """
    closed = next((place for place in reversed(path.parents) if place.exists() and not _open_to_all(place)), None)
    if closed is not None:
        namespaces.mount("tmpfs", closed, "tmpfs", data="mode=755")
    if not path.exists():
        path.mkdir(parents=True)
        namespaces.mount(f"/proc/self/fd/{descriptor}", path, flags=namespaces.MS_BIND | namespaces.MS_REC)


def _open_to_all(place: Path) -> bool:
    return bool(place.stat().st_mode & stat.S_IXOTH)


def filter_calls(kept: Sequence[str]) -> None:
    """Refuse this process what ``RuntimeDefault`` refuses to who has these capabilities. Raises OSError."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    try:
        results = [library.seccomp_attr_set(context, _NO_NEW_PRIVILEGES, ctypes.c_uint32(0))]
        for capability, names in REFUSED.items():
            for name in names if capability not in kept else ():
                number = library.seccomp_syscall_resolve_name(name.encode())
                if number >= 0:  # the library knows it, and this architecture has it
                    results.append(library.seccomp_rule_add(context, ctypes.c_uint32(_EPERM), number, 0))
        results.append(library.seccomp_load(context))
        if any(results):
            raise OSError(-min(results), f"seccomp: {os.strerror(-min(results))}")
    finally:
        library.seccomp_release(context)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="vmnet.lab.container")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--secret", metavar="SOURCE=PATH", action="append", default=[])
    parser.add_argument("words", nargs="+")
    arguments = parser.parse_args()
    container, pod = container_of(arguments.manifest)
    context = context_of(container, pod)
    secrets = {Path(path): Path(source).read_bytes() for source, _, path in map(_partition, arguments.secret)}
    repository = Path(__file__).parents[2]
    make_mounts(container, pod, (repository, Path(sys.prefix), Path(sys.base_prefix)))
    for path, content in secrets.items():
        path.touch(mode=0o400)
        path.write_bytes(content)
        shutil.chown(path, int(context["runAsUser"]))
    if context["seccompProfile"] != {"type": "RuntimeDefault"}:
        raise LabError("the manifest asks for another seccomp profile than the runtime's")
    words = [*identity(context), *command_of(container, arguments.words)]
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["HOME"] = "/"
    filter_calls(capabilities_of(context))
    os.execvp(words[0], words)  # noqa: S606


def _partition(text: str) -> tuple[str, str, str]:
    return text.partition("=")


if __name__ == "__main__":
    main()
