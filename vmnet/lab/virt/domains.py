"""The guests of one node: one connection to each QEMU, and what it has reported."""

import asyncio
import ipaddress
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmnet.kube.api import Object
from vmnet.lab import directory
from vmnet.lab.guest.agent import AgentError, GuestAgent
from vmnet.lab.virt import qemu
from vmnet.lab.virt.qmp import Event, QemuError, Qmp

PAUSE_FILE: Final = "paused-at.json"
"""In the source pod's directory: when its QEMU stopped the guest for good, for the target's virt-handler to read."""


def pod_directory(pod_uid: str) -> Path:
    """A pod's directory, the same path everywhere in the lab. Raises KeyError outside a lab."""
    return Path(os.environ[directory.ENVIRONMENT_VARIABLE], "pods", pod_uid)


@dataclass(frozen=True, slots=True)
class GuestFacts:
    """What the guest's agent says: IPv4 addresses before IPv6 ones, without prefix lengths."""

    cards: tuple[tuple[str, tuple[str, ...]], ...]
    """(Interface, its addresses) in the guest's order."""
    os: dict[str, str]

    def of(self, card: int) -> tuple[str, tuple[str, ...]]:
        """Interface and addresses of the guest's card of that number."""
        name = f"eth{card}"
        return name, dict(self.cards).get(name, ())


class Domain:
    """One QEMU, in the launcher pod ``pod_uid``."""

    def __init__(self, pod_uid: str, monitor: Qmp) -> None:
        self.pod_uid = pod_uid
        self.directory = pod_directory(pod_uid)
        self.monitor = monitor
        self.shut_down = False
        """The guest or somebody ended it in an orderly way."""
        self.paused = False
        """Stopped, and not for a migration."""
        self._agent = GuestAgent(self.directory / qemu.AGENT_SOCKET)

    @classmethod
    async def open(cls, pod: Object, changed: Callable[[], None], timeout: float) -> "Domain":
        """Connect to a pod's QEMU; ``changed`` is called when it reports something. Raises QemuError."""
        uid = pod["metadata"]["uid"]
        monitor = await Qmp.connect(pod_directory(uid) / qemu.QMP_SOCKET, timeout)
        domain = cls(uid, monitor)

        def heard(event: Event) -> None:
            if event.name == "SHUTDOWN":
                domain.shut_down = True
            changed()

        monitor.listen(heard)
        return domain

    @property
    def gone(self) -> bool:
        """Whether QEMU has ended."""
        return self.monitor.closed.is_set()

    async def status(self) -> str:
        """QEMU's run state: running, paused, inmigrate, postmigrate, … Raises QemuError."""
        answer = await self.monitor.execute("query-status")
        return str(answer["status"])

    async def network_cards(self) -> dict[int, str]:
        """MACs of the guest's cards, by their number. Raises QemuError."""
        answer = await self.monitor.execute("query-rx-filter")
        # Cards without an id are called by their kind and place: virtio-net-pci.0, virtio-net-pci.1.
        return {int(str(card["name"]).rpartition(".")[2]): str(card["main-mac"]) for card in answer}

    async def quit(self) -> None:
        """End QEMU at once."""
        self.shut_down = True
        with suppress(QemuError):
            await self.monitor.execute("quit")

    async def guest_facts(self) -> GuestFacts | None:
        """None while the guest's agent does not answer."""
        try:
            addresses = await self._agent.run(["ip", "-o", "addr", "show", "scope", "global"], timeout=2)
            system = await self._agent.run(["uname", "-srvm"], timeout=2)
        except AgentError:
            return None
        return parse_facts(addresses.stdout, system.stdout)

    def close(self) -> None:
        """Hang up; QEMU runs on."""
        self._agent.close()
        self.monitor.close()

    def note_pause(self, event: Event) -> None:
        """Leave the time of the guest's stop where the target's virt-handler finds it."""
        temporary = self.directory / f".{PAUSE_FILE}"
        temporary.write_text(json.dumps({"time": event.time}) + "\n")
        temporary.rename(self.directory / PAUSE_FILE)


def parse_facts(addresses: str, system: str) -> GuestFacts:
    """From ``ip -o addr`` and ``uname -srvm``."""
    found: dict[str, list[str]] = {}
    for match in re.finditer(r"^\d+: (\S+)\s+inet6? (\S+)", addresses, re.MULTILINE):
        found.setdefault(match.group(1), []).append(match.group(2).partition("/")[0])
    for listed in found.values():
        listed.sort(key=lambda text: ipaddress.ip_address(text).version)
    words = system.split()
    facts = {"id": "vmnet-guest", "name": "vmnet lab guest", "prettyName": "vmnet lab guest (Debian kernel, busybox)"}
    if len(words) >= 4:
        facts |= {"kernelRelease": words[1], "kernelVersion": " ".join(words[2:-1]), "machine": words[-1]}
    return GuestFacts(tuple((name, tuple(listed)) for name, listed in sorted(found.items())), facts)


async def read_pause(source_pod_uid: str, timeout: float = 2.0) -> float | None:
    """When the source's QEMU stopped the guest, in seconds since the epoch; None when that is not known."""
    path = pod_directory(source_pod_uid) / PAUSE_FILE
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    return float(json.loads(path.read_text())["time"])
                except (FileNotFoundError, ValueError, KeyError):
                    await asyncio.sleep(0.02)
    except TimeoutError:
        return None
