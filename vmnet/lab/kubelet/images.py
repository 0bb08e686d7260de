"""What a container without an image runs: the lab executes commands on the machine's own files.

An image only matters where a container gives no ``command``: then its entry point is looked up here, by the image's
name without registry, tag and digest.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Final

ENTRY_POINTS: Final[Mapping[str, tuple[str, ...]]] = {
    "pause": ("sleep", "infinity"),
    "agnhost": (sys.executable, "-m", "vmnet.lab.kubelet.agnhost"),
    "busybox": ("busybox", "sh"),
    "cluster-dns": (sys.executable, "-m", "vmnet.lab.cluster_dns"),
    "iperf3": ("iperf3",),
}
DEFAULT_ARGUMENTS: Final[Mapping[str, tuple[str, ...]]] = {"agnhost": ("pause",)}


class UnknownImage(Exception):
    """The container has no command and the lab knows no entry point for its image."""


def short_name(image: str) -> str:
    """``registry.k8s.io/e2e-test-images/agnhost:2.53@sha256:…`` as ``agnhost``."""
    return image.split("@")[0].rpartition("/")[2].split(":")[0]


def argv(image: str, command: Sequence[str], args: Sequence[str]) -> tuple[str, ...]:
    """What to execute. Raises UnknownImage."""
    if command:
        return (*command, *args)
    name = short_name(image)
    if name not in ENTRY_POINTS:
        raise UnknownImage(
            f"image {image!r} is not known to the lab and the container gives no command; "
            f"known: {', '.join(sorted(ENTRY_POINTS))}"
        )
    return (*ENTRY_POINTS[name], *(args or DEFAULT_ARGUMENTS.get(name, ())))


def image_id(image: str) -> str:
    """``imageID`` of a container status; KubeVirt refuses to migrate without a digest at its end."""
    if "@sha256:" in image:
        return image
    return f"{image.split('@')[0]}@sha256:{hashlib.sha256(image.encode()).hexdigest()}"
