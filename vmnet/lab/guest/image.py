"""The guest's kernel and initramfs, built once for each set of inputs."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmnet.lab.errors import LabError
from vmnet.lab.guest import cpio, packages, probe
from vmnet.lab.guest.cpio import Entry

FILES: Final = Path(__file__).with_name("files")
MODULES: Final = ("virtio_pci", "virtio_net", "virtio_console", "button", "evdev")
"""What the cloud kernel has as modules: the devices of the lab's QEMU, and the power button for an orderly end."""

_PLACES: Final = {
    "init": ("init", 0o755),
    "inittab": ("etc/inittab", 0o644),
    "rc": ("etc/rc", 0o755),
    "profile": ("etc/profile", 0o644),
    "udhcpc.sh": ("etc/udhcpc.sh", 0o755),
    "card": ("etc/card", 0o755),
    "resolver": ("etc/resolver", 0o755),
    "dhcpcd.conf": ("etc/dhcpcd.conf", 0o644),
    "dhcpcd-hook": ("etc/dhcpcd-hook", 0o755),
    "power": ("etc/acpi/PWRF/00000080", 0o755),
}
_TEXTS: Final = {
    "etc/passwd": "root::0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}
_EMPTY: Final = ("proc", "sys", "dev", "run", "tmp", "root", "mnt", "var/lib/dhcpcd", "var/run", "var/db", "usr/bin")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What QEMU boots. ``identity`` names the set of inputs it was built from."""

    kernel: Path
    initramfs: Path
    identity: str
    kernel_release: str


def _silent(_: str) -> None:
    return


def guest_image(progress: Progress = _silent) -> GuestImage:
    """The image, from the cache or built now (some seconds and a download of 27 MB). Raises LabError."""
    cache = packages.cache_directory()
    with packages.locked(cache):
        return _Builder(cache, progress).image()


def cached_image() -> GuestImage | None:
    """The image if it is in the cache; nothing is downloaded or compiled."""
    cache = packages.cache_directory()
    if not sorted((cache / "packages").glob("linux-image-*")) or not sorted(cache.glob("probe-*")):
        return None
    try:
        return guest_image()
    except LabError:
        return None


class _Builder:
    """Gathers the inputs of one image."""

    def __init__(self, cache: Path, progress: Progress) -> None:
        self._cache = cache
        self._progress = progress

    def image(self) -> GuestImage:
        entries: list[Entry] = []
        kernel_files = self._kernel_files()
        kernel = next((kernel_files / "boot").glob("vmlinuz-*"))
        release = kernel.name.removeprefix("vmlinuz-")
        entries += self._modules(kernel_files / "lib" / "modules" / release)
        entries += self._busybox()
        entries += self._program("dhcpcd", "dhcpcd-base", "sbin/dhcpcd")
        entries += self._program("iperf3", "iperf3", "bin/iperf3", ("libiperf0", "libsctp1", "libssl3"))
        entries.append(Entry.file("bin/probe", probe.compiled(self._cache).read_bytes(), 0o755))
        entries += self._own_files()
        body = cpio.archive(entries)
        identity = hashlib.sha256(body + release.encode()).hexdigest()[:16]
        target = self._cache / f"image-{identity}"
        if not target.exists():
            self._progress(f"guest image: Linux {release}, {len(body) // 2**20} MiB initramfs")
            self._store(target, kernel, body, release)
        return GuestImage(target / "vmlinuz", target / "initramfs.cpio", identity, release)

    def _store(self, target: Path, kernel: Path, body: bytes, release: str) -> None:
        temporary = target.with_name(f".{target.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        shutil.copyfile(kernel, temporary / "vmlinuz")
        (temporary / "initramfs.cpio").write_bytes(body)
        (temporary / "image.json").write_text(json.dumps({"kernel": release}) + "\n")
        temporary.rename(target)

    def _kernel_files(self) -> Path:
        found = sorted((self._cache / "packages").glob("linux-image-*-cloud-amd64_*"))
        if found:
            return found[-1]
        self._progress("download the guest's kernel")
        return packages.extracted(packages.kernel_package(), self._cache)

    def _modules(self, directory: Path) -> list[Entry]:
        """The modules and all they need, with a list in the order of loading."""
        needs: dict[str, tuple[Path, list[str]]] = {}
        paths = {path.stem.replace("-", "_"): path for path in (directory / "kernel").rglob("*.ko")}
        for name, path in paths.items():
            needs[name] = (path, [])
        order: list[str] = []

        def visit(name: str) -> None:
            if name in order or name not in paths:
                return  # built into the kernel
            for dependency in module_dependencies(paths[name].read_bytes()):
                visit(dependency)
            order.append(name)

        for name in MODULES:
            visit(name)
        entries = [Entry.file(f"lib/modules/{name}.ko", paths[name].read_bytes()) for name in order]
        return [*entries, Entry.file("lib/modules/order", "".join(f"{name}.ko\n" for name in order).encode())]

    def _busybox(self) -> list[Entry]:
        path = _installed("busybox")
        if path is None or path.read_bytes()[:4] != b"\x7fELF":
            raise LabError("busybox is not installed", "run: vmnet lab prerequisites --install")
        applets = packages.run([str(path), "--list-full"]).split()
        links = [Entry.link(applet.removeprefix("usr/"), "/bin/busybox") for applet in applets]
        # Scripts and people expect them in /bin and /sbin whatever busybox thinks.
        return [
            *(link for link in links if link.path != "bin/busybox"),
            Entry.file("bin/busybox", path.read_bytes(), 0o755),
        ]

    def _program(self, name: str, package: str, place: str, libraries: Iterable[str] = ()) -> list[Entry]:
        """A program with its libraries: the machine's own, else from a package."""
        roots: list[Path] = []
        path = _installed(name)
        if path is None:
            self._progress(f"download {package}")
            roots = [packages.extracted(item, self._cache) for item in (package, *libraries)]
            found = [
                item for part in ("usr/sbin", "usr/bin", "sbin", "bin") for item in roots[0].glob(f"{part}/{name}")
            ]
            if not found:
                raise LabError(f"package {package} has no program {name}")
            path = found[0]
        search = ":".join(str(item.parent) for root in roots for item in root.rglob("lib*.so*"))
        output = packages.run(["env", f"LD_LIBRARY_PATH={search}", "ldd", str(path)])
        entries = [Entry.file(place, path.read_bytes(), 0o755)]
        for wanted, real in _libraries(output):
            entries.append(Entry.file(wanted, Path(real).read_bytes(), 0o755))
        return entries

    def _own_files(self) -> list[Entry]:
        entries = [Entry.directory(path) for path in _EMPTY]
        entries += [Entry.file(place, (FILES / name).read_bytes(), mode) for name, (place, mode) in _PLACES.items()]
        entries += [Entry.file(place, text.encode()) for place, text in _TEXTS.items()]
        entries += [
            Entry.link("etc/resolv.conf", "/run/resolv.conf"),
            Entry.character_device("dev/console", 5, 1),
            Entry.character_device("dev/null", 1, 3),
        ]
        return entries


def module_dependencies(module: bytes) -> list[str]:
    """Names in the module's own ``depends=`` record (modinfo)."""
    match = re.search(rb"(?:^|\0)depends=([^\0]*)\0", module)
    return [name.decode().replace("-", "_") for name in match.group(1).split(b",") if name] if match else []


def _installed(name: str) -> Path | None:
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    return Path(found).resolve() if found else None


def _libraries(ldd: str) -> list[tuple[str, str]]:
    """(place in the guest, file here) of each line of ldd's output. Raises LabError when one is missing."""
    found = []
    for line in ldd.splitlines():
        words = line.split()
        if "not found" in line:
            raise LabError(f"library {words[0]} is missing", "run: vmnet lab prerequisites --install")
        if len(words) >= 3 and words[1] == "=>" and words[2].startswith("/"):
            found.append((f"lib/x86_64-linux-gnu/{words[0]}", words[2]))
        elif words and words[0].startswith("/"):
            found.append((words[0].lstrip("/"), words[0]))
    return found
