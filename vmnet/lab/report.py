"""The demo's report: what was seen, as JSON and for a terminal."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(slots=True)
class Stream:
    """One TCP stream as its client in the guest saw it."""

    name: str
    bytes: int
    resets: int
    longest_gap_ms: float
    survived: bool


@dataclass(slots=True)
class Lookup:
    """One name that a guest looked up."""

    where: str
    name: str
    type: str
    expected: str
    answer: list[str]

    @property
    def ok(self) -> bool:
        """Whether the expected value was in the answer."""
        return self.expected in self.answer


@dataclass(slots=True)
class Report:
    """``build/demo/report.json``."""

    vm: str = "blue-namespace/blue"
    accelerator: str = ""
    from_node: str = ""
    to_node: str = ""
    addresses_before: list[str] = field(default_factory=list)
    addresses_after: list[str] = field(default_factory=list)
    addresses_after_restart: list[str] = field(default_factory=list)
    restarted_on: str = ""
    gateway_mac_before: str = ""
    gateway_mac_after: str = ""
    qemu_pause_ms: float | None = None
    probe_gap_ms: float | None = None
    probes_sent: int = 0
    probes_lost: int | None = None
    probes_duplicated: int | None = None
    tcp_streams: list[Stream] = field(default_factory=list)
    announcements: dict[str, int] = field(default_factory=dict)
    dns: list[Lookup] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    vmi_interfaces: list[dict[str, Any]] = field(default_factory=list)
    migration_s: float = 0.0
    duration_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """JSON with ``from`` and ``to`` as the keys readers expect."""
        body = asdict(self)
        body["from"] = body.pop("from_node")
        body["to"] = body.pop("to_node")
        for item, lookup in zip(body["dns"], self.dns, strict=True):
            item["ok"] = lookup.ok
        return json.dumps(body, indent=2) + "\n"


def write(report: Report, path: Path) -> None:
    """Write the JSON report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.to_json())


def show(report: Report, path: Path, console: Console | None = None) -> None:
    """Print the report for a person."""
    console = console or Console(soft_wrap=True, emoji=False, highlight=False)
    facts = Table.grid(padding=(0, 2))
    rows = (
        ("machine", f"{report.vm}, QEMU with {report.accelerator or 'unknown accelerator'}"),
        ("migrated", f"{report.from_node} → {report.to_node} in {report.migration_s:.1f} s"),
        ("claims", "; ".join(f"{claim['name']} {', '.join(claim['ips'])}" for claim in report.claims)),
        ("addresses", _kept(report.addresses_before, report.addresses_after)),
        ("gateway MAC", _kept(report.gateway_mac_before, report.gateway_mac_after)),
        ("QEMU's pause", f"{report.qemu_pause_ms} ms"),
        ("1 kHz probe", f"gap {report.probe_gap_ms} ms, {report.probes_lost} of {report.probes_sent} lost"),
        ("announced", ", ".join(f"{count} {kind}" for kind, count in report.announcements.items())),
        ("names", f"{sum(item.ok for item in report.dns)} of {len(report.dns)} right"),
        ("stop, start", f"{_kept(report.addresses_before, report.addresses_after_restart)} on {report.restarted_on}"),
    )
    for name, text in rows:
        facts.add_row(f"[bold]{name}[/]", text)
    streams = Table("TCP stream", "bytes", "resets", "longest gap", "", box=None, padding=(0, 2))
    for stream in report.tcp_streams:
        verdict = "[green]ran on[/]" if stream.survived else "[yellow]broke[/]"
        gap = f"{stream.longest_gap_ms:.0f} ms"
        streams.add_row(stream.name, f"{stream.bytes:,}", str(stream.resets), gap, verdict)
    console.print(facts, streams, sep="\n\n")
    for problem in report.problems:
        console.print(f"[red]✗ {problem}[/]")
    console.print(
        f"\n{'[red]FAILED[/]' if report.problems else '[green]passed[/]'} in {report.duration_s:.0f} s, {path}"
    )


def _kept(before: object, after: object) -> str:
    text = ", ".join(before) if isinstance(before, list) else str(before)
    return f"{text} [green]kept[/]" if before == after else f"[red]{before} → {after}[/]"
