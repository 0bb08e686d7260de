"""A live migration, derived from observed facts (never advanced by events that may be missed)."""

from dataclasses import dataclass
from enum import StrEnum

from vmnet.model.endpoint import MachineReference


class MigrationPhase(StrEnum):
    """Where a migration stands, as the VirtualMachineInstance and its pods show it."""

    STAGING = "staging"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class Key(StrEnum):
    """What opened the target's port."""

    FRAME = "frame"
    """The guest's own RARP, in the kernel."""
    ANNOTATION = "annotation"
    """KubeVirt's migration-target-ready-timestamp, or the VMI status."""


class Way(StrEnum):
    """How a machine's connections came along."""

    NOBODY = "nobody"
    """There was no other node's agent to ask: the machine began here, or its network leads nowhere."""
    STREAMED = "streamed"
    """The source's agent told them, before the guest came and right after."""
    LATE = "late"
    """It could be asked only after the guest had come."""
    UNANSWERED = "unanswered"
    """It was away: TCP lives on by what the kernel does alone, for a time even under policies; the rest begins anew."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What came along with a machine; ``seconds``: from the guest's first frame to the last entry."""

    way: Way = Way.NOBODY
    connections: int = 0
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class LastFrame:
    """The guest's last frame at its old node: when, by this node's clock, which may differ by ``error`` seconds."""

    at: float
    error: float


@dataclass(frozen=True, slots=True)
class CutOver:
    """What one agent saw of one cut-over. Times are seconds since the epoch, None where nothing was seen."""

    machine: MachineReference
    network: str
    node: str
    key: Key
    opened_at: float | None
    """None when the frame opened the port while no agent ran."""
    frame_at: float | None = None
    annotation_at: float | None = None
    first_frame_at: float | None = None
    """First frame the new port carried towards the guest after it opened."""
    last_frame: LastFrame | None = None
    """None where the source's agent was away, or cannot tell."""
    announcements: int = 0
    source: str = ""
    """Node that the machine came from: its connections over the network's edge stay with that node's router."""
    carried: Carried = Carried()
